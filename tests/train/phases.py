"""Phases on toy caches: a tiny Llama learns from a bigram teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import tiny_llama, write_toy_caches

from raydistill.config.schema import RunConfig
from raydistill.models.student import save_student
from raydistill.train.launch import PhaseJob


def phase_job(
    folder: Path,
    *,
    phase: Mapping[str, object] | None = None,
    rows: int = 30,
    name: str = "run",
    **sections: Mapping[str, object],
) -> PhaseJob:
    """A phase of 8 steps in fp32 (30 rows make an epoch of 4 steps, the last one short) in a run folder of its own.

    Caches and student are made once per `folder`; `phase` and the `sections` (evaluate, resources, …) go into the
    configuration.
    """
    if not (folder / "init/student.json").exists():
        write_toy_caches(folder / "cache", num_rows=rows, num_held_out=6)
        save_student(tiny_llama(64), folder / "init")
    config = RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(folder / name),
            "source": {"kind": "text", "paths": ["x.txt"], "tokenizer": "t", "seq_len": 12},
            "teachers": [{"name": "toy", "top_k": 8, "model": {"library": "transformers", "source": "x"}}],
            "student": {"model": {"library": "transformers", "source": "x"}, **sections.pop("student", {})},
            "phases": [
                {
                    "name": "one",
                    "steps": 8,
                    "recipe": {"kind": "lm_logits", "alpha": 0.5},
                    "batch": {"global_size": 8, "micro_size": 2},
                    "optimizer": {"student": {"lr": 1e-2, "weight_decay": 0.1}},
                    "precision": "fp32",
                    "log_every": 1,
                    "checkpoint": {"every_steps": 3},
                    **(phase or {}),
                }
            ],
            **sections,
        }
    )
    cache = folder / "cache"
    return PhaseJob(
        config=config,
        phase=config.phases[0],
        run=str(folder / name),
        folder="phases/one",
        inputs=str(cache / "inputs-toy"),
        signals={"toy": str(cache / "toy-toy")},
        student=str(folder / "init"),
    )


def final(job: PhaseJob, name: str = "model.safetensors") -> dict[str, Tensor]:
    """The weights a phase left behind."""
    return load_file(Path(job.run, job.folder, "final", name))


def lines(job: PhaseJob) -> list[dict]:
    """metrics.jsonl of the run."""
    return [json.loads(line) for line in Path(job.run, "metrics.jsonl").read_text().splitlines()]


def logged(job: PhaseJob) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of the logged steps."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(job) if "loss" in line]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_after(step: int) -> Callable[[Mapping[str, float]], None]:
    """A report that ends the process, as it were, after `step` steps."""

    def report(values: Mapping[str, float]) -> None:
        if values["step"] == step:
            raise Killed

    return report


def same_bytes(a: PhaseJob, b: PhaseJob, name: str = "model.safetensors") -> bool:
    """Whether two phases left the same weights behind, to the bit."""
    one, other = final(a, name), final(b, name)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
