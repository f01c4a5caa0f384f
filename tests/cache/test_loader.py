from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import write_toy_caches

from raydistill.cache.loader import Loader, StepBatches
from raydistill.cache.order import Order, Sampler
from raydistill.cache.read import Dataset
from raydistill.errors import DataError

GLOBAL = 8
"""Rows per step; the toy split has 43 rows, so the last step of an epoch has 3."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    caches = write_toy_caches(tmp_path_factory.mktemp("caches"), num_rows=43)
    return Dataset(caches.inputs, caches.signals, split="train", fields={"toy": ("ids", "logp", "log_tail")})


def load(
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_size: int = 2,
    first_step: int = 0,
    end_step: int = 12,
) -> list[StepBatches]:
    sampler = Sampler(Order(dataset.shard_rows, seed=5, window=3), GLOBAL)
    return list(
        Loader(
            dataset,
            sampler,
            rank=rank,
            world_size=world_size,
            micro_size=micro_size,
            first_step=first_step,
            end_step=end_step,
        )
    )


def rows_of(step: StepBatches) -> dict[int, tuple[str, list[int], list[float]]]:
    """What a step trains on, by position in the global batch: row id, labels and log-probabilities at the targets."""
    found = {}
    ids = iter(step.row_ids)
    for batch, positions in list(zip(step.micro_batches, step.positions, strict=True))[: step.num_real]:
        for i, position in enumerate(positions):
            at = batch["target"][i]
            found[position] = (next(ids), batch["labels"][i][at].tolist(), batch["toy/logp"][i][at].flatten().tolist())
    assert next(ids, None) is None
    return found


def test_every_row_is_loaded_once_per_epoch(dataset: Dataset) -> None:
    steps = load(dataset)
    for epoch in range(2):
        loaded = [row_id for step in steps if step.epoch == epoch for row_id in step.row_ids]
        assert sorted(loaded) == sorted(dataset.row_ids(range(43)))
    assert [step.num_rows for step in steps] == [8, 8, 8, 8, 8, 3] * 2
    assert [step.step for step in steps] == list(range(12))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("micro_size", [1, 2, 8])
def test_ranks_together_load_what_one_rank_loads(dataset: Dataset, world_size: int, micro_size: int) -> None:
    alone = load(dataset, micro_size=2)
    ranks = [load(dataset, rank=r, world_size=world_size, micro_size=micro_size) for r in range(world_size)]
    for step, *shares in zip(alone, *ranks, strict=True):
        together = [rows_of(share) for share in shares]
        merged = {position: row for rows in together for position, row in rows.items()}
        assert sum(len(rows) for rows in together) == len(merged), "no position on two ranks"
        assert merged == rows_of(step)
        assert len({len(share.micro_batches) for share in shares}) == 1, "as many forward passes on every rank"
        assert {share.num_rows for share in shares} == {step.num_rows}


def test_ranks_get_micro_batches_in_turn(dataset: Dataset) -> None:
    alone = load(dataset)[0]
    ranks = [load(dataset, rank=r, world_size=3)[0] for r in range(3)]
    assert [r.num_real for r in ranks] == [2, 1, 1]
    assert [len(r.micro_batches) for r in ranks] == [2, 2, 2]
    assert [ranks[j % 3].positions[j // 3] for j in range(4)] == alone.positions


def test_micro_batches_that_only_keep_step_have_nothing_to_learn(dataset: Dataset) -> None:
    last = [load(dataset, rank=r, world_size=5, micro_size=2)[5] for r in range(5)]
    assert [step.num_real for step in last] == [1, 1, 0, 0, 0]
    for step in last[2:]:
        (batch,) = step.micro_batches
        assert step.row_ids == []
        assert batch["valid"].any()
        assert not any(batch[name].any() for name in ("target", "labels", "toy/ids", "toy/logp", "toy/log_tail"))
        assert batch["input_ids"].shape == last[1].micro_batches[0]["input_ids"].shape


@pytest.mark.parametrize("first_step", [1, 5, 6, 11])
def test_resuming_gives_the_uninterrupted_stream(dataset: Dataset, first_step: int) -> None:
    whole, rest = load(dataset), load(dataset, first_step=first_step)
    assert len(rest) == 12 - first_step
    for wanted, found in zip(whole[first_step:], rest, strict=True):
        assert (found.step, found.epoch, found.positions, found.row_ids) == (
            wanted.step,
            wanted.epoch,
            wanted.positions,
            wanted.row_ids,
        )
        for left, right in zip(wanted.micro_batches, found.micro_batches, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_rows_of_similar_length_share_a_micro_batch(dataset: Dataset) -> None:
    for step in load(dataset):
        lengths = torch.cat([batch["valid"].sum(1) for batch in step.micro_batches]).tolist()
        assert lengths == sorted(lengths, reverse=True)


def test_an_error_while_loading_reaches_the_consumer(tmp_path: Path) -> None:
    caches = write_toy_caches(tmp_path, num_rows=24)
    Path(caches.signals["toy"].path("00002.parquet")).unlink()
    dataset = Dataset(caches.inputs, caches.signals, split="train", fields={"toy": ("ids",)})
    sampler = Sampler(Order(dataset.shard_rows, seed=0, window=1, shuffle=False), 8)
    loader = Loader(dataset, sampler, rank=0, world_size=1, micro_size=8, first_step=0, end_step=3)
    steps = []

    def consume() -> None:
        for step in loader:
            steps.append(step.step)

    with pytest.raises(DataError, match=r"00002\.parquet"):
        consume()
    assert steps == [0, 1], "what was ready before the error is not lost"
    assert not loader_threads()


def test_leaving_early_ends_the_thread(dataset: Dataset) -> None:
    sampler = Sampler(Order(dataset.shard_rows, seed=0, window=1), 4)
    for step in Loader(dataset, sampler, rank=0, world_size=1, micro_size=4, first_step=0, end_step=10**9):
        if step.step == 3:
            break
    assert not loader_threads()


def test_the_thread_does_not_run_ahead_of_its_queue(dataset: Dataset) -> None:
    asked: list[int] = []

    class Watched(Sampler):
        def step(self, step: int):  # type: ignore[no-untyped-def]
            asked.append(step)
            return super().step(step)

    sampler = Watched(Order(dataset.shard_rows, seed=0, window=1), 4)
    for step in Loader(dataset, sampler, rank=0, world_size=1, micro_size=4, first_step=0, end_step=40, depth=3):
        # In the queue, in the hands of the thread, and the one that is being looked at.
        assert max(asked) <= step.step + 3 + 1
        threading.Event().wait(0.002)
    assert Counter(asked) == Counter(range(40))


def test_waiting_is_measured(dataset: Dataset) -> None:
    assert all(step.wait_seconds >= 0 for step in load(dataset))
    assert load(dataset)[0].wait_seconds > 0, "the first step cannot be ready"


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "raydistill-loader"]


def test_positions_are_the_places_in_the_sampler_s_step(dataset: Dataset) -> None:
    sampler = Sampler(Order(dataset.shard_rows, seed=5, window=3), GLOBAL)
    for step in load(dataset, end_step=6):
        ids = dataset.row_ids(sampler.step(step.step).indices)
        assert step.row_ids == [ids[p] for positions in step.positions for p in positions]
        assert sorted(np.concatenate(step.positions).tolist()) == list(range(step.num_rows))
