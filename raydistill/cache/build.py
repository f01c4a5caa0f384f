"""Builds the caches of inputs and of signals, and completes or repairs half-built ones.

A cache that is complete is returned at once, without a cluster. Otherwise the shards that are absent or listed in
damaged.json are mapped over a pool of actors; each actor publishes a shard, then its record, and only names travel.
Shards do not depend on actors, so neither their number nor a kill at any moment changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from raydistill.cache.average import (
    AverageWorker,
    Signals,
    average_content,
    average_facts,
    average_fields,
    sources,
)
from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.dense_read import require_stored_draws
from raydistill.cache.dense_signal import DenoiserWorker
from raydistill.cache.episode_inputs import build_episode_inputs
from raydistill.cache.image_inputs import build_image_inputs
from raydistill.cache.ledger import Ledger, is_described, read_description
from raydistill.cache.manifest import Manifest
from raydistill.cache.pool import Worker, map_over_actors, map_shards, require_cluster, require_teachers
from raydistill.cache.prompt_inputs import build_prompt_inputs
from raydistill.cache.signal_job import Previews, SignalJob, TeacherFactory
from raydistill.cache.text_inputs import build_text_inputs
from raydistill.cache.top_k_signal import INPUT_FACTS, TopKWorker
from raydistill.cache.world_signal import WorldWorker
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, NoiseConfig, PromptsSource, TextSource, VideosSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TeacherConfig, TopKLogitsTeacher
from raydistill.config.world import EpisodesSource, WorldTeacher
from raydistill.signals import AVERAGE, JsonValue
from raydistill.storage import Store
from raydistill.teachers import build_teacher

__all__ = ["build_average", "build_inputs", "build_signal", "inputs_content", "signal_content"]


def _connected() -> None:
    """Ray is running already."""


def build_inputs(
    config: RunConfig, caches: Store, *, connect: Callable[[], None] = _connected
) -> tuple[Store, Manifest]:
    """The inputs cache of `config` below `caches`, built as far as it is not there.

    `connect` brings Ray up; it is called only when there is something to build.
    Raises `DataError` for sources that cannot be read or give no row, `CacheMismatch` when the folder holds the cache
    of another configuration.
    """
    ledger = Ledger.below(caches, "inputs", inputs_content(config))
    if finished := ledger.finished:
        return ledger.store, finished
    connect()
    require_cluster("resources.decode", 1, config.resources.decode.cpus, file=config.resources.cluster)
    ledger.begin()
    match config.source:
        case TextSource():
            return ledger.store, build_text_inputs(config, ledger)
        case ImagesSource() | VideosSource():
            return ledger.store, build_image_inputs(config, ledger)
        case EpisodesSource():
            return ledger.store, build_episode_inputs(config, ledger)
        case PromptsSource():
            return ledger.store, build_prompt_inputs(config, ledger)


def build_signal(
    config: RunConfig,
    teacher: TeacherConfig,
    inputs: Store,
    inputs_manifest: Manifest,
    caches: Store,
    *,
    connect: Callable[[], None] = _connected,
    factory: TeacherFactory = build_teacher,
) -> tuple[Store, Manifest]:
    """The signal cache of `teacher` below `caches`, built as far as it is not there; `connect` as in `build_inputs`.

    Raises whatever the teacher or the storage says (`ConfigError`, `DataError`, `OutOfSpace`), `CacheMismatch` when the
    folder holds another cache, and `VerificationFailed` when a repaired shard has other bytes and fails the audit.
    """
    ledger = Ledger.below(caches, teacher.name, signal_content(config, teacher, inputs_manifest))
    store = ledger.store
    if finished := ledger.finished:
        return store, finished
    connect()
    wanted = config.resources.teacher
    require_teachers(config.resources)
    make: Callable[[SignalJob, Any], Worker]
    noise: NoiseConfig | None
    repeated: tuple[str, ...]
    match teacher:
        case TopKLogitsTeacher():
            make, repeated, unit, noise = TopKWorker, INPUT_FACTS, "tokens", None
            costs = {record.name: record.tokens for record in inputs_manifest.shards}
        case NoisePredictionTeacher() | OdeTrajectoryTeacher():
            require_stored_draws(inputs_manifest, config.latents.noise)
            make, repeated, unit, noise = DenoiserWorker, (), "samples", config.latents.noise
            costs = {record.name: record.rows * noise.draws_per_row for record in inputs_manifest.shards}
        case WorldTeacher():
            make, repeated, unit, noise = WorldWorker, ("clip_frames",), "clips", None
            costs = {record.name: record.rows for record in inputs_manifest.shards}
    old = ledger.manifest
    ledger.begin()
    names = [record.name for record in inputs_manifest.shards]
    pending = ledger.pending(names)
    job = SignalJob(
        teacher=teacher,
        factory=factory,
        inputs=inputs.uri,
        store=store.uri,
        facts={key: inputs_manifest.facts[key] for key in repeated},
        splits={record.name: record.split for record in inputs_manifest.shards},
        expected={record.name: record.sha256 for record in old.shards} if old else {},
        noise=noise,
        threads=max(1, int(wanted.cpus)),
        audit_rows=config.cache.audit_rows,
        audit_tolerance=config.cache.audit_tolerance,
        previews=_previews(config, teacher),
    )
    described = old is not None or is_described(store)
    audits: dict[str, JsonValue] = {
        outcome["shard"]: outcome["audit"]
        for outcome in map_shards(
            lambda tally: partial(make, job, tally),
            pending or ([] if described else [""]),  # the empty name: only the teacher's description is missing
            costs,
            wanted,
            label=f"teacher {teacher.name}",
            unit=unit,
        )
        if outcome["audit"] is not None
    }
    ledger.require_published(names)
    fields, facts = (old.fields, old.facts) if old else read_description(store)
    manifest = ledger.finish(
        names,
        kind="signal",
        parent=inputs_manifest.fingerprint,
        fields=fields,
        facts=facts,
        build={"actors": list(wanted.actors), "shards": list(pending), "changed": audits},
    )
    ledger.report_changed(sorted(audits))
    return store, manifest


def _previews(config: RunConfig, teacher: TeacherConfig) -> Previews | None:
    if not isinstance(teacher, OdeTrajectoryTeacher) or teacher.previews == 0:
        return None
    return Previews(teacher.previews, config.latents.vae, config.evaluate.videos.fps)


def build_average(
    config: RunConfig,
    inputs_manifest: Manifest,
    signals: Signals,
    caches: Store,
    *,
    connect: Callable[[], None] = _connected,
) -> tuple[Store, Manifest]:
    """The average of the teachers' finished signals below `caches`, built as far as it is not there.

    `connect` brings Ray up; it is called only when there is something to build. Raises `CacheMismatch` when the signals
    are not of one kind of prediction, schedule or noise, `SignalMismatch` when they disagree on the noise of a draw.
    """
    used = {t.name: signals[t.name] for t in config.teachers if t.weight > 0}
    ledger = Ledger.below(caches, AVERAGE, average_content(used, {t.name: t.weight for t in config.teachers}))
    if finished := ledger.finished:
        return ledger.store, finished
    facts = average_facts(used, ledger.content)
    connect()
    require_cluster("resources.decode", 1, config.resources.decode.cpus, file=config.resources.cluster)
    old = ledger.manifest
    ledger.begin()
    names = [record.name for record in inputs_manifest.shards]
    pending = ledger.pending(names)
    splits = {record.name: record.split for record in inputs_manifest.shards}
    make = partial(AverageWorker, sources(used, ledger.content), ledger.store.uri, splits)
    actors = (1, max(1, len(pending)))
    changed = []
    before = {record.name: record.sha256 for record in old.shards} if old else {}
    for outcome in map_over_actors(make, pending, cpus=config.resources.decode.cpus, actors=actors):
        if before.get(outcome["shard"], outcome["sha256"]) != outcome["sha256"]:
            changed.append(outcome["shard"])
    manifest = ledger.finish(
        names,
        kind="signal",
        parent=inputs_manifest.fingerprint,
        fields=average_fields(used),
        facts=facts,
        build={"shards": list(pending), "changed": sorted(changed)},
    )
    ledger.report_changed(sorted(changed))
    return ledger.store, manifest
