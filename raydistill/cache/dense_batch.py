"""The batch that a denoiser sees: one function makes it for teachers that are captured and for students that train.

So what a teacher was asked is what the student is asked later: the same latents, noise, timestep and caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydistill.cache.dense import LATENT_SHAPE, DenseShard, signed
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import caption_dropped, noise_of, noise_sha, timestep_of

BATCH_RULE = 1
"""Version of the layout of `denoiser_batch` and of the rule in `cut_draws`; a part of a signal's fingerprint."""
STORED_NOISE = "noise"
"""Tensor of an inputs shard whose noise was not drawn from row ids but came with the rows; `timestep` is beside it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of noise for one image: what counts as a sample."""

    shard: DenseShard
    """Shard of the inputs."""
    row: int
    draw: int

    @property
    def row_id(self) -> str:
        """Id of the image."""
        return self.shard.row_ids[self.row]

    def timestep(self, noise: NoiseConfig) -> int:
        """Timestep of the draw."""
        if STORED_NOISE in self.shard.names:
            return int(self.shard.tensor("timestep")[self.row, self.draw])
        return timestep_of(self.row_id, self.draw, noise)

    def noise(self, noise: NoiseConfig) -> Tensor:
        """Noise of the draw, fp32 [C, (T,) h, w]."""
        if STORED_NOISE in self.shard.names:
            return torch.from_numpy(as_floats(self.shard.tensor(STORED_NOISE)[self.row, self.draw]))
        return noise_of(self.row_id, self.draw, self.shard.latent_shape, noise.seed)

    def prompt(self, noise: NoiseConfig | None) -> int:
        """Place of the draw's caption among the prompts of the shard; the last one is the empty caption."""
        if noise is not None and caption_dropped(self.row_id, self.draw, noise):
            return len(self.shard.tensor("prompt_embeds")) - 1
        return int(self.shard.tensor("prompt_index")[self.row])


def draws_of(shard: DenseShard, draws_per_row: int) -> list[Draw]:
    """All draws of a shard, row by row."""
    return [Draw(shard, row, draw) for row in range(shard.rows) for draw in range(draws_per_row)]


def cut_draws(draws: Sequence[Draw], batch_rows: int) -> list[Sequence[Draw]]:
    """Consecutive draws in batches of `batch_rows`; the last may be smaller."""
    return [draws[i : i + batch_rows] for i in range(0, len(draws), batch_rows)]


def denoiser_batch(draws: Sequence[Draw], noise: NoiseConfig | None) -> dict[str, Tensor]:
    """Draws of one bucket as a batch of B samples.

    latents[B,C,(T,)h,w] fp32 (of prompts latent_shape[B,3 or 4] int64 instead), noise[B,C,(T,)h,w] fp32, timestep[B]
    int64, time_ids[B,6] fp32; where the inputs have text also
    prompt_embeds[B,L,D] fp32 and empty_embeds[B,L,D] fp32 (those of the empty caption), and pooled[B,P] fp32 and
    empty_pooled[B,P] fp32 where the text encoders pool. Captions are dropped where their draw says so.

    Without `noise` there are no noise and timestep, and no caption is dropped: they are drawn later.
    """
    if "latents" in draws[0].shard.names:
        batch = {"latents": _stacked([draw.shard.tensor("latents")[draw.row] for draw in draws])}
    else:
        batch = {LATENT_SHAPE: torch.tensor([draw.shard.latent_shape for draw in draws])}
    if noise is not None:
        batch["noise"] = torch.from_numpy(np.stack([draw.noise(noise).numpy() for draw in draws]))
        batch["timestep"] = torch.tensor([draw.timestep(noise) for draw in draws])
    batch["time_ids"] = _stacked([draw.shard.tensor("time_ids")[draw.row] for draw in draws])
    for name, empty in (("prompt_embeds", "empty_embeds"), ("pooled", "empty_pooled")):
        if name in draws[0].shard.names:
            tables = [draw.shard.tensor(name) for draw in draws]
            prompts = [table[draw.prompt(noise)] for table, draw in zip(tables, draws, strict=True)]
            batch[name] = _stacked(prompts)
            # A real copy for every sample: memory that samples share cannot be pinned.
            batch[empty] = _stacked([tables[0][-1]] * len(draws))
    return batch


def noise_hashes(noise: Tensor) -> list[int]:
    """What a signal keeps of the noise [B, ...] of each sample: eight bytes of its hash as int64."""
    return [signed(noise_sha(one)) for one in noise]


def as_floats(values: Tensor) -> np.ndarray:
    """Values of any floating dtype as fp32."""
    # NumPy, not torch: torch would start its own threads in the loader's background thread.
    if values.dtype == torch.bfloat16:
        return (values.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    return values.numpy().astype(np.float32)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Mapped rows as one tensor of their dtype, in memory."""
    whole = np.stack([row.reshape(-1).view(torch.uint8).numpy() for row in rows])
    return torch.from_numpy(whole).view(rows[0].dtype).reshape(len(rows), *rows[0].shape)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.from_numpy(np.stack([as_floats(row) for row in rows]))
