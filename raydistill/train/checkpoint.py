"""Checkpoints: what it takes to continue a phase bit for bit, by parameter name.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors …      the fragments that each rank owns
    checkpoints/step-00000100.json                                   written last; without it there is no checkpoint

DeepSpeed's own checkpoints are bound to the number of ranks, its converter needs a process per conversion and both go
through pickle. Written as fragments (see `masters.py`), masters, moments and averages fit any number of ranks and any
ZeRO stage without a conversion, on any file system.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field, JsonValue
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raydistill.cache.manifest import parsed
from raydistill.config.base import Config
from raydistill.errors import DataError, StorageFailed
from raydistill.storage import Store
from raydistill.train.ema import Ema
from raydistill.train.engine import Engine
from raydistill.train.masters import KINDS, Fragment

CHECKPOINT_VERSION = 1
SLOWEST_SECONDS = 1800.0
"""Time that the other ranks' files of a checkpoint may take longer to reach an object store."""


class Progressed(Config):
    """How far a phase has come; the content of a checkpoint's JSON file."""

    version: int = CHECKPOINT_VERSION
    step: int = 0
    """Optimizer steps done; also the next step's number."""
    samples: int = 0
    """Rows trained on, each counted every time."""
    tokens: int = 0
    """Targets trained on."""
    seconds: float = 0.0
    """Time spent training."""
    num_ranks: int = 1
    """Ranks that wrote the checkpoint."""
    updates: dict[str, int] = Field(default_factory=dict)
    """Steps taken, by player."""
    ema_updates: int = 0
    """Updates of the average."""
    losses: tuple[float, ...] = ()
    """The last losses, which decide what counts as an explosion."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The phase's settings, which must not change while it runs."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one phase.

    On a file system a checkpoint is there when `save` returns. On an object store it is sent while training goes on,
    one at a time; `settle` waits for the last one.
    """

    store: Store
    keep: int

    def latest(self) -> Progressed | None:
        """The newest complete checkpoint."""
        steps = self._steps()
        if not steps:
            return None
        name = _marker(steps[-1])
        remedy = "Remove this file: training goes on from the checkpoint before it, or from the beginning."
        return parsed(Progressed, self.store.read(name), where=f"{self.store.uri}/{name}", remedy=remedy)

    def save(self, engines: Mapping[str, Engine], ema: Ema | None, progressed: Progressed) -> None:
        """Write a checkpoint, all ranks together, and drop those beyond the newest `keep`."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        name = _folder(progressed.step)
        tensors, starts = _state(engines, ema, owner=rank == 0)
        tensors["random/cpu"], starts["random/cpu"] = torch.get_rng_state(), 0
        if torch.cuda.is_available():
            tensors["random/cuda"], starts["random/cuda"] = torch.cuda.get_rng_state(), 0
        metadata = {"starts": json.dumps(starts)}

        def write() -> None:
            (self.store / name).publish(_file(rank, ranks), lambda path: save_file(tensors, path, metadata=metadata))

        if self.store.is_local:
            write()
            dist.barrier()
            if rank == 0:
                self._complete(progressed)
            dist.barrier()
            return

        def send() -> None:
            write()
            if rank == 0:
                self._await([_file(r, ranks) for r in range(ranks)], name)
                self._complete(progressed)

        self.settle()
        # Rank 0 removes folders without a marker when it completes one: no rank may send the next before that.
        dist.barrier()
        self._sending.append(self._sender.submit(send))

    def settle(self) -> None:
        """Wait until the last checkpoint is where it belongs, as far as this rank has a part in it.

        Raises what sending it raised, `StorageFailed` above all.
        """
        while self._sending:
            self._sending.pop().result()

    @cached_property
    def _sender(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="raydistill-checkpoint")

    @cached_property
    def _sending(self) -> list[Future[None]]:
        return []

    def _await(self, files: Sequence[str], folder: str) -> None:
        """Wait for the files of the other ranks: in the background ranks cannot wait for each other by a barrier."""
        deadline = time.monotonic() + SLOWEST_SECONDS
        while missing := set(files) - set((self.store / folder).names()):
            if time.monotonic() > deadline:
                raise StorageFailed(
                    f"{self.store.uri}/{folder}: {', '.join(sorted(missing))} did not arrive within "
                    f"{SLOWEST_SECONDS / 60:.0f} minutes. The one before it is whole; run the same command again."
                )
            time.sleep(1)

    def _complete(self, progressed: Progressed) -> None:
        """Say that all the files are there, and drop the oldest checkpoints."""
        self.store.publish(_marker(progressed.step), progressed.model_dump_json(indent=1))
        for step in self._steps()[: -self.keep]:
            self.store.delete(_marker(step))  # first, so that half a checkpoint is never taken for one
        self.clear()

    def load(self, progressed: Progressed, engines: Mapping[str, Engine], ema: Ema | None) -> None:
        """Bring this rank's share of the state of a checkpoint into the engines, whatever number of ranks wrote it."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        folder = self.store / _folder(progressed.step)
        with _local(folder, progressed.num_ranks) as paths, _Reader(paths) as reader:
            for player, engine in engines.items():
                for fragment in engine.masters.fragments:
                    for kind in KINDS:
                        value = reader.stretch(f"{player}/{kind}/{fragment.name}", fragment)
                        engine.masters.write(fragment, value, kind)
                engine.resume(progressed.updates[player])
            if ema is not None:
                for fragment in engines["student"].masters.fragments:
                    ema.values[fragment.name].copy_(reader.stretch(f"ema/{fragment.name}", fragment))
                ema.num_updates = progressed.ema_updates
            if ranks == progressed.num_ranks:
                torch.set_rng_state(reader.whole("random/cpu", rank))
                if torch.cuda.is_available() and reader.has("random/cuda"):
                    torch.cuda.set_rng_state(reader.whole("random/cuda", rank))
        dist.barrier()

    def name(self, step: int) -> str:
        """Where the checkpoint of `step` is, for messages."""
        return (self.store / _folder(step)).uri

    def _steps(self) -> list[int]:
        names = [n for n in self.store.names() if n.startswith("step-") and n.endswith(".json")]
        return sorted(int(n.removeprefix("step-").removesuffix(".json")) for n in names)

    def clear(self) -> None:
        """Remove folders that belong to no complete checkpoint: dropped ones, and those a killed run left behind.

        For one rank, while no other is saving.
        """
        kept = {_folder(step) for step in self._steps()}
        for name in self.store.folders():
            if name.startswith("step-") and name not in kept:
                self.store.delete_folder(name)


def _state(engines: Mapping[str, Engine], ema: Ema | None, *, owner: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's tensors by key, and where in its parameter each begins. Rank 0 alone writes replicated state."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}

    def put(key: str, fragment: Fragment, value: Tensor) -> None:
        if fragment.stop > fragment.start:
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
            starts[key] = fragment.start

    for player, engine in engines.items():
        if engine.masters.replicated and not owner:
            continue
        for fragment in engine.masters.fragments:
            for kind in KINDS:
                put(f"{player}/{kind}/{fragment.name}", fragment, engine.masters.read(fragment, kind))
    if ema is not None and (owner or not engines["student"].masters.replicated):
        for fragment in engines["student"].masters.fragments:
            put(f"ema/{fragment.name}", fragment, ema.values[fragment.name])
    return tensors, starts


class _Reader:
    """Stretches of parameters out of the files of all ranks that wrote a checkpoint."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __enter__(self) -> _Reader:
        self._files = [safe_open(path, framework="pt").__enter__() for path in self._paths]
        self._starts = [json.loads(f.metadata()["starts"]) for f in self._files]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def has(self, key: str) -> bool:
        return all(key in starts for starts in self._starts)

    def whole(self, key: str, index: int) -> Tensor:
        return self._files[index].get_tensor(key)

    def stretch(self, key: str, fragment: Fragment) -> Tensor:
        """The numbers `[start, stop)` of the parameter of `fragment`."""
        value = torch.empty(fragment.stop - fragment.start)
        filled = 0
        for file, starts in zip(self._files, self._starts, strict=True):
            if key not in starts:
                continue
            begin, piece = starts[key], file.get_slice(key)
            low, high = max(fragment.start, begin), min(fragment.stop, begin + piece.get_shape()[0])
            if low < high:
                value[low - fragment.start : high - fragment.start] = piece[low - begin : high - begin]
                filled += high - low
        if filled != len(value):
            raise DataError(
                f"the checkpoint holds {filled} of the {len(value)} wanted numbers of {key}: it belongs to another "
                "student. Use another run_dir, or move the phase's folder away to train it again."
            )
        return value


@contextmanager
def _local(store: Store, num_ranks: int) -> Iterator[list[Path]]:
    """The files of a checkpoint as local paths; fetched first where the store is no local disk."""
    names = [_file(rank, num_ranks) for rank in range(num_ranks)]
    if store.is_local:
        yield [Path(store.path(name)) for name in names]
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            store.fetch(name, Path(folder, name))
        yield [Path(folder, name) for name in names]


def _folder(step: int) -> str:
    return f"step-{step:08}"


def _marker(step: int) -> str:
    return f"{_folder(step)}.json"


def _file(rank: int, num_ranks: int) -> str:
    return f"rank-{rank:05}-of-{num_ranks:05}.safetensors"
