"""A real sweep, killed in the middle: the same command ends it, without asking the teacher again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_pipeline import WORDS, tiny_config
from toys import save_model, tiny_llama

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)
SPACE = """\
searcher: grid
metrics: [perplexity, kl_to_teacher]
space:
  phases.0.recipe.alpha: {kind: grid, values: [0.3, 0.9]}
  phases.0.recipe.temperature: {kind: grid, values: [1.0, 2.0, 4.0, 8.0]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of a toy language model; its file."""
    save_model(tiny_llama(layers=4, hidden=64), tmp_path / "teacher")
    lines = [" ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "space.yaml").write_text(SPACE)
    phase = tiny_config(tmp_path).phases[0].model_dump(mode="json")
    run = tiny_config(
        tmp_path,
        phases=[phase | {"steps": 60, "checkpoint": {"every_steps": 10, "keep": 2}}],
        evaluate={"held_out": 0.1, "baseline": False, "sample_tokens": 2, "every_steps": 20},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    log = (config.parent / "log.txt").open("a")
    command = [sys.executable, "-m", "raydistill.run", str(config), *more]
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=ENVIRONMENT, cwd=config.parent)


def trials(config: Path) -> dict[str, dict[str, object]]:
    files = config.parent.glob("run/sweep/trials/*/trial.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def ended(config: Path) -> set[str]:
    return {name for name, trial in trials(config).items() if trial["status"] != "open"}


def kill_once(config: Path, at_least: int) -> None:
    """Kill the sweep when so many trials have ended and another one has made a checkpoint."""
    process = start(config, "--tune", "space.yaml")
    deadline = time.monotonic() + 500
    while True:
        assert process.poll() is None, (config.parent / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline, "the sweep never came to the point where it was to be killed"
        going = {p.parents[3].name for p in config.parent.glob("run/sweep/trials/*/phases/distil/checkpoints/*.json")}
        if len(ended(config)) >= at_least and going - ended(config):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_sweep_goes_on_and_asks_no_teacher(config: Path) -> None:
    kill_once(config, 1)
    first = {name: trials(config)[name] for name in ended(config)}
    manifests = {path: path.read_bytes() for path in config.parent.glob("cache/*/manifest.json")}
    kill_once(config, 4)
    assert start(config, "--tune", "space.yaml").wait(timeout=600) == 0, (config.parent / "log.txt").read_text()[-3000:]

    found = json.loads((config.parent / "run/sweep.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["done"] * 8
    assert {name: trials(config)[name] for name in first} == first, "a trial that had ended was touched again"
    assert {path: path.read_bytes() for path in manifests} == manifests
    accounting = found["accounting"]
    assert accounting["teacher_shards_after_first_trial"] == 0
    assert accounting["teacher_builds"] == 1
    assert accounting["flops"]["saved"] > 1
    best = min(found["trials"], key=lambda trial: trial["metrics"]["perplexity"])
    assert found["best"] == best["id"]
    run = config.parent / "run"
    assert "<svg" in (run / "sweep.html").read_text()
    assert len((run / "sweep.csv").read_text().splitlines()) == 9
    measured = json.loads((run / "metrics.json").read_text())["student"]["perplexity"]
    assert measured == pytest.approx(best["metrics"]["perplexity"], rel=1e-6)
    assert (run / "export/config.json").exists()

    # A trial that was interrupted and went on has the numbers of one that nobody disturbed, from its own file.
    victim = next(trial for trial in found["trials"] if trial["id"] not in first)
    alone = run / f"sweep/trials/{victim['id']}/config.yaml"
    assert start(alone, f"run_dir={config.parent}/alone").wait(timeout=600) == 0
    lines = [json.loads(line) for line in (config.parent / "alone/metrics.jsonl").read_text().splitlines()]
    last = [line["evaluation"] for line in lines if "evaluation" in line][-1]
    assert last == {name: victim["metrics"][name] for name in last}
