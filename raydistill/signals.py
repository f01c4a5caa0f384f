"""What passes between teachers, caches and recipes: fields, schemas, batches and seeded randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raydistill.errors import SignalMismatch

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
Batch: TypeAlias = Mapping[str, Tensor]
"""Tensors by name; the leading axis counts samples."""
AVERAGE = "average"
"""Name of the signal, and of the teacher that reads it, which stands for all others: their weighted mean."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor per sample, written by a teacher and read by a recipe.

    `dims` names the axes after the sample axis. The axis `"target"` is ragged: in a batch it has the padded
    sequence length, on disk only the positions where the inputs' `target` is true.
    """

    dtype: torch.dtype
    dims: tuple[str, ...]
    doc: str


Schema: TypeAlias = Mapping[str, Field]


class Teacher(Protocol):
    """A frozen model that turns inputs into a signal. It knows nothing of files or of Ray."""

    schema: Schema
    facts: Mapping[str, JsonValue]

    def __call__(self, batch: Batch) -> dict[str, Tensor]: ...


def check_batch(batch: Batch, schema: Schema, *, where: str) -> None:
    """Raise `SignalMismatch` unless `batch` has every field of `schema` with its dtype, rank and one sample count."""
    missing = sorted(set(schema) - set(batch))
    if missing:
        raise SignalMismatch(f"{where}: wanted the fields {sorted(schema)}, found {sorted(batch)}; missing: {missing}")
    sizes: dict[str, int] = {}
    for name, field in schema.items():
        tensor = batch[name]
        if tensor.dtype != field.dtype:
            raise SignalMismatch(f"{where}: field {name!r} should be {field.dtype}, found {tensor.dtype}")
        if tensor.ndim != 1 + len(field.dims):
            raise SignalMismatch(
                f"{where}: field {name!r} should have the axes ('sample', {', '.join(map(repr, field.dims))}), "
                f"found the shape {tuple(tensor.shape)}"
            )
        for axis, size in zip(("sample", *field.dims), tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise SignalMismatch(f"{where}: axis {axis!r} has the sizes {sizes[axis]} and {size} (field {name!r})")


def sample_seed(row_id: str, draw: int, stream: str, base_seed: int) -> int:
    """A 64-bit seed that depends on nothing but its arguments: not on machine, rank, order or process."""
    text = f"{row_id}|{draw}|{stream}|{base_seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class Draws:
    """The random numbers of one micro-batch, the same whatever the number of ranks or the micro-batch split.

    Per-sample draws are keyed by (seed, phase, step, position in the global batch, stream); shared draws by
    (seed, phase, step, stream). The generator is NumPy's Philox, whose stream is the same on every machine.
    """

    def __init__(self, *, seed: int, phase: str, step: int, positions: tuple[int, ...]):
        self._key = f"{seed}|{phase}|{step}"
        self.positions = positions

    def _generator(self, text: str) -> np.random.Generator:
        key = int.from_bytes(hashlib.sha256(f"{self._key}|{text}".encode()).digest()[:8], "little")
        return np.random.Generator(np.random.Philox(key))

    def shared(self, stream: str) -> np.random.Generator:
        """The generator that every rank and micro-batch of this step sees alike."""
        return self._generator(f"shared|{stream}")

    def rows(self, stream: str) -> list[np.random.Generator]:
        """One generator per sample of this micro-batch."""
        return [self._generator(f"row|{position}|{stream}") for position in self.positions]

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal fp32 noise, [samples, *shape]."""
        return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.rows(stream)]))
