"""Configurations of world models that cannot be: what is said, and that it is said before anything runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from raydistill.config.schema import RunConfig

TEACHER = {
    "name": "big",
    "signal": "features",
    "model": {"library": "world", "source": "models/big"},
    "taps": {"block": "dynamics.blocks.0", "space": {"module": "dynamics.blocks.0.spatial.map", "kind": "spatial"}},
}
RUN: dict[str, Any] = {
    "name": "toy",
    "source": {"kind": "episodes", "paths": ["x.npz"], "frame_size": [8, 8], "num_actions": 4},
    "teachers": [TEACHER],
    "student": {
        "model": {"library": "world", "sizes": {"frame_size": [8, 8], "num_actions": 4, "patch": 4}},
        "init": {"kind": "random"},
    },
    "phases": [
        {
            "name": "all",
            "steps": 1,
            "recipe": {"kind": "features"},
            "batch": {"global_size": 2, "micro_size": 2},
            "optimizer": {"student": {"lr": 1e-3}},
        }
    ],
}


def changed(key: str, value: object) -> dict[str, Any]:
    """`RUN` with another value at a dotted key."""
    run = copy.deepcopy(RUN)
    place: Any = run
    *parts, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in parts:
        place = place[part]
    place[last] = value
    return run


def test_the_plain_run_is_valid_and_taps_may_be_names() -> None:
    run = RunConfig.model_validate(RUN)
    assert run.teachers[0].taps["block"].module == "dynamics.blocks.0"  # type: ignore[union-attr]
    assert run.episodes.step == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("source.environment", {"id": "crafter", "episodes": 1}, "exactly one of paths and environment"),
        (
            "evaluate",
            {"worlds": {"context": 8}},
            r"evaluate\.worlds\.context: wanted fewer than the 8 frames of a clip",
        ),
        (
            "teachers.0",
            {**TEACHER, "signal": "rollout", "initial_frames": 9},
            r"teachers\.0\.initial_frames: wanted fewer than the 8 frames .*found 9",
        ),
        (
            "teachers.0.model",
            RUN["student"]["model"],
            r"teachers\.0\.model: wanted a teacher with weights, found sizes alone",
        ),
        ("source.noop", 4, r"noop: wanted an action below num_actions \(4\), found 4"),
        ("student.model", {"library": "world"}, "wanted a source or sizes, found neither"),
        ("student.init", {"kind": "layers", "num_layers": 1}, "a world model wants random, pretrained or checkpoint"),
        ("student.init", {"kind": "pretrained"}, "pretrained wants weights, found model.sizes without any"),
        (
            "phases.0.recipe.features",
            [{"student": "a", "teacher": ["blok"]}],
            "no teacher keeps a tap 'blok'.*are block",
        ),
        (
            "phases.0.recipe.features",
            [{"student": "a", "teacher": ["space"]}],
            "'space' of kind hidden; kept are block",
        ),
        ("phases.0.recipe.attention", [{"student": "a", "teacher": ["block"]}], "kept are space"),
        ("phases.0.recipe.learn_from", "rollouts", "rollouts are made by teachers of signal rollout"),
        (
            "phases.0.recipe",
            {"kind": "features", "alpha": 0.0, "learn_from": "rollouts"},
            "which alpha 0 does not read",
        ),
        ("phases.0.recipe", {"kind": "lm_logits"}, "does not learn from a source of kind episodes"),
        ("teachers.0.signal", "rollout", "every teacher has made rollouts of its own"),
        (
            "teachers.0",
            {**TEACHER, "signal": "rollout", "online": "local"},
            "rollouts are kept in a cache, found local",
        ),
    ],
)
def test_what_cannot_be_is_said(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(changed(key, value))
