"""The dynamics transformer: codes of frames and actions so far to the logits of the next frame's codes.

A block attends within each frame, then from each token to the same place in earlier frames, and all tokens of a frame
are predicted at once: a step of play is one pass over one frame. Time enters by rotary positions, which are relative,
so that a window can slide over keys and values that are kept. Sources: Bertasius et al. 2021, arXiv 2102.05095
(divided space-time attention); Bruce et al. 2024, arXiv 2402.15391, Sec. 2 (world models of codes and actions);
Su et al. 2021, arXiv 2104.09864, Eq. 34 (rotary positions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raydistill.config.world import WorldSizes

ROTARY_BASE, SPATIAL_BASE = 1000.0, 100.0


@dataclass(slots=True)
class Memory:
    """Keys and values of the frames so far, by block: [B · tokens, heads, frames, head width]."""

    keys: list[Tensor | None]
    values: list[Tensor | None]
    steps: int = 0
    """Frames seen."""


def empty_memory(layers: int) -> Memory:
    """The memory of a model that has seen nothing."""
    return Memory([None] * layers, [None] * layers)


class AttentionMap(nn.Module):
    """The identity of attention maps [B, …, heads, queries, keys]: a place for a hook, and only then computed."""

    def forward(self, probabilities: Tensor) -> Tensor:
        return probabilities

    @property
    def is_read(self) -> bool:
        """Whether somebody wants the maps."""
        return bool(self._forward_hooks)


class Attention(nn.Module):
    """Attention over the last-but-one axis of [B, …, length, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.map = AttentionMap()

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, …, heads, length, head width]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the queries find, [B, …, length, width]; `mask` is true where a query may look."""
        if self.map.is_read:
            scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            found = self.map(scores.softmax(-1)).to(v.dtype) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.out(found.transpose(-2, -3).flatten(-2))
        return result


class Spatial(Attention):
    """Attention within frames of [B, T, tokens, width], tokens row by row on a grid of `columns`.

    Rows turn the first half of queries and keys, columns the second, so that "one tile to the left" is the same
    everywhere: that is what an action asks for.
    """

    def __init__(self, width: int, heads: int, columns: int):
        super().__init__(width, heads)
        self.columns = columns

    def forward(self, x: Float[Tensor, "b t n w"]) -> Float[Tensor, "b t n w"]:
        q, k, v = self.projected(x.flatten(0, 1))
        q, k = self._placed(q), self._placed(k)
        return x + self.attended(q, k, v, None).unflatten(0, x.shape[:2])

    def _placed(self, x: Float[Tensor, "... tokens d"]) -> Float[Tensor, "... tokens d"]:
        places, half = torch.arange(x.shape[-2], device=x.device), x.shape[-1] // 2
        rows = rotated(x[..., :half], places // self.columns, base=SPATIAL_BASE)
        return torch.cat([rows, rotated(x[..., half:], places % self.columns, base=SPATIAL_BASE)], -1)


class Temporal(Attention):
    """Causal attention over frames of [B, T, tokens, width], over at most `context` of them."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__(width, heads)
        self.context = context

    def forward(
        self, x: Float[Tensor, "b t n w"], memory: Memory | None = None, layer: int = 0
    ) -> Float[Tensor, "b t n w"]:
        """With a `memory`, `x` are the frames that follow those it holds; it takes them in."""
        batch, frames = x.shape[:2]
        q, k, v = self.projected(x.transpose(1, 2).flatten(0, 1))
        first = 0 if memory is None else memory.steps
        at = torch.arange(first, first + frames, device=x.device)
        q, k = rotated(q, at), rotated(k, at)
        seen = at
        if memory is not None:
            old_k, old_v = memory.keys[layer], memory.values[layer]
            if old_k is not None and old_v is not None:
                k, v = torch.cat([old_k, k], -2), torch.cat([old_v, v], -2)
            keep = min(k.shape[-2], self.context)
            memory.keys[layer], memory.values[layer] = k[..., -keep:, :], v[..., -keep:, :]
            seen = torch.arange(first + frames - k.shape[-2], first + frames, device=x.device)
        apart = at[:, None] - seen[None, :]
        mask = None if frames == 1 and len(seen) <= self.context else (apart >= 0) & (apart < self.context)
        return x + self.attended(q, k, v, mask).unflatten(0, (batch, -1)).transpose(1, 2)


def rotated(
    x: Float[Tensor, "... frames d"], at: Int[Tensor, " frames"], *, base: float = ROTARY_BASE
) -> Float[Tensor, "... frames d"]:
    """Pairs of numbers turned by angles in proportion to the time; a last odd number stays. arXiv 2104.09864."""
    half = x.shape[-1] // 2
    angles = at[:, None].float() * base ** (-torch.arange(half, device=x.device).float() / max(half, 1))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Block(nn.Module):
    """Attention within frames, over frames, and an MLP; x is [B, T, tokens, width]."""

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        inner = round(sizes.width * sizes.mlp_ratio)
        self.spatial = Spatial(sizes.width, sizes.heads, sizes.frame_size[1] // sizes.patch)
        self.temporal = Temporal(sizes.width, sizes.heads, sizes.context)
        self.norm = nn.LayerNorm(sizes.width)
        self.mlp = nn.Sequential(nn.Linear(sizes.width, inner), nn.GELU(), nn.Linear(inner, sizes.width))

    def forward(self, x: Tensor, memory: Memory | None = None, layer: int = 0) -> Tensor:
        x = self.temporal(self.spatial(x), memory, layer)
        update: Tensor = self.mlp(self.norm(x))
        return x + update


class Dynamics(nn.Module):
    """Vectors [B, T, tokens, code width] and actions [B, T] to logits [B, T, tokens, codes] of the frames after."""

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        tokens = (sizes.frame_size[0] // sizes.patch) * (sizes.frame_size[1] // sizes.patch)
        self.inner = nn.Linear(sizes.code_width, sizes.width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, sizes.width))
        self.action = nn.Embedding(sizes.num_actions, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.codebook_size)
        self.recompute = False
        """Compute the blocks again in the backward pass instead of keeping what is inside them."""

    def forward(
        self, vectors: Float[Tensor, "b t n d"], actions: Int[Tensor, "b t"], memory: Memory | None = None
    ) -> Float[Tensor, "b t n k"]:
        x = self.inner(vectors) + self.place + self.action(actions)[:, :, None]
        for layer, block in enumerate(self.blocks):
            if self.recompute and memory is None and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, memory, layer)
        if memory is not None:
            memory.steps += vectors.shape[1]
        logits: Tensor = self.head(self.norm(x))
        return logits
