"""The recipe `features` on engines: two ranks against one, at the ZeRO stages that partition a student and its maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from world_toys import TEACHER, small_world, teacher_section

from raydistill.config.training import BatchConfig, OptimizerConfig, PhaseConfig, ZeroConfig
from raydistill.config.world import FeaturesRecipe, FeaturesTeacher
from raydistill.models.world import random_world
from raydistill.recipes.base import TeacherView
from raydistill.recipes.features import Features
from raydistill.signals import Draws
from raydistill.teachers.world import Features as Asked
from raydistill.train.engine import Engine
from raydistill.train.parameters import player_groups

ROWS, FRAMES, STEPS = 4, 5, 5
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="constant", clip_norm=1.0, eps=1e-4)
RECIPE: dict[str, Any] = {
    "kind": "features", "alpha": 0.6, "temperature": 2.0, "next_codes": 0.3, "codes": 0.2, "reconstruction": 0.5,
    "smoothness": 0.2, "action": 0.1,
    "features": [
        {"student": "dynamics.blocks.0", "teacher": ["block"]},
        {"student": "encoder.latents", "teacher": ["latents"]},
    ],
    "attention": [
        {"student": "dynamics.blocks.0.spatial.map", "teacher": ["space"]},
        {"student": "dynamics.blocks.1.temporal.map", "teacher": ["time"]},
    ],
}  # fmt: skip


def batches(teacher: Asked, step: int) -> dict[str, Tensor]:
    """Clips with a teacher's signal; two of them end early, so that ranks have unequal numbers of valid steps."""
    g = torch.Generator().manual_seed(step)
    valid = torch.ones(ROWS, FRAMES - 1, dtype=torch.bool)
    valid[0, 1:] = False
    valid[3, 3:] = False
    clips = {
        "frames": torch.randint(0, 256, (ROWS, FRAMES, 3, 12, 12), generator=g, dtype=torch.uint8),
        "actions": torch.randint(0, 5, (ROWS, FRAMES - 1), generator=g),
        "valid": valid,
    }
    return {**clips, **{f"big/{name}": values for name, values in teacher(clips).items()}}


def losses(
    stage: int, *, micro: int, rank: int = 0, ranks: int = 1, checkpointing: bool = False, **changes: float
) -> list:
    """Norm of the gradient and parts of the loss at each step."""
    how = FeaturesRecipe.model_validate({**RECIPE, **changes})
    student = small_world()
    student.dynamics.recompute = checkpointing
    section = FeaturesTeacher.model_validate(teacher_section(Path("/nowhere")))
    teacher = Asked(section, random_world(TEACHER, seed=1), FRAMES)
    recipe: Any = Features(how, student, {"big": TeacherView("big", 1.0, teacher.facts)})
    phase = PhaseConfig(
        name="p",
        steps=STEPS,
        recipe=how,
        batch=BatchConfig(global_size=ROWS, micro_size=1),
        optimizer={"student": OPTIMIZER},
        precision="fp32",
        zero=ZeroConfig.model_validate({"stage": stage}),
    )
    network = recipe.players()["student"]
    groups = player_groups(network, student, (), OPTIMIZER, where="test")
    assert any("maps" in name for name, _ in network.named_parameters())
    engine = Engine(
        recipe, "student", groups, phase, OPTIMIZER, num_steps=STEPS, device=torch.device("cpu")
    )  # fmt: skip
    done: list = []
    for step in range(STEPS):
        batch = batches(teacher, step)
        cuts = [range(i, i + micro) for i in range(0, ROWS, micro)][rank::ranks]
        update = engine.update(
            [{k: v[list(cut)] for k, v in batch.items()} for cut in cuts],
            [Draws(seed=0, phase="p", step=step, positions=tuple(cut)) for cut in cuts],
            step,
        )
        done.append((update.grad_norm, dict(update.parts)))
    engine.close()
    return done


def on_two_ranks(rank: int, ranks: int) -> dict[int, list]:
    return {stage: losses(stage, micro=1, rank=rank, ranks=ranks, checkpointing=stage == 3) for stage in (2, 3)}


def require_same(found: list, wanted: list) -> None:
    for (norm, parts), (other, other_parts) in zip(found, wanted, strict=True):
        assert parts == pytest.approx(other_parts, rel=1e-5, abs=1e-7)
        assert norm == pytest.approx(other, rel=1e-3)


def test_losses_of_features_do_not_depend_on_the_micro_batches() -> None:
    alone = losses(0, micro=ROWS, reconstruction=0.0)  # whose even use of codes is a statistic of a micro-batch
    names = set(alone[0][1])
    assert {"feature/big.block", "feature/big.latents", "attention/big.time", "kl/big", "action/probe"} <= names
    assert alone[-1][1] != alone[0][1]
    require_same(losses(0, micro=1, reconstruction=0.0), alone)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_process_with_the_maps_that_they_train() -> None:
    alone = losses(0, micro=1)
    assert "usage" in alone[0][1]
    for found in run_ranks(on_two_ranks, 2, timeout=500):
        for stage in (2, 3):
            require_same(found[stage], alone)


def test_partitioned_a_world_model_has_the_losses_of_the_whole_one() -> None:
    require_same(losses(3, micro=2), losses(0, micro=2))
