"""Distances between predictions of a denoiser, and what a sample of some timestep counts.

Each distance is one number per sample: the mean over its elements, in fp32 or the wider format of its arguments.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Distance: TypeAlias = Literal["mse", "huber", "smooth_l1"]
Weighting: TypeAlias = Literal["constant", "snr", "min_snr"]
Predicted: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow"]


def distance(
    kind: Distance,
    prediction: Float[Tensor, "samples ..."],
    target: Float[Tensor, "samples ..."],
    *,
    delta: float = 1.0,
) -> Float[Tensor, " samples"]:
    """The mean over a sample's elements of, with d = prediction - target,

    - `mse`: d²
    - `huber`: d²/2 where |d| ≤ delta, else delta (|d| - delta/2). Source: Huber 1964, Ann. Math. Stat. 35(1).
    - `smooth_l1`: huber / delta. Source: Girshick 2015, arXiv 1504.08083, Eq. 3 (with delta 1).
    """
    assert prediction.shape == target.shape, f"shapes {tuple(prediction.shape)} and {tuple(target.shape)}"
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    a, b = prediction.to(dtype), target.to(dtype)
    match kind:
        case "mse":
            each = (a - b).square()
        case "huber":
            each = F.huber_loss(a, b, reduction="none", delta=delta)
        case "smooth_l1":
            each = F.smooth_l1_loss(a, b, reduction="none", beta=delta)
    return each.flatten(1).mean(1)


def timestep_weight(
    weighting: Weighting,
    alpha: Float[Tensor, " timesteps"],
    sigma: Float[Tensor, " timesteps"],
    *,
    predicted: Predicted,
    gamma: float = 5.0,
) -> Float[Tensor, " timesteps"]:
    """What the squared error of a prediction counts at x_t = alpha x0 + sigma eps.

    The weight is stated for the error of the clean data: SNR = alpha²/sigma² for `snr` and min(SNR, gamma) for
    `min_snr`. With x_t given, an error e of a prediction is an error (sigma/D) e of x0, where D is alpha for epsilon,
    sigma for sample, alpha² + sigma² for v_prediction and alpha + sigma for flow; so the same loss is

        min(SNR, gamma) (sigma/D)² |e|² = min(alpha², gamma sigma²) / D² |e|²

    In the variance preserving case that is min(SNR, gamma)/SNR for epsilon and min(SNR, gamma)/(SNR + 1) for v.
    `constant` is 1 whatever is predicted. Sources: Hang et al. 2023, arXiv 2303.09556, Sec. 3.4 (min-SNR); Salimans &
    Ho 2022, arXiv 2202.00512, Sec. 4 (weights of the prediction types).
    """
    if weighting == "constant":
        return torch.ones_like(alpha)
    power = alpha.square() if weighting == "snr" else torch.minimum(alpha.square(), gamma * sigma.square())
    match predicted:
        case "epsilon":
            # Where nothing of x0 is left both go to 0, and their ratio to 1.
            return torch.where(alpha == 0, 1.0, power / alpha.square())
        case "sample":
            return power / sigma.square()
        case "v_prediction":
            return power / (alpha.square() + sigma.square()).square()
        case "flow":
            return power / (alpha + sigma).square()
