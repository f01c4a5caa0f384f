"""Sequences of actions that a random player takes."""

from __future__ import annotations

import numpy as np


def repeated_actions(draws: np.random.Generator, steps: int, num_actions: int, repeat: tuple[int, int]) -> np.ndarray:
    """`steps` actions drawn evenly, each kept for a number of steps drawn from `repeat` [fewest, most]; int64."""
    found: list[int] = []
    while len(found) < steps:
        found += [int(draws.integers(num_actions))] * int(draws.integers(repeat[0], repeat[1] + 1))
    return np.array(found[:steps], np.int64)
