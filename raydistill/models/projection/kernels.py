"""Kernels of convolutions and patches of another shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Temporal = Literal["sum", "mean", "centre"]


@dataclass(frozen=True, slots=True)
class Patch:
    """How the numbers that a transformer says of a patch lie side by side."""

    height: int
    width: int
    channels: int
    """Channels, those of each frame of the patch counted."""
    channels_first: bool = False
    """Whether all pixels of a channel come together, or all channels of a pixel."""


def fit_kernel(weight: Tensor, shape: tuple[int, ...], *, num_mapped: int, temporal: Temporal) -> Tensor | None:
    """`weight` with the axes after the first `num_mapped` made those of `shape`; None where that cannot be.

    * [.., T, H, W] → [.., H, W] or [.., 1, H, W]: the sum over time, which is exact for input that does not change in
      time, where the student sees one frame; the mean or the centre slice when asked.
    * [.., 1, 1] ↔ [..]: a linear layer and a 1 × 1 convolution are the same.
    * [.., H, W] → [.., H', W']: patches of another size are resized (area), times H W / H' W', so that a constant image
      gives the same. With time, of one frame, alike.
    """
    have, want = weight.shape[num_mapped:], shape[num_mapped:]
    if have == want:
        return weight
    if len(want) == 3 and want[0] == 1:
        flat = fit_kernel(weight, (*shape[:num_mapped], *want[1:]), num_mapped=num_mapped, temporal=temporal)
        return None if flat is None else flat.unsqueeze(num_mapped)
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


def repatched(of: Patch, to: Patch) -> Tensor | None:
    """[of, to]: what is said of the pixels of a patch, for one of another size or order; None for other channels.

    Each pixel of the new patch gets the mean of the old ones under it, so that a constant image stays what it is.
    """
    if of.channels != to.channels:
        return None
    pixels = torch.eye(of.height * of.width).reshape(-1, 1, of.height, of.width)
    moved = interpolate(pixels, size=(to.height, to.width), mode="area").flatten(1)
    full = torch.einsum("ab,cd->acbd", moved, torch.eye(of.channels))  # old pixel and channel, new pixel and channel
    full = full.transpose(0, 1) if of.channels_first else full
    full = full.transpose(2, 3) if to.channels_first else full
    return full.reshape(len(moved) * of.channels, -1)
