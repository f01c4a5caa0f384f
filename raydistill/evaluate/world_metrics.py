"""What a world model's predictions are worth, summed over held-out clips so that micro-batches and ranks add up.

One-step predictions start from true frames. A change is what differs from the last true frame; its cosine takes all
valid steps of a clip as one vector, so that steps in which nothing happens do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from raydistill.cache.episode_read import EpisodeDataset
from raydistill.config.schema import RunConfig
from raydistill.errors import DataError
from raydistill.losses import world as losses
from raydistill.storage import Store


@dataclass(frozen=True)
class Clips:
    """Held-out clips on one device."""

    frames: Float[Tensor, "clips frames channels height width"]
    actions: Tensor
    valid: Bool[Tensor, "clips steps"]
    row_ids: tuple[str, ...]


def held_out_clips(config: RunConfig, inputs: str, *, max_rows: int | None, split: str = "held_out") -> Clips:
    """Clips of a finished cache; `DataError` when no episode is held out."""
    dataset = EpisodeDataset(Store(inputs), {}, split=split, fields={}, max_rows=max_rows)
    if not dataset.num_rows:
        raise DataError(
            f"{inputs}: wanted held-out episodes to measure on, found none; raise evaluate.held_out "
            f"({config.evaluate.held_out}) or add episodes to the source"
        )
    indices = range(dataset.num_rows)
    batch = dataset.batch(indices)
    return Clips(batch["frames"].float() / 255, batch["actions"], batch["valid"], tuple(dataset.row_ids(indices)))


def clip_cosine(
    change: Float[Tensor, "b s ..."], target: Float[Tensor, "b s ..."], valid: Bool[Tensor, "b s"]
) -> Float[Tensor, " b"]:
    """Cosine of two changes, the valid steps of a clip taken as one vector; 0 where either is none."""
    mask = valid.view(*valid.shape, *(1,) * (change.ndim - 2))
    ones = torch.zeros_like(change.flatten(2).flatten(1))
    return losses.change_cosine((change * mask).flatten(1)[:, None], (target * mask).flatten(1)[:, None], ones)[:, 0]


@torch.no_grad()
def one_step(model: nn.Module, frames: Tensor, actions: Tensor) -> Tensor:
    """Predictions [B, S, C, H, W] fp32 of the frames after the first, each from the true ones before it."""
    predicted: Tensor = model(frames, actions).frames.float()
    return predicted


@dataclass(frozen=True)
class WorldValidator:
    """Measures a student on held-out clips during training."""

    clips: Clips
    batch: int

    @torch.no_grad()
    def sums(self, student: nn.Module, *, rank: int, world_size: int) -> dict[str, float]:
        """The sums of this rank's share; every rank makes the same number of forward passes."""
        first = next(student.parameters())
        totals = {"clips": 0.0, "steps": 0.0, "mse": 0.0, "cosine": 0.0}
        starts = list(range(0, len(self.clips.frames), self.batch))
        for turn in range(0, len(starts), world_size):
            place = turn + rank
            part = slice(starts[min(place, len(starts) - 1)], starts[min(place, len(starts) - 1)] + self.batch)
            frames = self.clips.frames[part].to(first.device)
            valid = self.clips.valid[part].to(first.device)
            found = one_step(student, frames, self.clips.actions[part].to(first.device))
            if place >= len(starts):
                continue
            totals["clips"] += len(frames)
            totals["steps"] += float(valid.sum())
            totals["mse"] += float((losses.squared_error(found, frames[:, 1:]) * valid).sum())
            cosine = clip_cosine(found - frames[:, :-1], frames[:, 1:] - frames[:, :-1], valid)
            totals["cosine"] += float(cosine.sum())
        return totals

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """`mse_to_truth` of predicted frames, and `true_change_cosine`."""
        return {
            "mse_to_truth": totals["mse"] / max(totals["steps"], 1.0),
            "true_change_cosine": totals["cosine"] / max(totals["clips"], 1.0),
        }


def make_validator(config: RunConfig, *, inputs: str, max_rows: int | None = None) -> WorldValidator:
    """What measures a student of `config`; `inputs` is the URI of the finished cache."""
    clips = held_out_clips(config, inputs, max_rows=max_rows or config.evaluate.worlds.clips)
    return WorldValidator(clips, config.phases[-1].batch.micro_size)
