"""The weights that a phase hands over: whole, fp32, under the student's own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from raydistill.signals import JsonValue
from raydistill.storage import Store
from raydistill.train.checkpoint import Progressed
from raydistill.train.engine import Engine
from raydistill.train.job import FINAL, RECORD, PhaseJob
from raydistill.train.masters import assembled
from raydistill.train.prepare import PLAYERS, Prepared, first_state

BEST = "best"
BEST_RECORD = "best.json"
WEIGHTS = ("model.safetensors", "ema.safetensors", PLAYERS)


def write_weights(prepared: Prepared, store: Store) -> None:
    """Write the present masters (and averages) whole into `store`, all ranks together.

    Frozen parameters and buffers are those the phase began with, bit for bit, also where bf16 rounded the copies that
    the forward pass used. What players own beside the student goes to `players.safetensors`.
    """
    writer = prepared.rank == 0
    state = first_state(prepared.job) if writer else {}
    averages = dict(state) if prepared.ema is not None else {}
    others: dict[str, Tensor] = {}
    for player, engine in prepared.engines.items():
        _collect(prepared, player, engine, None, state, others)
    if prepared.ema is not None:
        _collect(prepared, "student", prepared.engines["student"], prepared.ema.values, averages, {})
    if writer:
        for file, tensors in zip(WEIGHTS, (state, averages, others), strict=True):
            if tensors:
                _save(store, file, tensors)
    dist.barrier()


def publish_final(job: PhaseJob, progressed: Progressed) -> None:
    """Put the best weights, where they are kept, in the place of the last ones, and write the phase's record."""
    final, best = job.store / FINAL, job.store / BEST
    record: dict[str, JsonValue] = {
        "steps": progressed.step, "samples": progressed.samples, "tokens": progressed.tokens,
        "seconds": progressed.seconds, "settings": job.settings(),
    }  # fmt: skip
    if job.phase.checkpoint.best_metric is not None and best.exists(BEST_RECORD):
        record["best"] = json.loads(best.read_text(BEST_RECORD))
        for name in WEIGHTS:
            if best.exists(name):
                copy_file(best, final, name)
    final.publish(RECORD, json.dumps(record, indent=1) + "\n")


def copy_file(source: Store, target: Store, name: str) -> None:
    """Publish file `name` of `source` in `target`, without having it in memory where both are local."""
    path = source.path(name)

    def copy(part: Path) -> None:
        shutil.copyfile(path, part)

    target.publish(name, copy if source.is_local else source.read(name))


def _collect(
    prepared: Prepared,
    player: str,
    engine: Engine,
    values: Mapping[str, Tensor] | None,
    state: dict[str, Tensor],
    others: dict[str, Tensor],
) -> None:
    """Put an engine's whole parameters into `state` by the student's names, and those of no student into `others`."""
    names = {id(p): n for n, p in prepared.recipe.student.named_parameters()}
    own = {n: names.get(id(p)) for g in engine.groups for n, p in zip(g.names, g.parameters, strict=True)}
    for name, tensor in assembled(engine.masters, values, keep=prepared.rank == 0):
        if tensor is None:
            continue
        known = own[name]
        if known is None:
            others[f"{player}/{name}"] = tensor
        else:
            assert known in state, f"{known} is trained, but not among the student's saved tensors"
            state[known] = tensor


def _save(store: Store, name: str, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {n: t.contiguous() for n, t in tensors.items()}
    store.publish(name, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
