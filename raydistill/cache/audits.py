"""The last level of verification: sampled rows of a signal against the teacher that wrote it, run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from raydistill.cache.audit import audit_rows, self_divergence
from raydistill.cache.average import averaged, sources
from raydistill.cache.codecs import codec_for
from raydistill.cache.dense import read_dense
from raydistill.cache.dense_audit import DenseAudit, audit_draws, relative_rms
from raydistill.cache.dense_checks import noise_of_facts
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import read_inputs, read_signal
from raydistill.cache.signal_job import TeacherFactory
from raydistill.cache.world_signal import audit_clips
from raydistill.config.recipes import LmLogitsRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TeacherConfig, TopKLogitsTeacher
from raydistill.config.world import FeaturesTeacher, RolloutTeacher
from raydistill.errors import SignalMismatch
from raydistill.models.load import load_language_model
from raydistill.signals import Teacher
from raydistill.storage import Store
from raydistill.teachers.logits import TopKLogitsTeacher as Logits

Loader: TypeAlias = Callable[[TeacherConfig, int], tuple[Teacher, nn.Module]]
Sample: TypeAlias = Mapping[str, Sequence[int]]
"""Row numbers by shard."""
SELF_DIVERGENCE = 0.1
"""Largest divergence of a teacher from its own cache, as a share of `cache.audit_tolerance`: a mean difference d of
log-probabilities makes a divergence of the order of d²/2."""


@dataclass(frozen=True, slots=True)
class Audits:
    """What running a teacher again showed."""

    faults: dict[str, str]
    """What is wrong, by shard."""
    note: str
    """What was measured."""


def audit_language_model(
    config: RunConfig,
    teacher: TopKLogitsTeacher,
    store: Store,
    manifest: Manifest,
    inputs: Store,
    sample: Sample,
    *,
    load: Loader | None = None,
) -> Audits:
    """A `top_k_logits` signal: the same log-probabilities, and no training loss between the teacher and its cache."""
    vocab_size = int(str(manifest.facts["vocab_size"]))
    codec = codec_for(str(manifest.facts["codec"]), vocab_size=vocab_size)
    view, model = (load or load_teacher)(teacher, vocab_size)
    faults = {}
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
            faults[name] = fault
        agreements.append(audit.top1_agreement)
        differences.append(audit.mean_difference)
    note = (
        f"audit of {sum(map(len, sample.values()))} rows: top-1 agreement {np.mean(agreements):.3f}, "
        f"mean |Δ log p| {np.mean(differences):.4f} nats, self-divergence {max(divergences):.1e}"
    )
    return Audits(faults, note)


def load_teacher(config: TeacherConfig, vocab_size: int) -> tuple[Teacher, nn.Module]:
    """A teacher and, as its own student, its model, on the GPU of this process or its CPU."""
    assert isinstance(config, TopKLogitsTeacher)
    model = load_language_model(config.model)
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return Logits(config, model, vocab_size), model


def audit_denoiser(
    config: RunConfig,
    teacher: NoisePredictionTeacher | OdeTrajectoryTeacher,
    store: Store,
    manifest: Manifest,
    inputs: Store,
    sample: Sample,
    factory: TeacherFactory,
) -> Audits:
    """A denoiser's signal: the same predictions or trajectories, by their relative root mean square difference."""
    noise = noise_of_facts(manifest.facts)
    view = factory(teacher, noise)
    found = {
        name: audit_draws(view, read_dense(inputs, name), read_dense(store, name), noise, chosen)
        for name, chosen in sample.items()
    }
    return _judged(config, found, "draws")


def audit_world(
    config: RunConfig,
    teacher: FeaturesTeacher | RolloutTeacher,
    store: Store,
    manifest: Manifest,
    inputs: Store,
    sample: Sample,
    factory: TeacherFactory,
) -> Audits:
    """A signal of a world model: the same frames, codes, logits and taps, by their relative rms difference."""
    view = factory(teacher, int(str(manifest.facts["clip_frames"])))
    found = {n: audit_clips(view, read_dense(inputs, n), read_dense(store, n), rows) for n, rows in sample.items()}
    return _judged(config, found, "clips")


def _judged(config: RunConfig, found: Mapping[str, DenseAudit], unit: str) -> Audits:
    """What dense shards differ by, in words, and those that differ by more than the configured tolerance."""
    faults = {name: wrong for name, audit in found.items() if (wrong := audit.wrong(config.cache.audit_tolerance))}
    mean, largest = np.mean([a.mean_difference for a in found.values()]), max(a.largest for a in found.values())
    count = sum(audit.draws for audit in found.values())
    return Audits(faults, f"audit of {count} {unit}: relative rms difference mean {mean:.1e}, largest {largest:.1e}")


def audit_average(
    config: RunConfig, signals: Mapping[str, tuple[Store, Manifest]], store: Store, manifest: Manifest, sample: Sample
) -> Audits:
    """The average of the teachers: what their signals give now, in the sampled shards."""
    parts = sources({name: signals[name] for name in signals if signals[name][0].uri != store.uri}, manifest.content)
    faults, largest = {}, 0.0
    for name in sample:
        written = read_dense(store, name)
        try:
            again = averaged([(read_dense(Store(uri), name), share) for uri, share in parts])
        except SignalMismatch as error:
            faults[name] = str(error)
            continue
        differences = {field: relative_rms(again[field], written.tensor(field)) for field in ("prediction", "variance")}
        largest = max(largest, *differences.values())
        if max(differences.values()) > config.cache.audit_tolerance:
            faults[name] = f"it is not the average of the teachers' signals: relative rms differences {differences}"
    return Audits(faults, f"{len(sample)} shards averaged again: largest relative rms difference {largest:.1e}")
