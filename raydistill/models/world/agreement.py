"""Whether source, teachers and student of a run speak of the same frames and actions."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.config.schema import RunConfig
from raydistill.config.world import (
    AttentionRule,
    FeatureRule,
    FeaturesRecipe,
    RolloutTeacher,
    WorldModel,
    WorldSizes,
    WorldTeacher,
)
from raydistill.errors import ConfigError
from raydistill.models.taps import Taps
from raydistill.models.world.files import world_sizes
from raydistill.models.world.model import empty_world


def check_worlds(config: RunConfig) -> None:
    """Raise `ConfigError` unless every model of the reference family fits the source; others are asked when they load.

    Frames must be of one size. Actions of the source must be known to every model, and the ones that a teacher's
    rollouts sample must be known to the student. The student must have the modules whose features are matched, which
    would otherwise be found out when the teachers have been asked.
    """
    source, student = config.episodes, config.student.model
    assert isinstance(student, WorldModel), "the configuration lets episodes be learnt by world models alone"
    models = {"student.model": student}
    for index, teacher in enumerate(config.teachers):
        assert isinstance(teacher, WorldTeacher), "the configuration lets world models learn from these alone"
        if isinstance(teacher.model, WorldModel):
            models[f"teachers.{index}.model"] = teacher.model
    own = world_sizes(student)
    _check_modules(config, own)
    for key, model in models.items():
        sizes = world_sizes(model)
        if tuple(sizes.frame_size) != tuple(source.frame_size) or sizes.channels != 3:
            raise ConfigError(
                f"{key}: wanted frames of source.frame_size {list(source.frame_size)} in 3 colours, found "
                f"{list(sizes.frame_size)} in {sizes.channels}; set one to the other."
            )
        if sizes.num_actions < source.num_actions:
            raise ConfigError(
                f"{key}: wanted a model that knows the {source.num_actions} actions of the source, found "
                f"{sizes.num_actions}; raise sizes.num_actions or lower source.num_actions."
            )
        if (
            model is not student
            and sizes.num_actions > own.num_actions
            and any(isinstance(t, RolloutTeacher) and t.model == model for t in config.teachers)
        ):
            raise ConfigError(
                f"{key}: its rollouts sample {sizes.num_actions} actions, found a student that knows "
                f"{own.num_actions}; raise student.model.sizes.num_actions."
            )
        if sizes.context < source.clip_frames - 1:
            print(
                f"{key}: sees {sizes.context} frames of the {source.clip_frames - 1} before the last of a clip",
                flush=True,
            )


def _check_modules(config: RunConfig, sizes: WorldSizes) -> None:
    network = empty_world(sizes)
    for index, phase in enumerate(config.phases):
        if isinstance(phase.recipe, FeaturesRecipe):
            rules: dict[str, Sequence[FeatureRule | AttentionRule]] = {
                "features": phase.recipe.features,
                "attention": phase.recipe.attention,
            }
            for word, group in rules.items():
                paths = {str(number): rule.student for number, rule in enumerate(group)}
                Taps(network, paths, where=f"phases.{index}.recipe.{word}")
