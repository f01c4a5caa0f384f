"""What the stages of a run cost: the time of the GPUs that they held, and its price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from raydistill.cache.ledger import Build
from raydistill.config.accelerators import without_price
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ENCODED

Facts = dict[str, JsonValue]
"""What is known of a stage."""
BY_STUDENTS = ("train", "evaluate")
"""Stages that run on `resources.train`; all others run on `resources.teacher`."""


def builds_on_gpus(config: RunConfig, stage: str) -> bool:
    """Whether `stage` builds caches with models that run on GPUs; the caches note what that took."""
    models = stage == "signals" or (stage == "inputs" and isinstance(config.source, ENCODED))
    return models and config.resources.teacher.gpus > 0


def gpu_seconds(config: RunConfig, stage: str, seconds: float, builds: Sequence[Build] | None) -> tuple[float, bool]:
    """Seconds of all the GPUs that `stage` held while it ran for `seconds`, and whether they were just so many.

    `builds` are those that the stage finished, None when it was stopped. Of a pool that grows the most are counted, and
    so they are of a build that was stopped, which has no note of what it did.
    """
    train, teacher = config.resources.train, config.resources.teacher
    if stage == "train":
        fewest, most = (train.workers, train.workers) if isinstance(train.workers, int) else train.workers
        return seconds * train.gpus * most, fewest == most or train.gpus == 0
    if stage == "evaluate":  # one worker's share: `on_train_hardware`
        return seconds * train.gpus, True
    if stage == "verify":  # one actor's: `on_teacher_hardware`
        return seconds * teacher.gpus, True
    if not builds_on_gpus(config, stage):
        return 0.0, True
    if builds is None:
        return seconds * teacher.gpus * teacher.actors[1], False
    held = [(build, min(build.actors[1], max(1, len(build.shards)))) for build in builds]
    exact = all(build.actors[0] >= actors for build, actors in held)
    return teacher.gpus * sum(build.seconds * actors for build, actors in held), exact


def priced(config: RunConfig, stage: str, facts: Facts) -> Facts:
    """`facts` with the money that their GPUs cost, or the name of those GPUs where only others have a price."""
    plan, used = config.plan, facts.get("gpu_seconds")
    if plan.price_per_hour is None or not isinstance(used, float | int):
        return facts
    share = config.resources.train if stage in BY_STUDENTS else config.resources.teacher
    kind = share.accelerator or plan.accelerator
    price = plan.price_of(kind)
    return {**facts, "unpriced": kind} if price is None else {**facts, "price": round(used / 3600 * price, 2)}


def in_words(costs: Sequence[Mapping[str, JsonValue]]) -> str:
    """What all stages cost together, none where no stage held a GPU; `costs` are their `priced` facts."""
    used, money = _sum(costs, "gpu_seconds"), _sum(costs, "price")
    if not used:
        return ""
    most = "at most " if any("gpu_at_most" in cost for cost in costs) else ""
    price = f"{money:,.2f} at the given prices" if money else ""
    left_out = without_price(sorted({str(cost["unpriced"]) for cost in costs if "unpriced" in cost}))
    return ", ".join(filter(None, (f"GPU time: {most}{used / 3600:,.2f} h", price, left_out)))


def _sum(costs: Sequence[Mapping[str, JsonValue]], key: str) -> float:
    return sum(value for cost in costs if isinstance(value := cost.get(key), float | int))
