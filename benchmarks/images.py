"""Image teachers through Ray beside the bare teacher, and a cached student step beside one on tensors in memory.

    python benchmarks/images.py [--threads N] [--steps 40]

The teacher is the small one of configs/tiny/sdxl_multi_teacher.yaml. Capture: samples per second from the first shard's
record to the last one's, against the same teacher called on the same batches in this process, with as many threads;
start-up is told apart. By default a core is left for what is not the teacher. Step: forward, loss and backward of that
configuration's student on batches that a `Loader` reads from the cache while the step before is computed, against the
same batches kept in memory, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from machine import write

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.dense import read_dense
from raydistill.cache.dense_batch import cut_draws, denoiser_batch, draws_of
from raydistill.cache.loader import Loader
from raydistill.cache.open import open_dataset
from raydistill.cache.order import Order, Sampler
from raydistill.cache.shards import RECORDS
from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import RunConfig
from raydistill.memory import keep_freed_memory
from raydistill.models.student import build_student, load_student, save_student
from raydistill.recipes import make_recipe
from raydistill.recipes.base import TeacherView
from raydistill.signals import Draws
from raydistill.storage import Store
from raydistill.teachers import build_teacher

CONFIG = Path(__file__).parents[1] / "configs/tiny/sdxl_multi_teacher.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as actors and training do, so that the comparison is fair
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run_dir={folder}/run", f"resources.teacher.cpus={options.threads}", "source.shard_rows=32",
            "evaluate.held_out=0.000001",
        ]  # fmt: skip
        config = resolve_paths(load_config([str(CONFIG)], overrides))
        capture, inputs, signal = measure_capture(config, options.threads)
        steps = measure_steps(config, inputs, signal, options.steps, Path(folder))
    write("images", {"threads": options.threads, "capture": capture, "student_step": steps})


def measure_capture(config: RunConfig, threads: int) -> tuple[dict[str, object], Store, Store]:
    """The pipeline, then the bare teacher of denoisers on its batches."""
    caches, teacher_config, noise = Store(config.cache.dir), config.teachers[0], config.latents.noise
    ray.init(address="local", num_cpus=threads + 1, log_to_driver=False, include_dashboard=False)
    inputs, manifest = build_inputs(config, caches)
    start = time.time()
    signal, _ = build_signal(config, teacher_config, inputs, manifest, caches)
    ray.shutdown()
    records = sorted(Path(signal.path(RECORDS)).iterdir(), key=lambda path: path.stat().st_mtime)
    times = [path.stat().st_mtime for path in records]
    names = [path.name.removesuffix(".json") for path in records]
    samples = {record.name: record.rows * noise.draws_per_row for record in manifest.shards}
    through_ray = sum(samples[name] for name in names[1:]) / (times[-1] - times[0])
    teacher = build_teacher(teacher_config, noise)
    batches = []
    for name in names[1:]:
        draws = draws_of(read_dense(inputs, name), noise.draws_per_row)
        batches += [denoiser_batch(part, noise) for part in cut_draws(draws, teacher_config.batch_rows)]
    teacher(batches[0])
    begin = time.perf_counter()
    for batch in batches:
        teacher(batch)
    bare = sum(samples[name] for name in names[1:]) / (time.perf_counter() - begin)
    found: dict[str, object] = {
        "shards": len(names),
        "samples_per_second": {"through_ray": through_ray, "bare_teacher": bare},
        "share_of_bare_teacher": through_ray / bare,
        "start_up_seconds": times[0] - start - samples[names[0]] / through_ray,
        "wanted": "share at least 0.9",
    }
    return found, inputs, signal


def measure_steps(config: RunConfig, inputs: Store, signal: Store, steps: int, folder: Path) -> dict[str, object]:
    """Cached against in memory, in turns of one step each."""
    phase, name = config.phases[0], config.teachers[0].name
    save_student(build_student(config.student, seed=0), folder / "init")
    student = load_student(folder / "init")
    fields = {name: ("prediction",)}
    dataset = open_dataset(config, inputs, {name: signal}, split="train", fields=fields)
    view = TeacherView(name, 1.0, dataset.facts(name))
    recipe = make_recipe(phase.recipe, student, {name: view}, config.source)
    order = Order(dataset.shard_rows, seed=0, window=64, bucket=dataset.buckets)
    size = phase.batch.global_size
    loader = Loader(dataset, Sampler(order, size), rank=0, world_size=1, micro_size=size, first_step=0, end_step=steps)
    seconds: dict[str, list[float]] = {"cached": [], "in_memory": []}
    begin = time.perf_counter()
    for item in loader:
        batch = item.micro_batches[0]
        _step(recipe, batch, item.step, item.positions[0])
        seconds["cached"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        _step(recipe, batch, item.step, item.positions[0])
        seconds["in_memory"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
    median = {kind: statistics.median(values[2:]) for kind, values in seconds.items()}
    return {
        "samples": size,
        "parameters": sum(p.numel() for p in student.parameters()),
        "median_seconds": median,
        "ratio": median["cached"] / median["in_memory"],
        "wanted": "ratio at most 1.05",
    }


def _step(recipe, batch, step: int, positions: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    draws = Draws(seed=0, phase="benchmark", step=step, positions=positions)
    loss = recipe.loss("student", batch, draws)
    sum(part.weight * part.sum for part in loss.parts.values() if part.weight).backward()
    recipe.student.zero_grad()


if __name__ == "__main__":
    main()
