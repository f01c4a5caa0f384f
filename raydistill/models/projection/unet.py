"""UNets of diffusers: Stable Diffusion's, SDXL's, and those without text.

Every convolution writes into a space of its own; a residual connection without a convolution ties the space that goes
in to the one that comes out. What an up block reads is a space of the stream beside one of a skip connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from raydistill.models.projection.structure import Attention, BlockList, Norm, Piece, Structure


def unet_structure(network: nn.Module) -> Structure:
    """The structure of a `UNet2DConditionModel` or `UNet2DModel`, which may be on the meta device."""
    return _Builder(network).build()


class _Builder:
    """Follows a UNet's forward pass and names the spaces on the way."""

    def __init__(self, network: nn.Module):
        self.network: Any = network
        self.pieces: dict[str, Piece] = {}
        self.norms: dict[str, Norm] = {}
        self.attentions: dict[str, Attention] = {}
        self.lists: list[BlockList] = []
        self.groups: dict[str, int] = {}
        self._tied: dict[str, str] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    def build(self) -> Structure:
        """The structure."""
        self._module("conv_in", "conv_in.out", "latent")
        self._module("time_embedding.linear_1", "time.hidden", "frequency")
        self._module("time_embedding.linear_2", "time", "time.hidden")
        self._module("add_embedding.linear_1", "add.hidden", "condition")
        self._module("add_embedding.linear_2", "time", "add.hidden")
        stream = "conv_in.out"
        skips = [stream]
        for k, block in enumerate(self.network.down_blocks):
            name = f"down_blocks.{k}"
            for j in range(len(block.resnets)):
                stream = self._layer(f"{name}.resnets.{j}", f"{name}.attentions.{j}", [stream])
                skips.append(stream)
            stream = self._resampled(f"{name}.downsamplers.0", stream)
            if stream.endswith("downsamplers.0.out"):
                skips.append(stream)
        if self.network.mid_block is not None:
            stream = self._layer("mid_block.resnets.0", "mid_block.attentions.0", [stream])
            for j in range(1, len(self.network.mid_block.resnets)):
                stream = self._layer(f"mid_block.resnets.{j}", f"mid_block.attentions.{j}", [stream])
        for k, block in enumerate(self.network.up_blocks):
            name = f"up_blocks.{k}"
            for j in range(len(block.resnets)):
                stream = self._layer(f"{name}.resnets.{j}", f"{name}.attentions.{j}", [stream, skips.pop()])
            stream = self._resampled(f"{name}.upsamplers.0", stream)
        self._gain("conv_norm_out", [stream])
        self._module("conv_out", "latent_out", stream)
        pieces = {name: self._named(piece) for name, piece in self.pieces.items()}
        known = {piece.stored for piece in pieces.values()}
        return Structure(
            family="UNet",
            pieces=pieces,
            lists=tuple(BlockList(blocks.name, blocks.modules, self._space(blocks.space)) for blocks in self.lists),
            norms=self.norms,
            attentions=self.attentions,
            rotates="its group norms and residual convolutions work on single channels, which a rotation would mix",
            groups={self._space(space): groups for space, groups in self.groups.items()},
            aliases={space: self._space(space) for piece in self.pieces.values() for space in piece.spaces},
            unmatched=tuple(name for name in self._shapes if name not in known),
        )

    # --- parts ---

    def _layer(self, resnet: str, attention: str, streams: Sequence[str]) -> str:
        """A residual block and, where there is one, the attention after it; gives the stream that comes out."""
        out, inner = f"{resnet}.out", f"{resnet}.hidden"
        self._gain(f"{resnet}.norm1", streams)
        self._module(f"{resnet}.conv1", inner, *streams)
        self._module(f"{resnet}.time_emb_proj", inner, "time")
        self._gain(f"{resnet}.norm2", [inner])
        self._module(f"{resnet}.conv2", out, inner)
        if f"{resnet}.conv_shortcut.weight" in self._shapes:
            self._module(f"{resnet}.conv_shortcut", out, *streams)
        elif len(streams) == 1:
            self._tie(out, streams[0])
        self._attention_block(attention, out)
        return out

    def _attention_block(self, name: str, stream: str) -> None:
        if f"{name}.to_q.weight" in self._shapes:  # without text: attention on the stream itself
            self._gain(f"{name}.group_norm", [stream])
            self._attention(name, stream, stream)
            return
        if f"{name}.proj_in.weight" not in self._shapes:
            return
        tokens = f"{name}.tokens"
        self._gain(f"{name}.norm", [stream])
        self._module(f"{name}.proj_in", tokens, stream)
        blocks = self.network.get_submodule(f"{name}.transformer_blocks")
        self.lists.append(
            BlockList(
                f"{name}.transformer_blocks",
                tuple(f"{name}.transformer_blocks.{i}" for i in range(len(blocks))),
                tokens,
            )
        )
        for i in range(len(blocks)):
            block = f"{name}.transformer_blocks.{i}"
            for norm in ("norm1", "norm2", "norm3"):
                self._layer_norm(f"{block}.{norm}", tokens)
            self._attention(f"{block}.attn1", tokens, tokens)
            self._attention(f"{block}.attn2", tokens, "text")
            self._gated(f"{block}.ff.net.0.proj", f"{block}.ff.inner", tokens)
            self._module(f"{block}.ff.net.2", tokens, f"{block}.ff.inner")
        self._module(f"{name}.proj_out", stream, tokens)

    def _attention(self, name: str, stream: str, context: str) -> None:
        if f"{name}.to_q.weight" not in self._shapes:
            return
        module = self.network.get_submodule(name)
        heads = int(module.heads)
        query, value = self._shapes[f"{name}.to_q.weight"][0], self._shapes[f"{name}.to_v.weight"][0]
        self._module(f"{name}.to_q", f"{name}.query", stream)
        self._module(f"{name}.to_k", f"{name}.key", context)
        self._module(f"{name}.to_v", f"{name}.value", context)
        self._module(f"{name}.to_out.0", stream, f"{name}.mixed")
        self.attentions[name] = Attention(
            name, name, heads, heads, query // heads, value // heads, scale=float(module.scale)
        )

    def _resampled(self, name: str, stream: str) -> str:
        if f"{name}.conv.weight" not in self._shapes:
            return stream
        self._module(f"{name}.conv", f"{name}.out", stream)
        return f"{name}.out"

    # --- tensors ---

    def _module(self, name: str, out: str, *inputs: str) -> None:
        """A linear layer or a convolution; of several inputs side by side one piece for each."""
        weight = f"{name}.weight"
        if weight not in self._shapes:
            return
        shape = self._shapes[weight]
        kernel = ("kernel",) * (len(shape) - 2)
        start = 0
        for number, space in enumerate(inputs):
            size = shape[1] if len(inputs) == 1 else self._width(space)
            index = () if len(inputs) == 1 else (slice(None), slice(start, start + size))
            key = f"{name}.{number}.weight" if len(inputs) > 1 else weight
            self.pieces[key] = Piece(key, weight, index, (shape[0], size, *shape[2:]), (out, space, *kernel))
            start += size
        assert start in (0, shape[1]) or len(inputs) == 1, f"{name} reads {shape[1]} channels, {inputs} have {start}"
        self._bias(name, out)

    def _gated(self, name: str, inner: str, stream: str) -> None:
        """GEGLU: values, then gates, in one tensor."""
        for kind in ("weight", "bias"):
            stored = f"{name}.{kind}"
            if stored not in self._shapes:
                continue
            shape = self._shapes[stored]
            gated = self._shapes[f"{name.replace('.net.0.proj', '.net.2')}.weight"][1] != shape[0]
            half = shape[0] // 2 if gated else shape[0]
            spaces = (inner, stream) if kind == "weight" else (inner,)
            for number, start in enumerate(range(0, shape[0], half)):
                key = f"{name}.{number}.{kind}"
                self.pieces[key] = Piece(key, stored, (slice(start, start + half),), (half, *shape[1:]), spaces)

    def _bias(self, name: str, space: str) -> None:
        if f"{name}.bias" in self._shapes:
            key = f"{name}.bias"
            self.pieces[key] = Piece(key, key, (), self._shapes[key], (space,))

    def _gain(self, name: str, spaces: Sequence[str]) -> None:
        """Gain and bias of a group norm; of several inputs side by side one piece for each."""
        if len(spaces) == 1:
            self.groups[spaces[0]] = int(self.network.get_submodule(name).num_groups) if self._has(name) else 1
        for kind in ("weight", "bias"):
            stored = f"{name}.{kind}"
            if stored not in self._shapes:
                continue
            start = 0
            for number, space in enumerate(spaces):
                size = self._shapes[stored][0] if len(spaces) == 1 else self._width(space)
                key = f"{name}.{number}.{kind}" if len(spaces) > 1 else stored
                index = () if len(spaces) == 1 else (slice(start, start + size),)
                self.pieces[key] = Piece(key, stored, index, (size,), (space,), is_gain=True)
                start += size

    def _layer_norm(self, name: str, space: str) -> None:
        if not self._has(name):
            return
        for kind in ("weight", "bias"):
            key = f"{name}.{kind}"
            self.pieces[key] = Piece(key, key, (), self._shapes[key], (space,), is_gain=True)
        self.norms[name] = Norm(name, space, "layer")

    def _has(self, name: str) -> bool:
        return f"{name}.weight" in self._shapes

    def _width(self, space: str) -> int:
        widths = self._widths()
        return next(size for name, size in widths if name == space)

    def _widths(self) -> Iterator[tuple[str, int]]:
        for piece in self.pieces.values():
            if not piece.is_gain and len(piece.spaces) > 1:
                yield piece.spaces[0], piece.shape[0]

    # --- ties ---

    def _tie(self, one: str, other: str) -> None:
        self._tied[one] = other

    def _space(self, space: str) -> str:
        while space in self._tied:
            space = self._tied[space]
        return space

    def _named(self, piece: Piece) -> Piece:
        """A piece with the spaces that its own are tied to."""
        return Piece(
            piece.name,
            piece.stored,
            piece.index,
            piece.shape,
            tuple(self._space(space) for space in piece.spaces),
            piece.norm,
            piece.is_gain,
            piece.is_table,
        )
