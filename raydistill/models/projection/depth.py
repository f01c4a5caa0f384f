"""Which of a teacher's blocks a shallower student keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from raydistill.errors import ConfigError
from raydistill.models.layers import spread

Depth = str | tuple[int, ...]


def choose_blocks(
    rule: Depth,
    teacher: int,
    student: int,
    *,
    removal: Sequence[float] | None = None,
    where: str = "student.init.depth",
) -> tuple[int, ...]:
    """The teacher's block for each of the student's, rising.

    `removal` is how far the teacher's output goes when each block alone is left out; the rule `importance` keeps the
    blocks of the largest change, of equal ones the first. `ConfigError` for a deeper student or a list that does not
    fit.
    """
    if student > teacher:
        raise ConfigError(
            f"{where}: wanted a student of at most {teacher} blocks, as many as the teacher has, found {student}. A "
            "projection only makes smaller; lower the number of blocks in student.model.overrides."
        )
    if not isinstance(rule, str):
        if len(rule) != student or max(rule, default=0) >= teacher:
            raise ConfigError(
                f"{where}: wanted {student} blocks (as many as the student has) of the teacher's 0 to {teacher - 1}, "
                f"found {list(rule)}."
            )
        return tuple(rule)
    if student == teacher:
        return tuple(range(teacher))
    match rule:
        case "uniform":
            return spread(teacher, student)
        case "first":
            return tuple(range(student))
        case "last":
            return tuple(range(teacher - student, teacher))
        case "importance":
            assert removal is not None, "the rule importance is measured before blocks are chosen"
            order = sorted(range(teacher), key=lambda block: (-removal[block], block))
            return tuple(sorted(order[:student]))
        case other:
            raise AssertionError(f"unknown rule {other}")


def list_rule(rule: Depth, layers: Mapping[str, tuple[int, ...]], name: str) -> tuple[Depth, str]:
    """The rule for the list of blocks `name`, and the key of the configuration that it comes from."""
    for pattern, blocks in layers.items():
        if re.fullmatch(pattern, name):
            return blocks, f"student.init.layers.{pattern}"
    return rule, "student.init.depth"
