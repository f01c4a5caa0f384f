"""The actor that writes the shards of a `features` or `rollout` signal, and the same without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard, read_dense, write_dense
from raydistill.cache.dense_audit import DenseAudit, relative_rms
from raydistill.cache.episode_batch import clip_batch
from raydistill.cache.ledger import write_description
from raydistill.cache.manifest import FieldRecord
from raydistill.cache.shards import field_records, publish_record
from raydistill.cache.signal_job import SignalJob, audit_if_changed
from raydistill.config.world import WorldTeacher
from raydistill.errors import ConfigError, DataError
from raydistill.signals import JsonValue, Teacher, check_batch


class WorldWorker:
    """Holds one teacher. Two calls may run at a time: while the teacher computes one shard, the other is written."""

    def __init__(self, job: SignalJob, tally: Any):
        assert isinstance(job.teacher, WorldTeacher)
        self._job, self._settings, self._tally = job, job.teacher, tally
        self._inputs, self._store = job.open()
        self._computing = threading.Lock()
        torch.set_num_threads(job.threads)  # Ray's OMP_NUM_THREADS does not bind a teacher that sets its own
        self._teacher = job.factory(job.teacher, int(str(job.facts["clip_frames"])))
        self._dtype: torch.dtype = getattr(torch, job.teacher.store_dtype)
        facts: dict[str, JsonValue] = {
            **job.facts,
            **self._teacher.facts,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        }
        write_description(self._store, stored_fields(self._teacher, self._dtype), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description of the teacher."""
        if not name:
            return {"shard": name, "audit": None}
        job = self._job
        inputs = read_dense(self._inputs, name)
        done = 0

        def progress(clips: int) -> None:
            nonlocal done
            done += clips
            self._tally.set.remote(name, done)

        with self._computing:
            torch.set_num_threads(job.threads)  # a setting of the calling thread
            tensors = capture_clips(
                self._teacher,
                inputs,
                batch_rows=self._settings.batch_rows,
                dtype=self._dtype,
                where=f"teacher {self._settings.name}, shard {name}",
                progress=progress,
            )
        meta: dict[str, JsonValue] = {
            "kind": "signal",
            **{key: inputs.meta[key] for key in ("split", "row_ids", "row_sha")},
        }
        record = write_dense(self._store, name, tensors, meta=meta, split=job.splits[name], rows=inputs.rows)
        audit = audit_if_changed(job, record, lambda: self._compare(inputs, read_dense(self._store, name)))
        publish_record(self._store, record)
        return {"shard": name, "audit": audit}

    def _compare(self, inputs: DenseShard, written: DenseShard) -> DenseAudit:
        num_rows = max(1, self._job.audit_rows)
        chosen = sorted({i * inputs.rows // num_rows for i in range(num_rows)})
        with self._computing:
            return audit_clips(self._teacher, inputs, written, chosen)


def capture_clips(
    teacher: Teacher,
    shard: DenseShard,
    *,
    batch_rows: int,
    dtype: torch.dtype,
    where: str,
    progress: Callable[[int], None] = lambda clips: None,
) -> dict[str, Tensor]:
    """What `teacher` says about every clip of an inputs shard: [rows, …], floats stored as `dtype`.

    Batches are `batch_rows` clips in order. `progress` gets the clips of each. Raises `ConfigError` when a batch does
    not fit into memory or a value not into `dtype`, `DataError` when a value is not finite.
    """
    whole: dict[str, Tensor] = {}
    for first in range(0, shard.rows, batch_rows):
        rows = range(first, min(first + batch_rows, shard.rows))
        for name, values in _said(teacher, [(shard, row) for row in rows], where=where).items():
            kept = _stored(values, dtype, [shard.row_ids[row] for row in rows], f"{where}: {name}")
            if name not in whole:  # at once in its full size: a shard of large features fits into memory only once
                whole[name] = torch.empty(shard.rows, *kept.shape[1:], dtype=kept.dtype)
            whole[name][first : rows.stop] = kept
        progress(len(rows))
    if not whole:  # a shard whose episodes gave no clip
        for name, field in teacher.schema.items():
            whole[name] = torch.empty(0, *(0,) * len(field.dims), dtype=_kept_dtype(field.dtype, dtype))
    return whole


def audit_clips(teacher: Teacher, inputs: DenseShard, signal: DenseShard, rows: Sequence[int]) -> DenseAudit:
    """Run `teacher` on each of `rows` by itself and compare with what the signal shard keeps of it."""
    differences: list[tuple[float, str]] = []
    for row in rows:
        where = f"row {inputs.row_ids[row]}"
        said = _said(teacher, [(inputs, row)], where=f"audit of {where}")
        for name, values in said.items():
            kept = signal.tensor(name)[row]
            differences.append((relative_rms(values[0].to(kept.dtype), kept), f"{name} of {where}"))
    largest, where = max(differences, key=lambda found: (found[0] != found[0], found[0]), default=(0.0, "none"))
    mean = sum(difference for difference, _ in differences) / max(len(differences), 1)
    return DenseAudit(draws=len(rows), mean_difference=mean, largest=largest, where=where)


def _said(teacher: Teacher, places: Sequence[tuple[DenseShard, int]], *, where: str) -> dict[str, Tensor]:
    batch = clip_batch(places)
    try:
        signal = teacher(batch)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{where}: the teacher's batch of {len(places)} clips of {list(batch['frames'].shape[1:])} does not fit "
            "into its device's memory. Lower teachers.*.batch_rows (which makes a new cache)."
        ) from error
    check_batch(signal, teacher.schema, where=where)
    return signal


def _stored(values: Tensor, dtype: torch.dtype, rows: Sequence[str], what: str) -> Tensor:
    if not values.is_floating_point():
        return values.cpu()
    values = values.cpu()
    kept = values.to(dtype)
    if kept.isfinite().all():
        return kept
    row = int((~kept.isfinite()).flatten(1).any(1).nonzero()[0])
    if values[row].isfinite().all():
        raise ConfigError(
            f"{what} of row {rows[row]} has a value of {float(values[row].abs().max()):g}, beyond {dtype}. Store it "
            "otherwise: teachers.*.store_dtype: bfloat16 or float32."
        )
    raise DataError(
        f"{what} of row {rows[row]} is not finite. Look at the teacher's weights, or give its model another dtype."
    )


def _kept_dtype(dtype: torch.dtype, stored: torch.dtype) -> torch.dtype:
    return stored if dtype.is_floating_point else dtype


def stored_fields(teacher: Teacher, dtype: torch.dtype) -> dict[str, FieldRecord]:
    """The fields of a signal as its manifest has them: the teacher's, floats stored as `dtype`."""
    fields = field_records(teacher.schema)
    return {
        name: record.model_copy(
            update={"dtype": str(_kept_dtype(teacher.schema[name].dtype, dtype)).removeprefix("torch.")}
        )
        for name, record in fields.items()
    }
