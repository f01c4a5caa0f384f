"""The semantic audit: a teacher that is run again says what its cache says, up to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from raydistill.cache.batches import InputRow, collate
from raydistill.cache.capture import capture
from raydistill.cache.codecs import Codec, Fields
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import SignalShard, read_signal
from raydistill.config.recipes import LmLogitsRecipe
from raydistill.recipes import RECIPES
from raydistill.recipes.base import TeacherView
from raydistill.signals import Draws, JsonValue, Teacher
from raydistill.storage import Store

LEAST_AGREEMENT = 0.9
"""Share of positions whose most probable id must be the same; ties and bf16 rounding move some."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The teacher against its cache, over the positions of the sampled rows."""

    positions: int
    top1_agreement: float
    """Share of positions with the same most probable id."""
    shared_ids: float
    """Share of the stored ids that the teacher puts among its top ids again."""
    mean_difference: float
    """Mean |Δ log p| over the shared ids, nats."""
    p99_difference: float
    """Its 99th percentile."""

    def wrong(self, tolerance: float) -> str | None:
        """What exceeds `tolerance` (nats, of the mean difference), in words."""
        if self.positions == 0 or (
            self.mean_difference <= tolerance
            and self.top1_agreement >= LEAST_AGREEMENT
            and self.shared_ids >= LEAST_AGREEMENT
        ):
            return None
        return f"the teacher says something else than its cache ({self}; tolerance {tolerance} nats)"

    def __str__(self) -> str:
        return (
            f"{self.positions:,} positions, top-1 agreement {self.top1_agreement:.3f}, "
            f"shared ids {self.shared_ids:.3f}, "
            f"|Δ log p| mean {self.mean_difference:.4f} p99 {self.p99_difference:.4f} nats"
        )


def audit_rows(
    teacher: Teacher, rows: Sequence[InputRow], stored: Sequence[Mapping[str, np.ndarray]], codec: Codec
) -> Audit:
    """Run `teacher` on each row by itself and compare with the stored fields of the row, [targets, ...].

    What the teacher says passes through the cache's codec first, so that the codec's own error does not count. Where no
    ids are kept (`head_tail_sample` with `top_k: 0`), the log-probabilities of the labels are compared.
    """
    positions = same_top = shared = entries = 0
    differences = [np.zeros(0, np.float32)]
    for row, old in zip(rows, stored, strict=True):
        new = _recoded(capture(teacher, [row], batch_tokens=1, where=f"audit of row {row.row_id}").fields, codec)
        positions += len(old["ids"])
        if old["ids"].shape[1] == 0:
            same_top += len(old["ids"])
            differences.append(np.abs(old["label_logp"].astype(np.float32) - new["label_logp"].astype(np.float32)))
            continue
        found, delta = _matched(old["ids"], old["logp"], new["ids"], new["logp"])
        # Ids whose stored probabilities are equal have no order: the top id may be any of them.
        tied = old["logp"] == old["logp"][:, :1]
        same_top += int((tied & (old["ids"] == new["ids"][:, :1])).any(axis=1).sum())
        shared += found
        entries += old["ids"].size
        differences.append(delta)
    every = np.concatenate(differences)
    return Audit(
        positions=positions,
        top1_agreement=same_top / positions if positions else 1.0,
        shared_ids=shared / entries if entries else 1.0,
        mean_difference=float(every.mean()) if len(every) else 0.0,
        p99_difference=float(np.quantile(every, 0.99)) if len(every) else 0.0,
    )


def _recoded(fields: Fields, codec: Codec) -> dict[str, np.ndarray]:
    dtypes = {name: values.dtype for name, values in fields.items()}
    sizes = {name: values.shape[1:] for name, values in fields.items()}
    return codec.decode(codec.encode(fields), dtypes, sizes)


def _matched(
    old_ids: np.ndarray, old_logp: np.ndarray, new_ids: np.ndarray, new_logp: np.ndarray
) -> tuple[int, np.ndarray]:
    """How many ids are in both lists of their position, and |Δ log p| of those."""
    place = np.arange(len(old_ids), dtype=np.int64)[:, None] << 32
    old_keys, new_keys = (place + old_ids).ravel(), (place + new_ids).ravel()
    _, old_at, new_at = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
    delta = old_logp.ravel()[old_at].astype(np.float32) - new_logp.ravel()[new_at].astype(np.float32)
    return len(old_at), np.abs(delta)


def audit_shard(
    teacher: Teacher, store: Store, name: str, inputs: Sequence[InputRow], *, num_rows: int, codec: Codec
) -> Audit:
    """Audit `num_rows` rows of the shard `name` in `store`, evenly spread."""
    shard = read_signal(store, name)
    chosen = sorted({i * len(inputs) // num_rows for i in range(num_rows)})
    return audit_rows(teacher, [inputs[i] for i in chosen], [shard.row(i) for i in chosen], codec)


def self_divergence(
    recipe: LmLogitsRecipe, model: nn.Module, name: str, manifest: Manifest, row: InputRow, stored: SignalShard, at: int
) -> float:
    """The training divergence, nats per target, between the teacher itself as the student and its cache; ideally 0."""
    facts: Mapping[str, JsonValue] = manifest.facts
    view = TeacherView(name=name, weight=1.0, facts=facts)
    student = RECIPES[type(recipe)](recipe.model_copy(update={"alpha": 1.0}), model, {name: view})
    batch = collate([row])
    device = next(model.parameters()).device
    for field, values in stored.row(at).items():
        padded = np.zeros((1, len(row.input_ids), *values.shape[1:]), values.dtype)
        padded[0, row.target] = values
        batch[f"{name}/{field}"] = torch.from_numpy(padded)
    batch = {key: value.to(device) for key, value in batch.items()}
    draws = Draws(seed=0, phase="verify", step=0, positions=(0,))
    with torch.no_grad():
        loss = student.loss("student", batch, draws)
    return float(loss.parts[f"kd/{name}"].sum) / max(int(row.target.sum()), 1)
