"""Which of a teacher's blocks a shallower student keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from raydistill.errors import ConfigError
from raydistill.models.layers import spread
from raydistill.models.projection.match import Match
from raydistill.models.projection.structure import BlockList, Structure

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


def choose_lists(
    rule: Depth,
    layers: Mapping[str, tuple[int, ...]],
    teacher: Structure,
    student: Structure,
    moved: Mapping[str, str],
    removal: Mapping[str, float],
) -> dict[str, tuple[int, ...]]:
    """The teacher's blocks for each of the student's lists, by the list's canonical name.

    `removal` is by the name of the teacher's module. `layers` are rules of the user for lists, by their names in the
    student.
    """
    match = Match(teacher, student, moved)
    theirs = {blocks.name: blocks for blocks in teacher.lists}
    chosen = {}
    for blocks in student.lists:
        there = theirs.get(match.name(blocks.name))
        if there is None:
            continue
        own, where = rule_of(rule, layers, blocks)
        known = [removal[module] for module in there.modules] if removal else None
        chosen[blocks.name] = choose_blocks(
            own, len(there.modules), len(blocks.modules), removal=known, where=f"{where} ({list_of(blocks)})"
        )
    return chosen


def rule_of(rule: Depth, layers: Mapping[str, tuple[int, ...]], blocks: BlockList) -> tuple[Depth, str]:
    """The rule for a list of blocks, and the key of the configuration that it comes from."""
    for pattern, kept in layers.items():
        if re.fullmatch(pattern, list_of(blocks)):
            return kept, f"student.init.layers.{pattern}"
    return rule, "student.init.depth"


def list_of(blocks: BlockList) -> str:
    """The name of a list in its network, e.g. `model.layers`."""
    return blocks.modules[0].rpartition(".")[0] if blocks.modules else blocks.name
