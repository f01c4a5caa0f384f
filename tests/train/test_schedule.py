"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from raydistill.config.training import OptimizerConfig
from raydistill.train.schedule import lr_factor


def factors(num_steps: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"lr": 1.0, **settings})
    return [lr_factor(step, optimizer, num_steps) for step in range(num_steps)]


def test_warmup_rises_linearly_and_never_wastes_a_step_at_zero() -> None:
    assert factors(6, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_the_least_ratio_at_the_step_after_the_last() -> None:
    assert factors(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_halfway_in_the_middle_and_starts_after_the_warmup() -> None:
    found = factors(12, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert found[2] == 1.0
    assert found[7] == pytest.approx(0.55)
    assert found[2:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


def test_cosine_restarts_begin_again_and_their_cycles_grow() -> None:
    found = factors(14, schedule="cosine_restarts", restart_steps=2, restart_factor=2.0)
    assert [i for i, f in enumerate(found) if f == 1.0] == [0, 2, 6]
    assert found[4] == pytest.approx(0.5)
    assert found[10] == pytest.approx(0.5)


def test_a_schedule_shorter_than_its_warmup_is_still_defined() -> None:
    assert factors(2, schedule="cosine", warmup_steps=8) == [0.125, 0.25]
