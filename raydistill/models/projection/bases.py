"""Chooses the map of every space: the shared basis of the residual stream, MLP units, heads and experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.config.models import ProjectionInit
from raydistill.errors import ConfigError
from raydistill.models.projection.heads import map_heads
from raydistill.models.projection.kernels import repatched
from raydistill.models.projection.maps import (
    Map,
    Mix,
    Select,
    best,
    best_of_groups,
    first,
    frequencies,
    identity,
    leading,
)
from raydistill.models.projection.match import Match
from raydistill.models.projection.measure import Measured
from raydistill.models.projection.structure import RESIDUAL, Piece, Structure
from raydistill.models.projection.tensors import ShapeTensors, Tensors

PATCH_OUT = "patch_out"
"""Space of what a transformer says of a patch."""
OUTSIDE = ("text", "pooled", "latent", "latent_out", "condition", "one", PATCH_OUT, "positions", "resolution")
"""Spaces of what comes from and goes to the outside: of another size they have another meaning, so nothing is cut."""
FREQUENCIES = ("frequency",)
"""Spaces of sinusoids of the timestep: cosines of rising wave lengths, then sines."""
EXPERT = re.compile(r"(blocks\.\d+\.mlp\.experts)\.(\d+)\b")


@dataclass(frozen=True, slots=True)
class Experts:
    """What the experts of one of the student's layers are made of."""

    members: tuple[tuple[int, ...], ...]
    """For each expert of the student the teacher's experts that it is the mean of; the first is the one it keeps."""
    weights: tuple[tuple[float, ...], ...]
    """Their weights, 1 in sum."""

    def map(self, of: int) -> Map:
        """Of the rows of the router."""
        if all(len(members) == 1 for members in self.members):
            return Select(torch.tensor([members[0] for members in self.members]), of)
        matrix = torch.zeros(of, len(self.members))
        for column, (members, weights) in enumerate(zip(self.members, self.weights, strict=True)):
            matrix[list(members), column] = torch.tensor(weights)
        return Mix(matrix)


class Bases:
    """The maps of all of a student's spaces."""

    def __init__(
        self,
        teacher: Structure,
        student: Structure,
        tensors: Tensors,
        init: ProjectionInit,
        measured: Measured,
        match: Match,
    ):
        self.teacher, self.student, self._tensors = teacher, student, tensors
        self._init, self._measured, self.match = init, measured, match
        self._sizes = teacher.sizes
        self._used = {match.name(name) for name in student.pieces if not EXPERT.match(name)}
        self.experts: dict[str, Experts] = {}
        self.query_scale: dict[str, float] = {}
        """By canonical name of an attention of the student."""
        self.maps: dict[str, Map] = {}
        """By name of a space of the student; spaces that the teacher has not are not there."""
        self._require_rotation()
        self._choose()

    def teacher_name(self, name: str) -> str:
        """The teacher's canonical name for a canonical name of the student."""
        return self.match.name(self._of_expert(name))

    def teacher_space(self, space: str) -> str:
        """The teacher's space for a space of the student."""
        return self.match.space(self._of_expert(space))

    def _of_expert(self, name: str) -> str:
        found = EXPERT.match(name)
        if found is None or found[1] not in self.experts:
            return name
        return f"{found[1]}.{self.experts[found[1]].members[int(found[2])][0]}{name[found.end() :]}"

    def _require_rotation(self) -> None:
        """`ConfigError` where a rotation is asked for, is needed, and is not possible."""
        why = self.teacher.rotates or self.student.rotates
        streams = {RESIDUAL, *self.student.groups, *(blocks.space for blocks in self.student.lists)}
        sizes = self.student.sizes
        narrower = any(sizes[s] != self._sizes.get(self.match.space(s), sizes[s]) for s in streams if s in sizes)
        if self._init.basis != "importance" and why is not None and narrower:
            raise ConfigError(
                f"student.init.basis: {self._init.basis} rotates the residual stream, which these models do not allow: "
                f"{why}. Use basis: importance, which selects channels."
            )

    def _choose(self) -> None:
        sizes = self.student.sizes
        routers = [space for space in sizes if space.endswith(".mlp.expert")]
        for space in routers:
            if (there := self.teacher_space(space)) in self._sizes:
                self._choose_experts(space, there, sizes[space])
        for name, attention in self.student.attentions.items():
            there = self.teacher_name(name)
            if there in self.teacher.attentions:
                geometry = self.teacher.attentions[there]
                same = geometry.shape == attention.shape
                scores = torch.ones(self._sizes[f"{there}.mixed"]) if same else self.scores(f"{there}.mixed")
                heads = map_heads(geometry, attention, scores, self._heads_of(attention.module))
                self.maps |= {s: m for s, m in heads.spaces(name).items() if s in sizes}
                self.query_scale[name] = heads.query_scale
        for space, size in sizes.items():
            there = self.teacher_space(space)
            if space not in self.maps and there in self._sizes:
                found = self._map(space, there, size)
                if found is not None:
                    self.maps[space] = found

    def _map(self, space: str, there: str, size: int) -> Map | None:
        of = self._sizes[there]
        if space == PATCH_OUT and self.teacher.patch != self.student.patch:
            return self._patch()
        if size == of:
            return identity(of)
        if space == "vocab":
            return first(size, of)
        if space in OUTSIDE or (space in FREQUENCIES and size > of):
            return None
        if size > of:
            raise ConfigError(
                f"student.init: wanted a student no wider than the teacher, found {size} for {space}, where the "
                f"teacher has {of}. A projection only makes smaller; change student.model.overrides."
            )
        if space == RESIDUAL:
            return self._residual(size)
        if space in FREQUENCIES:
            return frequencies(size, of)
        groups = self.teacher.groups.get(there)
        if groups and groups == self.student.groups.get(space):
            return best_of_groups(self.scores(there), size, groups)
        return best(self.scores(there), size)

    def _patch(self) -> Map | None:
        """Of patches of another size or order."""
        assert self.teacher.patch is not None and self.student.patch is not None, "only transformers have the space"  # noqa: PT018
        matrix = repatched(self.teacher.patch, self.student.patch)
        return None if matrix is None else Mix(matrix)

    def _residual(self, size: int) -> Map:
        basis = self._init.basis
        if basis == "importance":
            return best(self.scores(RESIDUAL), size)
        if "head.weight" not in self.student.pieces:
            raise ConfigError(
                f"student.init.basis: {basis} folds the last norm into the output head, which is then no longer the "
                "embedding; set student.model.overrides.tie_word_embeddings: false, or use basis: importance."
            )
        if isinstance(self._tensors, ShapeTensors):
            return Mix(torch.eye(self._sizes[RESIDUAL], size))
        if basis == "pca":
            assert self._measured.covariance is not None, "the covariance is measured before bases are chosen"
            return leading(self._measured.covariance, size)
        return leading(self._written(), size)

    def _written(self) -> Tensor:
        """[n, n]: sum over what writes into the residual stream of W Wᵀ / |W|²."""
        total = torch.zeros(self._sizes[RESIDUAL], self._sizes[RESIDUAL])
        for piece in self.teacher.writers(RESIDUAL):
            weight = self._tensors.read(piece.stored, piece.index).float()
            weight = weight.T if piece.is_table else weight.flatten(1)
            total += weight @ weight.T / weight.pow(2).sum().clamp_min(1e-30)
        return total

    def scores(self, space: str) -> Tensor:
        """Importance of each channel of a teacher's space: what it adds to what reads it, in blocks that are kept.

        E[x²] |column|² of each reading matrix, as a share of that matrix' sum. Without calibration E[x²] is what is
        written into the channel, |row|² + bias² over the writing matrices, times the squared gain of the norm between.
        Source: Sun et al. 2023, arXiv 2306.11695, Eq. 1 (squared, summed over outputs).
        """
        if isinstance(self._tensors, ShapeTensors):
            return torch.zeros(self._sizes[space])
        written = None if self._measured.moments else self._written_into(space)
        total = torch.zeros(self._sizes[space])
        for piece in self._kept(self.teacher.readers(space)):
            columns = self._tensors.read(piece.stored, piece.index).float().pow(2)
            columns = columns.transpose(0, 1).flatten(1).sum(1)
            share = columns * (self._moments(piece) if written is None else written * self._gain(piece))
            total += share / share.sum().clamp_min(1e-30)
        return total

    def _written_into(self, space: str) -> Tensor:
        """|row|² + bias² of each channel over the matrices that write into a space, each as a share of its sum."""
        total = torch.zeros(self._sizes[space])
        for piece in self._kept(self.teacher.writers(space)):
            weight = self._tensors.read(piece.stored, piece.index).float()
            rows = (weight.T if piece.is_table else weight.flatten(1)).pow(2).sum(1)
            bias = self.teacher.pieces.get(f"{piece.name.removesuffix('.weight')}.bias")
            if bias is not None and not piece.is_table:
                rows = rows + self._tensors.read(bias.stored, bias.index).float().pow(2)
            total += rows / rows.sum().clamp_min(1e-30)
        return total if bool(total.any()) else torch.ones_like(total)

    def _kept(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        return (piece for piece in pieces if piece.name in self._used or EXPERT.match(piece.name))

    def _moments(self, piece: Piece) -> Tensor:
        found = self._measured.moments.get(piece.stored)
        if found is None:  # experts, whose tokens are not told apart
            return torch.ones(piece.shape[1])
        return found[piece.index[1]] if len(piece.index) > 1 else found

    def _gain(self, piece: Piece) -> Tensor:
        """The square of the gain of the norm that a matrix reads through."""
        gain = self.teacher.pieces.get(f"{piece.norm}.weight")
        if gain is None or piece.norm is None:
            return torch.ones(piece.shape[1])
        offset = self.teacher.norms[piece.norm].offset if piece.norm in self.teacher.norms else 0.0
        return (self._tensors.read(gain.stored, gain.index).float() + offset).pow(2)

    def _heads_of(self, module: str) -> tuple[int, ...] | None:
        return next((heads for p, heads in self._init.heads.items() if re.fullmatch(p, module)), None)

    def _choose_experts(self, space: str, there: str, size: int) -> None:
        of = self._sizes[there]
        prefix = f"{space.removesuffix('.expert')}.experts"
        router = self.teacher.pieces[f"{there.removesuffix('.expert')}.router.weight"]
        if size > of:
            raise ConfigError(
                f"student.init ({space}): wanted at most {of} experts, as many as the teacher has, found {size}. Lower "
                "them in student.model.overrides."
            )
        rows = self._tensors.read(router.stored, router.index).float()
        if rows.is_meta:
            rows = torch.ones(rows.shape)
        routed = self._measured.routed.get(router.name, rows.pow(2).sum(1) / rows.pow(2).sum())
        kept = best(routed, size).index.tolist()
        members = {expert: [expert] for expert in kept}
        if self._init.experts == "merge":
            alike = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows[kept], dim=1).T
            for expert in sorted(set(range(of)) - set(kept)):
                members[kept[int(alike[expert].argmax())]].append(expert)
        weights = {k: (routed[m] + 1e-12) / (routed[m] + 1e-12).sum() for k, m in members.items()}
        self.experts[prefix] = Experts(
            tuple(tuple(members[k]) for k in kept), tuple(tuple(weights[k].tolist()) for k in kept)
        )
        self.maps[space] = self.experts[prefix].map(of)
