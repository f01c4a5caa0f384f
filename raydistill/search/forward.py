"""Brings what the training workers of a trial report to the trial's own process.

Ray's `TuneReportCallback` does this without checkpoints, which population-based training needs.
"""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue


class Forward(UserCallback):
    """Puts rank 0's reports into a queue, and waits where the trial has not taken the one before."""

    def __init__(self, queue: Queue):
        self._queue = queue

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        self._queue.put(dict(metrics[0]))
