"""Losses of world models: one number per step (or per clip), in fp32 or wider; whoever calls sums and counts the valid.

Frames are [B, S, C, H, W] with values in [0, 1]; S counts steps (frames after the first) or frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_error(a: Float[Tensor, "b s ..."], b: Float[Tensor, "b s ..."]) -> Float[Tensor, "b s"]:
    """Mean squared difference over everything behind the first two axes.

    Between an adapted hidden state of the student and one of the teacher: Romero et al. 2015, arXiv 1412.6550, Eq. 3.
    """
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (_wide(a) - _wide(b)).square().flatten(2).mean(2)


def tempered_kl(
    student: Float[Tensor, "b s n k"], teacher: Float[Tensor, "b s n k"], temperature: float
) -> Float[Tensor, "b s"]:
    """T² Σ_k p_k log(p_k / q_k), averaged over tokens, with p and q the softmax of teacher's and student's logits / T.

    Source: Hinton et al. 2015, arXiv 1503.02531, Sec. 2 (the factor T² keeps gradients of one size over T).
    """
    log_p = (_wide(teacher) / temperature).log_softmax(-1)
    log_q = (_wide(student) / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def code_cross_entropy(logits: Float[Tensor, "b s n k"], codes: Int[Tensor, "b s n"]) -> Float[Tensor, "b s"]:
    """Cross-entropy of the true codes in nats, averaged over tokens."""
    picked = _wide(logits).log_softmax(-1).gather(-1, codes.long()[..., None])[..., 0]
    return -picked.mean(-1)


def attention_transfer(
    student: Float[Tensor, "b m q k"], teacher: Float[Tensor, "b m q k"], valid: Bool[Tensor, "b m q"]
) -> Float[Tensor, " b"]:
    """|a / |a| - t / |t||², averaged over the maps of a clip; each map [queries, keys] is one vector.

    Queries that are not `valid` are left out of both; a map without any counts as nothing.
    Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928, Eq. 2.
    """
    assert student.shape == teacher.shape, f"shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
    mask = valid[..., None]
    unit = [F.normalize((_wide(x) * mask).flatten(2), dim=2) for x in (student, teacher)]
    each = (unit[0] - unit[1]).square().sum(2)
    there = valid.any(2)
    return (each * there).sum(1) / there.sum(1).clamp_min(1)


def smoothness(a: Float[Tensor, "b s ..."], b: Float[Tensor, "b s ..."]) -> Float[Tensor, "b s_minus_1"]:
    """Mean squared difference between the changes of `a` and of `b` from one step to the next."""
    return squared_error(a[:, 1:] - a[:, :-1], b[:, 1:] - b[:, :-1])


def diversity(
    frames: Float[Tensor, "b s ..."], target: Float[Tensor, "b s ..."], valid: Bool[Tensor, "b s"]
) -> Float[Tensor, ""]:
    """How much more alike the predictions of different clips are than their targets: max(0, 1 - D / D*).

    D is the mean squared distance of valid steps of all clips from their mean, which is half that between pairs; D* the
    same of the targets. 0 when the predictions are as diverse as the targets, 1 when they are all one; a statistic of
    the batch.
    """
    spread = _spread(frames, valid) / _spread(target.detach(), valid).clamp_min(1e-12)
    return (1 - spread).clamp_min(0)


def _spread(frames: Tensor, valid: Tensor) -> Tensor:
    rows = _wide(frames)[valid].flatten(1)
    if len(rows) < 2:
        return rows.sum() * 0 + 1
    return (rows - rows.mean(0)).square().mean()


def codebook_usage(assignment: Float[Tensor, "b t n k"]) -> Float[Tensor, ""]:
    """log K - H(mean probability of each code), in nats: 0 when all codes are used alike; a statistic of the batch.

    Source: Yu et al. 2024, arXiv 2310.05737, Eq. 5 (the entropy of the mean assignment).
    """
    mean = _wide(assignment).softmax(-1).flatten(0, -2).mean(0)
    entropy = torch.special.entr(mean).sum()
    return torch.log(torch.tensor(float(len(mean)), device=mean.device)) - entropy


def change_cosine(
    frames: Float[Tensor, "b s ..."], target: Float[Tensor, "b s ..."], last: Float[Tensor, "b ..."]
) -> Float[Tensor, "b s"]:
    """Cosine of the predicted change from the last frame that was seen with the target's; 0 where either is none.

    Copying that frame scores 0, whatever happens.
    """
    a, b = ((_wide(x) - _wide(last)[:, None]).flatten(2) for x in (frames, target))
    norms = a.norm(dim=2) * b.norm(dim=2)
    return torch.where(norms > 0, (a * b).sum(2) / norms.clamp_min(1e-12), torch.zeros_like(norms))


def raw_cosine(frames: Float[Tensor, "b s ..."], target: Float[Tensor, "b s ..."]) -> Float[Tensor, "b s"]:
    """Cosine of frames as vectors."""
    return F.cosine_similarity(_wide(frames).flatten(2), _wide(target).flatten(2), dim=2)
