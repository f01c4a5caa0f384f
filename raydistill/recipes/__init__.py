"""How students learn. A new recipe is a configuration section, a file here and a line in `RECIPES`."""

from __future__ import annotations

from typing import Any

from raydistill.config.base import Config
from raydistill.config.recipes import LmLogitsRecipe
from raydistill.recipes.base import Recipe
from raydistill.recipes.lm_logits import LmLogits

RECIPES: dict[type[Config], type[Recipe[Any]]] = {
    LmLogitsRecipe: LmLogits,
}
