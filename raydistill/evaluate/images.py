"""The stage `evaluate` of image models: each on the same held-out draws and captions, one after the other."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from raydistill.cache.manifest import Manifest
from raydistill.cache.read import open_manifest
from raydistill.config.metrics import few_steps
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.evaluate.comparison import compare
from raydistill.evaluate.denoiser import (
    ALONE,
    TAUGHT,
    HeldOutDraws,
    evaluate_denoiser,
    floor_line,
    open_held_out_draws,
    process_in,
    teacher_lines,
)
from raydistill.evaluate.features import extractor_file
from raydistill.evaluate.gallery import open_gallery
from raydistill.evaluate.job import EvaluateJob, Evaluation, device, exported_role, student_in
from raydistill.evaluate.language import model_size
from raydistill.evaluate.speed import peak_bytes, samples_per_second
from raydistill.evaluate.video_features import check_video_extractor
from raydistill.models.denoiser import load_denoiser, predict, process_of
from raydistill.models.sources import resolve_source
from raydistill.progress import say
from raydistill.signals import AVERAGE, JsonValue
from raydistill.storage import Store

SPEED_BATCHES = 8
"""Micro-batches that are kept in memory to measure a model's speed on."""
WITH_PICTURES = ("student_ce", "student", "student_ema")
"""Students whose images are shown; before training there is nothing to see."""

Line = dict[str, JsonValue]


@dataclass(frozen=True)
class Measured:
    """A model whose turn it is."""

    who: str
    """Role, or `teacher/<name>`."""
    network: nn.Module
    process: Process
    guidance_scale: float | None = None
    """Of its images, where it is not that of the configuration."""
    size: Mapping[str, float] = field(default_factory=dict)
    """Parameters, and their bytes in the number format of the configuration."""


def check_images(config: RunConfig) -> None:
    """Raise what the stage would end with: missing files, and measurements of images on videos."""
    images, videos = config.evaluate.images, config.evaluate.videos
    frames = None if isinstance(config.latents, ImagesSource) else config.latents.frames
    moving = frames is not None
    if videos.feature_extractor is not None:
        _check_videos(config, videos.feature_extractor, frames)
    for key in ("feature_extractor", "clip_model"):
        if moving and getattr(images, key) is not None:
            raise ConfigError(
                f"evaluate.images.{key}: looks at images, found a source of videos; remove it (videos have "
                "evaluate.videos.feature_extractor)."
            )
    if images.feature_extractor is not None:
        extractor_file(images.feature_extractor)
    if images.clip_model is not None:
        resolve_source(images.clip_model)


def _check_videos(config: RunConfig, extractor: str, frames: int | None) -> None:
    key = "evaluate.videos.feature_extractor"
    if frames is None or not few_steps(config) or not any(isinstance(t, OdeTrajectoryTeacher) for t in config.teachers):
        raise ConfigError(
            f"{key}: compares the videos of a student of few steps with those of a teacher of signal ode_trajectory, "
            "found no such pair; remove it."
        )
    check_video_extractor(extractor, frames, key=key)


def evaluate_images(job: EvaluateJob) -> Evaluation:
    """Measure teachers and students; one model is in memory at a time."""
    config = job.config
    each = {name: uri for name, uri in job.signals.items() if name != AVERAGE}
    rows = open_held_out_draws(config, inputs=job.inputs, signals=each or job.signals)
    gallery = open_gallery(config, inputs=job.inputs, device=device())
    gallery.add_held_out()
    lines, floor = _cached_lines(job, rows)
    for model in _models(job):
        say(f"evaluate: {model.who.replace('_', ' ')}")
        line = lines.setdefault(model.who, {})
        if not model.who.startswith("teacher/"):
            line |= evaluate_denoiser(model.network, rows)
        line |= {**model.size, **forward_costs(model, rows)}
        if model.who.startswith("teacher/") or model.who in WITH_PICTURES:
            line |= gallery.add(model.who, model.network, model.process, model.guidance_scale)
        del model
        gc.collect()
    stats = image_cache_stats(Store(job.inputs), {name: Store(uri) for name, uri in job.signals.items()})
    metrics = _arranged(config, lines, floor, stats)
    metrics["held_out"] = {
        "rows": len({sample.row_id for sample in rows.samples}),
        "draws": len(rows.samples),
        "timestep_edges": [*rows.edges],
    }
    return Evaluation(metrics, gallery.as_json(), stats, gallery.files)


def _cached_lines(job: EvaluateJob, rows: HeldOutDraws) -> tuple[dict[str, Line], Line]:
    """What the caches say of each teacher, and of the best possible student."""
    if not rows.taught:
        return {}, {}
    process = process_of(_denoisers(job.config)[0].model)  # all have one schedule
    lines = {f"teacher/{name}": line for name, line in teacher_lines(rows, process).items()}
    return lines, floor_line(rows, process)


def _denoisers(config: RunConfig) -> list[NoisePredictionTeacher]:
    found = [teacher for teacher in config.teachers if isinstance(teacher, NoisePredictionTeacher)]
    assert len(found) == len(config.teachers), "the configuration lets denoisers learn from these alone"
    return found


def _models(job: EvaluateJob) -> Iterator[Measured]:
    """The models, loaded when their turn comes."""
    for teacher in _denoisers(job.config):
        network: nn.Module = load_denoiser(teacher.model)
        size, network = model_size(network), _ready(network)
        yield Measured(f"teacher/{teacher.name}", network, process_of(teacher.model), teacher.guidance_scale, size)
        del network
    for role in job.students:
        student = student_in(job, role)
        size, student = model_size(student), _ready(student)
        yield Measured(role, student, process_in(student), size=size)
        del student


def _ready(network: nn.Module) -> nn.Module:
    """A network where it is measured. A CPU computes float16 by detours, so there the same numbers are held in fp32."""
    place = device()
    half = any(p.dtype == torch.float16 for p in network.parameters())
    nn.Module.to(network, place, torch.float32 if half and place.type == "cpu" else None)
    return network


@torch.no_grad()
def forward_costs(model: Measured, rows: HeldOutDraws) -> Line:
    """Forward passes per second on held-out draws, and the memory of one."""
    place = next(model.network.parameters()).device
    batches = [rows.read(part, place) for part in rows.batches()[:SPEED_BATCHES]]

    def forward(turn: int) -> int:
        batch = batches[turn]
        x_t = model.process.noisy(batch["latents"], batch["noise"], batch["timestep"])
        predict(model.network, x_t, model.process.times(batch["timestep"]), batch)
        return len(x_t)

    speed = samples_per_second(forward, place, turns=len(batches))
    return {"samples_per_second": speed, "peak_memory_bytes": peak_bytes(lambda: forward(0), place)}


def _arranged(
    config: RunConfig, lines: Mapping[str, Line], floor: Line, stats: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """metrics.json: by role, the heaviest teacher standing for all with what a perfect student would reach."""
    roles = {role: line for role, line in lines.items() if not role.startswith("teacher/")}
    if config.teachers:
        heaviest = max(config.teachers, key=lambda t: t.weight).name
        roles = {"teacher": _as_goal(lines[f"teacher/{heaviest}"], floor), **roles}
    metrics: dict[str, JsonValue] = dict(roles)
    if len(config.teachers) > 1:
        metrics["teachers"] = {t.name: lines[f"teacher/{t.name}"] for t in config.teachers}
    quality = TAUGHT if "mse_to_teacher" in roles["student"] else ALONE
    metrics["comparison"] = compare(roles, quality, exported=exported_role(config))
    metrics["cache"] = cache_sizes(stats)
    return metrics


def _as_goal(teacher: Line, floor: Line) -> Line:
    """The line of a teacher with the error to the teachers below which no student gets."""
    own = {name: value for name, value in teacher.items() if not name.startswith(("mse_to_mean", "mse_to/"))}
    bins, goal = teacher.get("by_timestep"), floor.get("by_timestep")
    if isinstance(bins, dict) and isinstance(goal, dict):
        kept = {name: bins[name] for name in bins if name == "mse_to_noise"}
        own["by_timestep"] = {"mse_to_teacher": goal["mse_to_teacher"], **kept}
    return {**own, "mse_to_teacher": floor["mse_to_teacher"]} if floor else own


def image_cache_stats(inputs: Store, signals: Mapping[str, Store]) -> dict[str, JsonValue]:
    """The content of cache_stats.json, from finished caches.

    `{"inputs": {rows: {split: n}, bytes, latent_channels, vae_factor, buckets}, "signals": {teacher: {rows, draws,
    bytes, bytes_per_draw, prediction_type, own_prediction_type, guidance_scale, samples_per_second}}}`.
    """
    manifest = open_manifest(inputs)
    kept = ("latent_channels", "vae_factor", "text_tokens", "text_width", "buckets", "dropped")
    return {
        "inputs": {
            "rows": {split: sum(s.rows for s in manifest.split_shards(split)) for split in ("train", "held_out")},
            "bytes": sum(s.bytes for s in manifest.shards),
            **{key: manifest.facts[key] for key in kept if key in manifest.facts},
        },
        "signals": {name: _signal_stats(open_manifest(store), store, manifest) for name, store in signals.items()},
    }


def _signal_stats(signal: Manifest, store: Store, inputs: Manifest) -> Line:
    rows, size = sum(s.rows for s in inputs.shards), sum(s.bytes for s in signal.shards)
    noise = signal.facts["noise"]
    assert isinstance(noise, dict), "a signal of a denoiser says how its noise is drawn"
    draws = int(str(noise["draws_per_row"]))
    kept = ("prediction_type", "own_prediction_type", "guidance_scale", "guidance_formula", "weights")
    stats: Line = {
        "rows": rows,
        "draws": draws * rows,
        "bytes": size,
        "bytes_per_draw": size / max(draws * rows, 1),
        **{key: signal.facts[key] for key in kept if signal.facts.get(key) is not None},
    }
    if speed := _captured_per_second(store, {record.name: draws * record.rows for record in inputs.shards}):
        stats["samples_per_second"] = speed
    return stats


def _captured_per_second(store: Store, draws: Mapping[str, int]) -> float | None:
    """Draws per second at which a teacher wrote its cache, start-up included; None where build.json does not say."""
    builds = json.loads(store.read_text("build.json")) if store.exists("build.json") else []
    timed = [build for build in builds if "seconds" in build and "shards" in build]
    done = sum(draws.get(name, 0) for build in timed for name in build["shards"])
    seconds = sum(build["seconds"] for build in timed)
    return done / seconds if done and seconds else None


def cache_sizes(stats: Mapping[str, JsonValue]) -> Line:
    """The part `cache` of metrics.json, from the content of cache_stats.json."""
    inputs, signals = stats["inputs"], stats["signals"]
    assert isinstance(inputs, dict)
    assert isinstance(signals, dict)
    sizes: Line = {"inputs": inputs}
    for name, signal in signals.items():
        assert isinstance(signal, dict)
        sizes[name] = {key: signal[key] for key in ("rows", "draws", "bytes", "bytes_per_draw")}
    return sizes
