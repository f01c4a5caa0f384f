"""Reading a search space and holding it against the run that it varies, before anything is run.

Needs neither torch nor data. What would change a cache is for the search to say, which knows the caches' fingerprints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from raydistill.config.load import Draft, Origins, read_section
from raydistill.config.metrics import training_metrics
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.spaces import Point, all_points, drawn_points, listed, probes, settings, shown, size
from raydistill.config.sweep import PopulationBased, RunToTheEnd, Simplex, SweepConfig, is_listed
from raydistill.config.world import EpisodesSource
from raydistill.errors import ConfigError

MOST_TRIALS = 5_000
"""Combinations beyond which a grid is taken for a mistake."""
FIXED = {
    "name": "the sweep names its trials",
    "run_dir": "the sweep gives each trial a folder",
    "cache": "all trials share the caches",
    "evaluate": "all trials are measured alike",
    "resources": "all trials get the same share of the cluster",
    "tracking": "it changes no result",
    "export": "it changes no trial; set it in the run's own configuration",
    "plan": "it changes no result",
}
"""Sections that no trial may vary, and why. `evaluate.held_out` is left to the caches, which it would change."""
MOVING = ("kl_to_teacher", "top1_agreement", "mse_to_teacher", "mse_to_mean")
"""Metrics that are means over the teachers with their weights."""
MUTABLE = ("phases.0.recipe.", "phases.0.optimizer.")
"""Where the keys stand whose values may change inside a run."""


class Space:
    """A sweep with the run that it varies: makes and checks the configurations of trials."""

    def __init__(self, sweep: SweepConfig, draft: Draft, file: str, origins: Origins):
        self.sweep, self.draft, self.file = sweep, draft, file
        self._origins = origins
        self.base = draft.config()

    def config(self, point: Mapping[str, JsonValue], changes: Mapping[str, JsonValue] | None = None) -> RunConfig:
        """The configuration at a point, with `changes` of the sweep's own on top; `ConfigError` when the schema
        refuses it."""
        values = settings(self.sweep, point)
        where = self._where(next(iter(point))) if len(point) == 1 else f"{self.file}, {shown(self.sweep, point)}"
        return self.draft.config({**values, **(changes or {})}, where=where)

    def points(self) -> list[Point] | None:
        """The points of all trials where they are known beforehand; None with a searcher that learns."""
        sweep = self.sweep
        if sweep.searcher == "optuna":
            return None
        return all_points(sweep) if sweep.searcher == "grid" else drawn_points(sweep, sweep.trials or 0)

    def _where(self, name: str) -> str:
        return self._origins.get(("space", *name.split(".")), self.file)


def load_space(file: str | Path, draft: Draft) -> Space:
    """The search space in `file` over the run `draft`; `ConfigError` names every problem that both together have."""
    sweep, origins = read_section(file, SweepConfig)
    space = Space(sweep, draft, str(file), origins)
    conditions = [*_conditions(space)]
    problems = [*_fixed(space), *conditions, *_number(space), *_metrics(space), *_reports(space)]
    # Where a condition never holds, there is no point at which its key could be tried.
    problems = [*(f"{file}: {problem}" for problem in problems), *([] if conditions else _values(space))]
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join((f"{len(problems)} problems:", *problems)))
    return space


def _fixed(space: Space) -> Iterator[str]:
    for key in space.sweep.keys:
        section = key.split(".")[0]
        if section in FIXED and key != "evaluate.held_out":
            yield f"space: {key} is not a trial's to vary: {FIXED[section]}."
    if isinstance(space.sweep.scheduler, PopulationBased):
        if len(space.base.phases) != 1:
            yield f"scheduler: pbt wants a run of one phase, found {len(space.base.phases)}."
        for key in space.sweep.keys:
            if not key.startswith(MUTABLE):
                yield f"space: {key} cannot change inside a run; pbt changes those of the recipe and of optimizers."


def _conditions(space: Space) -> Iterator[str]:
    for name, dimension in space.sweep.space.items():
        for other, wanted in dimension.when.items():
            values = listed(space.sweep.space[other]) if is_listed(space.sweep.space[other]) else []
            if wanted == []:
                yield f"space: {name}.when.{other}: wanted a value or a list of them, found an empty list."
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if value not in values:
                    found = (
                        f"{other} takes {', '.join(map(repr, values))}" if values else f"{other} has no list of values"
                    )
                    yield f"space: {name}.when: {other} is never {value!r}; {found}."


def _number(space: Space) -> Iterator[str]:
    sweep = space.sweep
    if sweep.searcher == "grid" and size(sweep) > MOST_TRIALS:
        yield f"space: wanted at most {MOST_TRIALS:,} combinations, found {size(sweep):,.0f}; use searcher random."
    elif sweep.searcher == "grid" and sweep.trials is not None and sweep.trials != len(all_points(sweep)):
        found = len(all_points(sweep))
        yield f"trials: searcher grid takes all {found} combinations, found {sweep.trials}; leave trials out."


def measured(config: RunConfig) -> tuple[str, ...]:
    """The metrics that a trial can be judged by: those of evaluations during training, and the student's costs."""
    return (*training_metrics(config), *costs(config))


def costs(config: RunConfig) -> tuple[str, ...]:
    """Metrics that do not depend on training."""
    match config.source:
        case TextSource():
            return ("parameters", "bytes", "tokens_per_second")
        case ImagesSource() | VideosSource() | PromptsSource():
            return ("parameters", "bytes", "samples_per_second")
        case EpisodesSource():
            return ("parameters", "bytes", "frames_per_second")


def _metrics(space: Space) -> Iterator[str]:
    known = measured(space.base)
    weights = [key for key in space.sweep.keys if key.startswith("teachers.") and key.endswith(".weight")]
    for metric in space.sweep.metrics:
        if metric.name not in known:
            near = difflib.get_close_matches(metric.name, known, n=1, cutoff=0.5)
            nearest = f"; nearest: {near[0]}" if near else ""
            yield f"metrics: wanted one of {', '.join(known)}; found {metric.name!r}{nearest}."
        elif weights and metric.name in MOVING:
            fair = [name for name in known if name not in MOVING and name not in costs(space.base) and name != "ece"]
            yield (
                f"metrics: {metric.name} is a mean over the teachers with their weights, so trials with other weights "
                f"({', '.join(weights)}) cannot be compared by it; use {', '.join(fair)}."
            )
    if space.sweep.metrics[0].name in costs(space.base):
        yield f"metrics: wanted a measure of quality first, found {space.sweep.metrics[0].name}, a cost."


def _reports(space: Space) -> Iterator[str]:
    scheduler, base = space.sweep.scheduler, space.base
    if isinstance(scheduler, RunToTheEnd):
        return
    if base.evaluate.every_steps is None:
        yield f"scheduler: {scheduler.kind} needs evaluations during training; set evaluate.every_steps in the run."
    elif isinstance(scheduler, PopulationBased):
        interval = scheduler.interval_steps or base.evaluate.every_steps
        every = base.phases[0].checkpoint.every_steps
        if every > interval:
            yield (
                f"scheduler: pbt takes over checkpoints every {interval} steps, found phases.0.checkpoint.every_steps: "
                f"{every}; set it to at most {interval}."
            )


def _values(space: Space) -> list[str]:
    """What the schema refuses: listed values and ends of each dimension, then whole points as far as they are known."""
    problems: dict[str, None] = {}
    for name, point in probes(space.sweep):
        if isinstance(space.sweep.space[name], Simplex) and problems:
            continue
        try:
            space.config(point)
        except ConfigError as error:
            problems[str(error)] = None
    if problems or size(space.sweep) > MOST_TRIALS:
        return list(problems)
    for point in space.points() or []:
        try:
            space.config(point)
        except ConfigError as error:
            return [f"{space.file}: {shown(space.sweep, point)}: {error}"]
    return []
