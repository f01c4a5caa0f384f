"""What recipes share that ask a teacher while they train, instead of reading what it said before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydistill.config.models import GeneratorConfig
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.score import RealScore, Score
from raydistill.signals import Batch, Draws


@dataclass(frozen=True)
class Online:
    """A teacher that is asked during training; what a recipe gets beside the student."""

    teacher: RealScore
    process: Process
    """The teacher's."""
    local: Score | None = None
    """The teacher's network, where it is in this process."""
    critic: nn.Module | None = None
    """A trainable twin of the teacher, where the recipe has that player."""


def process_and_generator(student: nn.Module, kind: str) -> tuple[Process, GeneratorConfig]:
    """What a student of few steps carries; `ConfigError` when it is none, or makes no chunks."""
    process, generator = getattr(student, "process", None), getattr(student, "generator", None)
    if not isinstance(process, Process) or not isinstance(generator, GeneratorConfig) or generator.causal is None:
        raise ConfigError(
            f"recipe {kind} wants a denoiser that makes videos chunk by chunk, found {type(student).__name__} without "
            "student.generator.causal; set it."
        )
    return process, generator


def require_same_kind(student: Process, teacher: Process, kind: str) -> None:
    """`ConfigError` unless student and teacher mean the same noise by a time in [0, 1]; a flow's shift is no matter."""
    apart = None if student.kind == teacher.kind == "flow" else student.differs(teacher)
    if apart is not None:
        raise ConfigError(
            f"recipe {kind} wants a teacher of the student's noise schedule, found {apart} (student and teacher); use "
            "models of one schedule, or name the right one with model.scheduler."
        )


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): times in [0, 1] moved towards noise. Esser et al. 2024, arXiv 2403.03206, Eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def uniform(rng: Draws, stream: str, device: torch.device) -> Tensor:
    """A number in [0, 1) for each sample, fp64."""
    return torch.tensor([g.random() for g in rng.rows(stream)], dtype=torch.float64, device=device)


def clips_of(batch: Batch, kind: str) -> Tensor:
    """The clean latents of a batch, fp32; `ConfigError` when there are none."""
    if "latents" not in batch or batch["latents"].ndim != 5:
        raise ConfigError(f"recipe {kind} learns from clips, and the source has none; use a source of kind videos.")
    return batch["latents"].float()
