"""Distances and timestep weights against numbers worked out by hand and formulas of the papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.process import PredictionType, Process
from raydistill.losses.regression import Distance, distance, timestep_weight

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow")
DDPM = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon",
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize(
    ("kind", "delta", "expected"),
    [
        # Differences 0, 1, -3 and 0.5.
        ("mse", 1.0, (0 + 1 + 9 + 0.25) / 4),
        ("huber", 1.0, (0 + 0.5 + 2.5 + 0.125) / 4),
        ("huber", 2.0, (0 + 0.5 + 2 * (3 - 1) + 0.125) / 4),
        ("smooth_l1", 1.0, (0 + 0.5 + 2.5 + 0.125) / 4),
        ("smooth_l1", 2.0, (0 + 0.25 + (3 - 1) + 0.0625) / 4),
    ],
)
def test_distances_are_those_worked_out_by_hand(kind: Distance, delta: float, expected: float) -> None:
    target = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    apart = torch.tensor([[[0.0, 1.0], [-3.0, 0.5]]])
    found = distance(kind, torch.cat([target + apart, target]), torch.cat([target, target]), delta=delta)
    assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-6)


@pytest.mark.parametrize("kind", ["mse", "huber", "smooth_l1"])
def test_half_precision_is_added_up_in_fp32(kind: Distance) -> None:
    """4096 differences of 0.25 and one of 64: in fp16 the sum would lose the small ones or overflow."""
    prediction = torch.full((1, 4097), 0.25, dtype=torch.float16)
    prediction[0, -1] = 64.0
    target = torch.zeros_like(prediction)
    exact = distance(kind, prediction.double(), target.double())
    found = distance(kind, prediction, target)
    assert (found.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_a_huge_delta_makes_huber_half_the_mse() -> None:
    a, b = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(2 * distance("huber", a, b, delta=1e6), distance("mse", a, b))


def test_other_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError, match="shapes"):
        distance("mse", torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
def test_weights_are_the_formulas_of_the_papers(weighting: str) -> None:
    process = Process.from_scheduler(DDPM)
    snr = process.snr(torch.arange(1000))
    limited = snr if weighting == "snr" else snr.clamp(max=5.0)
    expected = {"sample": limited, "epsilon": limited / snr, "v_prediction": limited / (snr + 1)}
    for kind, weight in expected.items():
        found = timestep_weight(weighting, process.alphas, process.sigmas, predicted=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found, weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
@pytest.mark.parametrize("scheduler", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_the_weighted_error_is_the_same_in_whatever_is_predicted(weighting: str, scheduler: dict) -> None:
    """Two guesses of the clean data, stated as predictions of each kind by the process itself."""
    process = Process.from_scheduler(scheduler)
    t = torch.arange(0, 990, 110)
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess, other = (torch.randn(len(t), 3, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    alpha, sigma = process.at(t, x0)
    x_t = alpha * x0 + sigma * eps
    found = {}
    for kind in KINDS:
        stated = [process.convert(g, x_t, t, source="sample", target=kind) for g in (guess, other)]
        weight = timestep_weight(weighting, process.alphas, process.sigmas, predicted=kind, gamma=3.0)  # type: ignore[arg-type]
        found[kind] = weight[t] * distance("mse", *stated)
    assert (found["sample"] > 0).all()
    for kind in KINDS:
        torch.testing.assert_close(found[kind], found["sample"], rtol=1e-9, atol=0)


def test_constant_leaves_every_kind_alone() -> None:
    process = Process.from_scheduler(DDPM)
    for kind in KINDS:
        assert (timestep_weight("constant", process.alphas, process.sigmas, predicted=kind) == 1).all()


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
def test_weights_are_finite_at_zero_terminal_snr(weighting: str) -> None:
    process = Process.from_scheduler({**DDPM, "rescale_betas_zero_snr": True})
    assert process.alphas[-1] == 0
    last: dict[str, Tensor] = {}
    for kind in KINDS:
        weights = timestep_weight(weighting, process.alphas, process.sigmas, predicted=kind)  # type: ignore[arg-type]
        assert weights.isfinite().all()
        last[kind] = weights[-1]
    assert (last["epsilon"], last["sample"], last["v_prediction"]) == (1, 0, 0)
