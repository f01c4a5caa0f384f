"""Distribution matching and the game of telling real from made against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from raydistill.losses.matching import approximate_r1, called_made, called_real, distribution_matching


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gradient_is_the_normalised_difference_of_the_scores() -> None:
    x, fake, real = normal(3, 2, 4).requires_grad_(), normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    distribution_matching(x, fake, real).sum().backward()
    wanted = (fake - real) / (x - real).abs().mean((1, 2), keepdim=True) / 8
    assert x.grad is not None
    assert (x.grad - wanted).abs().max() < 1e-15


def test_the_scale_of_all_three_does_not_matter_to_the_gradient() -> None:
    grads = []
    for scale in (1.0, 100.0):
        x = (scale * normal(2, 5)).requires_grad_()
        distribution_matching(x, scale * normal(2, 5, seed=1), scale * normal(2, 5, seed=2)).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-14)


def test_equal_scores_give_no_gradient_even_where_the_sample_is_what_they_say() -> None:
    x = normal(2, 5).requires_grad_()
    loss = distribution_matching(x, x.detach(), x.detach())
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))
    assert x.grad is not None
    assert not x.grad.any()


def test_gaussians_are_drawn_together() -> None:
    # Made: N(a, 1), real: N(3, 1), one time t of a flow. E[x0 | x_t] = m + (1-t) (x_t - (1-t) m) / ((1-t)² + t²).
    a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, t = torch.optim.SGD([a], lr=0.5), 0.5
    for step in range(400):
        x = a + normal(256, 1, seed=step)
        x_t = (1 - t) * x + t * normal(256, 1, seed=1000 + step)

        def clean(mean: torch.Tensor | float, x_t: torch.Tensor = x_t) -> torch.Tensor:
            return mean + (1 - t) * (x_t - (1 - t) * mean) / ((1 - t) ** 2 + t**2)

        optimizer.zero_grad()
        distribution_matching(x, clean(a.detach()), clean(3.0)).mean().backward()
        optimizer.step()
    assert a.item() == pytest.approx(3.0, abs=1e-3)


def test_an_undecided_head_costs_log_two_each_way() -> None:
    zero = torch.zeros(2, 7)
    assert called_real(zero).tolist() == pytest.approx([math.log(2)] * 2)
    assert called_made(zero).tolist() == pytest.approx([math.log(2)] * 2)
    assert called_real(zero + 50).max() < 1e-20
    assert called_made(zero - 50).max() < 1e-20


def test_approximate_r1_is_sigma_squared_times_the_squared_gradient() -> None:
    weights, x, sigma = normal(6), normal(4000, 6, seed=1), 1e-3
    shifted = x + sigma * normal(4000, 6, seed=2)
    found = approximate_r1((x @ weights)[:, None].double(), (shifted @ weights)[:, None].double())
    assert float(found.mean()) / sigma**2 == pytest.approx(float(weights.square().sum()), rel=0.1)
