"""Whole phases in this process: resuming, stopping, evaluating, handing over."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from phases import Killed, final, kill_after, lines, logged, phase_job, same_bytes

from raydistill.cache.read import Dataset
from raydistill.errors import ConfigError, TrainingDiverged
from raydistill.recipes.base import Loss
from raydistill.recipes.lm_logits import LmLogits
from raydistill.signals import Batch, Draws
from raydistill.train.engine import Player
from raydistill.train.launch import PhaseJob, train_phase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared caches and the undisturbed run `run` of 8 steps (two epochs) with an average."""
    folder = tmp_path_factory.mktemp("phases")
    train_phase(phase_job(folder, phase={"ema": {"decay": 0.9}}))
    return folder


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_killed_phase_ends_in_the_same_weights_to_the_bit(folder: Path, step: int) -> None:
    whole = phase_job(folder)
    job = phase_job(folder, phase={"ema": {"decay": 0.9}}, name=f"killed-{step}")
    with pytest.raises(Killed):
        train_phase(job, report=kill_after(step))
    assert logged(job)[-1][0] == step
    train_phase(job)
    assert same_bytes(whole, job)
    assert same_bytes(whole, job, "ema.safetensors")
    assert logged(job) == logged(whole)


def test_a_checkpoint_that_was_being_written_is_not_picked_up(folder: Path) -> None:
    job = phase_job(folder, phase={"ema": {"decay": 0.9}}, name="half-written")
    with pytest.raises(Killed):
        train_phase(job, report=kill_after(5))
    half = Path(job.run, job.folder, "checkpoints/step-00000005")
    half.mkdir()
    (half / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    (half.parent / "step-00000003/.tmp-1-rank-00000-of-00001.safetensors").write_bytes(b"half")
    train_phase(job)
    assert same_bytes(phase_job(folder), job)
    assert not half.exists()


def test_the_newest_checkpoints_are_kept(folder: Path) -> None:
    job = phase_job(folder, phase={"checkpoint": {"every_steps": 2, "keep": 3}}, name="kept")
    train_phase(job)
    names = sorted(p.name for p in Path(job.run, job.folder, "checkpoints").iterdir())
    assert names == [f"step-0000000{n}{s}" for n in (4, 6, 8) for s in ("", ".json")]


def test_epochs_become_steps_and_every_row_counts_once_per_epoch(folder: Path) -> None:
    job = phase_job(folder, phase={"steps": None, "epochs": 1.5}, name="epochs")
    result = train_phase(job)
    assert (result.steps, result.samples) == (6, 46)
    assert result.tokens == lines(job)[-1]["tokens"]


def test_a_finished_phase_returns_at_once_and_other_settings_are_refused(folder: Path) -> None:
    job = phase_job(folder, phase={"ema": {"decay": 0.9}})
    before = Path(job.run, "metrics.jsonl").stat().st_mtime_ns
    assert train_phase(job).steps == 8
    assert Path(job.run, "metrics.jsonl").stat().st_mtime_ns == before
    other = phase_job(folder, phase={"ema": {"decay": 0.9}, "optimizer": {"student": {"lr": 0.5}}})
    with pytest.raises(ConfigError, match=r'phase\.optimizer: wanted .*"lr": 0\.5.*found .*"lr": 0\.01'):
        train_phase(other)


def test_a_started_phase_may_change_its_learning_rate_but_not_its_loss(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        train_phase(phase_job(folder, name="changed"), report=kill_after(4))
    with pytest.raises(ConfigError, match=r"phase\.recipe"):
        train_phase(phase_job(folder, phase={"recipe": {"kind": "lm_logits", "alpha": 0.1}}, name="changed"))
    train_phase(phase_job(folder, phase={"optimizer": {"student": {"lr": 1e-3}}}, name="changed"))
    assert "settings that changed since the checkpoint" in capfd.readouterr().out


@pytest.mark.parametrize("stage", [0, 3])
def test_a_killed_phase_in_bf16_ends_in_the_same_weights_to_the_bit(folder: Path, stage: int) -> None:
    settings = {"precision": "bf16", "zero": {"stage": stage}, "ema": {"decay": 0.9}}
    whole = phase_job(folder, phase=settings, name=f"bf16-{stage}")
    train_phase(whole)
    job = phase_job(folder, phase=settings, name=f"bf16-{stage}-killed")
    with pytest.raises(Killed):
        train_phase(job, report=kill_after(5))
    train_phase(job)
    assert same_bytes(whole, job)
    assert same_bytes(whole, job, "ema.safetensors")
    assert logged(job) == logged(whole)
    assert not same_bytes(whole, phase_job(folder)), "trained in fp32, weights are others"


def test_the_next_phase_starts_from_the_weights_handed_over(folder: Path) -> None:
    first = phase_job(folder)
    second = phase_job(folder, phase={"steps": 1, "optimizer": {"student": {"lr": 1e-9}}}, name="second")
    second = PhaseJob(**{**vars(second), "weights": f"{first.run}/{first.folder}/final"})
    train_phase(second)
    a, b = final(first), final(second)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-8


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_weights_leave_bf16_training_as_they_came(folder: Path, stage: int) -> None:
    rules = [{"match": "mlp"}, {"match": "lm_head|embed", "lr_scale": 0}]
    job = phase_job(
        folder,
        phase={"precision": "bf16", "trainable": rules, "steps": 2, "zero": {"stage": stage}},
        name=f"frozen-{stage}",
    )
    train_phase(job)
    from safetensors.torch import load_file

    before, after = load_file(folder / "init/model.safetensors"), final(job)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("mlp" not in name), name
        assert after[name].dtype == torch.float32


def test_zero_3_trains_the_language_model_like_stage_0(folder: Path) -> None:
    job = phase_job(
        folder, phase={"zero": {"stage": 3}, "ema": {"decay": 0.9}}, name="zero-3", evaluate={"every_steps": 4}
    )
    train_phase(job)
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = final(phase_job(folder), name), final(job, name)
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5
    assert [line["step"] for line in lines(job) if "evaluation" in line] == [4, 8]


def test_recomputing_activations_changes_no_number(folder: Path) -> None:
    job = phase_job(
        folder,
        phase={"ema": {"decay": 0.9}},
        name="recomputed",
        student={"gradient_checkpointing": True},
        evaluate={"every_steps": 4},
    )
    train_phase(job)
    assert same_bytes(phase_job(folder), job)


def test_the_best_weights_by_a_metric_are_handed_over(folder: Path) -> None:
    settings = {"every_steps": 3, "best_metric": "loss", "best_mode": "max"}
    job = phase_job(folder, phase={"checkpoint": settings}, name="best", evaluate={"every_steps": 2})
    train_phase(job)
    losses = {line["step"]: line["evaluation"]["loss"] for line in lines(job) if "evaluation" in line}
    record = json.loads(Path(job.run, job.folder, "final/phase.json").read_text())["best"]
    assert record == {"step": max(losses, key=losses.__getitem__), "metric": "loss", "value": max(losses.values())}
    if record["step"] != 8:
        assert not same_bytes(phase_job(folder), job)


def test_a_metric_that_the_rows_do_not_give_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "text_bytes", property(lambda self: np.zeros(self.num_rows, np.int32)))
    phase = {"steps": 1, "checkpoint": {"best_metric": "bits_per_byte"}}
    job = phase_job(folder, phase=phase, name="no-metric", evaluate={"every_steps": 1})
    with pytest.raises(ConfigError, match=r"wanted one of .*perplexity.*found bits_per_byte"):
        train_phase(job)


@pytest.mark.parametrize(
    ("where", "what", "num_rows"), [("loss", "the loss is nan", 2), ("gradient", "the gradient's norm is nan", 8)]
)
def test_a_poisoned_row_stops_the_run_with_step_row_and_last_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str, num_rows: int
) -> None:
    """A loss that is not finite is traced to its micro-batch, a gradient only to its step."""
    good, good_loss = Dataset.batch, LmLogits.loss
    job = phase_job(folder, name=f"poisoned-{where}", phase={"ema": {"decay": 0.9}})
    seen: list[str] = []

    def poisoned(self: Dataset, indices: object, **options: object) -> dict[str, torch.Tensor]:
        batch = good(self, indices, **options)  # type: ignore[arg-type]
        if "train.txt#7.0" in self.row_ids(indices):  # type: ignore[arg-type]
            seen.append("train.txt#7.0")
            if len(seen) > 1:  # the second time, so that there is a checkpoint
                batch["poison"] = torch.tensor(torch.nan)
        return batch

    def poisoned_loss(self: LmLogits, player: str, batch: Batch, rng: Draws) -> Loss:
        parts = dict(good_loss(self, player, batch, rng).parts)
        if "poison" in batch:
            blend = parts["blend"].sum
            if where == "gradient":
                blend.register_hook(lambda gradient: gradient * torch.nan)
            parts["blend"] = replace(parts["blend"], sum=blend * batch["poison"] if where == "loss" else blend)
        return Loss(parts)

    monkeypatch.setattr(Dataset, "batch", poisoned)
    monkeypatch.setattr(LmLogits, "loss", poisoned_loss)
    with pytest.raises(TrainingDiverged, match=rf"step \d: {what}; rows: .*train\.txt#7\.0.*step-0000000[36]") as e:
        train_phase(job)
    assert len(str(e.value).split("rows: ")[1].split(". ")[0].split(", ")) == num_rows
    monkeypatch.setattr(Dataset, "batch", good)
    train_phase(job)
    assert same_bytes(phase_job(folder), job), "nothing of the bad step got into the weights"


def test_an_exploding_loss_stops_the_run(folder: Path) -> None:
    job = phase_job(
        folder,
        phase={
            "steps": 60,
            "explode_factor": 1.5,
            "optimizer": {"student": {"lr": 10.0, "warmup_steps": 60, "clip_norm": None}},
        },
        name="exploding",
    )
    with pytest.raises(TrainingDiverged, match="exploded to"):
        train_phase(job)


def test_a_logged_line_says_what_the_step_did(folder: Path) -> None:
    line = lines(phase_job(folder))[0]
    assert line["loss"] == pytest.approx(0.5 * line["parts"]["ce"] + 0.5 * line["parts"]["kd"])
    assert line["lr"] == {"all": 0.01, "all (no decay)": 0.01}
    assert line["samples"] == 8
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
    assert 0 <= line["data_wait_seconds"] < line["seconds"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_is_freed_when_its_phase_ends(folder: Path, precision: str) -> None:
    def players() -> int:
        return sum(isinstance(o, Player) for o in gc.get_objects())

    gc.collect()
    gc.disable()  # what is freed is freed by the phase
    try:
        before = players()
        train_phase(phase_job(folder, name=f"freed-{precision}", phase={"precision": precision}))
        assert players() <= before
    finally:
        gc.enable()


@pytest.mark.slow
def test_training_needs_no_ray(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/train']; from pathlib import Path; from phases import phase_job;"
        "from raydistill.train.launch import train_phase;"
        f"train_phase(phase_job(Path({str(folder)!r}), name='no-ray', phase={{'steps': 1}}));"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    noise = [x for x in (done.stdout + done.stderr).splitlines() if "DeepSpeed" in x or "ninja" in x or "[rank" in x]
    assert not noise
