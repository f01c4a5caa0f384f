"""The actor that writes the shards of a `top_k_logits` signal."""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

import torch

from raydistill.cache.audit import Audit, audit_shard
from raydistill.cache.capture import capture, require_targets_only
from raydistill.cache.codecs import codec_for
from raydistill.cache.ledger import write_description
from raydistill.cache.shards import field_records, publish_record, read_inputs, write_signal
from raydistill.cache.signal_job import SignalJob, audit_if_changed
from raydistill.config.teachers import TopKLogitsTeacher
from raydistill.signals import JsonValue

INPUT_FACTS = ("vocab_size", "tokenizer")
"""Facts of the inputs that the signal's manifest repeats."""


class TopKWorker:
    """Holds one teacher. Two calls may run at a time: while the teacher computes one shard, the other is written."""

    def __init__(self, job: SignalJob, tally: Any):
        assert isinstance(job.teacher, TopKLogitsTeacher)
        self._job, self._settings, self._tally = job, job.teacher, tally
        self._inputs, self._store = job.open()
        self._computing = threading.Lock()
        torch.set_num_threads(job.threads)  # Ray's OMP_NUM_THREADS does not bind a teacher that sets its own
        self._vocab_size = int(str(job.facts["vocab_size"]))
        self._teacher = job.factory(job.teacher, self._vocab_size)
        require_targets_only(self._teacher.schema)
        self._codec = codec_for(job.teacher.codec, vocab_size=self._vocab_size)
        facts: dict[str, JsonValue] = {
            **job.facts,
            **self._teacher.facts,
            "codec": job.teacher.codec,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers", "pyarrow")},
        }
        write_description(self._store, field_records(self._teacher.schema), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description of the teacher."""
        if not name:
            return {"shard": name, "audit": None}
        job = self._job
        inputs = read_inputs(self._inputs, name)
        done = 0

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._tally.set.remote(name, done)

        with self._computing:
            torch.set_num_threads(job.threads)  # a setting of the calling thread
            where = f"teacher {job.teacher.name}, shard {name}"
            batch_tokens = self._settings.batch_tokens
            shard = capture(self._teacher, inputs, batch_tokens=batch_tokens, where=where, progress=progress)
        record = write_signal(
            self._store, name, shard, self._codec, split=job.splits[name], vocab_size=self._vocab_size
        )

        def compare() -> Audit:
            with self._computing:
                return audit_shard(
                    self._teacher, self._store, name, inputs, num_rows=max(1, job.audit_rows), codec=self._codec
                )

        audit = audit_if_changed(job, record, compare)
        publish_record(self._store, record)
        return {"shard": name, "audit": audit}
