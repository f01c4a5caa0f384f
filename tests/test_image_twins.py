"""The tiny image configurations, shortened, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel, WanTransformer3DModel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)
SHORT = (
    "source.max_rows=60", "source.noise.draws_per_row=2", "phases.0.steps=6", "phases.0.log_every=1",
    "evaluate.every_steps=3", "evaluate.images.samples=2", "evaluate.images.sample_steps=4",
)  # fmt: skip


def run(config: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydistill.run", config, f"run_dir={folder}", *SHORT, *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)


# A student that begins as a part of its teacher may lose in its first steps, but less than without the teacher.
@pytest.mark.parametrize(("name", "worse"), [("sdxl_multi_teacher", "student_init"), ("sdxl_vae", "student_ce")])
def test_it_ends_in_a_student_that_diffusers_loads_and_a_report_with_images(
    name: str, worse: str, tmp_path: Path
) -> None:
    done = run(f"configs/tiny/{name}.yaml", tmp_path / "run")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    student = UNet2DConditionModel.from_pretrained(tmp_path / "run/export", subfolder="unet")
    assert sum(p.numel() for p in student.parameters()) == metrics["student"]["parameters"]
    assert metrics["student"]["mse_to_teacher"] < metrics[worse]["mse_to_teacher"]
    assert (tmp_path / "run/report.html").read_text().count("data:image/png;base64,") >= 3 * 2
    again = run(f"configs/tiny/{name}.yaml", tmp_path / "run")
    assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
    assert "encode images" not in again.stdout + again.stderr, "the second command found everything done"


def test_two_styles_teach_a_student_of_a_quarter_of_their_size(tmp_path: Path) -> None:
    done = run(
        "configs/tiny/sdxl_multi_teacher.yaml", tmp_path / "run", "cache.store=average", "evaluate.baseline=false"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 4 * metrics["student"]["parameters"] <= metrics["teacher"]["parameters"]
    # The weighted teacher variance is the least loss that any student can reach; two styles are not the same.
    assert 0 < metrics["teacher"]["mse_to_teacher"] < metrics["student"]["mse_to_teacher"]
    assert {"mse_to/google", "mse_to/twitter"} <= set(metrics["student"])


def test_an_image_student_begins_with_the_weights_of_a_video_transformer(tmp_path: Path) -> None:
    done = run("configs/tiny/wan_lite_projection.yaml", tmp_path / "run")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((tmp_path / "run/init/projection.json").read_text())
    assert report["coverage"] == 1.0
    assert [block["teacher"] for block in report["blocks"]] == [0, 2, 5, 7]
    assert 0 < report["output_error"] < 1  # 1 is a student that predicts nothing
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    student = WanTransformer3DModel.from_pretrained(tmp_path / "run/export", subfolder="transformer")
    assert sum(p.numel() for p in student.parameters()) == metrics["student"]["parameters"]
    assert 6 * metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert metrics["teacher"]["mse_to_teacher"] < metrics["student"]["mse_to_teacher"]
