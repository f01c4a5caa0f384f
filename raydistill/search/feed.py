"""Which trial comes next: of points that are known beforehand, or of points that depend on how others ended.

Open trials of earlier commands come first. A new trial is written down before its number is given away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pydantic import JsonValue

from raydistill.config.spaces import Point
from raydistill.config.sweep import SweepConfig
from raydistill.config.tune import Space
from raydistill.errors import ConfigError
from raydistill.search.ledger import Ledger
from raydistill.search.results import Result


class Making(Protocol):
    """What makes trials."""

    space: Space
    sweep: SweepConfig
    ledger: Ledger

    def add(self, number: int, point: Point, parameters: Mapping[str, JsonValue]) -> None:
        """Write a new trial down; `ConfigError` when the schema refuses its values together."""


class Feed(Protocol):
    """Gives out trials."""

    def total(self) -> int:
        """Trials of the sweep."""

    def left(self) -> int:
        """Those that are still to be run."""

    def next(self) -> int | None:
        """The number of the next trial; None when there is none."""

    def learn(self, number: int, report: Mapping[str, float] | None) -> None:
        """Take note of how a trial ended: its last report, None where it failed."""


class Listed:
    """The trials of a sweep whose points are known beforehand."""

    def __init__(self, sweep: Making, waiting: Sequence[int]):
        self._sweep = sweep
        self._points = sweep.space.points() or []
        there = {record.number for record in sweep.ledger.trials()}
        self._waiting = [*waiting, *(n for n in range(len(self._points)) if n not in there)]
        self._new = set(self._waiting) - {*waiting}
        self._total = len(there) + len(self._new)

    def total(self) -> int:
        """Trials of the sweep."""
        return self._total

    def left(self) -> int:
        """Those that are still to be run."""
        return len(self._waiting)

    def next(self) -> int | None:
        """The number of the next trial, which is written down."""
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        if number in self._new:
            self._sweep.add(number, self._points[number], {})
        return number

    def learn(self, number: int, report: Mapping[str, float] | None) -> None:
        """Nothing: the points do not depend on it."""


class Learning:
    """The trials of a sweep whose points depend on how earlier ones ended."""

    def __init__(self, sweep: Making, waiting: Sequence[int], past: Sequence[Result]):
        from raydistill.search.optuna import Known, open_search

        self._sweep, self._waiting = sweep, [*waiting]
        self._number = max((result.record.number for result in past), default=-1) + 1
        known = [
            Known(
                result.record.parameters,
                None if result.record.status in ("open", "failed") else self._values(result),
                failed=result.record.status == "failed",
            )
            for result in past
        ]
        self._search = open_search(sweep.sweep, known)

    def _values(self, result: Result) -> tuple[float, ...] | None:
        values = [result.value(metric) for metric in self._sweep.sweep.metrics]
        return None if any(value is None for value in values) else tuple(v for v in values if v is not None)

    def total(self) -> int:
        """Trials of the sweep."""
        return max(self._sweep.sweep.trials or 0, self._number)

    def left(self) -> int:
        """Those that are still to be run."""
        return len(self._waiting) + self.total() - self._number

    def next(self) -> int | None:
        """The number of the next trial, which is written down; values that do not go together are a failed trial."""
        from raydistill.search.optuna import point_of

        if self._waiting:
            number = self._waiting.pop(0)
            self._search.suggest(f"{number}")  # what was suggested before, which is in its queue
            return number
        while self._number < (self._sweep.sweep.trials or 0):
            number, self._number = self._number, self._number + 1
            parameters = self._search.suggest(f"{number}") or {}
            point = point_of(self._sweep.sweep, parameters)
            try:
                self._sweep.add(number, point, parameters)
                return number
            except ConfigError as error:  # of values that are fine each, but not together
                print(f"trial {number:03}: {error}", flush=True)
                self._search.on_trial_complete(f"{number}", error=True)
        return None

    def learn(self, number: int, report: Mapping[str, float] | None) -> None:
        """Tell the search how a trial ended."""
        self._search.on_trial_complete(f"{number}", dict(report) if report else None, error=report is None)
