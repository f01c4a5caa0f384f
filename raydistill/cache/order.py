"""The order in which rows are trained on: a function of the seed and the epoch, of nothing else.

Not of the number of workers, the size of a micro-batch or where a run was interrupted. A step is found from its
number alone, so resuming needs no state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from raydistill.errors import ConfigError


class Order:
    """A permutation of the rows for every epoch.

    Shards are permuted, and rows are shuffled within windows of `window` consecutive (permuted) shards, so a reader
    has that many shards open at a time whatever the size of the cache.

    `shard_rows` holds the number of rows of each shard, in cache order. `bucket`, when given, holds the bucket of
    each row: the `Sampler` never puts rows of two buckets into one batch.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        *,
        seed: int,
        window: int,
        shuffle: bool = True,
        bucket: ArrayLike | None = None,
    ):
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self.num_rows = int(self._shard_rows.sum())
        self.seed = seed
        self.window = window
        self.shuffle = shuffle
        self.bucket = np.zeros(self.num_rows, np.int64) if bucket is None else np.asarray(bucket, dtype=np.int64)
        assert window >= 1, "a window holds at least one shard"
        assert self.bucket.shape == (self.num_rows,), "one bucket per row"

    def epoch(self, epoch: int) -> Int64[np.ndarray, " rows"]:
        """The row numbers of epoch `epoch` (from 0) in their order; each row once."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        shards = self.shards(epoch)
        sizes = self._shard_rows[shards]
        window_of_row = np.repeat(np.arange(len(shards)) // self.window, sizes)
        first_row = np.cumsum(self._shard_rows) - self._shard_rows
        rows = np.arange(self.num_rows) + np.repeat(first_row[shards] - (np.cumsum(sizes) - sizes), sizes)
        return rows[np.lexsort((self._keys(epoch, "rows", self.num_rows), window_of_row))]

    def shards(self, epoch: int) -> Int64[np.ndarray, " shards"]:
        """The shards of epoch `epoch` in their order; each `window` of them are read together."""
        if not self.shuffle:
            return np.arange(len(self._shard_rows))
        # Sorting by raw Philox output instead of calling a shuffle: NumPy promises the raw stream for ever, but
        # not that of its shuffles, and a resumed run must not change its order when NumPy is upgraded.
        return np.argsort(self._keys(epoch, "shards", len(self._shard_rows)), kind="stable")

    def window_rows(self, epoch: int) -> Int64[np.ndarray, " windows_plus_1"]:
        """Where in the order of epoch `epoch` the windows begin; one more entry for the end."""
        ends = np.cumsum(self._shard_rows[self.shards(epoch)])
        return np.concatenate([[0], ends[self.window - 1 :: self.window], ends[-1:]])[
            : -(-len(ends) // self.window) + 1
        ]

    def _keys(self, epoch: int, stream: str, count: int) -> np.ndarray:
        text = f"order|{self.seed}|{epoch}|{self.window}|{stream}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return np.random.Philox(key=key).random_raw(count)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one optimizer step, over all ranks."""

    epoch: int
    """Epoch from 0."""
    indices: Int64[np.ndarray, " rows"]
    """Row numbers; a row's place here is its position in the global batch. At most `global_size`, at least one."""


class Sampler:
    """Cuts the order of each epoch into batches of `global_size` rows of one bucket.

    Batches come in the order in which their last row turns up. What a bucket has left over becomes a short batch at
    the end of the epoch, so every row is used exactly once per epoch.
    """

    def __init__(self, order: Order, global_size: int):
        if not order.num_rows:
            raise ConfigError(
                "wanted rows to train on, found none: the split is empty. Check source and evaluate.held_out"
            )
        assert global_size >= 1, "a batch holds at least one row"
        self.order = order
        self.global_size = global_size
        _, counts = np.unique(order.bucket, return_counts=True)
        self.steps_per_epoch = int((-(-counts // global_size)).sum())
        self._current = (-1, np.empty(0, np.int64), np.empty(0, np.int64))  # epoch, its rows, where batches begin

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of `epochs` passes over the rows; a begun step counts."""
        # Rounding first: 0.07 epochs of 100 steps are 7 steps, though the product is 7.000000000000001.
        return max(1, int(np.ceil(round(epochs * self.steps_per_epoch, 6))))

    def step(self, step: int) -> StepRows:
        """The rows of optimizer step `step` (from 0, counting on through all epochs)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        known, rows, offsets = self._current
        if epoch != known:
            rows, offsets = self._batches(self.order.epoch(epoch))
            self._current = (epoch, rows, offsets)
        return StepRows(epoch, rows[offsets[batch] : offsets[batch + 1]])

    def _batches(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch, grouped by batch, and where each batch begins (one more entry for the end)."""
        bucket = self.order.bucket[order]
        grouped = np.argsort(bucket, kind="stable")  # places in the order, bucket by bucket
        _, counts = np.unique(bucket, return_counts=True)
        starts, sizes = [], []
        begin = 0
        for count in counts:
            starts.append(np.arange(begin, begin + count, self.global_size))
            sizes.append(np.minimum(self.global_size, begin + count - starts[-1]))
            begin += count
        start, size = np.concatenate(starts), np.concatenate(sizes)
        # A short batch is put behind all full ones: its last row never "turns up".
        due = np.where(size == self.global_size, grouped[start + size - 1], len(order))
        turn = np.argsort(due, kind="stable")
        start, size = start[turn], size[turn]
        ends = np.cumsum(size)
        places = np.arange(len(order)) + np.repeat(start - (ends - size), size)
        return order[grouped[places]], np.concatenate([[0], ends])
