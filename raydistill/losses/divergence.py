"""Divergences between two distributions over a few classes, each with its gradient in closed form.

`log_p` is the teacher and `log_s` the student, both normalised over the last axis. Every function returns the value
(nats, the last axis summed) and its gradient with respect to the student's *logits*, of which `log_s` is the
log-softmax. For a divergence with `h_c = ∂D/∂s_c` that gradient is `s_c (h_c - Σ_b s_b h_b)`; it sums to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs: TypeAlias = Float[Tensor, "*batch classes"]
ValueAndGradient: TypeAlias = tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch classes"]]
Divergence: TypeAlias = Callable[[Tensor, Tensor], ValueAndGradient]
Kind: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]


def _times(p: Tensor, x: Tensor) -> Tensor:
    """`p * x`, where a class of probability 0 counts 0 even when its logarithm is infinite.

    A probability that is NaN is not 0: it reaches the loss, where it is noticed.
    """
    return torch.where(p == 0, 0.0, p * x)


def _through_softmax(s: Tensor, h: Tensor) -> Tensor:
    """Gradient with respect to logits from `h = ∂D/∂s`, [..., classes]."""
    weighted = _times(s, h)
    return weighted - s * weighted.sum(-1, keepdim=True)


def forward_kl(log_p: LogProbs, log_s: LogProbs) -> ValueAndGradient:
    """`KL(p‖s) = Σ p log(p/s)`, gradient `s - p`. Source: Hinton et al. 2015, arXiv 1503.02531, Eq. 2."""
    p, s = log_p.exp(), log_s.exp()
    return _times(p, log_p - log_s).sum(-1), s - p


def reverse_kl(log_p: LogProbs, log_s: LogProbs) -> ValueAndGradient:
    """`KL(s‖p) = Σ s log(s/p)`, gradient `s (log(s/p) - KL)`. Source: Gu et al. 2023, arXiv 2306.08543, Eq. 1."""
    s = log_s.exp()
    ratio = log_s - log_p
    return _times(s, ratio).sum(-1), _through_softmax(s, ratio)


def jsd(log_p: LogProbs, log_s: LogProbs, *, beta: float) -> ValueAndGradient:
    """`β KL(p‖m) + (1-β) KL(s‖m)` with `m = β p + (1-β) s`; `∂D/∂s = (1-β) log(s/m)`.

    Divided by β(1-β) it becomes the forward KL for β → 0 and the reverse KL for β → 1.
    Source: Agarwal et al. 2023, arXiv 2306.13649, Eq. 1.
    """
    p, s = log_p.exp(), log_s.exp()
    log_m = (beta * p + (1 - beta) * s).log()
    from_student = log_s - log_m
    value = beta * _times(p, log_p - log_m).sum(-1) + (1 - beta) * _times(s, from_student).sum(-1)
    return value, _through_softmax(s, (1 - beta) * from_student)


def skew_kl(log_p: LogProbs, log_s: LogProbs, *, skew: float) -> ValueAndGradient:
    """`KL(p‖m)` with `m = λ p + (1-λ) s`; `∂D/∂s = -(1-λ) p/m`. Source: Ko et al. 2024, arXiv 2402.03898, Eq. 3."""
    p, s = log_p.exp(), log_s.exp()
    m = skew * p + (1 - skew) * s
    ratio = torch.where(m == 0, 0.0, p / m)
    return _times(p, log_p - m.log()).sum(-1), _through_softmax(s, -(1 - skew) * ratio)


def divergence(kind: Kind, *, beta: float = 0.5, skew: float = 0.1) -> Divergence:
    """The divergence of that name as a function of `(log_p, log_s)`; `beta` is for `jsd`, `skew` for `skew_kl`."""
    if kind == "jsd":
        return partial(jsd, beta=beta)
    if kind == "skew_kl":
        return partial(skew_kl, skew=skew)
    return forward_kl if kind == "forward_kl" else reverse_kl
