"""The run folder of a finished image run, with invented but plausible numbers and drawn pictures."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from raydistill.config.schema import RunConfig

NOISE = {"draws_per_row": 4, "prediction_type": "epsilon"}
IMAGE_SETTINGS = {
    "name": "emoji-two-styles",
    "run_dir": "runs/emoji-two-styles",
    "cache": {"dir": "runs/emoji-two-styles/cache"},
    "source": {
        "kind": "images", "paths": ["data/google.parquet"], "resolution": 32, "bucket_step": 32, "max_aspect": 1.0,
        "vae": "none", "text_encoders": [{"source": "models/minilm", "layer": -1, "pooled": "mean"}], "noise": NOISE,
    },
    "teachers": [
        {
            "signal": "noise_prediction", "name": name, "weight": weight,
            "model": {"library": "diffusers", "source": f"runs/{name}/export"},
        }
        for name, weight in (("google", 2.0), ("twitter", 1.0))
    ],
    "student": {
        "model": {"library": "diffusers", "source": "models/emoji", "overrides": {"block_out_channels": [16, 32]}},
        "init": {"kind": "random"},
    },
    "phases": [
        {
            "name": "distil", "steps": 300, "recipe": {"kind": "noise_prediction"}, "ema": {},
            "batch": {"global_size": 16, "micro_size": 8}, "optimizer": {"student": {"lr": 1e-3}},
        }
    ],
}  # fmt: skip
CAPTIONS = ("grinning face", "red apple", "sun behind small cloud", "", "flag: <b>Wales</b> & more", "snowman")
EDGES = [100.0 * b for b in range(11)]
PARAMETERS = {"teacher": 1_630_000, "student": 310_000}


def fake_image_run(folder: Path, *, side: int = 32) -> Path:
    """Fill `folder` with every file that the report of an image run reads."""
    config = RunConfig.model_validate(IMAGE_SETTINGS).model_dump(mode="json")
    versions = {"python": "3.11.9", "torch": "2.15.0", "diffusers": "0.42.1"}
    _write(folder / "config.json", {"config": config, "versions": versions})
    _write(folder / "metrics.json", fake_image_metrics())
    _write(folder / "samples.json", _samples(folder, side))
    _write(folder / "cache_stats.json", _cache_stats())
    _write(
        folder / "stages.json", {"inputs": {"seconds": 9.0}, "signals": {"seconds": 61.0}, "train": {"seconds": 400}}
    )
    _write_log(folder / "metrics.jsonl", taught=True)
    _write_log(folder / "baseline/metrics.jsonl", taught=False)
    return folder


def fake_image_metrics() -> dict[str, object]:
    """metrics.json."""
    lines = {
        "teacher": _line(0.0046, 0.041, "teacher"), "student_init": _line(1.02, 1.05, "student"),
        "student_ce": _line(0.021, 0.052, "student"), "student": _line(0.0132, 0.049, "student"),
        "student_ema": _line(0.0119, 0.048, "student"),
    }  # fmt: skip
    for name, value in (("mse_to/google", 0.9), ("mse_to/twitter", 1.2), ("mse_to_mean", 0.65)):
        for role in ("student_init", "student_ce", "student", "student_ema"):
            lines[role][name] = value * lines[role]["mse_to_teacher"]
            lines[role]["by_timestep"][name] = [value * v for v in lines[role]["by_timestep"]["mse_to_teacher"]]
    for role, distance in (("student_ce", 61.0), ("student", 40.2), ("student_ema", 38.8), ("teacher", 22.0)):
        lines[role] |= {
            "images_per_second": 9.1,
            "clip_score": 24.0,
            "clip_images": 128,
            "features": _features(distance),
        }
    teachers = {
        "google": {**_line(0.0031, 0.041, "teacher"), "mse_to/google": 0.0, "mse_to/twitter": 0.0092},
        "twitter": {**_line(0.0062, 0.043, "teacher"), "mse_to/google": 0.0092, "mse_to/twitter": 0.0},
    }
    comparison = {
        "quality_metric": "mse_to_teacher", "lower_is_better": True,
        **{f"{role}_quality": lines[role]["mse_to_teacher"] for role in lines},
        "gap_closed": 0.9915, "baseline_gap_closed": 0.984, "better_than_init": True, "better_than_baseline": True,
        "parameters_ratio": 0.19, "bytes_ratio": 0.19, "speed_ratio": 3.4,
    }  # fmt: skip
    held_out = {"rows": 61, "draws": 244, "timestep_edges": EDGES}
    return {**lines, "teachers": teachers, "comparison": comparison, "held_out": held_out}


def _line(to_teacher: float, to_noise: float, size: str) -> dict[str, object]:
    fall = [math.exp(-b / 3) * 2.6 + 0.12 for b in range(10)]
    mean = sum(fall) / len(fall)
    return {
        "mse_to_teacher": to_teacher,
        "mse_to_noise": to_noise,
        "by_timestep": {
            "mse_to_teacher": [to_teacher * f / mean for f in fall],
            "mse_to_noise": [to_noise * f / mean for f in fall],
        },
        "parameters": PARAMETERS[size], "bytes": 4 * PARAMETERS[size],
        "samples_per_second": 240.0 if size == "teacher" else 816.0, "peak_memory_bytes": 3_100_000,
    }  # fmt: skip


def _features(distance: float) -> dict[str, object]:
    return {
        "extractor": "default_1", "dimensions": 2048, "generated": 128, "held_out": 61, "frechet_distance": distance,
        "reliable": False, "kernel_distance": distance / 900, "kernel_distance_deviation": 0.002,
    }  # fmt: skip


def _samples(folder: Path, side: int) -> dict[str, object]:
    who = ("teacher/google", "teacher/twitter", "student_ce", "student", "student_ema")
    samples = []
    for place, caption in enumerate(CAPTIONS):
        names = {w: f"samples/{place:02}-{w.replace('/', '-')}.png" for w in ("held-out", *who)}
        for number, name in enumerate(names.values()):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_picture(place, number, side))
        samples.append({"prompt": caption, "row_id": f"r{place}", "reference": names.pop("held-out"), "outputs": names})
    return {"kind": "images", "steps": 25, "guidance_scale": 2.0, "samples": samples}


def _picture(place: int, number: int, side: int) -> bytes:
    rng = random.Random(10 * place)
    image = Image.new("RGB", (side, side), "white")
    colour = tuple(rng.randrange(40, 240) for _ in range(3))
    soft = tuple(min(255, c + 14 * number) for c in colour)
    unit = side // 16
    ImageDraw.Draw(image).ellipse((unit, unit + number * unit // 4, side - 2 * unit, side - unit), fill=soft)
    ImageDraw.Draw(image).rectangle((5 * unit, 5 * unit, 6 * unit, 7 * unit), fill="black")
    ImageDraw.Draw(image).rectangle((9 * unit, 5 * unit, 10 * unit, 7 * unit), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _cache_stats() -> dict[str, object]:
    signal = {
        "rows": 1500, "draws": 6000, "bytes": 37_000_000, "bytes_per_draw": 6166.0, "prediction_type": "epsilon",
        "own_prediction_type": "v_prediction", "guidance_scale": 2.0, "samples_per_second": 210.0,
    }  # fmt: skip
    inputs = {
        "rows": {"train": 1439, "held_out": 61}, "bytes": 21_000_000, "latent_channels": 3, "vae_factor": 1,
        "buckets": [[32, 32]],
    }  # fmt: skip
    return {"inputs": inputs, "signals": {"google": signal, "twitter": signal}}


def _write_log(path: Path, *, taught: bool) -> None:
    rng, lines = random.Random(taught), []
    for step in range(2, 301, 2):
        progress = math.exp(-step / 60)
        task, kd = 0.05 + progress + abs(rng.gauss(0, 0.01)), 0.012 + progress + abs(rng.gauss(0, 0.01))
        parts = {"blend": kd if taught else task, "task": task}
        if taught:
            parts |= {"kd": kd, "kd/google": 0.9 * kd, "kd/twitter": 1.2 * kd}
        lines.append({
            "phase": "distil", "step": step, "samples": 16 * step, "loss": parts["blend"], "parts": parts,
            "lr": {"student": 1e-3}, "grad_norm": 0.5 + progress, "samples_per_second": 150.0,
            "data_wait_seconds": 0.01, "seconds": 0.2 * step,
        })  # fmt: skip
        if step % 100 == 0:
            evaluation = {"mse_to_teacher": 0.9 * kd, "mse_to/google": kd, "mse_to_noise": task}
            lines.append({"phase": "distil", "step": step, "evaluation": evaluation})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
