"""What a trial has measured so far, read from the files of its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from raydistill.config.schema import RunConfig
from raydistill.config.training import PhaseConfig
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints
from raydistill.train.final import BEST, BEST_RECORD
from raydistill.train.job import FINAL, RECORD
from raydistill.train.metrics import METRICS

COSTS = "costs.json"
"""Measures of the student that do not depend on training."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation."""

    phase: int
    """Index of the phase."""
    step: int
    """Steps of that phase."""
    total_step: int
    """Steps over all phases."""
    values: Mapping[str, float]
    """The metrics."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a trial has come and what it is worth."""

    curve: tuple[Evaluated, ...] = ()
    """Evaluations, in order."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those of the weights that it hands over (the best ones where the last phase keeps them), and the costs."""
    phase_steps: tuple[int, ...] = ()
    """Steps trained, by phase."""
    samples: int = 0
    """Rows trained on."""
    tokens: int = 0
    """Targets trained on; 0 where nobody counts them."""
    seconds: float = 0.0
    """Time spent in training steps."""
    complete: bool = False
    """Whether every phase is trained to its end."""

    @property
    def steps(self) -> int:
        """Steps trained, over all phases."""
        return sum(self.phase_steps)


def read_outcome(folder: Store, config: RunConfig) -> Outcome:
    """The outcome of the trial in `folder`, finished or not."""
    lines = _lines(folder)
    curve: list[Evaluated] = []
    steps: list[int] = []
    done = {"samples": 0.0, "tokens": 0.0, "seconds": 0.0}
    for index, phase in enumerate(config.phases):
        own = [line for line in lines if line.get("phase") == phase.name]
        curve += [
            Evaluated(index, line["step"], sum(steps) + line["step"], _numbers(line["evaluation"]))
            for line in own
            if "evaluation" in line
        ]
        last = max((line for line in own if "loss" in line), key=lambda line: line["step"], default={})
        steps.append(last.get("step", 0))
        done = {key: value + last.get(key, 0) for key, value in done.items()}
    complete = all(folder.exists(f"{_folder(phase)}/{FINAL}/{RECORD}") for phase in config.phases)
    return Outcome(
        curve=tuple(curve),
        metrics={**_handed_over(folder, config, curve), **read_costs(folder)},
        phase_steps=tuple(steps),
        samples=int(done["samples"]),
        tokens=int(done["tokens"]),
        seconds=done["seconds"],
        complete=complete and folder.exists(COSTS),
    )


def saved(folder: Store, config: RunConfig) -> list[Evaluated]:
    """The evaluations that will not be made again when the trial goes on: those up to its last checkpoint."""
    reached: dict[int, float] = {}
    for index, phase in enumerate(config.phases):
        if folder.exists(f"{_folder(phase)}/{FINAL}/{RECORD}"):
            reached[index] = float("inf")
        elif latest := Checkpoints(folder / _folder(phase) / "checkpoints", 1).latest():
            reached[index] = latest.step
    return [e for e in read_outcome(folder, config).curve if e.step <= reached.get(e.phase, -1)]


def read_costs(folder: Store) -> dict[str, float]:
    """The costs that the trial has measured."""
    return _numbers(json.loads(folder.read_text(COSTS))) if folder.exists(COSTS) else {}


def _folder(phase: PhaseConfig) -> str:
    return f"phases/{phase.name}"


def _lines(folder: Store) -> list[dict[str, Any]]:
    text = folder.read_text(METRICS) if folder.exists(METRICS) else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the last may be cut off
    return [json.loads(line) for line in whole]


def _numbers(values: Mapping[str, JsonValue]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _handed_over(folder: Store, config: RunConfig, curve: list[Evaluated]) -> dict[str, float]:
    if not curve:
        return {}
    last = curve[-1]
    best = folder / _folder(config.phases[last.phase]) / BEST
    if config.phases[last.phase].checkpoint.best_metric is not None and best.exists(BEST_RECORD):
        step = json.loads(best.read_text(BEST_RECORD))["step"]
        last = next((e for e in curve if (e.phase, e.step) == (last.phase, step)), last)
    return dict(last.values)
