"""Records of training that lost their end are named, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from phases import phase_job

from raydistill.errors import DataError
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.job import finished


def test_a_truncated_record_of_a_phase_is_named(tmp_path: Path) -> None:
    job = phase_job(tmp_path)
    (job.store / "final").publish("phase.json", '{"steps": 8, "samples"')
    with pytest.raises(DataError, match=r"final/phase\.json is damaged: .*goes on from its last checkpoint"):
        finished(job)


@pytest.mark.fault("a checkpoint's marker is cut", "named; without it the one before counts")
def test_a_truncated_checkpoint_marker_is_named_and_without_it_the_one_before_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish("step-00000003.json", Progressed(step=3).model_dump_json())
    store.publish("step-00000006.json", Progressed(step=6).model_dump_json()[:-4])
    checkpoints = Checkpoints(store, keep=2)
    with pytest.raises(DataError, match=r"step-00000006\.json is damaged: .*the checkpoint before it"):
        checkpoints.latest()
    store.delete("step-00000006.json")
    assert checkpoints.latest() == Progressed(step=3)
