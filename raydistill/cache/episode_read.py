"""Reads an inputs cache of episodes together with the signals of its teachers: any clips, in any order, as batches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from raydistill.cache.dense import read_description
from raydistill.cache.dense_batch import stacked
from raydistill.cache.dense_read import dense_shards
from raydistill.cache.episode_batch import clip_batch
from raydistill.cache.joined import Joined
from raydistill.cache.samples import Indices
from raydistill.errors import ConfigError
from raydistill.signals import Batch, JsonValue, sample_seed
from raydistill.storage import Store

NUM_READERS = 16


class EpisodeDataset:
    """The clips of one split, in cache order; an action-rich one several times in a row.

    A clip in which a share r of the steps acts and changes something is there 1 + `action_rich` · r times, rounded up
    or down by a number drawn from its row id, so that an epoch sees it as often on average. `fields` names the fields
    to read of each teacher's signal, `only` keeps the episodes in whose name that expression is found. `max_rows` keeps
    that many clips, evenly spread over the split.

    Raises `CacheMismatch` when a signal was not made from these inputs or lacks a field, `SignalMismatch` when the rows
    of a shard are not those of its inputs, `VerificationFailed` when a cache is listed as damaged.
    """

    def __init__(
        self,
        inputs: Store,
        signals: Mapping[str, Store],
        *,
        split: str,
        fields: Mapping[str, Sequence[str]],
        action_rich: float = 0.0,
        only: str | None = None,
        max_rows: int | None = None,
        local_folder: Path | None = None,
    ):
        self.split = split
        self._joined = Joined(inputs, signals, split=split, fields=fields)
        self.inputs_manifest = self._joined.inputs_manifest
        self.signal_manifests = self._joined.signal_manifests
        self._fields = self._joined.fields
        shard, row, _ = self._joined.places(max_rows)
        described = self._described() if action_rich or only is not None else []
        if only is not None:
            shard, row = _matching(only, shard, row, described)
        copies = _copies(shard, row, described, action_rich) if action_rich else np.ones(len(shard), np.int64)
        self._shard, self._row = np.repeat(shard, copies), np.repeat(row, copies)
        self._shards = dense_shards(self._joined, folder=local_folder)

    def _described(self) -> list[dict[str, JsonValue]]:
        """The descriptions of all shards of the split."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            return list(pool.map(partial(read_description, self._joined.stores[""]), self._joined.names()))

    @property
    def num_rows(self) -> int:
        """Samples: clips, counted as often as an epoch sees them."""
        return len(self._shard)

    @property
    def shard_of(self) -> Int32[np.ndarray, " samples"]:
        """Shard of each sample, counted from 0 within the split; ascending."""
        return self._shard

    @property
    def shard_rows(self) -> list[int]:
        """Samples of each shard: the shape that `Order` wants."""
        counts: list[int] = np.bincount(self._shard, minlength=len(self._joined.records[""])).tolist()
        return counts

    @property
    def costs(self) -> Int64[np.ndarray, " samples"]:
        """All alike: clips are of one length."""
        return np.ones(self.num_rows, np.int64)

    @property
    def buckets(self) -> None:
        """Any clips make a batch."""
        return None

    def facts(self, teacher: str) -> Mapping[str, JsonValue]:
        """Facts of a teacher's signal, from its manifest."""
        return self.signal_manifests[teacher].facts

    def row_ids(self, indices: Indices) -> list[str]:
        """Ids of clips: `<episode>@<first frame>`."""
        return [self._shards.open(int(self._shard[i]))[""].row_ids[self._row[i]] for i in indices]

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Clips as `clip_batch` gives them, with `"<teacher>/<field>"` [B, …] in the dtype in which it is stored."""
        opened = [(self._shards.open(int(self._shard[i])), int(self._row[i])) for i in indices]
        batch = clip_batch([(shards[""], row) for shards, row in opened])
        for teacher, names in self._fields.items():
            for name in names:
                batch[f"{teacher}/{name}"] = stacked([shards[teacher].tensor(name)[row] for shards, row in opened])
        return batch

    def silenced(self, batch: Batch) -> dict[str, Tensor]:
        """The same clips without a valid step."""
        return {**batch, "valid": torch.zeros_like(batch["valid"])}

    def unpack(self, shard: int) -> None:
        """Have a shard on the local disk by the time its samples are asked for."""
        self._shards.unpack(shard)


def _matching(
    only: str, shard: np.ndarray, row: np.ndarray, described: Sequence[Mapping[str, JsonValue]]
) -> tuple[np.ndarray, np.ndarray]:
    """The clips of the episodes that the expression is found in the name of; `ConfigError` when there are none."""
    names = [_episode(described[s], r) for s, r in zip(shard.tolist(), row.tolist(), strict=True)]
    kept = np.array([re.search(only, name) is not None for name in names], np.bool_)
    if not kept.any():
        some = ", ".join(list(dict.fromkeys(names))[:3])
        raise ConfigError(f"recipe.episodes: {only!r} is found in no name of {len(set(names))} episodes ({some}, …).")
    return shard[kept], row[kept]


def _episode(described: Mapping[str, JsonValue], row: int) -> str:
    ids = described["row_ids"]
    assert isinstance(ids, list)
    return str(ids[row]).rpartition("@")[0]


def _copies(
    shard: np.ndarray, row: np.ndarray, described: Sequence[Mapping[str, JsonValue]], action_rich: float
) -> np.ndarray:
    """How often an epoch sees each clip."""
    found = []
    for s, r in zip(shard.tolist(), row.tolist(), strict=True):
        ids, rich = described[s]["row_ids"], described[s]["richness"]
        assert isinstance(ids, list)
        assert isinstance(rich, list)
        wanted = 1 + action_rich * float(str(rich[r]))
        draw = sample_seed(str(ids[r]), 0, "action_rich", 0) / 2**64
        found.append(int(wanted) + (draw < wanted - int(wanted)))
    return np.array(found, np.int64)
