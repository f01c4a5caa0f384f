"""From a teacher and inputs to a signal: plain Python that does the same inside an actor and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from raydistill.cache.batches import InputRow, collate, cut_batches
from raydistill.cache.shards import SignalShard, tokens_sha
from raydistill.errors import ConfigError
from raydistill.signals import Schema, Teacher, check_batch


def capture(
    teacher: Teacher,
    rows: Sequence[InputRow],
    *,
    batch_tokens: int,
    where: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> SignalShard:
    """What `teacher` says about the targets of the rows, in order; `progress` gets the tokens of each batch."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in teacher.schema}
    for batch_rows in cut_batches([len(row.input_ids) for row in rows], batch_tokens):
        batch = collate([rows[i] for i in batch_rows])
        try:
            signal = teacher(batch)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{where}: the teacher's batch of {batch['input_ids'].numel():,} tokens does not fit into its device's "
                "memory. Lower teachers.*.batch_tokens or chunk_tokens (which makes a new cache)."
            ) from error
        check_batch(signal, teacher.schema, where=where)
        for name, values in signal.items():
            pieces[name].append(values[batch["target"].to(values.device)].cpu().numpy())
        progress(int(batch["valid"].sum()))
    return SignalShard(
        row_ids=[row.row_id for row in rows],
        tokens_sha=[tokens_sha(row.input_ids) for row in rows],
        num_targets=np.array([int(row.target.sum()) for row in rows], np.int32),
        fields={name: np.concatenate(parts) for name, parts in pieces.items()},
    )


def require_targets_only(schema: Schema) -> None:
    """Every field of a Parquet signal must be ragged along `target`."""
    assert all(field.dims[:1] == ("target",) for field in schema.values()), "a field without the axis 'target' first"
