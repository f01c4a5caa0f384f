"""Frozen models that turn inputs into signals. A new one is a configuration section, a file here and a branch below."""

from __future__ import annotations

import torch

from raydistill.config.teachers import TeacherConfig
from raydistill.models.load import load_language_model
from raydistill.signals import Teacher
from raydistill.teachers.logits import TopKLogitsTeacher


def build_teacher(config: TeacherConfig, vocab_size: int) -> Teacher:
    """Load the teacher of `config` onto the GPU of this process, or its CPU; `vocab_size` counts the real token ids."""
    model = load_language_model(config.model)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return TopKLogitsTeacher(config, model, vocab_size)
