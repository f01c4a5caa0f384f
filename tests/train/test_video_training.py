"""Causal recipes through the whole training: from clips in a cache to weights that are handed on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import Killed, final, kill_after, lines, logged, same_bytes
from safetensors.torch import load_file
from video_phases import RECIPES, video_job

from raydistill.models.student import load_student
from raydistill.train.launch import train_phase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared clips, teacher and student, and the undisturbed run of self-forcing."""
    folder = tmp_path_factory.mktemp("videos")
    train_phase(video_job(folder, "self_forcing"))
    return folder


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_self_forcing_ends_in_the_same_weights_of_both_players(folder: Path, step: int) -> None:
    whole = video_job(folder, "self_forcing")
    job = video_job(folder, "self_forcing", name=f"killed-{step}")
    with pytest.raises(Killed):
        train_phase(job, report=kill_after(step))
    train_phase(job)
    for name in ("model.safetensors", "ema.safetensors", "players.safetensors"):
        assert same_bytes(whole, job, name), name
    assert logged(job) == logged(whole)


def test_student_and_critic_are_kept_apart_and_the_average_is_of_the_student_alone(folder: Path) -> None:
    job = video_job(folder, "self_forcing")
    before = load_file(folder / "init/model.safetensors")
    assert final(job).keys() == final(job, "ema.safetensors").keys() == before.keys()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in final(job).items())
    others = final(job, "players.safetensors")
    assert {name.split(".")[0] for name in others} == {"critic/denoiser", "critic/heads"}
    teacher = load_file(folder / "teacher/transformer/diffusion_pytorch_model.safetensors")
    moved = [n for n, t in teacher.items() if not torch.equal(t, others[f"critic/denoiser.{n}"])]
    assert len(moved) > len(teacher) / 2, "the critic begins with the teacher's weights and leaves them"
    parts = [set(line["parts"]) for line in lines(job)]
    assert parts == [{"denoising", "telling"}, {"denoising", "telling"}, {"dmd", "fooling"}] * 2
    assert all("critic/all" in line["lr"] for line in lines(job)[:2])


@pytest.mark.parametrize("kind", [k for k in RECIPES if k != "self_forcing"])
def test_a_stage_without_stored_trajectories_trains_and_hands_its_weights_to_self_forcing(
    folder: Path, kind: str
) -> None:
    job = video_job(folder, kind, name=kind)
    train_phase(job)
    assert len(lines(job)) == 6
    weights = folder / kind / "phases/one/final/ema.safetensors"
    student = load_student(folder / "init", weights=weights)
    assert student.generator is not None
    assert student.generator.causal is not None
    taken = video_job(folder, "self_forcing", name=f"after-{kind}")
    object.__setattr__(taken, "weights", str(weights))
    train_phase(taken)
    assert logged(taken) != logged(video_job(folder, "self_forcing"))
