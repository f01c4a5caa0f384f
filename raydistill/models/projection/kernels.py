"""Kernels of convolutions and patches of another shape."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate

Temporal = Literal["sum", "mean", "centre"]


def fit_kernel(weight: Tensor, shape: tuple[int, ...], *, num_mapped: int, temporal: Temporal) -> Tensor | None:
    """`weight` with the axes after the first `num_mapped` made those of `shape`; None where that cannot be.

    * [.., T, H, W] → [.., H, W]: the sum over time, which is exact for input that does not change in time, where the
      student sees one frame; the mean or the centre slice when asked.
    * [.., 1, 1] ↔ [..]: a linear layer and a 1 × 1 convolution are the same.
    * [.., H, W] → [.., H', W']: patches of another size are resized (area), times H W / H' W', so that a constant image
      gives the same.
    """
    have, want = weight.shape[num_mapped:], shape[num_mapped:]
    if have == want:
        return weight
    if len(have) == 3 and len(want) in (2, 0):
        weight = _without_time(weight, num_mapped, temporal)
        have = weight.shape[num_mapped:]
        if have == want:
            return weight
    if not want and all(n == 1 for n in have):
        return weight.reshape(weight.shape[:num_mapped])
    if not have and all(n == 1 for n in want):
        return weight.reshape(*weight.shape, *want)
    if len(have) == 2 and len(want) == 2 and num_mapped == 2:
        scale = have[0] * have[1] / (want[0] * want[1])
        return interpolate(weight.float(), size=want, mode="area") * scale
    return None


def _without_time(weight: Tensor, axis: int, temporal: Temporal) -> Tensor:
    match temporal:
        case "sum":
            return weight.squeeze(axis) if weight.shape[axis] == 1 else weight.float().sum(axis)
        case "mean":
            return weight.float().mean(axis)
        case "centre":
            return weight.select(axis, weight.shape[axis] // 2)
