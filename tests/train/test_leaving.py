"""A checkpoint between two planned ones, when a machine is told that it must go."""

from __future__ import annotations

from pathlib import Path

import pytest
from phases import Killed, kill_after, phase_job, same_bytes

from raydistill.train.checkpoint import Checkpoints
from raydistill.train.launch import run_worker, train_phase


@pytest.mark.fault(
    "a machine is told that it must go, between two checkpoints",
    "saves at once; same weights to the bit",
)
def test_a_notice_saves_at_once_and_nothing_is_lost_when_the_machine_goes(tmp_path: Path) -> None:
    calm = phase_job(tmp_path, name="calm")
    train_phase(calm)
    warned = phase_job(tmp_path, name="warned")
    asked: list[int] = []

    def leaving() -> bool:
        asked.append(len(asked) + 1)
        return asked[-1] == 5

    with pytest.raises(Killed):
        run_worker(warned, kill_after(6), leaving)
    latest = Checkpoints(warned.store / "checkpoints", 2).latest()
    assert latest is not None
    assert latest.step == 5, "planned were 3 and 6; the machine went before the latter"
    train_phase(warned)
    assert same_bytes(calm, warned)


def test_without_a_notice_nothing_is_saved_between(tmp_path: Path) -> None:
    job = phase_job(tmp_path, name="run")
    with pytest.raises(Killed):
        run_worker(job, kill_after(5))
    latest = Checkpoints(job.store / "checkpoints", 2).latest()
    assert latest is not None
    assert latest.step == 3
