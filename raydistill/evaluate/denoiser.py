"""A denoiser on held-out draws: against its teachers' cached predictions, and against the noise itself.

A sample is a held-out image with one of its draws of noise and timestep. All errors are mean squared differences over
the elements of a prediction, stated for the common prediction type of the run. They are summed by bin of the timestep,
so that micro-batches and ranks add up; `denoiser_metrics` divides.

Notation: p_i prediction of teacher i with weight w_i (they sum to 1), m = Σ w_i p_i their mean, q the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.read import open_manifest
from raydistill.config.schema import RunConfig
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.diffusion.process import PredictionType, Process
from raydistill.errors import DataError
from raydistill.evaluate.comparison import Quality
from raydistill.models.denoiser import predict
from raydistill.recipes.base import TeacherView
from raydistill.signals import AVERAGE, Batch, JsonValue
from raydistill.storage import Store

TAUGHT = Quality("mse_to_teacher")
"""Ranks denoisers that have teachers. No student gets below the weighted variance of the teachers."""
ALONE = Quality("mse_to_noise")
"""Ranks denoisers without any."""


class Draws(Protocol):
    """What is read: held-out images, one sample per draw."""

    @property
    def num_rows(self) -> int:
        """Number of samples."""

    @property
    def buckets(self) -> np.ndarray | None:
        """Bucket of each sample; a batch has one."""

    def row_ids(self, indices: Sequence[int]) -> list[str]:
        """`<row id>@<draw>` of samples."""

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of samples."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """Latents, conditioning, cached noise, timesteps and predictions of samples of one bucket."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out image with one draw of noise."""

    index: int
    """In the data set."""
    row_id: str
    draw: int


@dataclass(frozen=True)
class HeldOutDraws:
    """Held-out samples with the predictions of the teachers, cut into micro-batches."""

    dataset: Draws
    samples: tuple[Sample, ...]
    teachers: tuple[TeacherView, ...]
    """Teachers whose own predictions are read; none where only their average is."""
    averaged: bool
    """Whether the teachers' average is read in their place."""
    kind: PredictionType
    """What the cache holds, and what errors are stated for."""
    noise: NoiseConfig
    """Where the draws come from that are not in a cache."""
    bins: int
    """Equal parts of the timestep range by which errors are kept apart."""
    batch_rows: int
    """Samples in a forward pass."""

    @property
    def taught(self) -> bool:
        """Whether there is a teacher to compare with."""
        return self.averaged or bool(self.teachers)

    @property
    def edges(self) -> list[float]:
        """Ends of the timestep bins."""
        first, end = self.noise.timesteps
        return [first + (end - first) * b / self.bins for b in range(self.bins + 1)]

    @property
    def quantities(self) -> list[str]:
        """Names of what is summed over samples in each bin, in the order of `errors`."""
        names = ["samples", "noise"]
        if self.taught:
            names += ["mean", "floor"]
        return [*names, *(f"to/{t.name}" for t in self.teachers)]

    def batches(self) -> list[list[Sample]]:
        """Samples of each micro-batch, of one bucket each; the same on every rank."""
        buckets = self.dataset.buckets
        groups: dict[int, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(0 if buckets is None else int(buckets[sample.index]), []).append(sample)
        size = self.batch_rows
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def read(self, samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
        """The batch of some samples, with the noise and timesteps that no cache holds drawn anew."""
        batch = dict(self.dataset.batch([s.index for s in samples]))
        if "noise" not in batch:
            shape = tuple(batch["latents"].shape[1:])
            batch["noise"] = torch.stack([noise_of(s.row_id, s.draw, shape, self.noise.seed) for s in samples])
            batch["timestep"] = torch.tensor([timestep_of(s.row_id, s.draw, self.noise) for s in samples])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def errors(self, prediction: Tensor, batch: Batch, process: Process) -> Float[Tensor, "samples quantities"]:
        """What is summed, of each sample, for a prediction of the common type; fp64."""
        truth = process.target(batch["latents"], batch["noise"], batch["timestep"], self.kind)
        values = [torch.ones(len(prediction), dtype=torch.float64, device=prediction.device)]
        values.append(_mse(prediction, truth))
        own = [batch[f"{t.name}/prediction"] for t in self.teachers]
        if self.averaged:
            values += [_mse(prediction, batch[f"{AVERAGE}/prediction"]), batch[f"{AVERAGE}/variance"].double()]
        elif own:
            weights = [t.weight for t in self.teachers]
            mean = torch.stack([w * p.double() for w, p in zip(weights, own, strict=True)]).sum(0)
            values.append(_mse(prediction, mean))
            values.append(torch.stack([w * _mse(p, mean) for w, p in zip(weights, own, strict=True)]).sum(0))
        values += [_mse(prediction, p) for p in own]
        return torch.stack(values, dim=1)

    def by_bin(self, errors: Float[Tensor, "samples quantities"], timestep: Tensor) -> Float[Tensor, "bins quantities"]:
        """Sums of the samples in each bin."""
        first, end = self.noise.timesteps
        bins = ((timestep.long() - first) * self.bins // (end - first)).clamp(0, self.bins - 1)
        zeros = torch.zeros(self.bins, errors.shape[1], dtype=errors.dtype, device=errors.device)
        return zeros.index_add_(0, bins, errors)


def _mse(a: Tensor, b: Tensor) -> Float[Tensor, " samples"]:
    return (a.double() - b.double()).square().flatten(1).mean(1)


def open_held_out_draws(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> HeldOutDraws:
    """The held-out draws of a run; `inputs` and `signals` are URIs of finished caches.

    Of the draws in a cache at most `evaluate.images.draws_per_row` are used for an image, spread over its strata of
    timesteps; where there is no cache of predictions, as many are drawn. The teachers' average, where it is among the
    signals, stands for all of them. Raises `DataError` when no row is held out.
    """
    averaged = AVERAGE in signals
    own = [t for t in config.teachers if t.name in signals and not averaged]
    total = sum(t.weight for t in own)
    teachers = tuple(
        TeacherView(t.name, t.weight / total if total else 0.0, open_manifest(Store(signals[t.name])).facts)
        for t in own
    )
    fields = {AVERAGE: ("prediction", "variance")} if averaged else {t.name: ("prediction",) for t in teachers}
    dataset: Draws = DenseDataset(
        Store(inputs), {name: Store(signals[name]) for name in fields}, config.images.noise,
        split="held_out", fields=fields, max_rows=max_rows or config.evaluate.max_rows,
    )  # fmt: skip
    if not dataset.num_rows:
        raise DataError(
            f"{inputs}: wanted held-out images to measure on, found none; raise evaluate.held_out "
            f"({config.evaluate.held_out}) or add images to the source"
        )
    noise, most = config.images.noise, config.evaluate.images.draws_per_row
    return HeldOutDraws(
        dataset=dataset,
        samples=tuple(choose_samples(dataset.row_ids(range(dataset.num_rows)), most, cached=bool(fields))),
        teachers=teachers,
        averaged=averaged,
        kind=noise.prediction_type,
        noise=noise if fields else noise.model_copy(update={"draws_per_row": most}),
        bins=config.evaluate.images.timestep_bins,
        batch_rows=config.phases[-1].batch.micro_size,
    )


def choose_samples(names: Sequence[str], most: int, *, cached: bool) -> list[Sample]:
    """At most `most` draws of each image, from the names `<row id>@<draw>` of all samples.

    Of n cached draws image r uses r, r + n/most, … (modulo n), so that every stratum of timesteps is met.
    """
    rows: dict[str, list[tuple[int, int]]] = {}
    for index, name in enumerate(names):
        row_id, _, draw = name.rpartition("@")
        rows.setdefault(row_id, []).append((index, int(draw)))
    chosen = []
    for number, (row_id, draws) in enumerate(rows.items()):
        if cached:
            count = min(most, len(draws))
            places = sorted((number + i * len(draws) // count) % len(draws) for i in range(count))
            chosen += [Sample(draws[p][0], row_id, draws[p][1]) for p in places]
        else:
            chosen += [Sample(draws[0][0], row_id, draw) for draw in range(most)]
    return chosen


def common_prediction(network: nn.Module, batch: Batch, kind: PredictionType) -> tuple[Tensor, Process]:
    """The prediction of a student at the draws of `batch`, as one of `kind` in fp32, and the student's process."""
    process = process_in(network)
    x_t = process.noisy(batch["latents"], batch["noise"], batch["timestep"])
    own = predict(network, x_t, process.times(batch["timestep"]), batch)
    return process.convert(own.float(), x_t, batch["timestep"], source=process.prediction_type, target=kind), process


def process_in(network: nn.Module) -> Process:
    """The process that a student carries."""
    process = getattr(network, "process", None)
    assert isinstance(process, Process), "a denoiser that was loaded as a student carries its process"
    return process


def sum_in_batches(
    rows: HeldOutDraws, errors: Callable[[dict[str, Tensor]], Tensor], device: torch.device, *, rank: int, ranks: int
) -> dict[str, float]:
    """Sums of `errors(batch)` over this rank's micro-batches; every rank makes the same number of calls."""
    batches = rows.batches()
    total = torch.zeros(rows.bins, len(rows.quantities), dtype=torch.float64, device=device)
    for first in range(0, len(batches), ranks):
        mine = first + rank
        batch = rows.read(batches[mine if mine < len(batches) else 0], device)
        found = errors(batch)
        if mine < len(batches):
            total += rows.by_bin(found, batch["timestep"])
    names = [f"{name}/{b:02}" for b in range(rows.bins) for name in rows.quantities]
    return dict(zip(names, total.flatten().tolist(), strict=True))


class DenoiserValidator:
    """The validator that the training loop calls: sums on each rank, metrics from their total."""

    def __init__(self, rows: HeldOutDraws):
        self.rows = rows

    @torch.no_grad()
    def sums(self, student: nn.Module, *, rank: int = 0, world_size: int = 1) -> dict[str, float]:
        """The sums of this rank's share; every rank makes the same number of forward passes (ZeRO-3 needs that)."""

        def errors(batch: dict[str, Tensor]) -> Tensor:
            prediction, process = common_prediction(student, batch, self.rows.kind)
            return self.rows.errors(prediction, batch, process)

        was_training = student.training
        student.eval()
        device = next(student.parameters()).device
        found = sum_in_batches(self.rows, errors, device, rank=rank, ranks=world_size)
        student.train(was_training)
        return found

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the summed `sums` of all ranks."""
        return denoiser_metrics(totals, self.rows)


def make_validator(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> DenoiserValidator:
    """The validator of a run; `inputs` and `signals` (by teacher, possibly none) are URIs of finished caches."""
    return DenoiserValidator(open_held_out_draws(config, inputs=inputs, signals=signals, max_rows=max_rows))


def denoiser_metrics(totals: Mapping[str, float], rows: HeldOutDraws) -> dict[str, float]:
    """Means over the held-out samples, from sums over all bins and ranks.

    * `mse_to_teacher`: Σ w_i |q - p_i|², and as the mean is where that is least, |q - m|² + Σ w_i |p_i - m|²;
    * `mse_to_mean`: |q - m|², its part that a student can lower (with several teachers);
    * `mse_to/<teacher>`: |q - p_i|²;
    * `mse_to_noise`: the error against what is true (the noise, where the common type is `epsilon`).
    """
    sums = {name: sum(totals[f"{name}/{b:02}"] for b in range(rows.bins)) for name in rows.quantities}
    return {name: value / sums["samples"] for name, value in _named(sums, rows).items()}


def by_timestep(totals: Mapping[str, float], rows: HeldOutDraws) -> dict[str, JsonValue]:
    """The same means in each timestep bin; null where a bin has no sample."""
    bins = [{name: totals[f"{name}/{b:02}"] for name in rows.quantities} for b in range(rows.bins)]
    named = [_named(sums, rows) for sums in bins]
    return {
        name: [v[name] / s["samples"] if s["samples"] else None for v, s in zip(named, bins, strict=True)]
        for name in named[0]
    }


def _named(sums: Mapping[str, float], rows: HeldOutDraws) -> dict[str, float]:
    found = {}
    if rows.taught:
        found["mse_to_teacher"] = sums["mean"] + sums["floor"]
    if rows.averaged or len(rows.teachers) > 1:
        found["mse_to_mean"] = sums["mean"]
        found |= {f"mse_to/{t.name}": sums[f"to/{t.name}"] for t in rows.teachers}
    return {**found, "mse_to_noise": sums["noise"]}


def evaluate_denoiser(network: nn.Module, rows: HeldOutDraws) -> dict[str, JsonValue]:
    """The quality of one student for metrics.json, in all and by timestep."""
    totals = DenoiserValidator(rows).sums(network)
    return {**denoiser_metrics(totals, rows), "by_timestep": by_timestep(totals, rows)}


def teacher_lines(rows: HeldOutDraws, process: Process) -> dict[str, dict[str, JsonValue]]:
    """The quality of each teacher, from its cached predictions; no teacher runs. `process` is that of its schedule."""
    lines: dict[str, dict[str, JsonValue]] = {}
    for teacher in rows.teachers:

        def errors(batch: dict[str, Tensor], name: str = teacher.name) -> Tensor:
            return rows.errors(batch[f"{name}/prediction"], batch, process)

        totals = sum_in_batches(rows, errors, torch.device("cpu"), rank=0, ranks=1)
        lines[teacher.name] = {**denoiser_metrics(totals, rows), "by_timestep": by_timestep(totals, rows)}
    return lines


def floor_line(rows: HeldOutDraws, process: Process) -> dict[str, JsonValue]:
    """What a perfect student would reach: the mean of the teachers' predictions, whose `mse_to_teacher` is their
    weighted variance."""

    def errors(batch: dict[str, Tensor]) -> Tensor:
        if rows.averaged:
            return rows.errors(batch[f"{AVERAGE}/prediction"], batch, process)
        means = [t.weight * t.field(batch, "prediction").double() for t in rows.teachers]
        return rows.errors(torch.stack(means).sum(0), batch, process)

    totals = sum_in_batches(rows, errors, torch.device("cpu"), rank=0, ranks=1)
    return {**denoiser_metrics(totals, rows), "by_timestep": by_timestep(totals, rows)}
