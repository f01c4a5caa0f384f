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
RULES = (
    TrainableRule(match=r".*wrapper.*"),
    TrainableRule(match=r".*shared_core.*", lr_scale=0.3),
    TrainableRule(match=r"mlp\.gate\."),
)


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


def trained(rank: int, ranks: int, stage: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and weights after some steps on four rows that the ranks share."""
    student = share_core(tiny_qwen3_moe(hidden=32), 4).train()
    student.activation_checkpointing_enable()
    optimizer = OptimizerConfig(lr=1e-2, schedule="constant")
    phase = phase_of(stage, optimizer=optimizer)
    groups = parameter_groups(student, RULES, optimizer, where="test")
    engine = Engine(
        NextToken(Config(), student, {}),
        "student",
        groups,
        phase,
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
def test_zero3_on_two_ranks_trains_cores_wrappers_and_routers_like_one_rank() -> None:
    (expected, plain), *_ = run_ranks(trained, 1, (0,), timeout=300)
    both = run_ranks(trained, 2, (3,), timeout=300)
    for losses, weights in both:
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert {kind for name in weights for kind in ("shared_core", "wrapper", "mlp.gate") if kind in name} == {
            "shared_core",
            "wrapper",
            "mlp.gate",
        }
        for name, tensor in weights.items():
            np.testing.assert_allclose(tensor, plain[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert expected[-1] != expected[0]
