from __future__ import annotations

import time

import pytest
import torch

from raydistill.evaluate.speed import peak_bytes, samples_per_second

CPU = torch.device("cpu")


def test_the_first_turn_warms_up_and_is_not_counted() -> None:
    turns: list[int] = []

    def forward(turn: int) -> int:
        time.sleep(0.3 if not turns else 0.02)
        turns.append(turn)
        return 4

    speed = samples_per_second(forward, CPU, turns=3)
    assert turns == [0, 0, 1, 2]
    assert 60 < speed < 201


def test_a_moment_in_which_the_machine_does_something_else_counts_little() -> None:
    speed = samples_per_second(lambda turn: time.sleep(0.5 if turn == 2 else 0.02) or 4, CPU, turns=5)
    assert speed > 60  # the mean would be 34


def test_measuring_stops_when_it_has_taken_long_enough() -> None:
    turns: list[int] = []

    def forward(turn: int) -> int:
        time.sleep(0.02)
        turns.append(turn)
        return 1

    samples_per_second(forward, CPU, turns=1000, seconds=0.05)
    assert len(turns) < 10


def test_peak_memory_counts_what_lives_at_one_time_and_views_once() -> None:
    def forward() -> torch.Tensor:
        a = torch.ones(1000)
        b = a + 1
        view = b.view(10, 100)
        del a
        c = view * 2
        return c.sum()

    assert peak_bytes(forward, CPU) == 2 * 4000 + 4


def test_what_was_there_before_is_not_counted() -> None:
    weight = torch.ones(100, 100)
    assert peak_bytes(lambda: weight.add_(1), CPU) == 0
    assert peak_bytes(lambda: weight @ weight[:, :1], CPU) == pytest.approx(400)
