"""What a student costs, whatever it has learned: size and, where it is asked for, speed."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from raydistill.config.sources import ImagesSource, TextSource
from raydistill.evaluate.job import EvaluateJob, student_in
from raydistill.evaluate.language import measure_speed, model_size, open_held_out


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
            return {**found, "tokens_per_second": measure_speed(cast(PreTrainedModel, student), rows)}
        case ImagesSource():
            from raydistill.evaluate.denoiser import open_held_out_draws, process_in
            from raydistill.evaluate.images import Measured, forward_costs

            draws = open_held_out_draws(job.config, inputs=job.inputs, signals={})
            line = forward_costs(Measured("student_init", student, process_in(student)), draws)
            return {**found, "samples_per_second": float(str(line["samples_per_second"]))}
