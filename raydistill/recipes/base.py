"""What a recipe is: a batch of inputs and signals becomes a loss. Pure PyTorch: no ranks, files or optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from raydistill.config.base import Config
from raydistill.signals import Batch, Draws, JsonValue

C = TypeVar("C", bound=Config)


class OnlineTeacher(Protocol):
    """A teacher that is asked while a student trains."""

    def start(self, batch: Batch, fields: Sequence[str]) -> Callable[[], Batch]:
        """Ask about a micro-batch; the result waits for the named fields of the answer, which may lie on the CPU."""


@dataclass(frozen=True, slots=True)
class TeacherView:
    """What a recipe knows of a teacher: its name, its share of the loss and the facts of its cache's manifest."""

    name: str
    weight: float
    """Share of the loss; the weights of all teachers of a phase sum to 1."""
    facts: Mapping[str, JsonValue]
    online: OnlineTeacher | None = None
    """The teacher itself, where it is asked in every step instead of being read from a cache."""

    def field(self, batch: Batch, name: str) -> Tensor:
        """The tensor of this teacher's signal field in `batch`."""
        return batch[f"{self.name}/{name}"]


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a loss: `weight * sum / count`, where the count is taken over the whole optimizer step.

    `count` names an entry of `Recipe.counts`. A part with `count=None` is a statistic of its micro-batch (a router's
    balance, say): it is averaged over micro-batches, so it alone depends on the micro-batch split.
    A part of weight 0 is logged but not optimised.
    """

    sum: Tensor
    weight: float = 1.0
    count: str | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """The parts of a loss by name. The total is `Σ weight · sum / count`."""

    parts: Mapping[str, Part] = field(default_factory=dict)


class Recipe(ABC, Generic[C]):
    """How a student learns."""

    def __init__(self, config: C, student: nn.Module, teachers: Mapping[str, TeacherView]):
        self.config = config
        self.student = student
        self.teachers = teachers

    @property
    @abstractmethod
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Signal fields read, by teacher name; checked against the manifests before anything trains."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """The denominators that `batch` contributes, by name (for instance `tokens`); needs no model."""

    def players(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name."""
        return {"student": self.student}

    def turn(self, step: int) -> str:
        """The player that optimizer step `step` (from 0) updates."""
        return "student"

    @abstractmethod
    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        """The loss of `player` on one micro-batch."""
