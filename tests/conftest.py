"""Shared by all tests: one thread per process, no network, and fixtures of the toys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# One mode for every cluster of a process: Ray keeps that of the first, and with tokens refused its actors die unmade.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Processes that tests start (Ray's included) can import `toys`, for models with `library: python`.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import signal
import tempfile
import threading

import pytest
from _pytest.terminal import TerminalReporter

# Shells start background jobs with Ctrl-C ignored, and processes pass that on; tests of interrupts must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_temporary_folder() -> Iterator[None]:
    """Shards that tests unpack go away with the tests. The path is short: Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="rd", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `toys.tiny_tokenizer()`."""
    from toys import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="FILE", help="write what became of each injected fault into the table in FILE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", mark.args))


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Fill the table of faults: one line per fault, whose outcome counts only if every one of its tests passed."""
    file = config.getoption("--faults")
    if not file:
        return
    passed: dict[tuple[str, str], list[bool]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "fault":
                    passed.setdefault(tuple(value), []).append(outcome == "passed")
    lines = [f"| {what} | {kept if all(p) else '**not kept**'} |" for (what, kept), p in sorted(passed.items())]
    path = Path(file)
    before, rest = path.read_text().split("<!-- faults -->\n")[0::2]
    table = "\n".join(["| fault | outcome |", "|---|---|", *lines])
    path.write_text(f"{before}<!-- faults -->\n{table}\n<!-- faults -->\n{rest}")
