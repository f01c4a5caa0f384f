"""The engine against plain torch, on one rank and on two, at every ZeRO stage."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from regression import (
    OPTIMIZER,
    Tied,
    arrays,
    batch_of,
    do_steps,
    draws_of,
    engine_of,
    furthest,
    network,
    phase_of,
    plain_training,
    weights_of,
)
from torch import Tensor

from raydistill.config.training import EmaConfig, OffloadConfig, OptimizerConfig, TrainableRule
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.ema import Ema
from raydistill.train.masters import assembled

STEPS = 4
STAGES = (0, 1, 2, 3)
MICRO = (1, 4, 2, 1)
"""Rows in a micro-batch, by step: gradients must not depend on it."""
AVERAGE = EmaConfig(decay=0.8, warmup=False)


def on_two_ranks(rank: int, ranks: int, folder: str) -> dict[str, object]:
    """Everything the tests below want to know of two ranks, in one start of two processes.

    Arrays are returned, as torch's way of sharing tensors does not outlive the process.
    """
    found: dict[str, object] = {}
    for stage in STAGES:
        engine = engine_of(network(), phase_of(stage))
        ema = Ema(engine.masters, AVERAGE)
        steps = []
        for step in range(STEPS):
            steps += do_steps(engine, step, step + 1, micro=MICRO[step], rank=rank, ranks=ranks)
            ema.update(step)
            if step == 1:
                save(folder, stage, engine, ema, ranks)
        found[f"steps {stage}"] = steps
        found[f"weights {stage}"] = arrays(weights_of(engine))
        found[f"average {stage}"] = arrays(dict(assembled(engine.masters, ema.values, keep=True)))
        engine.close()
        resumed, _ = load(folder, stage)
        for step in range(2, STEPS):
            do_steps(resumed, step, step + 1, micro=MICRO[step], rank=rank, ranks=ranks)
        found[f"resumed {stage}"] = arrays(weights_of(resumed))
        resumed.close()
    for stage in (0, 3):
        engine = engine_of(network(), phase_of(stage, "bf16"))
        do_steps(engine, 0, STEPS, micro=2, rank=rank, ranks=ranks)
        found[f"bf16 {stage}"] = arrays(weights_of(engine))
        engine.close()
    return found


def save(folder: str, stage: int, engine: object, ema: Ema, ranks: int) -> None:
    progressed = Progressed(step=2, num_ranks=ranks, updates={"student": 2}, ema_updates=ema.num_updates)
    Checkpoints(Store(f"{folder}/{stage}"), keep=1).save({"student": engine}, ema, progressed)  # type: ignore[dict-item]


def load(folder: str, stage: int, *, at_stage: int | None = None):  # type: ignore[no-untyped-def]
    engine = engine_of(network(), phase_of(stage if at_stage is None else at_stage))
    ema = Ema(engine.masters, AVERAGE)
    checkpoints = Checkpoints(Store(f"{folder}/{stage}"), keep=1)
    progressed = checkpoints.latest()
    assert progressed is not None
    checkpoints.load(progressed, {"student": engine}, ema)
    return engine, ema


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def two_ranks(folder: str) -> list[dict]:
    return run_ranks(on_two_ranks, 2, (folder,), timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_plain_adamw_however_the_batch_is_split(two_ranks: list[dict], stage: int) -> None:
    weights, plain = plain_training(STEPS)
    for found in two_ranks:
        assert furthest(found[f"weights {stage}"], weights) < 1e-6
        for name in ("loss", "grad_norm"):
            assert [s[name] for s in found[f"steps {stage}"]] == pytest.approx([s[name] for s in plain], rel=1e-6)
    assert min(s["grad_norm"] for s in plain) > 0.5, "clipping must be at work"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_one_rank_trains_like_plain_adamw_however_the_batch_is_split(stage: int, micro: int) -> None:
    engine = engine_of(network(), phase_of(stage))
    steps = do_steps(engine, 0, STEPS, micro=micro)
    weights, plain = plain_training(STEPS)
    assert furthest(weights_of(engine), weights) < 1e-6
    assert [s["grad_norm"] for s in steps] == pytest.approx([s["grad_norm"] for s in plain], rel=1e-6)
    engine.close()


@pytest.mark.parametrize("stage", [0, 2])
def test_without_a_clip_norm_nothing_is_clipped(stage: int) -> None:
    optimizer = OPTIMIZER.model_copy(update={"clip_norm": None})
    engine = engine_of(network(), phase_of(stage, optimizer=optimizer))
    steps = do_steps(engine, 0, STEPS, micro=4)
    weights, plain = plain_training(STEPS, optimizer)
    assert furthest(weights_of(engine), weights) < 1e-6
    assert steps[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-6)
    assert plain[0]["grad_norm"] > 1.5, "DeepSpeed's own default of 1 would show"
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_of_two_ranks_is_the_one_worked_out_by_hand(two_ranks: list[dict], stage: int) -> None:
    average = {n: p.detach().clone() for n, p in network().named_parameters()}
    for steps in range(1, STEPS + 1):
        weights, _ = plain_training(steps)
        average = {n: 0.8 * average[n] + 0.2 * weights[n] for n in average}
    assert furthest(two_ranks[0][f"average {stage}"], average) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_on_as_many_ranks_is_exact_to_the_bit(two_ranks: list[dict], stage: int) -> None:
    for found in two_ranks:
        assert furthest(found[f"resumed {stage}"], found[f"weights {stage}"]) == 0


@pytest.mark.parametrize(("stage", "at_stage"), [(0, 0), (1, 1), (2, 2), (3, 3), (3, 0), (0, 2)])
def test_what_two_ranks_saved_one_rank_continues(two_ranks: list[dict], folder: str, stage: int, at_stage: int) -> None:
    engine, ema = load(folder, stage, at_stage=at_stage)
    for step in range(2, STEPS):
        do_steps(engine, step, step + 1, micro=2)
        ema.update(step)
    assert furthest(weights_of(engine), two_ranks[0][f"weights {stage}"]) < 1e-6
    average = dict(assembled(engine.masters, ema.values, keep=True))
    assert furthest(average, two_ranks[0][f"average {stage}"]) < 1e-6
    engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_stays_near_fp32_on_two_ranks(two_ranks: list[dict], stage: int) -> None:
    assert furthest(two_ranks[0][f"bf16 {stage}"], plain_training(STEPS)[0]) < 5e-3


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_fp32_masters_that_move_by_steps_bf16_could_not_hold(stage: int) -> None:
    model = network()
    before = copy.deepcopy(model)
    engine = engine_of(model, phase_of(stage, "bf16", OptimizerConfig(lr=5e-6, schedule="constant")))
    assert furthest(weights_of(engine), {n: p.detach() for n, p in before.named_parameters()}) == 0, "exact start"
    do_steps(engine, 0, 10, micro=4)
    after = weights_of(engine)
    moved = torch.cat([(after[n] - p.detach()).abs().flatten() for n, p in before.named_parameters()])
    lost = [(p.detach().bfloat16() == after[n].bfloat16()).float().mean() for n, p in before.named_parameters()]
    assert (moved > 0).float().mean() > 0.99
    assert 1e-5 < moved.mean() < 10 * 5e-6, "AdamW moves a weight by about lr per step while its gradients agree"
    assert min(lost) > 0.5, "bf16 weights alone would have lost most of it"
    engine.close()


def test_frozen_parameters_stay_as_they_are_to_the_bit() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    engine = engine_of(model, phase_of(2), [TrainableRule(match=r"^2\.")])
    do_steps(engine, 0, STEPS, micro=4)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items() if n.startswith("0."))
    assert not any(torch.equal(before[n], p) for n, p in model.state_dict().items() if n.startswith("2."))
    engine.close()


def test_learning_rates_keep_their_ratio_under_the_schedule() -> None:
    optimizer = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2)
    rules = [TrainableRule(match=r"^0\.", lr_scale=0.25), TrainableRule(match=r"^2\.")]
    engine = engine_of(network(), phase_of(1, optimizer=optimizer), rules)
    for step in range(5):
        lr = engine.update([batch_of(step)], [draws_of(step, range(8))], step).lr
        assert lr["^0\\."] == pytest.approx(0.25 * lr["^2\\."])
    assert lr["^2\\."] < 1e-2
    engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_tied_weight_gets_the_gradient_of_both_uses_once(stage: int) -> None:
    class Both(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return (self.embed.weight @ (self.norm(x) @ self.head.weight).T).T[:, :3]

    torch.manual_seed(0)
    model = Both()
    plain = copy.deepcopy(model)
    engine = engine_of(model, phase_of(stage, optimizer=OPTIMIZER))
    batch = batch_of(0)
    engine.update([batch], [draws_of(0, range(8))], 0)
    adamw = torch.optim.AdamW(
        [
            {"params": [plain.embed.weight], "weight_decay": 0.1},
            {"params": list(plain.norm.parameters()), "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=OPTIMIZER.betas,
    )
    x = batch["x"] + 0.1 * draws_of(0, range(8)).normal("noise", (6,))
    (((plain(x) - batch["y"]).square().sum(-1) * batch["weight"]).sum() / batch["weight"].sum()).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    adamw.step()
    assert furthest(weights_of(engine), {n: p.detach() for n, p in plain.named_parameters()}) < 1e-6
    engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_offloading_to_host_memory_changes_nothing(stage: int) -> None:
    phase = phase_of(stage)
    host = OffloadConfig(device="cpu")
    zero = phase.zero.model_copy(update={"offload_optimizer": host, "offload_parameters": host if stage == 3 else None})
    engine = engine_of(network(), phase.model_copy(update={"zero": zero}))
    do_steps(engine, 0, STEPS, micro=2)
    assert furthest(weights_of(engine), plain_training(STEPS)[0]) < 1e-6
    engine.close()


def test_a_micro_batch_without_any_count_adds_nothing_to_statistics_either() -> None:
    engine = engine_of(network(), phase_of(0))
    batch = batch_of(0)
    empty = {**batch_of(1), "weight": torch.zeros(8)}
    update = engine.update([batch, empty], [draws_of(0, range(8)), draws_of(0, range(8))], 0)
    other = engine_of(network(), phase_of(0))
    alone = other.update([batch], [draws_of(0, range(8))], 0)
    assert update.parts == pytest.approx(alone.parts)
    assert furthest(weights_of(engine), weights_of(other)) == 0
    engine.close()
    other.close()


def test_no_step_is_taken_where_a_loss_is_not_finite() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    engine = engine_of(model, phase_of(0))
    bad = {k: v.clone() for k, v in batch_of(0).items()}
    bad["y"][3] = torch.nan
    update = engine.update([batch_of(1), bad], [draws_of(0, range(8)), draws_of(0, range(8))], 0)
    assert (update.taken, update.unsound) == (False, (1,))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    engine.close()


def test_deepspeed_finds_ninja_beside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    engine_of(network(), phase_of(0)).close()
    assert str(Path(sys.executable).parent) in os.environ["PATH"].split(os.pathsep)
