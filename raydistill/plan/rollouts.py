"""What a training step of a student of few steps costs, in forward passes of the networks that take part.

F is the forward pass of the student and R that of the teacher, over all frames of a sample; a step with gradients costs
3 of them, with gradient checkpointing 4. That chunks see only those before them is left out: an upper bound.
"""

from __future__ import annotations

from raydistill.config.recipes import (
    CausalConsistencyRecipe,
    RecipeConfig,
    SelfForcingRecipe,
    TeacherForcingRecipe,
    TrajectoryRecipe,
)
from raydistill.config.schema import RunConfig
from raydistill.models.denoiser_counts import DenoiserCounts


def training_flops(
    recipe: RecipeConfig, config: RunConfig, student: DenoiserCounts, teacher: DenoiserCounts | None
) -> float:
    """FLOP of a training step per sample, in the mean over the turns of all players; `teacher` is the one that is asked
    online (None: as dear as the student)."""
    own = student.training(recompute=config.student.gradient_checkpointing)
    asked = teacher or student
    match recipe:
        case TrajectoryRecipe():
            return 2 * own if recipe.causal and recipe.context == "clean" else own
        case TeacherForcingRecipe():
            return 2 * own
        case CausalConsistencyRecipe():
            return 2 * own + student.forward + _passes(recipe.guidance_scale) * asked.forward
        case SelfForcingRecipe():
            return _self_forcing(recipe, config, student, asked, own)
        case _:
            return own


def answered_flops(recipe: RecipeConfig, student: DenoiserCounts, teacher: DenoiserCounts | None) -> float:
    """The part of `training_flops` that actors of the teacher do; 0 where it is asked in the training workers."""
    asked = teacher or student
    match recipe:
        case CausalConsistencyRecipe(online="actors"):
            return _passes(recipe.guidance_scale) * asked.forward
        case SelfForcingRecipe(online="actors"):
            return _passes(recipe.guidance_scale) * asked.forward / (1 + recipe.critic_updates)
        case _:
            return 0.0


def _self_forcing(
    recipe: SelfForcingRecipe, config: RunConfig, student: DenoiserCounts, real: DenoiserCounts, own: float
) -> float:
    """A rollout takes (K + 1) / 2 steps in the mean, since where it ends is drawn, and one more pass for its context.

    The student's turn: the last of its steps with gradients, the real score (twice with guidance) and the critic. The
    critic's turn: a rollout without gradients, and a training step of its own, which costs as the real score's would.
    """
    assert config.student.generator is not None, "checked with the configuration"
    steps = (len(config.student.generator.t_list) - 1 + 1) / 2
    rollout = (steps + 1) * student.forward
    student_turn = rollout - student.forward + own + (_passes(recipe.guidance_scale) + 1) * real.forward
    critic_turn = rollout + 3 * real.forward
    return (student_turn + recipe.critic_updates * critic_turn) / (1 + recipe.critic_updates)


def _passes(guidance_scale: float) -> int:
    return 1 if guidance_scale == 1 else 2


def players_beside(recipe: RecipeConfig, asked: DenoiserCounts) -> tuple[int, int]:
    """Numbers held beside the student while it trains, in all and trained: a critic, and a teacher in the worker."""
    match recipe:
        case SelfForcingRecipe():
            there = asked.parameters if recipe.online == "local" else 0
            return asked.parameters + there, asked.parameters
        case CausalConsistencyRecipe():
            return (asked.parameters if recipe.online == "local" else 0), 0
        case _:
            return 0, 0
