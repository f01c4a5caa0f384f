"""The semantic audit of denoisers: a teacher that is run again says what its cache says, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard
from raydistill.cache.dense_batch import Draw, denoiser_batch
from raydistill.cache.dense_capture import predictions
from raydistill.config.sources import NoiseConfig
from raydistill.signals import Teacher


@dataclass(frozen=True, slots=True)
class DenseAudit:
    """The teacher against its cache, over the sampled draws."""

    draws: int
    mean_difference: float
    """Root mean square difference over root mean square of the stored values; the mean over draws."""
    largest: float
    """The same, of the draw and field with the largest."""
    where: str
    """Row, draw and field of the largest."""

    def wrong(self, tolerance: float) -> str | None:
        """What exceeds `tolerance`, in words."""
        if self.largest <= tolerance:  # a NaN is not
            return None
        return f"the teacher says something else than its cache ({self}; tolerance {tolerance:g})"

    def __str__(self) -> str:
        return (
            f"{self.draws:,} draws, relative rms difference mean {self.mean_difference:.1e}, "
            f"largest {self.largest:.1e} ({self.where})"
        )


def audit_draws(
    teacher: Teacher, inputs: DenseShard, signal: DenseShard, noise: NoiseConfig, rows: Sequence[int]
) -> DenseAudit:
    """Run `teacher` on one draw of each of `rows` by itself and compare with what the signal shard keeps of it.

    What the teacher says is stored as the signal is before it is compared, so that this rounding does not count.
    """
    differences: list[tuple[float, str]] = []
    for place, row in enumerate(rows):
        draw = Draw(inputs, row, place % noise.draws_per_row)
        said = predictions(teacher, denoiser_batch([draw], noise), where=f"audit of row {draw.row_id}")
        for name, values in said.items():
            if name not in signal.names:  # an imported signal has no taps
                continue
            kept = signal.tensor(name)[row, draw.draw]
            again = values[0].cpu().to(kept.dtype)
            differences.append((relative_rms(again, kept), f"{name} of row {draw.row_id}, draw {draw.draw}"))
    largest, where = max(differences, key=lambda found: (found[0] != found[0], found[0]), default=(0.0, "none"))
    mean = sum(difference for difference, _ in differences) / max(len(differences), 1)
    return DenseAudit(draws=len(rows), mean_difference=mean, largest=largest, where=where)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """√mean (found - wanted)² / √mean wanted²; 0 where both are 0 everywhere."""
    difference, size = found.double() - wanted.double(), wanted.double()
    if not difference.any():
        return 0.0
    return float(
        difference.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    )
