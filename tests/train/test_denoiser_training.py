"""Denoisers through the whole training: stages, ranks, precision, resuming, adapters, averages, what is handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from denoiser_phases import NOISE, TAP, denoiser_job
from denoiser_toys import batch_of, tiny_unet, view
from diffusers import UNet2DConditionModel
from phases import Killed, final, kill_after, lines, logged, same_bytes
from ranks import run_ranks
from regression import arrays, furthest, phase_of, weights_of
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.config.recipes import NoisePredictionRecipe
from raydistill.config.training import EmaConfig, OptimizerConfig
from raydistill.models.student import export_student, load_student
from raydistill.recipes.noise_prediction import NoisePrediction
from raydistill.signals import Draws
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.ema import Ema
from raydistill.train.engine import Engine
from raydistill.train.launch import train_phase
from raydistill.train.masters import assembled
from raydistill.train.parameters import player_groups

TAPPED = {"recipe": {"kind": "noise_prediction", "alpha": 0.8, "taps": [TAP]}, "ema": {"decay": 0.9}}
STAGES = (0, 1, 2, 3)
STEPS, ROWS = 3, 8
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.1, schedule="constant", clip_norm=0.5, eps=1e-4)
"""A norm takes back what the bias before it adds, so that gradient is rounding alone; a large eps keeps it small."""
AVERAGE = EmaConfig(decay=0.8, warmup=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared caches and the undisturbed run `run` of 6 steps, with an adapter and an average."""
    folder = tmp_path_factory.mktemp("denoisers")
    train_phase(denoiser_job(folder, phase=TAPPED))
    return folder


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> bool:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a) < tolerance


# --- whole phases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_denoiser_ends_in_the_same_weights_to_the_bit(folder: Path, step: int) -> None:
    whole, job = denoiser_job(folder, phase=TAPPED), denoiser_job(folder, phase=TAPPED, name=f"killed-{step}")
    with pytest.raises(Killed):
        train_phase(job, report=kill_after(step))
    train_phase(job)
    for name in ("model.safetensors", "ema.safetensors", "players.safetensors"):
        assert same_bytes(whole, job, name), name
    assert logged(job) == logged(whole)


def test_adapters_are_trained_and_kept_apart_from_the_student(folder: Path) -> None:
    job = denoiser_job(folder, phase=TAPPED)
    before = load_file(folder / "init/model.safetensors")
    assert final(job).keys() == final(job, "ema.safetensors").keys() == before.keys()
    adapters = final(job, "players.safetensors")
    assert set(adapters) == {"student/taps.red/mid.weight", "student/taps.red/mid.bias"}
    longer = denoiser_job(folder, phase={**TAPPED, "steps": 1}, name="one-step")
    train_phase(longer)
    for name, tensor in final(longer, "players.safetensors").items():
        assert not torch.equal(tensor, adapters[name])
    first, last = (line["parts"]["tap/red.mid"] for line in (lines(job)[0], lines(job)[-1]))
    assert last < 0.9 * first


@pytest.mark.parametrize("handed", ["final", "final/ema.safetensors"])
def test_the_next_phase_goes_on_with_student_and_adapters(folder: Path, handed: str) -> None:
    first = denoiser_job(folder)
    settings = {**TAPPED, "steps": 1, "optimizer": {"student": {"lr": 1e-12}}}
    second = denoiser_job(folder, phase=settings, name=f"second-{handed.count('/')}")
    train_phase(replace(second, weights=f"{first.run}/{first.folder}/{handed}"))
    name = "model.safetensors" if handed == "final" else "ema.safetensors"
    assert close(final(first, name), final(second), 1e-9)
    assert close(final(first, "players.safetensors"), final(second, "players.safetensors"), 1e-9)


def test_rules_speak_the_students_names_and_leave_adapters_trained(folder: Path) -> None:
    rules = [{"match": r"^mid_block\."}, {"match": r"^up_blocks", "lr_scale": 0.5}]
    job = denoiser_job(folder, phase={**TAPPED, "trainable": rules, "precision": "bf16"}, name="rules")
    train_phase(job)
    before, after = load_file(folder / "init/model.safetensors"), final(job)
    for name in before:
        trained = name.startswith(("mid_block.", "up_blocks"))
        assert torch.equal(before[name], after[name]) != trained, name
    assert {"taps", "taps (no decay)"} <= set(lines(job)[0]["lr"])
    assert len(final(job, "players.safetensors")) == 2


@pytest.mark.slow
def test_zero_3_and_recomputed_activations_train_the_denoiser_like_stage_0(folder: Path) -> None:
    job = denoiser_job(
        folder,
        phase={**TAPPED, "zero": {"stage": 3}},
        name="zero-3",
        student={"gradient_checkpointing": True},
        evaluate={"every_steps": 3},
    )
    train_phase(job)
    for name in ("model.safetensors", "ema.safetensors", "players.safetensors"):
        assert close(final(denoiser_job(folder), name), final(job, name), 2e-5), name
    evaluated = [line for line in lines(job) if "evaluation" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert evaluated[0]["evaluation"]["mse_to_teacher"] > evaluated[1]["evaluation"]["mse_to_teacher"]


def test_recomputing_activations_changes_no_number(folder: Path) -> None:
    """But for rounding: gradients of what a block's layers share are added up in another order."""
    job = denoiser_job(folder, phase=TAPPED, name="recomputed", student={"gradient_checkpointing": True})
    train_phase(job)
    for name in ("model.safetensors", "ema.safetensors", "players.safetensors"):
        assert close(final(denoiser_job(folder), name), final(job, name), 1e-6), name


def test_bf16_keeps_fp32_masters(folder: Path) -> None:
    job = denoiser_job(folder, phase={**TAPPED, "precision": "bf16"}, name="bf16")
    train_phase(job)
    weights = final(job)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights.values())
    exact = [loss for _, loss, _ in logged(denoiser_job(folder))]
    assert [loss for _, loss, _ in logged(job)] == pytest.approx(exact, rel=0.1)


def test_the_average_trains_the_student_like_its_teachers(folder: Path) -> None:
    settings = {"recipe": {"kind": "noise_prediction"}}
    each = denoiser_job(folder, phase=settings, name="each")
    average = denoiser_job(folder, phase=settings, name="average", signals=("average",))
    train_phase(each)
    train_phase(average)
    assert close(final(each), final(average), 1e-5)
    for (_, one, _), (_, other, _) in zip(logged(each), logged(average), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert set(lines(average)[0]["parts"]) == {"blend", "kd", "floor", "task"}


def test_plain_diffusion_reads_no_signal_and_sees_other_noise_in_every_epoch(folder: Path) -> None:
    recipe = {"kind": "noise_prediction", "alpha": 0.0}
    settings = {"recipe": recipe, "optimizer": {"student": {"lr": 1e-12}}, "steps": 8, "batch": {
        "global_size": 12, "micro_size": 3, "shuffle": False}}  # fmt: skip
    job = denoiser_job(folder, phase=settings, name="plain", signals=())
    result = train_phase(job)
    assert (result.steps, result.samples, result.tokens) == (8, 96, 0)
    losses = [loss for _, loss, _ in logged(job)]
    assert len(losses) == len({round(loss, 4) for loss in losses}) == 8, "four epochs of two buckets, none like another"
    assert set(lines(job)[0]["parts"]) == {"blend", "task"}


def test_lines_speak_of_samples(folder: Path) -> None:
    line = lines(denoiser_job(folder))[-1]
    assert line["samples_per_second"] > 0
    assert not {"tokens", "tokens_per_second"} & set(line)
    assert line["samples"] == 40


def test_the_trained_student_exports_for_diffusers(folder: Path, tmp_path: Path) -> None:
    job = denoiser_job(folder)
    weights = Path(job.run, job.folder, "final/model.safetensors")
    student = load_student(folder / "init", weights=weights)
    export_student(student, tmp_path, dtype=torch.float32)
    network = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    state = final(job)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


# --- engines, against plain torch -------------------------------------------------------------------------------


def recipe_of() -> NoisePrediction:
    """A student with an adapter, made anew: the same numbers every time."""
    config = NoisePredictionRecipe.model_validate(
        {"kind": "noise_prediction", "alpha": 0.7, "timestep_weighting": "min_snr", "taps": [TAP]}
    )
    kind = NOISE.prediction_type
    teachers = {n: view(n, w, kind=kind, taps={"mid": (16, 4, 4)}) for n, w in {"red": 0.75, "blue": 0.25}.items()}
    return NoisePrediction(config, tiny_unet(seed=9, width=4), teachers)


def step_batch(step: int) -> dict[str, Tensor]:
    """The global batch of a step: `ROWS` samples, one of which does not count."""
    batch = batch_of(ROWS, seed=step)
    for k, name in enumerate(("red", "blue")):
        batch[f"{name}/prediction"] = batch_of(ROWS, seed=100 * k + step + 50)["noise"]
    batch["red/tap.mid"] = torch.randn(ROWS, 16, 4, 4, generator=torch.Generator().manual_seed(step))
    batch["weight"][step % ROWS] = 0
    return batch


def engine_of(recipe: NoisePrediction, stage: int, precision: str = "fp32") -> Engine:
    network = recipe.players()["student"]
    groups = player_groups(network, recipe.student, (), OPTIMIZER, where="test")
    phase = phase_of(stage, precision, OPTIMIZER)
    return Engine(recipe, "student", groups, phase, OPTIMIZER, num_steps=STEPS, device=torch.device("cpu"))


def do_steps(engine: Engine, steps: Sequence[int], *, rank: int, ranks: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps over micro-batches that are dealt out like the loader does."""
    found = []
    for step in steps:
        micro = (2, 4, 1)[step]
        cuts = [range(i, i + micro) for i in range(0, ROWS, micro)][rank::ranks]
        batches = [{n: t[list(cut)] for n, t in step_batch(step).items()} for cut in cuts]
        rngs = [Draws(seed=0, phase="p", step=step, positions=tuple(cut)) for cut in cuts]
        update = engine.update(batches, rngs, step)
        found.append((update.loss, update.grad_norm))
    return found


def plain_training() -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """The same steps with torch alone: whole batch, AdamW, `clip_grad_norm_`; parameters by the engine's names."""
    recipe = recipe_of()
    network = recipe.players()["student"]
    named = {n.removeprefix("student."): p for n, p in network.named_parameters()}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    done = []
    for step in range(STEPS):
        batch = step_batch(step)
        parts = recipe.loss("student", batch, Draws(seed=0, phase="p", step=step, positions=tuple(range(ROWS)))).parts
        loss = torch.stack([p.weight * p.sum for p in parts.values() if p.weight]).sum() / batch["weight"].sum()
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_norm or 0)
        adamw.step()
        done.append((loss.item(), norm.item()))
    return {name: p.detach() for name, p in named.items()}, done


def trained(rank: int, ranks: int, folder: str, stages: Sequence[int]) -> dict[str, object]:
    """Every stage: the steps, the weights, the average, and the same after resuming from the second step."""
    found: dict[str, object] = {}
    for stage in stages:
        engine = engine_of(recipe_of(), stage)
        ema = Ema(engine.masters, AVERAGE)
        checkpoints = Checkpoints(Store(f"{folder}/{stage}"), keep=1)
        steps = []
        for step in range(STEPS):
            steps += do_steps(engine, [step], rank=rank, ranks=ranks)
            ema.update(step)
            if step == 1:
                progressed = Progressed(step=2, num_ranks=ranks, updates={"student": 2}, ema_updates=ema.num_updates)
                checkpoints.save({"student": engine}, ema, progressed)
        found[f"steps {stage}"] = steps
        found[f"weights {stage}"] = arrays(weights_of(engine))
        found[f"average {stage}"] = arrays(dict(assembled(engine.masters, ema.values, keep=True)))
        engine.close()
        resumed = engine_of(recipe_of(), stage)
        again = Ema(resumed.masters, AVERAGE)
        latest = checkpoints.latest()
        assert latest is not None
        checkpoints.load(latest, {"student": resumed}, again)
        do_steps(resumed, [2], rank=rank, ranks=ranks)
        again.update(2)
        found[f"resumed {stage}"] = arrays(weights_of(resumed))
        found[f"resumed average {stage}"] = arrays(dict(assembled(resumed.masters, again.values, keep=True)))
        resumed.close()
    return found


def check(found: dict, stage: int) -> None:
    weights, plain = plain_training()
    assert furthest(found[f"weights {stage}"], weights) < 5e-6
    np.testing.assert_allclose(found[f"steps {stage}"], plain, rtol=2e-5)
    assert min(norm for _, norm in plain) > OPTIMIZER.clip_norm, "clipping must be at work"
    assert any(name.startswith("taps.") for name in weights)
    for kind in ("", "average "):
        name = f"{kind}{stage}" if kind else f"weights {stage}"
        assert furthest(found[f"resumed {kind}{stage}"], found[name]) == 0


@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_trains_a_denoiser_and_its_adapter_like_plain_adamw(stage: int, tmp_path: Path) -> None:
    check(trained(0, 1, str(tmp_path), [stage]), stage)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(trained, 2, (str(tmp_path_factory.mktemp("checkpoints")), STAGES), timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_a_denoiser_and_its_adapter_like_plain_adamw(two_ranks: list[dict], stage: int) -> None:
    for found in two_ranks:
        check(found, stage)
