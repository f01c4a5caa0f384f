"""The submit script against a stand-in for Ray's job server."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
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

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, message="why", driver_exit_code=self.code)

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


class Http:
    """Ray's job server on a real port, for one job; `refuse` says with what status a request is turned away, if any.

    `refuse` is told the path and how often it was asked for before.
    """

    def __init__(self, refuse: Callable[[str, int], int | None] = lambda path, times: None) -> None:
        self.refuse = refuse
        self.asked: dict[str, int] = {}

    @web.middleware
    async def turn_away(self, request: web.Request, handler: Any) -> web.StreamResponse:
        times = self.asked.get(request.path, 0)
        self.asked[request.path] = times + 1
        status = self.refuse(request.path, times)
        return web.Response(status=status, text="turned away") if status else await handler(request)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})

    async def submit(self, request: web.Request) -> web.Response:
        return web.json_response({"job_id": "mine", "submission_id": "mine"})

    async def jobs(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def job(self, request: web.Request) -> web.Response:
        known = {"type": "SUBMISSION", "submission_id": "mine", "status": "FAILED", "entrypoint": "true"}
        return web.json_response({**known, "driver_exit_code": 3})

    async def log(self, request: web.Request) -> web.WebSocketResponse:
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        await stream.send_str("one\n")
        await stream.close()
        return stream

    @contextmanager
    def address(self) -> Iterator[str]:
        """Serve from another thread."""
        app = web.Application(middlewares=[self.turn_away])
        app.add_routes([web.get("/api/version", self.version), web.post("/api/jobs/", self.submit)])
        app.add_routes([web.get("/api/jobs/", self.jobs), web.get("/api/jobs/mine", self.job)])
        app.add_routes([web.get("/api/jobs/mine/logs/tail", self.log)])
        loop, runner = asyncio.new_event_loop(), web.AppRunner(app)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=20)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=20)
            loop.close()


@pytest.fixture
def empty(tmp_path: Path) -> list[str]:
    """Arguments for a job that sends no folder."""
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {}")
    return ["--runtime-env", str(file)]


def test_a_server_that_answers_503_for_a_while_is_waited_for(
    submit: ModuleType, empty: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Http(lambda path, times: 503 if "mine" in path and times < 2 else None).address() as address:
        assert submit.main(["--address", address, *empty, "--", "true"]) == 3
    assert capsys.readouterr().out == "one\n"


@pytest.mark.parametrize("path", ["/api/jobs/mine/logs/tail", "/api/jobs/mine"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_ends_it_at_once(
    submit: ModuleType, empty: list[str], capsys: pytest.CaptureFixture[str], path: str, status: int
) -> None:
    server = Http(lambda asked, times: status if asked == path else None)
    with server.address() as address:
        assert submit.main(["--address", address, *empty, "--", "true"]) == 2
    said = capsys.readouterr().err
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token; mine goes on" in said
    assert server.asked[path] == 1


@pytest.mark.parametrize("status", [401, 403, 500, 503])
@pytest.mark.parametrize("path", ["/api/version", "/api/jobs/"])
def test_a_server_that_takes_no_job_is_said_and_status_two(
    submit: ModuleType, empty: list[str], capsys: pytest.CaptureFixture[str], status: int, path: str
) -> None:
    with Http(lambda asked, times: status if asked == path else None).address() as address:
        assert submit.main(["--address", address, *empty, "--id", "mine", "--", "true"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(address)
    assert ("RAY_AUTH_TOKEN" in said) == (status in (401, 403))


@contextmanager
def closing() -> Iterator[int]:
    """The port of a tunnel without an other end: it takes connections and closes them."""

    def close_all() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=close_all)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=20)


def test_a_tunnel_that_accepts_and_closes_is_a_disconnect(
    submit: ModuleType, empty: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", -1.0)
    server = Http()
    with server.address() as address, closing() as port:
        client = submit.JobSubmissionClient(address)
        client._address = f"http://127.0.0.1:{port}"
        assert submit.follow(client, "mine") == 1
        assert submit.main(["--address", client._address, *empty, "--", "true"]) == 2
    assert "no answer" in capsys.readouterr().err
