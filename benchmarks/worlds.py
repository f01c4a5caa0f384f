"""World models: a student of a fortieth of its teacher's parameters, and rollouts through Ray beside the teacher.

    python benchmarks/worlds.py speed [--threads N]
    python benchmarks/worlds.py rollout [--threads N]

`speed`: frames per second of play at batch 1 of two models with random weights, the teacher as large as a CPU can play,
in turns, the best of several. `rollout`: clips per second at which Ray writes the `rollout` signal of
configs/tiny/world_model.yaml, from the first shard's record to the last one's, against the same teacher called on the
same batches in this process with as many threads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import torch
from machine import write

from raydistill.config.world import WorldSizes
from raydistill.models.world import random_world
from raydistill.plan.worlds import count_world

FRAMES, TURNS = 9, 5
COMMON = {
    "frame_size": [64, 64], "num_actions": 8, "patch": 8, "stages": 1, "codebook_size": 512, "code_width": 16,
    "context": 16,
}  # fmt: skip
TEACHER = {**COMMON, "tokenizer_width": 96, "tokenizer_blocks": 2, "width": 512, "layers": 10, "heads": 8}
STUDENT = {**COMMON, "tokenizer_width": 24, "tokenizer_blocks": 1, "width": 120, "layers": 4, "heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "rollout"))
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "speed":
        write("worlds_speed", speed() | {"threads": options.threads})
    else:
        write("worlds_rollout", rollout(options.threads))


@torch.no_grad()
def speed() -> dict[str, object]:
    """Frames per second of both models, and their ratio beside those of parameters and FLOP."""
    found: dict[str, dict[str, float]] = {}
    plays: dict[str, Callable[[], object]] = {}
    for who, settings in (("teacher", TEACHER), ("student", STUDENT)):
        sizes = WorldSizes.model_validate(settings)
        network, counts = random_world(sizes, seed=0), count_world(sizes, FRAMES)
        frame, actions = torch.rand(1, 1, 3, *sizes.frame_size), torch.zeros(1, FRAMES - 1, dtype=torch.long)
        plays[who] = lambda network=network, frame=frame, actions=actions: network.rollout(frame, actions)
        plays[who]()
        found[who] = {"parameters": counts.parameters, "flops_per_frame": counts.frame_flops, "frames_per_second": 0.0}
    for _ in range(TURNS):
        for who, play in plays.items():
            start = time.perf_counter()
            play()
            rate = (FRAMES - 1) / (time.perf_counter() - start)
            found[who]["frames_per_second"] = max(found[who]["frames_per_second"], rate)
    teacher, student = found["teacher"], found["student"]
    ratios = {
        "parameters_ratio": teacher["parameters"] / student["parameters"],
        "flops_ratio": teacher["flops_per_frame"] / student["flops_per_frame"],
        "speed_ratio": student["frames_per_second"] / teacher["frames_per_second"],
    }
    return {**found, **ratios}


def rollout(threads: int) -> dict[str, object]:
    """Clips per second of the signal `rollout`, through Ray and bare."""
    import ray

    from raydistill.cache.build import build_inputs, build_signal
    from raydistill.cache.dense import read_dense
    from raydistill.cache.shards import RECORDS
    from raydistill.cache.world_signal import capture_clips
    from raydistill.config.load import load_config
    from raydistill.config.paths import resolve_paths
    from raydistill.config.world import RolloutTeacher
    from raydistill.storage import Store
    from raydistill.teachers import build_teacher

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run_dir={folder}", f"resources.teacher.cpus={threads}", "resources.teacher.actors=[1,1]"]
        config = resolve_paths(load_config(["configs/tiny/world_model.yaml"], [*overrides, "source.shard_episodes=4"]))
        caches = Store(config.cache.dir)
        ray.init(address="local", logging_level="ERROR", include_dashboard=False)
        inputs, manifest = build_inputs(config, caches)
        section = next(t for t in config.teachers if isinstance(t, RolloutTeacher))
        signal, made = build_signal(config, section, inputs, manifest, caches)
        ray.shutdown()
        stamps = sorted(os.stat(signal.path(f"{RECORDS}/{r.name}.json")).st_mtime for r in made.shards)
        rows = {record.name: record.rows for record in manifest.shards}
        through_ray = (sum(rows.values()) - rows[made.shards[0].name]) / (stamps[-1] - stamps[0])
        teacher = build_teacher(section, int(str(manifest.facts["clip_frames"])))
        done, spent = 0, 0.0
        for record in manifest.shards[:5]:
            shard = read_dense(inputs, record.name)
            start = time.perf_counter()
            capture_clips(teacher, shard, batch_rows=section.batch_rows, dtype=torch.float16, where="bare")
            spent, done = spent + time.perf_counter() - start, done + record.rows
    bare = done / spent
    return {"clips_per_second": {"ray": through_ray, "bare": bare}, "share": through_ray / bare, "threads": threads}


if __name__ == "__main__":
    main()
