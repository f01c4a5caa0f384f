"""Opens the samples of a run, whatever kind they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.read import Dataset
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, TextSource
from raydistill.storage import Store


def open_dataset(
    config: RunConfig,
    inputs: Store,
    signals: Mapping[str, Store],
    *,
    split: str,
    fields: Mapping[str, Sequence[str]],
    max_rows: int | None = None,
) -> Dataset | DenseDataset:
    """The samples of one split with the `fields` of each teacher's signal; both classes are `Samples`."""
    match config.source:
        case TextSource():
            return Dataset(inputs, signals, split=split, fields=fields, max_rows=max_rows)
        case ImagesSource():
            return DenseDataset(inputs, signals, config.source.noise, split=split, fields=fields, max_rows=max_rows)
