"""Unpacks the shards that will be read next, so that no step waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from raydistill.cache.order import Sampler
from raydistill.cache.samples import Samples
from raydistill.errors import RaydistillError

POLL_SECONDS = 0.1


class UnpackAhead:
    """A thread that keeps the present window of shards and the next one unpacked.

    Every rank reads from every shard of a window. On one machine the ranks share the unpacked files, so each begins at
    another shard and finds the rest done by the others.
    """

    def __init__(self, dataset: Samples, sampler: Sampler, *, steps: range, rank: int, world_size: int):
        self._dataset = dataset
        self._sampler = sampler
        self._steps = steps
        self._share = rank / world_size
        self._step = steps.start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raydistill-unpack", daemon=True)

    def start(self) -> None:
        """Begin at the first step."""
        self._thread.start()

    def reached(self, step: int) -> None:
        """The reader is at `step`."""
        self._step = step

    def close(self) -> None:
        """End after the shard at hand."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for due, shard in self._plan():
                while self._step < due:
                    if self._stop.wait(POLL_SECONDS):
                        return
                if self._stop.is_set():
                    return
                self._dataset.unpack(shard)
        except RaydistillError:
            # The reader meets the same shard and raises: there the error has somebody to hear it, and perhaps never
            # comes up, because the run ends before.
            return

    def _plan(self) -> Iterator[tuple[int, int]]:
        """(step from which it may be unpacked, shard): a window is due when the one before it begins."""
        order, per_epoch = self._sampler.order, self._sampler.steps_per_epoch
        due = self._steps.start
        for epoch in range(self._steps.start // per_epoch, -(-self._steps.stop // per_epoch)):
            shards = order.shards(epoch)
            # With several buckets a batch may come later than its rows, so these steps are a little early.
            begins = epoch * per_epoch + order.window_rows(epoch) // self._sampler.global_size
            for window, (begin, end) in enumerate(pairwise(begins.tolist())):
                if end < self._steps.start or begin >= self._steps.stop:
                    continue
                members = shards[window * order.window : (window + 1) * order.window]
                for shard in np.roll(members, -int(self._share * len(members))).tolist():
                    yield due, shard
                due = begin
