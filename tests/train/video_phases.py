"""Phases on toy clips: a tiny causal Wan learns from another one, which is asked while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_denoisers import save_pipeline
from video_toys import CHANNELS, FLOW, SIDE, TEXT, TOKENS, causal_student, tiny_wan

from raydistill.cache.dense import dense_name, row_sha, write_dense
from raydistill.cache.ledger import Ledger
from raydistill.cache.shards import field_records, publish_record
from raydistill.config.schema import RunConfig
from raydistill.models.student import save_student
from raydistill.signals import Field, JsonValue
from raydistill.storage import Store
from raydistill.train.job import PhaseJob

FRAMES, ROWS, SHARD_ROWS = 5, 12, 6
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "self_forcing": {"kind": "self_forcing", "guidance_scale": 3.0, "critic_updates": 2,
                     "gan": {"features": ["blocks.1"], "weight": 0.1}},
    "causal_consistency": {"kind": "causal_consistency", "grid": 8},
    "teacher_forcing": {"kind": "teacher_forcing"},
}  # fmt: skip


def write_clips(folder: Path) -> str:
    """A finished inputs cache of clips below `folder`; its URI."""
    ledger = Ledger.below(Store(folder), "inputs", {"toy": "clips"})
    g = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, TOKENS, TEXT, generator=g)
    names = [dense_name(k) for k in range(ROWS // SHARD_ROWS)]
    for k, name in enumerate(names):
        latents = torch.randn(SHARD_ROWS, CHANNELS, FRAMES, SIDE, SIDE, generator=g)
        captions = [f"clip {i % 2}" for i in range(SHARD_ROWS)]
        tensors = {
            "latents": latents,
            "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).repeat(SHARD_ROWS, 1),
            "prompt_embeds": embeds,
            "prompt_index": torch.tensor([i % 2 for i in range(SHARD_ROWS)], dtype=torch.int32),
        }
        meta: dict[str, JsonValue] = {
            "kind": "inputs",
            "format": 1,
            "split": "train",
            "bucket": [SIDE, SIDE],
            "row_ids": [f"{k}/{i}" for i in range(SHARD_ROWS)],
            "row_sha": [row_sha(z, c) for z, c in zip(latents, captions, strict=True)],
            "captions": ["clip 0", "clip 1", ""],
        }
        publish_record(
            ledger.store, write_dense(ledger.store, name, tensors, meta=meta, split="train", rows=SHARD_ROWS)
        )
    fields = field_records({"latents": Field(torch.float32, ("channel", "frame", "height", "width"), "clean clips")})
    facts: dict[str, JsonValue] = {
        "latent_channels": CHANNELS, "vae_factor": 1, "scaling": "pixels", "text_width": TEXT, "pooled_width": 0,
        "text_tokens": TOKENS, "buckets": [[SIDE, SIDE]], "num_rows": {"train": ROWS},
    }  # fmt: skip
    ledger.finish(names, kind="inputs", parent=None, fields=fields, facts=facts, build={})
    return ledger.store.uri


def video_job(folder: Path, kind: str, *, name: str = "run", phase: Mapping[str, object] | None = None) -> PhaseJob:
    """A phase of 6 steps in fp32 in a run folder of its own; clips, teacher and student once per `folder`."""
    if not (folder / "init/student.json").exists():
        write_clips(folder / "cache")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        save_pipeline(tiny_wan(1), folder / "teacher", scheduler, inside="transformer")
        student: Any = causal_student(tiny_wan(2))
        student.scheduler_config, student.kept = dict(FLOW), None
        save_student(student, folder / "init")
    model = {"library": "diffusers", "source": str(folder / "teacher"), "dtype": "float32"}
    recipe = dict(RECIPES[kind])
    if kind != "teacher_forcing":
        recipe["real_score" if kind == "self_forcing" else "teacher"] = model
    players = ("student", "critic") if kind == "self_forcing" else ("student",)
    config = RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(folder / name),
            "source": {"kind": "videos", "paths": ["x"], "frames": FRAMES, "vae": "none",
                       "text_encoders": [{"source": "x"}]},
            "student": {"model": model, "generator": {"t_list": [1.0, 0.9, 0.5, 0.0], "causal": {"chunk_frames": 2}}},
            "phases": [
                {
                    "name": "one", "steps": 6, "recipe": recipe, "batch": {"global_size": 4, "micro_size": 2},
                    "optimizer": dict.fromkeys(players, OPTIMIZER), "precision": "fp32", "log_every": 1,
                    "ema": {"decay": 0.9}, "checkpoint": {"every_steps": 2}, **(phase or {}),
                }
            ],
            "evaluate": {"baseline": False},
        }
    )  # fmt: skip
    (inputs,) = (folder / "cache").iterdir()
    return PhaseJob(
        config, config.phases[0], run=str(folder / name), folder="phases/one", inputs=str(inputs),
        student=str(folder / "init"),
    )  # fmt: skip
