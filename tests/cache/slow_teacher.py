"""A teacher that takes its time and says which process it is, for tests that kill it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import TeacherConfig
from raydistill.signals import Batch, Teacher
from raydistill.teachers import build_teacher


class SlowTeacher:
    """Sleeps before every batch; writes its process id into the folder that SLOW_TEACHER names."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher
        self.schema, self.facts = teacher.schema, teacher.facts
        Path(os.environ["SLOW_TEACHER"], str(os.getpid())).touch()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        time.sleep(0.2)
        return self._teacher(batch)


def build_slow_teacher(config: TeacherConfig, inputs: int | NoiseConfig) -> Teacher:
    """The teacher of `config`, slowed down."""
    return SlowTeacher(build_teacher(config, inputs))
