"""Puts the pieces of a teacher, mapped into the student's spaces, into the student."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raydistill.config.models import ProjectionInit
from raydistill.errors import ConfigError, DataError
from raydistill.models.projection.bases import EXPERT, Bases
from raydistill.models.projection.kernels import fit_kernel
from raydistill.models.projection.maps import Map, Mix
from raydistill.models.projection.report import Origin
from raydistill.models.projection.structure import RESIDUAL, Piece, Structure
from raydistill.models.projection.tensors import Tensors


@dataclass(slots=True)
class Filled:
    """What became of each tensor of the student."""

    origins: dict[str, set[Origin]] = field(default_factory=dict)
    """Origins of its pieces, by its name."""
    sources: dict[str, set[str]] = field(default_factory=dict)
    """Tensors of the teacher that it is made from."""
    random_numbers: dict[str, int] = field(default_factory=dict)
    """Numbers in it that are not from the teacher."""

    def add(self, piece: Piece, origin: Origin, sources: set[str], missing: int = 0) -> None:
        """Note what became of a piece."""
        self.origins.setdefault(piece.stored, set()).add(origin)
        self.sources.setdefault(piece.stored, set()).update(sources)
        if missing:
            self.random_numbers[piece.stored] = self.random_numbers.get(piece.stored, 0) + missing

    def origin(self, stored: str) -> Origin:
        """The origin of a whole tensor."""
        found = self.origins.get(stored, {"random"})
        if found == {"random"}:
            return "random"
        return "exact" if found == {"exact"} else "projected"


class Projector:
    """Fills a student, whose parameters are random and on the CPU, from a teacher's tensors."""

    def __init__(
        self,
        teacher: Structure,
        student: Structure,
        tensors: Tensors,
        bases: Bases,
        init: ProjectionInit,
        kept_lengths: Mapping[str, float],
    ):
        self.teacher, self.student, self._tensors = teacher, student, tensors
        self._bases, self._init, self._kept = bases, init, kept_lengths

    def fill(self, network: nn.Module) -> Filled:
        """Write every piece that the teacher has into `network`; the others stay as they are."""
        state = network.state_dict()
        filled = Filled()
        for piece in self.student.pieces.values():
            target = state[piece.stored][piece.index]
            found = self._made(piece, target.shape)
            if found is None:
                self._require_not_renamed(piece)
                filled.add(piece, "random", set(), piece.size)
                continue
            value, exact, sources = found
            if not value.is_meta and not bool(value.isfinite().all()):
                raise DataError(
                    f"wanted finite numbers for the student's {piece.stored}, found some that are not, made from the "
                    f"teacher's {', '.join(sorted(sources))}. Its weights are damaged, or it overflowed on the "
                    "calibration rows: set student.init.teacher.dtype: float32, or copy it again."
                )
            target[tuple(slice(0, n) for n in value.shape)].copy_(value)
            missing = piece.size - value.numel()
            filled.add(piece, "exact" if exact and not missing else "projected", sources, missing)
        return filled

    def _require_not_renamed(self, piece: Piece) -> None:
        """`ConfigError` for a piece of the student that has nothing of the tensor which the user named for it."""
        for pattern in self._init.rename:
            if re.fullmatch(pattern, piece.stored):
                source = self.source_of(piece)
                assert source is not None, "a tensor of that name was found"
                raise ConfigError(
                    f"student.init.rename.{pattern}: wanted a tensor of the teacher whose axes mean what those of "
                    f"{piece.stored} do ({', '.join(piece.spaces)}), found {source.stored} ({', '.join(source.spaces)}"
                    f"; {list(source.shape)}). Name another one, or leave it out."
                )

    def source_of(self, piece: Piece) -> Piece | None:
        """The teacher's piece that a piece of the student is made from."""
        for pattern, replacement in self._init.rename.items():
            found = re.fullmatch(pattern, piece.stored)
            if found is not None:
                return self._by_stored(found.expand(replacement), piece)
        name = self._bases.teacher_name(piece.name)
        if name not in self.teacher.pieces and name == "head.weight":
            name = "embed.weight"  # a tied teacher's head is its embedding
        return self.teacher.pieces.get(name)

    def _by_stored(self, stored: str, piece: Piece) -> Piece | None:
        parts = [p for p in self.teacher.pieces.values() if p.stored == stored]
        if not parts:
            raise ConfigError(
                f"student.init.rename: wanted the teacher's tensor {stored} for {piece.stored}, found none of that "
                f"name. The teacher has {', '.join(sorted({p.stored for p in self.teacher.pieces.values()})[:4])}, …"
            )
        same = [
            p for p in parts if p.name.rpartition(".")[0].split(".")[-1] == piece.name.rpartition(".")[0].split(".")[-1]
        ]
        return (same or parts)[0]

    def _made(self, piece: Piece, shape: torch.Size) -> tuple[Tensor, bool, set[str]] | None:
        """The value of a piece, whether it is the teacher's bit for bit, and what it is made from; None: nothing."""
        source = self.source_of(piece)
        if source is None or piece.is_gain != source.is_gain:
            return None
        maps = self._maps(piece, source)
        if maps is None:
            return None
        value = self._read(piece, source)
        exact = len(self._members(piece)) == 1
        if piece.is_gain:
            value, same = self._gain(piece, source, value, maps[0])
            return value, same, {source.stored}
        residual = self._bases.maps.get(RESIDUAL)
        if residual is not None and residual.rotates and piece.norm is not None:
            value = value.float() * self._folded(self._bases.teacher_name(piece.norm))
            exact = False
        for axis, moved in enumerate(maps):
            if moved is not None and not moved.is_identity:
                value, exact = moved(value, axis), False
        fitted = fit_kernel(value, tuple(shape), num_mapped=len(maps), temporal=self._init.temporal)
        if fitted is None:
            return None
        if fitted is not value and fitted.shape != value.shape:
            exact = False
        if piece.scales is not None and (scale := self._scale(piece.scales)) != 1.0:
            fitted, exact = fitted.float() * scale + (scale - 1.0 if piece.adds_scale else 0.0), False
        factor = self._factor(piece)
        if factor != 1.0:
            fitted, exact = fitted.float() * factor, False
        return fitted, exact, {source.stored}

    def _maps(self, piece: Piece, source: Piece) -> list[Map | None] | None:
        """The map along each axis that lies in a space; None where a space of the student has no counterpart."""
        ours = [space for space in piece.spaces if space != "kernel"]
        theirs = [space for space in source.spaces if space != "kernel"]
        if len(ours) != len(theirs):
            return None
        found: list[Map | None] = []
        for mine, other, size in zip(ours, theirs, source.shape, strict=False):
            moved = self._bases.maps.get(mine)
            if moved is None or moved.of != size or not (self._bases.teacher_space(mine) == other or moved.is_identity):
                return None
            found.append(moved)
        return found

    def _members(self, piece: Piece) -> tuple[int, ...]:
        expert = EXPERT.match(piece.name)
        if expert is None or expert[1] not in self._bases.experts:
            return (0,)
        return self._bases.experts[expert[1]].members[int(expert[2])]

    def _read(self, piece: Piece, source: Piece) -> Tensor:
        """The teacher's piece; of a merged expert the weighted mean of its members'."""
        members = self._members(piece)
        if len(members) == 1:
            return self._tensors.read(source.stored, source.index)
        expert = EXPERT.match(piece.name)
        there = EXPERT.match(source.name)
        assert expert is not None and there is not None, "only pieces of experts have members"  # noqa: PT018
        weights = self._bases.experts[expert[1]].weights[int(expert[2])]
        total = torch.zeros(source.shape)
        for member, weight in zip(members, weights, strict=True):
            part = self.teacher.pieces[f"{there[1]}.{member}{source.name[there.end() :]}"]
            total += weight * self._tensors.read(part.stored, part.index).float()
        return total

    def _folded(self, norm: str) -> Tensor:
        gain = self.teacher.pieces[f"{norm}.weight"]
        return self._tensors.read(gain.stored, gain.index).float() + self.teacher.norms[norm].offset

    def _gain(self, piece: Piece, source: Piece, value: Tensor, moved: Map | None) -> tuple[Tensor, bool]:
        """The gain of a norm: the teacher's on the kept channels, times what keeps the length of its output.

        A norm divides by the root mean square over its channels. With n channels of the teacher, m of the student and
        the share c of the length that they keep, sqrt(n / m) c makes each channel what it was.
        """
        assert moved is not None, "gains have one axis, and it has a map"
        name = piece.name.rpartition(".")[0]
        there = source.name.rpartition(".")[0]
        if there not in self.teacher.norms or name not in self.student.norms:  # group norms
            return moved(value, 0), moved.is_identity
        offset, ours = self.teacher.norms[there].offset, self.student.norms[name].offset
        factor = 1.0 if moved.is_identity else math.sqrt(moved.of / moved.size) * self._length(there, moved)
        factor *= self._gain_factor(name)
        if piece.name.endswith(".bias"):
            own = self._gain_factor(name)
            return (value, True) if moved.is_identity and own == 1.0 else (moved(value, 0).float() * own, False)
        if moved.is_identity and factor == 1.0 and offset == ours:
            return value, True
        if isinstance(moved, Mix):
            return torch.full((moved.size,), factor) - ours, False
        return (moved(value, 0).float() + offset) * factor - ours, False

    def _length(self, norm: str, moved: Map) -> float:
        """The share of the length of a norm's input that is kept; unmeasured: all by a basis, its part by selecting."""
        unmeasured = 1.0 if isinstance(moved, Mix) else math.sqrt(moved.size / moved.of)
        return self._kept.get(norm, unmeasured)

    def _scale(self, norm: str) -> float:
        """The factor of a norm without gain; of one that stands for those of all blocks the mean over these."""
        pattern = re.escape(norm).replace(r"\*", r"\d+")
        found = []
        for name, one in self.student.norms.items():
            moved = self._bases.maps.get(one.space)
            if re.fullmatch(pattern, name) and moved is not None:
                length = self._length(self._bases.teacher_name(name), moved)
                found.append(1.0 if moved.is_identity else math.sqrt(moved.of / moved.size) * length)
        return sum(found) / len(found) if found else 1.0

    def _gain_factor(self, name: str) -> float:
        """What else a gain carries: the scale of queries, and of tied embeddings that are looked up scaled."""
        factor = 1.0
        if name.endswith(".q_norm"):
            factor *= self._bases.query_scale.get(name.removesuffix(".q_norm"), 1.0)
        if name == "norm" and "head.weight" not in self.student.pieces:
            factor *= self.student.embed_scale / self.teacher.embed_scale
        return factor

    def _factor(self, piece: Piece) -> float:
        """What else a matrix or bias carries."""
        name, _, _ = piece.name.rpartition(".")
        attention, _, part = name.rpartition(".")
        if part == "q" and f"{attention}.q_norm.weight" not in self.student.pieces:
            return self._bases.query_scale.get(attention, 1.0)
        if name == "embed":
            return self.teacher.embed_scale / self.student.embed_scale
        return 1.0
