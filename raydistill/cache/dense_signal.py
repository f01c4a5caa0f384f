"""The actor that writes the shards of a denoiser's signal: `noise_prediction` or `ode_trajectory`."""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from raydistill.cache.dense import DenseShard, read_dense, write_dense
from raydistill.cache.dense_audit import DenseAudit, audit_draws
from raydistill.cache.dense_capture import capture_draws, own_fields, signal_meta
from raydistill.cache.ledger import write_description
from raydistill.cache.manifest import FieldRecord
from raydistill.cache.shards import field_records, publish_record
from raydistill.cache.signal_job import SignalJob, audit_if_changed
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher
from raydistill.models.autoencoder import load_space
from raydistill.signals import JsonValue, Teacher
from raydistill.sources.films import mp4, webp

PREVIEWS = "previews"
"""Folder of a cache with samples to look at; no part of its manifest."""


class DenoiserWorker:
    """Holds one teacher. Two calls may run at a time: while the teacher computes one shard, the other is written."""

    def __init__(self, job: SignalJob, tally: Any):
        assert isinstance(job.teacher, NoisePredictionTeacher | OdeTrajectoryTeacher)
        assert job.noise is not None, "a denoiser is asked about noise"
        self._job, self._settings, self._noise, self._tally = job, job.teacher, job.noise, tally
        self._inputs, self._store = job.open()
        self._computing = threading.Lock()
        torch.set_num_threads(job.threads)  # Ray's OMP_NUM_THREADS does not bind a teacher that sets its own
        self._teacher = job.factory(job.teacher, job.noise)
        self._dtype: torch.dtype = getattr(torch, job.teacher.store_dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._space = load_space(job.previews.vae, device) if job.previews is not None else None
        facts: dict[str, JsonValue] = {
            **job.facts,
            **self._teacher.facts,
            "noise": self._noise.model_dump(mode="json"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "diffusers", "numpy", "safetensors")},
        }
        write_description(self._store, stored_fields(self._teacher, self._dtype), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description of the teacher."""
        if not name:
            return {"shard": name, "audit": None}
        job = self._job
        inputs = read_dense(self._inputs, name)
        done = 0

        def progress(samples: int) -> None:
            nonlocal done
            done += samples
            self._tally.set.remote(name, done)

        torch.set_num_threads(job.threads)  # a setting of the calling thread
        tensors = capture_draws(
            self._teacher,
            inputs,
            self._noise,
            batch_rows=self._settings.batch_rows,
            dtype=self._dtype,
            where=f"teacher {self._settings.name}, shard {name}",
            progress=progress,
            turn=self._computing,
        )
        record = write_dense(
            self._store, name, tensors, meta=signal_meta(inputs), split=job.splits[name], rows=inputs.rows
        )
        audit = audit_if_changed(job, record, lambda: self._compare(inputs, read_dense(self._store, name)))
        if self._space is not None:
            self._preview(name, tensors["clean"])
        publish_record(self._store, record)
        return {"shard": name, "audit": audit}

    def _preview(self, name: str, clean: Tensor) -> None:
        """Keep the first draw of the first rows of a shard as files to look at."""
        previews = self._job.previews
        assert previews is not None and self._space is not None, "asked for previews"  # noqa: PT018
        for row, latents in enumerate(clean[: previews.rows, 0]):
            with self._computing:
                pixels = (self._space.decode(latents[None].float()) / 2 + 0.5)[0]
            stem = f"{name.partition('.')[0]}-{row:03}"
            if pixels.ndim == 4:
                (self._store / PREVIEWS).publish(f"{stem}.mp4", mp4(pixels, previews.fps))
            else:
                (self._store / PREVIEWS).publish(f"{stem}.webp", webp(pixels[:, None], 1))

    def _compare(self, inputs: DenseShard, written: DenseShard) -> DenseAudit:
        num_rows = max(1, self._job.audit_rows)
        chosen = sorted({i * inputs.rows // num_rows for i in range(num_rows)})
        with self._computing:
            return audit_draws(self._teacher, inputs, written, self._noise, chosen)


def stored_fields(teacher: Teacher, dtype: torch.dtype) -> dict[str, FieldRecord]:
    """The fields of a signal as its manifest has them: the teacher's, stored as `dtype`, and those of the draws."""
    stored = str(dtype).removeprefix("torch.")
    fields = {n: f.model_copy(update={"dtype": stored}) for n, f in field_records(teacher.schema).items()}
    every = {**fields, **field_records(own_fields(teacher))}
    return {n: f.model_copy(update={"dims": ("draw", *f.dims)}) for n, f in every.items()}
