"""Mixtures with a shared core under ZeRO-3 on two ranks, against one rank without ZeRO."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from ranks import run_ranks
from regression import draws_of, phase_of, weights_of
from torch.nn import functional as F
from toys import tiny_qwen3_moe

from raydistill.config.base import Config
from raydistill.config.training import OptimizerConfig, TrainableRule
from raydistill.models.shared_core import share_core
from raydistill.recipes.base import Loss, Part, Recipe
from raydistill.signals import Batch, Draws
from raydistill.train.engine import Engine
from raydistill.train.parameters import parameter_groups

STEPS = 3
EXPERTS = (TrainableRule(match=r".*wrapper.*"), TrainableRule(match=r".*shared_core.*", lr_scale=0.3))
EVERYTHING = (*EXPERTS, TrainableRule(match=r".*", lr_scale=0.5))


class NextToken(Recipe[Config]):
    """Cross-entropy of the next token, and the square of the routers' logits, so that both reach the parameters."""

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch["ids"][:, 1:].numel())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        ids = batch["ids"]
        out = self.student(ids, output_router_logits=True, use_cache=False)
        error = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        routers = torch.stack([logits.square().sum() for logits in out.router_logits]).sum()
        return Loss({"ce": Part(error, 1.0, "tokens"), "routers": Part(routers, 0.01, "tokens")})


Result = tuple[list[float], dict[str, np.ndarray]]


def trained(rank: int, ranks: int, stage: int) -> list[Result]:
    """Both stages of the shipped configuration, the first without and the second with recomputed activations."""
    return [steps(rank, ranks, stage, EXPERTS, False), steps(rank, ranks, stage, EVERYTHING, True)]


def steps(rank: int, ranks: int, stage: int, rules: tuple[TrainableRule, ...], recompute: bool) -> Result:
    """Losses and weights after some steps on four rows that the ranks share."""
    student = share_core(tiny_qwen3_moe(hidden=32), 4).train()
    if recompute:
        student.activation_checkpointing_enable()
    optimizer = OptimizerConfig(lr=1e-2, schedule="constant")
    groups = parameter_groups(student, rules, optimizer, where="test")
    engine = Engine(
        NextToken(Config(), student, {}),
        "student",
        groups,
        phase_of(stage, optimizer=optimizer),
        optimizer,
        num_steps=STEPS,
        device=torch.device("cpu"),
    )
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 97, (4, 10), generator=torch.Generator().manual_seed(step))
        rows = list(range(4))[rank::ranks]
        update = engine.update([{"ids": ids[[row]]} for row in rows], [draws_of(step, [row]) for row in rows], step)
        losses.append(update.loss)
    weights = {name: tensor.numpy().copy() for name, tensor in weights_of(engine).items()}
    engine.close()
    return losses, weights


@pytest.mark.slow
def test_zero3_on_two_ranks_trains_a_shared_core_like_one_rank() -> None:
    [plain] = run_ranks(trained, 1, (0,), timeout=300)
    for of_rank in run_ranks(trained, 2, (3,), timeout=300):
        for (losses, weights), (expected, theirs) in zip(of_rank, plain, strict=True):
            assert weights.keys() == theirs.keys()
            np.testing.assert_allclose(losses, expected, rtol=1e-4)
            for name, tensor in weights.items():
                np.testing.assert_allclose(tensor, theirs[name], rtol=1e-3, atol=2e-4, err_msg=name)
    only_new, everything = (set(weights) for _, weights in plain)
    assert all("shared_core" in name or "wrapper" in name for name in only_new)
    assert everything > only_new
