"""Clips of an inputs shard of episodes as a batch: the same for teachers that are asked and students that train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard
from raydistill.cache.dense_batch import stacked

EPISODES_FORMAT = 1
"""Version of the layout of inputs shards of episodes; a part of their fingerprint."""
CLIPS_RULE = 1
"""Version of `clip_batch` and of how batches are cut; a part of a signal's fingerprint."""


def clip_batch(places: Sequence[tuple[DenseShard, int]]) -> dict[str, Tensor]:
    """B clips: `frames` [B, T, 3, H, W] uint8, `actions` [B, T - 1] int64, `valid` [B, T - 1] bool (steps of the
    episode, not padding), `row_key` [B] int64 (first 8 bytes of sha256(row id))."""
    frames = stacked([shard.tensor("frames")[row] for shard, row in places])
    actions = stacked([shard.tensor("actions")[row] for shard, row in places]).long()
    steps = torch.tensor([int(shard.tensor("valid")[row]) for shard, row in places])
    return {
        "frames": frames,
        "actions": actions,
        "valid": torch.arange(actions.shape[1])[None, :] < steps[:, None],
        "row_key": torch.tensor([row_key(shard.row_ids[row]) for shard, row in places]),
    }


def row_key(row_id: str) -> int:
    """Eight bytes of a row id's hash as a signed number."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little", signed=True)
