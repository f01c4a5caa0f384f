"""Self-attention by chunks: what a causal pass hands through a network, and the keys and values that it keeps.

Chunks need no mask of tokens × tokens: the queries of a chunk attend to slices of the keys, all of which they may see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from raydistill.errors import ConfigError


@dataclass(slots=True)
class KVCache:
    """Keys and values of the frames so far, one pair per self-attention, with room for `num_frames`.

    A pass without gradients writes the keys and values of its frames, over those that a pass before wrote there; so
    the last such pass over a chunk decides what later chunks see of it. A pass with gradients only reads.
    """

    num_frames: int
    """Latent frames that there is room for."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[samples, tokens, heads, width] by layer, rotated to their places."""
    values: dict[int, Tensor] = field(default_factory=dict)

    def joined(self, layer: int, key: Tensor, value: Tensor, first: int, room: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens before `first` and of this pass, which begin there; `room` tokens in all."""
        if torch.is_grad_enabled():
            if first == 0:
                return key, value
            # Copies, since the places of this pass are written over before the backward pass.
            before = self.keys[layer][:, :first], self.values[layer][:, :first]
            return torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
        if layer not in self.keys:
            for table, like in ((self.keys, key), (self.values, value)):
                table[layer] = like.new_zeros(like.shape[0], room, *like.shape[2:])
        end = first + key.shape[1]
        self.keys[layer][:, first:end], self.values[layer][:, first:end] = key, value
        return self.keys[layer][:, :end], self.values[layer][:, :end]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that attend together."""

    queries: slice
    keys: tuple[slice, ...]
    """What they see, side by side."""


@dataclass(frozen=True)
class Places:
    """What a causal pass hands to the self-attention in place of the rotary tables.

    An argument of each block, and so the same when gradient checkpointing runs the block again. No tuple, since
    DeepSpeed takes tuples apart, and without slots, since it looks at the `vars` of what modules return.
    """

    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the tokens of this pass."""
    spans: tuple[Span, ...]
    cache: KVCache | None
    first_token: int
    """Of this pass, in the video; 0 without a cache."""
    room: int
    """Tokens of the whole video."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of tokens [samples, tokens, heads, width], already rotated."""
        if self.cache is not None:
            key, value = self.cache.joined(layer, key, value, self.first_token, self.room)
            return _attention(query, key, value)
        parts = [_attention(query[:, s.queries], _slices(key, s.keys), _slices(value, s.keys)) for s in self.spans]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _slices(tokens: Tensor, slices: Sequence[slice]) -> Tensor:
    return tokens[:, slices[0]] if len(slices) == 1 else torch.cat([tokens[:, s] for s in slices], 1)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = dispatch_attention_fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out


@dataclass(slots=True)
class Call:
    """The causal pass that a network is in; `frames` is None outside of one."""

    frames: Tensor | None = None
    """Place in the video of each frame of the pass, int64."""
    tokens: int = 0
    """Tokens of a frame."""
    length: int = 0
    """Frames for which positions are made: up to the last of `frames`."""
    spans: tuple[Span, ...] = ()
    cache: KVCache | None = None
    first: int = 0
    """Frame of the video with which a cached pass begins."""

    def lengthen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before positions are made: as for a video from its beginning on, of which the first argument tells size."""
        if self.frames is None:
            return None
        x: Tensor = args[0]
        shape = (*x.shape[:2], self.length, *x.shape[3:])
        return (x.new_zeros(1).expand(shape), *args[1:]), kwargs

    def chosen(self, table: Tensor, axis: int) -> Tensor:
        """The rows of the frames of this pass, of a table with one row per token of the lengthened video."""
        assert self.frames is not None
        at = (self.frames[:, None] * self.tokens + torch.arange(self.tokens, device=self.frames.device)).flatten()
        return table.index_select(axis, at.to(table.device))

    def places(self, rotary: tuple[Tensor, Tensor], axis: int) -> object:
        """After rotary tables are made (with the tokens on `axis`): what goes to the self-attention."""
        if self.frames is None:
            return rotary
        cos, sin = (self.chosen(table, axis) for table in rotary)
        room = self.tokens * (self.cache.num_frames if self.cache is not None else 0)
        return Places((cos, sin), self.spans, self.cache, self.first * self.tokens, room)


@dataclass(frozen=True)
class Family:
    """What a class of video transformers needs of `CausalDenoiser`."""

    prepare: Callable[[nn.Module], Call]
    """Installs processors and hooks, once per network."""
    ask: Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]
    """(network, x, t [samples] or [samples, frames], prompt_embeds, tokens of a frame) → prediction."""
    frame_tokens: Callable[[nn.Module, int, int], int]
    """Tokens of a frame of a height and width."""
    most_frames: Callable[[nn.Module], int]
    """Latent frames for which there are positions."""

    def require_room(self, network: nn.Module, num_frames: int) -> None:
        """`ConfigError` when the network has no positions for so many frames."""
        most = self.most_frames(network)
        if num_frames > most:
            raise ConfigError(
                f"wanted a video of at most {most} latent frames, the positions that {type(network).__name__} has, "
                f"found {num_frames}; generate fewer frames."
            )
