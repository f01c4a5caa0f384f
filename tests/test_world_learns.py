"""The whole way on the toy game, without Ray: a teacher learns it, then a student learns it from the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from world_toys import SIZES, TEACHER, build_inputs, build_signal, run_config, teacher_section, write_episodes

from raydistill.config.schema import RunConfig
from raydistill.pipeline import Run, advance

STAGES = ("init", "train", "evaluate", "export")
TOKENIZER = "^(encoder|codebook|decoder)\\."


def phase(name: str, steps: int, rule: str, lr: float = 5e-3, **recipe: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": steps,
        "recipe": {"kind": "features", **recipe},
        "batch": {"global_size": 16, "micro_size": 16},
        "optimizer": {
            "student": {"lr": lr, "warmup_steps": 5, "schedule": "cosine", "min_lr_ratio": 0.1, "betas": [0.9, 0.99]}
        },
        "trainable": [{"match": rule}],
        "precision": "fp32",
        "log_every": 10,
    }


def finished(config: RunConfig) -> Run:
    run = Run(config)
    run.inputs = build_inputs(config)
    run.signals = {t.name: build_signal(config, i) for i, t in enumerate(config.teachers)}
    advance(run, STAGES)
    return run


@pytest.mark.slow
def test_a_student_learns_the_game_from_a_teacher_that_has_learnt_it(tmp_path: Path) -> None:
    write_episodes(tmp_path / "episodes", number=40, steps=24)
    evaluate = {"held_out": 0.2, "baseline": False, "worlds": {"clips": 32, "strips": 1, "probe_steps": 200}}
    alone = {"alpha": 0.0}
    taught = run_config(
        tmp_path,
        name="teacher",
        run_dir=str(tmp_path / "teacher-run"),
        teachers=[],
        student={"model": {"library": "world", "sizes": TEACHER.model_dump(mode="json")}, "init": {"kind": "random"}},
        phases=[
            phase("tokenizer", 150, TOKENIZER, **alone, reconstruction=1.0, prediction=0.0),
            phase("dynamics", 300, "^dynamics\\.", **alone, next_codes=0.3),
        ],
        evaluate=evaluate,
    )
    teacher = finished(taught)
    line = json.loads(teacher.store.read_text("metrics.json"))["student"]
    assert line["true_change_cosine"] > 0.9
    assert line["rollout_cosine"] > 0.8

    section = teacher_section(tmp_path, model={"library": "world", "source": teacher.store.path("export")})
    config = run_config(
        tmp_path,
        teachers=[section, {**section, "name": "dreams", "signal": "rollout", "initial_frames": 2}],
        student={"model": {"library": "world", "sizes": SIZES.model_dump(mode="json")}, "init": {"kind": "random"}},
        phases=[
            phase(
                "encoder", 150, TOKENIZER, alpha=0.5, prediction=0.0, output=0.0, kl=0.0, reconstruction=1.0, codes=0.3,
                features=[{"student": "encoder.latents", "teacher": ["latents"], "weight": 1.0}],
            ),
            phase(
                "dynamics", 300, "^dynamics\\.", alpha=0.7, temperature=2.0, kl=0.1,
                attention=[{"student": "dynamics.blocks.0.spatial.map", "teacher": ["space"], "weight": 0.01}],
            ),
            phase("everything", 60, ".", 1e-3, alpha=0.7, kl=0.1, reconstruction=0.3, smoothness=0.1, action=1e-3),
            phase("dreams", 20, "^(dynamics|decoder)\\.", 5e-4, alpha=1.0, kl=0.1, learn_from="rollouts"),
        ],
        evaluate=evaluate,
    )  # fmt: skip
    student = finished(config)
    found = json.loads(student.store.read_text("metrics.json"))["student"]
    print({name: found[name] for name in ("change_cosine", "obedience_ratio", "psnr_to_teacher", "rollout_cosine")})
    assert found["change_cosine"] > 0.9
    assert found["obedience_ratio"] > 0.9
    advance(student, ("checklist",), asked=True)  # a failed line would end with an error
