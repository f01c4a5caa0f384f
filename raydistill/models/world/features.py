"""Hidden states and attention maps of any world model in one shape per clip, whatever shape its modules put out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.signals import sample_seed

TapKind = Literal["hidden", "spatial", "temporal"]


def per_clip(feature: Tensor, kind: TapKind, clips: int, *, where: str) -> Tensor:
    """What a module put out for `clips` clips, with one clip per row.

    * hidden states to [clips, groups, tokens, width]: groups are frames (or steps) where the output tells them apart,
      else there is one. Maps [.., channels, height, width] of frames become tokens.
    * attention maps to [clips, maps, queries, keys], the mean over heads; maps are frames (`spatial`) or places
      (`temporal`).

    The first axis may count clips, or frames or places of all clips one after the other.
    `ConfigError` when the output has no such shape.
    """
    found = feature if feature.shape[0] == clips else _by_clip(feature, clips, where)
    match kind, found.ndim:
        case "hidden", 3:
            return found[:, None]
        case "hidden", 4:
            return found
        case "hidden", 5:
            return found.flatten(3).mT
        case (("spatial" | "temporal"), 4):  # one map per clip: [clips, heads, queries, keys]
            return found.mean(1)[:, None]
        case (("spatial" | "temporal"), 5):
            return found.mean(2)
        case _:
            wanted = "[…, tokens, width]" if kind == "hidden" else "[…, heads, queries, keys]"
            raise ConfigError(f"{where}: wanted an output {wanted}, found {list(feature.shape)}; tap another module.")


def _by_clip(feature: Tensor, clips: int, where: str) -> Tensor:
    if feature.ndim == 0 or feature.shape[0] % clips:
        raise ConfigError(
            f"{where}: wanted an output whose first axis counts the {clips} clips, or frames of them, found "
            f"{list(feature.shape)}; tap another module."
        )
    return feature.unflatten(0, (clips, -1))


def groups_valid(groups: int, valid: Bool[Tensor, "clips steps"]) -> Bool[Tensor, "clips groups"]:
    """Which groups of hidden states (or maps) count: frames and steps as far as they are real, else those of clips."""
    steps = valid.shape[1]
    if groups == steps:
        return valid
    if groups == steps + 1:
        return frames_valid(valid)
    return valid.any(1, keepdim=True).expand(-1, groups)


def frames_valid(valid: Bool[Tensor, "clips steps"]) -> Bool[Tensor, "clips frames"]:
    """Which frames of a clip are real: the first where there is any step, then those that a real step leads to."""
    return torch.cat([valid[:, :1], valid], 1)


def directions(name: str, width: int, rank: int) -> Float[Tensor, "width rank"]:
    """Orthonormal random directions that depend on nothing but the tap's name and the sizes.

    Scaled so that the squared length of a product is that of the whole on average.
    Source: Johnson & Lindenstrauss 1984 (random projections keep distances in proportion).
    """
    draws = np.random.Generator(np.random.Philox(sample_seed(name, rank, "directions", width)))
    basis, _ = np.linalg.qr(draws.standard_normal((width, rank)))
    return torch.from_numpy(basis * np.sqrt(width / rank)).float()
