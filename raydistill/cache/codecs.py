"""How the fields of a top-k signal become bytes: one blob per row and column, every step a whole-array operation.

A codec turns each field, [positions, ...] over all rows of a group, into *planes*: uint8 arrays [positions, width].
A plane is one Parquet column; a row's blob is its slice. Planes hold bytes of one kind (all low bytes, all high bytes),
so that the entropy stage of zstd, which is left to Parquet, finds what there is to find.

* ids: bytes of little significance in one plane each, as many planes as the vocabulary needs (1 to 4).
* `fp16` log-probabilities: the bit patterns of fp16 numbers of one sign are ordered as the numbers are, so in a
  descending list neighbouring patterns differ by small integers; differences are taken modulo 2^16, so that any
  pattern whatsoever comes back exactly.
* `u8` log-probabilities: 8-bit levels on a companded axis, fine where the probability is large; differences again.
* every other field: its bytes, split into planes.

A tensor signal of another kind brings its own `Codec`; nothing here knows about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from raydistill.errors import CacheMismatch

CodecName = Literal["fp16", "u8"]
CODEC_VERSIONS: Mapping[str, int] = {"fp16": 1, "u8": 1}
"""Raised whenever the same field would be written with other bytes; a part of a signal's fingerprint."""

Plane: TypeAlias = UInt8[np.ndarray, "positions width"]
Fields: TypeAlias = Mapping[str, np.ndarray]

RAW_PLANES = frozenset({"ids.0", "tail_ids.0"})
"""Planes that zstd cannot shrink (low bytes of ids: 62 of 64 bytes on real output) are stored as they are: faster."""


BLOCK = 1024
"""Positions that are decoded at a time."""
ID_FIELDS = frozenset({"ids", "tail_ids"})


class Codec(Protocol):
    """Turns fields into planes and back. `sizes` are a field's axes after the first, from the file's metadata."""

    name: str
    version: int

    def encode(self, fields: Fields) -> dict[str, Plane]: ...

    def decode(
        self, planes: Mapping[str, Plane], dtypes: Mapping[str, np.dtype], sizes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]: ...


class TopKCodec:
    """`fp16`: ids and half-precision log-probabilities, lossless."""

    name = "fp16"
    version = CODEC_VERSIONS["fp16"]

    def __init__(self, vocab_size: int):
        self.num_id_bytes = id_bytes(vocab_size)

    def encode(self, fields: Fields) -> dict[str, Plane]:
        """Planes `<field>.<byte>` of every field."""
        planes: dict[str, Plane] = {}
        for field, values in fields.items():
            if field in ID_FIELDS:
                parts = _bytes_of(values.astype(np.int32, copy=False), self.num_id_bytes)
            elif field == "logp":
                parts = self._encode_logp(values)
            else:
                parts = _bytes_of(values, values.dtype.itemsize)
            planes |= {f"{field}.{i}": part for i, part in enumerate(parts)}
        return planes

    def decode(
        self, planes: Mapping[str, Plane], dtypes: Mapping[str, np.dtype], sizes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """The fields of `dtypes`, as [positions, *sizes] arrays."""
        fields: dict[str, np.ndarray] = {}
        for field in sorted(dtypes, key=lambda name: name == "logp"):  # logp last: `u8` needs the tail mass for it
            dtype = dtypes[field]
            parts = [planes[name] for name in sorted(n for n in planes if n.rpartition(".")[0] == field)]
            if field in ID_FIELDS:
                values = _from_bytes(parts, np.dtype(np.int32))
            elif field == "logp":
                values = self._decode_logp(parts, fields)
            else:
                values = _from_bytes(parts, dtype)
            fields[field] = values.reshape(len(values), *sizes[field]).astype(dtype, copy=False)
        return fields

    def _encode_logp(self, logp: Float[np.ndarray, "positions k"]) -> list[Plane]:
        bits = np.ascontiguousarray(logp, np.float16).view(np.uint16)
        return _bytes_of(_differences(bits), 2)

    def _decode_logp(self, parts: list[Plane], others: Fields) -> np.ndarray:
        return _sums(_from_bytes(parts, np.dtype(np.uint16))).view(np.float16)


LEVELS = 255
SOFTEST = 60.0
"""Log-probabilities below -60 nats are stored as -60."""
KNEE = 1.5
"""Nats from the top after which steps grow: 0.022 nats at p = 1, 0.14 nats at p = 3e-4."""
_SCALE = LEVELS / np.log1p(SOFTEST / KNEE)
_LOGP = (-KNEE * np.expm1(np.arange(LEVELS + 1) / _SCALE)).astype(np.float32)
_MASS = np.exp(_LOGP)
MOST_SHIFT = 1.0
SHIFT_STEPS = 2048
"""The logarithm of the rescaling factor is at most 1 and rounded to 1/2048, so that a table holds every result: making
fp16 of single numbers is what NumPy does slowest."""
_SHIFTS = np.arange(int(2 * MOST_SHIFT * SHIFT_STEPS) + 1, dtype=np.float32) / SHIFT_STEPS - MOST_SHIFT
_SHIFTED = np.minimum(_LOGP + _SHIFTS[:, None], 0).astype(np.float16)


class U8Codec(TopKCodec):
    """`u8`: log-probabilities at 256 companded levels; within a position they are rescaled to sum to 1 - tail mass.

    level = 255 ln(1 - logp/1.5) / ln(1 + 60/1.5). The tail mass itself is stored as fp16, so the rescaling removes
    the common part of the rounding error. benchmarks/results/cache_codec.json states the KL divergence that is left.
    """

    name = "u8"
    version = CODEC_VERSIONS["u8"]

    def _encode_logp(self, logp: Float[np.ndarray, "positions k"]) -> list[Plane]:
        # fp16 has 32,769 patterns of numbers that are not positive: a table is exact and faster than a logarithm.
        return [_differences(_LEVEL_OF[np.ascontiguousarray(logp, np.float16).view(np.uint16)])]

    def _decode_logp(self, parts: list[Plane], others: Fields) -> np.ndarray:
        kept = np.log(np.maximum(-np.expm1(others["log_tail"].astype(np.float32)), np.float32(1e-6)))
        logp = np.empty(parts[0].shape, np.float16)
        if not logp.size:
            return logp
        for start in range(0, len(logp), BLOCK):  # in blocks that stay in the processor's cache
            levels = _sums(parts[0][start : start + BLOCK]).astype(np.intp)
            shift = kept[start : start + BLOCK] - np.log(_MASS.take(levels, mode="clip").sum(axis=1))
            steps = np.clip(np.rint((shift + MOST_SHIFT) * SHIFT_STEPS), 0, len(_SHIFTED) - 1).astype(np.intp)
            levels += (steps * (LEVELS + 1))[:, None]
            _SHIFTED.ravel().take(levels, mode="clip", out=logp[start : start + BLOCK])
        return logp


def _level_table() -> np.ndarray:
    with np.errstate(invalid="ignore"):
        nats = -np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    nats = np.clip(np.nan_to_num(nats, nan=SOFTEST, posinf=SOFTEST, neginf=0), 0, SOFTEST)
    return np.rint(np.log1p(nats / KNEE) * _SCALE).astype(np.uint8)


_LEVEL_OF = _level_table()


def codec_for(name: str, *, vocab_size: int) -> Codec:
    """The codec `name` for ids below `vocab_size`; `CacheMismatch` when this version of the package has none."""
    if name == "fp16":
        return TopKCodec(vocab_size)
    if name == "u8":
        return U8Codec(vocab_size)
    raise CacheMismatch(
        f"the cache was written with the codec {name!r}; this version knows {sorted(CODEC_VERSIONS)}. "
        "Read it with the version that wrote it, or build it again."
    )


def id_bytes(vocab_size: int) -> int:
    """Bytes that hold any id below `vocab_size` (at most 2^32)."""
    return max(1, (int(vocab_size - 1).bit_length() + 7) // 8)


def _bytes_of(values: np.ndarray, num_bytes: int) -> list[Plane]:
    """The `num_bytes` least significant bytes of each value, one plane per byte, lowest first."""
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    bits = np.ascontiguousarray(values).reshape(len(values), width).view(f"u{values.dtype.itemsize}")
    return [(bits >> bits.dtype.type(8 * byte)).astype(np.uint8) for byte in range(num_bytes)]


def _from_bytes(parts: list[Plane], dtype: np.dtype) -> np.ndarray:
    """Inverse of `_bytes_of`: [positions, width] of `dtype`; bytes that were left out are zero."""
    bits = parts[-1].astype(f"u{dtype.itemsize}")
    for part in parts[-2::-1]:
        bits <<= bits.dtype.type(8 % (8 * dtype.itemsize))
        bits |= part
    return bits.view(dtype)


def _differences(values: np.ndarray) -> np.ndarray:
    """Differences along the last axis, modulo the unsigned dtype; the first column stays."""
    gaps = np.empty_like(values)
    gaps[:, :1] = values[:, :1]
    np.subtract(values[:, 1:], values[:, :-1], out=gaps[:, 1:])
    return gaps


def _sums(gaps: np.ndarray) -> np.ndarray:
    """Inverse of `_differences`. Adding whole columns of a transposed block is faster than `cumsum` along rows."""
    sums = np.empty_like(gaps)
    for start in range(0, len(gaps), BLOCK):
        columns = np.ascontiguousarray(gaps[start : start + BLOCK].T)
        for k in range(1, len(columns)):
            columns[k] += columns[k - 1]
        sums[start : start + BLOCK] = columns.T
    return sums
