"""Checks caches, names each damaged shard and what is wrong with it, and lists them in `damaged.json` for the repair.

Levels, each on what the ones before found sound:
1. structure and hashes: manifest, records, files, sizes, sha256;
2. ids, counts and schema: a signal's rows and tokens are those of its inputs, its fields those of the manifest;
3. finiteness and probabilities: sorted, unique ids of the vocabulary, head and tail sum to 1;
4. semantic audit: the teacher run again on sampled rows says the same within a tolerance, and the training loss between
   the teacher itself and its cache is zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from raydistill.cache.audit import audit_rows, self_divergence
from raydistill.cache.checks import duplicate_ids, file_fault, inputs_fault, manifest_faults, signal_fault
from raydistill.cache.codecs import codec_for
from raydistill.cache.ledger import MANIFEST, write_damaged
from raydistill.cache.manifest import Manifest, ShardRecord
from raydistill.cache.shards import read_inputs, read_records, read_signal
from raydistill.config.recipes import LmLogitsRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import TeacherConfig
from raydistill.errors import VerificationFailed
from raydistill.models.load import load_language_model
from raydistill.signals import Teacher
from raydistill.storage import Store
from raydistill.teachers.logits import TopKLogitsTeacher

Loader: TypeAlias = Callable[[TeacherConfig, int], tuple[Teacher, nn.Module]]
SELF_DIVERGENCE = 0.1
"""Largest divergence of a teacher from its own cache, as a share of `cache.audit_tolerance`: a mean difference d of
log-probabilities makes a divergence of the order of d²/2."""


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
) -> list[Damage]:
    """Check the inputs and the signal of every teacher, at all levels. Writes each cache's `damaged.json` anew.

    Nothing else is touched and nothing is raised for what is found: see `require_sound`. `cache.audit_rows: 0` leaves
    the teachers, and so the last level, out.
    """
    damages = check_inputs(inputs, inputs_manifest)
    write_damaged(inputs, {damage.shard: damage.what for damage in damages})
    print(_line(inputs, inputs_manifest, damages), flush=True)
    for teacher in config.teachers:
        store, manifest = signals[teacher.name]
        found = check_signal(store, manifest, inputs, inputs_manifest)
        notes: list[str] = []
        if config.cache.audit_rows:
            bad = {damage.shard for damage in [*damages, *found]}
            found += audit_signal(config, teacher, store, manifest, inputs, without=bad, load=load, notes=notes)
        write_damaged(store, {damage.shard: damage.what for damage in found})
        print(_line(store, manifest, found, *notes), flush=True)
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
    vocab_size = int(str(manifest.facts["vocab_size"]))

    def deeper(record: ShardRecord) -> str | None:
        return inputs_fault(store, record, vocab_size=vocab_size)

    found = _check(store, manifest, None, deeper)
    if not found and (twice := duplicate_ids([(store, record) for record in manifest.shards])):
        found.append(Damage(store.uri, MANIFEST, f"{len(twice):,} row ids appear twice, the first is {twice[0]}"))
    return found


def check_signal(store: Store, manifest: Manifest, inputs: Store, inputs_manifest: Manifest) -> list[Damage]:
    """Levels 1 to 3 of a signal cache, beside its inputs."""

    def deeper(record: ShardRecord) -> str | None:
        return signal_fault(store, record, inputs, manifest.fields, manifest.facts)

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


def audit_signal(
    config: RunConfig,
    teacher: TeacherConfig,
    store: Store,
    manifest: Manifest,
    inputs: Store,
    *,
    without: set[str],
    load: Loader | None = None,
    notes: list[str] | None = None,
) -> list[Damage]:
    """Level 4: run the teacher again on `cache.audit_rows` sampled rows of the shards that are not in `without`.

    The sample is a function of the cache's fingerprint and goes over as many shards as it can. What was measured is
    appended to `notes`.
    """
    notes = [] if notes is None else notes
    sound = [record for record in manifest.shards if record.name not in without]
    sample = sample_rows(sound, config.cache.audit_rows, manifest.fingerprint)
    if not sample:
        return []
    vocab_size = int(str(manifest.facts["vocab_size"]))
    codec = codec_for(str(manifest.facts["codec"]), vocab_size=vocab_size)
    view, model = (load or load_teacher)(teacher, vocab_size)
    damages = []
    tolerance = config.cache.audit_tolerance
    exact = manifest.facts.get("estimator") == "top_k"  # a sampled tail has noise, whose divergence is not zero
    used = [p.recipe for p in config.phases if isinstance(p.recipe, LmLogitsRecipe) and p.recipe.uses_teacher]
    recipes = used if exact else []
    agreements, differences, divergences = [], [], [0.0]
    for name, chosen in sample.items():
        rows, stored = read_inputs(inputs, name), read_signal(store, name)
        audit = audit_rows(view, [rows[i] for i in chosen], [stored.row(i) for i in chosen], codec)
        fault = audit.wrong(tolerance)
        for recipe in recipes:
            for i in chosen:
                own = self_divergence(recipe, model, teacher.name, manifest, rows[i], stored, i) / recipe.temperature**2
                divergences.append(own)
                if own > SELF_DIVERGENCE * tolerance:
                    fault = fault or f"the training loss between the teacher and its own cache is {own:.4f} nats, not 0"
        if fault:
            damages.append(Damage(store.uri, name, fault))
        agreements.append(audit.top1_agreement)
        differences.append(audit.mean_difference)
    notes.append(
        f"audit of {sum(map(len, sample.values()))} rows: top-1 agreement {np.mean(agreements):.3f}, "
        f"mean |Δ log p| {np.mean(differences):.4f} nats, self-divergence {max(divergences):.1e}"
    )
    return damages


def sample_rows(records: Sequence[ShardRecord], num_rows: int, seed: str) -> dict[str, list[int]]:
    """Row numbers by shard: one row of each of `num_rows` shards, or several per shard where there are fewer."""
    records = [record for record in records if record.rows]
    rng = np.random.Generator(np.random.Philox(int(seed, 16)))
    order = [records[i] for i in rng.permutation(len(records))]
    sample: dict[str, set[int]] = {}
    for i in range(min(num_rows, sum(record.rows for record in records))):
        record = order[i % len(order)]
        sample.setdefault(record.name, set()).add(int(rng.integers(record.rows)))
    return {name: sorted(rows) for name, rows in sorted(sample.items())}


def load_teacher(config: TeacherConfig, vocab_size: int) -> tuple[Teacher, nn.Module]:
    """A teacher and, as its own student, its model, on the GPU of this process or its CPU."""
    model = load_language_model(config.model)
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return TopKLogitsTeacher(config, model, vocab_size), model


def _line(store: Store, manifest: Manifest, damages: Sequence[Damage], *notes: str) -> str:
    state = f"{len(damages)} damage(s)" if damages else "sound"
    rows = sum(record.rows for record in manifest.shards)
    return "; ".join([f"{store.uri}: {len(manifest.shards)} shards, {rows:,} rows, {state}", *notes])
