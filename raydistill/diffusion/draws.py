"""Noise, timestep and dropped caption of a draw: functions of the row's id alone, the same on every machine.

Each comes from a stream of its own (sha256 of row id, draw, stream and base seed, through NumPy's Philox), so that
the noise says nothing about the timestep. Noise is fp32 whatever the models compute in, and never stored: whoever needs
it draws it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydistill.config.sources import NoiseConfig
from raydistill.signals import sample_seed

SHA_BYTES = 8
"""Bytes of the noise's hash that a signal keeps."""


def _generator(row_id: str, draw: int, stream: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(sample_seed(row_id, draw, stream, seed)))


def timestep_of(row_id: str, draw: int, noise: NoiseConfig) -> int:
    """Timestep of a draw, stratified: draw k of n falls evenly into the k-th n-th of the range [first, end).

    first + floor((k + u) (end - first) / n) with u uniform on [0, 1), so that over all draws every timestep is equally
    likely.
    """
    first, end = noise.timesteps
    u = float(_generator(row_id, draw, "timestep", noise.seed).random())
    return min(first + int((draw + u) * (end - first) / noise.draws_per_row), end - 1)


def noise_of(row_id: str, draw: int, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise of a draw: fp32 [*shape] on the CPU."""
    generator = _generator(row_id, draw, "noise", seed)
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def caption_dropped(row_id: str, draw: int, noise: NoiseConfig) -> bool:
    """Whether the caption of a draw gives way to the empty one (Ho & Salimans 2022, arXiv 2207.12598, Alg. 1)."""
    if noise.caption_dropout == 0:
        return False
    return bool(_generator(row_id, draw, "caption", noise.seed).random() < noise.caption_dropout)


def noise_sha(noise: Tensor) -> bytes:
    """The first `SHA_BYTES` bytes of the sha256 of the noise as little-endian fp32."""
    values = noise.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.tobytes()).digest()[:SHA_BYTES]
