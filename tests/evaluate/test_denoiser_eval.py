from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoiser_toys import KINDS, process_of, tiny_unet
from torch import Tensor, nn
from toy_draws import MemoryDraws, toy_draws

from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.evaluate import denoiser
from raydistill.evaluate.denoiser import (
    DenoiserValidator,
    HeldOutDraws,
    by_timestep,
    choose_samples,
    denoiser_metrics,
    evaluate_denoiser,
    floor_line,
    teacher_lines,
)

TWO = {"a": 0.75, "b": 0.25}
PROCESS = process_of()


def _metrics(network: nn.Module, rows: HeldOutDraws) -> dict[str, float]:
    validator = DenoiserValidator(rows)
    return validator.metrics(validator.sums(network))


def test_a_student_that_is_the_teacher_makes_no_error_to_it_and_the_teachers_error_to_the_noise() -> None:
    rows = toy_draws()
    found = _metrics(tiny_unet(seed=0), rows)
    assert set(found) == {"mse_to_teacher", "mse_to_noise"}
    assert found["mse_to_teacher"] < 1e-12
    assert found["mse_to_noise"] == pytest.approx(teacher_lines(rows, PROCESS)["t"]["mse_to_noise"], rel=1e-6)
    assert floor_line(rows, PROCESS)["mse_to_teacher"] == 0


def test_errors_are_those_of_a_second_implementation_in_numpy() -> None:
    rows, student = toy_draws(weights=TWO), tiny_unet(seed=7)
    batch = rows.dataset.batch(range(rows.dataset.num_rows))
    with torch.no_grad():
        q, _ = denoiser.common_prediction(student, batch, "epsilon")
    own = {name: batch[f"{name}/prediction"].double().numpy() for name in TWO}
    noise, q = batch["noise"].double().numpy(), q.double().numpy()
    mean = sum(w * own[name] for name, w in TWO.items())
    found = _metrics(student, rows)
    assert found["mse_to_noise"] == pytest.approx(np.mean((q - noise) ** 2), rel=1e-6)
    assert found["mse_to_mean"] == pytest.approx(np.mean((q - mean) ** 2), rel=1e-6)
    for name in TWO:
        assert found[f"mse_to/{name}"] == pytest.approx(np.mean((q - own[name]) ** 2), rel=1e-6)


def test_the_error_to_the_teachers_is_the_weighted_sum_and_the_floor_is_their_weighted_variance() -> None:
    rows = toy_draws(weights=TWO)
    found = _metrics(tiny_unet(seed=7), rows)
    assert found["mse_to_teacher"] == pytest.approx(sum(w * found[f"mse_to/{n}"] for n, w in TWO.items()), rel=1e-9)
    floor = floor_line(rows, PROCESS)["mse_to_teacher"]
    assert found["mse_to_teacher"] == pytest.approx(found["mse_to_mean"] + floor, rel=1e-9)
    a, b = (rows.dataset.predictions[f"{name}/prediction"].double() for name in TWO)
    assert floor == pytest.approx(0.75 * 0.25 * float((a - b).square().mean()), rel=1e-6)
    lines = teacher_lines(rows, PROCESS)
    assert lines["a"]["mse_to/a"] == 0
    assert lines["a"]["mse_to_teacher"] == pytest.approx(0.25 * lines["a"]["mse_to/b"])
    assert all(floor < line["mse_to_teacher"] for line in lines.values())


def test_the_average_of_the_teachers_stands_for_them() -> None:
    student = tiny_unet(seed=7)
    each, one = (_metrics(student, toy_draws(weights=TWO, averaged=averaged)) for averaged in (False, True))
    assert one == pytest.approx({name: each[name] for name in ("mse_to_teacher", "mse_to_mean", "mse_to_noise")})
    floors = [
        floor_line(toy_draws(weights=TWO, averaged=averaged), PROCESS)["mse_to_teacher"] for averaged in (False, True)
    ]
    assert floors[1] == pytest.approx(floors[0], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_student_predicts_is_compared_as_what_the_cache_holds(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, rows = process_of(kind), toy_draws()
    student = tiny_unet(kind)
    batches = iter(rows.batches())

    def perfect(network: nn.Module, x_t: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        batch = rows.read(next(batches), torch.device("cpu"))
        return process.target(batch["latents"], batch["noise"], batch["timestep"], kind)

    monkeypatch.setattr(denoiser, "predict", perfect)
    assert _metrics(student, rows)["mse_to_noise"] < 1e-8


def test_bins_part_the_samples_by_timestep_and_add_up_to_the_whole() -> None:
    rows, student = toy_draws(weights=TWO, rows=6, bins=5), tiny_unet(seed=7)
    totals = DenoiserValidator(rows).sums(student)
    assert rows.edges == [0, 200, 400, 600, 800, 1000]
    counts = [totals[f"samples/{b:02}"] for b in range(5)]
    timesteps = rows.dataset.batch(range(24))["timestep"].numpy()
    assert counts == np.histogram(timesteps, rows.edges)[0].tolist()
    for name, means in by_timestep(totals, rows).items():
        whole = sum(c * m for c, m in zip(counts, means, strict=True) if c) / sum(counts)
        assert whole == pytest.approx(denoiser_metrics(totals, rows)[name])


def test_a_bin_without_samples_is_null_and_not_a_number() -> None:
    rows = toy_draws(rows=1, draws=1, bins=3)
    found = evaluate_denoiser(tiny_unet(seed=1), rows)["by_timestep"]["mse_to_teacher"]
    assert sum(value is None for value in found) == 2
    assert all(value is None or math.isfinite(value) for value in found)


def test_the_sums_of_any_number_of_ranks_add_up_and_every_rank_makes_as_many_forward_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, student = toy_draws(weights=TWO), tiny_unet(seed=7)
    calls: list[int] = []
    real = denoiser.predict
    monkeypatch.setattr(denoiser, "predict", lambda *a: (calls.append(1), real(*a))[1])
    validator = DenoiserValidator(rows)
    whole = validator.sums(student)
    assert len(calls) % 3, "the batches should not divide evenly over three ranks"
    counts, total = [], dict.fromkeys(whole, 0.0)
    for rank in range(3):
        calls.clear()
        for name, value in validator.sums(student, rank=rank, world_size=3).items():
            total[name] += value
        counts.append(len(calls))
    assert len(set(counts)) == 1
    assert total == pytest.approx(whole, rel=1e-9)


def test_micro_batches_are_of_one_bucket_and_their_size_changes_nothing() -> None:
    rows, student = toy_draws(), tiny_unet(seed=7)
    buckets = rows.dataset.buckets
    assert all(len({int(buckets[s.index]) for s in part}) == 1 for part in rows.batches())
    alone = DenoiserValidator(replace(rows, batch_rows=1)).sums(student)
    assert alone == pytest.approx(DenoiserValidator(rows).sums(student), rel=1e-5)


def test_the_student_is_left_in_the_mode_it_was_in() -> None:
    student = tiny_unet().train()
    DenoiserValidator(toy_draws()).sums(student)
    assert student.training


def test_without_teachers_as_many_draws_are_made_as_asked_for_from_the_rows_ids() -> None:
    rows = toy_draws(weights={}, rows=3, draws=1, most=4)
    assert len(rows.samples) == 12
    batch = rows.read(rows.samples[4:8], torch.device("cpu"))
    name = rows.samples[4].row_id
    assert [s.draw for s in rows.samples[4:8]] == [0, 1, 2, 3]
    assert torch.equal(batch["noise"][2], noise_of(name, 2, (3, 8, 8), 0))
    assert batch["timestep"].tolist() == [timestep_of(name, d, rows.noise) for d in range(4)]
    assert [t // 250 for t in batch["timestep"].tolist()] == [0, 1, 2, 3]
    assert set(_metrics(tiny_unet(), rows)) == {"mse_to_noise"}


def test_of_many_cached_draws_the_chosen_ones_meet_every_stratum() -> None:
    names = MemoryDraws(8, 8).row_ids(range(64))
    chosen = choose_samples(names, 2, cached=True)
    assert len(chosen) == 16
    assert sorted({s.draw for s in chosen}) == list(range(8))
    assert [names[s.index] for s in chosen] == [f"{s.row_id}@{s.draw}" for s in chosen]
    assert [s.index for s in choose_samples(names, 9, cached=True)] == list(range(64))
