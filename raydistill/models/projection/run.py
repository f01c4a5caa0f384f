"""The order of a projection: measure the teacher, choose bases and blocks, fill the student, compare, report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from raydistill.config.models import ProjectionInit
from raydistill.errors import ConfigError
from raydistill.models.projection.bases import Bases
from raydistill.models.projection.depth import choose_lists, list_of, rule_of
from raydistill.models.projection.maps import described
from raydistill.models.projection.match import Match
from raydistill.models.projection.measure import Calibration, Measured, kept_lengths, measure, removal_changes
from raydistill.models.projection.project import Filled, Projector
from raydistill.models.projection.reconstruct import Pair, Side, compare
from raydistill.models.projection.report import BlockReport, ProjectionReport, Share, TensorReport
from raydistill.models.projection.stream import Streamed
from raydistill.models.projection.structure import RESIDUAL, Structure


@dataclass(frozen=True, slots=True)
class Sides:
    """A teacher on disk and a student in memory."""

    source: str
    """The teacher's source, for messages."""
    teacher: Structure
    streamed: Streamed
    student: Structure
    network: nn.Module
    """The student, randomly initialised."""
    moved: Mapping[str, str] = field(default_factory=dict)
    """Paths of the student that stand elsewhere in the teacher, apart from blocks."""
    top_k: int = 0
    """Experts that a token of the teacher is routed to."""
    notes: tuple[str, ...] = ()
    """What else differs."""


def project(sides: Sides, init: ProjectionInit, calibration: Calibration | None) -> ProjectionReport:
    """Fill `sides.network` from the teacher. `ConfigError` says what does not go together; the student is then void."""
    measured = _measured(sides, init, calibration)
    bases, chosen, report = _filled(sides, init, measured, calibration)
    pairs = _pairs(sides, bases, chosen)
    if calibration is None or not pairs:
        return report
    with sides.streamed.ready() as network:
        teacher = Side(network, sides.teacher.block_outputs)
        errors, output = compare(teacher, Side(sides.network, sides.student.block_outputs), pairs, calibration)
    found = {pair.student: error for pair, error in zip(pairs, errors, strict=True)}
    blocks = tuple(b.model_copy(update={"error": found.get(f"{b.list}.{b.block}")}) for b in report.blocks)
    return report.model_copy(update={"blocks": blocks, "output_error": None if math.isnan(output) else output})


def account(sides: Sides, init: ProjectionInit) -> ProjectionReport:
    """What `project` would make, without weights: teacher and student are on the meta device, and `sides.streamed` has
    `ShapeTensors`. Which blocks and channels are chosen is not known, only how many. Errors as those of `project`."""
    measured = Measured(removal=dict.fromkeys(sides.teacher.block_modules, 0.0))
    _, _, report = _filled(sides, init, measured, None)
    return report.model_copy(update={"removal": {}})


def _filled(
    sides: Sides, init: ProjectionInit, measured: Measured, calibration: Calibration | None
) -> tuple[Bases, dict[str, tuple[int, ...]], ProjectionReport]:
    """The student filled: the maps, the teacher's blocks by list of the student, and the report."""
    chosen = choose_lists(init.depth, init.layers, sides.teacher, sides.student, sides.moved, measured.removal)
    match = Match(sides.teacher, sides.student, _moved(sides, chosen))
    _require_rule(sides, match)
    _require_patterns(sides.student, init)
    bases = Bases(sides.teacher, sides.student, sides.streamed.tensors, init, measured, match)
    if calibration is not None:
        measured.kept = _kept(sides, bases, calibration)
    projector = Projector(sides.teacher, sides.student, sides.streamed.tensors, bases, init, measured.kept)
    filled = projector.fill(sides.network)
    report = _report(sides, init, bases, chosen, measured, filled, 0 if calibration is None else init.calibration_rows)
    _require_coverage(report, init)
    return bases, chosen, report


def _measured(sides: Sides, init: ProjectionInit, calibration: Calibration | None) -> Measured:
    """What the choices need of the teacher; nothing where everything is copied."""
    if calibration is None:
        return Measured()
    theirs, ours = sides.teacher.sizes, sides.student.sizes
    narrower = Counter(theirs.values()) != Counter(ours.values())
    shallower = len(sides.teacher.block_modules) != len(sides.student.block_modules)
    rules = [rule_of(init.depth, init.layers, blocks)[0] for blocks in sides.student.lists]
    found = Measured()
    wants_covariance = init.basis == "pca" and theirs.get(RESIDUAL) != ours.get(RESIDUAL)
    with sides.streamed.ready() as network:
        if narrower:
            found = measure(network, sides.teacher, calibration, covariance=wants_covariance, top_k=sides.top_k)
        if "importance" in rules and shallower:
            found.removal = removal_changes(network, sides.teacher, calibration)
    return found


def _moved(sides: Sides, chosen: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The student's paths that stand elsewhere in the teacher, with its blocks."""
    stages = Match(sides.teacher, sides.student, sides.moved)
    blocks = {
        f"{name}.{i}": f"{stages.name(name)}.{block}" for name, kept in chosen.items() for i, block in enumerate(kept)
    }
    return {**sides.moved, **blocks}


def _kept(sides: Sides, bases: Bases, calibration: Calibration) -> dict[str, float]:
    """The share of the length of each norm's input that the student keeps."""
    maps = {}
    for name, norm in sides.student.norms.items():
        there = bases.teacher_name(name)
        moved = bases.maps.get(norm.space)
        if there in sides.teacher.norms and moved is not None and not moved.is_identity:
            maps[there] = moved
    if not maps:
        return {}
    with sides.streamed.ready() as network:
        return kept_lengths(network, sides.teacher, calibration, maps)


def _pairs(sides: Sides, bases: Bases, chosen: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Blocks of the student with the teacher's, where their streams can be compared."""
    theirs = {blocks.name: blocks for blocks in sides.teacher.lists}
    pairs = []
    for blocks in sides.student.lists:
        stream = bases.maps.get(blocks.space)
        if blocks.name not in chosen or stream is None:
            continue
        there = theirs[bases.match.name(f"{blocks.name}.0").rpartition(".")[0]]
        pairs += [
            Pair(there.modules[block], ours, stream)
            for ours, block in zip(blocks.modules, chosen[blocks.name], strict=True)
        ]
    return pairs


def _require_rule(sides: Sides, match: Match) -> None:
    if any(match.name(name) in sides.teacher.pieces for name in sides.student.pieces):
        return
    raise ConfigError(
        f"student.init: wanted a teacher and a student that share rules, found none that name tensors of both "
        f"{sides.source} ({sides.teacher.family}) and the student ({sides.student.family}). Choose two of one kind."
    )


def _require_patterns(student: Structure, init: ProjectionInit) -> None:
    """`ConfigError` for a pattern of the user that nothing of the student matches."""
    tensors = sorted({piece.stored for piece in student.pieces.values()})
    for key, what, patterns, names in (
        ("rename", "tensors", init.rename, tensors),
        ("layers", "lists of blocks", init.layers, [list_of(blocks) for blocks in student.lists]),
        ("heads", "attention modules", init.heads, [attention.module for attention in student.attentions.values()]),
    ):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ConfigError(
                    f"student.init.{key}: wanted a regular expression over whole names of the student's {what}, found "
                    f"{pattern}, which matches none of {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
                )


def _require_coverage(report: ProjectionReport, init: ProjectionInit) -> None:
    if report.coverage >= init.min_coverage:
        return
    random = sorted((t for t in report.tensors if t.origin == "random"), key=lambda t: -t.parameters)
    names = ", ".join(f"{t.name} ({t.parameters:,})" for t in random[:4])
    raise ConfigError(
        f"student.init.min_coverage: wanted at least {init.min_coverage:.0%} of the student's parameters from "
        f"{report.teacher}, found {report.coverage:.1%}; {len(random)} tensors have no counterpart there: {names}"
        f"{', …' if len(random) > 4 else ''}. Name theirs with student.init.rename, choose another student, or lower "
        "min_coverage."
    )


def _report(
    sides: Sides,
    init: ProjectionInit,
    bases: Bases,
    chosen: Mapping[str, tuple[int, ...]],
    measured: Measured,
    filled: Filled,
    rows: int,
) -> ProjectionReport:
    unique: list[TensorReport] = []
    seen: set[int] = set()
    for name, tensor in sides.network.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied weights count once
            continue
        seen.add(id(tensor))
        unique.append(
            TensorReport(
                name=name,
                parameters=tensor.numel(),
                origin=filled.origin(name),
                teacher=tuple(sorted(filled.sources.get(name, ()))),
            )
        )
    missing = sum(filled.random_numbers.values()) + sum(t.parameters for t in unique if t.name not in filled.origins)
    total = sum(t.parameters for t in unique)
    return ProjectionReport(
        teacher=sides.source,
        family=sides.teacher.family,
        basis=init.basis,
        depth=init.depth,
        calibration_rows=rows,
        exact=_share(unique, "exact"),
        projected=_share(unique, "projected"),
        random=_share(unique, "random"),
        coverage=1 - missing / max(total, 1),
        spaces=_spaces(bases),
        removal=measured.removal,
        blocks=tuple(
            BlockReport(list=blocks.modules[0].rpartition(".")[0], block=i, teacher=block, error=None)
            for blocks in sides.student.lists
            for i, block in enumerate(chosen.get(blocks.name, ()))
        ),
        output_error=None,
        left_out=_left_out(sides, bases, chosen, filled),
        notes=sides.notes,
        tensors=tuple(unique),
    )


def _share(tensors: Sequence[TensorReport], origin: str) -> Share:
    numbers = [t.parameters for t in tensors if t.origin == origin]
    return Share(tensors=len(numbers), parameters=sum(numbers))


def _spaces(bases: Bases) -> dict[str, str]:
    """What became of each space; blocks that do the same share a line."""
    found: dict[str, str] = {}
    for space in bases.student.sizes:
        moved = bases.maps.get(space)
        name = ".".join("*" if part.isdigit() else part for part in space.split("."))
        found.setdefault(name, str(described(moved)) if moved is not None else "not in the teacher, random")
    return found


def _left_out(sides: Sides, bases: Bases, chosen: Mapping[str, tuple[int, ...]], filled: Filled) -> dict[str, int]:
    """Sizes of the teacher's tensors of which nothing is in the student; blocks that were left out in one."""
    used = {name for sources in filled.sources.values() for name in sources}
    kept = {
        f"{bases.match.name(f'{name}.0').rpartition('.')[0]}.{block}" for name, some in chosen.items() for block in some
    }
    dropped = {
        f"{blocks.name}.{i}." for blocks in sides.teacher.lists for i in range(len(blocks.modules))
        if f"{blocks.name}.{i}" not in kept
    }  # fmt: skip
    left: dict[str, int] = {}
    for piece in sides.teacher.pieces.values():
        if piece.stored not in used:
            name = "blocks" if piece.name.startswith(tuple(dropped)) else piece.stored
            left[name] = left.get(name, 0) + piece.size
    for name in sides.teacher.unmatched:
        left[name] = math.prod(sides.streamed.tensors.shapes[name])
    return left
