"""Learning-rate schedules: a factor on the peak learning rate, as a function of the step and of nothing else.

A schedule has no state, so a resumed run needs none, and every parameter group keeps its ratio to the others.
"""

from __future__ import annotations

import math

from raydistill.config.training import OptimizerConfig


def lr_factor(step: int, optimizer: OptimizerConfig, num_steps: int) -> float:
    """Share of `optimizer.lr` used by optimizer step `step` (from 0) of `num_steps`.

    Warm-up step i has the factor (i + 1) / warmup_steps, so that no step is wasted on a learning rate of 0. After it
    the schedule runs over the remaining steps, `min_lr_ratio` being the factor that step `num_steps` would have.
    """
    warmup = optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return _after_warmup(step - warmup, optimizer, max(num_steps - warmup, 1))


def _after_warmup(step: int, optimizer: OptimizerConfig, length: int) -> float:
    low = optimizer.min_lr_ratio
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "linear":
            return low + (1 - low) * (1 - min(step / length, 1.0))
        case "cosine":
            return _cosine(min(step / length, 1.0), low)
        case "cosine_restarts":
            assert optimizer.restart_steps is not None, "the configuration requires restart_steps"
            return _cosine(_phase(step, optimizer.restart_steps, optimizer.restart_factor), low)


def _cosine(phase: float, low: float) -> float:
    """Half a cosine from 1 at 0 to `low` at 1. Source: Loshchilov & Hutter 2017, arXiv 1608.03983, Eq. 5."""
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * phase))


def _phase(step: int, first: int, factor: float) -> float:
    """Position of `step` in its cycle, in [0, 1); cycle i has round(first · factor^i) steps."""
    cycle = 0
    while step >= (length := max(round(first * factor**cycle), 1)):
        step -= length
        cycle += 1
    return step / length
