from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError, RaydistillError, TrainingDiverged, VerificationFailed
from raydistill.run import main, parse_stages, root_cause

TOY = """\
name: toy
source: {paths: [a.txt], tokenizer: gpt2, seq_len: 16}
teachers: [{name: big, model: {source: org/big}}]
student: {model: {source: org/small}}
phases: [{name: one, steps: 2, batch: {global_size: 8, micro_size: 4}, optimizer: {student: {lr: 0.1}}}]
"""
Calls = list[tuple[RunConfig, tuple[str, ...] | None]]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYDISTILL_HOME", raising=False)
    (tmp_path / "toy.yaml").write_text(TOY)
    return "toy.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the pipeline is asked to do; it does nothing."""
    found: Calls = []
    pretend(monkeypatch, lambda config, stages: found.append((config, stages)))
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, run: Callable[[RunConfig, tuple[str, ...] | None], object]) -> None:
    monkeypatch.setitem(sys.modules, "raydistill.pipeline", SimpleNamespace(run=run))


def failing(error: BaseException) -> Callable[[RunConfig, tuple[str, ...] | None], object]:
    def run(config: RunConfig, stages: tuple[str, ...] | None) -> None:
        raise error

    return run


def test_the_pipeline_gets_the_merged_configuration_with_absolute_paths(toy: str, calls: Calls, tmp_path: Path) -> None:
    assert main([toy, "phases.0.batch.micro_size=8", "--stages", "signals,inputs", "seed=3"]) == 0
    (config, stages) = calls[0]
    assert (config.phases[0].batch.micro_size, config.seed) == (8, 3)
    assert stages == ("inputs", "signals")
    assert config.run_dir == str(tmp_path / "runs" / "toy")
    assert config.source.paths == (str(tmp_path / "a.txt"),)


def test_all_stages_run_when_none_are_named(toy: str, calls: Calls) -> None:
    assert main([toy]) == 0
    assert calls[0][1] is None


def test_a_misspelt_key_exits_with_2_before_anything_is_written(
    toy: str, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([toy, "phases.0.stpes=3"]) == 2
    message = capsys.readouterr().err
    assert message == (
        "raydistill: error: phases.0.stpes (command line): there is no such key; nearest: phases.0.steps.\n"
    )
    assert calls == []
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


def test_check_runs_and_writes_nothing(
    toy: str, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([toy, "--check"]) == 0
    assert capsys.readouterr().out == "toy: the configuration is valid (1 teacher, 1 phase)\n"
    assert calls == []
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--stages", "vrify"], "found 'vrify'; nearest: verify"),
        (["--stages", ","], "found none"),
        (["missing.yaml"], "missing.yaml: there is no such configuration file"),
    ],
)
def test_a_bad_command_line_exits_with_2(
    toy: str, calls: Calls, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([toy, *arguments]) == 2
    assert text in capsys.readouterr().err


def test_overrides_without_a_file_exit_with_2(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seed=3"]) == 2
    assert "wanted at least one configuration file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--nonsense"], ["x.yaml", "--check", "--plan"]])
def test_bad_options_exit_with_2(arguments: list[str], calls: Calls) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("a"), 2), (DataError("a"), 2), (VerificationFailed("a"), 3), (TrainingDiverged("a"), 1)],
)
def test_errors_of_the_pipeline_are_one_message_and_their_exit_status(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RaydistillError, status: int
) -> None:
    pretend(monkeypatch, failing(error))
    assert main([toy]) == status
    assert capsys.readouterr().err == "raydistill: error: a\n"


def test_an_unforeseen_error_is_one_line_and_points_to_debug(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, failing(RuntimeError("first\nthe last line\n")))
    assert main([toy]) == 1
    assert capsys.readouterr().err == (
        "raydistill: unexpected RuntimeError: the last line\nRun the same command with --debug for the traceback.\n"
    )
    assert main([toy, "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in run" in shown


def test_ctrl_c_says_how_to_go_on(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, failing(KeyboardInterrupt()))
    assert main([toy, "cache.dir=a b"]) == 1
    message = capsys.readouterr().err
    assert "stopped; what is finished is kept" in message
    assert "python -m raydistill.run toy.yaml 'cache.dir=a b'" in message
    assert "Traceback" not in message


def test_a_polite_kill_ends_like_ctrl_c(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    pretend(monkeypatch, lambda config, stages: os.kill(os.getpid(), signal.SIGTERM))
    assert main([toy]) == 1
    assert "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_stages_are_put_in_order() -> None:
    assert parse_stages("report, inputs") == ("inputs", "report")


class RemoteError(Exception):
    """Shaped like the errors in which Ray wraps those of workers."""

    def __init__(self, text: str, cause: Exception | None = None, failures: dict[int, Exception] | None = None):
        super().__init__(text)
        self.cause = cause
        self.worker_failures = failures or {}


def test_the_error_of_a_worker_is_found_in_what_ray_wraps_it_in() -> None:
    ours = DataError("wanted a, found b")
    assert root_cause(RemoteError("remote traceback", cause=ours)) is ours
    assert root_cause(RemoteError("failed", failures={1: RemoteError("inner", cause=ours)})) is ours
    chained = RuntimeError("outer")
    chained.__cause__ = RemoteError("middle", cause=ours)
    assert root_cause(chained) is ours
    other = RuntimeError("nothing of ours")
    assert root_cause(other) is other


def test_an_error_in_the_guise_of_its_cause_gives_the_original_text() -> None:
    class Guise(RemoteError, DataError):
        pass

    assert str(root_cause(Guise("remote traceback", cause=DataError("short")))) == "short"


def test_an_error_that_ray_quotes_is_made_again() -> None:
    text = (
        'ray::Map()\n  File "x.py", line 1\nraydistill.errors.CacheMismatch: wanted:\n  a: 1\n\n'
        "The above exception was the direct cause of the following exception:\n\nray.UserCodeException: UDF failed"
    )
    found = root_cause(RemoteError(text))
    assert (type(found).__name__, str(found)) == ("CacheMismatch", "wanted:\n  a: 1")
