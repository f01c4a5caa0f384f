"""How the report says numbers, and what it knows of each metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raydistill.report.charts import NBSP, number, percent
from raydistill.signals import JsonValue

ROLE_NAMES = {
    "teacher": "Teacher",
    "student_init": "Untrained student",
    "student_ce": "Without a teacher",
    "student": "Distilled student",
    "student_ema": "Distilled, averaged",
}
"""Who is measured, in the order of columns."""
ALONE_NAMES = {**ROLE_NAMES, "student": "Trained student", "student_ema": "Trained, averaged"}
"""The same where nobody was a teacher."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A line of the comparison table."""

    name: str
    title: str
    meaning: str
    unit: str = ""
    better: str = ""
    """`low`, `high` or empty: which value is marked as the best."""


METRICS = (
    Metric("perplexity", "Perplexity", "exponential of the mean cross-entropy on held-out text", better="low"),
    Metric("bits_per_byte", "Bits per byte", "cross-entropy per byte of text, whatever the tokenizer", better="low"),
    Metric("kl_to_teacher", "KL to the teacher", "divergence from the teacher's distribution, in nats", better="low"),
    Metric("top1_agreement", "Agreement", "most probable next token is the teacher's", "share", "high"),
    Metric("top1_accuracy", "Next-token accuracy", "most probable next token is the true one", "share", "high"),
    Metric("ece", "Calibration error", "gap between confidence and accuracy, 15 bins (ECE)", "share", "low"),
    Metric("entropy", "Entropy", "mean entropy of the predictions, in nats"),
    Metric(
        "mse_to_teacher",
        "Error to the teachers",
        "mean squared, weighted like the loss; the teacher's is the least possible",
        better="low",
    ),
    Metric("mse_to_mean", "Error to their mean", "the part of it that a student can lower", better="low"),
    Metric("mse_to_noise", "Error to the truth", "against the noise that was really mixed in", better="low"),
    Metric("clip_score", "CLIP score", "100 × cosine of generated image and caption", better="high"),
    Metric("frame_similarity", "Frame similarity", "correlation of neighbours; to be read beside the teacher's"),
    Metric("frame_change", "Frame change", "mean difference of neighbours; to be read beside the teacher's"),
    Metric("seam_change", "Change at seams", "where chunks meet, over that inside them; 1 where they join smoothly"),
    Metric("rollout_frames", "Long rollout", "latent frames of the videos on which drift is measured"),
    Metric("rollout_drift", "Drift", "of brightness and contrast, from the first to the last frames", better="low"),
    Metric("parameters", "Parameters", "numbers that the model holds"),
    Metric("bytes", "Size", "bytes of the weights in the number format used", "bytes"),
    Metric("tokens_per_second", "Tokens per second", "forward pass and output head, same rows and machine"),
    Metric("samples_per_second", "Steps per second", "forward passes of one sample each, same draws and machine"),
    Metric("images_per_second", "Samples made per second", "all steps of the sampler, and decoding"),
    Metric("frames_per_second", "Frames per second", "of one video of equal length, all steps"),
    Metric("peak_memory_bytes", "Working memory", "most that a forward pass takes beside the weights", "bytes"),
)
PARTS = {
    metric.name: metric
    for metric in (
        Metric("ce", "Cross-entropy", "of the true tokens, in nats"),
        Metric("kd", "Divergence from the teacher", "on the cached classes, in nats"),
        Metric("accuracy", "Next-token accuracy", "most probable token is the true one", "share"),
        Metric("agreement", "Agreement", "most probable token is the teacher's", "share"),
        Metric("router_aux", "Router balance", "load-balancing loss of the experts"),
    )
}
"""What is known of the parts of a loss, by the name before the slash."""
IMAGE_PARTS = {
    metric.name: metric
    for metric in (
        Metric("kd", "Distance to the teachers", "between predictions, weighted over the teachers"),
        Metric("task", "Plain diffusion loss", "against the noise that was really mixed in"),
        Metric("tap", "Features", "of a block, against the teacher's"),
        Metric("trajectory", "Distance to the teacher's samples", "from states on the way to them, half squared"),
        Metric("consistency", "Consistency", "between clean predictions at neighbouring times"),
        Metric("dmd", "Distance of the scores", "half squared and normalised: no measure of quality"),
        Metric("denoising", "Denoising", "of the critic on the student's videos, or of clips chunk by chunk"),
        Metric("telling", "Telling real from made", "loss of the heads; 1.39 where they know nothing"),
        Metric("fooling", "Fooling the heads", "loss of the student; 0.69 where they know nothing"),
        Metric("r1", "R1 penalty", "change of the heads' verdict on clips that are noised a little"),
    )
}
"""The same where denoisers learn."""
IN_TABLE_ELSEWHERE = {
    "loss", "benchmarks", "lm_eval", "capture_tokens_per_second", "by_timestep", "features", "video_features",
    "video_features_to_teacher", "clip_images",
}  # fmt: skip
"""Entries of a model's line that the table leaves to other places."""
SPOKEN = {"mse_to_teacher": "error to its teachers", "mse_to_noise": "error"}
"""How a sentence calls the metric that ranks the models, where its name would not do."""


def role_names(metrics: Mapping[str, JsonValue]) -> dict[str, str]:
    """What the page calls the models of a run."""
    return ROLE_NAMES if _line(metrics, "teacher") else ALONE_NAMES


def metric_of(name: str) -> Metric | None:
    """What is known of a metric of models."""
    if name.startswith("mse_to/"):
        return Metric(name, f"Error to {name.removeprefix('mse_to/')}", "mean squared, to this teacher", better="low")
    if name.startswith("mse_after/"):
        steps = name.removeprefix("mse_after/")
        title = f"Error after {steps} step{'s' if steps != '1' else ''}"
        return Metric(name, title, "mean squared, to the teacher's sample of the same noise", better="low")
    return next((metric for metric in METRICS if metric.name == name), None)


def spoken(name: str) -> str:
    """A metric inside a sentence."""
    return SPOKEN.get(name, name.replace("_", " "))


def as_number(value: JsonValue) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def said(value: JsonValue, unit: str = "") -> str:
    """A value as text: shares in per cent, bytes with their unit, an en dash for what was not measured."""
    found = as_number(value)
    if found is None:
        return "–" if value is None or isinstance(value, float) else str(value)
    if unit == "share":
        return f"{100 * found:.1f}{NBSP}%"
    if unit == "bytes":
        return size(found)
    return number(found)


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g}{NBSP}{unit}"
    return f"{num_bytes:.0f}{NBSP}B"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 10:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 100:
        return f"{seconds:.0f}{NBSP}s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes}{NBSP}min"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02}{NBSP}min"


def times(ratio: float, *, more: str, less: str) -> str:
    """`3.4 times fewer` for 0.29, `1.2 times more` for 1.2."""
    return f"{number(ratio)} times {more}" if ratio > 1 else f"{number(1 / ratio)} times {less}"


def lede(metrics: Mapping[str, JsonValue]) -> list[str]:
    """A few sentences that say how it went, from metrics.json; empty when it holds no comparison."""
    comparison = metrics.get("comparison")
    if not isinstance(comparison, Mapping):
        return []
    sentences = []
    parameters, speed = (as_number(comparison.get(f"{k}_ratio")) for k in ("parameters", "speed"))
    held = _line(metrics, "student")
    if parameters and (count := as_number(held.get("parameters"))):
        ratio = f"{times(parameters, more='more', less='fewer')} than" if parameters != 1 else "as many as"
        sentence = f"The student has {number(count)} parameters, {ratio} its teacher"
        if speed:
            sentence += f", and runs {number(speed)} times as fast"
        sentences.append(sentence + ".")
    metric = str(comparison.get("quality_metric", "quality"))
    quality = {role: as_number(comparison.get(f"{role}_quality")) for role in ROLE_NAMES}
    if quality["student"] is not None:
        others = {
            "teacher": "{} at best (as the teachers differ)" if metric == "mse_to_teacher" else ("{} for the teacher"),
            "student_ce": "{} for the same student trained without one",
            "student_init": "{} before training",
        }
        known = [text.format(number(v)) for role, text in others.items() if (v := quality[role])]
        sentence = f"Its held-out {spoken(metric)} is {number(quality['student'])}"
        sentences.append(sentence + (f", against {_joined(known)}" if known else "") + ".")
    if (closed := as_number(comparison.get("gap_closed"))) is not None:
        sentences.append(f"Distillation closed {percent(closed)} of the gap to the teacher")
        baseline = as_number(comparison.get("baseline_gap_closed"))
        sentences[-1] += "." if baseline is None else f", plain training {percent(baseline)}."
    return sentences


def _line(metrics: Mapping[str, JsonValue], role: str) -> Mapping[str, JsonValue]:
    line = metrics.get(role)
    return line if isinstance(line, Mapping) else {}


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
