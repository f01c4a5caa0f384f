"""Counts samples, targets and seconds of a training, and makes the logged lines.

Language models are measured in tokens, all others in samples alone.
"""

from __future__ import annotations

import time

from raydistill.cache.loader import StepBatches
from raydistill.signals import JsonValue
from raydistill.train.checkpoint import Progressed
from raydistill.train.engine import Update


class Meter:
    """Rates are over the steps since the last logged line."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._clear()

    @property
    def speed(self) -> str:
        """Targets per second, or samples where nobody counts targets."""
        if self._tokens:
            return f"{self._per_second(self._tokens):,.0f} tokens/s"
        return f"{self._per_second(self._samples):,.1f} samples/s"

    def pause(self) -> None:
        """Leave out the time since the last step, which was not spent training."""
        self._mark = time.perf_counter()

    def advanced(self, done: Progressed, batches: StepBatches, update: Update, player: str = "student") -> Progressed:
        """How far the phase is after a step of `player`."""
        self._latest[player] = update
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        tokens = round(update.counts.get("tokens", 0.0))
        self._samples += batches.num_rows
        self._tokens += tokens
        self._seconds += seconds
        self._wait += batches.wait_seconds
        return done.model_copy(
            update={
                "step": batches.step + 1,
                "samples": done.samples + batches.num_rows,
                "tokens": done.tokens + tokens,
                "seconds": done.seconds + seconds,
            }
        )

    def line(self, done: Progressed, update: Update) -> dict[str, JsonValue]:
        """What is logged of a step; `data_wait_seconds` is the sum since the last line, on rank 0.

        Where players take turns, the line has the last step of each since the line before: parts have names of their
        own, loss and norm are the student's if it had a turn, and learning rates of others begin with their name.
        """
        latest = self._latest or {"student": update}
        shown = latest.get("student", update)
        counted = "tokens" in update.counts
        line: dict[str, JsonValue] = {
            "samples": done.samples,
            **({"tokens": done.tokens} if counted else {}),
            "loss": shown.loss,
            "parts": {name: value for each in latest.values() for name, value in each.parts.items()},
            "lr": {
                group if player == "student" else f"{player}/{group}": lr
                for player, each in latest.items()
                for group, lr in each.lr.items()
            },
            "grad_norm": shown.grad_norm,
            "samples_per_second": self._per_second(self._samples),
            **({"tokens_per_second": self._per_second(self._tokens)} if counted else {}),
            "data_wait_seconds": self._wait,
            "seconds": done.seconds,
        }
        self._clear()
        return line

    def _per_second(self, amount: float) -> float:
        return amount / max(self._seconds, 1e-9)

    def _clear(self) -> None:
        self._samples = self._tokens = 0
        self._seconds = self._wait = 0.0
        self._latest: dict[str, Update] = {}
