"""A run folder stays that of the configuration that made what is in it, and a refused command changes nothing there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import tiny_config

from raydistill import pipeline
from raydistill.claim import alone, claim, require_own
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.storage import Store
from raydistill.train.job import PhaseJob

FOLDERS = ["phases/distil", "phases/tune"]


def two_phases(folder: Path, **changes: object) -> RunConfig:
    """A run of two phases; `changes` by dotted key."""
    first = tiny_config(folder).phases[0].model_dump(mode="json")
    plain = tiny_config(folder, phases=[first, {**first, "name": "tune"}]).model_dump(mode="json")
    for key, value in changes.items():
        at: object = plain
        *path, last = key.split(".")
        for name in path:
            at = at[int(name)] if isinstance(at, list) else at[name]  # type: ignore[index]
        at[last] = value  # type: ignore[index]
    return RunConfig.model_validate(plain)


@pytest.fixture
def half_trained(tmp_path: Path) -> Path:
    """A run folder whose first phase is done and whose second has a checkpoint."""
    store = Store(tmp_path / "run")
    claim(store, two_phases(tmp_path))
    for name in ("init/student.json", f"{FOLDERS[0]}/final/phase.json", f"{FOLDERS[1]}/checkpoints/step-00000010.json"):
        store.publish(name, "{}")
    return tmp_path


def test_a_job_goes_on_after_an_edit_and_in_another_session_though_its_folder_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "01")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "shared"))
    store, found = Store(tmp_path / "shared/run"), []
    for session, package, data in (("a", "11", "x"), ("b", "11", "x"), ("b", "2f", "x"), ("b", "2f", "y")):
        folder = tmp_path / f"ray/session_{session}/runtime_resources/working_dir_files/_ray_pkg_{package}"
        for name in (f"{data}/a.txt", "teacher/config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        monkeypatch.chdir(folder)
        model = {"library": "transformers", "source": "./teacher"}
        found.append(resolve_paths(two_phases(tmp_path, **{"source.paths": [f"{data}/*.txt"], "student.model": model})))
    first, *others, changed = found
    assert len({config.source.paths for config in (first, *others)}) == 3
    assert len({config.student.model.source for config in (first, *others)}) == 3
    claim(store, first)
    for name in ("init/student.json", f"{FOLDERS[0]}/checkpoints/step-00000010.json"):
        store.publish(name, "{}")
    for config in others:
        require_own(store, config, FOLDERS)
        jobs = [PhaseJob(c, c.phases[0], str(tmp_path), FOLDERS[0], "inputs-1", {}, "s") for c in (first, config)]
        assert jobs[0].settings() == jobs[1].settings()
    with pytest.raises(ConfigError, match=r"source\.paths\.0: it has x/\*\.txt, this configuration y/\*\.txt"):
        require_own(store, changed, FOLDERS)


REFUSED = [
    {"phases.0.optimizer.student.lr": 1.0},
    {"phases.0.checkpoint.best_metric": "loss", "evaluate.every_steps": 2},
    {"phases.1.recipe.alpha": 0.5},
    {"phases.1.batch.global_size": 16},
    {"source.seq_len": 16},
    {"seed": 5},
]
ALLOWED = [
    {"phases.0.checkpoint.every_steps": 3, "phases.0.batch.micro_size": 2, "phases.0.log_every": 1},
    {"phases.1.optimizer.student.lr": 1.0, "phases.1.steps": 99, "phases.1.start_from": "weights"},
    {"phases.1.checkpoint.best_metric": "loss", "evaluate.every_steps": 2},
    {"resources.train.cpus": 3, "tracking.wandb_project": "x", "run_dir": "elsewhere"},
]


@pytest.mark.parametrize("changes", REFUSED)
def test_a_refused_command_leaves_config_json_as_it_was(half_trained: Path, changes: dict[str, object]) -> None:
    before = (half_trained / "run/config.json").read_bytes()
    with pytest.raises(ConfigError, match=f"  {next(iter(changes))}: it has .*, this configuration"):
        pipeline.run(two_phases(half_trained, **changes))
    assert (half_trained / "run/config.json").read_bytes() == before


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_does_not_touch_the_weights_that_are_there_may_change(
    half_trained: Path, changes: dict[str, object]
) -> None:
    require_own(Store(half_trained / "run"), two_phases(half_trained, **changes), FOLDERS)


def test_a_phase_that_is_not_begun_may_change_in_everything(half_trained: Path) -> None:
    (half_trained / "run" / FOLDERS[1] / "checkpoints/step-00000010.json").unlink()
    changes = {"phases.1.recipe.alpha": 0.5}
    require_own(Store(half_trained / "run"), two_phases(half_trained, **changes), FOLDERS)


def test_models_that_cannot_be_read_leave_config_json_as_it_was(tmp_path: Path) -> None:
    claim(Store(tmp_path / "run"), two_phases(tmp_path))
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(DataError):  # there is no teacher in the folder
        pipeline.run(two_phases(tmp_path, seed=9))
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_a_truncated_config_json_is_named(half_trained: Path) -> None:
    path = half_trained / "run/config.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"run/config\.json is damaged: .*Put back what was there"):
        pipeline.run(two_phases(half_trained))


def test_exports_of_other_runs_are_found_wherever_they_are_named(tmp_path: Path) -> None:
    other = tiny_config(tmp_path, run_dir=str(tmp_path / "other"))
    (tmp_path / "other.yaml").write_text(other.model_dump_json())
    (tmp_path / "other/export").mkdir(parents=True)
    source = f"run://{tmp_path}/other.yaml"
    model = {"library": "transformers", "source": source}
    student = {"model": model, "init": {"kind": "checkpoint", "path": source}}
    config = pipeline.with_exports(tiny_config(tmp_path, student=student))
    export = f"{tmp_path}/other/export"
    assert (config.student.model.source, config.student.init.path) == (export, export)


HOLD = """
import sys
from raydistill.claim import alone
with alone(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("where", ["{folder}/run", "file://{folder}/run", "s3://bucket/{name}/run?region=us-east-1"])
def test_one_command_at_a_time_works_in_a_folder_and_a_killed_one_is_not_in_the_way(tmp_path: Path, where: str) -> None:
    run_dir = where.format(folder=tmp_path, name=tmp_path.name)
    another = run_dir.replace("/run", "/another")
    command = [sys.executable, "-c", HOLD, run_dir]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"Process {holder.pid} on .* is working in .*/run"), alone(run_dir):
            pass
        with alone(another):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with alone(run_dir):
        assert True, "the hold went with its process"
    with alone(run_dir):
        assert True, "and at the end of the block"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written_is_said_in_words(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match=r"cannot write .*/run/\.lock: .*Permission denied"), alone(f"{tmp_path}/run"):
        pass


def test_a_file_in_the_place_of_the_folder_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: wanted a folder, found .*/run: "), alone(str(tmp_path / "run")):
        pass
