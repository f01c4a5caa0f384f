"""World models that are asked in every training step instead of being read from a cache (`online: local`)."""

from __future__ import annotations

from raydistill.cache.joined import open_manifest
from raydistill.config.teachers import TeacherConfig
from raydistill.config.world import WorldTeacher
from raydistill.recipes.base import TeacherView
from raydistill.storage import Store
from raydistill.teachers import build_teacher
from raydistill.train.job import PhaseJob


def is_online(teacher: TeacherConfig) -> bool:
    """Whether a teacher keeps no cache."""
    return isinstance(teacher, WorldTeacher) and teacher.online == "local"


def online_views(job: PhaseJob, total: float) -> dict[str, TeacherView]:
    """The teachers of a phase that are online, loaded in this process; `total` is the weight of all teachers.

    A phase that learns from no teacher loads none.
    """
    if not job.phase.recipe.uses_teacher:
        return {}
    clip_frames = None
    views = {}
    for teacher in job.config.teachers:
        if is_online(teacher) and teacher.weight > 0:
            clip_frames = clip_frames or int(str(open_manifest(Store(job.inputs)).facts["clip_frames"]))
            asked = build_teacher(teacher, clip_frames)
            views[teacher.name] = TeacherView(teacher.name, teacher.weight / total, asked.facts, asked)
    return views
