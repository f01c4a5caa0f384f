"""The batch rule and the layout of a collated batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from raydistill.cache.batches import InputRow, collate, cut_batches, row_key


def row(ids: list[int], segments: list[int], target: list[int] | None = None, name: str = "r") -> InputRow:
    bits = np.array(target if target is not None else [1] * (len(ids) - 1) + [0], bool)
    return InputRow(name, np.array(ids, np.int32), bits, np.array(segments, np.int32), text_bytes=0)


def test_batches_partition_the_rows_in_order_and_keep_the_budget() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(2, 60, 500))
    batches = cut_batches(lengths, 128)
    assert [i for batch in batches for i in batch] == list(range(500))
    assert all(len(batch) * lengths[list(batch)].max() <= 128 for batch in batches)
    # greedy: the first row of the next batch would not have fitted
    for batch, following in pairwise(batches):
        assert (len(batch) + 1) * max(lengths[following.start], lengths[list(batch)].max()) > 128


def test_a_row_longer_than_the_budget_is_a_batch_by_itself() -> None:
    assert cut_batches([3, 100, 3, 3], 10) == [range(0, 1), range(1, 2), range(2, 4)]
    assert cut_batches([], 10) == []


def test_positions_restart_in_every_document_and_padding_is_inert() -> None:
    batch = collate([row([5, 6, 7, 8, 9], [2, 3], [1, 0, 1, 1, 0]), row([4, 3], [2])], pad_to=7)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 0, 8, 9, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]]
    assert batch["valid"].sum(1).tolist() == [5, 2]
    assert not (batch["target"] & ~batch["valid"]).any()
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_row_keys_are_the_same_everywhere() -> None:
    assert row_key("a.txt#0.0") == 4577591965292871804
    assert row_key("a.txt#0.1") != row_key("a.txt#0.0")
