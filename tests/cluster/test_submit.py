"""The submit script against a stand-in for Ray's job server."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

SCRIPT = Path(__file__).parents[2] / "cluster/submit.py"


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_submit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    return module


class Server:
    """A job whose log is told in pieces; after each piece of `broken`, the connection breaks."""

    def __init__(self, status: JobStatus, code: int | None = None, *, broken: tuple[int, ...] = (), jobs: Any = ()):
        self.status, self.code, self.broken, self.jobs = status, code, list(broken), list(jobs)
        self.submitted: list[dict[str, Any]] = []
        self.deleted: list[str] = []

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return job["submission_id"] or "raysubmit_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for place, piece in enumerate(["one\n", "two\n", "three\n"]):
            yield piece
            if self.broken and self.broken[0] == place:
                self.broken.pop(0)
                raise RuntimeError("the connection broke")

    def get_job_status(self, job: str) -> JobStatus:
        return self.status

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(message="why", driver_exit_code=self.code)

    def list_jobs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(submission_id=name, status=status) for name, status in self.jobs]

    def delete_job(self, name: str) -> None:
        self.deleted.append(name)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, server: Server, *arguments: str) -> int:
    monkeypatch.setattr(module, "JobSubmissionClient", lambda address: server)
    return int(module.main([*arguments, "--", "python", "-m", "raydistill.run", "a b.yaml"]))


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (3, 3), (1, 1), (None, 1), (-9, 1), (137, 1)])
def test_the_status_of_a_failed_run_is_passed_on(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int | None, expected: int
) -> None:
    assert run(submit, monkeypatch, Server(JobStatus.FAILED, code)) == expected


def test_a_run_that_is_done_ends_with_zero_and_its_command_keeps_its_words(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(JobStatus.SUCCEEDED, 0)
    assert run(submit, monkeypatch, server) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert server.submitted[0]["entrypoint"] == "python -m raydistill.run 'a b.yaml'"


def test_each_line_is_shown_once_when_the_connection_breaks(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(submit, monkeypatch, Server(JobStatus.SUCCEEDED, 0, broken=(1, 0, 2))) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_server_that_stays_silent_is_given_up(submit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", -1.0)
    assert run(submit, monkeypatch, Server(JobStatus.RUNNING, broken=(0,) * 9)) == 1


def test_a_running_job_of_the_same_name_is_followed_and_not_started_twice(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(JobStatus.SUCCEEDED, 0, jobs=[("mine", JobStatus.RUNNING)])
    assert run(submit, monkeypatch, server, "--id", "mine") == 0
    assert server.submitted == []


def test_an_ended_job_gives_its_name_to_the_next(submit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(JobStatus.SUCCEEDED, 0, jobs=[("mine", JobStatus.FAILED)])
    assert run(submit, monkeypatch, server, "--id", "mine") == 0
    assert server.deleted == ["mine"]
    assert [job["submission_id"] for job in server.submitted] == ["mine"]


def test_no_server_is_one_line_and_status_two(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(submit, "JobSubmissionClient", refuse)
    assert submit.main(["--address", "http://127.0.0.1:1", "--", "true"]) == 2
    assert capsys.readouterr().err == "http://127.0.0.1:1: nobody listens\n"


def test_a_missing_token_is_said_and_status_two(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str) -> None:
        raise AuthenticationError("Missing authentication token")

    monkeypatch.setattr(submit, "JobSubmissionClient", refuse)
    assert submit.main(["--address", "http://127.0.0.1:1", "--", "true"]) == 2
    assert "Missing authentication token" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "a: [", "text", ""])
def test_a_runtime_environment_that_cannot_be_read_is_said_before_anything_is_asked(
    submit: ModuleType, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "env.yaml"
    if content is not None:
        file.write_text(content)
    assert submit.main(["--runtime-env", str(file), "--", "true"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("--runtime-env: ")
    assert str(file) in said


def test_the_token_and_the_environment_of_the_caller_are_not_sent(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted")
    server = Server(JobStatus.SUCCEEDED, 0)
    run(submit, monkeypatch, server, "--runtime-env", str(SCRIPT.with_name("runtime_env.yaml")))
    assert "planted" not in repr(server.submitted)
    assert server.submitted[0]["runtime_env"]["working_dir"] == "."
