"""A small regression: a recipe without data files, and the same training with plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raydistill.config.base import Config
from raydistill.config.training import (
    BatchConfig,
    EmaConfig,
    OptimizerConfig,
    PhaseConfig,
    TrainableRule,
    ZeroConfig,
)
from raydistill.recipes.base import Loss, Part, Recipe
from raydistill.signals import Batch, Draws
from raydistill.train.engine import Engine
from raydistill.train.masters import assembled
from raydistill.train.parameters import parameter_groups

ROWS = 8
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="constant", clip_norm=0.5)


class Regression(Recipe[Config]):
    """Squared error of a network; the noise of each row comes from its position in the global batch."""

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"rows": float(batch["weight"].sum())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        dtype = next(self.student.parameters()).dtype
        x = batch["x"] + 0.1 * rng.normal("noise", (batch["x"].shape[1],))
        error = (self.student(x.to(dtype)).float() - batch["y"]).square().sum(-1) * batch["weight"]
        return Loss({"mse": Part(error.sum(), 1.0, "rows"), "largest": Part(error.detach().max(), 0.0)})


class Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(9, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embed.weight


def network() -> nn.Sequential:
    """Always the same network: 6 → 9 → 3."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def batch_of(step: int) -> dict[str, Tensor]:
    """The global batch of a step: ROWS rows, one of which does not count."""
    g = torch.Generator().manual_seed(step)
    weight = torch.ones(ROWS)
    weight[step % ROWS] = 0
    return {"x": torch.randn(ROWS, 6, generator=g), "y": torch.randn(ROWS, 3, generator=g), "weight": weight}


def draws_of(step: int, positions: Sequence[int]) -> Draws:
    return Draws(seed=0, phase="p", step=step, positions=tuple(positions))


def phase_of(
    stage: int = 0, precision: str = "fp32", optimizer: OptimizerConfig = OPTIMIZER, ema: EmaConfig | None = None
) -> PhaseConfig:
    return PhaseConfig.model_validate(
        {
            "name": "p",
            "steps": 10,
            "batch": BatchConfig(global_size=ROWS, micro_size=1),
            "optimizer": {"student": optimizer},
            "precision": precision,
            "zero": ZeroConfig.model_validate({"stage": stage}),
            "ema": ema,
        }
    )


def engine_of(model: nn.Module, phase: PhaseConfig, rules: Sequence[TrainableRule] = ()) -> Engine:
    optimizer = phase.optimizer["student"]
    groups = parameter_groups(model, rules, optimizer, where="test")
    recipe = Regression(Config(), model, {})
    return Engine(recipe, "student", groups, phase, optimizer, num_steps=10, device=torch.device("cpu"))


def do_steps(
    engine: Engine, first: int, end: int, *, micro: int, rank: int = 0, ranks: int = 1
) -> list[dict[str, float]]:
    """Steps `first` … `end` - 1 over micro-batches of `micro` rows, dealt out like the loader does."""
    done = []
    for step in range(first, end):
        cuts = [range(i, i + micro) for i in range(0, ROWS, micro)][rank::ranks]
        batch = batch_of(step)
        batches = [{k: v[list(cut)] for k, v in batch.items()} for cut in cuts]
        update = engine.update(batches, [draws_of(step, cut) for cut in cuts], step)
        done.append({"loss": update.loss, "grad_norm": update.grad_norm, **update.parts})
    return done


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """The whole fp32 weights by name; all ranks together."""
    return {name: tensor for name, tensor in assembled(engine.masters, keep=True) if tensor is not None}


def plain_training(
    steps: int, optimizer: OptimizerConfig = OPTIMIZER
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The same training with torch alone: whole batch, AdamW, `clip_grad_norm_`."""
    model = network()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    done = []
    for step in range(steps):
        batch = batch_of(step)
        x = batch["x"] + 0.1 * draws_of(step, range(ROWS)).normal("noise", (6,))
        error = (model(x) - batch["y"]).square().sum(-1) * batch["weight"]
        loss = error.sum() / batch["weight"].sum()
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm or float("inf"))
        adamw.step()
        done.append({"loss": loss.item(), "grad_norm": norm.item()})
    return {name: p.detach() for name, p in model.named_parameters()}, done


def arrays(tensors: Mapping[str, Tensor | None]) -> dict[str, np.ndarray]:
    """What can be sent between processes of tensors by name."""
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def furthest(a: Mapping[str, Tensor | np.ndarray | None], b: Mapping[str, Tensor | np.ndarray | None]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float(np.abs(np.asarray(a[n]) - np.asarray(b[n])).max()) for n in a)
