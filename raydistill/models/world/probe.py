"""Inverse dynamics: reads the action off a frame and the one after it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 4
"""Places along each side at which the probe looks in the end."""


class ActionProbe(nn.Module):
    """Logits of the actions between consecutive frames."""

    def __init__(self, channels: int, num_actions: int, width: int = 32):
        super().__init__()
        self.convs = nn.ModuleList(
            (
                nn.Conv2d(2 * channels, width, 5, stride=2, padding=2),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
            )
        )
        self.head = nn.Linear(width * GRID * GRID, num_actions)

    def forward(
        self, before: Float[Tensor, "b s c h w"], after: Float[Tensor, "b s c h w"]
    ) -> Float[Tensor, "b s actions"]:
        """Logits for each pair of frames with values in [0, 1]."""
        x = torch.cat([before * 2 - 1, 4 * (after - before)], 2).flatten(0, 1)
        for conv in self.convs:
            x = F.gelu(conv(x))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, GRID).flatten(1))
        return logits.unflatten(0, before.shape[:2])


def make_probe(channels: int, num_actions: int, *, seed: int) -> ActionProbe:
    """A probe with first weights that `seed` decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ActionProbe(channels, num_actions)
