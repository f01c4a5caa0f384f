"""Drawing samples towards a distribution, by the difference of two scores or by heads that tell real from made."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LEAST_SCALE = 1e-6
"""Floor of the scale by which the gradient is normalised."""


def distribution_matching(
    made: Float[Tensor, "samples ..."], fake: Float[Tensor, "samples ..."], real: Float[Tensor, "samples ..."]
) -> Float[Tensor, " samples"]:
    """½ mean((x - sg(x - g))²) per sample, whose gradient is g / size: that of KL(made ‖ real), normalised.

    g = (fake - real) / mean|x - real|, with the clean samples that the scores of the made and the real distribution
    predict from one and the same noised x. The value says how far apart the scores are, and no more: it is no distance
    that falls to 0 with the loss. Source: Yin et al. 2024, arXiv 2311.18828, Eqs. 7 and 8.
    """
    dtype = torch.promote_types(made.dtype, torch.float32)
    x, f, r = made.to(dtype), fake.detach().to(dtype), real.detach().to(dtype)
    with torch.no_grad():
        scale = (x - r).abs().flatten(1).mean(1).clamp_min(LEAST_SCALE).view(-1, *(1,) * (x.ndim - 1))
        target = x - (f - r) / scale
    return 0.5 * (x - target).square().flatten(1).mean(1)


def called_real(logits: Float[Tensor, "samples places"]) -> Float[Tensor, " samples"]:
    """softplus(-D): the loss of being told as made. Source: Goodfellow et al. 2014, arXiv 1406.2661, Sec. 3."""
    return F.softplus(-logits.float()).mean(1)


def called_made(logits: Float[Tensor, "samples places"]) -> Float[Tensor, " samples"]:
    """softplus(D): the loss of being told as real."""
    return F.softplus(logits.float()).mean(1)


def approximate_r1(
    logits: Float[Tensor, "samples places"], shifted: Float[Tensor, "samples places"]
) -> Float[Tensor, " samples"]:
    """mean((D(x) - D(x + sigma eps))²): R1 without second derivatives, for small sigma sigma² |∇D|² in the mean.

    Source: Lin et al. 2025, arXiv 2501.08316 (approximated R1).
    """
    return (logits.float() - shifted.float()).square().mean(1)
