"""The tiny video configuration, shortened and with a teacher of random weights, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tiny_denoisers import save_pipeline

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)
SHORT = (
    "source.noise.draws_per_row=1", "source.max_rows=16", "source.shard_rows=4", "teachers.0.steps=3",
    "phases.0.steps=6", "phases.0.batch.global_size=4", "phases.0.batch.micro_size=4", "phases.1.steps=6",
    "evaluate.max_rows=2", "evaluate.every_steps=3", "evaluate.held_out=0.3",
)  # fmt: skip


def test_trajectories_causal_kd_and_self_forcing_are_one_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = json.loads((ROOT / "configs/tiny/models/clips/transformer/config.json").read_text())
    teacher = WanTransformer3DModel.from_config(config)
    save_pipeline(teacher, tmp_path / "teacher", FlowMatchEulerDiscreteScheduler(shift=3.0), inside="transformer")
    command = [
        sys.executable, "-m", "raydistill.run", "configs/tiny/video_self_forcing.yaml", f"run_dir={tmp_path}/run",
        f"teachers.0.model.source={tmp_path}/teacher", f"student.model.source={tmp_path}/teacher", *SHORT,
    ]  # fmt: skip

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout + done.stderr

    run()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["student"]["mse_to_teacher"] == metrics["student"]["mse_after/4"] > 0
    assert metrics["student_ema"]["rollout_frames"] == 21
    export = tmp_path / "run/export"
    student = WanTransformer3DModel.from_pretrained(export, subfolder="transformer")
    assert sum(p.numel() for p in student.parameters()) == metrics["student"]["parameters"]
    assert json.loads((export / "generator.json").read_text())["causal"]["chunk_frames"] == 3
    assert (tmp_path / "run/report.html").read_text().count("data:image/webp;base64,") == 2 * 3
    again = run()
    assert "encode prompts" not in again
    assert "train causal-kd" not in again
