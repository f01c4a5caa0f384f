"""Builds the caches of inputs and of signals with Ray Data, and completes or repairs half-built ones.

A cache that is complete is returned at once, without starting Ray Data. Otherwise the shards that are absent or
listed in damaged.json are mapped over a pool of actors; each actor publishes a shard, then its record, and only
names travel.
Shards do not depend on actors, so neither their number nor a kill at any moment changes a byte.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import torch

from raydistill import errors
from raydistill.cache.audit import audit_shard
from raydistill.cache.capture import capture, require_targets_only
from raydistill.cache.codecs import codec_for
from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.ledger import TEACHER, Ledger, changed_hashes
from raydistill.cache.manifest import FieldRecord, Manifest, fingerprint_of
from raydistill.cache.shards import (
    INPUT_FIELDS,
    field_records,
    publish_record,
    read_inputs,
    read_records,
    write_inputs,
    write_signal,
)
from raydistill.cache.staging import STAGING, Totals, deal, stage_unit, staged_rows, unit_name
from raydistill.config.schema import RunConfig
from raydistill.config.sources import TextSource
from raydistill.config.teachers import TeacherConfig
from raydistill.errors import ConfigError, RaydistillError, VerificationFailed
from raydistill.models.load import effective_vocab_size, load_tokenizer
from raydistill.progress import Progress
from raydistill.signals import JsonValue, Teacher
from raydistill.sources.text import Unit, require_rows, rows, units
from raydistill.storage import Store
from raydistill.teachers import build_teacher

__all__ = ["build_inputs", "build_signal", "inputs_content", "signal_content"]

TeacherFactory = Callable[[TeacherConfig, int], Teacher]
FIRST_WAVE = 16
"""Units read at first when `source.max_rows` is set; each further wave doubles."""


# --- inputs -----------------------------------------------------------------------------------------------------


def build_inputs(config: RunConfig, caches: Store) -> tuple[Store, Manifest]:
    """The inputs cache of `config` below `caches`, built as far as it is not there. Ray must be initialised.

    Raises `DataError` for sources that cannot be read or give no row, `CacheMismatch` when the folder holds the cache
    of another configuration.
    """
    content = inputs_content(config)
    store = caches / f"inputs-{fingerprint_of(content)}"
    ledger = Ledger(store, content)
    if finished := ledger.finished:
        return store, finished
    require_cluster("resources.decode", 1, config.resources.decode.cpus)
    old = ledger.manifest
    ledger.begin()
    staging = store / STAGING
    used, dropped = _stage(config, staging)
    totals = Totals()
    names: list[str] = []
    built: list[str] = []
    done = set(read_records(store, broken={})) & set(store.names()) - set(ledger.damaged())
    for name, split, shard in deal(
        staging, used, shard_rows=config.source.shard_rows, max_rows=config.source.max_rows, totals=totals
    ):
        names.append(name)
        if name not in done:
            publish_record(store, write_inputs(store, name, shard, split=split))
            built.append(name)
    require_rows(totals.rows["train"] + totals.rows["held_out"], dropped, config.source)
    _report_changed(store, changed_hashes(old, read_records(store), built))
    manifest = ledger.finish(
        names,
        kind="inputs",
        parent=None,
        fields=field_records(INPUT_FIELDS),
        facts=_input_facts(config, totals, dropped),
        build={"units": len(used), "shards": [*built]},
    )
    store.delete_folder(STAGING)
    return store, manifest


def _stage(config: RunConfig, staging: Store) -> tuple[range, Counter[str]]:
    """Stage the units of the source, as many as `max_rows` wants. Returns their numbers and what was dropped."""
    source = config.source
    work = units(source)
    wave = len(work) if source.max_rows is None else FIRST_WAVE
    make = partial(_UnitWorker, work, source, config.evaluate.held_out, staging.uri)
    total_rows, stop, dropped = 0, 0, Counter[str]()
    with Progress("inputs", total=sum(unit.num_bytes for unit in work), unit="bytes") as progress:
        while stop < len(work) and (source.max_rows is None or total_rows < source.max_rows):
            start, stop, wave = stop, min(stop + wave, len(work)), 2 * wave
            there = set(staging.names())
            pending = [unit.index for unit in work[start:stop] if unit_name(unit.index) not in there]
            for outcome in _map(make, pending, cpus=config.resources.decode.cpus, actors=(1, max(1, len(pending)))):
                total_rows += outcome["rows"]
                progress.advance(outcome["bytes"], note=f"{total_rows:,} rows")
            total_rows = 0
            dropped = Counter()
            for unit in work[:stop]:
                count, lost = staged_rows(staging, unit.index)
                total_rows += count
                dropped += lost
    return range(stop), dropped


class _UnitWorker:
    """Reads, tokenises and stages units of the source."""

    def __init__(self, work: Sequence[Unit], source: TextSource, held_out: float, staging: str):
        self._work = work
        self._source, self._held_out, self._staging = source, held_out, Store(staging)
        self._tokenizer = load_tokenizer(source.tokenizer)

    def __call__(self, index: int) -> dict[str, JsonValue]:
        unit = self._work[index]
        dropped: Counter[str] = Counter()
        found = rows(unit, self._source, self._tokenizer, self._held_out, dropped)
        return {"rows": stage_unit(self._staging, unit.index, found, dropped), "bytes": int(unit.num_bytes)}


def _input_facts(config: RunConfig, totals: Totals, dropped: Counter[str]) -> dict[str, JsonValue]:
    content = inputs_content(config)
    tokenizer = load_tokenizer(config.source.tokenizer)
    return {
        "vocab_size": effective_vocab_size(tokenizer),
        "tokenizer": content["tokenizer"],
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "num_rows": dict(totals.rows),
        "num_tokens": dict(totals.tokens),
        "num_targets": dict(totals.targets),
        "text_bytes": dict(totals.text_bytes),
        "dropped": dict(sorted(dropped.items())),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow")},
    }


# --- signals ----------------------------------------------------------------------------------------------------


def build_signal(
    config: RunConfig,
    teacher: TeacherConfig,
    inputs: Store,
    inputs_manifest: Manifest,
    caches: Store,
    *,
    factory: TeacherFactory = build_teacher,
) -> tuple[Store, Manifest]:
    """The signal cache of `teacher` below `caches`, built as far as it is not there. Ray must be initialised.

    Raises whatever the teacher or the storage says (`ConfigError`, `DataError`, `OutOfSpace`), `CacheMismatch` when the
    folder holds another cache, and `VerificationFailed` when a repaired shard has other bytes and fails the audit.
    """
    content = signal_content(config, teacher, inputs_manifest)
    store = caches / f"{teacher.name}-{fingerprint_of(content)}"
    ledger = Ledger(store, content)
    if finished := ledger.finished:
        return store, finished
    wanted = config.resources.teacher
    require_cluster("resources.teacher", wanted.actors[0], wanted.cpus, wanted.gpus, wanted.accelerator)
    old = ledger.manifest
    ledger.begin()
    names = [record.name for record in inputs_manifest.shards]
    pending = ledger.pending(names)
    job = SignalJob(
        teacher=teacher,
        factory=factory,
        inputs=inputs.uri,
        store=store.uri,
        facts={key: inputs_manifest.facts[key] for key in ("vocab_size", "tokenizer")},
        splits={record.name: record.split for record in inputs_manifest.shards},
        expected={record.name: record.sha256 for record in old.shards} if old else {},
        threads=max(1, int(wanted.cpus)),
        audit_rows=config.cache.audit_rows,
        audit_tolerance=config.cache.audit_tolerance,
    )
    tokens = {record.name: record.tokens for record in inputs_manifest.shards}
    described = old is not None or store.exists(TEACHER)
    audits = _capture_all(config, job, pending or ([] if described else [""]), tokens)
    fields, facts = (old.fields, old.facts) if old else _description(store)
    manifest = ledger.finish(
        names,
        kind="signal",
        parent=inputs_manifest.fingerprint,
        fields=fields,
        facts=facts,
        build={"actors": list(wanted.actors), "shards": list(pending), "changed": audits},
    )
    _report_changed(store, sorted(audits))
    return store, manifest


@dataclass(frozen=True, slots=True)
class SignalJob:
    """What an actor needs to know."""

    teacher: TeacherConfig
    factory: TeacherFactory
    inputs: str
    store: str
    facts: dict[str, JsonValue]
    """Facts of the inputs that a signal's manifest repeats: vocab_size and tokenizer."""
    splits: dict[str, str]
    expected: dict[str, str]
    """Hashes that a finished cache had, by shard: a rebuilt shard with another one is audited."""
    threads: int
    audit_rows: int
    audit_tolerance: float


def _capture_all(
    config: RunConfig, job: SignalJob, pending: Sequence[str], tokens: Mapping[str, int]
) -> dict[str, JsonValue]:
    """Run the teacher over `pending` shards. Returns the audits of the shards whose hash has changed."""
    if not pending:
        return {}
    wanted = config.resources.teacher
    audits: dict[str, JsonValue] = {}
    total = sum(tokens.values())
    todo = {name: tokens.get(name, 0) for name in pending}
    label = f"teacher {job.teacher.name}"
    done = total - sum(todo.values())
    with Progress(label, total=total, unit="tokens", done=done) as progress, _Ticker(progress, todo) as ticker:
        make = partial(_TeacherWorker, job, ticker.tally)
        outcomes = _map(
            make, pending, cpus=wanted.cpus, gpus=wanted.gpus, accelerator=wanted.accelerator, actors=wanted.actors,
            overlap=True,
        )  # fmt: skip
        for outcome in outcomes:
            ticker.finished(outcome["shard"])
            if outcome["audit"] is not None:
                audits[outcome["shard"]] = outcome["audit"]
    return audits


class _TeacherWorker:
    """Holds one teacher. Two calls may run at a time: while the teacher computes one shard, the other is written."""

    def __init__(self, job: SignalJob, tally: Any):
        self._job, self._tally = job, tally
        self._inputs, self._store = Store(job.inputs), Store(job.store)
        self._computing = threading.Lock()
        torch.set_num_threads(job.threads)  # Ray's OMP_NUM_THREADS does not bind a teacher that sets its own
        self._vocab_size = int(str(job.facts["vocab_size"]))
        self._teacher = job.factory(job.teacher, self._vocab_size)
        require_targets_only(self._teacher.schema)
        self._codec = codec_for(job.teacher.codec, vocab_size=self._vocab_size)
        _describe(self._store, self._teacher, job)

    def __call__(self, name: str) -> dict[str, JsonValue]:
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
            shard = capture(
                self._teacher, inputs, batch_tokens=job.teacher.batch_tokens, where=where, progress=progress
            )
        record = write_signal(
            self._store, name, shard, self._codec, split=job.splits[name], vocab_size=self._vocab_size
        )
        audit: JsonValue = None
        if job.expected.get(name, record.sha256) != record.sha256:
            with self._computing:
                result = audit_shard(
                    self._teacher, self._store, name, inputs, num_rows=max(1, job.audit_rows), codec=self._codec
                )
            if wrong := result.wrong(job.audit_tolerance):
                raise VerificationFailed(
                    f"{self._store.uri}/{name} was rebuilt with another hash, and the audit fails: {wrong}. "
                    "Look for another library version or device, or remove the cache to build it anew."
                )
            audit = {"old": job.expected[name], "new": record.sha256, "mean_difference": result.mean_difference}
        publish_record(self._store, record)
        return {"shard": name, "audit": audit}


def _describe(store: Store, teacher: Teacher, job: SignalJob) -> None:
    """Write down the teacher's fields and facts once, so that the manifest does not need it again."""
    if store.exists(TEACHER):
        return
    facts: dict[str, JsonValue] = {
        **job.facts,
        **teacher.facts,
        "codec": job.teacher.codec,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "pyarrow")},
    }
    fields = {name: record.model_dump(mode="json") for name, record in field_records(teacher.schema).items()}
    store.publish(TEACHER, json.dumps({"fields": fields, "facts": facts}, indent=1, sort_keys=True))


def _description(store: Store) -> tuple[dict[str, FieldRecord], dict[str, JsonValue]]:
    described = json.loads(store.read(TEACHER))
    return {n: FieldRecord.model_validate(f) for n, f in described["fields"].items()}, described["facts"]


def _report_changed(store: Store, names: Sequence[str]) -> None:
    if names:
        print(f"{store.uri}: rebuilt with another hash than before: {', '.join(names)} (see build.json)", flush=True)


# --- Ray --------------------------------------------------------------------------------------------------------


def require_cluster(key: str, count: int, cpus: float, gpus: float = 0, accelerator: str | None = None) -> None:
    """Raise `ConfigError` when the cluster can never hold `count` actors of this size, instead of waiting for ever.

    A cluster that grows is asked for the most it can have; where it does not tell (an autoscaler of `ray up` that
    states no limits), set RAYDISTILL_AUTOSCALING=1 and nothing is refused.
    """
    if os.environ.get("RAYDISTILL_AUTOSCALING") == "1":
        return
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    has: Mapping[str, float] = most or ray.cluster_resources()
    wanted = {"CPU": count * cpus, "GPU": count * gpus}
    if accelerator and not most:
        wanted[f"accelerator_type:{accelerator}"] = 0.001
    lacking = [f"{n:g} {name} (found {has.get(name, 0):g})" for name, n in wanted.items() if n > has.get(name, 0)]
    if lacking:
        raise ConfigError(
            f"{key}: {count} actor(s) of {cpus:g} CPU and {gpus:g} GPU want {', '.join(lacking)} of the Ray cluster. "
            f"Lower {key}.*, or start a larger cluster (RAYDISTILL_AUTOSCALING=1 if it grows by itself)."
        )


class _Guarded:
    """An actor of Ray Data around a worker: an error meant for the user comes back as a value, message and all.

    As an exception it would reach the driver wrapped into Ray's own, and one in `__init__` would be retried for ever.
    """

    def __init__(self, make: Callable[[], Callable[[Any], dict[str, JsonValue]]]):
        self._error: RaydistillError | None = None
        try:
            self._work = make()
        except RaydistillError as error:
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        try:
            if self._error is not None:
                raise self._error
            outcome: dict[str, JsonValue] = {"value": self._work(batch["item"][0])}
        except RaydistillError as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        return {"outcome": [json.dumps(outcome)]}


def _map(
    make: Callable[[], Callable[[Any], dict[str, JsonValue]]],
    items: Sequence[Any],
    *,
    cpus: float,
    actors: tuple[int, int],
    gpus: float = 0,
    accelerator: str | None = None,
    overlap: bool = False,
) -> Iterator[dict[str, Any]]:
    """`make()` once per actor, then its result called on every item; results in the order in which they are ready."""
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = max(1, min(actors[1], len(items)))
    pool = ray.data.ActorPoolStrategy(
        min_size=min(max(1, actors[0]), most),
        max_size=most,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2 if overlap else 1,
        enable_true_multi_threading=overlap,
    )
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus or None}
    if accelerator:
        options["accelerator_type"] = accelerator
    data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    results = data.map_batches(
        _Guarded, fn_constructor_args=(make,), batch_size=1, batch_format="numpy", compute=pool, **options
    )
    for row in results.iter_rows():
        outcome = json.loads(row["outcome"])
        if "error" in outcome:
            raise getattr(errors, outcome["error"])(outcome["message"])
        yield outcome["value"]


class _Tally:
    """Tokens done of each shard that is being worked on."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def set(self, shard: str, tokens: int) -> None:
        self._tokens[shard] = tokens

    def read(self) -> dict[str, int]:
        return self._tokens


class _Ticker:
    """Moves the progress bar while shards are still being computed."""

    def __init__(self, progress: Progress, todo: Mapping[str, int], seconds: float = 2.0):
        self._progress, self._todo, self._seconds = progress, dict(todo), seconds
        self._finished: set[str] = set()
        self._shown = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.tally: Any = ray.remote(num_cpus=0)(_Tally).remote()

    def __enter__(self) -> _Ticker:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def finished(self, shard: str) -> None:
        """A record has arrived."""
        self._finished.add(shard)
        self._show({})

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._show(ray.get(self.tally.read.remote()))

    def _show(self, tokens: Mapping[str, int]) -> None:
        with self._lock:
            now = sum(n if name in self._finished else min(tokens.get(name, 0), n) for name, n in self._todo.items())
            if now > self._shown:
                self._progress.advance(now - self._shown, note=f"{len(self._finished)}/{len(self._todo)} shards")
                self._shown = now

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        ray.kill(self.tally)
