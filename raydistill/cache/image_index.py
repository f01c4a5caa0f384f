"""From units of images to the plan of bucket-pure shards, whoever read which unit and in which order.

Units are read in parallel, each into a table of its images: size, caption, hash, place of the bytes. Bytes out of
Parquet, which cannot be read one by one, are copied beside it. Then all rows are sorted and cut into shards, one list
of rows per shard. These files are whole or absent, and are removed when the cache is finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydistill.cache.dense import dense_name
from raydistill.cache.shards import open_shard
from raydistill.config.sources import Pictures
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.sources.image_files import Place
from raydistill.sources.images import ImageRow, Lost, Unit, rows
from raydistill.sources.pixels import Bucket, caption_sha, nearest_bucket
from raydistill.storage import Store

IMAGES_FORMAT = 1
"""Version of the layout of inputs shards of images; a part of their fingerprint."""
ROWS = pa.schema(
    [
        ("row_id", pa.string()), ("split", pa.string()), ("caption", pa.string()), ("caption_sha", pa.string()),
        ("height", pa.int32()), ("width", pa.int32()), ("sha", pa.binary(32)),
        ("uri", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
    ]
)  # fmt: skip
"""Columns of a staged unit. A `uri` without a slash is a file of the staging folder."""
SPLITS = ("train", "held_out")
"""Their order in a cache."""


def unit_file(index: int) -> str:
    """Name of the table of a staged unit."""
    return f"unit-{index:06d}.parquet"


def task_file(index: int) -> str:
    """Name of the file that tells a worker what unit `index` is."""
    return f"unit-{index:06d}.json"


def publish_tasks(staging: Store, work: Sequence[Unit]) -> None:
    """Write down what each unit is. What was staged of a unit that is now another one is removed."""
    there = set(staging.names())
    for unit in work:
        name, text = task_file(unit.index), json.dumps(unit.to_json(), sort_keys=True).encode()
        if name in there and staging.read(name) == text:
            continue
        staging.delete(unit_file(unit.index))
        staging.publish(name, text)


class IndexWorker:
    """Reads and decodes units of images, once, and stages what is to be known of them."""

    def __init__(self, source: Pictures, held_out: float, staging: str):
        self._source, self._held_out, self._staging = source, held_out, Store(staging)

    def __call__(self, index: int) -> dict[str, JsonValue]:
        """Stage unit `index`."""
        return {"unit": int(index), "rows": _stage_unit(self._staging, int(index), self._source, self._held_out)}


def _stage_unit(staging: Store, index: int, source: Pictures, held_out: float) -> int:
    """Read unit `index` and write the table of its rows. Returns their number."""
    unit = Unit.from_json(json.loads(staging.read(task_file(index))))
    lost = Lost()
    columns: list[tuple[ImageRow, Place]] = []
    found = rows(unit, source, held_out, lost)
    kept = f"unit-{index:06d}.images"
    if any(part.file.kind in ("parquet", "frames") for part in unit.parts):

        def copy(path: Path) -> None:
            with path.open("wb") as out:
                for row in found:
                    place = row.place or Place(kept, out.tell(), len(row.data))
                    if row.place is None:
                        out.write(row.data)
                    columns.append((row.without_data(), place))

        staging.publish(kept, copy)
    else:
        for row in found:
            assert row.place is not None
            columns.append((row.without_data(), row.place))
    table = _table(columns).replace_schema_metadata({"lost": json.dumps(lost.images)})
    staging.publish(unit_file(index), lambda path: pq.write_table(table, path, compression="zstd"))
    return table.num_rows


def _table(found: Sequence[tuple[ImageRow, Place]]) -> pa.Table:
    columns = [
        [row.row_id for row, _ in found], [row.split for row, _ in found], [row.caption for row, _ in found],
        [caption_sha(row.caption) for row, _ in found], [row.height for row, _ in found],
        [row.width for row, _ in found], [row.sha for row, _ in found], [place.uri for _, place in found],
        [place.offset for _, place in found], [place.size for _, place in found],
    ]  # fmt: skip
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, ROWS, strict=True)], schema=ROWS)


def staged_unit(staging: Store, index: int) -> tuple[pa.Table, Lost]:
    """The table of a staged unit, and the images that gave no row."""
    with open_shard(staging, unit_file(index)) as file:
        lost = json.loads((file.schema_arrow.metadata or {})[b"lost"])
        return file.read().replace_schema_metadata(None), Lost([(name, why, what) for name, why, what in lost])


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard that is to be: rows of one split and one bucket."""

    name: str
    split: str
    bucket: Bucket
    rows: pa.Table


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards of a cache, and what they hold together."""

    shards: list[ShardPlan]
    num_rows: dict[str, int]
    """Rows by split."""
    bucket_rows: dict[Bucket, int]
    """Rows by bucket, of the buckets that have any."""
    enlarged: int
    """Images smaller than their bucket."""


def plan_shards(tables: Sequence[pa.Table], source: Pictures, buckets: tuple[Bucket, ...]) -> Plan:
    """The rows of `tables`, as far as `max_rows`, sorted by (split, bucket, hash of the caption, row id) and cut into
    shards of one split, one bucket and at most `shard_rows` rows.

    Raises `DataError` when two rows have one id.
    """
    table = pa.concat_tables(tables)
    table = table if source.max_rows is None else table.slice(0, source.max_rows)
    _require_unique(table)
    sizes = list(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
    chosen = [nearest_bucket(height, width, buckets) for height, width in sizes]
    number = {bucket: index for index, bucket in enumerate(buckets)}
    table = table.append_column("bucket", pa.array([number[bucket] for bucket in chosen], pa.int32()))
    table = table.append_column("order", pc.index_in(table["split"], pa.array(SPLITS)))
    table = table.sort_by([(key, "ascending") for key in ("order", "bucket", "caption_sha", "row_id")])
    shards: list[ShardPlan] = []
    for split, bucket, start, stop in _runs(table):
        for first in range(start, stop, source.shard_rows):
            part = table.slice(first, min(source.shard_rows, stop - first)).select(ROWS.names)
            shards.append(ShardPlan(dense_name(len(shards)), split, buckets[bucket], part.combine_chunks()))
    rows_of = Counter(table["split"].to_pylist())
    of_bucket = Counter(chosen)
    return Plan(
        shards=shards,
        num_rows={split: rows_of[split] for split in SPLITS if rows_of[split]},
        bucket_rows={bucket: of_bucket[bucket] for bucket in buckets if of_bucket[bucket]},
        enlarged=sum(h < b[0] or w < b[1] for (h, w), b in zip(sizes, chosen, strict=True)),
    )


def _runs(table: pa.Table) -> Iterator[tuple[str, int, int, int]]:
    """Consecutive rows of one split and bucket: (split, bucket, first row, row after the last)."""
    order, bucket = table["order"].to_numpy(), table["bucket"].to_numpy()
    start = 0
    for row in range(1, table.num_rows + 1):
        if row == table.num_rows or (order[row], bucket[row]) != (order[start], bucket[start]):
            yield SPLITS[order[start]], int(bucket[start]), start, row
            start = row


def _require_unique(table: pa.Table) -> None:
    counts = pc.value_counts(table["row_id"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        raise DataError(
            f"{len(twice):,} row ids of the source appear more than once: {', '.join(sorted(twice)[:5])}. Ids are "
            "names of files, and keys of samples in tars; two samples of a tar with one key are the usual cause."
        )


def publish_plan(staging: Store, shard: ShardPlan) -> None:
    """Write down the rows of a shard for the worker that encodes it."""
    meta = {"split": shard.split, "bucket": json.dumps(shard.bucket)}
    table = shard.rows.replace_schema_metadata(meta)
    staging.publish(_plan_file(shard.name), lambda path: pq.write_table(table, path, compression="zstd"))


def read_plan(staging: Store, name: str) -> ShardPlan:
    """The shard that `publish_plan` wrote down."""
    with open_shard(staging, _plan_file(name)) as file:
        meta: Mapping[bytes, bytes] = file.schema_arrow.metadata
        height, width = json.loads(meta[b"bucket"])
        return ShardPlan(name, meta[b"split"].decode(), (height, width), file.read())


def _plan_file(name: str) -> str:
    return f"plan-{name}.parquet"
