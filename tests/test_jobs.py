"""A run submitted as a Ray job: stopped, killed and submitted again; submitted while it runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobSubmissionClient
from test_reliability import (
    ENVIRONMENT,
    ROOT,
    content,
    head,
    losses,
    problem,
    trained,
    undisturbed,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.slow
__all__ = ["head", "problem", "undisturbed"]


def submission(head: str, config: Path, *options: str) -> list[str]:
    """The command that submits a run. What changes below its folder is not sent: Ray hashes that twice."""
    environment = config.with_name("environment.yaml")
    environment.write_text("{working_dir: ., excludes: [/run, /cache, /job.txt, /head.log]}")
    command = [sys.executable, str(ROOT / "cluster/submit.py"), "--address", head, *options]
    return [*command, "--runtime-env", str(environment), "--", sys.executable, "-m", "raydistill.run", config.name]


def submit(head: str, config: Path, *options: str) -> subprocess.Popen[str]:
    """The run as a job, followed by the submit script; its log is `job.txt` beside the configuration."""
    command = submission(head, config, *options)
    with config.with_name("job.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=ENVIRONMENT, cwd=config.parent)


def log(config: Path) -> str:
    return config.with_name("job.txt").read_text()


def kill_driver(config: Path) -> None:
    """Kill the process of the job that runs `config` in its unpacked working folder."""
    words = ["-m", "raydistill.run", config.name]
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-3:] == words and process.cwd() != str(config.parent)
    ]
    drivers = [process for process in found if "working_dir_files" in process.cwd()]
    assert len(drivers) == 1, found
    os.kill(drivers[0].pid, signal.SIGKILL)


@pytest.mark.fault(
    "a job is stopped in the teacher stage, killed in training, and submitted again each time",
    "no shard is built twice; same cache bytes, same fp32 weights to the bit, same losses",
)
def test_a_job_that_was_stopped_and_killed_goes_on_when_it_is_submitted_again(
    problem: Path, undisturbed: Path, tmp_path: Path, head: str
) -> None:
    config = write_config(problem, tmp_path)
    shards: Callable[[], list[Path]] = lambda: sorted(tmp_path.glob("cache/toy-*/records/*.json"))  # noqa: E731

    job = submit(head, config, "--id", "mine")
    wait_for(lambda: len(shards()) >= 3, job)
    JobSubmissionClient(head).stop_job("mine")
    assert job.wait(timeout=120) == 1
    assert "mine: STOPPED" in log(config)
    built = {path: path.stat().st_mtime_ns for path in shards()}
    assert trained(tmp_path) == 0

    job = submit(head, config, "--id", "mine")
    wait_for(lambda: trained(tmp_path) >= 50, job)
    kill_driver(config)
    assert job.wait(timeout=120) == 1
    assert "mine: FAILED" in log(config)

    job = submit(head, config, "--id", "mine")
    assert job.wait(timeout=400) == 0, log(config)[-3000:]
    assert re.search(r"continuing after step \d+", log(config))
    assert {path: path.stat().st_mtime_ns for path in built} == built, "no shard is built twice"
    assert content(tmp_path) == content(undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


def test_a_run_that_is_submitted_while_it_runs_is_refused_in_one_message_and_not_disturbed(
    problem: Path, undisturbed: Path, tmp_path: Path, head: str
) -> None:
    config = write_config(problem, tmp_path)
    first = submit(head, config, "--id", "first")
    wait_for(lambda: len(list(tmp_path.glob("cache/toy-*/records/*.json"))) >= 1, first)
    command = submission(head, config, "--id", "second")
    second = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=config.parent, check=False, timeout=300
    )
    assert first.poll() is None, "the first job ended before the second was refused"
    assert second.returncode == 2, second.stdout + second.stderr
    said = second.stdout + second.stderr
    assert re.search(r"raydistill: error: Process \d+ on \S+ \(the Ray job first\) is working in .*/run\. Let it", said)
    assert "Traceback" not in said
    assert first.wait(timeout=400) == 0, log(config)[-3000:]
    assert content(tmp_path) == content(undisturbed)
