"""A search space over the keys of a run, and how it is searched: the content of a file in tune/."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from raydistill.config.base import Config, tag_defaults_to

Conditions = dict[str, JsonValue]
"""Keys of the same space, and the value (or list of values) that each must have."""
MOST_MIXTURES = 20_000
"""Shares of a simplex with steps beyond which these are taken for a mistake."""


class Grid(Config):
    """Values in an order that means something. `searcher: grid` takes all of them; others draw, and `pbt` moves to a
    neighbour."""

    kind: Literal["grid"]
    values: tuple[JsonValue, ...] = Field(min_length=1)
    """The values."""
    when: Conditions = Field(default={})
    """The key is set only where other keys of the space have these values (a list: one of these)."""


class Choice(Config):
    """Values without an order, maps among them. `searcher: grid` takes all of them."""

    kind: Literal["choice"]
    values: tuple[JsonValue, ...] = Field(min_length=1)
    """The values."""
    when: Conditions = Field(default={})
    """The key is set only where other keys of the space have these values (a list: one of these)."""


class Uniform(Config):
    """A number between two ends."""

    kind: Literal["uniform"]
    low: float
    """Least value."""
    high: float
    """Largest value."""
    when: Conditions = Field(default={})
    """The key is set only where other keys of the space have these values (a list: one of these)."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _require_rising(self.low, self.high)
        return self


class LogUniform(Config):
    """A number whose logarithm is uniform: for what is chosen by its order of magnitude, such as learning rates."""

    kind: Literal["log_uniform"]
    low: float = Field(gt=0)
    """Least value."""
    high: float = Field(gt=0)
    """Largest value."""
    when: Conditions = Field(default={})
    """The key is set only where other keys of the space have these values (a list: one of these)."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _require_rising(self.low, self.high)
        return self


class Integers(Config):
    """A whole number between two ends, both included. `searcher: grid` takes all of them."""

    kind: Literal["integers"]
    low: int
    """Least value."""
    high: int
    """Largest value."""
    step: int = Field(default=1, ge=1)
    """Distance between values, counted from `low`."""
    when: Conditions = Field(default={})
    """The key is set only where other keys of the space have these values (a list: one of these)."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _require_rising(self.low, self.high)
        return self


class Simplex(Config):
    """Shares of several keys that sum to 1, such as the weights of teachers. Its own name in `space` is a label."""

    kind: Literal["simplex"]
    keys: tuple[str, ...] = Field(min_length=2)
    """The keys that get the shares."""
    concentration: float = Field(default=1.0, ge=0.01)
    """Of the Dirichlet distribution that is drawn from: 1 is uniform, more keeps to the middle, less to the corners.
    `searcher: optuna` begins uniformly, whatever it is."""
    steps: int | None = Field(default=None, ge=1)
    """Only shares that are multiples of 1 / `steps`; `searcher: grid` takes all of them and needs this."""
    when: Conditions = Field(default={})
    """The keys are set only where other keys of the space have these values (a list: one of these)."""

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(f"keys: wanted different keys, found {list(self.keys)}.")
        if self.steps and (found := comb(self.steps + len(self.keys) - 1, len(self.keys) - 1)) > MOST_MIXTURES:
            raise ValueError(
                f"steps: wanted at most {MOST_MIXTURES:,} mixtures, found {found:,}; take fewer, or null for all."
            )
        return self


Dimension = Annotated[Grid | Choice | Uniform | LogUniform | Integers | Simplex, Field(discriminator="kind")]


class MetricConfig(Config):
    """What is optimised."""

    name: str
    """A metric of the evaluations during training (`kl_to_teacher`, `perplexity`, `mse_to_teacher`, …), or a cost of
    the student: `parameters`, `bytes`, `tokens_per_second` (language models), `samples_per_second` (images),
    `frames_per_second` (world models)."""
    mode: Literal["min", "max"] | None = None
    """Whether small or large is good; by default what is good for this metric."""

    @property
    def lower_is_better(self) -> bool:
        """Whether small is good."""
        return self.name not in LARGE_IS_GOOD if self.mode is None else self.mode == "min"


SPEEDS = ("tokens_per_second", "samples_per_second", "frames_per_second")
"""Costs that take a measurement, of language models, of denoisers and of world models."""
LARGE_IS_GOOD = ("top1_accuracy", "top1_agreement", "true_change_cosine", *SPEEDS)
"""Metrics of which more is better."""


class RunToTheEnd(Config):
    """Every trial is trained to its end."""

    kind: Literal["none"] = "none"


class Asha(Config):
    """Asynchronous successive halving: at steps grace, grace · factor, … only the best 1/factor of the trials go on.

    Source: Li et al. 2018, arXiv 1810.05934, Alg. 2 (the stopping form of Ray Tune).
    """

    kind: Literal["asha"]
    grace_steps: int | None = Field(default=None, ge=1)
    """Steps before a trial may be stopped; null: the first evaluation."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One in so many goes on."""


class MedianStopping(Config):
    """A trial stops when its best result is worse than the median of the others' running means at the same step.

    Source: Golovin et al. 2017, "Google Vizier", Sec. 3.2.2.
    """

    kind: Literal["median"]
    grace_steps: int | None = Field(default=None, ge=1)
    """Steps before a trial may be stopped; null: the first evaluation."""
    min_trials: int = Field(default=3, ge=1)
    """Others that must have come as far."""


class PopulationBased(Config):
    """Population-based training: from time to time the worst trials take over the weights of the best and go on with
    changed values. Changes what may change inside a run: keys of the recipe and of the optimizers.

    Source: Jaderberg et al. 2017, arXiv 1711.09846, Alg. 1.
    """

    kind: Literal["pbt"]
    interval_steps: int | None = Field(default=None, ge=1)
    """Steps between changes of one trial; null: at every evaluation."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the trials that are replaced, and of those that replace them."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """Probability that a value is drawn anew, instead of being multiplied by 0.8 or 1.2 or moved to a neighbour."""


SchedulerConfig = Annotated[
    RunToTheEnd | Asha | MedianStopping | PopulationBased,
    Field(discriminator="kind"),
    tag_defaults_to("kind", "none"),
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]
Metrics = Annotated[
    tuple[MetricConfig, ...],
    Field(min_length=1),
    BeforeValidator(
        lambda value: (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )
    ),
]


class SweepConfig(Config):
    """Everything that one sweep needs to know beside the run that it varies."""

    space: dict[str, Dimension] = Field(min_length=1)
    """What is varied, by dotted key: the keys that the command line takes."""
    metrics: Metrics
    """What is optimised, by name or as maps. The first decides which trials stop early and which is exported; with
    several, the best compromises are reported."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """`grid` takes every combination, `random` draws, `optuna` (a package of its own) learns from the trials before."""
    scheduler: SchedulerConfig = RunToTheEnd()
    """Which trials stop early, by kind or as a map."""
    trials: int | None = Field(default=None, ge=1)
    """Number of trials; with `searcher: grid` all combinations."""
    concurrent: int | None = Field(default=None, ge=1)
    """Most trials at a time; null: as many as the cluster has room for."""
    seed: int = 0
    """Seed of the draws. The seed of training stays that of the run, so that trials differ in their values alone."""
    allow_rebuild: bool = False
    """Accept values that need another cache, and build it before the first trial."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the run that are varied, in the order of the space."""
        return tuple(key for name, dimension in self.space.items() for key in keys_of(name, dimension))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*_keys(self), *_conditions(self), *_searcher(self), *_population(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def keys_of(name: str, dimension: Dimension) -> tuple[str, ...]:
    """The keys of the run that a dimension sets."""
    return dimension.keys if isinstance(dimension, Simplex) else (name,)


def is_listed(dimension: Dimension) -> bool:
    """Whether all values of a dimension can be listed."""
    return isinstance(dimension, Grid | Choice | Integers) or (isinstance(dimension, Simplex) and bool(dimension.steps))


def _require_rising(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"low: wanted less than high ({high:g}), found {low:g}.")


def _keys(sweep: SweepConfig) -> Iterator[str]:
    """No key is set twice, directly or by a map above it."""
    seen: list[tuple[str, ...]] = []
    for key in sweep.keys:
        path = tuple(key.split("."))
        for other in seen:
            if path[: len(other)] == other or other[: len(path)] == path:
                yield f"space: {key} and {'.'.join(other)} set the same place; keep one of them."
        seen.append(path)
    for name, dimension in sweep.space.items():
        if isinstance(dimension, Grid | Choice):
            shown = [repr(value) for value in dimension.values]
            if len(set(shown)) < len(shown):
                yield f"space: {name}.values: wanted different values, found {', '.join(shown)}."
    names = [metric.name for metric in sweep.metrics]
    if len(set(names)) < len(names):
        yield f"metrics: wanted different metrics, found {', '.join(names)}."


def _conditions(sweep: SweepConfig) -> Iterator[str]:
    named = {name for name, dimension in sweep.space.items() if not isinstance(dimension, Simplex)}
    for name, dimension in sweep.space.items():
        for other in dimension.when:
            if other not in named or other == name:
                others = ", ".join(sorted(named - {name})) or "it has no other"
                yield f"space: {name}.when: wanted another key of this space ({others}), found {other}."
    if not any(other not in named for d in sweep.space.values() for other in d.when) and _circle(sweep):
        yield f"space: {_circle(sweep)}.when: the conditions lead back to itself."


def _circle(sweep: SweepConfig) -> str | None:
    """A name whose conditions lead back to it."""
    for name in sweep.space:
        above, reached = [*sweep.space[name].when], set[str]()
        while above:
            other = above.pop()
            if other == name:
                return name
            if other not in reached:
                reached.add(other)
                above += sweep.space[other].when
    return None


def _searcher(sweep: SweepConfig) -> Iterator[str]:
    if sweep.searcher == "grid":
        for name, dimension in sweep.space.items():
            if not is_listed(dimension):
                remedy = "give it steps" if isinstance(dimension, Simplex) else "use kind grid with values"
                yield f"space: {name}: searcher grid wants values that can be listed, found {dimension.kind}; {remedy}."
    elif sweep.trials is None:
        yield f"trials: wanted the number of trials with searcher {sweep.searcher}, found null."
    if sweep.searcher == "optuna" and sweep.allow_rebuild:
        yield "allow_rebuild: caches are built before the first trial, when searcher optuna has no values yet."


def _population(sweep: SweepConfig) -> Iterator[str]:
    if not isinstance(sweep.scheduler, PopulationBased):
        return
    if sweep.searcher != "random":
        yield f"scheduler: pbt draws its first values at random and then changes them; found searcher {sweep.searcher}."
    if sweep.trials is not None and sweep.trials < 4:
        yield f"trials: a population of pbt has at least 4 trials, found {sweep.trials}."
    for name, dimension in sweep.space.items():
        if dimension.when:
            yield f"space: {name}.when: pbt changes values inside a run and knows no conditions."
