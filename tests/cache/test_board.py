"""What workers tell a driver is shown there, and Ray's metrics have it."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from raydistill import progress
from raydistill.cache.board import Board, tell
from raydistill.progress import Progress


class Direct:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board()
        calls = (self.board.say, self.board.show, self.board.heard)
        self.say, self.show, self.heard = (type("Call", (), {"remote": staticmethod(f)}) for f in calls)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[Direct]:
    board = Direct()
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    end = tell(board)
    yield board
    end()
    assert not progress.watchers
    assert not progress.hearers


def test_the_board_has_the_last_state_and_every_line_once(direct: Direct) -> None:
    progress.say("continuing after step 3")
    with Progress("train one", total=10, unit="steps", done=3) as bar:
        bar.advance(1)
        bar.advance(6, note="loss 1.0")
    lines, states = direct.board.read()
    assert lines == ["continuing after step 3"]
    assert states == {"train one": (3, 10, 10, "steps", "loss 1.0")}
    assert direct.board.read() == ([], states)


def test_silent_workers_tell_nothing(direct: Direct) -> None:
    with Progress("train one", total=10, unit="steps", silent=True) as bar:
        bar.advance(10)
    assert direct.board.read() == ([], {})


def test_a_worker_tells_no_more_than_once_a_second(direct: Direct) -> None:
    with Progress("train one", total=1000, unit="steps") as bar:
        for _ in range(500):
            bar.advance(1)
    assert direct.board.read()[1]["train one"][1] < 500


@pytest.mark.slow
def test_a_worker_of_ray_is_seen_in_the_drivers_log_and_in_rays_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    from raydistill.cache.board import Watched, measured_by_ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(board: object) -> None:
        end = tell(board)
        with Progress("train one", total=4, unit="steps") as bar:
            for step in range(4):
                progress.say(f"step {step}")
                bar.advance(1)
        end()

    ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    try:
        measured_by_ray()
        with Watched() as watched:
            ray.get(ray.remote(work).remote(watched.board))
        shown = capsys.readouterr().out
        assert [f"step {i}" in shown for i in range(4)] == [True] * 4
        assert "train one: " in shown
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found = [line for line in answer.read().decode().splitlines() if "raydistill_progress_done{" in line]
            if found:
                break
            assert time.monotonic() < deadline, "the metric never came"
            time.sleep(1)
        assert 'label="train one"' in found[0]
        assert found[0].endswith(" 4.0")
    finally:
        progress.watchers.clear()
        ray.shutdown()
