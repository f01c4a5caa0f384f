"""Values against textbook formulas and closed-form gradients against autograd, in fp64."""

import math

import pytest
import torch

from raydistill.losses.divergence import divergence, jsd

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


def _pair(seed=0, classes=7):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 5, classes, dtype=torch.float64, generator=generator).mul(2)
    return teacher.log_softmax(-1), student


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_autograd_of_the_value(kind):
    log_p, logits = _pair()
    logits.requires_grad_(True)
    value, gradient = divergence(kind, beta=0.3, skew=0.2)(log_p, logits.log_softmax(-1))
    (expected,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_is_zero_with_zero_gradient_at_equality_and_positive_elsewhere(kind):
    log_p, logits = _pair()
    same, flat = divergence(kind)(log_p, log_p)
    assert same.abs().max() < 1e-15
    assert flat.abs().max() < 1e-15
    other, _ = divergence(kind)(log_p, logits.log_softmax(-1))
    assert (other > 0.01).all()


def test_values_of_two_classes_by_hand():
    log_p, log_s = torch.tensor([[0.75, 0.25]]).log().double(), torch.tensor([[0.5, 0.5]]).log().double()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    middle = (0.5 * 0.75 + 0.5 * 0.5, 0.5 * 0.25 + 0.5 * 0.5)
    js = 0.5 * (0.75 * math.log(0.75 / middle[0]) + 0.25 * math.log(0.25 / middle[1]))
    js += 0.5 * (0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1]))
    skewed = (0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5)
    skew = 0.75 * math.log(0.75 / skewed[0]) + 0.25 * math.log(0.25 / skewed[1])
    for kind, expected in zip(KINDS, (forward, reverse, js, skew), strict=True):
        assert float(divergence(kind)(log_p, log_s)[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_scaled_jsd_becomes_kl_at_its_ends(beta, kind):
    log_p, logits = _pair()
    log_s = logits.log_softmax(-1)
    scaled = jsd(log_p, log_s, beta=beta)[0] / (beta * (1 - beta))
    torch.testing.assert_close(scaled, divergence(kind)(log_p, log_s)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", [0, 1])
def test_a_nan_on_either_side_reaches_the_value(kind, whose):
    log_p, logits = _pair()
    sides = [log_p, logits.log_softmax(-1)]
    sides[whose][2, 3] = torch.nan
    value, _ = divergence(kind)(*sides)
    assert value[2].isnan()
    assert value[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_kl"])
def test_class_the_teacher_excludes_gives_no_nan(kind):
    log_p, logits = _pair()
    log_p[:, 0] = -torch.inf
    logits = logits.requires_grad_(True)
    value, gradient = divergence(kind)(log_p, logits.log_softmax(-1))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
