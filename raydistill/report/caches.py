"""What the page says of the caches: sizes of the inputs, and facts and histograms of each teacher's signal."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from raydistill.report.charts import histogram, number, percent
from raydistill.report.curves import Figure
from raydistill.report.images import signal_facts, space_facts
from raydistill.report.page import Json, section
from raydistill.report.words import as_number, said, size
from raydistill.signals import JsonValue

LOGITS_BYTES = 2
"""Bytes per logit of an uncompressed bf16 distribution, to compare the cache with."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What one teacher left in the cache."""

    teacher: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]


def signals(stats: Json) -> list[Signal]:
    """Facts and histograms of each teacher's cache."""
    return [_signal(name, section(found)) for name, found in section(stats.get("signals")).items()]


def _signal(name: str, stats: Json) -> Signal:
    if "bytes_per_draw" in stats:
        return Signal(name, tuple(signal_facts(stats)), ())
    per_target = as_number(stats.get("bytes_per_target"))
    facts = [("Rows", said(stats.get("rows"))), ("Targets", said(stats.get("targets")))]
    facts += [("Size", said(stats.get("bytes"), "bytes"))]
    if per_target is not None:
        facts.append(("Bytes per target", f"{per_target:.0f}"))
        if vocab_size := as_number(stats.get("vocab_size")):
            facts.append(("Against full bf16 logits", f"{number(LOGITS_BYTES * vocab_size / per_target)}× smaller"))
    labels = {"top_k": "Ids per target", "estimator": "Estimator", "codec": "Codec", "vocab_size": "Vocabulary"}
    facts += [
        (label, said(stats[key]).replace("_", " ")) for key, label in labels.items() if stats.get(key) is not None
    ]
    figures = []
    if mass := section(stats.get("mass_in_k")):
        edges, shares = _numbers(mass.get("edges")), _numbers(mass.get("shares"))
        names = [_upto(low, high) for low, high in pairwise(edges)]
        note = f"share of targets by the probability of the kept ids; mean {percent(as_number(mass.get('mean')) or 0)}"
        figures.append(Figure("Mass inside K", note, histogram(edges, shares, label=note, tone="c0", names=names)))
    for key, title, note, tone in (
        ("entropy", "Entropy", "of the teacher's distribution, in nats", "c1"),
        ("confidence", "Confidence", "probability of the teacher's most probable token", "c2"),
    ):
        if found := section(stats.get(key)):
            chart = histogram(
                _numbers(found.get("edges")),
                _numbers(found.get("shares")),
                label=title,
                tone=tone,
                mean=as_number(found.get("mean")),
            )
            figures.append(Figure(title, note, chart))
    return Signal(name, tuple(facts), tuple(figures))


def _numbers(values: JsonValue) -> list[float]:
    found = values if isinstance(values, list) else []
    return [v for v in map(as_number, found) if v is not None]


def _upto(low: float, high: float) -> str:
    return f"≤{100 * high:g}%" if low == 0 else f"–{100 * high:g}"


def cache_facts(stats: Json) -> list[tuple[str, str]]:
    """Rows, tokens or sizes of the inputs."""
    inputs = section(stats.get("inputs"))
    facts = []
    for key in ("rows", "tokens"):
        splits = section(inputs.get(key))
        if splits:
            parts = [f"{said(value)} {name.replace('_', '-')}" for name, value in splits.items()]
            facts.append((key.capitalize(), ", ".join(parts)))
    facts += space_facts(inputs)
    if (num_bytes := as_number(inputs.get("bytes"))) is not None:
        facts.append(("Size", size(num_bytes)))
    return facts
