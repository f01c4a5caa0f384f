"""What a projected student has from its teacher: init/projection.json, and the table that is printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from raydistill.config.base import Config

Origin = Literal["exact", "projected", "random"]
REPORT = "projection.json"
SHOWN = 6
"""Names that the table lists before it only counts."""


class TensorReport(Config):
    """One tensor of the student."""

    name: str
    """Its name."""
    parameters: int
    """Numbers in it."""
    origin: Origin
    """`exact`: the teacher's, bit for bit; `projected`: made from the teacher's; `random`: not from the teacher."""
    teacher: tuple[str, ...]
    """Tensors of the teacher that it is made from."""


class BlockReport(Config):
    """One block of the student."""

    list: str
    """The list that it stands in, as the student names it."""
    block: int
    """Its number there."""
    teacher: int
    """The number of the teacher's block that it is made from."""
    error: float | None
    """Relative error of what the block adds to the residual stream, when it is given the projected input of the
    teacher's block: |student - projected teacher| / |projected teacher|; None where nothing was measured."""


class Share(Config):
    """Tensors and numbers of one origin."""

    tensors: int
    """Tensors."""
    parameters: int
    """Numbers in them."""


class ProjectionReport(Config):
    """What a projected student has from its teacher."""

    teacher: str
    """The teacher's source."""
    family: str
    """Rules that were used."""
    basis: str
    """Basis of the residual stream."""
    depth: str | tuple[int, ...]
    """Rule of the blocks."""
    calibration_rows: int
    """Rows that the teacher was measured on."""
    exact: Share
    """What is the teacher's, bit for bit."""
    projected: Share
    """What is made from the teacher's weights."""
    random: Share
    """What is not from the teacher."""
    coverage: float
    """Share of the student's parameters that are exact or projected."""
    spaces: dict[str, str]
    """What became of each vector space (of one block, where all blocks are alike)."""
    removal: dict[str, float]
    """How far the teacher's output goes when each of its blocks is left out, where that was measured."""
    blocks: tuple[BlockReport, ...]
    """Blocks of the student."""
    output_error: float | None
    """How far the whole student's output is from the teacher's on the calibration rows: mean KL divergence in nats per
    token of language models, mean square difference over mean square of denoisers; None where nothing was measured."""
    left_out: dict[str, int]
    """Teacher's tensors of which nothing is in the student, and their sizes. Blocks that were left out count as
    `blocks`."""
    notes: tuple[str, ...]
    """What else differs between teacher and student."""
    tensors: tuple[TensorReport, ...]
    """The student's tensors."""


def table(report: ProjectionReport) -> str:
    """The report for a terminal."""
    total = sum(share.parameters for share in (report.exact, report.projected, report.random))
    lines = [f"student: projected from {report.teacher.partition('#')[0]} ({report.family}, basis {report.basis})"]
    for name in ("exact", "projected", "random"):
        share: Share = getattr(report, name)
        lines.append(
            f"  {name:10}{share.tensors:>7,} tensors {share.parameters:>16,} parameters "
            f"{share.parameters / max(total, 1):>7.1%}"
        )
    lines += _spaces(report.spaces)
    random = [tensor.name for tensor in report.tensors if tensor.origin == "random"]
    if random:
        lines.append(f"  at random: {_some(random)}")
    if report.left_out:
        sizes = sorted(report.left_out.items(), key=lambda entry: -entry[1])
        lines.append(f"  left out of the teacher: {_some([f'{name} ({size:,})' for name, size in sizes])}")
    lines += _blocks(report)
    if report.output_error is not None:
        lines.append(f"  output: {report.output_error:.4g} from the teacher's, before training")
    lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _spaces(spaces: Mapping[str, str]) -> Iterator[str]:
    """The spaces that change, those that do the same on one line."""
    changed: dict[str, list[str]] = {}
    for space, what in spaces.items():
        if not what.endswith(", all"):
            changed.setdefault(what, []).append(space)
    for what, names in changed.items():
        yield f"  {what}: {_some(names)}"


def _blocks(report: ProjectionReport) -> Iterator[str]:
    lists: dict[str, list[BlockReport]] = {}
    for block in report.blocks:
        lists.setdefault(block.list, []).append(block)
    for name, blocks in list(lists.items())[:SHOWN]:
        errors = " (relative error of what each adds)" if blocks[0].error is not None else ""
        kept = ", ".join(f"{b.teacher}" + ("" if b.error is None else f" ({b.error:.2f})") for b in blocks)
        yield f"  {name}{errors}: {kept}"
    if len(lists) > SHOWN:
        yield f"  and {len(lists) - SHOWN} more lists of blocks"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
