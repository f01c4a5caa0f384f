"""Checks caches, names each damaged shard and what is wrong with it, and lists them in `damaged.json` for the repair.

Levels, each on what the ones before found sound:
1. structure and hashes: manifest, records, files, sizes, sha256;
2. ids, counts and schema: a signal's rows and what they hold are those of its inputs, its fields those of the manifest;
3. finiteness, and for language models probabilities: sorted, unique ids of the vocabulary, head and tail sum to 1; for
   denoisers noise: every draw's hash and timestep are those that its seed gives;
4. semantic audit: the teacher run again on sampled rows says the same within a tolerance, and the training loss between
   the teacher itself and its cache is zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from raydistill.cache.audits import Audits, Loader, audit_average, audit_denoiser, audit_language_model, audit_world
from raydistill.cache.checks import duplicate_ids, file_fault, inputs_fault, manifest_faults, signal_fault
from raydistill.cache.dense import read_dense
from raydistill.cache.dense_checks import dense_inputs_fault, dense_signal_fault
from raydistill.cache.episode_checks import episode_inputs_fault, world_signal_fault
from raydistill.cache.ledger import MANIFEST, write_damaged
from raydistill.cache.manifest import Manifest, ShardRecord
from raydistill.cache.shards import read_index, read_records
from raydistill.cache.signal_job import TeacherFactory
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TopKLogitsTeacher
from raydistill.config.world import FeaturesTeacher, RolloutTeacher
from raydistill.errors import VerificationFailed
from raydistill.progress import say
from raydistill.storage import Store
from raydistill.teachers import build_teacher


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong."""

    cache: str
    """URI of the cache."""
    shard: str
    """Name of the shard, or `manifest.json`."""
    what: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.cache}/{self.shard}: {self.what}"


def verify(
    config: RunConfig,
    inputs: Store,
    inputs_manifest: Manifest,
    signals: Mapping[str, tuple[Store, Manifest]],
    *,
    load: Loader | None = None,
    factory: TeacherFactory = build_teacher,
) -> list[Damage]:
    """Check the inputs and the signal of every teacher, at all levels. Writes each cache's `damaged.json` anew.

    Nothing else is touched and nothing is raised for what is found: see `require_sound`. `cache.audit_rows: 0` leaves
    the teachers, and so the last level, out. `load` and `factory` load language models and denoisers.
    """
    damages = check_inputs(inputs, inputs_manifest)
    write_damaged(inputs, {damage.shard: damage.what for damage in damages})
    say(_line(inputs, inputs_manifest, damages))
    names = [teacher.name for teacher in config.teachers if teacher.name in signals]
    for name in [*names, *(name for name in signals if name not in names)]:
        store, manifest = signals[name]
        found = check_signal(store, manifest, inputs, inputs_manifest)
        notes: list[str] = []
        bad = {damage.shard for damage in [*damages, *found]}
        sound = [record for record in manifest.shards if record.name not in bad]
        sample = sample_rows(sound, config.cache.audit_rows, manifest.fingerprint)
        if sample:
            audit: Audits
            match next((teacher for teacher in config.teachers if teacher.name == name), None):
                case TopKLogitsTeacher() as teacher:
                    audit = audit_language_model(config, teacher, store, manifest, inputs, sample, load=load)
                case OdeTrajectoryTeacher(imported=str()):
                    audit = Audits({}, "imported: its noise was drawn elsewhere, so that no row is sampled again")
                case (NoisePredictionTeacher() | OdeTrajectoryTeacher()) as teacher:
                    audit = audit_denoiser(config, teacher, store, manifest, inputs, sample, factory)
                case (FeaturesTeacher() | RolloutTeacher()) as teacher:
                    audit = audit_world(config, teacher, store, manifest, inputs, sample, factory)
                case None:
                    audit = audit_average(config, signals, store, manifest, sample)
            found += [Damage(store.uri, shard, fault) for shard, fault in audit.faults.items()]
            notes.append(audit.note)
        write_damaged(store, {damage.shard: damage.what for damage in found})
        say(_line(store, manifest, found, *notes))
        damages += found
    return damages


def require_sound(damages: Sequence[Damage]) -> None:
    """Raise `VerificationFailed`, naming every damage, unless there is none."""
    if damages:
        raise VerificationFailed(
            f"{len(damages)} damage(s) found:\n"
            + "\n".join(f"  {damage}" for damage in damages)
            + "\nThey are listed in damaged.json; --stages inputs,signals builds exactly these shards again."
        )


def check_inputs(store: Store, manifest: Manifest) -> list[Damage]:
    """Levels 1 to 3 of an inputs cache."""
    images, episodes = "time_ids" in manifest.fields, "actions" in manifest.fields

    def deeper(record: ShardRecord) -> str | None:
        if images:
            return dense_inputs_fault(store, record, manifest.facts)
        if episodes:
            return episode_inputs_fault(store, record, manifest.facts)
        return inputs_fault(store, record, vocab_size=int(str(manifest.facts["vocab_size"])))

    def ids(record: ShardRecord) -> list[str]:
        return read_dense(store, record.name).row_ids if images or episodes else read_index(store, record.name).row_ids

    found = _check(store, manifest, None, deeper)
    if not found and (twice := duplicate_ids(map(ids, manifest.shards))):
        found.append(Damage(store.uri, MANIFEST, f"{len(twice):,} row ids appear twice, the first is {twice[0]}"))
    return found


def check_signal(store: Store, manifest: Manifest, inputs: Store, inputs_manifest: Manifest) -> list[Damage]:
    """Levels 1 to 3 of a signal cache, beside its inputs."""
    fault = dense_signal_fault if {"prediction", "path"} & set(manifest.fields) else signal_fault
    fault = world_signal_fault if "frames" in manifest.fields else fault

    def deeper(record: ShardRecord) -> str | None:
        return fault(store, record, inputs, manifest.fields, manifest.facts)

    found = _check(store, manifest, inputs_manifest.fingerprint, deeper)
    wanted, names = {r.name for r in inputs_manifest.shards}, {r.name for r in manifest.shards}
    if wanted != names:
        found.append(Damage(store.uri, MANIFEST, f"its shards are not those of the inputs: {sorted(wanted ^ names)}"))
    return found


def _check(
    store: Store, manifest: Manifest, parent: str | None, deeper: Callable[[ShardRecord], str | None]
) -> list[Damage]:
    found = [Damage(store.uri, MANIFEST, fault) for fault in manifest_faults(store, manifest, parent=parent)]
    broken: dict[str, str] = {}
    records, present = read_records(store, broken=broken), set(store.names())

    def check(record: ShardRecord) -> str | None:
        return broken.get(record.name) or file_fault(store, record, records, present) or deeper(record)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = pool.map(check, manifest.shards)
        found += [Damage(store.uri, r.name, f) for r, f in zip(manifest.shards, faults, strict=True) if f]
    return found


def sample_rows(records: Sequence[ShardRecord], num_rows: int, seed: str) -> dict[str, list[int]]:
    """Row numbers by shard, from `seed`: one row of each of `num_rows` shards, or several where there are fewer."""
    records = [record for record in records if record.rows]
    rng = np.random.Generator(np.random.Philox(int(seed, 16)))
    order = [records[i] for i in rng.permutation(len(records))]
    sample: dict[str, set[int]] = {}
    for i in range(min(num_rows, sum(record.rows for record in records))):
        record = order[i % len(order)]
        sample.setdefault(record.name, set()).add(int(rng.integers(record.rows)))
    return {name: sorted(rows) for name, rows in sorted(sample.items())}


def _line(store: Store, manifest: Manifest, damages: Sequence[Damage], *notes: str) -> str:
    state = f"{len(damages)} damage(s)" if damages else "sound"
    rows = sum(record.rows for record in manifest.shards)
    return "; ".join([f"{store.uri}: {len(manifest.shards)} shards, {rows:,} rows, {state}", *notes])
