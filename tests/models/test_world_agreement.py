"""Source, teachers and student of a world model are compared before a teacher is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from world_toys import PHASE, SIZES, run_config, teacher_folder

from raydistill.errors import ConfigError
from raydistill.models.world.agreement import check_worlds

STUDENT = SIZES.model_dump(mode="json")


def student(**changes: Any) -> dict[str, Any]:
    return {"model": {"library": "world", "sizes": {**STUDENT, **changes}}, "init": {"kind": "random"}}


def phases(**recipe: Any) -> list[dict[str, Any]]:
    return [PHASE, {**PHASE, "name": "late", "recipe": {"kind": "features", **recipe}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": student(frame_size=[8, 8])}, r"student\.model: wanted frames of source\.frame_size \[12, 12\]"),
        ({"student": student(num_actions=4)}, r"student\.model: wanted a model that knows the 5 actions .* found 4"),
        (
            {"phases": phases(features=[{"student": "dynamics.blok.0", "teacher": ["block"]}])},
            r"phases\.1\.recipe\.features.*'dynamics\.blok\.0'.*dynamics\.blocks",
        ),
        (
            {"phases": phases(attention=[{"student": "dynamics.blocks.9.temporal.map", "teacher": ["time"]}])},
            r"phases\.1\.recipe\.attention.*dynamics\.blocks\.9",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_a_teacher_is_asked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    teacher_folder(tmp_path / "teacher")
    check_worlds(run_config(tmp_path))
    with pytest.raises(ConfigError) as refused:
        check_worlds(run_config(tmp_path, **changes))
    assert re.search(message, " ".join(str(refused.value).split())), refused.value
