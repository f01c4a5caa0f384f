"""Reads an inputs cache together with the signals of its teachers: any rows, in any order, as padded batches.

Row k of a signal shard belongs to row k of the inputs shard of the same name. That is promised by the way caches are
built and checked here all the same: a signal of other rows or other tokens is refused, never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from raydistill.cache.batches import InputRow, collate
from raydistill.cache.joined import Joined, OpenShards, open_manifest
from raydistill.cache.local import LocalShards
from raydistill.cache.shards import decode_planes, read_counts, read_table
from raydistill.errors import CacheMismatch, SignalMismatch
from raydistill.signals import Batch, JsonValue
from raydistill.storage import Store

__all__ = ["Dataset", "open_manifest", "without_targets"]

NUM_READERS = 16
"""Shards whose small columns are read at one time."""


class Dataset:
    """The rows of one split, numbered 0 … `num_rows` - 1 in cache order, with the fields that a recipe reads.

    `fields` names the fields to read of each teacher's signal. `max_rows` keeps that many rows, evenly spread over
    the split (shards are sorted by length, so the first rows of a cache are its shortest). Shards are unpacked into
    `local_folder`, by default one for all processes of this user on this machine, of at most `local_bytes`.

    Raises `CacheMismatch` when a signal was not made from these inputs or lacks a field, `SignalMismatch` when a
    shard's rows or tokens are not those of its inputs, `VerificationFailed` when a cache is listed as damaged.
    """

    def __init__(
        self,
        inputs: Store,
        signals: Mapping[str, Store],
        *,
        split: str,
        fields: Mapping[str, Sequence[str]],
        max_rows: int | None = None,
        local_folder: Path | None = None,
        local_bytes: int | None = None,
    ):
        self.split = split
        self._joined = Joined(inputs, signals, split=split, fields=fields)
        self.inputs_manifest = self._joined.inputs_manifest
        self.signal_manifests = self._joined.signal_manifests
        self._fields = self._joined.fields
        self._shard, self._row, self._kept = self._joined.places(max_rows)
        local = LocalShards(MappedShard, folder=local_folder, limit_bytes=local_bytes)
        self._shards = OpenShards(self._joined, local, self._key, _require_same)

    @property
    def num_rows(self) -> int:
        """Rows of the split (at most `max_rows`)."""
        return len(self._shard)

    @property
    def shard_of(self) -> Int32[np.ndarray, " rows"]:
        """Shard of each row, counted from 0 within the split; ascending."""
        return self._shard

    @property
    def shard_rows(self) -> list[int]:
        """Rows kept of each shard: the shape that `Order` wants."""
        return np.bincount(self._shard, minlength=len(self._joined.records[""])).tolist()

    @property
    def num_tokens(self) -> Int32[np.ndarray, " rows"]:
        """Tokens of each row."""
        return self._counts["num_tokens"]

    @property
    def costs(self) -> Int32[np.ndarray, " rows"]:
        """What a row costs: its tokens."""
        return self.num_tokens

    @property
    def buckets(self) -> None:
        """Rows of any lengths make a batch."""
        return None

    @property
    def num_targets(self) -> Int32[np.ndarray, " rows"]:
        """Positions of each row that count in the loss."""
        return self._counts["num_targets"]

    @property
    def text_bytes(self) -> Int32[np.ndarray, " rows"]:
        """UTF-8 bytes of the text of each row's targets."""
        return self._counts["text_bytes"]

    def facts(self, teacher: str) -> Mapping[str, JsonValue]:
        """Facts of a teacher's signal, from its manifest."""
        return self.signal_manifests[teacher].facts

    def row_ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of rows."""
        return [self._shards.open(int(self._shard[i]))[""].row_id(int(self._row[i])) for i in indices]

    def batch(self, indices: Sequence[int] | np.ndarray, *, pad_to: int | None = None) -> dict[str, Tensor]:
        """Rows as one batch, right-padded to the longest of them or to `pad_to` tokens.

        Besides what `collate` gives, `"<teacher>/<field>"` [B, S, ...] in the field's dtype, zero outside `target`.
        """
        shards = [self._shards.open(int(self._shard[i])) for i in indices]
        rows = [int(self._row[i]) for i in indices]
        batch = collate([shard[""].input_row(row) for shard, row in zip(shards, rows, strict=True)], pad_to=pad_to)
        target = np.flatnonzero(batch["target"].numpy())
        for teacher, names in self._fields.items():
            values = _decoded([(shard[teacher], row) for shard, row in zip(shards, rows, strict=True)])
            for name in names:
                batch[f"{teacher}/{name}"] = _scattered(values[name], target, batch["target"].shape)
        return batch

    def silenced(self, batch: Batch) -> dict[str, Tensor]:
        """The same rows with nothing to learn from."""
        return without_targets(batch)

    def unpack(self, shard: int) -> None:
        """Have a shard on the local disk by the time its rows are asked for."""
        self._shards.unpack(shard)

    def _key(self, source: str, shard: int) -> tuple[str, partial[pa.Table]]:
        record = self._joined.records[source][shard]
        fields = None if source == "" else sorted(self._fields[source])
        read = partial(read_table, self._joined.stores[source], record.name, fields=fields)
        return f"1 {record.sha256} {fields}", read  # 1: version of the unpacked form

    @cached_property
    def _counts(self) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            counts = list(pool.map(partial(read_counts, self._joined.stores[""]), self._joined.names()))
        empty = np.zeros(0, np.int32)
        return {
            column: np.concatenate([empty, *(c[column] for c in counts)])[self._kept]
            for column in ("num_tokens", "num_targets", "text_bytes")
        }


class MappedShard:
    """A mapped shard: single rows without a copy."""

    def __init__(self, table: pa.Table):
        self.columns = table
        self.num_targets = table["num_targets"].to_numpy()
        kinds = zip(table.column_names, table.schema.types, strict=True)
        self._blobs = {name: _blobs(table[name]) for name, kind in kinds if pa.types.is_large_binary(kind)}
        self.planes = tuple(name for name in self._blobs if "." in name)

    def row_id(self, row: int) -> str:
        """Id of row `row`."""
        return str(self.columns["row_id"][row].as_py())

    def input_row(self, row: int) -> InputRow:
        """Row `row` of an inputs shard."""
        num_tokens = int(self.columns["num_tokens"][row].as_py())
        bits = np.unpackbits(self._blob("target", row), count=num_tokens, bitorder="little")
        return InputRow(
            row_id=self.row_id(row),
            input_ids=self._blob("input_ids", row).view("<i4"),
            target=bits.view(np.bool_),
            segments=self._blob("segments", row).view("<i4"),
            text_bytes=self.columns["text_bytes"][row].as_py(),
        )

    def plane(self, column: str, row: int) -> UInt8[np.ndarray, "targets width"]:
        """One of the codec's planes for row `row`, which must have targets."""
        return self._blob(column, row).reshape(int(self.num_targets[row]), -1)

    def _blob(self, column: str, row: int) -> np.ndarray:
        offsets, data = self._blobs[column]
        return data[offsets[row] : offsets[row + 1]]


def _blobs(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and bytes of a binary column, in place."""
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    data = chunk.buffers()[2]
    return offsets, np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)


def _decoded(rows: Sequence[tuple[MappedShard, int]]) -> dict[str, np.ndarray]:
    """Fields of rows of any shards of one signal, one row after another: [targets of all rows, ...]."""
    first = rows[0][0]
    for shard, _ in rows:
        if shard.columns.schema.metadata != first.columns.schema.metadata:
            raise CacheMismatch(
                "two shards of one signal have different codecs, dtypes or sizes: "
                f"{shard.columns.schema.metadata} and {first.columns.schema.metadata}. "
                "Run --stages verify, then --stages signals."
            )
    rows = [(shard, row) for shard, row in rows if shard.num_targets[row]]
    nothing = np.zeros((0, 0), np.uint8)
    planes = {
        column: np.concatenate([shard.plane(column, row) for shard, row in rows]) if rows else nothing
        for column in first.planes
    }
    return decode_planes(planes, first.columns.schema, where="the signal")


def _scattered(values: np.ndarray, target: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """[B, S, ...] with `values` at the flat places `target` and zeros elsewhere."""
    # NumPy, not torch: torch would start its own threads in the loader's background thread.
    out = np.zeros((shape[0] * shape[1], *values.shape[1:]), values.dtype)
    out[target] = values
    return torch.from_numpy(out.reshape(*shape, *values.shape[1:]))


def without_targets(batch: Batch) -> dict[str, Tensor]:
    """The same rows with nothing to learn from: no targets, and everything zero that is zero outside them."""
    silent = {"target", "labels"}
    return {n: torch.zeros_like(t) if n in silent or "/" in n else t for n, t in batch.items()}


def _require_same(inputs: MappedShard, signal: MappedShard, where: str) -> None:
    """Raise `SignalMismatch` unless a signal shard has the rows, tokens and target counts of its inputs shard."""
    for name in ("row_id", "tokens_sha", "num_targets"):
        wanted, found = inputs.columns[name], signal.columns[name]
        if not wanted.equals(found):
            pairs = enumerate(zip_longest(wanted.to_pylist(), found.to_pylist()))
            row, (want, have) = next((row, pair) for row, pair in pairs if pair[0] != pair[1])
            raise SignalMismatch(
                f"{where} does not belong to its inputs: {name} of row {row} should be {_shown(want)}, "
                f"found {_shown(have)}. Run --stages verify, then --stages signals."
            )


def _shown(value: str | int | bytes | None) -> str:
    return "nothing" if value is None else value.hex() if isinstance(value, bytes) else repr(value)
