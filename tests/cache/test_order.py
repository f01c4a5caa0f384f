from __future__ import annotations

import numpy as np
import pytest

from raydistill.cache.order import Order, Sampler
from raydistill.errors import ConfigError

SHAPES = [[1], [7], [5, 1, 8], [3] * 11, [1, 0, 13, 2, 2, 9, 4]]


@pytest.mark.parametrize("shard_rows", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("global_size", [1, 4, 100])
@pytest.mark.parametrize("num_buckets", [1, 3])
def test_every_row_is_used_exactly_once_per_epoch(
    shard_rows: list[int], window: int, global_size: int, num_buckets: int
) -> None:
    total = sum(shard_rows)
    bucket = np.arange(total) * 7 % num_buckets
    sampler = Sampler(Order(shard_rows, seed=3, window=window, bucket=bucket), global_size)
    for epoch in range(2):
        steps = [sampler.step(epoch * sampler.steps_per_epoch + s) for s in range(sampler.steps_per_epoch)]
        assert sorted(np.concatenate([s.indices for s in steps]).tolist()) == list(range(total))
        assert {s.epoch for s in steps} == {epoch}
        assert all(1 <= len(s.indices) <= global_size for s in steps)
        assert all(len(set(bucket[s.indices])) == 1 for s in steps)
        short = [len(s.indices) < global_size for s in steps]
        assert short == sorted(short), "short batches come last"
        assert sum(short) <= num_buckets


def test_rows_do_not_leave_their_window_of_shards() -> None:
    shard_rows, window = [4, 6, 5, 3, 7, 2, 5], 3
    shard_of = np.repeat(np.arange(7), shard_rows)
    order = Order(shard_rows, seed=0, window=window).epoch(0)
    found: list[set[int]] = []
    rest = order
    while len(rest):
        # A window ends where the rows of its shards are used up.
        shards = list(dict.fromkeys(shard_of[rest].tolist()))[:window]
        size = sum(shard_rows[s] for s in shards)
        assert set(shard_of[rest[:size]].tolist()) == set(shards)
        found.append(set(shards))
        rest = rest[size:]
    assert set.union(*found) == set(range(7))
    assert len(found) == 3


def test_order_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    def epoch(seed: int, epoch: int) -> list[int]:
        return Order([50, 50], seed=seed, window=2).epoch(epoch).tolist()

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(s, e)) for s in (0, 1, 2) for e in (0, 1, 2)}) == 9


def test_order_is_the_same_in_every_version() -> None:
    # Resuming a run with another version of the package or of NumPy must not change what comes next.
    assert Order([3, 4, 3], seed=1, window=2).epoch(5).tolist() == [8, 6, 4, 3, 5, 7, 9, 0, 2, 1]


def test_unshuffled_order_is_cache_order() -> None:
    assert Order([3, 4], seed=1, window=1, shuffle=False).epoch(3).tolist() == list(range(7))


def test_all_orders_of_a_window_turn_up_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(Order([1, 2], seed=0, window=2).epoch(epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    # 200 of each are expected, with a standard deviation of 13.
    assert len(counts) == 6
    assert all(140 < n < 260 for n in counts.values())


def test_steps_in_any_order_are_the_steps_in_order() -> None:
    def sampler() -> Sampler:
        return Sampler(Order([9, 4, 6], seed=2, window=2, bucket=np.arange(19) % 2), 3)

    forward = sampler()
    steps = [forward.step(s).indices.tolist() for s in range(30)]
    jumping = sampler()
    for s in np.random.default_rng(0).permutation(30).tolist():
        assert jumping.step(s).indices.tolist() == steps[s]


def test_batches_of_all_sizes_read_the_same_order() -> None:
    order = Order([9, 4, 6], seed=2, window=2)
    for global_size in (1, 3, 8, 19, 50):
        sampler = Sampler(order, global_size)
        rows = [sampler.step(s).indices for s in range(sampler.steps_per_epoch)]
        assert np.concatenate(rows).tolist() == order.epoch(0).tolist()


def test_a_full_bucket_batch_comes_when_its_last_row_turns_up() -> None:
    bucket = [0, 1, 0, 1, 1, 0, 0]
    sampler = Sampler(Order([7], seed=0, window=1, shuffle=False, bucket=bucket), 2)
    assert [sampler.step(s).indices.tolist() for s in range(4)] == [[0, 2], [1, 3], [5, 6], [4]]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 100), (0.07, 7), (2.5, 250), (0.001, 1), (0.075, 8)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    assert Sampler(Order([300], seed=0, window=1), 3).num_steps(epochs) == steps


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match="found none"):
        Sampler(Order([0, 0], seed=0, window=1), 4)


@pytest.mark.parametrize("window", [1, 2, 3, 64])
def test_windows_are_where_their_shards_are(window: int) -> None:
    shard_rows = [4, 6, 5, 3, 7, 2, 5]
    order = Order(shard_rows, seed=0, window=window)
    shard_of, rows, shards = np.repeat(np.arange(7), shard_rows), order.epoch(1), order.shards(1)
    begins = order.window_rows(1)
    assert (begins[0], begins[-1], len(begins)) == (0, 32, -(-7 // window) + 1)
    for w in range(len(begins) - 1):
        members = set(shards[w * window : (w + 1) * window].tolist())
        assert set(shard_of[rows[begins[w] : begins[w + 1]]].tolist()) == members
