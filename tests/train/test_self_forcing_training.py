"""Student and critic on an engine each: one rank against two, at the ZeRO stages that partition them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from video_toys import causal_student, teacher, tiny_wan, video_batch

from raydistill.config.recipes import GanConfig, SelfForcingRecipe
from raydistill.config.training import BatchConfig, OptimizerConfig, PhaseConfig, ZeroConfig
from raydistill.recipes.self_forcing import SelfForcing
from raydistill.signals import Draws
from raydistill.train.engine import Engine
from raydistill.train.parameters import player_groups

ROWS, STEPS = 4, 6
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="constant", clip_norm=1.0, eps=1e-4)
KINDS = {"scores": None, "heads": GanConfig(weight=0.1, features=("blocks.1",), r1_weight=1.0)}


def losses(
    stage: int,
    kind: str,
    *,
    micro: int,
    rank: int = 0,
    ranks: int = 1,
    checkpointing: bool = False,
    precision: str = "fp32",
) -> list:
    """Player, loss and parts of each of six steps, in which both players come twice or more."""
    how = SelfForcingRecipe(kind="self_forcing", guidance_scale=3.0, critic_updates=2, gan=KINDS[kind])
    student: Any = causal_student(tiny_wan(0))
    if checkpointing:
        student.enable_gradient_checkpointing()
    recipe: Any = SelfForcing(how, student, {}, teacher(tiny_wan(1)))
    phase = PhaseConfig(
        name="p",
        steps=STEPS,
        recipe=how,
        batch=BatchConfig(global_size=ROWS, micro_size=1),
        optimizer={"student": OPTIMIZER, "critic": OPTIMIZER},
        precision=precision,
        zero=ZeroConfig.model_validate({"stage": stage}),
    )
    engines = {
        name: Engine(
            recipe,
            name,
            player_groups(network, network, (), OPTIMIZER, where="test"),
            phase,
            OPTIMIZER,
            num_steps=STEPS,
            device=torch.device("cpu"),
        )
        for name, network in recipe.players().items()
    }
    done = []
    for step in range(STEPS):
        player = recipe.turn(step)
        cuts = [range(i, i + micro) for i in range(0, ROWS, micro)][rank::ranks]
        batch: dict[str, Tensor] = video_batch(ROWS, seed=step)
        update = engines[player].update(
            [{k: v[list(cut)] for k, v in batch.items()} for cut in cuts],
            [Draws(seed=0, phase="p", step=step, positions=tuple(cut)) for cut in cuts],
            step,
        )
        done.append((player, update.loss, update.grad_norm, dict(update.parts)))
    for engine in engines.values():
        engine.close()
    return done


def on_two_ranks(rank: int, ranks: int) -> dict[str, list]:
    return {
        f"{kind} {stage}": losses(stage, kind, micro=1, rank=rank, ranks=ranks, checkpointing=kind == "scores")
        for kind in KINDS
        for stage in (2, 3)
    }


def require_same(found: list, wanted: list) -> None:
    assert [step[0] for step in found] == [step[0] for step in wanted]
    for (_, loss, norm, parts), (_, other, other_norm, other_parts) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(other, rel=1e-5, abs=1e-7)
        assert norm == pytest.approx(other_norm, rel=1e-3)
        assert parts == pytest.approx(other_parts, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    return {kind: losses(0, kind, micro=ROWS) for kind in KINDS}


def test_losses_do_not_depend_on_the_micro_batches(alone: dict[str, list]) -> None:
    assert {"student", "critic"} == {player for player, *_ in alone["scores"]}
    require_same(losses(0, "scores", micro=2), alone["scores"])


def test_partitioned_and_in_bf16_both_players_stay_near_their_losses_in_fp32(alone: dict[str, list]) -> None:
    found = losses(3, "heads", micro=2, precision="bf16")
    for (player, loss, _, parts), (other, wanted, _, exact) in zip(found, alone["heads"], strict=True):
        assert player == other
        assert loss == pytest.approx(wanted, rel=0.1)
        assert parts.keys() == exact.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_have_the_losses_of_one_process(alone: dict[str, list], kind: str, stage: int) -> None:
    for found in two_ranks():
        require_same(found[f"{kind} {stage}"], alone[kind])


_found: list[list[dict[str, list]]] = []


def two_ranks() -> list[dict[str, list]]:
    """All that two ranks find, from one start of two processes."""
    if not _found:
        _found.append(run_ranks(on_two_ranks, 2, timeout=500))
    return _found[0]
