"""Checkpoints on an object store: sent while training goes on, and whole or not there."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from gs_server import gs, gs_running, gs_store
from phases import Killed, kill_after, phase_job
from ranks import run_ranks
from s3_server import Server

from raydistill.errors import StorageFailed
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.launch import train_phase

__all__ = ["gs", "gs_running", "gs_store"]


@pytest.mark.fault(
    "training on S3 is killed between checkpoints",
    "continues from the last one; same weights to the bit",
)
def test_checkpoints_reach_the_store_while_training_goes_on_and_it_continues_from_there(
    s3: Server, far_store: Store, tmp_path: Path
) -> None:
    undisturbed = phase_job(tmp_path, name="undisturbed")
    train_phase(undisturbed)
    far = dataclasses.replace(phase_job(tmp_path, name="far"), run=far_store.uri)
    with pytest.raises(Killed):
        train_phase(far, report=kill_after(5))
    checkpoints = Checkpoints(far.store / "checkpoints", 1)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 3
    train_phase(far)
    expected = Path(undisturbed.run, undisturbed.folder, "final/model.safetensors").read_bytes()
    assert (far.store / "final").read("model.safetensors") == expected


@pytest.mark.slow
@pytest.mark.fault("a checkpoint cannot be sent to S3", "one message; the checkpoint before it stays")
def test_a_checkpoint_that_cannot_be_sent_ends_the_phase_and_the_one_before_it_stays(
    s3: Server, far_store: Store, tmp_path: Path
) -> None:
    far = dataclasses.replace(phase_job(tmp_path, name="far"), run=far_store.uri)
    s3.trouble = lambda method, path: "busy" if method == "PUT" and "step-00000006/" in path else None
    with pytest.raises(StorageFailed, match=r"cannot write .*step-00000006"):
        train_phase(far)
    s3.trouble = lambda method, path: None
    latest = Checkpoints(far.store / "checkpoints", 1).latest()
    assert latest is not None
    assert latest.step == 3


def two_saves(rank: int, ranks: int, uri: str, environment: dict[str, str]) -> list[str]:
    """Save twice in a row where rank 0's file takes longest; the names of the files of the second."""
    os.environ.update(environment)
    publish = Store.publish

    def slow(store: Store, name: str, write: Any) -> str:
        time.sleep(2 if name.startswith("rank-00000") else 0)
        return publish(store, name, write)

    Store.publish = slow  # type: ignore[method-assign]  # of this process alone
    checkpoints = Checkpoints(Store(uri), keep=2)
    for step in (250, 251):
        checkpoints.save({}, None, Progressed(step=step, num_ranks=ranks))
    checkpoints.settle()
    dist.barrier()
    latest = checkpoints.latest()
    assert latest is not None
    return [f"{latest.step}/{name}" for name in (Store(uri) / "step-00000251").names()]


def test_a_checkpoint_right_after_another_is_whole_though_the_first_rank_is_slow(far_store: Store) -> None:
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    whole = ["251/rank-00000-of-00002.safetensors", "251/rank-00001-of-00002.safetensors"]
    assert run_ranks(two_saves, 2, (far_store.uri, environment)) == [whole, whole]


def test_checkpoints_on_google_storage_come_and_go_and_training_continues_from_there(
    gs_store: Store, tmp_path: Path
) -> None:
    undisturbed = phase_job(tmp_path, name="undisturbed")
    train_phase(undisturbed)
    far = dataclasses.replace(phase_job(tmp_path, name="far"), run=gs_store.uri)
    with pytest.raises(Killed):
        train_phase(far, report=kill_after(7))
    train_phase(far)
    left = (undisturbed.store / "checkpoints").folders()
    assert "step-00000003" not in left
    assert (far.store / "checkpoints").folders() == left
    expected = Path(undisturbed.run, undisturbed.folder, "final/model.safetensors").read_bytes()
    assert (far.store / "final").read("model.safetensors") == expected


@pytest.mark.fault("a killed run left half a checkpoint on S3", "removed before the next one is written")
def test_a_file_that_a_killed_run_left_behind_does_not_complete_a_checkpoint(far_store: Store) -> None:
    checkpoints = Checkpoints(far_store, keep=1)
    (far_store / "step-00000006").publish("rank-00001-of-00002.safetensors", "of a killed run")
    checkpoints.clear()
    assert not far_store.exists("step-00000006/rank-00001-of-00002.safetensors")
