from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from toys import write_toy_caches

from raydistill.cache.ahead import UnpackAhead
from raydistill.cache.order import Order, Sampler
from raydistill.cache.read import Dataset


class Unpacked(Dataset):
    """Notes which shards are unpacked instead of unpacking them."""

    def unpack(self, shard: int) -> None:
        with self.more:
            self.seen.append(shard)
            self.more.notify()


@pytest.fixture
def dataset(tmp_path: Path) -> Unpacked:
    caches = write_toy_caches(tmp_path, num_rows=60, shard_rows=6)
    dataset = Unpacked(caches.inputs, {}, split="train", fields={})
    dataset.seen, dataset.more = [], threading.Condition()
    return dataset


def seen(dataset: Unpacked, count: int) -> list[int]:
    with dataset.more:
        assert dataset.more.wait_for(lambda: len(dataset.seen) >= count, timeout=20)
        return list(dataset.seen)


def test_the_window_after_the_present_one_is_unpacked_and_no_other(dataset: Unpacked) -> None:
    # 10 shards of 6 rows in windows of 2: a window is 12 rows, or 3 steps of 4.
    sampler = Sampler(Order(dataset.shard_rows, seed=0, window=2), 4)
    order = [*sampler.order.shards(0), *sampler.order.shards(1)]
    ahead = UnpackAhead(dataset, sampler, steps=range(0, 30), rank=0, world_size=1)
    ahead.start()
    assert seen(dataset, 4) == order[:4]
    for step, shards in ((2, 4), (3, 6), (6, 8), (14, 12), (30, 20)):
        ahead.reached(step)
        assert seen(dataset, shards) == order[:shards]
    ahead.close()
    assert len(dataset.seen) == 20


def test_a_resumed_run_starts_with_its_own_window(dataset: Unpacked) -> None:
    sampler = Sampler(Order(dataset.shard_rows, seed=0, window=2), 4)
    ahead = UnpackAhead(dataset, sampler, steps=range(22, 25), rank=0, world_size=1)
    ahead.start()
    assert seen(dataset, 4) == sampler.order.shards(1)[4:8].tolist(), (
        "windows 2 and 3 of epoch 1, which begin at 21 and 24"
    )
    ahead.close()


def test_ranks_begin_at_different_shards_and_cover_the_same(dataset: Unpacked) -> None:
    sampler = Sampler(Order(dataset.shard_rows, seed=0, window=10), 4)
    orders = []
    for rank in range(3):
        dataset.seen = []
        ahead = UnpackAhead(dataset, sampler, steps=range(0, 15), rank=rank, world_size=3)
        ahead.start()
        orders.append(seen(dataset, 10))
        ahead.close()
    assert len({order[0] for order in orders}) == 3
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert np.array_equal(orders[0], sampler.order.shards(0))
