"""Brings what the training workers of a trial report to its own process, and sends them home when it is stopped.

Ray's `TuneReportCallback` brings no checkpoints, which population-based training needs. And a trial that Ray Tune stops
leaves its workers' places booked: they are freed when somebody asks the dashboard whether the controller still lives.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

CONTROLLER = "controller"
ABORT_SECONDS = 30.0


class Forward(UserCallback):
    """In Ray Train's controller: puts rank 0's reports into a queue, and with the first one the controller itself."""

    def __init__(self, queue: Queue):
        self._queue, self._introduced = queue, False

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if not self._introduced:
            self._queue.put({CONTROLLER: ray.get_runtime_context().current_actor})
            self._introduced = True
        self._queue.put(dict(metrics[0]))


def abort(controller: Any) -> None:
    """End a training and give back the places of its workers."""
    try:
        ray.get(controller.abort.remote(), timeout=ABORT_SECONDS)
    except (RayActorError, GetTimeoutError):  # it ends its own process; or it hangs, and will be killed with the trial
        return
