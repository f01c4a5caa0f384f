"""The moving average of the weights, kept as fp32 shards beside the fp32 masters, so that ZeRO and bf16 do not matter.

(An average of the bf16 weights would never move at a decay of 0.9999, and one of ZeRO-3's parameters would be empty.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from raydistill.config.training import EmaConfig
from raydistill.train.masters import Masters


class Ema:
    """`average ← decay · average + (1 - decay) · master`, per fragment of this rank."""

    def __init__(self, masters: Masters, config: EmaConfig):
        self._masters, self._config = masters, config
        self.num_updates = 0
        self.values: dict[str, Tensor] = {f.name: masters.read(f).detach().clone() for f in masters.fragments}
        """The average by parameter name, laid out like `masters.fragments`."""

    def decay(self) -> float:
        """The decay of the next update; the warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates)`."""
        if not self._config.warmup:
            return self._config.decay
        return min(self._config.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the masters after optimizer step `step` (from 0), if it is one of every `every_steps`."""
        if (step + 1) % self._config.every_steps:
            return
        share = 1 - self.decay()
        for fragment in self._masters.fragments:
            self.values[fragment.name].lerp_(self._masters.read(fragment), share)
        self.num_updates += 1
