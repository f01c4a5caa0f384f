"""What can be wrong with a shard of episodes or of a world model's signal, found without the teacher."""

from __future__ import annotations

from collections.abc import Mapping

from raydistill.cache.dense import DenseShard, read_dense
from raydistill.cache.dense_checks import finiteness_fault, inputs_of, rows_fault
from raydistill.cache.episode_inputs import clip_sha
from raydistill.cache.manifest import FieldRecord, ShardRecord
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.storage import Store


def episode_inputs_fault(store: Store, record: ShardRecord, facts: Mapping[str, JsonValue]) -> str | None:
    """Levels 2 and 3 of an inputs shard of episodes: ids, content, shapes, and actions of the action space."""
    try:
        shard = read_dense(store, record.name)
        frames, actions, steps = (shard.tensor(name) for name in ("frames", "actions", "valid"))
        shas = shard.texts("row_sha")
    except DataError as error:
        return str(error)
    ids = shard.row_ids
    if len(ids) != record.rows or len(set(ids)) != len(ids):
        return f"{len(set(ids)):,} different row ids instead of {record.rows:,}"
    if shard.meta.get("split") != record.split:
        return f"its rows are of the split {shard.meta.get('split')!r}, its record says {record.split!r}"
    length, shape = int(str(facts["clip_frames"])), facts["frame_shape"]
    assert isinstance(shape, list)
    wanted = (record.rows, length, *(int(str(side)) for side in shape))
    if tuple(frames.shape) != wanted or tuple(actions.shape) != (record.rows, length - 1):
        return f"frames {tuple(frames.shape)} and actions {tuple(actions.shape)}, wanted clips {wanted}"
    if record.rows and not 0 <= int(actions.min()) <= int(actions.max()) < int(str(facts["num_actions"])):
        return f"an action is none of the {facts['num_actions']} of the action space"
    if record.rows and not 0 < int(steps.min()) <= int(steps.max()) < length:
        return f"a clip has {int(steps.min())} to {int(steps.max())} real steps of {length - 1}"
    for row, sha in enumerate(shas):
        if clip_sha(frames[row], actions[row]) != sha:
            return f"the frames or actions of row {ids[row]} are not those of its row_sha"
    return None


def world_signal_fault(
    store: Store, record: ShardRecord, inputs: Store, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]
) -> str | None:
    """Levels 2 and 3 of a signal shard of a world model: rows, content, schema, finiteness."""
    try:
        shard, beside = read_dense(store, record.name), inputs_of(inputs, record.name)
        return (
            (rows_fault(shard, beside, record, changed="frames or actions") if beside else None)
            or _schema_fault(shard, record, fields)
            or finiteness_fault(shard)
            or _trajectory_fault(shard, record, inputs)
        )
    except DataError as error:
        return str(error)


def _schema_fault(shard: DenseShard, record: ShardRecord, fields: Mapping[str, FieldRecord]) -> str | None:
    if set(shard.names) != set(fields):
        return f"its fields are {sorted(shard.names)}, the manifest has {sorted(fields)}"
    for name, field in fields.items():
        values = shard.tensor(name)
        dtype = str(values.dtype).removeprefix("torch.")
        if dtype != field.dtype or values.ndim != 1 + len(field.dims):
            return f"field {name!r} is {dtype} with {values.ndim - 1} axes, the manifest has {field}"
        if len(values) != record.rows:
            return f"field {name!r} has {len(values)} rows instead of {record.rows}"
    return None


def _trajectory_fault(shard: DenseShard, record: ShardRecord, inputs: Store) -> str | None:
    """A rollout that does not begin with the first frame of its clip."""
    if "trajectory" not in shard.names:
        return None
    first = read_dense(inputs, record.name).tensor("frames")[:, 0]
    wrong = (shard.tensor("trajectory")[:, 0] != first).flatten(1).any(1)
    if bool(wrong.any()):
        return f"the rollout of row {shard.row_ids[int(wrong.nonzero()[0])]} begins with another frame than its clip"
    return None
