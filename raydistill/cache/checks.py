"""What can be wrong with a shard, found without a teacher: every function returns words for it, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from raydistill.cache.batches import InputRow
from raydistill.cache.manifest import FieldRecord, Manifest, ShardRecord, fingerprint_of
from raydistill.cache.shards import SignalShard, read_index, read_inputs, read_signal, tokens_sha
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.storage import Store

SUM_TOLERANCE = 0.02
"""Of head plus tail mass: fp16 log-probabilities are off by up to 2^-11 of their size, which is 0.006 in a sum."""
ROUNDING = 1e-3


def manifest_faults(store: Store, manifest: Manifest, *, parent: str | None) -> list[str]:
    """A manifest that belongs to another folder, other inputs or other content than its own fingerprint."""
    faults = []
    if fingerprint_of(manifest.content) != manifest.fingerprint:
        faults.append(f"its fingerprint {manifest.fingerprint} is not that of its content")
    if not store.uri.endswith(manifest.fingerprint):
        faults.append(f"it is the manifest of another cache ({manifest.fingerprint})")
    if manifest.parent != parent:
        faults.append(f"it was made from the inputs {manifest.parent}, the inputs are {parent}: stale")
    return faults


def file_fault(store: Store, record: ShardRecord, records: Mapping[str, ShardRecord], present: set[str]) -> str | None:
    """Level 1: the file is there, of the same size and hash, and its record agrees with the manifest."""
    if record.name not in present:
        return "the shard is missing"
    if record.name not in records:
        return "the record is missing"
    if records[record.name] != record:
        return "the record disagrees with the manifest"
    size = store.size(record.name)
    if size != record.bytes:
        state = "truncated" if size < record.bytes else "too long"
        return f"the file is {state}: {size:,} bytes instead of {record.bytes:,}"
    if store.sha256(record.name) != record.sha256:
        return "the file's sha256 differs: its bytes have changed"
    return None


def inputs_fault(store: Store, record: ShardRecord, *, vocab_size: int) -> str | None:
    """Levels 2 and 3 of an inputs shard."""
    try:
        rows, index = read_inputs(store, record.name), read_index(store, record.name)
    except DataError as error:
        return str(error)
    if len(rows) != record.rows or sum(len(row.input_ids) for row in rows) != record.tokens:
        return f"{len(rows):,} rows instead of {record.rows:,}, or another number of tokens"
    if [tokens_sha(row.input_ids) for row in rows] != index.tokens_sha:
        return "the tokens of a row are not those of its tokens_sha"
    order = [(len(row.input_ids), row.row_id) for row in rows]
    if order != sorted(order) or len(set(order)) != len(order):
        return "the rows are not in the order (length, id), or an id appears twice"
    return next((fault for row in rows if (fault := _row_fault(row, vocab_size))), None)


def _row_fault(row: InputRow, vocab_size: int) -> str | None:
    if row.input_ids.min(initial=0) < 0 or row.input_ids.max(initial=0) >= vocab_size:
        return f"row {row.row_id} has an id outside the vocabulary of {vocab_size:,}"
    if int(row.segments.sum()) != len(row.input_ids):
        return f"row {row.row_id}: its documents have {row.segments.sum():,} tokens, the row has {len(row.input_ids):,}"
    if row.target[np.cumsum(row.segments) - 1].any():
        return f"row {row.row_id} has a target at the end of a document, which has no next token"
    return None


def signal_fault(
    store: Store, record: ShardRecord, inputs: Store, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]
) -> str | None:
    """Levels 2 and 3 of a signal shard."""
    try:
        shard = read_signal(store, record.name)
    except DataError as error:
        return str(error)
    return (
        _rows_fault(shard, inputs, record)
        or _schema_fault(shard, fields, facts)
        or _finiteness_fault(shard)
        or ("logp" in fields and probabilities_fault(shard, facts))
        or None
    )


def _rows_fault(shard: SignalShard, inputs: Store, record: ShardRecord) -> str | None:
    try:
        wanted = read_index(inputs, record.name)
    except DataError:
        return None  # the damage is the inputs'
    if shard.row_ids != wanted.row_ids:
        if sorted(shard.row_ids) == sorted(wanted.row_ids):
            return "the rows are in another order than the inputs"
        return f"its {len(shard.row_ids):,} row ids are not those of the inputs ({len(wanted.row_ids):,} rows)"
    if shard.tokens_sha != wanted.tokens_sha:
        place = next(i for i, (a, b) in enumerate(zip(shard.tokens_sha, wanted.tokens_sha, strict=True)) if a != b)
        return f"the tokens have changed since the teacher read them (row {shard.row_ids[place]}): the signal is stale"
    if not np.array_equal(shard.num_targets, wanted.num_targets):
        return "the number of targets differs from the inputs"
    if len(shard.row_ids) != record.rows or int(shard.num_targets.sum()) != record.tokens:
        return "the number of rows or targets differs from its record"
    return None


def _schema_fault(shard: SignalShard, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]) -> str | None:
    if set(shard.fields) != set(fields):
        return f"its fields are {sorted(shard.fields)}, the manifest has {sorted(fields)}"
    grid = facts.get("temperatures")
    sizes = {"k": facts.get("top_k"), "grid": len(grid) if isinstance(grid, list) else None}
    for name, field in fields.items():
        values = shard.fields[name]
        if values.dtype.name != field.dtype or values.ndim != len(field.dims):
            return f"field {name!r} is {values.dtype.name} with {values.ndim} axes, the manifest has {field}"
        if len(values) != shard.num_targets.sum():
            return f"field {name!r} has {len(values):,} positions for {shard.num_targets.sum():,} targets"
        for axis, size in zip(field.dims, values.shape, strict=True):
            if sizes.get(axis) is not None and size != sizes[axis]:
                return f"axis {axis!r} of field {name!r} has size {size}, the manifest says {sizes[axis]}"
    return None


def _finiteness_fault(shard: SignalShard) -> str | None:
    for name, values in shard.fields.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            place = int(np.argmax(~np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            row = int(np.searchsorted(shard.offsets, place, side="right")) - 1
            return f"field {name!r} has a value that is not finite (row {shard.row_ids[row]})"
    return None


def probabilities_fault(shard: SignalShard, facts: Mapping[str, JsonValue]) -> str | None:
    """Level 3 of a top-k signal."""
    vocab_size = int(str(facts["vocab_size"]))
    fields = shard.fields
    for name in ("ids", "tail_ids"):
        if name in fields and (fields[name].min(initial=0) < 0 or fields[name].max(initial=0) >= vocab_size):
            return f"field {name!r} has an id outside the vocabulary of {vocab_size:,}"
    if (np.diff(np.sort(fields["ids"], axis=1), axis=1) == 0).any():
        return "an id appears twice at one position"
    logp = fields["logp"].astype(np.float32)
    for name in ("logp", "log_tail", "label_logp", "tail_logp"):
        if name in fields and fields[name].max(initial=-np.inf) > ROUNDING:
            return f"field {name!r} has a probability above 1"
    if (np.diff(logp, axis=1) > 0).any():
        return "log-probabilities are not in descending order"
    mass = np.exp(logp).sum(axis=1) + np.exp(fields["log_tail"].astype(np.float32))
    if len(mass) and np.abs(mass - 1).max() > SUM_TOLERANCE:
        worst = float(mass[np.abs(mass - 1).argmax()])
        return f"head and tail sum to {worst:.4f} at a position, not to 1"
    entropy = fields["entropy"].astype(np.float32)
    if entropy.min(initial=0) < -ROUNDING or entropy.max(initial=0) > np.log(vocab_size) * (1 + ROUNDING):
        return f"an entropy is outside 0 to ln {vocab_size:,}"
    return None


def duplicate_ids(shards: Iterable[Sequence[str]]) -> list[str]:
    """Row ids that appear in more than one place of an inputs cache, given those of each shard."""
    seen: set[str] = set()
    twice: list[str] = []
    for ids in shards:
        twice += [row_id for row_id in ids if row_id in seen]
        seen.update(ids)
    return twice
