"""Which of a teacher's attention heads a student keeps, and which numbers inside a head.

Query heads go with the key and value head they share. A student with fewer key heads keeps the best groups; one whose
groups are larger than the teacher's averages the keys and values of several (Ainslie et al. 2023, arXiv 2305.13245,
Sec. 2.1); one with more key heads has copies of them. Rotary pairs stay together, at the teacher's nearest angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.models.projection.maps import Map, Mix, Select, best, blocks_of, identity
from raydistill.models.projection.structure import Attention, Pair


@dataclass(frozen=True, slots=True)
class HeadMaps:
    """Maps of the spaces of one attention."""

    query: Map
    key: Map
    value: Map
    mixed: Map
    one: Map
    """Of the numbers of one query or key, for norms that stand on single heads."""
    query_scale: float
    """Factor of the queries that makes query · key what it is in the teacher, as far as its numbers are kept."""

    def spaces(self, name: str) -> dict[str, Map]:
        """The maps by space of the student's attention `name`."""
        parts = {"query": self.query, "key": self.key, "value": self.value, "mixed": self.mixed}
        return {f"{name}.{part}": found for part, found in parts.items()} | {
            f"{name}.query.one": self.one,
            f"{name}.key.one": self.one,
        }


@dataclass(frozen=True, slots=True)
class _Group:
    """A key head of the student: the teacher's key heads that it is made of, and the query heads that read it."""

    keys: tuple[int, ...]
    queries: tuple[int, ...]


def map_heads(teacher: Attention, student: Attention, scores: Tensor, kept: Sequence[int] | None) -> HeadMaps:
    """The maps of one attention. `scores` [teacher heads · value_dim] are the importance of the mixed values.

    `kept` are the query heads that the user wants. `ConfigError` where the numbers of heads do not go together.
    """
    _require_smaller(teacher, student)
    by_head = scores.reshape(teacher.heads, teacher.value_dim)
    worth = by_head.sum(1)
    if kept is not None:
        _require_heads(kept, teacher, student)
        worth = torch.zeros(teacher.heads)
        worth[list(kept)] = 1.0
    groups = _groups(teacher, student, worth)
    if kept is not None and sorted(q for g in groups for q in g.queries) != list(kept):
        raise ConfigError(
            f"student.init.heads ({student.module}): wanted {student.heads} heads that make "
            f"{student.key_heads} groups of {student.heads // student.key_heads} that share keys, found {list(kept)}; "
            f"in the teacher each {teacher.heads // teacher.key_heads} neighbours share a key head."
        )
    inside = _positions(teacher, student, by_head)
    values = [_value_positions(teacher, student, by_head, group) for group in groups]
    each = zip(groups, values, strict=True)
    mixed = torch.cat([blocks_of([q * teacher.value_dim for q in group.queries], inner) for group, inner in each])
    query = blocks_of([q * teacher.head_dim for g in groups for q in g.queries], inside)
    return HeadMaps(
        query=Select(query, teacher.heads * teacher.head_dim),
        key=_shared(groups, [inside] * len(groups), teacher.head_dim, teacher.key_heads),
        value=_shared(groups, values, teacher.value_dim, teacher.key_heads),
        mixed=Select(mixed, teacher.heads * teacher.value_dim),
        one=Select(inside, teacher.head_dim),
        query_scale=teacher.scale / student.scale,
    )


def _require_smaller(teacher: Attention, student: Attention) -> None:
    for what, wanted, found in (
        ("query heads", teacher.heads, student.heads),
        ("numbers per query", teacher.head_dim, student.head_dim),
        ("numbers per value", teacher.value_dim, student.value_dim),
    ):
        if found > wanted:
            raise ConfigError(
                f"student.init ({student.module}): wanted at most {wanted} {what}, as many as the teacher has, found "
                f"{found}. A projection only makes smaller; lower it in student.model.overrides."
            )
    if student.heads % student.key_heads:
        raise ConfigError(
            f"student.init ({student.module}): wanted a number of query heads that the {student.key_heads} key heads "
            f"divide, found {student.heads}. Change student.model.overrides."
        )


def _require_heads(kept: Sequence[int], teacher: Attention, student: Attention) -> None:
    if len(kept) != student.heads or max(kept) >= teacher.heads:
        raise ConfigError(
            f"student.init.heads ({student.module}): wanted {student.heads} of the teacher's heads 0 to "
            f"{teacher.heads - 1}, found {list(kept)}."
        )


def _groups(teacher: Attention, student: Attention, worth: Tensor) -> list[_Group]:
    """The student's groups, in the teacher's order; the best by the worth [teacher heads] of their query heads."""
    size, wanted = teacher.heads // teacher.key_heads, student.heads // student.key_heads
    members = [list(range(k * size, (k + 1) * size)) for k in range(teacher.key_heads)]
    if wanted > size:
        return _merged(teacher, student, worth, members)
    chunks: list[tuple[int, float, _Group]] = []
    for key, heads in enumerate(members):
        order = best(worth[heads], size).index if size == wanted else torch.argsort(
            worth[heads], descending=True, stable=True
        )  # fmt: skip
        for rank in range(size // wanted):
            queries = sorted(heads[int(i)] for i in order[rank * wanted : (rank + 1) * wanted])
            chunks.append((rank, -float(worth[queries].sum()), _Group((key,), tuple(queries))))
    if len(chunks) < student.key_heads:
        raise ConfigError(
            f"student.init ({student.module}): wanted at most {len(chunks)} groups of {wanted} query heads that share "
            f"a key head, which is what {teacher.heads} heads with {teacher.key_heads} key heads hold, found "
            f"{student.key_heads}. Change the heads in student.model.overrides."
        )
    chosen = [group for _, _, group in sorted(chunks, key=lambda c: c[:2])[: student.key_heads]]
    return sorted(chosen, key=lambda g: (g.keys, g.queries))


def _merged(teacher: Attention, student: Attention, worth: Tensor, members: list[list[int]]) -> list[_Group]:
    """Groups larger than the teacher's: several of its groups, whose keys and values are averaged."""
    size, wanted = teacher.heads // teacher.key_heads, student.heads // student.key_heads
    if wanted % size:
        raise ConfigError(
            f"student.init ({student.module}): wanted a number of query heads per key head that {size} (the "
            f"teacher's) divides, found {wanted} ({student.heads} heads, {student.key_heads} key heads). Change the "
            "heads in student.model.overrides."
        )
    sums = torch.stack([worth[heads].sum() for heads in members])
    keys = best(sums, student.heads // size).index.tolist()
    each = wanted // size
    parts = [tuple(keys[i : i + each]) for i in range(0, len(keys), each)]
    return [_Group(part, tuple(head for key in part for head in members[key])) for part in parts]


def _shared(groups: Sequence[_Group], inside: Sequence[Tensor], width: int, key_heads: int) -> Map:
    """The map of keys or values: one head for each group, the mean of several where it has several."""
    if all(len(group.keys) == 1 for group in groups):
        index = torch.cat([g.keys[0] * width + positions for g, positions in zip(groups, inside, strict=True)])
        return Select(index, key_heads * width)
    matrix = torch.zeros(key_heads * width, sum(len(positions) for positions in inside))
    column = 0
    for group, positions in zip(groups, inside, strict=True):
        columns = torch.arange(column, column + len(positions))
        for key in group.keys:
            matrix[key * width + positions, columns] = 1 / len(group.keys)
        column += len(positions)
    return Mix(matrix)


def _value_positions(teacher: Attention, student: Attention, by_head: Tensor, group: _Group) -> Tensor:
    return best(by_head[list(group.queries)].sum(0), student.value_dim).index


def _positions(teacher: Attention, student: Attention, by_head: Tensor) -> Tensor:
    """Positions inside a query that are kept, in the student's order: its rotary pairs at the nearest angles."""
    if teacher.head_dim == student.head_dim:
        return identity(teacher.head_dim).index
    if bool(teacher.pairs) != bool(student.pairs) or (not teacher.pairs and not student.pairs):
        return _spread(teacher.head_dim, student.head_dim)
    positions = torch.full((student.head_dim,), -1)
    unused: list[Pair] = []
    for axis in sorted({pair[3] for pair in student.pairs}):
        ours, free = ([p for p in side.pairs if p[3] == axis] for side in (student, teacher))
        for left, (i, j, angle, _) in zip(range(len(ours), 0, -1), ours, strict=True):
            # Enough pairs must stay for the student's slower ones, which come later.
            if len(free) < left:
                break
            nearest = min(range(len(free) - left + 1), key=lambda k: (_apart(free[k][2], angle), k))
            positions[i], positions[j] = free[nearest][0], free[nearest][1]
            unused += free[:nearest]
            free = free[nearest + 1 :]
        unused += free
    turning = {p for pair in teacher.pairs for p in pair[:2]}
    still = [p for p in range(teacher.head_dim) if p not in turning] + [p for pair in unused for p in pair[:2]]
    open_ = (positions < 0).nonzero().flatten()
    if len(still) < len(open_):
        still = [p for p in range(teacher.head_dim) if p not in positions.tolist()]
    positions[open_] = torch.tensor(still[: len(open_)], dtype=positions.dtype)
    return positions


def _apart(one: float, other: float) -> float:
    return abs(math.log(max(one, 1e-30)) - math.log(max(other, 1e-30)))


def _spread(size: int, keep: int) -> Tensor:
    """Evenly spread positions with both ends, for heads without rotary pairs or with other ones."""
    return torch.tensor([round(i * (size - 1) / max(keep - 1, 1)) for i in range(keep)])
