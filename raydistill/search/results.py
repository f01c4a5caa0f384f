"""What came out of a sweep: which trial is the best, which are the best compromises, and which keys mattered."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from raydistill.config.schema import RunConfig
from raydistill.config.sweep import MetricConfig, SweepConfig
from raydistill.search.curve import Outcome, read_outcome
from raydistill.search.ledger import Ledger, TrialRecord, read_config

GROUPS = 3
"""Groups of equal size into which the values of a key are put where most are different."""
FEWEST = 6
"""Trials below which nothing is said of a key's importance."""
SHUFFLES = 999
"""Random orders with which an importance is compared."""


@dataclass(frozen=True, slots=True)
class Result:
    """A trial and its outcome."""

    record: TrialRecord
    outcome: Outcome

    def value(self, metric: MetricConfig) -> float | None:
        """Its value of a metric; None where it has none or it is no finite number."""
        found = self.outcome.metrics.get(metric.name)
        return found if found is not None and math.isfinite(found) else None


def read_results(ledger: Ledger) -> list[Result]:
    """All trials that are there, by number."""
    return [
        Result(record, read_outcome(folder, read_config(folder)))
        for record in ledger.trials()
        for folder in [ledger.folder(record.number)]
        if folder.exists("config.json")
    ]


def finished(results: Sequence[Result], sweep: SweepConfig) -> list[Result]:
    """The trials that were trained to their end and have every metric: those that can be compared."""
    return [r for r in results if r.record.status == "done" and all(r.value(m) is not None for m in sweep.metrics)]


def best_of(results: Sequence[Result], sweep: SweepConfig) -> Result | None:
    """The finished trial with the best first metric; of equal ones the first."""
    metric = sweep.metrics[0]
    return min(finished(results, sweep), key=lambda r: _loss(r, metric), default=None)


def _loss(result: Result, metric: MetricConfig) -> float:
    value = result.value(metric)
    assert value is not None, "only finished trials are compared"
    return value if metric.lower_is_better else -value


def compromises(results: Sequence[Result], sweep: SweepConfig) -> list[Result]:
    """The Pareto front: finished trials that no other one beats in one metric without losing in another."""
    points = [(r, [_loss(r, metric) for metric in sweep.metrics]) for r in finished(results, sweep)]
    front = []
    for result, losses in points:
        others = [other for _, other in points if other != losses]
        if not any(all(o <= own for o, own in zip(other, losses, strict=True)) for other in others):
            front.append(result)
    return front


@dataclass(frozen=True, slots=True)
class Importance:
    """How much of the differences between trials goes with one key."""

    key: str
    share: float
    """Share of the variance of the metric's ranks that lies between groups of the key's values, beyond chance."""
    chance: float
    """Share of random orders of the values that explain as much."""
    trials: int
    """Trials that it was computed from."""


def importances(results: Sequence[Result], sweep: SweepConfig) -> list[Importance]:
    """The importance of each key by itself for the first metric, among finished trials; empty below `FEWEST` of them.

    The first-order effect of a functional analysis of variance (Hutter et al. 2014, "An Efficient Approach for
    Assessing Hyperparameter Importance", Sec. 3), estimated without a model: trials are grouped by value, and the
    between-group share of the variance of ranks is corrected for its expectation by chance,
    ε² = 1 - (1 - η²) (n - 1) / (n - k) with n trials and k groups (Kelley 1935, doi 10.1073/pnas.21.9.554).
    It says nothing of keys that matter only together.
    """
    metric, rows = sweep.metrics[0], finished(results, sweep)
    keys = dict.fromkeys(key for r in rows for key in r.record.values)
    found = []
    for key in keys:
        having = [r for r in rows if key in r.record.values]
        groups = _groups([r.record.values[key] for r in having])
        if len(having) < FEWEST or len(set(groups)) < 2:
            continue
        ranks = _ranks([_loss(r, metric) for r in having])
        share = explained(groups, ranks)
        rng, shuffled, better = random.Random(sweep.seed), [*groups], 0
        for _ in range(SHUFFLES):
            rng.shuffle(shuffled)
            better += explained(shuffled, ranks) >= share - 1e-12
        found.append(Importance(key, max(share, 0.0), (better + 1) / (SHUFFLES + 1), len(having)))
    return sorted(found, key=lambda i: -i.share)


def explained(groups: Sequence[int], values: Sequence[float]) -> float:
    """ε² of Kelley; below 0 where groups differ less than by chance."""
    n, mean = len(values), statistics.fmean(values)
    total = sum((v - mean) ** 2 for v in values)
    members: dict[int, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[group].append(value)
    if total == 0 or n <= len(members):
        return 0.0
    within = sum(sum((v - statistics.fmean(m)) ** 2 for v in m) for m in members.values())
    return 1 - (within / total) * (n - 1) / (n - len(members))


def _groups(values: Sequence[JsonValue]) -> list[int]:
    """Equal values together; numbers that mostly differ in `GROUPS` groups by size."""
    shown = [json.dumps(value, sort_keys=True) for value in values]
    different = sorted(set(shown))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(different) <= max(2, len(values) // 2) or len(numbers) < len(values):
        return [different.index(text) for text in shown]
    order = sorted(range(len(values)), key=lambda i: numbers[i])
    groups = [0] * len(values)
    for place, index in enumerate(order):
        groups[index] = place * GROUPS // len(values)
    return groups


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    return [first[value] + (order.count(value) - 1) / 2 for value in values]


def labels(sweep: SweepConfig, config: RunConfig) -> dict[str, str]:
    """Short names of the keys that are varied: of a teacher's weight the teacher's, else the last part where that is
    enough to tell them apart."""
    found = {}
    for key in sweep.keys:
        parts = key.split(".")
        index = int(parts[1]) if len(parts) == 3 and parts[0] == "teachers" and parts[1].isdigit() else -1
        if parts[-1] == "weight" and 0 <= index < len(config.teachers):
            found[key] = config.teachers[index].name
        else:
            found[key] = parts[-1].replace("_", " ")
    names = [*found.values()]
    return {key: name if names.count(name) == 1 else key for key, name in found.items()}


def as_json(
    results: Sequence[Result], sweep: SweepConfig, config: RunConfig, accounting: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """The content of sweep.json; `config` is the run that was varied."""
    best = best_of(results, sweep)
    return {
        "name": config.name,
        "searcher": sweep.searcher,
        "scheduler": sweep.scheduler.kind,
        "metrics": [{"name": m.name, "lower_is_better": m.lower_is_better} for m in sweep.metrics],
        "keys": [*sweep.keys],
        "labels": dict(labels(sweep, config)),
        "space": {key: value.model_dump(mode="json") for key, value in sweep.space.items()},
        "best": best.record.id if best else None,
        "compromises": [r.record.id for r in compromises(results, sweep)],
        "importance": [asdict(importance) for importance in importances(results, sweep)],
        "accounting": dict(accounting),
        "trials": [_trial(result) for result in results],
    }


def _trial(result: Result) -> JsonValue:
    record, outcome = result.record, result.outcome
    return {
        "id": record.id,
        "status": record.status,
        "error": record.error,
        "values": dict(record.values),
        "metrics": dict(outcome.metrics),
        "steps": outcome.steps,
        "samples": outcome.samples,
        "tokens": outcome.tokens,
        "training_seconds": round(outcome.seconds, 3),
        "seconds": record.seconds,
        "taken_from": [[f"{donor:03}", step] for donor, step in record.taken_from],
        "curve": [{"step": e.total_step, **e.values} for e in outcome.curve],
    }


def as_csv(results: Sequence[Result], sweep: SweepConfig) -> str:
    """The content of sweep.csv: a row per trial, its values and metrics in columns."""
    metrics = [*dict.fromkeys([m.name for m in sweep.metrics] + [n for r in results for n in r.outcome.metrics])]
    head = [
        "trial",
        "status",
        *sweep.keys,
        *metrics,
        "steps",
        "samples",
        "tokens",
        "training_seconds",
        "seconds",
        "error",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for result in results:
        record, outcome = result.record, result.outcome
        values = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in record.values.items()}
        writer.writerow(
            {"trial": record.id, "status": record.status, **values, **outcome.metrics, "steps": outcome.steps}
            | {"samples": outcome.samples, "tokens": outcome.tokens, "training_seconds": round(outcome.seconds, 3)}
            | {"seconds": record.seconds, "error": record.error or ""}
        )
    return text.getvalue()
