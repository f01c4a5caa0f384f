"""Teachers that are asked while a student trains: in the worker itself, or in a pool of Ray actors.

Both answer with the same code on the whole micro-batch, so they say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydistill.config.models import DiffusersModel
from raydistill.config.recipes import CausalConsistencyRecipe, SelfForcingRecipe
from raydistill.config.schema import RunConfig, TeacherResources
from raydistill.config.training import PhaseConfig
from raydistill.memory import keep_freed_memory
from raydistill.models.denoiser import load_denoiser, process_of
from raydistill.models.score import LocalScore, Score
from raydistill.recipes.online import Online
from raydistill.signals import Batch
from raydistill.train.actors import Failure, Pool, actor_of, actor_pools, array, failure_of, tensor
from raydistill.train.job import PhaseJob

CONDITIONS = ("prompt_embeds", "empty_embeds", "pooled", "empty_pooled", "time_ids")
"""What of a batch a teacher is told."""
POOL = "score"


@dataclass(frozen=True)
class Asked:
    """The teacher of a phase that asks one."""

    model: DiffusersModel
    guidance: float
    chunk_frames: int | None
    """Chunks of an autoregressive teacher; None for one that sees all frames."""
    actors: bool
    """Whether actors answer for it."""
    critic: bool
    """Whether a twin of it is trained."""

    def score(self) -> Score:
        """The network with its weights, in the format of its configuration."""
        network = load_denoiser(self.model).requires_grad_(False)
        return Score(network, process_of(self.model), guidance=self.guidance, chunk_frames=self.chunk_frames)


def asked_by(config: RunConfig, phase: PhaseConfig) -> Asked | None:
    """The teacher that a phase asks while it trains; None where it asks none."""
    recipe, generator = phase.recipe, config.student.generator
    match recipe:
        case SelfForcingRecipe(real_score=named):
            critic = True
        case CausalConsistencyRecipe(teacher=named):
            critic = False
        case _:
            return None
    model = named if named is not None else config.teachers[0].model
    assert isinstance(model, DiffusersModel), "the configuration was checked"
    assert generator is not None and generator.causal is not None, "the configuration was checked"  # noqa: PT018
    chunk = generator.causal.chunk_frames if recipe.teacher_attention == "autoregressive" else None
    return Asked(model, recipe.guidance_scale, chunk, recipe.online == "actors", critic)


def online_teacher(job: PhaseJob, *, rank: int) -> Online | None:
    """What the recipe of a phase gets to ask; None where it asks nobody."""
    asked = asked_by(job.config, job.phase)
    if asked is None:
        return None
    critic: nn.Module | None = load_denoiser(asked.model, dtype=torch.float32) if asked.critic else None
    if critic is not None and job.config.student.gradient_checkpointing:
        critic.enable_gradient_checkpointing()  # type: ignore[operator]
    if asked.actors:
        return Online(ActorScore(job, rank), process_of(asked.model), None, critic)
    score = asked.score()
    return Online(LocalScore(score), score.process, score, critic)


class ScoreActor:
    """A teacher that answers ranks."""

    def __init__(self, asked: Asked, share: TeacherResources):
        keep_freed_memory()
        torch.set_num_threads(max(1, int(share.cpus)))
        self._device = torch.device("cuda" if share.gpus > 0 else "cpu")
        self._asked = asked

    def ready(self) -> Failure:
        """Returns once the teacher is loaded."""
        return failure_of(lambda: self._score)

    @cached_property
    def _score(self) -> LocalScore:
        return LocalScore(self._asked.score())

    def clean(
        self, x_t: np.ndarray, t: np.ndarray, batch: Mapping[str, np.ndarray], context: np.ndarray | None
    ) -> np.ndarray:
        """`Score.clean` on this actor's device."""
        told = {name: self._tensor(values) for name, values in batch.items()}
        known = None if context is None else self._tensor(context)
        found: np.ndarray = self._score.start(self._tensor(x_t), self._tensor(t), told, known)().cpu().numpy()
        return found

    def _tensor(self, values: np.ndarray) -> Tensor:
        return tensor(values).to(self._device)


class ActorScore:
    """The teacher of a rank: one actor of the pool."""

    def __init__(self, job: PhaseJob, rank: int):
        self._actor: Any = actor_of(job, POOL, rank)

    def start(self, x_t: Tensor, t: Tensor, batch: Batch, context: Tensor | None = None) -> Callable[[], Tensor]:
        """Send the question; the result waits for the answer, so that the rank can compute meanwhile."""
        import ray

        told = {name: array(batch[name]) for name in CONDITIONS if name in batch}
        known = None if context is None else array(context)
        answer = self._actor.clean.remote(array(x_t), array(t), told, known)
        return lambda: tensor(ray.get(answer)).to(x_t.device)


def score_pool(job: PhaseJob, connect: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
    """Actors that answer for the teacher of a phase, if it wants them, while the phase trains; see `actor_pools`."""
    asked = asked_by(job.config, job.phase)
    pools = {POOL: Pool(ScoreActor, (asked, job.config.resources.teacher))} if asked and asked.actors else {}
    return actor_pools(job, pools, connect)
