"""What the caches say by themselves: the teacher's own line, and the facts and histograms of the report.

cache_stats.json: `{"inputs": {rows, tokens: {split: n}, bytes}, "signals": {teacher: {...}}}` where a signal has

* from its manifest `rows`, `targets`, `bytes`, `bytes_per_target`, `top_k`, `estimator`, `codec`, `temperatures` and
  `vocab_size`;
* from `sampled_targets` targets of sampled training rows `mass_in_k`, `entropy` and `confidence` (of the most probable
  token), each `{"edges": [n + 1], "shares": [n], "mean": x}`; without ids the first and the last are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.cache.manifest import Manifest
from raydistill.cache.read import Dataset, open_manifest
from raydistill.evaluate.language import HeldOut, calibration_sums, language_metrics
from raydistill.signals import JsonValue
from raydistill.storage import Store

MASS_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Classes of the mass inside K; most tokens crowd near 1."""
CONFIDENCE_EDGES = tuple(b / 10 for b in range(11))
ENTROPY_BINS = 24


def teacher_line(rows: HeldOut, name: str) -> dict[str, float]:
    """The metrics of teacher `name` on the held-out rows, from its cached signal; the teacher does not run."""
    totals = dict.fromkeys(("tokens", "nll", "correct", "bytes", "entropy"), 0.0)
    bins = torch.zeros(calibration_sums(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).shape, dtype=torch.float64)
    with_ids = next(t for t in rows.teachers if t.name == name).facts["top_k"]
    for indices in rows.batches():
        batch = rows.dataset.batch(indices)
        where = batch["target"]
        totals["tokens"] += float(where.sum())
        totals["nll"] -= float(batch[f"{name}/label_logp"][where].double().sum())
        totals["entropy"] += float(batch[f"{name}/entropy"][where].double().sum())
        totals["bytes"] += float(rows.dataset.text_bytes[indices].sum())
        if with_ids:
            correct = batch[f"{name}/ids"][where][:, 0] == batch["labels"][where]
            totals["correct"] += float(correct.sum())
            bins += calibration_sums(batch[f"{name}/logp"][where][:, 0].float().exp(), correct)
    num_bins = len(bins) // 3
    keys = [f"{sum}/{b:02}" for sum in ("bin_tokens", "bin_confidence", "bin_correct") for b in range(num_bins)]
    metrics = language_metrics({**totals, **dict(zip(keys, bins.tolist(), strict=True))}, [])
    if not with_ids:  # the most probable token is not in the cache
        del metrics["ece"], metrics["top1_accuracy"]
    return {**metrics, "entropy": totals["entropy"] / totals["tokens"]}


def cache_stats(inputs: Store, signals: Mapping[str, Store], *, most_rows: int = 512) -> dict[str, JsonValue]:
    """The content of cache_stats.json, from finished caches; at most `most_rows` training rows are decoded."""
    manifest = open_manifest(inputs)
    return {
        "inputs": {
            "rows": {split: sum(s.rows for s in manifest.split_shards(split)) for split in ("train", "held_out")},
            "tokens": {split: sum(s.tokens for s in manifest.split_shards(split)) for split in ("train", "held_out")},
            "bytes": sum(s.bytes for s in manifest.shards),
        },
        "signals": {name: _signal_stats(inputs, name, store, most_rows) for name, store in signals.items()},
    }


def _signal_stats(inputs: Store, name: str, store: Store, most_rows: int) -> dict[str, JsonValue]:
    manifest = open_manifest(store)
    fields = ("logp", "log_tail", "entropy")
    dataset = Dataset(inputs, {name: store}, split="train", fields={name: fields})
    values = [_numbers(dataset.batch([row]), name) for row in _spread(dataset.num_rows, most_rows)]
    entropy, mass, confidence = (torch.cat(parts).numpy() for parts in zip(*values, strict=True))
    vocab_size = manifest.facts["vocab_size"]
    assert isinstance(vocab_size, int)
    edges = np.linspace(0, math.ceil(math.log(vocab_size)), ENTROPY_BINS + 1)
    with_ids = bool(manifest.facts["top_k"])
    return {
        **_manifest_stats(manifest),
        "sampled_targets": len(entropy),
        "mass_in_k": _histogram(mass, MASS_EDGES) if with_ids else None,
        "confidence": _histogram(confidence, CONFIDENCE_EDGES) if with_ids else None,
        "entropy": _histogram(entropy, edges.tolist()),
    }


def _manifest_stats(manifest: Manifest) -> dict[str, JsonValue]:
    targets, size = sum(s.tokens for s in manifest.shards), sum(s.bytes for s in manifest.shards)
    kept = ("top_k", "estimator", "codec", "temperatures", "vocab_size")
    return {
        "rows": sum(s.rows for s in manifest.shards),
        "targets": targets,
        "bytes": size,
        "bytes_per_target": size / max(targets, 1),
        **{key: manifest.facts.get(key) for key in kept},
    }


def _numbers(batch: Mapping[str, Tensor], name: str) -> tuple[Float[Tensor, " n"], ...]:
    """Entropy in nats, mass inside K and confidence at the targets of a batch."""
    where = batch["target"]
    log_p = batch[f"{name}/logp"][where].float()
    confidence = log_p[:, 0].exp() if log_p.shape[1] else torch.zeros(len(log_p))
    return batch[f"{name}/entropy"][where].float(), 1 - batch[f"{name}/log_tail"][where].float().exp(), confidence


def _spread(count: int, most: int) -> Iterator[int]:
    return (i * count // min(count, most) for i in range(min(count, most)))


def _histogram(values: np.ndarray, edges: Sequence[float]) -> dict[str, JsonValue]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=np.asarray(edges))
    total = max(int(counts.sum()), 1)
    return {
        "edges": [float(e) for e in edges],
        "shares": [float(c) / total for c in counts],
        "mean": float(values.mean()) if len(values) else 0.0,
    }


def capture_speed(inputs: Store, signal: Store) -> float | None:
    """Tokens per second at which the teacher wrote its cache, start-up included; None where build.json does not say."""
    if not signal.exists("build.json"):
        return None
    tokens = {record.name: record.tokens for record in open_manifest(inputs).shards}
    builds = json.loads(signal.read_text("build.json"))
    done = sum(tokens.get(name, 0) for build in builds for name in build["shards"])
    seconds = sum(build["seconds"] for build in builds)
    return done / seconds if done and seconds else None
