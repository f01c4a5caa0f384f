"""Decoders of transformers whose blocks are named as Llama's: Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, their mixtures.

A mixture's experts are cut apart, `blocks.3.mlp.experts.5.gate`, so that each is chosen or merged by itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raydistill.models.projection.rules import Rule, cut
from raydistill.models.projection.structure import RESIDUAL, Attention, BlockList, Norm, Pair, Piece, Structure

_B = r"(?:.*\.)?layers\.(\d+)\."
_IN, _POST = "blocks.{0}.attn_norm", "blocks.{0}.mlp_norm"
_INNER = "blocks.{0}.mlp.inner"
_A = "blocks.{0}.attn"
RULES = (
    Rule(r"(?:.*\.)?embed_tokens", "embed", "vocab residual", table=True),
    Rule(r"lm_head", "head", "vocab residual", norm="norm"),
    Rule(r"(?:.*\.)?(?:norm|final_layernorm)", "norm", "residual", gain=True),
    Rule(_B + "input_layernorm", _IN, "residual", gain=True),
    Rule(_B + r"self_attn\.q_proj", _A + ".q", _A + ".query residual", norm=_IN),
    Rule(_B + r"self_attn\.k_proj", _A + ".k", _A + ".key residual", norm=_IN),
    Rule(_B + r"self_attn\.v_proj", _A + ".v", _A + ".value residual", norm=_IN),
    Rule(
        _B + r"self_attn\.qkv_proj",
        f"{_A}.q + {_A}.k + {_A}.v",
        f"{_A}.query+{_A}.key+{_A}.value residual",
        norm=_IN,
    ),
    Rule(_B + r"self_attn\.(?:o_proj|dense)", _A + ".o", f"residual {_A}.mixed"),
    Rule(_B + r"mlp\.gate_proj", "blocks.{0}.mlp.gate", _INNER + " residual", norm=_POST),
    Rule(_B + r"mlp\.up_proj", "blocks.{0}.mlp.up", _INNER + " residual", norm=_POST),
    Rule(_B + r"mlp\.gate_up_proj", "blocks.{0}.mlp.gate + blocks.{0}.mlp.up", _INNER + " residual", norm=_POST),
    Rule(_B + r"mlp\.down_proj", "blocks.{0}.mlp.down", "residual " + _INNER),
    Rule(_B + r"mlp\.fc1", "blocks.{0}.mlp.up", _INNER + " residual", norm=_POST),
    Rule(_B + r"mlp\.fc2", "blocks.{0}.mlp.down", "residual " + _INNER),
    Rule(_B + r"mlp\.gate", "blocks.{0}.mlp.router", "blocks.{0}.mlp.expert residual", norm=_POST),
    Rule(_B + r"mlp\.shared_expert_gate", "blocks.{0}.mlp.shared_gate", "one residual", norm=_POST),
    *(
        Rule(
            _B + rf"mlp\.shared_experts?\.{part}_proj",
            f"blocks.{{0}}.mlp.shared.{part}",
            "residual blocks.{0}.mlp.shared.inner" if part == "down" else "blocks.{0}.mlp.shared.inner residual",
            norm=None if part == "down" else _POST,
        )
        for part in ("gate", "up", "down")
    ),
)


def language_structure(model: PreTrainedModel) -> Structure | None:
    """The structure of a decoder, which may be on the meta device; None when it is not named like Llama's."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    names = "\n".join(shapes)
    if not re.search(r"layers\.\d+\.self_attn\.(q_proj|qkv_proj)\.weight", names):
        return None
    config: Any = model.config.get_text_config()
    modules = dict(model.named_modules())
    blocks = _blocks_name(model)
    attentions = _attentions(model, blocks)
    experts = {
        name: shape for name, shape in shapes.items() if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name)
    }
    part_sizes = {
        f"{a.name}.{part}": size
        for a in attentions.values()
        for part, size in (
            ("q", a.heads * a.head_dim), ("k", a.key_heads * a.head_dim), ("v", a.key_heads * a.value_dim)
        )
    }  # fmt: skip
    plain = {name: shape for name, shape in shapes.items() if name not in experts}
    pieces, unmatched = cut(plain, (*_norm_rules(names, shapes, attentions), *RULES), part_sizes)
    for name, shape in experts.items():
        pieces.update({piece.name: piece for piece in _experts(name, shape)})
    pieces = {name: _without_missing_norm(piece, pieces) for name, piece in pieces.items()}
    norms = dict(_norms(pieces, modules))
    return Structure(
        family="language",
        pieces=pieces,
        lists=(BlockList("blocks", tuple(f"{blocks}.{i}" for i in range(config.num_hidden_layers)), RESIDUAL),),
        norms=norms,
        attentions={name: a for name, a in attentions.items() if f"{name}.o.weight" in pieces},
        embed_scale=float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)),
        rotates=_why_not(pieces, norms, is_tied="head.weight" not in pieces),
        unmatched=tuple(unmatched),
    )


def _blocks_name(model: PreTrainedModel) -> str:
    return next(n for n, m in model.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList))


def _norm_rules(names: str, shapes: Mapping[str, tuple[int, ...]], attentions: Mapping[str, Attention]) -> list[Rule]:
    """Rules of norms whose place depends on the family: before what is added to the stream, or after it."""
    before = "input_layernorm" in names
    sandwich = "pre_feedforward_layernorm" in names
    rules = [
        Rule(_B + "pre_feedforward_layernorm", _POST, "residual", gain=True),
        Rule(_B + "post_feedforward_layernorm", "blocks.{0}.mlp_after", "residual", gain=True),
        Rule(
            _B + "post_attention_layernorm",
            _POST if before and not sandwich else "blocks.{0}.attn_after",
            "residual",
            gain=True,
        ),
    ]
    for part, space in (("q", "query"), ("k", "key")):
        # Qwen's and Gemma's norm stands on each head, OLMo's on all of them together.
        lengths = {shape for name, shape in shapes.items() if name.endswith(f"self_attn.{part}_norm.weight")}
        one_head = all(length == (a.head_dim,) for length in lengths for a in attentions.values())
        place = f"{_A}.{space}.one" if one_head else f"{_A}.{space}"
        rules.append(Rule(_B + rf"self_attn\.{part}_norm", f"{_A}.{part}_norm", place, gain=True))
    return rules


def _without_missing_norm(piece: Piece, pieces: Mapping[str, Piece]) -> Piece:
    """OLMo 2 has no norm before attention and MLP."""
    if piece.norm is None or f"{piece.norm}.weight" in pieces:
        return piece
    return replace(piece, norm=None)


def _experts(stored: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", stored)
    if found is None:
        return
    block = f"blocks.{found[1]}"
    for expert in range(shape[0]):
        name = f"{block}.mlp.experts.{expert}"
        inner = f"{name}.inner"
        if found[2] == "down_proj":
            yield Piece(f"{name}.down.weight", stored, (expert,), shape[1:], (RESIDUAL, inner))
            continue
        half = shape[1] // 2
        for part, rows in (("gate", slice(0, half)), ("up", slice(half, None))):
            yield Piece(
                f"{name}.{part}.weight",
                stored,
                (expert, rows),
                (half, shape[2]),
                (inner, RESIDUAL),
                f"{block}.mlp_norm",
            )


def _attentions(model: PreTrainedModel, blocks: str) -> dict[str, Attention]:
    config: Any = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    found = {}
    for i, block in enumerate(model.get_submodule(blocks).children()):
        if not hasattr(block, "self_attn"):
            continue  # a recurrent layer of a hybrid model
        name, module = f"blocks.{i}.attn", block.self_attn
        found[name] = Attention(
            name, f"{blocks}.{i}.self_attn", heads, key_heads, head_dim, head_dim, _pairs(model, i, head_dim),
            float(getattr(module, "scaling", head_dim**-0.5)),
        )  # fmt: skip
    return found


def _pairs(model: PreTrainedModel, block: int, head_dim: int) -> tuple[Pair, ...]:
    """Rotary pairs of a block: (j, j + n/2) of the first n positions of a head, or neighbours."""
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return ()
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    own = f"{kinds[block]}_inv_freq" if block < len(kinds) else ""
    angles = getattr(rotary, own, None)
    angles = angles if angles is not None else getattr(rotary, "inv_freq", None)
    if angles is None:
        return ()
    half = len(angles)
    values = [0.0] * half if angles.is_meta else angles.float().tolist()
    if _interleaved(model.get_submodule(f"{_blocks_name(model)}.{block}.self_attn")):
        return tuple((2 * j, 2 * j + 1, values[j], 0) for j in range(half))
    return tuple((j, j + half, values[j], 0) for j in range(half))


def _interleaved(attention: nn.Module) -> bool:
    """Whether neighbours turn together, as in Cohere's and GLM's models, and not the halves of a head."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    return rotate is not None and float(rotate(torch.arange(4.0))[0]) == -1.0


def _norms(pieces: Mapping[str, Piece], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Norm]]:
    for piece in pieces.values():
        if piece.is_gain and piece.name.endswith(".weight"):
            name = piece.stored.removesuffix(".weight")
            module = modules[name]
            subtracts = isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
            norm = Norm(name, piece.spaces[0], "layer" if subtracts else "rms", _offset(module))
            yield piece.name.removesuffix(".weight"), norm


def _offset(module: nn.Module) -> float:
    """What a norm adds to its tensor to have its gain: found by trying one whose tensor is zeros on ones."""
    if isinstance(module, nn.LayerNorm):
        return 0.0
    blank: nn.Module = type(module)(2)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
        return float(blank(torch.ones(1, 2)).mean().round())


def _why_not(pieces: Mapping[str, Piece], norms: Mapping[str, Norm], *, is_tied: bool) -> str | None:
    """Why the residual stream cannot be rotated; None where it can."""
    for name, norm in norms.items():
        if norm.space != RESIDUAL:
            continue
        if norm.kind == "layer" or f"{name}.bias" in pieces:
            return "its LayerNorm subtracts the mean over channels, which depends on the basis"
        if name.endswith("_after"):
            return "it has norms between a layer and the residual stream, whose gains fold into nothing"
        if not any(piece.norm == name for piece in pieces.values()) and not (is_tied and name == "norm"):
            return f"nothing is known to read from {norm.module}, so its gain folds into nothing"
    for piece in pieces.values():
        if len(piece.spaces) > 1 and piece.spaces[1] == RESIDUAL and piece.norm is None and not piece.is_table:
            return f"{piece.stored} reads the residual stream without a norm"
    return None
