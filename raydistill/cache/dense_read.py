"""Reads an inputs cache of images together with the signals of its teachers: any draws, in any order, as batches.

Row k of a signal shard belongs to row k of the inputs shard of the same name. That is promised by the way caches are
built and checked here all the same, as is the noise of every draw: a signal that was made from other rows or from other
noise is refused, never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from raydistill.cache.dense import DenseShard, read_description
from raydistill.cache.dense_batch import Draw, denoiser_batch, noise_hashes, stacked
from raydistill.cache.joined import Joined, OpenShards
from raydistill.cache.local import LocalFiles, Unpacked
from raydistill.cache.manifest import Manifest
from raydistill.cache.samples import Indices
from raydistill.config.sources import NoiseConfig
from raydistill.errors import CacheMismatch, SignalMismatch
from raydistill.signals import Batch, JsonValue
from raydistill.storage import Store

NUM_READERS = 16
"""Shards whose descriptions are read at one time."""


class DenseDataset:
    """The draws of one split: draw d of row r is sample `r · draws_per_row + d`, rows in cache order.

    `fields` names the fields to read of each teacher's signal. Where it names none, the samples are the same but have
    neither noise nor timestep: whoever trains on them draws these anew in every step. `max_rows` keeps that many rows,
    evenly spread over the split. Shards are brought into `local_folder` as `read.Dataset` does.

    Raises `CacheMismatch` when a signal was not made from these inputs and this noise or lacks a field,
    `SignalMismatch` when a shard's rows, their content or the noise of a draw are not those of its inputs,
    `VerificationFailed` when a cache is listed as damaged.
    """

    def __init__(
        self,
        inputs: Store,
        signals: Mapping[str, Store],
        noise: NoiseConfig,
        *,
        split: str,
        fields: Mapping[str, Sequence[str]],
        max_rows: int | None = None,
        local_folder: Path | None = None,
        local_bytes: int | None = None,
    ):
        self.split = split
        self.draws_per_row = noise.draws_per_row
        self._joined = Joined(inputs, signals, split=split, fields=fields)
        self.inputs_manifest = self._joined.inputs_manifest
        self.signal_manifests = self._joined.signal_manifests
        self._fields = self._joined.fields
        self._noise = noise if self._fields else None
        if self._fields:
            require_stored_draws(self.inputs_manifest, noise)
        for teacher, manifest in self.signal_manifests.items():
            require_same_noise(manifest.facts, noise, where=self._joined.stores[teacher].uri)
        self._shard, self._row, _ = self._joined.places(max_rows)
        self._shards = dense_shards(self._joined, folder=local_folder, limit_bytes=local_bytes)

    @property
    def num_rows(self) -> int:
        """Samples of the split: rows (at most `max_rows`) times draws."""
        return len(self._shard) * self.draws_per_row

    @property
    def shard_of(self) -> Int32[np.ndarray, " samples"]:
        """Shard of each sample, counted from 0 within the split; ascending."""
        return np.repeat(self._shard, self.draws_per_row)

    @property
    def shard_rows(self) -> list[int]:
        """Samples kept of each shard: the shape that `Order` wants."""
        rows = np.bincount(self._shard, minlength=len(self._joined.records[""]))
        return (rows * self.draws_per_row).tolist()

    @property
    def costs(self) -> Int64[np.ndarray, " samples"]:
        """All alike: the samples of a batch are of one bucket."""
        return np.ones(self.num_rows, np.int64)

    @cached_property
    def buckets(self) -> Int64[np.ndarray, " samples"]:
        """Bucket of each sample, by its place among the sizes [height, width] of the split."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            described = list(pool.map(partial(read_description, self._joined.stores[""]), self._joined.names()))
        sizes = [tuple(_sizes(meta)) for meta in described]
        places = {size: place for place, size in enumerate(sorted(set(sizes)))}
        of_shard = np.array([places[size] for size in sizes], np.int64)
        return of_shard[self.shard_of] if len(of_shard) else np.zeros(0, np.int64)

    def facts(self, teacher: str) -> Mapping[str, JsonValue]:
        """Facts of a teacher's signal, from its manifest."""
        return self.signal_manifests[teacher].facts

    def row_ids(self, indices: Indices) -> list[str]:
        """Ids of samples: `<row id>@<draw>`."""
        return [f"{draw.row_id}@{draw.draw}" for draw, _ in map(self._draw, indices)]

    def captions(self, indices: Indices) -> list[str]:
        """Captions of the images of samples, as they stand in the source; empty without text encoders."""
        return [caption_of(draw) for draw, _ in map(self._draw, indices)]

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Samples of one bucket as one batch.

        Besides what `denoiser_batch` gives, weight[B] fp32 of ones and `"<teacher>/<field>"` [B, ...] in the dtype in
        which the field is stored. Where trajectories were imported, `noise` is their first state.
        """
        draws, shards = zip(*map(self._draw, indices), strict=True)
        batch = denoiser_batch(draws, self._noise)
        batch["weight"] = torch.ones(len(draws))
        if self._noise is None:
            return batch
        found = noise_hashes(batch["noise"])
        for teacher, names in self._fields.items():
            for name in names:
                values = [shard[teacher].tensor(name)[d.row, d.draw] for d, shard in zip(draws, shards, strict=True)]
                batch[f"{teacher}/{name}"] = stacked(values)
            if "path" in names and self.facts(teacher).get("imported") is True:  # its noise was drawn elsewhere
                batch["noise"] = batch[f"{teacher}/path"][:, 0].float()
                continue
            for place, (draw, shard) in enumerate(zip(draws, shards, strict=True)):
                timestep = int(batch["timestep"][place])
                require_noise(shard[teacher], draw, found[place], timestep, where=str(shard[teacher].path))
        return batch

    def silenced(self, batch: Batch) -> dict[str, Tensor]:
        """The same samples with weight 0."""
        return {**batch, "weight": torch.zeros_like(batch["weight"])}

    def unpack(self, shard: int) -> None:
        """Have a shard on the local disk by the time its samples are asked for."""
        self._shards.unpack(shard)

    def _draw(self, index: int) -> tuple[Draw, dict[str, DenseShard]]:
        row, draw = divmod(int(index), self.draws_per_row)
        opened = self._shards.open(int(self._shard[row]))
        return Draw(opened[""], int(self._row[row]), draw), opened


def dense_shards(
    joined: Joined, *, folder: Path | None = None, limit_bytes: int | None = None
) -> OpenShards[DenseShard, Unpacked]:
    """The dense shards of `joined`, with what the local disk has of them in `folder`."""

    def key(source: str, shard: int) -> tuple[str, Callable[[], Unpacked]]:
        record = joined.records[source][shard]
        write = partial(joined.stores[source].fetch, record.name)
        return f"dense {record.sha256}", partial(Unpacked, record.bytes, write)

    local = LocalFiles(_mapped, suffix=".safetensors", folder=folder, limit_bytes=limit_bytes)
    return OpenShards(joined, local, key, require_same_rows)


def require_same_rows(inputs: DenseShard, signal: DenseShard, where: str) -> None:
    """Raise `SignalMismatch` unless a signal shard has the rows of its inputs shard, with the content they have."""
    for name in ("row_ids", "row_sha"):
        wanted, found = inputs.texts(name), signal.texts(name)
        if wanted != found:
            pairs = enumerate(zip_longest(wanted, found))
            row, (want, have) = next((row, pair) for row, pair in pairs if pair[0] != pair[1])
            raise SignalMismatch(
                f"{where} does not belong to its inputs: {name} of row {row} should be {want or 'nothing'}, "
                f"found {have or 'nothing'}. Run --stages verify, then --stages signals."
            )


def require_same_noise(facts: Mapping[str, JsonValue], noise: NoiseConfig, *, where: str) -> None:
    """Raise `CacheMismatch`, with the keys that differ, unless a signal was made with this noise."""
    found, wanted = facts.get("noise"), noise.model_dump(mode="json")
    if found == wanted:
        return
    have = found if isinstance(found, dict) else {}
    lines = [f"  {k}: wanted {wanted[k]}, found {have.get(k)}" for k in wanted if wanted[k] != have.get(k)]
    raise CacheMismatch(
        f"{where} was made with other noise than source.noise asks for:\n" + "\n".join(lines) + "\n"
        "Run --stages signals with this configuration."
    )


def require_stored_draws(inputs: Manifest, noise: NoiseConfig) -> None:
    """Raise `CacheMismatch` unless `noise` asks for the draws that came with the rows of imported inputs."""
    stored = inputs.facts.get("stored_draws")
    if stored is not None and (noise.draws_per_row, noise.caption_dropout) != (stored, 0):
        raise CacheMismatch(
            f"the inputs {inputs.fingerprint} are imported and hold {stored} draw(s) of noise per row, with its "
            f"caption; found source.noise.draws_per_row {noise.draws_per_row} and caption_dropout "
            f"{noise.caption_dropout:g}. Set them to {stored} and 0."
        )


def require_noise(signal: DenseShard, draw: Draw, sha: int, timestep: int, *, where: str) -> None:
    """Raise `SignalMismatch` unless the signal's prediction was made at this timestep and with noise of this hash."""
    kept = int(signal.tensor("noise_sha")[draw.row, draw.draw])
    # A trajectory begins at the noise alone and has no timestep.
    at = int(signal.tensor("timestep")[draw.row, draw.draw]) if "timestep" in signal.names else timestep
    if (kept, at) == (sha, timestep):
        return
    what = f"timestep {timestep}, found {at}" if kept == sha else f"noise of the hash {_hex(sha)}, found {_hex(kept)}"
    raise SignalMismatch(
        f"{where}: row {draw.row_id}, draw {draw.draw}: wanted {what}. The teacher was asked about other noise "
        "than that of the row's seed; run --stages verify, then --stages signals."
    )


def caption_of(draw: Draw) -> str:
    """Caption of the image of a draw; empty where the inputs have no text."""
    if "prompt_index" not in draw.shard.names:
        return ""
    return draw.shard.texts("captions")[int(draw.shard.tensor("prompt_index")[draw.row])]


def _sizes(meta: Mapping[str, JsonValue]) -> list[int]:
    bucket = meta.get("bucket")
    assert isinstance(bucket, list), "an inputs shard of images names its bucket"
    return [int(str(side)) for side in bucket]


def _hex(number: int) -> str:
    return f"{number % 2**64:016x}"


def _mapped(path: Path) -> tuple[DenseShard, int]:
    return DenseShard(path), path.stat().st_size
