"""What a sweep cost, and what it would have cost with teachers that run beside every student.

By the cost model: floating-point operations, from `plan`. Measured: seconds, from build.json of the caches and from the
logs of the trials. The teachers' runs are counted from build.json, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from raydistill.cache.ledger import read_builds
from raydistill.config.schema import RunConfig
from raydistill.pipeline import Run
from raydistill.plan import ImagePlan, Plan, WorldPlan, plan
from raydistill.search.results import Result

UNITS = {"text": "token", "episodes": "clip"}
"""What teachers and students are counted in, by the kind of the source; draws of noise otherwise."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one configuration costs per unit (a token, a draw of noise, a clip); None where it is not known."""

    teachers: float | None
    """FLOP of all teachers' forward passes on one unit."""
    cached: float | None
    """Units in the cache."""
    students: tuple[float | None, ...]
    """FLOP of a training step on one unit, by phase."""
    units: tuple[float | None, ...]
    """Units of one optimizer step, by phase."""


def work_of(config: RunConfig) -> Work:
    """The cost model of a configuration whose paths are resolved."""
    found = plan(config)
    if isinstance(found, Plan):
        per_unit = [t.flops_per_token for t in found.teachers]
        students = tuple(p.flops_per_token for p in found.phases)
        totals = [(p.tokens, p.steps) for p in found.phases]
        cached = None if found.inputs is None else float(found.inputs.tokens)
    elif isinstance(found, WorldPlan):
        per_unit = [t.flops_per_clip for t in found.teachers]
        students = tuple(p.flops_per_clip for p in found.phases)
        totals = [(p.clips, p.steps) for p in found.phases]
        cached = None if found.clips is None else float(found.clips)
    else:
        assert isinstance(found, ImagePlan), "there are three kinds of plan"
        per_unit = [t.flops_per_draw for t in found.teachers]
        students = tuple(p.flops_per_draw for p in found.phases)
        totals = [(p.draws, p.steps) for p in found.phases]
        cached = None if found.inputs is None else float(found.inputs.rows * found.draws_per_row)
    units = tuple(total / steps if total is not None and steps else None for total, steps in totals)
    return Work(_sum(per_unit), cached, students, units)


def account(
    runs: Sequence[Run], results: Sequence[Result], configs: Mapping[int, RunConfig], *, began: float
) -> dict[str, JsonValue]:
    """The section `accounting` of sweep.json.

    `runs` are the one that is varied and those whose caches were built besides, `configs` those of the trials by
    number, and `began` is when the first trial was made, in seconds since the epoch.
    """
    known: dict[str, Work] = {}

    def work(config: RunConfig) -> Work:
        # What a trial learns from and how fast changes nothing of what a step costs.
        phases = tuple(p.model_copy(update={"recipe": None, "optimizer": {}}) for p in config.phases)
        key = repr(config.model_copy(update={"name": "", "run_dir": "", "phases": phases}))
        known[key] = known.get(key) or work_of(config)
        return known[key]

    stores = {store.uri: store for run in runs for store, _ in run.signals.values()}
    builds = [build for store in stores.values() for build in read_builds(store)]
    teacher_seconds = sum(build.seconds for build in builds)
    cached_units = _sum([work(run.config).cached for run in runs])
    cached = _sum([_product(work(run.config).teachers, work(run.config).cached) for run in runs])
    trials = [(work(configs[r.record.number]), configs[r.record.number], r) for r in results]
    student = _sum([_student_flops(costs, result) for costs, _, result in trials])
    online_teacher = _sum([_product(w.teachers, _online_units(w, config, result)) for w, config, result in trials])
    units = _sum([_online_units(costs, config, result) for costs, config, result in trials])
    per_unit = teacher_seconds / cached_units if cached_units and teacher_seconds else None
    return {
        "unit": UNITS.get(runs[0].config.source.kind, "draw"),
        "trials": len(results),
        "teacher_builds": len(builds),
        "teacher_shards": sum(len(build.shards) for build in builds),
        "teacher_shards_after_first_trial": sum(len(b.shards) for b in builds if b.started > began),
        "cached_units": cached_units,
        "trained_units": units,
        "flops": _compared(cached, student, online_teacher),
        "seconds": _compared(
            teacher_seconds or None, sum(r.outcome.seconds for r in results), _product(units, per_unit)
        ),
    }


def _compared(teacher: float | None, students: float | None, online_teacher: float | None) -> JsonValue:
    """Teachers once and students, against teachers beside every student."""
    with_cache, online = _sum([teacher, students]), _sum([online_teacher, students])
    return {
        "teachers": teacher,
        "students": students,
        "with_cache": with_cache,
        "online_teachers": online_teacher,
        "online": online,
        "saved": online / with_cache if online is not None and with_cache else None,
    }


def _student_flops(work: Work, result: Result) -> float | None:
    parts = zip(work.students, work.units, result.outcome.phase_steps, strict=True)
    return _sum([_product(flops, units, float(steps)) for flops, units, steps in parts])


def _online_units(work: Work, config: RunConfig, result: Result) -> float | None:
    """Units that the trial trained on in phases with a teacher."""
    parts = zip(config.phases, work.units, result.outcome.phase_steps, strict=True)
    return _sum([_product(units, float(steps)) for phase, units, steps in parts if phase.recipe.uses_teacher])


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _product(*values: float | None) -> float | None:
    result = 1.0
    for value in values:
        if value is None:
            return None
        result *= value
    return result
