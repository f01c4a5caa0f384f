"""What counts as an explosion."""

from __future__ import annotations

import pytest
import torch

from raydistill.cache.loader import StepBatches
from raydistill.errors import TrainingDiverged
from raydistill.train.engine import Update, ensure_process_group
from raydistill.train.guard import FEWEST, Guard


def update(loss: float, grad_norm: float = 1.0) -> Update:
    return Update(loss, {}, {}, grad_norm, {}, (), True)


BATCHES = StepBatches(7, 0, 3, [], 2, [(0, 1), (2,)], ["a", "b", "c"], 0.0)


@pytest.fixture(autouse=True)
def one_rank() -> None:
    ensure_process_group(torch.device("cpu"))


def test_a_loss_explodes_against_the_median_of_the_steps_before() -> None:
    guard = Guard(phase="one", explode_factor=3, losses=[2.0] * FEWEST + [100.0])
    guard.check(update(5.9), BATCHES, last_checkpoint=None)
    with pytest.raises(
        TrainingDiverged, match=r"step 8: the loss exploded to 6\.1 from a usual 2.*rows: a, b, c\. There is"
    ):
        guard.check(update(6.1), BATCHES, last_checkpoint=None)


def test_the_first_steps_and_losses_below_zero_are_no_explosion() -> None:
    Guard(phase="one", explode_factor=3, losses=[1.0] * (FEWEST - 1)).check(update(1e9), BATCHES, last_checkpoint=None)
    Guard(phase="one", explode_factor=3, losses=[-2.0] * FEWEST).check(update(-1.0), BATCHES, last_checkpoint=None)


def test_only_the_last_hundred_losses_count() -> None:
    guard = Guard(phase="one", explode_factor=3, losses=[1000.0] * 50 + [1.0] * 100)
    with pytest.raises(TrainingDiverged):
        guard.check(update(4.0), BATCHES, last_checkpoint="x")
