"""The export of a world model: its sizes and weights, and a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from raydistill.config.recipes import RecipeConfig
from raydistill.config.schema import RunConfig
from raydistill.config.world import EpisodesSource, FeaturesRecipe
from raydistill.export.card import columns, lines_of, phase_line, rendered, shown, table, versions
from raydistill.models.student import export_student
from raydistill.models.world.model import WorldNetwork
from raydistill.signals import JsonValue

LINES = {
    "change_cosine": "cosine of the predicted change, to the teacher",
    "true_change_cosine": "cosine of the predicted change, to the truth",
    "raw_cosine": "raw cosine, to the teacher",
    "feature_similarity": "feature similarity",
    "obedience": "action obedience",
    "action_effect": "effect of swapped actions",
    "diversity": "diversity",
    "parameters": "parameters",
    "frames_per_second": "frames per second at batch 1",
    "peak_memory_bytes": "working memory in bytes at batch 1",
}
PACKAGES = ("raydistill", "torch", "deepspeed", "ray")
CARD = """\
---
library_name: raydistill
tags:
- distillation
- world-model
- raydistill
---

# {{ name }}

An action-conditioned world model, {{ origin }} with raydistill.

```python
from pathlib import Path

import torch
from raydistill.models.world.files import load_world_folder

world = load_world_folder(Path("path/to/this/folder"), dtype=torch.float32)
frames = world.rollout(first_frames, actions)   # [B, T, 3, H, W] in [0, 1], [B, T - 1 + S] -> [B, S, 3, H, W]
```

`python -m raydistill.evaluate.play FOLDER --start FRAMES --actions 1112233` writes a GIF.
{% if teachers %}

## Teachers

{% for teacher in teachers %}
* {{ teacher }}
{% endfor %}
{% endif %}

## Data

{{ data }}

## Settings

{% for phase in phases %}
* phase {{ phase }}
{% endfor %}
* seed {{ seed }}

## Measured on held-out episodes

{{ table }}

Speeds are of one machine and tell how the models relate.

## Limits

The model knows the game that it was trained on alone{% if teachers %}, with the faults of its teachers{% endif %}.
The licence of the data applies.

## Versions

{{ versions }}
"""


def write_worlds(config: RunConfig, student: nn.Module, folder: Path) -> None:
    """Write the world model into `folder`, in the number format of `student.model.dtype`."""
    export_student(cast(WorldNetwork, student), folder, dtype=getattr(torch, config.student.model.dtype))


def world_card(config: RunConfig, metrics: Mapping[str, JsonValue]) -> str:
    """README.md of the export: teachers, data, settings, measured numbers, versions."""
    roles = columns(config)
    lines = dict(lines_of(metrics, roles))
    teachers = [
        f"`{t.name}`: `{shown(getattr(t.model, 'source', None) or 'sizes')}`, signal {t.signal}, weight {t.weight:g}"
        for t in config.teachers
    ]
    return rendered(
        CARD,
        name=config.name,
        origin="distilled" if teachers else "trained",
        teachers=teachers,
        data=_data(config),
        phases=[phase_line(p, _recipe(p.recipe), "clips") for p in config.phases],
        seed=config.seed,
        table=table("", LINES, lines, roles) if lines else "Nothing was measured.",
        versions=versions(PACKAGES),
    )


def _data(config: RunConfig) -> str:
    source = config.episodes
    what = "; ".join(_told(part) for part in source.parts.values())
    return (
        f"{what}: clips of {source.clip_frames} frames of {source.frame_size[0]} × {source.frame_size[1]} with "
        f"{source.num_actions} actions; {100 * config.evaluate.held_out:g} % of the episodes were held out."
    )


def _told(part: EpisodesSource) -> str:
    game = part.environment
    if game is not None:
        return f"{game.episodes} episodes of `{game.id}` of up to {game.steps} steps"
    return ", ".join(f"`{shown(path)}`" for path in part.paths)


def _recipe(recipe: RecipeConfig) -> str:
    assert isinstance(recipe, FeaturesRecipe), "the configuration trains world models with this recipe alone"
    if not recipe.uses_teacher:
        return "learning from the episodes alone"
    return f"features with alpha {recipe.alpha:g}, temperature {recipe.temperature:g}, from {recipe.learn_from}"
