"""The order of a projection: measure the teacher, choose bases and blocks, fill the student, compare, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from raydistill.config.models import ProjectionInit
from raydistill.errors import ConfigError
from raydistill.models.projection.bases import Bases
from raydistill.models.projection.depth import choose_blocks, list_rule
from raydistill.models.projection.maps import described
from raydistill.models.projection.measure import Calibration, Measured, kept_lengths, measure, removal_changes
from raydistill.models.projection.project import Filled, Projector
from raydistill.models.projection.reconstruct import compare
from raydistill.models.projection.report import BlockReport, ProjectionReport, Share, TensorReport
from raydistill.models.projection.stream import Streamed
from raydistill.models.projection.structure import BLOCK, RESIDUAL, Structure, block_of


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
    top_k: int = 0
    """Experts that a token of the teacher is routed to."""
    notes: tuple[str, ...] = ()
    """What else differs."""


def project(sides: Sides, init: ProjectionInit, calibration: Calibration | None) -> ProjectionReport:
    """Fill `sides.network` from the teacher. `ConfigError` says what does not go together; the student is then void."""
    _require_rule(sides)
    rule, where = list_rule(init.depth, init.layers, _list_name(sides.student))
    measured = _measured(sides, init, calibration, rule)
    blocks = choose_blocks(
        rule, sides.teacher.num_blocks, sides.student.num_blocks, removal=measured.removal, where=where
    )
    bases = Bases(sides.teacher, sides.student, sides.streamed.tensors, init, measured, blocks)
    if calibration is not None:
        measured.kept = _kept(sides, bases, calibration)
    projector = Projector(sides.teacher, sides.student, sides.streamed.tensors, bases, init, measured.kept)
    filled = projector.fill(sides.network)
    report = _report(sides, init, bases, measured, filled, 0 if calibration is None else init.calibration_rows)
    _require_coverage(report, init)
    if calibration is None or not blocks or RESIDUAL not in bases.maps:
        return report
    with sides.streamed.ready() as network:
        errors, output = compare(network, sides.network, sides.teacher, sides.student, blocks, bases.maps, calibration)
    rows = tuple(b.model_copy(update={"error": e}) for b, e in zip(report.blocks, errors, strict=True))
    return report.model_copy(update={"blocks": rows, "output_error": output})


def _measured(sides: Sides, init: ProjectionInit, calibration: Calibration | None, rule: object) -> Measured:
    """What the choices need of the teacher; nothing where everything is copied."""
    if calibration is None:
        return Measured()
    theirs, ours = sides.teacher.sizes, sides.student.sizes
    narrower = Counter(theirs.values()) != Counter(ours.values())
    shallower = sides.teacher.num_blocks != sides.student.num_blocks
    found = Measured()
    wants_covariance = init.basis == "pca" and theirs.get(RESIDUAL) != ours.get(RESIDUAL)
    with sides.streamed.ready() as network:
        if narrower:
            found = measure(network, sides.teacher, calibration, covariance=wants_covariance, top_k=sides.top_k)
        if rule == "importance" and shallower:
            found.removal = removal_changes(network, sides.teacher, calibration)
    return found


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


def _require_rule(sides: Sides) -> None:
    shared = [n for n, piece in sides.student.pieces.items() if n in sides.teacher.pieces]
    if not shared and sides.student.num_blocks == 0:
        raise ConfigError(
            f"student.init: wanted a teacher and a student that share rules, found none that name tensors of both "
            f"{sides.source} ({sides.teacher.family}) and the student ({sides.student.family}). Give "
            f"student.init.rename."
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


def _list_name(structure: Structure) -> str:
    return structure.block_modules[0].rpartition(".")[0] if structure.block_modules else ""


def _report(
    sides: Sides, init: ProjectionInit, bases: Bases, measured: Measured, filled: Filled, rows: int
) -> ProjectionReport:
    tensors = []
    for name, tensor in sides.network.state_dict().items():
        if name in sides.streamed.tied and name not in filled.origins:
            continue
        tensors.append(
            TensorReport(
                name=name,
                parameters=tensor.numel(),
                origin=filled.origin(name),
                teacher=tuple(sorted(filled.sources.get(name, ()))),
            )
        )
    seen: set[int] = set()
    unique = []
    state = sides.network.state_dict()
    for report in tensors:  # tied weights have one memory and count once
        if state[report.name].data_ptr() not in seen:
            seen.add(state[report.name].data_ptr())
            unique.append(report)
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
        blocks=tuple(BlockReport(block=i, teacher=b, error=None) for i, b in enumerate(bases.blocks)),
        output_error=None,
        left_out=_left_out(sides, bases, filled),
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
        name = BLOCK.sub("blocks.*", space, count=1)
        name = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found.setdefault(name, str(described(moved)) if moved is not None else "not in the teacher, random")
    return found


def _left_out(sides: Sides, bases: Bases, filled: Filled) -> dict[str, int]:
    used = {name for sources in filled.sources.values() for name in sources}
    kept = set(bases.blocks)
    left: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for piece in sides.teacher.pieces.values():
        sizes[piece.stored] = sizes.get(piece.stored, 0) + piece.size
        block = block_of(piece.name)
        if block is not None and block not in kept:
            left["blocks"] = left.get("blocks", 0) + piece.size
            used.add(piece.stored)
    known = dict(sizes)
    for name, shape in sides.streamed.tensors.shapes.items():
        size = 1
        for length in shape:
            size *= length
        known.setdefault(name, size)
    return left | {name: size for name, size in known.items() if name not in used}
