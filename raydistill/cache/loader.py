"""Micro-batches for one rank, made in a background thread while the model computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from raydistill.cache.ahead import UnpackAhead
from raydistill.cache.order import Sampler, StepRows
from raydistill.cache.samples import Samples


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one rank computes in one optimizer step."""

    step: int
    """Optimizer step, from 0."""
    epoch: int
    """Epoch from 0."""
    num_rows: int
    """Rows of the whole step, over all ranks; each counted once."""
    micro_batches: list[dict[str, Tensor]]
    """This rank's micro-batches; as many on every rank."""
    num_real: int
    """The first `num_real` micro-batches count. The others only keep the ranks in step: they have no target."""
    positions: list[tuple[int, ...]]
    """Per micro-batch: the place of each row in the global batch, the key of its random draws."""
    row_ids: list[str]
    """Ids of the rows of the micro-batches that count, in order."""
    wait_seconds: float
    """How long the consumer waited for this step."""


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


class Loader:
    """Iterates over the steps `first_step`, …, `end_step - 1` of a rank.

    The rows of a step are sorted by cost (longest first, so that a micro-batch too large for memory fails at the
    first step) and cut into micro-batches of `micro_size`; micro-batch j belongs to rank j % world_size. Every rank
    gets ceil(micro-batches / world_size) of them; a rank for which none is left computes the last one without
    targets, which adds nothing to any sum or count.

    A background thread keeps up to `depth` steps ready, another unpacks the shards of the next window. They end with
    the iteration, also after `break` or an error, and errors of reading are raised in the consumer.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: Sampler,
        *,
        rank: int,
        world_size: int,
        micro_size: int,
        first_step: int,
        end_step: int,
        depth: int = 2,
        pin_memory: bool = False,
    ):
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert sampler.global_size % micro_size == 0, "the configuration checks that micro_size divides global_size"
        self._dataset = dataset
        self._sampler = sampler
        self._rank = rank
        self._world_size = world_size
        self._micro_size = micro_size
        self._steps = range(first_step, end_step)
        self._depth = depth
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepBatches]:
        ready: queue.Queue[StepBatches | _Failure | None] = queue.Queue(maxsize=self._depth)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop), name="raydistill-loader", daemon=True)
        ahead = UnpackAhead(
            self._dataset, self._sampler, steps=self._steps, rank=self._rank, world_size=self._world_size
        )
        ahead.start()
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, _Failure):
                    raise item.error
                ahead.reached(item.step)
                yield replace(item, wait_seconds=time.perf_counter() - start)
        finally:
            stop.set()
            ahead.close()
            while thread.is_alive():
                _drain(ready)  # the thread may be waiting for room
                thread.join(timeout=0.01)

    def _fill(self, ready: queue.Queue[StepBatches | _Failure | None], stop: threading.Event) -> None:
        try:
            for step in self._steps:
                item = self._make(step, self._sampler.step(step))
                if stop.is_set():
                    return
                ready.put(item)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # raised again in the consumer: a thread has nobody else to tell
            ready.put(_Failure(error))

    def _make(self, step: int, rows: StepRows) -> StepBatches:
        places = np.argsort(-self._dataset.costs[rows.indices].astype(np.int64), kind="stable")
        cuts = [places[i : i + self._micro_size] for i in range(0, len(places), self._micro_size)]
        turns = -(-len(cuts) // self._world_size)
        mine = cuts[self._rank :: self._world_size]
        num_real = len(mine)
        mine += [cuts[-1]] * (turns - num_real)
        micro_batches = [self._dataset.batch(rows.indices[cut]) for cut in mine]
        micro_batches[num_real:] = [self._dataset.silenced(batch) for batch in micro_batches[num_real:]]
        if self._pin_memory:
            micro_batches = [{n: t.pin_memory() for n, t in batch.items()} for batch in micro_batches]
        return StepBatches(
            step=step,
            epoch=rows.epoch,
            num_rows=len(rows.indices),
            micro_batches=micro_batches,
            num_real=num_real,
            positions=[tuple(int(place) for place in cut) for cut in mine],
            row_ids=[row_id for cut in mine[:num_real] for row_id in self._dataset.row_ids(rows.indices[cut])],
            wait_seconds=0.0,
        )


def _drain(ready: queue.Queue[StepBatches | _Failure | None]) -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
