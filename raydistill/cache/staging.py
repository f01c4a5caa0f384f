"""From units of a source to split-pure shards of equal size, whoever read which unit and in which order.

Units are read in parallel, each into one staging file. Then their rows are dealt out, in source order, to the shards of
their split. Staging files are whole or absent, and are removed when the cache is finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.batches import InputRow, row_key
from raydistill.cache.shards import INPUT_COLUMNS, input_columns, open_shard, rows_of, shard_name
from raydistill.errors import DataError
from raydistill.sources.text import TextRow
from raydistill.storage import Store

STAGING = "staging"
CHUNK_ROWS = 1024
_COLUMNS = INPUT_COLUMNS.append(pa.field("split", pa.string()))


def unit_name(index: int) -> str:
    """File name of a staged unit."""
    return f"unit-{index:06d}.parquet"


def stage_unit(store: Store, index: int, rows: Iterable[TextRow], dropped: Counter[str]) -> int:
    """Write the rows of a unit, as they come, and what was dropped (read after the last row). Returns the rows."""
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        remaining = iter(rows)
        with pq.ParquetWriter(path, _COLUMNS, compression="zstd", use_dictionary=False) as writer:
            while chunk := list(islice(remaining, CHUNK_ROWS)):
                columns = [*input_columns(chunk), pa.array([row.split for row in chunk], pa.string())]
                writer.write_table(pa.table(columns, schema=_COLUMNS))
                count += len(chunk)
            writer.add_key_value_metadata({"dropped": json.dumps(dict(sorted(dropped.items()))), "rows": str(count)})

    store.publish(unit_name(index), write)
    return count


def staged_rows(store: Store, index: int) -> tuple[int, Counter[str]]:
    """Number of rows of a staged unit, and what was dropped."""
    with open_shard(store, unit_name(index)) as file:
        dropped = json.loads((file.metadata.metadata or {})[b"dropped"])
        return file.metadata.num_rows, Counter(dropped)


def _read(store: Store, index: int) -> Iterator[tuple[str, InputRow]]:
    with open_shard(store, unit_name(index)) as file:
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group)
            yield from zip(table["split"].to_pylist(), rows_of(table), strict=True)


@dataclass(slots=True)
class Totals:
    """What an inputs cache holds, by split."""

    rows: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)


def deal(
    store: Store, units: Sequence[int], *, shard_rows: int, max_rows: int | None, totals: Totals
) -> Iterator[tuple[str, str, list[InputRow]]]:
    """(name, split, rows) of every shard. Shards take rows in source order and hold them sorted by (length, id).

    Raises `DataError` when two rows have one id.
    """
    waiting: dict[str, list[InputRow]] = {"train": [], "held_out": []}
    keys: list[int] = []
    index = 0
    staged = (pair for unit in units for pair in _read(store, unit))
    for split, row in islice(staged, max_rows):
        keys.append(row_key(row.row_id))
        totals.rows[split] += 1
        totals.tokens[split] += len(row.input_ids)
        totals.targets[split] += int(row.target.sum())
        totals.text_bytes[split] += row.text_bytes
        waiting[split].append(row)
        if len(waiting[split]) == shard_rows:
            yield shard_name(index), split, _sorted(waiting[split])
            waiting[split] = []
            index += 1
    _require_unique(np.array(keys, np.int64))
    for split, rows in waiting.items():
        if rows:
            yield shard_name(index), split, _sorted(rows)
            index += 1


def _sorted(rows: list[InputRow]) -> list[InputRow]:
    return sorted(rows, key=lambda row: (len(row.input_ids), row.row_id))


def _require_unique(keys: np.ndarray) -> None:
    if len(np.unique(keys)) != len(keys):
        raise DataError(
            f"{len(keys) - len(np.unique(keys)):,} rows of the source have the id of another row. Ids come from file "
            "names: two files that are read under one name are the usual cause; rename one of them."
        )
