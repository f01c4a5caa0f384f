"""Students of few steps on held-out rows: their samples against the teacher's from the same noise.

After k of its steps a student has a clean sample; its mean squared difference from the sample that the teacher's
sampler made of the same noise is `mse_after/<k>`, and after all its steps `mse_to_teacher`. A causal student makes each
chunk from its own context, as it will in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.joined import open_manifest
from raydistill.config.models import GeneratorConfig
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import OdeTrajectoryTeacher
from raydistill.diffusion.draws import noise_of
from raydistill.errors import DataError
from raydistill.evaluate.comparison import Quality
from raydistill.evaluate.denoiser import process_in
from raydistill.models.few_step import generate, seeded_noise
from raydistill.signals import Batch
from raydistill.storage import Store

MADE = Quality("mse_to_teacher")
"""Ranks students of few steps."""


@dataclass(frozen=True)
class HeldOutTrajectories:
    """Held-out samples of a teacher, cut into micro-batches."""

    dataset: DenseDataset
    teacher: str | None
    """The heaviest teacher whose trajectories are cached; None: nothing to compare with."""
    generator: GeneratorConfig
    batch_rows: int
    seed: int

    @property
    def num_steps(self) -> int:
        """Steps of the student."""
        return len(self.generator.t_list) - 1

    def batches(self) -> list[list[int]]:
        """Samples of each micro-batch, of one bucket each; the same on every rank."""
        groups: dict[int, list[int]] = {}
        for index, bucket in enumerate(self.dataset.buckets.tolist()):
            groups.setdefault(bucket, []).append(index)
        size = self.batch_rows
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def read(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The batch of some samples, with the noise that they begin with."""
        batch = self.dataset.batch(indices)
        if "noise" not in batch:
            shape = batch["latents"].shape[1:] if "latents" in batch else batch["latent_shape"][0].tolist()
            names = [name.rpartition("@") for name in self.dataset.row_ids(indices)]
            batch["noise"] = torch.stack([noise_of(row, int(k), shape, self.seed) for row, _, k in names])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def clean(self, batch: Batch) -> Tensor:
        """The teacher's samples in a batch, fp32."""
        return batch[f"{self.teacher}/clean"].float()

    def made(
        self, student: nn.Module, indices: Sequence[int], batch: Batch, *, steps: int | None = None
    ) -> Float[Tensor, "samples ..."]:
        """The student's samples from the noise that the teacher's began with, after `steps` of its steps."""
        noise = seeded_noise(self.dataset.row_ids(indices), batch["noise"], self.seed)
        return generate(student, process_in(student), self.generator, noise, batch, steps=steps)

    def errors(
        self, student: nn.Module, indices: Sequence[int], device: torch.device
    ) -> Float[Tensor, "samples steps"]:
        """Mean squared difference from the teacher after each number of steps, fp64."""
        batch = self.read(indices, device)
        clean = self.clean(batch).double()
        found = [self.made(student, indices, batch, steps=k).double() for k in range(1, self.num_steps + 1)]
        return torch.stack([(one - clean).square().flatten(1).mean(1) for one in found], dim=1)


def open_held_out_trajectories(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> HeldOutTrajectories:
    """The held-out trajectories of a run; `inputs` and `signals` are URIs of finished caches.

    Raises `DataError` when no row is held out.
    """
    assert config.student.generator is not None, "the student is one of few steps"
    kept = [t for t in config.teachers if isinstance(t, OdeTrajectoryTeacher) and t.name in signals]
    teacher = max(kept, key=lambda t: t.weight).name if kept else None
    fields: dict[str, tuple[str, ...]] = {}
    if teacher is not None:  # imported samples begin with noise of their own: their first state
        imported = open_manifest(Store(signals[teacher])).facts.get("imported") is True
        fields[teacher] = ("clean", "path") if imported else ("clean",)
    dataset = DenseDataset(
        Store(inputs), {name: Store(signals[name]) for name in fields}, config.latents.noise,
        split="held_out", fields=fields, max_rows=max_rows or config.evaluate.max_rows,
    )  # fmt: skip
    if not dataset.num_rows:
        raise DataError(
            f"{inputs}: wanted held-out rows to measure on, found none; raise evaluate.held_out "
            f"({config.evaluate.held_out}) or add rows to the source."
        )
    size = config.phases[-1].batch.micro_size
    return HeldOutTrajectories(dataset, teacher, config.student.generator, size, config.seed)


class TrajectoryValidator:
    """The validator that the training loop calls: sums on each rank, metrics from their total."""

    def __init__(self, rows: HeldOutTrajectories):
        self.rows = rows

    @torch.no_grad()
    def sums(self, student: nn.Module, *, rank: int = 0, world_size: int = 1) -> dict[str, float]:
        """The sums of this rank's share; every rank makes the same number of forward passes (ZeRO-3 needs that)."""
        rows = self.rows
        if rows.teacher is None:
            return {"samples": 0.0}
        was_training = student.training
        student.eval()
        device = next(student.parameters()).device
        total = torch.zeros(rows.num_steps, dtype=torch.float64, device=device)
        batches, count = rows.batches(), 0
        for first in range(0, len(batches), world_size):
            mine = first + rank
            errors = rows.errors(student, batches[mine if mine < len(batches) else 0], device)
            if mine < len(batches):
                total += errors.sum(0)
                count += len(errors)
        student.train(was_training)
        return {"samples": float(count), **{f"after/{k}": float(v) for k, v in enumerate(total, start=1)}}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the summed `sums` of all ranks; none without a teacher."""
        return trajectory_metrics(totals)


def trajectory_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Means over the held-out samples: `mse_after/<k>` for each number of steps, and `mse_to_teacher` after all."""
    if not totals["samples"]:
        return {}
    after = {f"mse_{name}": value / totals["samples"] for name, value in totals.items() if name != "samples"}
    return {"mse_to_teacher": after[f"mse_after/{len(after)}"], **after}


def make_validator(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> TrajectoryValidator:
    """The validator of a run; `inputs` and `signals` (by teacher) are URIs of finished caches."""
    return TrajectoryValidator(open_held_out_trajectories(config, inputs=inputs, signals=signals, max_rows=max_rows))
