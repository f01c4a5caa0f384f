"""Shard files: the inputs of a row and, beside them, the signals.

Parquet, one row per sequence, zstd, a checksum per page. Rows are written in small groups, so that a reader that wants
a few rows of a large shard decodes only their groups. The file's metadata says which codec, dtypes and sizes its
blobs have; a shard can be read without its manifest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int32, Int64

from raydistill.cache.batches import InputRow
from raydistill.cache.codecs import RAW_PLANES, Codec, Fields, Plane, codec_for
from raydistill.cache.manifest import FieldRecord, ShardRecord, parsed
from raydistill.errors import DataError
from raydistill.signals import Field, Schema
from raydistill.storage import Store

if TYPE_CHECKING:  # its module imports transformers, which readers do not need
    from raydistill.sources.text import TextRow

INPUTS_FORMAT = 1
"""Version of the layout of inputs shards; a part of their fingerprint."""
GROUP_POSITIONS = 16384
"""Rows are grouped until a group has this many tokens or targets."""
RECORDS = "records"
"""Folder of the shard records inside a cache."""

INPUT_FIELDS: Schema = {
    "input_ids": Field(torch.int32, ("token",), "token ids"),
    "target": Field(torch.bool, ("token",), "whether the prediction of the next token counts in the loss"),
    "segments": Field(torch.int32, ("document",), "lengths of the documents packed into the row"),
    "text_bytes": Field(torch.int32, (), "UTF-8 bytes of the text of the targets"),
}


@dataclass(frozen=True, slots=True)
class SignalShard:
    """What a teacher said about the rows of one inputs shard, or of a part of it."""

    row_ids: list[str]
    tokens_sha: list[bytes]
    """sha256(input_ids)[:8] of each row: the tokens that the teacher read."""
    num_targets: Int32[np.ndarray, " rows"]
    fields: Fields
    """[targets of all rows, ...]: the rows' positions one after another."""

    @property
    def offsets(self) -> Int64[np.ndarray, " rows_plus_1"]:
        """Row r owns the positions `offsets[r] : offsets[r + 1]`."""
        return offsets_of(self.num_targets)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The fields of one row, [targets, ...]."""
        start, stop = self.offsets[index : index + 2]
        return {name: values[start:stop] for name, values in self.fields.items()}


def offsets_of(counts: np.ndarray) -> Int64[np.ndarray, " rows_plus_1"]:
    """Running sums of `counts`, from 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def tokens_sha(input_ids: np.ndarray) -> bytes:
    """Eight bytes that identify the tokens of a row."""
    return hashlib.sha256(np.ascontiguousarray(input_ids, "<i4").tobytes()).digest()[:8]


def shard_name(index: int) -> str:
    """File name of shard `index`; signals use the name of their inputs' shard."""
    return f"{index:05d}.parquet"


# --- inputs -----------------------------------------------------------------------------------------------------

INPUT_COLUMNS = pa.schema(
    [
        ("row_id", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("input_ids", pa.large_binary()),
        ("target", pa.large_binary()),
        ("segments", pa.large_binary()),
        ("tokens_sha", pa.binary(8)),
        ("text_bytes", pa.int32()),
    ]
)


def write_inputs(store: Store, name: str, rows: Sequence[InputRow], *, split: str) -> ShardRecord:
    """Publish rows as an inputs shard, in the order given, and return its record (not yet published)."""

    def write(path: Path) -> None:
        meta = {"kind": "inputs", "format": INPUTS_FORMAT, "split": split}
        schema = INPUT_COLUMNS.with_metadata({b"raydistill": json.dumps(meta, sort_keys=True).encode()})
        with _writer(path, schema) as writer:
            for start, stop in _groups(np.array([len(row.input_ids) for row in rows])):
                writer.write_table(pa.table(input_columns(rows[start:stop]), schema=schema))

    sha256 = store.publish(name, write)
    return _record(store, name, split, len(rows), sum(len(row.input_ids) for row in rows), sha256)


def input_columns(rows: Sequence[InputRow] | Sequence[TextRow]) -> list[pa.Array]:
    """The columns of `INPUT_COLUMNS`, in their order."""
    return [
        pa.array([row.row_id for row in rows], pa.string()),
        pa.array([len(row.input_ids) for row in rows], pa.int32()),
        pa.array([int(row.target.sum()) for row in rows], pa.int32()),
        pa.array([np.ascontiguousarray(row.input_ids, "<i4").tobytes() for row in rows], pa.large_binary()),
        pa.array([np.packbits(row.target, bitorder="little").tobytes() for row in rows], pa.large_binary()),
        pa.array([np.ascontiguousarray(row.segments, "<i4").tobytes() for row in rows], pa.large_binary()),
        pa.array([tokens_sha(row.input_ids) for row in rows], pa.binary(8)),
        pa.array([row.text_bytes for row in rows], pa.int32()),
    ]


def read_inputs(store: Store, name: str, *, groups: Sequence[int] | None = None) -> list[InputRow]:
    """The rows of an inputs shard, or of some of its row groups; `DataError` when the file is damaged."""
    return rows_of(read_table(store, name, groups=groups))


def rows_of(table: pa.Table) -> list[InputRow]:
    """The rows of a table with the columns of an inputs shard."""
    columns = {column: table[column].to_pylist() for column in INPUT_COLUMNS.names}
    rows = []
    for i, row_id in enumerate(columns["row_id"]):
        num_tokens = columns["num_tokens"][i]
        bits = np.frombuffer(columns["target"][i], np.uint8)
        rows.append(
            InputRow(
                row_id=row_id,
                input_ids=np.frombuffer(columns["input_ids"][i], "<i4").astype(np.int32, copy=False),
                target=np.unpackbits(bits, count=num_tokens, bitorder="little").astype(np.bool_),
                segments=np.frombuffer(columns["segments"][i], "<i4").astype(np.int32, copy=False),
                text_bytes=columns["text_bytes"][i],
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class RowIndex:
    """What can be known of a shard's rows (inputs or signal) without decoding a blob."""

    row_ids: list[str]
    tokens_sha: list[bytes]
    num_targets: Int32[np.ndarray, " rows"]
    num_tokens: Int32[np.ndarray, " rows"] | None
    """None in a signal shard."""
    group_rows: tuple[int, ...]
    """Rows in each row group."""


def read_index(store: Store, name: str) -> RowIndex:
    """Read the small columns of a shard."""
    with open_shard(store, name) as file:
        names = [n for n in ("row_id", "tokens_sha", "num_targets", "num_tokens") if n in file.schema_arrow.names]
        table = file.read(columns=names)
        groups = tuple(file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))
        return RowIndex(
            row_ids=table["row_id"].to_pylist(),
            tokens_sha=table["tokens_sha"].to_pylist(),
            num_targets=_numbers(table["num_targets"]),
            num_tokens=_numbers(table["num_tokens"]) if "num_tokens" in names else None,
            group_rows=groups,
        )


def read_counts(store: Store, name: str) -> dict[str, Int32[np.ndarray, " rows"]]:
    """`num_tokens`, `num_targets` and `text_bytes` of the rows of an inputs shard."""
    with open_shard(store, name) as file:
        table = file.read(columns=["num_tokens", "num_targets", "text_bytes"])
        return {column: _numbers(table[column]) for column in table.column_names}


# --- signals ----------------------------------------------------------------------------------------------------


def write_signal(
    store: Store, name: str, shard: SignalShard, codec: Codec, *, split: str, vocab_size: int
) -> ShardRecord:
    """Publish a signal shard, in the row order given, and return its record (not yet published)."""
    meta = {
        "kind": "signal",
        "split": split,
        "codec": codec.name,
        "codec_version": codec.version,
        "vocab_size": vocab_size,
        "fields": {f: {"dtype": v.dtype.name, "sizes": list(v.shape[1:])} for f, v in shard.fields.items()},
    }
    empty = codec.encode({field: values[:0] for field, values in shard.fields.items()})
    columns = [("row_id", pa.string()), ("tokens_sha", pa.binary(8)), ("num_targets", pa.int32())]
    columns += [(plane, pa.large_binary()) for plane in empty]
    schema = pa.schema(columns, metadata={b"raydistill": json.dumps(meta, sort_keys=True).encode()})

    def write(path: Path) -> None:
        with _writer(path, schema) as writer:
            for start, stop in _groups(shard.num_targets):
                writer.write_table(pa.table(_signal_columns(shard, start, stop, codec), schema=schema))

    sha256 = store.publish(name, write)
    return _record(store, name, split, len(shard.row_ids), int(shard.num_targets.sum()), sha256)


def _signal_columns(shard: SignalShard, start: int, stop: int, codec: Codec) -> list[pa.Array]:
    offsets = shard.offsets[start : stop + 1]
    planes = codec.encode({field: values[offsets[0] : offsets[-1]] for field, values in shard.fields.items()})
    blobs = []
    for plane in planes.values():
        ends = (offsets - offsets[0]) * plane.shape[1]
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(plane)]
        blobs.append(pa.Array.from_buffers(pa.large_binary(), stop - start, buffers))
    return [
        pa.array(shard.row_ids[start:stop], pa.string()),
        pa.array(shard.tokens_sha[start:stop], pa.binary(8)),
        pa.array(shard.num_targets[start:stop], pa.int32()),
        *blobs,
    ]


def read_signal(
    store: Store, name: str, *, groups: Sequence[int] | None = None, fields: Sequence[str] | None = None
) -> SignalShard:
    """A signal shard, or some of its row groups and fields; `DataError` when the file is damaged.

    The codec `u8` needs `log_tail` to decode `logp`; it is read with it.
    """
    table = read_table(store, name, groups=groups, fields=fields)
    where = f"{store.uri}/{name}"
    num_targets = _numbers(table["num_targets"])
    positions = int(num_targets.sum())
    planes = {
        column: _plane(table[column], positions, where=f"{where}, column {column!r}")
        for column in table.column_names
        if "." in column
    }
    return SignalShard(
        row_ids=table["row_id"].to_pylist(),
        tokens_sha=table["tokens_sha"].to_pylist(),
        num_targets=num_targets,
        fields=decode_planes(planes, table.schema, where=where),
    )


def decode_planes(planes: Mapping[str, Plane], schema: pa.Schema, *, where: str) -> dict[str, np.ndarray]:
    """The fields whose planes are given, [positions, ...]; `schema` is that of the shard they come from."""
    meta = json.loads(schema.metadata[b"raydistill"])
    codec = codec_for(meta["codec"], vocab_size=meta["vocab_size"])
    if codec.version != meta["codec_version"]:
        raise DataError(
            f"{where} was written with version {meta['codec_version']} of the codec {codec.name!r}; "
            f"this package has version {codec.version}. Read it with the version that wrote it, or build it again."
        )
    given = {plane.rpartition(".")[0] for plane in planes}
    described = {field: d for field, d in meta["fields"].items() if field in given}
    dtypes = {field: np.dtype(d["dtype"]) for field, d in described.items()}
    sizes = {field: tuple(d["sizes"]) for field, d in described.items()}
    return codec.decode(planes, dtypes, sizes)


def _plane(column: pa.ChunkedArray, positions: int, *, where: str) -> np.ndarray:
    """The blobs of a column as one array [positions, width], without a copy where the column is one chunk."""
    parts = []
    for chunk in column.chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        data = chunk.buffers()[2]
        parts.append(np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None else np.zeros(0, np.uint8))
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint8), *parts])
    if positions == 0:
        return np.zeros((0, 0), np.uint8)
    if len(flat) % positions:
        raise DataError(f"{where}: {len(flat)} bytes for {positions} positions; the shard is damaged, run verify")
    return flat.reshape(positions, len(flat) // positions)


def field_records(schema: Schema) -> dict[str, FieldRecord]:
    """A schema as it stands in a manifest."""
    return {
        name: FieldRecord(dtype=str(field.dtype).removeprefix("torch."), dims=field.dims, doc=field.doc)
        for name, field in schema.items()
    }


# --- records ----------------------------------------------------------------------------------------------------


def publish_record(store: Store, record: ShardRecord) -> None:
    """Declare a shard done."""
    (store / RECORDS).publish(f"{record.name}.json", record.model_dump_json(indent=1) + "\n")


def read_records(store: Store, *, broken: dict[str, str] | None = None) -> dict[str, ShardRecord]:
    """The records of the shards that are done, by shard name.

    Raises `DataError` for a record that is truncated or anything else than a record; with `broken`, it is left out,
    and what is wrong with it goes there under the name of its shard.
    """
    folder = store / RECORDS
    names = [name for name in folder.names() if name.endswith(".json")]
    with ThreadPoolExecutor(16) as pool:  # on an object store each read is a request
        texts = list(pool.map(folder.read, names))
    records = {}
    for name, text in zip(names, texts, strict=True):
        remedy = "Remove this file and run --stages verify, then --stages inputs,signals, which builds its shard again."
        try:
            record = parsed(ShardRecord, text, where=f"{folder.uri}/{name}", remedy=remedy)
        except DataError as error:
            if broken is None:
                raise
            broken[name.removesuffix(".json")] = str(error)
        else:
            records[record.name] = record
    return records


def _record(store: Store, name: str, split: str, rows: int, tokens: int, sha256: str) -> ShardRecord:
    return ShardRecord.model_validate(
        {"name": name, "split": split, "rows": rows, "tokens": tokens} | {"bytes": store.size(name), "sha256": sha256}
    )


# --- Parquet ----------------------------------------------------------------------------------------------------


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        compression={name: "none" if name in RAW_PLANES else "zstd" for name in schema.names},
        compression_level={name: 1 for name in schema.names if name not in RAW_PLANES},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=True,
    )


def _groups(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive rows whose counts sum to at most GROUP_POSITIONS (a longer row is a group by itself)."""
    start = total = 0
    for row, count in enumerate(int(c) for c in counts):
        if row > start and total + count > GROUP_POSITIONS:
            yield start, row
            start, total = row, 0
        total += count
    if len(counts) > start:
        yield start, len(counts)


class open_shard:
    """Open a shard; whatever Parquet finds wrong inside the block becomes a `DataError` that names the file."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name

    def __enter__(self) -> pq.ParquetFile:
        try:
            self.file = pq.ParquetFile(self._mapped(), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        return self.file

    def _mapped(self) -> pa.MemoryMappedFile:
        if self.store.is_local:
            return pa.memory_map(self.store.path(self.name))
        with tempfile.TemporaryDirectory() as folder:  # fetched whole, so that a slow store is not taken for damage
            path = Path(folder) / self.name
            self.store.fetch(self.name, path)
            return pa.memory_map(str(path))  # what is mapped outlives the file's name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, (OSError, pa.ArrowException, KeyError)):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> DataError:
        return DataError(
            f"cannot read the shard {self.store.uri}/{self.name}: {error}. "
            "Run --stages verify, which lists damaged shards; --stages inputs,signals then builds exactly those again."
        )


def read_table(
    store: Store, name: str, *, groups: Sequence[int] | None = None, fields: Sequence[str] | None = None
) -> pa.Table:
    """A shard as it is stored, blobs and metadata; only the blobs of `fields` (and what decoding them needs) if given.

    The columns that identify rows are always there. `DataError` when the file is damaged.
    """
    with open_shard(store, name) as file:
        columns = None
        if fields is not None:
            wanted = {*fields, *(("log_tail",) if "logp" in fields else ())}
            columns = [c for c in file.schema_arrow.names if "." not in c or c.rpartition(".")[0] in wanted]
        table = file.read(columns=columns) if groups is None else file.read_row_groups(list(groups), columns=columns)
        return table.replace_schema_metadata(file.schema_arrow.metadata)


def _numbers(column: pa.ChunkedArray) -> Int32[np.ndarray, " rows"]:
    return column.to_numpy().astype(np.int32, copy=False)
