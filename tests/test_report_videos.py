"""What the page says of distillations that stop to improve."""

from __future__ import annotations

import json
from pathlib import Path

from raydistill.report import render_report
from raydistill.report.curves import convergence_words, read_log
from raydistill.report.images import feature_metrics, flattened
from raydistill.storage import Store


def run_of(folder: Path, **errors: list[float]) -> Store:
    """A run folder whose phases have these errors at steps 10, 20 …"""
    lines = [
        {"phase": phase, "step": 10 * (i + 1), "loss": 1.0, "evaluation": {"mse_to_teacher": error}}
        for phase, values in errors.items()
        for i, error in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Store(folder)


def test_each_phase_is_told_to_have_converged_or_still_to_fall(tmp_path: Path) -> None:
    run = run_of(tmp_path, kd=[8, 4, 2, 1, 0.5], causal_kd=[3, 1, 1, 1, 1, 1], short=[2, 1])
    first, second = convergence_words(read_log(run, "metrics.jsonl"))
    assert first.startswith("kd: ")
    assert "still falls, by 87.5" in first
    assert first.endswith("has not converged.")
    assert second.startswith("causal_kd: ")
    assert "has converged at step 50" in second
    assert "it fell by less than 1" in second
    page = render_report(run)
    assert first in page
    assert second in page


def test_errors_by_number_of_steps_and_motion_have_words(tmp_path: Path) -> None:
    line = {"mse_to_teacher": 0.1, "mse_after/1": 0.3, "mse_after/2": 0.1, "seam_change": 1.5, "rollout_drift": 0.02}
    (tmp_path / "metrics.json").write_text(json.dumps({"student": line}))
    page = render_report(Store(tmp_path))
    for title in ("Error after 1 step<", "Error after 2 steps<", "Change at seams", "Drift"):
        assert title in page, title


def test_runs_without_such_an_error_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "a", "step": 1, "loss": 1.0}) + "\n")
    assert convergence_words(read_log(Store(tmp_path), "metrics.jsonl")) == []


def test_distances_of_videos_say_what_they_compare() -> None:
    found = {"extractor": "i3d", "things": "videos", "generated": 16, "held_out": 12, "dimensions": 400,
             "frechet_distance": 7.0, "reliable": False, "kernel_distance": 0.5}  # fmt: skip
    line = {"video_features": found, "video_features_to_teacher": {**found, "frechet_distance": 3.0}}
    rows = feature_metrics([{}, line])
    assert [row.title for row in rows] == ["Fréchet distance · i3d", "Kernel distance · i3d"] * 2
    assert rows[0].meaning == "16 generated videos and 12 held-out ones; too few for 400 features"
    assert rows[2].meaning.startswith("16 generated videos and 12 of the teacher's")
    assert [flattened(line)[row.name] for row in rows] == [7.0, 0.5, 3.0, 0.5]
