"""The stage `evaluate`: every model of a run on the same held-out rows, one after the other.

What one kind of model needs is imported only where it is measured: diffusers and torchmetrics take seconds to load.
"""

from __future__ import annotations

from raydistill.config.metrics import few_steps
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource
from raydistill.evaluate.job import EvaluateJob, Evaluation, student_of

__all__ = ["EvaluateJob", "Evaluation", "check_evaluation", "evaluate_run", "student_of"]


def check_evaluation(config: RunConfig) -> None:
    """Raise the errors that this stage would end with, before anything is trained: missing packages and files."""
    match config.source:
        case TextSource():
            from raydistill.evaluate.text import check_text

            check_text(config)
        case ImagesSource() | VideosSource() | PromptsSource():
            from raydistill.evaluate.images import check_images

            check_images(config)
        case EpisodesSource():
            from raydistill.evaluate.worlds import check_worlds_evaluation

            check_worlds_evaluation(config)


def evaluate_run(job: EvaluateJob) -> Evaluation:
    """Measure teachers and students; one model is in memory at a time."""
    match job.config.source:
        case TextSource():
            from raydistill.evaluate.text import evaluate_text

            return evaluate_text(job)
        case ImagesSource() | VideosSource() | PromptsSource() if few_steps(job.config):
            from raydistill.evaluate.videos import evaluate_generators

            return evaluate_generators(job)
        case ImagesSource() | VideosSource() | PromptsSource():
            from raydistill.evaluate.images import evaluate_images

            return evaluate_images(job)
        case EpisodesSource():
            from raydistill.evaluate.worlds import evaluate_worlds

            return evaluate_worlds(job)
