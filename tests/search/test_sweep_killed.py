"""Real sweeps, killed in the middle: the same command ends them, without asking a teacher again."""

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
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_ADDRESS", None)
COUNTING = """\
import importlib.util, os, sys, time

AT = "raydistill.teachers."
TEACHERS = {AT + "logits": "TopKLogitsTeacher", AT + "noise_prediction": "NoisePrediction"}


def counted(call):
    def counting(self, batch):
        with open(os.environ["TEACHER_CALLS"], "a") as file:
            file.write(f"{time.time()}\\n")
        return call(self, batch)

    return counting


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in TEACHERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            teacher = getattr(module, TEACHERS[name])
            teacher.__call__ = counted(teacher.__call__)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
"""sitecustomize.py of every process of a sweep, Ray's among them: writes down when a teacher was called."""
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


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A command of a run in `folder`/run; calls of teachers are written down in `folder`/calls.txt."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(COUNTING)
    log = (folder / "log.txt").open("a")
    command = [sys.executable, "-m", "raydistill.run", *words]
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder / "site"), "TEACHER_CALLS": str(folder / "calls.txt")}
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, cwd=ROOT)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-3000:]


def trials(folder: Path) -> dict[str, dict[str, object]]:
    files = folder.glob("run/sweep/trials/*/trial.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def ended(folder: Path) -> set[str]:
    return {name for name, trial in trials(folder).items() if trial["status"] != "open"}


def kill_once(folder: Path, at_least: int, *command: str) -> None:
    """Kill the sweep when so many trials have ended and another one has made a checkpoint."""
    process = start(folder, *command)
    deadline = time.monotonic() + 500
    while True:
        assert process.poll() is None, log(folder)
        assert time.monotonic() < deadline, "the sweep never came to the point where it was to be killed"
        going = {p.parents[3].name for p in folder.glob("run/sweep/trials/*/phases/distil/checkpoints/*.json")}
        if len(ended(folder)) >= at_least and going - ended(folder):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_teachers_ran_only_before_the_trials(folder: Path) -> None:
    calls = [float(line) for line in (folder / "calls.txt").read_text().splitlines()]
    began = json.loads((folder / "run/sweep/began.json").read_text())
    assert calls, "the teachers filled the caches"
    assert max(calls) < began, f"{sum(call > began for call in calls)} calls of teachers after the first trial began"


@pytest.mark.fault("a sweep is killed", "goes on; no teacher is asked again")
def test_a_killed_sweep_goes_on_and_asks_no_teacher(config: Path) -> None:
    folder = config.parent
    command = (str(config), "--tune", str(folder / "space.yaml"))
    kill_once(folder, 1, *command)
    first = {name: trials(folder)[name] for name in ended(folder)}
    manifests = {path: path.read_bytes() for path in folder.glob("cache/*/manifest.json")}
    kill_once(folder, 4, *command)
    assert start(folder, *command).wait(timeout=600) == 0, log(folder)

    assert_teachers_ran_only_before_the_trials(folder)
    found = json.loads((folder / "run/sweep.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["done"] * 8
    assert {name: trials(folder)[name] for name in first} == first, "a trial that had ended was touched again"
    assert {path: path.read_bytes() for path in manifests} == manifests
    accounting = found["accounting"]
    assert accounting["teacher_shards_after_first_trial"] == 0
    assert accounting["teacher_builds"] == 1
    assert accounting["flops"]["saved"] > 1
    best = min(found["trials"], key=lambda trial: trial["metrics"]["perplexity"])
    assert found["best"] == best["id"]
    run = folder / "run"
    assert "<svg" in (run / "sweep.html").read_text()
    assert len((run / "sweep.csv").read_text().splitlines()) == 9
    measured = json.loads((run / "metrics.json").read_text())["student"]["perplexity"]
    assert measured == pytest.approx(best["metrics"]["perplexity"], rel=1e-6)
    assert (run / "export/config.json").exists()

    # A trial that was interrupted and went on has the numbers of one that nobody disturbed, from its own file.
    victim = next(trial for trial in found["trials"] if trial["id"] not in first)
    alone = run / f"sweep/trials/{victim['id']}/config.yaml"
    assert start(folder, str(alone), f"run_dir={folder}/alone").wait(timeout=600) == 0, log(folder)
    lines = [json.loads(line) for line in (folder / "alone/metrics.jsonl").read_text().splitlines()]
    last = [line["evaluation"] for line in lines if "evaluation" in line][-1]
    assert last == {name: victim["metrics"][name] for name in last}


def test_a_killed_sweep_over_the_weights_of_three_image_teachers_goes_on_and_asks_none(tmp_path: Path) -> None:
    space = (ROOT / "tune/teacher_weights.yaml").read_text()
    assert "steps: 5" in space
    (tmp_path / "space.yaml").write_text(space.replace("steps: 5", "steps: 3"))
    command = (
        "configs/tiny/sdxl_three_teachers.yaml", "--tune", f"{tmp_path}/space.yaml", f"run_dir={tmp_path}/run",
        f"cache.dir={tmp_path}/cache", "source.max_rows=40", "source.noise.draws_per_row=2", "phases.0.steps=6",
        "phases.0.batch={global_size: 8, micro_size: 8}", "phases.0.checkpoint.every_steps=2", "phases.0.log_every=2",
        "evaluate.every_steps=3", "evaluate.max_rows=4", "evaluate.images={samples: 2, sample_steps: 2}",
    )  # fmt: skip
    kill_once(tmp_path, 3, *command)
    first = {name: trials(tmp_path)[name] for name in ended(tmp_path)}
    assert start(tmp_path, *command).wait(timeout=600) == 0, log(tmp_path)

    assert_teachers_ran_only_before_the_trials(tmp_path)
    found = json.loads((tmp_path / "run/sweep.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["done"] * 10
    assert {name: trials(tmp_path)[name] for name in first} == first, "a trial that had ended was touched again"
    assert (found["accounting"]["teacher_builds"], found["accounting"]["teacher_shards_after_first_trial"]) == (3, 0)
    best = min(found["trials"], key=lambda trial: trial["metrics"]["mse_to_noise"])
    assert found["best"] == best["id"]
    assert len({trial["metrics"]["mse_to_noise"] for trial in found["trials"]}) > 7, "the weights make a difference"
    page = (tmp_path / "run/sweep.html").read_text()
    assert all(f">{name}</text>" in page for name in ("google", "twitter", "both"))
    assert page.count('<circle class="heat') == 10
    assert (tmp_path / "run/export/unet/diffusion_pytorch_model.safetensors").exists()
