"""Optuna's TPE over a search space, through Ray Tune, told of the trials of earlier commands.

A sweep of several metrics is a study of several objectives. Source of the sampler: Watanabe 2023, arXiv 2304.11127;
for several objectives Ozaki et al. 2020, doi 10.1145/3377930.3389817.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue
from ray.tune.search.optuna import OptunaSearch

from raydistill.config.spaces import Point, flat_simplex, is_active, listed, ordered
from raydistill.config.sweep import Dimension, Grid, Integers, LogUniform, Simplex, SweepConfig, Uniform
from raydistill.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

STUDY = "sweep"


@dataclass(frozen=True, slots=True)
class Known:
    """A trial of an earlier command."""

    parameters: Mapping[str, JsonValue]
    """What Optuna had suggested."""
    values: tuple[float, ...] | None
    """Its metrics; None where it failed or goes on now."""
    failed: bool = False


def require_optuna() -> None:
    """`ConfigError` when the package is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "searcher: optuna wants the package optuna, which is not installed. Install it "
            "(pip install 'raydistill[tune]'), or use searcher random or grid."
        )


def open_search(sweep: SweepConfig, known: Sequence[Known]) -> OptunaSearch:
    """The search after the trials that are known. Those that go on are suggested again first, in their order."""
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)
    space = distributions(sweep)
    storage = optuna.storages.InMemoryStorage()
    directions: list[Literal["minimize", "maximize"]] = [
        "minimize" if metric.lower_is_better else "maximize" for metric in sweep.metrics
    ]
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions)
    for trial in known:
        parameters = dict(trial.parameters)
        if trial.values is not None and all(map(math.isfinite, trial.values)):
            study.add_trial(
                optuna.trial.create_trial(values=list(trial.values), params=parameters, distributions=space)
            )
        elif trial.failed or trial.values is not None:
            state = optuna.trial.TrialState.FAIL
            study.add_trial(optuna.trial.create_trial(state=state, params=parameters, distributions=space))
        else:
            study.enqueue_trial(parameters)
    # A sampler of its own for every beginning: one with the same seed would draw the first points once more.
    sampler = optuna.samplers.TPESampler(seed=sweep.seed + 7919 * len(known))
    return OptunaSearch(
        space,
        metric=[metric.name for metric in sweep.metrics],
        mode=["min" if metric.lower_is_better else "max" for metric in sweep.metrics],
        sampler=sampler,
        storage=storage,
        study_name=STUDY,
    )


def distributions(sweep: SweepConfig) -> dict[str, BaseDistribution]:
    """Optuna's parameters of a space: places in lists that have an order, names of values in those that have none, and
    for shares the uniform numbers that they are made from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def one(name: str, dimension: Dimension) -> dict[str, BaseDistribution]:
        match dimension:
            case Uniform(low=low, high=high):
                return {name: FloatDistribution(low, high)}
            case LogUniform(low=low, high=high):
                return {name: FloatDistribution(low, high, log=True)}
            case Integers(low=low, step=step):
                return {name: IntDistribution(low, int(str(listed(dimension)[-1])), step=step)}
            case Grid():
                return {name: IntDistribution(0, len(dimension.values) - 1)}
            case Simplex(steps=None):
                return {f"{name}:{i}": FloatDistribution(0.0, 1.0) for i in range(len(dimension.keys) - 1)}
        return {name: CategoricalDistribution([json.dumps(value) for value in listed(dimension)])}

    found: dict[str, BaseDistribution] = {}
    for name, dimension in sweep.space.items():
        found |= one(name, dimension)
    return found


def point_of(sweep: SweepConfig, parameters: Mapping[str, JsonValue]) -> Point:
    """The point that Optuna's parameters stand for; dimensions that are not active at it are left out."""
    point: Point = {}
    for name in ordered(sweep):
        dimension = sweep.space[name]
        if is_active(dimension, point):
            point[name] = _value(name, dimension, parameters)
    return point


def _value(name: str, dimension: Dimension, parameters: Mapping[str, JsonValue]) -> JsonValue:
    match dimension:
        case Uniform() | LogUniform() | Integers():
            return parameters[name]
        case Grid():
            return dimension.values[int(str(parameters[name]))]
        case Simplex(steps=None):
            uniforms = [float(str(parameters[f"{name}:{i}"])) for i in range(len(dimension.keys) - 1)]
            return [*flat_simplex(uniforms)]
    found: JsonValue = json.loads(str(parameters[name]))
    return found
