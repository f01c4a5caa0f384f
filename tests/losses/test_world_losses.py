"""Losses of world models: what they are at equality, against numbers worked out by hand, and what copying scores."""

from __future__ import annotations

import math

import pytest
import torch

from raydistill.losses import world


def test_every_distance_is_zero_between_a_thing_and_itself() -> None:
    frames, logits = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert world.squared_error(frames, frames).abs().max() == 0
    assert world.smoothness(frames, frames).abs().max() == 0
    for temperature in (0.5, 1.0, 4.0):
        assert world.tempered_kl(logits, logits, temperature).abs().max() < 1e-12
    assert world.attention_transfer(maps, maps, torch.ones(2, 3, 4, dtype=torch.bool)).abs().max() == 0
    assert float(world.diversity(frames, frames, valid)) == 0


def test_the_kl_is_that_of_torch_with_the_factor_of_the_temperature() -> None:
    student, teacher = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    log_q, p = (student / 4).log_softmax(-1), (teacher / 4).softmax(-1)
    wanted = 16 * torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1).mean(-1)
    torch.testing.assert_close(world.tempered_kl(student, teacher, 4.0), wanted)


def test_the_gradient_of_the_kl_keeps_its_size_over_the_temperature() -> None:
    """For T → ∞ it tends to (z_s - z_t) / (n k) of centred logits, whatever T (arXiv 1503.02531, Eq. 4)."""
    teacher = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    student = torch.randn(1, 1, 1, 6, dtype=torch.float64, requires_grad=True)
    world.tempered_kl(student, teacher, 1e5).sum().backward()
    difference = student.detach() - teacher
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (difference - difference.mean()) / 6, rtol=1e-3, atol=1e-5)


def test_attention_transfer_sees_the_pattern_and_not_the_scale() -> None:
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    assert world.attention_transfer(3 * maps, maps, valid).abs().max() < 1e-12
    one, other = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    one[..., 0], other[..., 1] = 1, 1
    assert float(world.attention_transfer(one, other, valid[:1, :1, :1])) == pytest.approx(2.0)


def test_queries_that_are_not_valid_do_not_count() -> None:
    student, teacher = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    valid[0, 1] = False
    changed = student.clone()
    changed[0, 1] = 7
    first, second = (world.attention_transfer(s, teacher, valid) for s in (student, changed))
    torch.testing.assert_close(first, second)


def test_constant_offsets_do_not_flicker() -> None:
    frames = torch.rand(2, 4, 1, 3, 3, dtype=torch.float64)
    assert world.smoothness(frames + 0.25, frames).abs().max() < 1e-12
    flicker = frames.clone()
    flicker[:, 1] += 1
    assert world.smoothness(flicker, frames)[0].tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_a_collapsed_student_pays_one_and_half_the_spread_three_quarters() -> None:
    target = torch.rand(4, 3, 1, 2, 2, dtype=torch.float64)
    valid = torch.ones(4, 3, dtype=torch.bool)
    collapsed = torch.full_like(target, 0.5)
    assert float(world.diversity(collapsed, target, valid)) == pytest.approx(1.0)
    assert float(world.diversity(0.5 * target, target, valid)) == pytest.approx(0.75)


def test_the_codebook_is_used_evenly_or_not() -> None:
    even = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert float(world.codebook_usage(even)) == pytest.approx(0.0, abs=1e-6)
    one = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    one[..., 0] = 1e3
    assert float(world.codebook_usage(one)) == pytest.approx(math.log(4), rel=1e-6)


def test_copying_the_last_frame_scores_zero_and_the_true_change_one() -> None:
    last = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    target = torch.rand(2, 3, 1, 3, 3, dtype=torch.float64)
    copied = last[:, None].expand_as(target)
    assert world.change_cosine(copied, target, last).abs().max() == 0
    torch.testing.assert_close(world.change_cosine(target, target, last), torch.ones(2, 3, dtype=torch.float64))
    back = last[:, None] - (target - last[:, None])
    torch.testing.assert_close(world.change_cosine(back, target, last), -torch.ones(2, 3, dtype=torch.float64))
    assert world.raw_cosine(copied, target).min() > 0.5


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_codes() -> None:
    found = world.code_cross_entropy(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, dtype=torch.int32))
    torch.testing.assert_close(found, torch.full((2, 3), math.log(8)))


def test_half_precision_is_added_up_in_fp32() -> None:
    a, b = torch.zeros(1, 1, 4097, dtype=torch.float16), torch.full((1, 1, 4097), 0.25, dtype=torch.float16)
    assert world.squared_error(a, b).item() == pytest.approx(0.0625)
