"""What a cache of trajectories takes, and how near its times are to where the sampler stood.

Bytes are of shards with latents of Wan's real shape (480p, 81 frames) and of the tiny configuration's, written as a
build writes them. Sigmas are compared with those that the sampler computes with at each kept state: diffusers' own in
its number format where a scheduler of second order steps, those of the noise schedule elsewhere. Beside it stands the
error of the rule of NVlabs/FastGen's script, which keeps the first state at or below the wanted time and labels it with
the wanted one.

    python benchmarks/trajectories.py
    python benchmarks/trajectories.py speed [--threads N]

`speed`: samples per second of the teacher of configs/tiny/video_self_forcing.yaml through Ray, from the first shard's
record to the last one's, against the same teacher called on the same batches in this process with as many threads. By
default a core is left for what is not the teacher.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from images import measure_capture
from machine import write

from raydistill.cache.dense import write_dense
from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.memory import keep_freed_memory
from raydistill.models.denoiser import process_of_scheduler
from raydistill.models.sampler import SECOND_ORDER, Sampler
from raydistill.storage import Store

CONFIG = Path(__file__).parents[1] / "configs/tiny/video_self_forcing.yaml"
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SAMPLERS: dict[str, tuple[dict[str, Any], int, list[float]]] = {
    "UniPC, flow, shift 5": (
        {"_class_name": "UniPCMultistepScheduler", **FLOW}, 35, [0.999, 0.937, 0.833, 0.624]
    ),
    "DPM-Solver, flow, shift 5": (
        {"_class_name": "DPMSolverMultistepScheduler", **FLOW}, 35, [0.999, 0.937, 0.833, 0.624]
    ),
    "Euler, flow, shift 5": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}, 48,
        [1.0, 0.937, 0.833, 0.624],
    ),
    "DDIM, SDXL": ({"_class_name": "DDIMScheduler", **BETAS, "timestep_spacing": "trailing"}, 40, [0.999, 0.7, 0.4]),
}  # fmt: skip
SHAPES = {"wan 480p, 81 frames": ((16, 21, 60, 104), 2, 4), "tiny": ((3, 9, 24, 24), 48, 4)}


def labels(config: dict[str, Any], steps: int, wanted: list[float]) -> dict[str, Any]:
    """Errors of the sigmas of kept states."""
    process = process_of_scheduler(config)
    sampler = Sampler(config, process, steps=steps, keep_t=wanted, insert=True, where="benchmark")
    kept = [sampler.nodes[index] for index in sampler.kept]
    exact = [float(process.at_time(torch.tensor(node.t, dtype=torch.float64))[1]) for node in kept]
    single = [float(torch.tensor(node.sigma, dtype=torch.float32)) for node in kept]
    true = single if sampler.name in SECOND_ORDER else exact
    scheduler: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    times = [float(t) / 1000 for t in scheduler.timesteps]
    below = [max((t for t in times if t <= w), default=times[-1]) for w in wanted]
    return {
        "steps": steps,
        "steps_with_wanted_times": sampler.num_steps,
        "largest_error_of_t": max(abs(node.t - w) for node, w in zip(kept, wanted, strict=True)),
        "largest_error_of_sigma": max(abs(node.sigma - s) for node, s in zip(kept, true, strict=True)),
        "largest_error_of_t_by_the_rule_at_or_below": max(abs(b - w) for b, w in zip(below, wanted, strict=True)),
    }


def size(shape: tuple[int, ...], samples: int, states: int) -> dict[str, Any]:
    """Bytes of a shard."""
    tensors = {
        "clean": torch.randn(samples, 1, *shape).bfloat16(),
        "path": torch.randn(samples, 1, states, *shape).bfloat16(),
        "noise_sha": torch.zeros(samples, 1, dtype=torch.int64),
    }
    meta: dict[str, Any] = {
        "kind": "signal", "split": "train", "bucket": [shape[-2], shape[-1]],
        "row_ids": [f"prompt-{i:016x}" for i in range(samples)], "row_sha": ["0" * 16] * samples,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        record = write_dense(Store(folder), "00000.safetensors", tensors, meta=meta, split="train", rows=samples)
    least = samples * (states + 1) * 2 * tensors["clean"][0].numel()
    return {"samples": samples, "states": states, "bytes": record.bytes, "ratio_to_latents_alone": record.bytes / least}


def speed(threads: int) -> dict[str, object]:
    """Through Ray and bare: a sample of each prompt."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as actors do, so that the comparison is fair
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run_dir={folder}/run", f"resources.teacher.cpus={threads}", "source.noise.draws_per_row=1",
            "source.shard_rows=8", "evaluate.held_out=0.000001",
        ]  # fmt: skip
        return measure_capture(resolve_paths(load_config([str(CONFIG)], overrides)), threads)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("cache", "speed"), default="cache")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    if options.what == "speed":
        write("trajectories_speed", {"threads": options.threads, **speed(options.threads)})
        return
    result = {
        "labels": {name: labels(*settings) for name, settings in SAMPLERS.items()},
        "size": {name: size(*settings) for name, settings in SHAPES.items()},
        "wanted": {"largest_error_of_sigma": 1e-6, "ratio_to_latents_alone": 1.02},
    }
    write("trajectories", result)


if __name__ == "__main__":
    main()
