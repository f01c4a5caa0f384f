"""What projection must know of a network: its tensors cut into pieces, and the vector space along each of their axes.

A *piece* is a tensor, or the part of a fused one that belongs to one matrix (q, k and v of a fused qkv, the gate of a
`gate_up_proj`, one of six modulations). Pieces have canonical names that families share (`blocks.3.attn.q.weight`), and
teacher and student are matched by them. Axes that lie in one *space* (`residual`, `blocks.3.mlp.inner`) are cut alike
everywhere: that is what lets projections compose through the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raydistill.models.projection.kernels import Patch
from raydistill.models.projection.tensors import Index

RESIDUAL = "residual"
"""The space of the residual stream."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix, bias or gain."""

    name: str
    """Canonical name."""
    stored: str
    """Name of the tensor that holds it, in memory."""
    index: Index
    """Where in that tensor."""
    shape: tuple[int, ...]
    """Its shape."""
    spaces: tuple[str, ...]
    """Space along each axis; those of kernels are `kernel`."""
    norm: str | None = None
    """Canonical name of the gain of the norm whose output it reads."""
    is_gain: bool = False
    """Whether it is the gain of a norm."""
    is_table: bool = False
    """Whether its rows are looked up, as those of an embedding are."""
    scales: str | None = None
    """Canonical name of the norm without gain whose output is multiplied by 1 + this; with `*` for the block, when it
    is shared by all."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def adds_scale(self) -> bool:
        """Whether it is the constant part of a norm's scale, 1 + this: a table or a bias that no block has besides."""
        is_vector = len([space for space in self.spaces if space != "kernel"]) < 2
        return is_vector and self.scales is not None and "*" not in self.scales


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: what it does before its gain."""

    module: str
    """Name of the module."""
    space: str
    """The space of its input."""
    kind: Literal["rms", "layer"]
    offset: float = 0.0
    """The gain is this plus its tensor: 1 in Gemma, whose tensors are around 0."""


Pair = tuple[int, int, float, int]
"""Two numbers of a query or key that turn together, their angle per position, and the axis of the position (0 of text;
0, 1 and 2 for time, height and width)."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The geometry of an attention module. Its spaces are `<name>.query`, `.key`, `.value` and `.mixed`."""

    name: str
    """Canonical name, e.g. `blocks.3.attn`."""
    module: str
    """Name of the module."""
    heads: int
    key_heads: int
    """Key and value heads, each of `heads / key_heads` query heads."""
    head_dim: int
    """Numbers of a query and of a key."""
    value_dim: int
    """Numbers of a value."""
    pairs: tuple[Pair, ...] = ()
    """Rotary pairs; positions in none do not turn."""
    scale: float = 1.0
    """Factor of query · key."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Numbers of heads and of what is in them."""
        return self.heads, self.key_heads, self.head_dim, self.value_dim


@dataclass(frozen=True, slots=True)
class BlockList:
    """A list of blocks that a shallower student has fewer of."""

    name: str
    """Canonical name, e.g. `blocks`."""
    modules: tuple[str, ...]
    """Names of the blocks' modules."""
    space: str
    """The space of the stream that they take and give."""


@dataclass(frozen=True, slots=True)
class Structure:
    """A network as projection sees it."""

    family: str
    """Name of the rules."""
    pieces: Mapping[str, Piece]
    """By canonical name."""
    lists: tuple[BlockList, ...]
    """Lists of blocks."""
    block_outputs: tuple[str, ...] = ("hidden_states",)
    """What a block gives back, by the names of the parameters that it takes it as."""
    norms: Mapping[str, Norm] = field(default_factory=dict)
    """By the canonical name of the gain (also of norms without one)."""
    attentions: Mapping[str, Attention] = field(default_factory=dict)
    """By canonical name."""
    embed_scale: float = 1.0
    """Factor of embeddings when they are looked up."""
    rotates: str | None = None
    """Why the basis of the residual stream cannot be rotated; None where it can."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Groups of the group norms on a space, by its name."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of spaces: those that a residual connection ties to the space that is named."""
    patch: Patch | None = None
    """What a transformer says of a patch; None for what does not work in patches."""
    unmatched: tuple[str, ...] = ()
    """Tensors that no rule knows."""

    @property
    def block_modules(self) -> tuple[str, ...]:
        """Names of the modules of all blocks."""
        return tuple(module for blocks in self.lists for module in blocks.modules)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each space."""
        sizes: dict[str, int] = {}
        for piece in self.pieces.values():
            for space, length in zip(piece.spaces, piece.shape, strict=True):
                if space == "kernel":
                    continue
                known = sizes.setdefault(space, length)
                assert known == length, f"{piece.stored}: {space} has size {known} elsewhere, here {length}"
        return sizes

    def readers(self, space: str) -> Iterator[Piece]:
        """Matrices that read from `space`: their second axis lies in it."""
        return (p for p in self._matrices() if p.spaces[1] == space and not p.is_table)

    def writers(self, space: str) -> Iterator[Piece]:
        """Matrices that write into `space`: their first axis lies in it, or they are tables of its vectors."""
        return (p for p in self._matrices() if p.spaces[1 if p.is_table else 0] == space)

    def _matrices(self) -> Iterator[Piece]:
        return (p for p in self.pieces.values() if len(p.spaces) > 1 and not p.is_gain)
