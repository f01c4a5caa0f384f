"""Progress of a long stage: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

QUIET_SECONDS = 20.0

watchers: list[Callable[[Progress, str], None]] = []
"""Called with a progress that is not silent, and its note, whenever it has moved."""
hearers: list[Callable[[str], None]] = []
"""Called with every line that is said."""


def say(line: str) -> None:
    """Print a line about a stage, and let whoever listens have it."""
    print(line, flush=True)
    for hear in hearers:
        hear(line)


class Progress:
    """Counts towards `total` units of work; use as a context manager and call `advance`.

    `silent` shows nothing: for workers of which another one shows the progress.
    """

    def __init__(self, label: str, *, total: float | None, unit: str, done: float = 0, silent: bool = False):
        self.label, self.total, self.unit, self.silent = label, total, unit, silent
        self.done, self.first = done, done
        self._bar: tqdm[None] | None = None
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._start = self._printed = time.monotonic()
        if sys.stderr.isatty() and not self.silent:
            self._bar = tqdm(
                desc=self.label, total=self.total, initial=self.done, unit=f" {self.unit}", unit_scale=True,
                dynamic_ncols=True, leave=True,
            )  # fmt: skip
        return self

    def advance(self, amount: float, *, note: str = "") -> None:
        """Add `amount` units; `note` is shown beside the count."""
        self.done += amount
        for watch in () if self.silent else tuple(watchers):
            watch(self, note)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif not self.silent and time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            print(self._line(note), flush=True)

    def _line(self, note: str) -> str:
        seconds = time.monotonic() - self._start
        rate = (self.done - self.first) / max(seconds, 1e-9)
        line = f"{self.label}: {self.done:,.0f}"
        if self.total is not None:
            line += f"/{self.total:,.0f} {self.unit}, {rate:,.1f}/s"
            if rate > 0:
                line += f", {max(self.total - self.done, 0) / rate:,.0f} s left"
        else:
            line += f" {self.unit}, {rate:,.1f}/s"
        return f"{line}; {note}" if note else line

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.done > self.first and not self.silent:
            seconds = time.monotonic() - self._start
            rate = (self.done - self.first) / max(seconds, 1e-9)
            print(f"{self.label}: {self.done:,.0f} {self.unit} in {seconds:,.1f} s ({rate:,.1f}/s)", flush=True)
