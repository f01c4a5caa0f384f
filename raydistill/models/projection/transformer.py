"""Diffusion transformers of diffusers: Wan, CogVideoX, PixArt and Stable Diffusion 3.

Their pieces have the same canonical names as far as they do the same, so that an image transformer can start from a
video transformer. The time embedding of Wan and PixArt is added to the modulation of the last norm, so it lies in the
space of the residual stream; CogVideoX and Stable Diffusion 3 have a space of their own for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from raydistill.models.projection.kernels import Patch
from raydistill.models.projection.rules import Rule, cut
from raydistill.models.projection.structure import RESIDUAL, Attention, BlockList, Norm, Pair, Piece, Structure

_B = r"(?:transformer_)?blocks\.(\d+)\."
CONTEXT = "context_stream"
"""The stream of text tokens, where it has weights of its own."""


def _parts(name: str, number: int) -> str:
    return " + ".join(f"{name}.{i}" for i in range(number))


def _attention_rules(name: str, context: str = RESIDUAL) -> list[Rule]:
    space = f"blocks.{{0}}.{name}"
    return [
        Rule(_B + rf"{name}\.to_q", f"{space}.q", f"{space}.query residual"),
        Rule(_B + rf"{name}\.to_k", f"{space}.k", f"{space}.key {context}"),
        Rule(_B + rf"{name}\.to_v", f"{space}.v", f"{space}.value {context}"),
        Rule(_B + rf"{name}\.to_out\.0", f"{space}.o", f"residual {space}.mixed"),
        Rule(_B + rf"{name}\.add_q_proj", f"{space}.add_q", f"{space}.query {CONTEXT}"),
        Rule(_B + rf"{name}\.add_k_proj", f"{space}.add_k", f"{space}.key {CONTEXT}"),
        Rule(_B + rf"{name}\.add_v_proj", f"{space}.add_v", f"{space}.value {CONTEXT}"),
        Rule(_B + rf"{name}\.to_add_out", f"{space}.add_o", f"{CONTEXT} {space}.mixed"),
    ]


def _head_norm_rules(name: str, place: str) -> list[Rule]:
    space = f"blocks.{{0}}.{name}"
    return [
        Rule(_B + rf"{name}\.norm_{part}", f"{space}.{part}_norm", f"{space}.{kind}{place}", gain=True)
        for part, kind in (("q", "query"), ("k", "key"))
    ] + [
        Rule(_B + rf"{name}\.norm_added_{part}", f"{space}.add_{part}_norm", f"{space}.{kind}{place}", gain=True)
        for part, kind in (("q", "query"), ("k", "key"))
    ]


_MLP = (
    Rule(_B + r"ffn?\.net\.0\.proj", "blocks.{0}.mlp.up", "blocks.{0}.mlp.inner residual"),
    Rule(_B + r"ffn?\.net\.2", "blocks.{0}.mlp.down", "residual blocks.{0}.mlp.inner"),
    Rule(_B + r"ff_context\.net\.0\.proj", "blocks.{0}.mlp_context.up", f"blocks.{{0}}.mlp_context.inner {CONTEXT}"),
    Rule(_B + r"ff_context\.net\.2", "blocks.{0}.mlp_context.down", f"{CONTEXT} blocks.{{0}}.mlp_context.inner"),
)
_OUT = Rule("proj_out", "out", "patch_out residual")
_WAN = (
    Rule("patch_embedding", "patch", "residual latent"),
    Rule(r"condition_embedder\.time_embedder\.linear_1", "time.1", "time.hidden frequency"),
    Rule(r"condition_embedder\.time_embedder\.linear_2", "time.2", "residual time.hidden"),
    Rule(r"condition_embedder\.time_proj", _parts("modulation", 6), "residual residual"),
    Rule(r"condition_embedder\.text_embedder\.linear_1", "text.1", "text.hidden text"),
    Rule(r"condition_embedder\.text_embedder\.linear_2", "text.2", "context text.hidden"),
    *_attention_rules("attn1"),
    *_attention_rules("attn2", "context"),
    *_head_norm_rules("attn1", ""),
    *_head_norm_rules("attn2", ""),
    Rule(_B + "norm2", "blocks.{0}.cross_norm", "residual", gain=True),
    *_MLP,
    _OUT,
)
_PIXART = (
    Rule(r"pos_embed\.proj", "patch", "residual latent"),
    Rule(r"adaln_single\.emb\.timestep_embedder\.linear_1", "time.1", "time.hidden frequency"),
    Rule(r"adaln_single\.emb\.timestep_embedder\.linear_2", "time.2", "residual time.hidden"),
    *(
        Rule(
            rf"adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.linear_{i}",
            f"{{0}}.{i}",
            "resolution.hidden frequency" if i == 1 else "resolution resolution.hidden",
        )
        for i in (1, 2)
    ),
    Rule(r"adaln_single\.linear", _parts("modulation", 6), "residual residual"),
    Rule(r"caption_projection\.linear_1", "text.1", "text.hidden text"),
    Rule(r"caption_projection\.linear_2", "text.2", "context text.hidden"),
    *_attention_rules("attn1"),
    *_attention_rules("attn2", "context"),
    *_MLP,
    _OUT,
)
_COGVIDEOX = (
    Rule(r"patch_embed\.proj", "patch", "residual latent"),
    Rule(r"patch_embed\.text_proj", "text.in", "residual text"),
    Rule(r"time_embedding\.linear_1", "time.1", "time.hidden frequency"),
    Rule(r"time_embedding\.linear_2", "time.2", "time time.hidden"),
    *(
        rule
        for i in (1, 2)
        for rule in (
            Rule(_B + rf"norm{i}\.linear", _parts(f"blocks.{{0}}.modulation{i}", 6), "residual time"),
            Rule(_B + rf"norm{i}\.norm", f"blocks.{{0}}.norm{i}", "residual", gain=True),
        )
    ),
    *_attention_rules("attn1"),
    *_head_norm_rules("attn1", ".one"),
    *_MLP,
    Rule("norm_final", "norm", "residual", gain=True),
    Rule(r"norm_out\.linear", _parts("final.modulation", 2), "residual time"),
    Rule(r"norm_out\.norm", "final.norm", "residual", gain=True),
    _OUT,
)
_SD3 = (
    Rule(r"pos_embed\.proj", "patch", "residual latent"),
    Rule(r"time_text_embed\.timestep_embedder\.linear_1", "time.1", "time.hidden frequency"),
    Rule(r"time_text_embed\.timestep_embedder\.linear_2", "time.2", "time time.hidden"),
    Rule(r"time_text_embed\.text_embedder\.linear_1", "pooled.1", "pooled.hidden pooled"),
    Rule(r"time_text_embed\.text_embedder\.linear_2", "pooled.2", "time pooled.hidden"),
    Rule("context_embedder", "text.in", f"{CONTEXT} text"),
    *_attention_rules("attn"),
    *_attention_rules("attn2"),
    *_head_norm_rules("attn", ".one"),
    *_head_norm_rules("attn2", ".one"),
    *_MLP,
    Rule(r"norm_out\.linear", _parts("final.modulation", 2), "residual time"),
    _OUT,
)
_ADAPTIVE = "its adaptive norms scale and shift single channels, which a rotation would mix"
_SCALES = {"modulation.1": "blocks.*.attn_norm", "modulation.4": "blocks.*.mlp_norm", "final.1": "final_norm"}
"""Shared modulations (Wan, PixArt) that scale: shift, scale, gate before attention, and again before the MLP."""


def transformer_structure(network: nn.Module) -> Structure | None:
    """The structure of a diffusion transformer, which may be on the meta device; None for one without rules."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    outputs: tuple[str, ...] = ("hidden_states",)
    match network:
        case WanTransformer3DModel():
            pieces, unmatched = _with_tables(shapes, _WAN)
            blocks = "blocks"
            norms = dict(_norms(network, blocks, {"attn_norm": "norm1", "mlp_norm": "norm3"}, pieces))
            pairs = _video_pairs(network.config)
        case PixArtTransformer2DModel():
            pieces, unmatched = _with_tables(shapes, _PIXART)
            blocks = "transformer_blocks"
            norms = dict(_norms(network, blocks, {"attn_norm": "norm1", "mlp_norm": "norm2"}, pieces))
            pairs = ()
        case CogVideoXTransformer3DModel():
            pieces, unmatched = cut(shapes, _COGVIDEOX)
            blocks, outputs = "transformer_blocks", ("hidden_states", "encoder_hidden_states")
            norms = dict(_norms(network, blocks, {}, pieces))
            pairs = _video_pairs(network.config) if network.config.use_rotary_positional_embeddings else ()
        case SD3Transformer2DModel():
            pieces, unmatched = _sd3(shapes)
            blocks, outputs = "transformer_blocks", ("encoder_hidden_states", "hidden_states")
            norms = dict(_norms(network, blocks, {"attn_norm": "norm1.norm", "mlp_norm": "norm2"}, pieces))
            pairs = ()
        case _:
            return None
    modules = tuple(f"{blocks}.{i}" for i in range(len(network.get_submodule(blocks))))  # type: ignore[arg-type]
    return Structure(
        family=type(network).__name__,
        pieces=pieces,
        lists=(BlockList("blocks", modules, RESIDUAL),),
        block_outputs=outputs,
        norms=norms,
        attentions=dict(_attentions(network, blocks, pieces, pairs)),
        rotates=_ADAPTIVE,
        patch=_patch(network, pieces["out.weight"].shape[0]),
        unmatched=tuple(unmatched),
    )


def _patch(network: nn.Module, numbers: int) -> Patch:
    """What `network` says of a patch in `numbers` numbers: CogVideoX channel by channel, the others pixel by pixel."""
    size: Any = getattr(network.config, "patch_size")  # noqa: B009
    height, width = (size, size) if isinstance(size, int) else size[1:]
    first = isinstance(network, CogVideoXTransformer3DModel)
    return Patch(height, width, numbers // (height * width), channels_first=first)


def _with_tables(shapes: Mapping[str, tuple[int, ...]], rules: tuple[Rule, ...]) -> tuple[dict[str, Piece], list[str]]:
    """Pieces of Wan and PixArt, whose modulations are the sum of a shared linear layer and a table per block."""
    tables = {name: shape for name, shape in shapes.items() if name.endswith("scale_shift_table")}
    pieces, unmatched = cut({name: shape for name, shape in shapes.items() if name not in tables}, rules)
    for stored, shape in tables.items():
        found = re.fullmatch(_B + "scale_shift_table", stored)
        prefix = f"blocks.{found[1]}.modulation" if found else "final"
        for i in range(shape[-2]):
            index = (0, i) if len(shape) == 3 else (i,)
            name = f"{prefix}.{i}.weight"
            pieces[name] = Piece(name, stored, index, shape[-1:], (RESIDUAL,))
    return {name: _scaling(piece) for name, piece in pieces.items()}, unmatched


def _scaling(piece: Piece) -> Piece:
    name = piece.name.rpartition(".")[0]
    block = re.match(r"blocks\.(\d+)\.", name)
    norm = _SCALES.get(name[block.end() :] if block else name)
    return replace(piece, scales=norm.replace("*", block[1]) if norm and block else norm)


def _sd3(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Piece], list[str]]:
    rules = list(_SD3)
    for name, shape in shapes.items():
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(norm1|norm1_context)\.linear\.weight", name)
        if found is None:
            continue
        context = found[2] == "norm1_context"
        number = shape[0] // shape[1]
        # The last block's text is not needed any more: scale and shift in that order, and nothing after the attention.
        kind = ("modulation_context" if context else "modulation") if number > 2 else "last_context"
        rules.append(
            Rule(
                re.escape(name.removesuffix(".weight")),
                _parts(f"blocks.{found[1]}.{kind}", number),
                f"{CONTEXT if context else RESIDUAL} time",
            )
        )
    positions = {name: shape for name, shape in shapes.items() if name == "pos_embed.pos_embed"}
    pieces, unmatched = cut({name: shape for name, shape in shapes.items() if name not in positions}, rules)
    for stored, shape in positions.items():
        pieces["positions"] = Piece("positions", stored, (0,), shape[1:], ("positions", RESIDUAL), is_table=True)
    scaled = {}
    for name, piece in pieces.items():
        found = re.match(r"blocks\.(\d+)\.modulation\.([14])\.", name)
        norm = None if found is None else f"blocks.{found[1]}.{'attn_norm' if found[2] == '1' else 'mlp_norm'}"
        scaled[name] = replace(piece, scales="final_norm" if name.startswith("final.modulation.0") else norm)
    return scaled, unmatched


def _norms(
    network: nn.Module, blocks: str, plain: Mapping[str, str], pieces: Mapping[str, Piece]
) -> Iterator[tuple[str, Norm]]:
    """Norms by canonical name: those with gains, and, in `plain`, those without."""
    modules = dict(network.named_modules())
    for piece in pieces.values():
        if piece.is_gain and piece.name.endswith(".weight"):
            module = piece.stored.removesuffix(".weight")
            subtracts = "LayerNorm" in type(modules[module]).__name__
            yield piece.name.removesuffix(".weight"), Norm(module, piece.spaces[0], "layer" if subtracts else "rms")
    if not plain:
        return
    for i in range(len(network.get_submodule(blocks))):  # type: ignore[arg-type]
        for name, module in plain.items():
            if f"{blocks}.{i}.{module}" in modules:
                yield f"blocks.{i}.{name}", Norm(f"{blocks}.{i}.{module}", RESIDUAL, "layer")
    final = "norm_out.norm" if "norm_out.norm" in modules else "norm_out"
    yield "final_norm", Norm(final, RESIDUAL, "layer")


def _attentions(
    network: nn.Module, blocks: str, pieces: Mapping[str, Piece], pairs: tuple[Pair, ...]
) -> Iterator[tuple[str, Attention]]:
    for name, piece in pieces.items():
        found = re.fullmatch(r"(blocks\.(\d+)\.(attn\d?))\.q\.weight", name)
        if found is None:
            continue
        path = f"{blocks}.{found[2]}.{found[3]}"
        heads = int(getattr(network.get_submodule(path), "heads"))  # noqa: B009
        query, value = piece.shape[0], pieces[f"{found[1]}.v.weight"].shape[0]
        own = pairs if found[3] in ("attn", "attn1") else ()
        head_dim = query // heads
        yield found[1], Attention(found[1], path, heads, heads, head_dim, value // heads, own, head_dim**-0.5)


def _video_pairs(config: Any) -> tuple[Pair, ...]:
    """Neighbours turn together: first those for time, then for height, then for width.

    Wan gives a third to each of height and width, rounded down to even numbers, CogVideoX three eighths.
    """
    size = int(config.attention_head_dim)
    plane = 2 * (size // 6) if "num_attention_heads" in config and "rope_max_seq_len" in config else size // 8 * 3
    pairs: list[Pair] = []
    for axis, length in enumerate((size - 2 * plane, plane, plane)):
        start = 2 * len(pairs)
        pairs += [(start + 2 * j, start + 2 * j + 1, 10000.0 ** (-2 * j / length), axis) for j in range(length // 2)]
    return tuple(pairs)
