"""Maps from a teacher's space into a student's, and how they act on the axes of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.signals import JsonValue


@dataclass(frozen=True, slots=True)
class Select:
    """The student's coordinates are some of the teacher's."""

    index: Tensor
    """[student] int64: the teacher's coordinate at each of the student's."""
    of: int
    """Size of the teacher's space."""

    @property
    def size(self) -> int:
        """Size of the student's space."""
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.size == self.of and bool((self.index == torch.arange(self.of)).all())

    @property
    def rotates(self) -> bool:
        """Whether coordinates are mixed."""
        return False

    def __call__(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor if self.is_identity else tensor.index_select(axis, self.index.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Mix:
    """The student's coordinates are weighted sums of the teacher's."""

    matrix: Tensor
    """[teacher, student] fp32. Of a basis the columns are orthonormal, so that writing into the student's space and
    reading from it are one and the same contraction."""

    @property
    def of(self) -> int:
        """Size of the teacher's space."""
        return self.matrix.shape[0]

    @property
    def size(self) -> int:
        """Size of the student's space."""
        return self.matrix.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return False

    @property
    def rotates(self) -> bool:
        """Whether coordinates are mixed."""
        return True

    def __call__(self, tensor: Tensor, axis: int) -> Tensor:
        moved = torch.tensordot(tensor.float(), self.matrix.to(tensor.device), dims=([axis], [0]))
        return moved.movedim(-1, axis)


Map = Select | Mix


def identity(size: int) -> Select:
    """Everything as it is."""
    return Select(torch.arange(size), size)


def first(size: int, of: int) -> Select:
    """The first coordinates; all of them where the student has more."""
    return Select(torch.arange(min(size, of)), of)


def best(scores: Tensor, size: int) -> Select:
    """The `size` coordinates of the highest scores, in their old order; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:size]
    return Select(order.sort().values, len(scores))


def best_of_groups(scores: Tensor, size: int, groups: int) -> Select:
    """As `best`, but as many of each of the `groups` neighbours, so that a channel stays in the group of its norm."""
    if len(scores) % groups or size % groups:
        return best(scores, size)
    parts = scores.reshape(groups, -1)
    kept = [best(part, size // groups).index + i * parts.shape[1] for i, part in enumerate(parts)]
    return Select(torch.cat(kept), len(scores))


def frequencies(size: int, of: int) -> Mix:
    """Fewer sinusoids of a timestep: each of the teacher's goes to the student's of the nearest wave length.

    Both are [cosines, sines], of frequencies that fall evenly on a logarithmic scale from 1 to 1/10,000. The matrix
    adds up the weights of those that come together.
    """
    half, new = of // 2, size // 2
    matrix = torch.zeros(of, size)
    for i in range(half):
        nearest = min(round(i * new / half), new - 1)
        matrix[i, nearest] = 1.0
        matrix[half + i, new + nearest] = 1.0
    return Mix(matrix)


def leading(covariance: Tensor, size: int) -> Mix:
    """The `size` leading eigenvectors of a covariance [n, n]; the sign of each makes its largest entry positive."""
    vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)[:, :size]
    largest = vectors.abs().argmax(0, keepdim=True)
    return Mix((vectors * vectors.gather(0, largest).sign()).float())


def described(found: Map) -> JsonValue:
    """As it stands in a report."""
    if isinstance(found, Mix):
        return f"{found.of} → {found.size}, mixed"
    return f"{found.of}, all" if found.is_identity else f"{found.of} → {found.size}, selected"


def blocks_of(starts: Sequence[int], inside: Tensor) -> Tensor:
    """Indices of `inside` in each of several blocks that begin at `starts`, one block after another."""
    return (torch.tensor(starts)[:, None] + inside[None]).reshape(-1)
