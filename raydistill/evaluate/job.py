"""What the stage `evaluate` is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from raydistill.config.schema import RunConfig
from raydistill.models.student import load_student
from raydistill.signals import JsonValue
from raydistill.storage import local_folder

STUDENTS = ("student_init", "student_ce", "student", "student_ema")
"""Students in the order in which they are measured: before training, trained without a teacher, distilled, and the
moving average of the distilled one's weights over the last phase."""


def exported_role(config: RunConfig) -> str:
    """The student that the run leaves for others."""
    return "student_ema" if config.export.weights == "ema" else "student"


@dataclass(frozen=True)
class EvaluateJob:
    """What there is to measure. Holds only text, so that it can be sent to another machine."""

    config: RunConfig
    inputs: str
    """URI of the inputs cache."""
    signals: Mapping[str, str]
    """URI of each teacher's cache."""
    student: str
    """URI of the run's `init/` folder."""
    weights: Mapping[str, str]
    """URI of the folder with the trained weights: of `student`, of `student_ce` where there is a baseline, and of
    `student_ema` where the last phase keeps an average."""

    @property
    def students(self) -> list[str]:
        """The students that there are."""
        return [role for role in STUDENTS if role == "student_init" or role in self.weights]


@dataclass
class Evaluation:
    """What the stage found, as the content of files of the run folder."""

    metrics: dict[str, JsonValue] = field(default_factory=dict)
    """metrics.json, all but `stages`."""
    samples: dict[str, JsonValue] = field(default_factory=dict)
    """samples.json."""
    cache_stats: dict[str, JsonValue] = field(default_factory=dict)
    """cache_stats.json."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files by their name in the run folder: the images that samples.json names."""


def student_of(student: str, weights: str | None, *, dtype: torch.dtype) -> nn.Module:
    """The student of an `init/` folder with its own weights or with those of a folder; both are URIs."""
    with local_folder(student) as folder, ExitStack() as stack:
        path = None if weights is None else stack.enter_context(local_folder(weights))
        return load_student(folder, weights=path, dtype=dtype)


def student_in(job: EvaluateJob, role: str) -> nn.Module:
    """The student `role` of a job, in the number format it is used in, on the GPU of this process or its CPU."""
    dtype = getattr(torch, job.config.student.model.dtype)
    student = student_of(job.student, job.weights.get(role), dtype=dtype)
    nn.Module.to(student, device())
    return student


def device() -> torch.device:
    """Where models are measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
