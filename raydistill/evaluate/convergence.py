"""When a distillation has converged, by the errors on held-out rows that were measured while it ran.

A causal student cannot reach the samples of a teacher that sees the future, so there is no value to wait for: what ends
is the improvement.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from raydistill.signals import JsonValue

PATIENCE = 3
"""Evaluations over which the improvement is measured."""
LEAST_GAIN = 0.01
"""Share of the error by which it must fall over these, not to count as converged."""


def converged(
    steps: Sequence[int], errors: Sequence[float], *, patience: int = PATIENCE, least_gain: float = LEAST_GAIN
) -> dict[str, JsonValue]:
    """Whether, and from which step on, an error stopped falling.

    The least error so far is compared with what it was `patience` evaluations earlier; the training has converged at
    the first step from which on, to its end, it fell by less than `least_gain` of itself. `step` is None where it still
    falls or where there are too few evaluations to say; `gain` is the last such comparison, None with too few.
    """
    assert len(steps) == len(errors), f"{len(steps)} steps and {len(errors)} errors"
    best = list(accumulate(errors, min))
    gains = [1 - late / early if early > 0 else 0.0 for early, late in zip(best, best[patience:], strict=False)]
    step: int | None = None
    for place in range(len(gains) - 1, -1, -1):
        if gains[place] >= least_gain:
            break
        step = steps[place + patience]
    return {"step": step, "gain": gains[-1] if gains else None, "patience": patience, "least_gain": least_gain}
