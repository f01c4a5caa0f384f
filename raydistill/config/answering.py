"""Teachers that answer the training workers from actors of their own, which stand beside those workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydistill.config.recipes import CausalConsistencyRecipe, SelfForcingRecipe
from raydistill.config.world import FeaturesTeacher

if TYPE_CHECKING:
    from raydistill.config.schema import ResourcesConfig, RunConfig
    from raydistill.config.training import PhaseConfig


def pool_size(resources: ResourcesConfig) -> int:
    """Actors of one teacher: one for each worker, within the bounds of `resources.teacher.actors`."""
    workers = resources.train.workers
    low, high = resources.teacher.actors
    return min(high, max(low, 1, workers if isinstance(workers, int) else workers[1]))


def actors_beside(config: RunConfig) -> int:
    """Most actors that stand beside the training workers at one time."""
    return pool_size(config.resources) * max((_pools(config, phase) for phase in config.phases), default=0)


def _pools(config: RunConfig, phase: PhaseConfig) -> int:
    if isinstance(phase.recipe, SelfForcingRecipe | CausalConsistencyRecipe):
        return int(phase.recipe.online == "actors")
    if not phase.recipe.uses_teacher:
        return 0
    return sum(isinstance(t, FeaturesTeacher) and t.online == "actors" and t.weight > 0 for t in config.teachers)
