"""Plain diffusion training of a causal video model, each noised chunk beside the clean chunks before it.

It makes an autoregressive teacher out of a bidirectional one. Source: arXiv 2602.02214.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from raydistill.config.recipes import TeacherForcingRecipe
from raydistill.losses.regression import distance
from raydistill.models.causal import CausalDenoiser
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.recipes.online import clips_of, process_and_generator, shifted
from raydistill.signals import Batch, Draws


class TeacherForcing(Recipe[TeacherForcingRecipe]):
    """Batch: `latents` [B, C, T, h, w], `prompt_embeds`, `weight` [B].

    The one part, `denoising`, is the mean squared error of the student's own kind of prediction, per sample.
    """

    def __init__(self, config: TeacherForcingRecipe, student: nn.Module, teachers: Mapping[str, TeacherView]):
        super().__init__(config, student, teachers)
        self._process, generator = process_and_generator(student, "teacher_forcing")
        assert generator.causal is not None, "checked above"
        self._causal = CausalDenoiser(student, generator.causal.chunk_frames)

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"samples": float(batch["weight"].sum())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        clips = clips_of(batch, "teacher_forcing")
        spans = self._causal.spans(clips.shape[2])
        # 1 - u is in (0, 1]: at time 0 a clean prediction would say nothing of the noise.
        drawn = torch.stack([torch.from_numpy(1 - g.random(len(spans))) for g in rng.rows("time")])
        lengths = torch.tensor([b - a for a, b in spans])
        t = shifted(drawn, self.config.shift).repeat_interleave(lengths, dim=1).to(clips.device)
        x_t = self._process.noised(clips, rng.normal("noise", tuple(clips.shape[1:])).to(clips.device), t)
        told = self._process.told(t)
        own = self._causal.predict(x_t, told, batch, clean=clips, clean_t=torch.zeros_like(told))
        error = distance("mse", own, self._process.own_of(clips, x_t, t))
        return Loss({"denoising": Part((batch["weight"] * error).sum(), 1.0, "samples")})
