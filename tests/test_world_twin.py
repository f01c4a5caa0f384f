"""The shortened twin of the shipped world model: real games, every stage, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydistill.run import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_twin_runs_from_games_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("crafter")
    monkeypatch.chdir(ROOT)
    short = [f"phases.{i}.steps={steps}" for i, steps in enumerate((60, 60, 20, 5, 5))]
    overrides = [f"run_dir={tmp_path / 'run'}", "source.environment.episodes=24", "evaluate.worlds.clips=16", *short]
    assert main(["configs/tiny/world_model.yaml", *overrides]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["student"]["parameters"] * 10 <= metrics["teacher"]["parameters"]
    assert metrics["student"]["change_cosine"] > metrics["student_init"]["change_cosine"]
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert "data:image/gif" in (tmp_path / "run" / "report.html").read_text()
    # Six of its lines can be measured here; after so few steps some may fail.
    assert main(["configs/tiny/world_model.yaml", *overrides, "--stages", "checklist"]) in (0, 3)
