"""World models that are asked in every training step instead of being read from a cache (`online: local | actors`).

In the worker itself, or in a pool of Ray actors: both answer with the same code on the whole micro-batch, so they say
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from raydistill.cache.joined import open_manifest
from raydistill.config.schema import TeacherResources
from raydistill.config.teachers import TeacherConfig
from raydistill.config.world import FeaturesTeacher, WorldTeacher
from raydistill.memory import keep_freed_memory
from raydistill.recipes.base import OnlineTeacher, TeacherView
from raydistill.signals import Batch, JsonValue, Teacher
from raydistill.storage import Store
from raydistill.teachers import build_teacher
from raydistill.train.actors import Failure, Pool, actor_of, actor_pools, array, failure_of, tensor
from raydistill.train.job import PhaseJob


def is_online(teacher: TeacherConfig) -> bool:
    """Whether a teacher keeps no cache."""
    return isinstance(teacher, WorldTeacher) and teacher.online != "no"


class LocalTeacher:
    """A teacher in this process."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher

    def start(self, batch: Batch, fields: Sequence[str]) -> Callable[[], Batch]:
        """Answer at once."""
        said = self._teacher(batch)
        return lambda: {name: said[name] for name in fields}


class WorldActor:
    """A teacher that answers ranks."""

    def __init__(self, teacher: FeaturesTeacher, clip_frames: int, share: TeacherResources):
        keep_freed_memory()
        torch.set_num_threads(max(1, int(share.cpus)))
        self._section, self._clip_frames = teacher, clip_frames

    def ready(self) -> Failure:
        """Returns once the teacher is loaded."""
        return failure_of(lambda: self._teacher)

    @cached_property
    def _teacher(self) -> Teacher:
        return build_teacher(self._section, self._clip_frames)

    def facts(self) -> Mapping[str, JsonValue]:
        """What a recipe must know of the teacher."""
        return self._teacher.facts

    def said(self, batch: Mapping[str, np.ndarray], fields: Sequence[str]) -> dict[str, np.ndarray]:
        """What the teacher says of a micro-batch, as far as it is wanted."""
        said = self._teacher({name: tensor(values) for name, values in batch.items()})
        return {name: array(said[name]) for name in fields}


class ActorTeacher:
    """The teacher of a rank: one actor of its pool."""

    def __init__(self, actor: Any):
        self._actor = actor

    def start(self, batch: Batch, fields: Sequence[str]) -> Callable[[], Batch]:
        """Send the question; the result waits for the answer, so that the rank can compute meanwhile."""
        import ray

        answer = self._actor.said.remote({name: array(values) for name, values in batch.items()}, list(fields))
        return lambda: {name: tensor(values) for name, values in ray.get(answer).items()}


def world_pools(job: PhaseJob, connect: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
    """Actors that answer for those teachers of a phase that want them, while it trains; see `actor_pools`."""
    share = job.config.resources.teacher
    wanted = [teacher for teacher in _asked(job) if teacher.online == "actors"]
    pools = {t.name: Pool(WorldActor, (t, _clip_frames(job), share)) for t in wanted}
    return actor_pools(job, pools, connect)


def online_views(job: PhaseJob, total: float, *, rank: int) -> dict[str, TeacherView]:
    """The teachers of a phase that are online, as this rank asks them; `total` is the weight of all teachers."""
    views = {}
    for section in _asked(job):
        facts, teacher = _reached(job, section, rank)
        views[section.name] = TeacherView(section.name, section.weight / total, facts, teacher)
    return views


def _reached(job: PhaseJob, section: FeaturesTeacher, rank: int) -> tuple[Mapping[str, JsonValue], OnlineTeacher]:
    if section.online == "local":
        teacher = build_teacher(section, _clip_frames(job))
        return teacher.facts, LocalTeacher(teacher)
    import ray

    actor = actor_of(job, section.name, rank)
    return ray.get(actor.facts.remote()), ActorTeacher(actor)


def _asked(job: PhaseJob) -> list[FeaturesTeacher]:
    """The teachers that a phase asks; none where it learns from no teacher."""
    if not job.phase.recipe.uses_teacher:
        return []
    return [t for t in job.config.teachers if isinstance(t, FeaturesTeacher) and is_online(t) and t.weight > 0]


def _clip_frames(job: PhaseJob) -> int:
    return int(str(open_manifest(Store(job.inputs)).facts["clip_frames"]))
