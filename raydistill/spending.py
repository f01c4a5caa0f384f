"""What the stages of a run cost: the time of the GPUs that they held, and its price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from raydistill.cache.ledger import Build
from raydistill.config.accelerators import without_price
from raydistill.config.answering import actors_beside
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ENCODED

Facts = dict[str, JsonValue]
"""What is known of a stage."""


@dataclass(frozen=True, slots=True)
class Held:
    """Seconds of GPUs."""

    students: float = 0.0
    """Of `resources.train`."""
    teachers: float = 0.0
    """Of `resources.teacher`."""
    exact: bool = True
    """Whether no less can have been held."""


def builds_on_gpus(config: RunConfig, stage: str) -> bool:
    """Whether `stage` builds caches with models that run on GPUs; the caches note what that took."""
    models = stage == "signals" or (stage == "inputs" and isinstance(config.source, ENCODED))
    return models and config.resources.teacher.gpus > 0


def held(config: RunConfig, stage: str, seconds: float, builds: Sequence[Build] | None) -> Held:
    """The GPUs that `stage` held while it ran for `seconds`.

    `builds` are those that the stage finished, None when it was stopped. Counted are the most that it can have held: of
    a pool that grows, of one that was waiting for its nodes when it was stopped, and while a source is read before its
    models encode it. Evaluations that run beside a training are not counted.
    """
    train, teacher = config.resources.train, config.resources.teacher
    stopped = builds is None
    match stage:
        case "train":
            fewest, most = (train.workers, train.workers) if isinstance(train.workers, int) else train.workers
            teachers = seconds * teacher.gpus * actors_beside(config)
            return Held(seconds * train.gpus * most, teachers, exact=not stopped and fewest == most)
        case "init" | "evaluate":  # one worker's share: `on_train_hardware`
            return Held(students=seconds * train.gpus, exact=not stopped)
        case "verify":  # one actor's: `on_teacher_hardware`
            return Held(teachers=seconds * teacher.gpus, exact=not stopped)
    if not builds_on_gpus(config, stage):
        return Held()
    if builds is None:
        return Held(teachers=seconds * teacher.gpus * teacher.actors[1], exact=False)
    pools = [(build, min(build.actors[1], max(1, len(build.shards)))) for build in builds]
    exact = stage == "signals" and all(build.actors[0] >= actors for build, actors in pools)
    return Held(teachers=teacher.gpus * sum(build.seconds * actors for build, actors in pools), exact=exact)


def priced(config: RunConfig, facts: Facts) -> Facts:
    """`facts` of a stage with what its GPUs cost, and the names of those whose price is not given where others' are."""
    plan, resources = config.plan, config.resources
    if plan.price_per_hour is None or "gpu_seconds" not in facts:
        return facts
    teachers = _number(facts, "teacher_gpu_seconds")
    parts = {resources.train.accelerator: _number(facts, "gpu_seconds") - teachers}
    parts[resources.teacher.accelerator] = parts.get(resources.teacher.accelerator, 0.0) + teachers
    money, unpriced = [], []
    for kind, used in parts.items():
        price = plan.price_of(kind or plan.accelerator)
        if used > 0 and price is None:
            unpriced.append(kind or plan.accelerator)
        elif used > 0 and price is not None:
            money.append(used / 3600 * price)
    found = dict(facts)
    if money:
        found["price"] = round(sum(money), 2)
    if unpriced:
        found["unpriced"] = [*unpriced]
    return found


def in_words(costs: Sequence[Facts]) -> str:
    """What all stages cost together, none where no stage held a GPU; `costs` are their `priced` facts."""
    used, money = (sum(_number(cost, key) for cost in costs) for key in ("gpu_seconds", "price"))
    if not used:
        return ""
    most = "at most " if any("gpu_at_most" in cost for cost in costs) else ""
    price = f"{most}{money:,.2f} at the given prices" if money else ""
    left_out = without_price(sorted({str(name) for cost in costs for name in _list(cost, "unpriced")}))
    return ", ".join(filter(None, (f"GPU time: {most}{used / 3600:,.2f} h", price, left_out)))


def _number(facts: Facts, key: str) -> float:
    found = facts.get(key, 0.0)
    assert isinstance(found, float | int)
    return found


def _list(facts: Facts, key: str) -> list[JsonValue]:
    found = facts.get(key, [])
    assert isinstance(found, list)
    return found
