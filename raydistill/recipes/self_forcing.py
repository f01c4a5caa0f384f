"""Self-Forcing: a causal student is trained on its own rollouts, which two scores draw towards the teacher's videos.

Student: x = rollout, ended at a random step that is the only one with gradients; x is noised to a time t, and the
difference of what the critic (which knows the student's videos) and the teacher expect behind it is its gradient.
Critic: a denoiser of the student's videos. With heads, both also play the game of telling clips from rollouts.
Source: Huang et al. 2025, arXiv 2506.08009, Alg. 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.config.recipes import SelfForcingRecipe
from raydistill.errors import ConfigError
from raydistill.losses.matching import approximate_r1, called_made, called_real, distribution_matching
from raydistill.losses.regression import distance
from raydistill.models.causal import CausalDenoiser
from raydistill.models.rollout import Rollout
from raydistill.models.score import FeatureHeads, Score
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.recipes.online import (
    Online,
    clips_of,
    process_and_generator,
    require_same_kind,
    shifted,
    uniform,
)
from raydistill.signals import Batch, Draws

HEADS_SEED = 0


class Critic(nn.Module):
    """The denoiser of the student's videos, and the heads that are trained with it."""

    def __init__(self, denoiser: nn.Module, heads: FeatureHeads):
        super().__init__()
        self.denoiser = denoiser
        self.heads = heads


class SelfForcing(Recipe[SelfForcingRecipe]):
    """Two players, `student` and `critic`; every `critic_updates + 1`-th step is the student's.

    Batch: `latent_shape` [B, 4] (or `latents` [B, C, T, h, w], which heads need), `prompt_embeds`, `weight` [B], and
    `empty_embeds` for guidance. Parts of the student: `dmd` (½ of the squared normalised gradient: how far the scores
    are apart) and, with heads, `fooling`; of the critic: `denoising`, and `telling` and `r1`. All are per sample.
    """

    def __init__(
        self,
        config: SelfForcingRecipe,
        student: nn.Module,
        teachers: Mapping[str, TeacherView],
        online: Online,
    ):
        super().__init__(config, student, teachers)
        process, generator = process_and_generator(student, "self_forcing")
        require_same_kind(process, online.process, "self_forcing")
        assert generator.causal is not None, "checked above"
        assert online.critic is not None, "self_forcing has a critic"
        chunk = generator.causal.chunk_frames
        self._process, self._teacher = process, online.teacher
        self._rollout = Rollout(CausalDenoiser(student, chunk), process, generator)
        attention = chunk if config.teacher_attention == "autoregressive" else None
        self._critic = Score(online.critic, online.process, chunk_frames=attention)
        self._heads: FeatureHeads | None = None
        self._player = online.critic
        if config.gan is not None:
            assert online.local is not None, "heads read a teacher in this process"
            self._heads = FeatureHeads(online.local, config.gan.features, seed=HEADS_SEED)
            self._player = Critic(online.critic, self._heads)

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"samples": float(batch["weight"].sum())}

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self._player}

    def turn(self, step: int) -> str:
        """The critic first, so that the student never follows one that has seen nothing."""
        return "student" if (step + 1) % (self.config.critic_updates + 1) == 0 else "critic"

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        return self._student_loss(batch, rng) if player == "student" else self._critic_loss(batch, rng)

    def _student_loss(self, batch: Batch, rng: Draws) -> Loss:
        made = self.made(batch, rng)
        t = self._times(rng, made)
        x_t = self._process.noised(made, self._normal(rng, "score noise", made), t)
        seen = made.detach()
        real = self._teacher.start(x_t.detach(), t, batch, seen)
        with torch.no_grad():
            fake = self._critic.clean(x_t.detach(), t, batch, seen)
        weight = batch["weight"]
        parts = {"dmd": Part((weight * distribution_matching(made, fake, real())).sum(), 1.0, "samples")}
        if self._heads is not None and self.config.gan is not None:
            verdict = called_real(self._heads(x_t, t, batch))
            parts["fooling"] = Part((weight * verdict).sum(), self.config.gan.weight, "samples")
        return Loss(parts)

    def _critic_loss(self, batch: Batch, rng: Draws) -> Loss:
        with torch.no_grad():
            made = self.made(batch, rng)
        t = self._times(rng, made)
        x_t = self._process.noised(made, self._normal(rng, "score noise", made), t)
        own = self._critic.own(x_t, t, batch, made)
        weight = batch["weight"]
        error = distance("mse", own, self._critic.process.own_of(made, x_t, t))
        parts = {"denoising": Part((weight * error).sum(), 1.0, "samples")}
        if self._heads is not None:
            parts |= self._telling(self._heads, x_t, t, batch, rng)
        return Loss(parts)

    def _telling(self, heads: FeatureHeads, x_t: Tensor, t: Tensor, batch: Batch, rng: Draws) -> dict[str, Part]:
        gan, weight = self.config.gan, batch["weight"]
        assert gan is not None
        clips = clips_of(batch, "self_forcing with gan")[:, :, : x_t.shape[2]]
        real_t = self._process.noised(clips, self._normal(rng, "real noise", clips), t)
        told_real = heads(real_t, t, batch)
        telling = called_made(heads(x_t, t, batch)) + called_real(told_real)
        parts = {"telling": Part((weight * telling).sum(), 1.0, "samples")}
        if gan.r1_weight:
            nudged = heads(real_t + gan.r1_sigma * self._normal(rng, "r1", clips), t, batch)
            parts["r1"] = Part((weight * approximate_r1(told_real, nudged)).sum(), gan.r1_weight, "samples")
        return parts

    def made(self, batch: Batch, rng: Draws) -> Tensor:
        """Videos of the student for this batch, ended at the exit step that all ranks share."""
        steps = len(self._rollout.times)
        shape, device = self._shape(batch), batch["prompt_embeds"].device
        return self._rollout(
            lambda use: rng.normal(f"rollout {use}", shape).to(device),
            batch,
            exit_step=int(rng.shared("exit").integers(steps)),
        )

    def _shape(self, batch: Batch) -> tuple[int, ...]:
        given = batch["latents"].shape[1:] if "latents" in batch else batch["latent_shape"][0].tolist()
        if len(given) != 4:
            raise ConfigError(
                f"recipe self_forcing makes videos, found latents of shape {list(given)}; give the source frames."
            )
        channels, frames, height, width = (int(side) for side in given)
        return channels, self.config.frames or frames, height, width

    def _times(self, rng: Draws, like: Tensor) -> Tensor:
        low, high = self.config.t_range
        u = low + (high - low) * uniform(rng, "score time", like.device)
        return shifted(u, self.config.shift).clamp(low, high)

    def _normal(self, rng: Draws, stream: str, like: Tensor) -> Tensor:
        return rng.normal(stream, tuple(like.shape[1:])).to(like.device)
