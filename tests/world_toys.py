"""A toy game whose next frame is known, its caches without Ray, and world models of a few thousand numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.episode_inputs import FIELDS, EpisodeWorker, plan_episodes
from raydistill.cache.ledger import Ledger, read_description
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import field_records
from raydistill.cache.signal_job import SignalJob
from raydistill.cache.world_signal import WorldWorker
from raydistill.config.schema import RunConfig
from raydistill.config.world import WorldSizes
from raydistill.models.world import WorldNetwork, random_world
from raydistill.models.world.files import save_world
from raydistill.signals import JsonValue
from raydistill.storage import Store
from raydistill.teachers import build_teacher

SIDE, CELL = 12, 4
MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
"""Rows and columns that each action moves the block by; 0 stays."""
SIZES = WorldSizes(
    frame_size=(SIDE, SIDE), num_actions=5, patch=CELL, tokenizer_width=8, tokenizer_blocks=0, codebook_size=8,
    code_width=4, width=16, layers=2, heads=2, context=8,
)  # fmt: skip
TEACHER = SIZES.model_copy(update={"width": 24, "tokenizer_width": 12, "layers": 2})
PHASE: dict[str, Any] = {
    "name": "all", "steps": 3, "recipe": {"kind": "features"}, "batch": {"global_size": 4, "micro_size": 4},
    "optimizer": {"student": {"lr": 1e-3}}, "precision": "fp32", "log_every": 1,
}  # fmt: skip


class _Tally:
    """The part of a Ray actor's handle that workers use."""

    class _Set:
        def remote(self, shard: str, units: int) -> None:
            """Nobody watches."""

    set = _Set()


def block_game(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [steps + 1, 12, 12, 3] of a red block on a ring of 3 × 3 cells, and the actions that move it."""
    draws = np.random.default_rng(seed)
    actions = draws.integers(5, size=steps)
    place, frames = draws.integers(3, size=2), []
    for step in range(steps + 1):
        frame = np.full((SIDE, SIDE, 3), 40, np.uint8)
        row, column = place * CELL
        frame[row : row + CELL, column : column + CELL] = (230, 60, 60)
        frames.append(frame)
        if step < steps:
            place = (place + MOVES[actions[step]]) % 3
    return np.stack(frames), actions


def write_episodes(folder: Path, number: int = 6, steps: int = 9) -> Path:
    """Episodes of the toy game as npz files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        frames, actions = block_game(steps, seed=i)
        np.savez(folder / f"episode-{i:02}.npz", frames=frames, actions=actions)
    return folder


def teacher_folder(folder: Path, *, seed: int = 1) -> Path:
    """An untrained teacher."""
    save_world(random_world(TEACHER, seed=seed), folder)
    return folder


def run_config(folder: Path, **changes: Any) -> RunConfig:
    """A run on toy episodes below `folder`, with one teacher; `changes` replace its sections."""
    sections: dict[str, Any] = {
        "name": "toy",
        "run_dir": str(folder / "run"),
        "cache": {"dir": str(folder / "caches")},
        "source": {
            "kind": "episodes", "paths": [str(folder / "episodes")], "frame_size": [SIDE, SIDE], "num_actions": 5,
            "clip_frames": 5, "shard_episodes": 2,
        },
        "teachers": [teacher_section(folder)],
        "student": {"model": {"library": "world", "sizes": SIZES.model_dump(mode="json")}, "init": {"kind": "random"}},
        "phases": [PHASE],
        "evaluate": {"held_out": 0.3, "worlds": {"clips": 8, "strips": 1, "probe_steps": 20}},
    }  # fmt: skip
    return RunConfig.model_validate({**sections, **changes})


def teacher_section(folder: Path, **changes: Any) -> dict[str, Any]:
    """The section of the toy teacher, with a tap of every kind."""
    taps = {
        "latents": "encoder.latents", "block": "dynamics.blocks.1",
        "space": {"module": "dynamics.blocks.0.spatial.map", "kind": "spatial"},
        "time": {"module": "dynamics.blocks.0.temporal.map", "kind": "temporal"},
    }  # fmt: skip
    model = {"library": "world", "source": str(folder / "teacher")}
    return {"name": "big", "signal": "features", "model": model, "taps": taps, "store_dtype": "float32", **changes}


def build_inputs(config: RunConfig) -> tuple[Store, Manifest]:
    """The inputs cache of `config`, without Ray."""
    ledger = Ledger.below(Store(config.cache.dir), "inputs", inputs_content(config))
    if ledger.finished:
        return ledger.store, ledger.finished
    ledger.begin()
    shards = plan_episodes(config.episodes, config.evaluate.held_out)
    worker = EpisodeWorker(config.episodes, shards, ledger.store.uri, _Tally())
    for name in shards:
        worker(name)
    _, facts = read_description(ledger.store)
    fields = field_records(FIELDS)
    return ledger.store, ledger.finish([*shards], kind="inputs", parent=None, fields=fields, facts=facts, build={})


def build_signal(config: RunConfig, index: int = 0) -> tuple[Store, Manifest]:
    """The signal cache of teacher `index`, without Ray."""
    inputs, manifest = build_inputs(config)
    teacher = config.teachers[index]
    ledger = Ledger.below(Store(config.cache.dir), teacher.name, signal_content(config, teacher, manifest))
    ledger.begin()
    facts: dict[str, JsonValue] = {"clip_frames": manifest.facts["clip_frames"]}
    job = SignalJob(
        teacher=teacher, factory=build_teacher, inputs=inputs.uri, store=ledger.store.uri, facts=facts,
        splits={record.name: record.split for record in manifest.shards}, expected={}, noise=None, threads=1,
        audit_rows=2, audit_tolerance=0.05,
    )  # fmt: skip
    worker = WorldWorker(job, _Tally())
    names = [record.name for record in manifest.shards]
    for name in names:
        worker(name)
    fields, described = read_description(ledger.store)
    finished = ledger.finish(
        names, kind="signal", parent=manifest.fingerprint, fields=fields, facts=described, build={}
    )
    return ledger.store, finished


def small_world(seed: int = 0) -> WorldNetwork:
    """A student of the toy game."""
    return random_world(SIZES, seed=seed)
