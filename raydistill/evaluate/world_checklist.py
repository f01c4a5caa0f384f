"""The checklist of a distilled world model: what must hold before anybody relies on it, with the number behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raydistill.config.schema import RunConfig
from raydistill.evaluate.job import student_of
from raydistill.signals import JsonValue
from raydistill.storage import Store

State = Literal["pass", "fail", "not measured here"]
PART = 5
"""The loss must fall from the mean of the first to that of the last 1/PART of the logged steps of its phase."""
ENOUGH_STEPS = 20
"""Logged steps of a phase below which noise decides which mean is lower: a short fine-tuning, say, is not judged."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line."""

    what: str
    state: State
    number: str


def checklist(config: RunConfig, run: Store, *, weights: str) -> list[Check]:
    """Every line of the checklist, from metrics.json, metrics.jsonl and the weights at URI `weights`."""
    metrics: Mapping[str, JsonValue] = json.loads(run.read_text("metrics.json"))
    wanted, student, teacher = config.evaluate.worlds, _line(metrics, "student"), _line(metrics, "teacher")
    similarity, obedience = _number(student, "change_cosine"), _number(student, "obedience_ratio")
    raw, visual = _number(student, "raw_cosine"), _number(student, "psnr_to_teacher")
    coherent = _number(teacher, "rollout_cosine")
    network = student_of(f"{run.uri}/init", weights, dtype=torch.float32)
    count = sum(p.numel() for p in network.parameters())
    fps = _number(student, "frames_per_second")
    gpu = torch.cuda.is_available()
    memory = (_number(student, "peak_memory_bytes") or 0.0) + (_number(student, "bytes") or 0.0)
    both = f"{_said(_number(student, 'obedience'))} over the teacher's {_said(_number(teacher, 'obedience'))}"
    vram = f"{memory / 1e9:.3f} GB at batch 1" + ("" if gpu else ", on a CPU")
    fits: State = "pass" if memory < wanted.max_vram_gb * 1e9 else "fail"
    return [
        Check("student model loads without errors", "pass", f"{count:,} parameters"),
        _above(
            "teacher model generates coherent sequences", coherent, wanted.min_coherence,
            "cosine of the change over its rollouts, to the truth,",
        ),
        falls(config, run),
        _above(
            "output similarity after training", similarity, wanted.min_similarity,
            f"cosine of the predicted change to the teacher (raw cosine {_said(raw)})",
        ),
        _above(
            "generated frames are visually similar to the teacher's", visual, wanted.min_visual,
            "PSNR of rollouts, dB,",
        ),
        _above("action conditioning works", obedience, wanted.min_obedience, f"obedience {both},"),
        _rate(fps, wanted.target_fps, gpu),
        Check(
            f"memory of the device below {wanted.max_vram_gb:g} GB", fits if gpu else "not measured here", vram
        ),
    ]  # fmt: skip


def table(checks: Sequence[Check]) -> str:
    """The lines for a terminal."""
    width = max(len(check.state) for check in checks)
    return "\n".join(f"[{check.state:^{width}}] {check.what}: {check.number}" for check in checks)


def _above(what: str, value: float | None, least: float, words: str) -> Check:
    if value is None:
        return Check(what, "not measured here", "needs a teacher")
    return Check(what, "pass" if value > least else "fail", f"{words} {value:.4g}, wanted above {least:g}")


def _rate(fps: float | None, target: float | None, gpu: bool) -> Check:
    what = "runs at the target frame rate on a consumer GPU"
    found = f"{_said(fps)} frames/s at batch 1" + ("" if gpu else ", on a CPU")
    if not gpu or target is None or fps is None:
        return Check(what, "not measured here", found + ("" if target is not None else "; no target_fps is set"))
    return Check(what, "pass" if fps >= target else "fail", f"{found}, wanted {target:g}")


def falls(config: RunConfig, run: Store) -> Check:
    """Whether the loss of each phase that has a teacher is lower at its end than at its beginning."""
    what, found, state = "distillation loss decreases over time", [], "pass"
    lines = [json.loads(line) for line in run.read_text("metrics.jsonl").splitlines() if line]
    for phase in config.phases:
        losses = [float(line["loss"]) for line in lines if line.get("phase") == phase.name and "loss" in line]
        if not phase.recipe.uses_teacher:
            continue
        if len(losses) < ENOUGH_STEPS:
            found.append(f"{phase.name} ({len(losses)} logged steps are too few to tell)")
            continue
        part = max(1, len(losses) // PART)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        found.append(f"{phase.name} {first:.4g} → {last:.4g}")
        if last >= first:
            state = "fail"
    told = any("→" in line for line in found)
    return Check(what, ("pass" if state == "pass" else "fail") if told else "not measured here", ", ".join(found))


def _line(metrics: Mapping[str, JsonValue], role: str) -> Mapping[str, JsonValue]:
    line = metrics.get(role)
    return line if isinstance(line, dict) else {}


def _number(line: Mapping[str, JsonValue], name: str) -> float | None:
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
