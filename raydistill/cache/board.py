"""What workers on other machines tell the driver: how far they are, and lines for its log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from raydistill import progress
from raydistill.cache.pool import beside_the_driver
from raydistill.progress import Progress

State = tuple[float, float, float | None, str, str]
"""Units done at first, units done, units in all, name of the unit, note."""
SECONDS = 2.0


class Board:
    """An actor that keeps what was told until the driver reads it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._states: dict[str, State] = {}

    def say(self, line: str) -> None:
        """A line for the log."""
        self._lines.append(line)

    def show(self, label: str, state: State) -> None:
        """How far the work called `label` is."""
        self._states[label] = state

    def heard(self) -> None:
        """Answered when everything that the caller has told before has arrived."""

    def read(self) -> tuple[list[str], dict[str, State]]:
        """The lines since the last reading, and how far everything is."""
        lines, self._lines = self._lines, []
        return lines, self._states


class Watched:
    """In the driver: a board, and what is told there shown as if it happened here. A context manager."""

    def __init__(self) -> None:
        self.board: Any = beside_the_driver(Board)
        self._bars: dict[str, Progress] = {}
        self._stop = threading.Event()

    def __enter__(self) -> Watched:
        self._thread = threading.Thread(target=self._run, name="raydistill-board", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(SECONDS):
            self._read()

    def _read(self) -> None:
        lines, states = ray.get(self.board.read.remote(), timeout=60)
        for line in lines:
            progress.say(line)
        for label, (first, done, total, unit, note) in states.items():
            if label not in self._bars:
                self._bars[label] = Progress(label, total=total, unit=unit, done=first).__enter__()
            # A phase that goes on from a checkpoint stands further back than before.
            self._bars[label].advance(done - self._bars[label].done, note=note)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        if kind is None:
            self._read()
            for bar in self._bars.values():
                bar.__exit__(None, None, None)
        ray.kill(self.board)


def tell(board: Any) -> Callable[[], None]:
    """In a worker: send what this process shows and says to `board`, at most once a second; returns what ends that."""
    told: dict[str, float] = {}

    def show(bar: Progress, note: str) -> None:
        last = bar.total is not None and bar.done >= bar.total
        if last or time.monotonic() - told.get(bar.label, -1.0) >= 1.0:
            told[bar.label] = time.monotonic()
            board.show.remote(bar.label, (bar.first, bar.done, bar.total, bar.unit, note))

    def say(line: str) -> None:
        board.say.remote(line)

    progress.watchers.append(show)
    progress.hearers.append(say)

    def end() -> None:
        progress.watchers.remove(show)
        progress.hearers.remove(say)
        with contextlib.suppress(ray.exceptions.RayError):  # a driver that is gone hears nothing
            ray.get(board.heard.remote(), timeout=60)

    return end


def measured_by_ray() -> None:
    """Have Ray's metrics tell how far each stage is: `raydistill_progress_done` and `_total`, by label and unit."""
    from ray.util.metrics import Gauge

    tags = ("label", "unit")
    done = Gauge("raydistill_progress_done", description="Units of work done.", tag_keys=tags)
    total = Gauge("raydistill_progress_total", description="Units of work in all.", tag_keys=tags)

    def show(bar: Progress, note: str) -> None:
        names = {"label": bar.label, "unit": bar.unit}
        done.set(bar.done, tags=names)
        if bar.total is not None:
            total.set(bar.total, tags=names)

    progress.watchers.append(show)
