"""Ray Tune's schedulers as a sweep asks for them, told of the trials that ended before this command."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raydistill.config.spaces import changed, settings
from raydistill.config.sweep import Asha, MedianStopping, PopulationBased, RunToTheEnd, SweepConfig
from raydistill.search.curve import Outcome

STEP = "step"
"""Under which a trial reports how far it is."""
FOREVER = 10**12
"""More steps than any trial has: trials end by themselves."""
Config = dict[str, Any]


class Past:
    """Stands for a trial of an earlier command in a scheduler's books."""

    def __init__(self, number: int):
        self.trial_id = f"past-{number}"


def make_scheduler(sweep: SweepConfig, *, first_evaluation: int) -> TrialScheduler:
    """The scheduler of a sweep; `first_evaluation` is the step of the first evaluation of a trial."""
    metric = sweep.metrics[0]
    judged: dict[str, Any] = {
        "time_attr": STEP, "metric": metric.name, "mode": "min" if metric.lower_is_better else "max",
    }  # fmt: skip
    match sweep.scheduler:
        case RunToTheEnd():
            return FIFOScheduler()
        case Asha(grace_steps=grace, reduction_factor=factor):
            grace = grace or first_evaluation
            return AsyncHyperBandScheduler(max_t=FOREVER, grace_period=grace, reduction_factor=factor, **judged)
        case MedianStopping(grace_steps=grace, min_trials=trials):
            # Within a slice without end a trial is never paused, which would start its process again.
            judged["min_time_slice"] = math.inf
            return MedianStoppingRule(grace_period=grace or first_evaluation, min_samples_required=trials, **judged)
        case PopulationBased(interval_steps=interval, quantile=quantile):
            return PopulationBasedTraining(
                perturbation_interval=interval or first_evaluation,
                quantile_fraction=quantile,
                custom_explore_fn=explorer(sweep),
                log_config=False,
                **judged,
            )


def explorer(sweep: SweepConfig) -> Callable[[Config], Config]:
    """What makes the configuration of a trial that takes over another's: the donor's, with changed values and a mark
    by which the trial knows that it has not yet taken over."""
    assert isinstance(sweep.scheduler, PopulationBased), "only a population takes over weights"
    resample, rng = sweep.scheduler.resample, random.Random(f"{sweep.seed}/changes")

    def explore(donor: Config) -> Config:
        of = donor["of"]
        point = changed(sweep, of["point"], rng, resample=resample)
        return {"of": {**of, "point": point, "values": settings(sweep, point), "mark": uuid.uuid4().hex}}

    return explore


def remember(scheduler: TrialScheduler, ended: Iterable[tuple[int, Outcome]]) -> None:
    """Tell a scheduler what trials measured that ended before this command: their numbers and outcomes."""
    if not isinstance(scheduler, AsyncHyperBandScheduler | MedianStoppingRule):
        return
    for number, outcome in ended:
        past: Any = Past(number)
        scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
        for evaluated in outcome.curve:
            report = {STEP: evaluated.total_step, **evaluated.values}
            if scheduler.on_trial_result(None, past, report) == TrialScheduler.STOP:  # type: ignore[arg-type]
                break
