"""The names of what is measured during training, as far as the configuration decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raydistill.config.sources import ImagesSource, TextSource
from raydistill.config.teachers import TeacherConfig, TopKLogitsTeacher
from raydistill.config.world import EpisodesSource

if TYPE_CHECKING:
    from raydistill.config.schema import RunConfig


WORLD_METRICS = ("mse_to_truth", "true_change_cosine", "change_cosine", "mse_to_teacher")
"""Names of `evaluate.world_metrics.world_metrics`; the last two only where there are teachers."""


def training_metrics(config: RunConfig) -> tuple[str, ...]:
    """Metrics that an evaluation of a phase has: what `checkpoint.best_metric` may name."""
    match config.source:
        case TextSource():
            return language_metrics(config.teachers)
        case ImagesSource():
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
