"""Consistency distillation of a causal student on clips: the second stage without stored trajectories.

With clean chunks before it, the teacher leads a noised chunk from t to the time s before it on a grid, and the
student's clean prediction at t is drawn towards its own at s: at 0 that is the sample itself, so that in the end every
point of a path is led to its end. Sources: Song et al. 2023, arXiv 2303.01469, Alg. 2; for causal students, arXiv
2602.02214.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.config.recipes import CausalConsistencyRecipe
from raydistill.diffusion.process import Process, on_frames
from raydistill.losses.regression import distance
from raydistill.models.causal import CausalDenoiser
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.recipes.online import Online, clips_of, process_and_generator, require_same_kind, shifted
from raydistill.signals import Batch, Draws


class CausalConsistency(Recipe[CausalConsistencyRecipe]):
    """Batch: `latents` [B, C, T, h, w], `prompt_embeds`, `weight` [B], and `empty_embeds` for guidance.

    An autoregressive teacher has a time for each chunk; one that sees all frames has one for the whole clip. The one
    part, `consistency`, is the mean squared difference of clean predictions, per sample.
    """

    def __init__(
        self,
        config: CausalConsistencyRecipe,
        student: nn.Module,
        teachers: Mapping[str, TeacherView],
        online: Online,
    ):
        super().__init__(config, student, teachers)
        self._process, generator = process_and_generator(student, "causal_consistency")
        require_same_kind(self._process, online.process, "causal_consistency")
        assert generator.causal is not None, "checked above"
        self._teacher = online.teacher
        self._causal = CausalDenoiser(student, generator.causal.chunk_frames)
        places = torch.arange(config.grid + 1, dtype=torch.float64) / config.grid
        self._grid = shifted(places, config.shift)

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"samples": float(batch["weight"].sum())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        clips = clips_of(batch, "causal_consistency")
        places = self._places(rng, clips)
        t, s = self._grid[places].to(clips.device), self._grid[places - 1].to(clips.device)
        x_t = self._process.noised(clips, rng.normal("noise", tuple(clips.shape[1:])).to(clips.device), t)
        autoregressive = self.config.teacher_attention == "autoregressive"
        asked = t if autoregressive else t[:, 0]
        led = self._teacher.start(x_t, asked, batch, clips if autoregressive else None)
        own = self._clean(x_t, t, batch, clips)
        with torch.no_grad():
            x_s = towards(self._process, x_t, led(), t, s)
            target = self._clean(x_s, s, batch, clips)
        error = distance("mse", own, target)
        return Loss({"consistency": Part((batch["weight"] * error).sum(), 1.0, "samples")})

    def _places(self, rng: Draws, clips: Tensor) -> Tensor:
        """Place on the grid, 1 to N, of each frame [samples, frames]; the frames of a chunk share one."""
        spans = self._causal.spans(clips.shape[2])
        own = self.config.teacher_attention == "autoregressive"
        rows = []
        for generator in rng.rows("time"):
            drawn = generator.integers(1, self.config.grid + 1, size=len(spans) if own else 1)
            rows.append([int(drawn[i if own else 0]) for i, (a, b) in enumerate(spans) for _ in range(a, b)])
        return torch.tensor(rows)

    def _clean(self, x: Tensor, t: Tensor, batch: Batch, clips: Tensor) -> Tensor:
        told = self._process.told(t)
        own = self._causal.predict(x, told, batch, clean=clips, clean_t=torch.zeros_like(told))
        return self._process.clean_of(own, x, t)


def towards(process: Process, x_t: Tensor, clean: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s on the straight way from x_t to the clean prediction: one step of DDIM, which for flows is Euler's, in fp32.

    x_s = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t. Source: Song et al. 2021, arXiv 2010.02502, Eq. 12.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        tuple(on_frames(level, x_t) for level in process.at_time(time)) for time in (t, s)
    )
    eps = (x_t.double() - alpha_t * clean.double()) / sigma_t
    return (alpha_s * clean.double() + sigma_s * eps).float()
