"""Student beside teacher: the `comparison` section of metrics.json, with the same keys for every kind of model.

* `quality_metric`, `lower_is_better`: the metric that ranks the models (`perplexity` of a language model, an error of a
  denoiser, …) and its direction;
* `teacher_quality`, `student_init_quality`, `student_ce_quality`, `student_quality`: its values for the teacher and for
  the student before training, trained without a teacher, and distilled (its moving average where that is exported);
* `gap_closed`: the share of the way from the untrained student to the teacher that the distilled student has gone
  (0 none, 1 all, more: better than the teacher); `baseline_gap_closed`: the same for training without a teacher;
* `better_than_init`, `better_than_baseline`: whether the distilled student wins;
* `parameters_ratio`, `bytes_ratio`, `speed_ratio`: student over teacher.

What was not measured is null. Metrics that are exponentials of a mean (perplexity) are compared by their logarithm,
because a difference of cross-entropies is a number of nats wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raydistill.signals import JsonValue

ROLES = ("teacher", "student_init", "student_ce", "student")
"""Who is measured, in the order in which tables show them."""

Line = Mapping[str, JsonValue]
"""The metrics of one model by name, in plain units."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The one metric that ranks the models of a kind."""

    metric: str
    lower_is_better: bool = True
    logarithmic: bool = False
    """Measure distances between logarithms: for metrics that are the exponential of a mean."""


LANGUAGE = Quality("perplexity", lower_is_better=True, logarithmic=True)


def compare(lines: Mapping[str, Line], quality: Quality, *, exported: str = "student") -> dict[str, JsonValue]:
    """The `comparison` of the models in `lines` (keys of `ROLES`; any may be missing).

    The role `exported` stands for the student: `student_ema` where the run leaves the moving average to others.
    """
    lines = {**lines, "student": lines[exported]} if exported in lines else lines
    values = {role: _number(lines.get(role, {}), quality.metric) for role in ROLES}
    student = values["student"]
    return {
        "quality_metric": quality.metric,
        "lower_is_better": quality.lower_is_better,
        **{f"{role}_quality": values[role] for role in ROLES},
        "gap_closed": _gap_closed(student, values, quality),
        "baseline_gap_closed": _gap_closed(values["student_ce"], values, quality),
        "better_than_init": _is_better(student, values["student_init"], quality),
        "better_than_baseline": _is_better(student, values["student_ce"], quality),
        "parameters_ratio": _ratio(lines, "parameters"),
        "bytes_ratio": _ratio(lines, "bytes"),
        "speed_ratio": _ratio(lines, "tokens_per_second") or _ratio(lines, "samples_per_second"),
    }


def _number(line: Line, name: str) -> float | None:
    value = line.get(name)
    if value is None or isinstance(value, str | list | dict):
        return None
    return float(value) if math.isfinite(value) else None


def _ratio(lines: Mapping[str, Line], name: str) -> float | None:
    above, below = (_number(lines.get(role, {}), name) for role in ("student", "teacher"))
    return above / below if above is not None and below else None


def _gap_closed(value: float | None, values: Mapping[str, float | None], quality: Quality) -> float | None:
    start, goal = values["student_init"], values["teacher"]
    if value is None or start is None or goal is None:
        return None
    if quality.logarithmic:
        value, start, goal = math.log(value), math.log(start), math.log(goal)
    return (start - value) / (start - goal) if start != goal else None


def _is_better(value: float | None, other: float | None, quality: Quality) -> bool | None:
    if value is None or other is None:
        return None
    return value < other if quality.lower_is_better else value > other
