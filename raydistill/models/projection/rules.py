"""Rules that cut the tensors of a network into pieces, by regular expressions over their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raydistill.models.projection.structure import Piece


@dataclass(frozen=True, slots=True)
class Rule:
    """What the tensors are whose module's name matches."""

    match: str
    """Regular expression over the whole name of the module; groups fill `{0}`, `{1}` … of the other texts."""
    name: str
    """Canonical name; of a fused tensor those of its parts, separated by ` + `."""
    spaces: str
    """Spaces of the weight's axes, of a fused tensor's first axis ` + ` between its parts; a space that starts with a
    dot is that of the block. A bias has the first axis alone."""
    norm: str | None = None
    """The gain it reads through."""
    gain: bool = False
    """Whether it is the gain (and bias) of a norm."""
    table: bool = False
    """Whether it is looked up."""


def cut(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], part_sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, Piece], list[str]]:
    """The pieces of tensors by canonical name, and the tensors that no rule knows.

    A fused tensor is cut evenly, or, where `part_sizes` (by canonical name) knows its parts, into those.
    """
    pieces: dict[str, Piece] = {}
    unmatched = []
    compiled = [(re.compile(rule.match), rule) for rule in rules]
    for stored, shape in shapes.items():
        module, _, kind = stored.rpartition(".")
        if kind not in ("weight", "bias"):
            module, kind = stored, "weight"
        for pattern, rule in compiled:
            found = pattern.fullmatch(module)
            if found is not None:
                pieces.update({p.name: p for p in _pieces(rule, found.groups(), stored, kind, shape, part_sizes or {})})
                break
        else:
            unmatched.append(stored)
    return pieces, unmatched


def _pieces(
    rule: Rule, groups: tuple[str, ...], stored: str, kind: str, shape: tuple[int, ...], part_sizes: Mapping[str, int]
) -> list[Piece]:
    names = [name.format(*groups) for name in rule.name.split(" + ")]
    axes = [[space.format(*groups) for space in axis.split("+")] for axis in rule.spaces.split()]
    norm = rule.norm.format(*groups) if rule.norm is not None else None
    if kind == "bias":
        axes = axes[:1]
    axes += [["kernel"]] * (len(shape) - len(axes))
    if len(names) == 1:
        spaces = tuple(axis[0] for axis in axes)
        name = f"{names[0]}.{kind}"
        return [Piece(name, stored, (), shape, spaces, norm, rule.gain, rule.table)]
    sizes = [part_sizes.get(name, shape[0] // len(names)) for name in names]
    assert sum(sizes) == shape[0], f"{stored}: parts of {sizes} do not make {shape[0]}"
    pieces, start = [], 0
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        spaces = tuple(axis[number] if len(axis) > 1 else axis[0] for axis in axes)
        index = (slice(start, start + size),)
        pieces.append(Piece(f"{name}.{kind}", stored, index, (size, *shape[1:]), spaces, norm, rule.gain, rule.table))
        start += size
    return pieces
