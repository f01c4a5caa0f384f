"""How the rows of a shard become teacher batches.

The rule is a part of a cache's identity (`BATCH_RULE` and `batch_tokens` are in its fingerprint), because a row's
logits may depend in the last bit on the padding of its batch. No batch crosses a shard and none depends on actors,
on free memory or on which shards are already there; running out of memory is an error, never a smaller batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor

BATCH_RULE = 1
"""Version of the rule in `cut_batches` and of the layout in `collate`."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """One sequence of an inputs shard."""

    row_id: str
    input_ids: Int32[np.ndarray, " tokens"]
    target: Bool[np.ndarray, " tokens"]
    """Bit t: the prediction made at position t, of token t+1, counts in the loss."""
    segments: Int32[np.ndarray, " documents"]
    """Lengths of the documents packed into the row; they sum to the number of tokens."""
    text_bytes: int
    """UTF-8 bytes of the text of the targets."""


def cut_batches(num_tokens: Sequence[int] | np.ndarray, batch_tokens: int) -> list[range]:
    """Cut consecutive rows greedily into batches with rows · longest row <= `batch_tokens`.

    A row that is longer than `batch_tokens` by itself is a batch of one row.
    """
    batches: list[range] = []
    start = longest = 0
    for row, length in enumerate(int(n) for n in num_tokens):
        padded = max(longest, length)
        if row > start and (row + 1 - start) * padded > batch_tokens:
            batches.append(range(start, row))
            start, padded = row, length
        longest = padded
    if len(num_tokens) > start:
        batches.append(range(start, len(num_tokens)))
    return batches


def row_key(row_id: str) -> int:
    """A signed 64-bit hash of a row id: what seeds the draws of a row (sha256, so the same everywhere)."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little", signed=True)


def collate(rows: Sequence[InputRow], *, pad_to: int | None = None) -> dict[str, Tensor]:
    """Right-pad rows to their longest, or to `pad_to`.

    input_ids[B,S] int64, position_ids[B,S] int64 (from 0 in every document; 0 in padding), target[B,S] bool,
    labels[B,S] int64 (the next token where `target`, else 0), valid[B,S] bool, row_key[B] int64.
    """
    width = max((len(row.input_ids) for row in rows), default=0)
    if pad_to is not None:
        assert pad_to >= width, f"cannot pad rows of {width} tokens to {pad_to}"
        width = pad_to
    shape = (len(rows), width)
    input_ids = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    target = np.zeros(shape, np.bool_)
    valid = np.zeros(shape, np.bool_)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[i, :n] = row.input_ids
        target[i, :n] = row.target
        valid[i, :n] = True
        starts = np.repeat(np.cumsum(row.segments) - row.segments, row.segments)
        position_ids[i, :n] = np.arange(n) - starts
    labels = np.where(target, np.roll(input_ids, -1, axis=1), 0)
    arrays = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "target": target,
        "labels": labels,
        "valid": valid,
        "row_key": np.array([row_key(row.row_id) for row in rows], np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
