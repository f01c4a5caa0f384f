"""How students learn. A new recipe is a configuration section, a file here and a line in `RECIPES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from raydistill.config.base import Config
from raydistill.config.recipes import (
    CausalConsistencyRecipe,
    LmLogitsRecipe,
    NoisePredictionRecipe,
    RecipeConfig,
    SelfForcingRecipe,
    TeacherForcingRecipe,
    TrajectoryRecipe,
)
from raydistill.config.sources import ImagesSource, SourceConfig, VideosSource
from raydistill.config.world import FeaturesRecipe
from raydistill.recipes.base import Recipe, TeacherView
from raydistill.recipes.causal_consistency import CausalConsistency
from raydistill.recipes.features import Features
from raydistill.recipes.lm_logits import LmLogits
from raydistill.recipes.noise_prediction import NoisePrediction
from raydistill.recipes.online import Online
from raydistill.recipes.self_forcing import SelfForcing
from raydistill.recipes.teacher_forcing import TeacherForcing
from raydistill.recipes.trajectory import Trajectory

RECIPES: dict[type[Config], type[Recipe[Any]]] = {
    LmLogitsRecipe: LmLogits,
    NoisePredictionRecipe: NoisePrediction,
    TrajectoryRecipe: Trajectory,
    SelfForcingRecipe: SelfForcing,
    CausalConsistencyRecipe: CausalConsistency,
    TeacherForcingRecipe: TeacherForcing,
    FeaturesRecipe: Features,
}


def make_recipe(
    config: RecipeConfig,
    student: nn.Module,
    teachers: Mapping[str, TeacherView],
    source: SourceConfig,
    online: Online | None = None,
) -> Recipe[Any]:
    """The recipe of a phase. Denoisers that no teacher draws noise for are told by `source` how to draw it.

    `online` is the teacher of recipes that ask one while they train.
    """
    match config, source:
        case NoisePredictionRecipe(), ImagesSource(noise=noise) | VideosSource(noise=noise):
            return NoisePrediction(config, student, teachers, noise)
        case SelfForcingRecipe(), _:
            assert online is not None, "self_forcing asks a teacher"
            return SelfForcing(config, student, teachers, online)
        case CausalConsistencyRecipe(), _:
            assert online is not None, "causal_consistency asks a teacher"
            return CausalConsistency(config, student, teachers, online)
        case _:
            return RECIPES[type(config)](config, student, teachers)
