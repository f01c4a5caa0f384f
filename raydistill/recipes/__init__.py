"""How students learn. A new recipe is a configuration section, a file here and a line in `RECIPES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from raydistill.config.base import Config
from raydistill.config.recipes import LmLogitsRecipe, NoisePredictionRecipe, RecipeConfig
from raydistill.config.sources import ImagesSource, SourceConfig
from raydistill.recipes.base import Recipe, TeacherView
from raydistill.recipes.lm_logits import LmLogits
from raydistill.recipes.noise_prediction import NoisePrediction

RECIPES: dict[type[Config], type[Recipe[Any]]] = {
    LmLogitsRecipe: LmLogits,
    NoisePredictionRecipe: NoisePrediction,
}


def make_recipe(
    config: RecipeConfig, student: nn.Module, teachers: Mapping[str, TeacherView], source: SourceConfig
) -> Recipe[Any]:
    """The recipe of a phase. Denoisers that no teacher draws noise for are told by `source` how to draw it."""
    match config, source:
        case NoisePredictionRecipe(), ImagesSource(noise=noise):
            return NoisePrediction(config, student, teachers, noise)
        case _:
            return RECIPES[type(config)](config, student, teachers)
