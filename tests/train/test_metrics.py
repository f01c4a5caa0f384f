"""Where numbers go: cut back to the resumed step, whole lines only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from phases import phase_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydistill.config.schema import TrackingConfig
from raydistill.errors import ConfigError, OutOfSpace
from raydistill.storage import Store
from raydistill.train.metrics import JsonLines, Metrics, TensorBoard, flat, require_trackers


def test_lines_after_the_resumed_step_and_half_lines_are_cut_away(tmp_path: Path) -> None:
    old = [{"phase": p, "step": s} for p, s in (("a", 1), ("a", 9), ("b", 1), ("b", 2), ("b", 3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old) + '{"phase": "b", "st')
    log = JsonLines(Store(tmp_path), "b", 2)
    log.write({"phase": "b", "step": 3, "loss": 1.0})
    log.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [*old[:4], {"phase": "b", "step": 3, "loss": 1.0}]


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    job = phase_job(tmp_path)
    metrics = Metrics(job.metrics_store, "one", 0, job.config)
    path = Path(job.metrics_store.path("metrics.jsonl"))
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OutOfSpace, match="disk is full"):
        metrics.write(1, {"loss": 1.0})


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    board = TensorBoard(Store(tmp_path), "one", 0)
    board.write({"phase": "one", "step": 4, "loss": 2.0, "parts": {"kd/toy": 0.5}})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard/one"))
    events.Reload()
    assert {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]} == {
        "loss": [(4, 2.0)],
        "parts/kd/toy": [(4, 0.5)],
    }


def test_nested_numbers_get_names_with_slashes() -> None:
    assert flat({"phase": "x", "loss": 1, "lr": {"all": 0.5}, "ok": True}) == {"loss": 1.0, "lr/all": 0.5}


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_tracker_that_is_not_installed_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"package {package}, which is not installed"):
        require_trackers(TrackingConfig.model_validate({key: "mine"}))
