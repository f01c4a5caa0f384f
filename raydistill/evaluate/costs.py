"""What a student costs, whatever it has learned: size and, where it is asked for, speed."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource
from raydistill.evaluate.job import EvaluateJob, student_in
from raydistill.evaluate.language import measure_speed, model_size, open_held_out

TURNS, TURN_SECONDS = 3, 1.0
"""Speed is the best of so many measurements: other trials may run beside, and the first one warms up."""


def student_costs(job: EvaluateJob, *, speed: bool) -> dict[str, float]:
    """`parameters`, `bytes` and with `speed` the `tokens_per_second` or `samples_per_second` on held-out rows of the
    untrained student of a run, in the number format it is used in."""
    torch.set_num_threads(max(1, int(job.config.resources.train.cpus)))
    student = student_in(job, "student_init")
    found = model_size(student)
    if not speed:
        return found
    match job.config.source:
        case TextSource():
            rows = open_held_out(job.config, inputs=job.inputs, signals={})
            model = cast(PreTrainedModel, student)
            speeds = [measure_speed(model, rows, seconds=TURN_SECONDS) for _ in range(TURNS)]
            return {**found, "tokens_per_second": max(speeds)}
        case ImagesSource() | VideosSource() | PromptsSource():
            from raydistill.evaluate.denoiser import open_held_out_draws, process_in
            from raydistill.evaluate.images import Measured, forward_costs

            draws = open_held_out_draws(job.config, inputs=job.inputs, signals={})
            denoiser = Measured("student_init", student, process_in(student))
            speeds = [float(str(forward_costs(denoiser, draws)["samples_per_second"])) for _ in range(TURNS)]
            return {**found, "samples_per_second": max(speeds)}
        case EpisodesSource():
            from raydistill.evaluate.world_metrics import held_out_clips
            from raydistill.evaluate.worlds import play_costs
            from raydistill.models.world.protocol import require_world_model

            clips, world = (
                held_out_clips(job.config, job.inputs, max_rows=1),
                require_world_model(student, where="student"),
            )
            return {
                **found,
                "frames_per_second": max(play_costs(world, clips)["frames_per_second"] for _ in range(TURNS)),
            }
