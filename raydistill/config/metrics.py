"""The names of what is measured during training, as far as the configuration decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.teachers import OdeTrajectoryTeacher, TeacherConfig, TopKLogitsTeacher
from raydistill.config.world import EpisodesSource

if TYPE_CHECKING:
    from raydistill.config.schema import RunConfig


WORLD_METRICS = ("mse_to_truth", "true_change_cosine")
"""Names of the metrics of `evaluate.world_metrics.WorldValidator`."""


def training_metrics(config: RunConfig) -> tuple[str, ...]:
    """Metrics that an evaluation of a phase has: what `checkpoint.best_metric` may name."""
    match config.source:
        case TextSource():
            return language_metrics(config.teachers)
        case ImagesSource() | VideosSource() | PromptsSource():
            if few_steps(config):
                return trajectory_metrics(config)
            return denoiser_metrics(config.teachers, averaged=config.cache.store == "average")
        case EpisodesSource():
            return WORLD_METRICS


def language_metrics(teachers: Sequence[TeacherConfig]) -> tuple[str, ...]:
    """Names of `evaluate.language.language_metrics`."""
    names = ["loss", "perplexity", "top1_accuracy", "ece", "bits_per_byte"]
    if teachers:
        names.append("kl_to_teacher")
    if any(isinstance(t, TopKLogitsTeacher) and t.top_k for t in teachers):
        names.append("top1_agreement")
    return tuple(names)


def few_steps(config: RunConfig) -> bool:
    """Whether the student is measured as one of few steps: by what it makes, not by what it predicts of noise."""
    return config.student.generator is not None


def trajectory_metrics(config: RunConfig) -> tuple[str, ...]:
    """Names of `evaluate.trajectory.trajectory_metrics`; empty where no teacher keeps trajectories to compare with."""
    if not any(isinstance(t, OdeTrajectoryTeacher) for t in config.teachers):
        return ()
    assert config.student.generator is not None, "asked for the steps of a student that has none"
    steps = len(config.student.generator.t_list) - 1
    return ("mse_to_teacher", *(f"mse_after/{k}" for k in range(1, steps + 1)))


def denoiser_metrics(teachers: Sequence[TeacherConfig], *, averaged: bool) -> tuple[str, ...]:
    """Names of `evaluate.denoiser.denoiser_metrics`; `averaged` when only the mean of the teachers is cached."""
    names = ["mse_to_noise"]
    if teachers:
        names.append("mse_to_teacher")
    if teachers and (averaged or len(teachers) > 1):
        names.append("mse_to_mean")
    if len(teachers) > 1 and not averaged:
        names += [f"mse_to/{t.name}" for t in teachers]
    return tuple(names)
