"""From a denoising teacher and images to a signal: plain Python that does the same inside an actor and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard
from raydistill.cache.dense_batch import Draw, cut_draws, denoiser_batch, draws_of, noise_hashes
from raydistill.config.sources import NoiseConfig
from raydistill.errors import ConfigError, DataError
from raydistill.signals import Field, JsonValue, Schema, Teacher, check_batch

OWN_FIELDS: Schema = {
    "timestep": Field(torch.int32, (), "timestep of the draw"),
    "noise_sha": Field(torch.int64, (), "first 8 bytes of the sha256 of the draw's noise in fp32, little-endian"),
}
"""What a signal keeps of each draw besides what the teacher says; every field has the axis `draw` first."""


def own_fields(teacher: Teacher) -> Schema:
    """Those of `OWN_FIELDS` that the signal of `teacher` keeps: a trajectory has no timestep."""
    return {name: field for name, field in OWN_FIELDS.items() if name != "timestep" or "path" not in teacher.schema}


def capture_draws(
    teacher: Teacher,
    shard: DenseShard,
    noise: NoiseConfig,
    *,
    batch_rows: int,
    dtype: torch.dtype,
    where: str,
    progress: Callable[[int], None] = lambda samples: None,
    turn: AbstractContextManager[object] | None = None,
) -> dict[str, Tensor]:
    """What `teacher` says about every draw of the images of an inputs shard: [rows, draws, ...], stored as `dtype`.

    `progress` gets the number of samples of each batch. `turn` is held while the teacher computes; the first batch is
    made before, when another shard may have its turn. Raises `ConfigError` when a batch does not fit into memory or a
    value does not fit into `dtype`, `DataError` when a value is not finite.
    """
    draws = draws_of(shard, noise.draws_per_row)
    whole: dict[str, Tensor] = {}
    done = 0
    with ThreadPoolExecutor(1, thread_name_prefix="raydistill-draws") as pool:
        batches = _ahead(pool, cut_draws(draws, batch_rows), noise)
        with turn or nullcontext():
            for part, batch in batches:
                said = predictions(teacher, batch, where=where)
                found = {name: _stored(values, dtype, part, f"{where}: {name}") for name, values in said.items()}
                own = {"timestep": batch["timestep"].int(), "noise_sha": torch.tensor(noise_hashes(batch["noise"]))}
                found |= {name: own[name] for name in own_fields(teacher)}
                for name, values in found.items():
                    if name not in whole:  # at once in its full size: large features fit into memory only once
                        whole[name] = torch.empty(len(draws), *values.shape[1:], dtype=values.dtype)
                    whole[name][done : done + len(part)] = values
                done += len(part)
                progress(len(part))
    return {name: values.unflatten(0, (shard.rows, noise.draws_per_row)) for name, values in whole.items()}


def predictions(teacher: Teacher, batch: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """What a teacher says about a batch, checked against its schema; `ConfigError` when memory runs out."""
    try:
        signal = teacher(batch)
    except torch.OutOfMemoryError as error:
        shape = tuple(batch["noise"].shape)
        raise ConfigError(
            f"{where}: the teacher's batch of {shape[0]} latents of {shape[1:]} does not fit into its device's memory. "
            "Lower teachers.*.batch_rows (which makes a new cache)."
        ) from error
    check_batch(signal, teacher.schema, where=where)
    return signal


def signal_meta(inputs: DenseShard) -> dict[str, JsonValue]:
    """The description of a signal shard: the rows of its inputs shard and what the teacher saw of them."""
    kept = ("split", "bucket", "row_ids", "row_sha")
    return {"kind": "signal", **{key: inputs.meta[key] for key in kept if key in inputs.meta}}


def _ahead(
    pool: ThreadPoolExecutor, parts: Sequence[Sequence[Draw]], noise: NoiseConfig
) -> Iterator[tuple[Sequence[Draw], dict[str, Tensor]]]:
    """Each batch while the one after it is being made, so that a teacher does not wait for noise; the first at once."""
    made = [pool.submit(denoiser_batch, part, noise) for part in parts[:1]]

    def batches() -> Iterator[tuple[Sequence[Draw], dict[str, Tensor]]]:
        for place, part in enumerate(parts):
            batch = made.pop().result()
            made.extend(pool.submit(denoiser_batch, after, noise) for after in parts[place + 1 : place + 2])
            yield part, batch

    return batches()


def _stored(values: Tensor, dtype: torch.dtype, draws: Sequence[Draw], what: str) -> Tensor:
    values = values.cpu()
    kept = values.to(dtype)
    if kept.isfinite().all():
        return kept
    place = int((~kept.isfinite()).flatten(1).any(1).nonzero()[0])
    draw = f"row {draws[place].row_id}, draw {draws[place].draw}"
    if values[place].isfinite().all():
        raise ConfigError(
            f"{what} of {draw} has a value of {float(values[place].abs().max()):g}, beyond {dtype}. Store predictions "
            "otherwise: teachers.*.store_dtype: bfloat16 or float32."
        )
    raise DataError(f"{what} of {draw} is not finite. Look at the teacher's weights, or give its model another dtype.")
