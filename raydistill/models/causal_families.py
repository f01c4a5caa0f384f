"""Which video transformers of diffusers can be causal, and how each is asked.

| class                         | causal | why not                                                                  |
|-------------------------------|--------|--------------------------------------------------------------------------|
| `WanTransformer3DModel`       | yes    |                                                                          |
| `CosmosTransformer3DModel`    | yes    |                                                                          |
| `CogVideoXTransformer3DModel` | no     | text and video attend to one another in every block, so that the text    |
|                               |        | carries later frames to earlier ones; one time for all frames            |
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0, CosmosTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.models.causal_attention import Call, Family, Places

COSMOS_TIMES = 1000
"""diffusers' pipelines tell Cosmos the noise level itself, where others are told this many times as much."""
SUPPORTED = ("WanTransformer3DModel", "CosmosTransformer3DModel")


def family_of(network: nn.Module, *, where: str = "") -> Family:
    """What to know of the class of `network`; `ConfigError`, which begins with `where`, names what is against it."""
    said = f"{where}: " if where else ""
    match network:
        case WanTransformer3DModel():
            _require(network, {"image_dim": None, "added_kv_proj_dim": None}, said)
            return _WAN
        case CosmosTransformer3DModel():
            _require(network, {"img_context_dim_in": None, "controlnet_block_every_n": None}, said)
            if _config(network).concat_padding_mask and importlib.util.find_spec("torchvision") is None:
                raise ConfigError(
                    f"{said}CosmosTransformer3DModel with concat_padding_mask wants torchvision, which diffusers "
                    "resizes the mask with, found none; install it (pip install torchvision)."
                )
            return _COSMOS
        case CogVideoXTransformer3DModel():
            raise ConfigError(
                f"{said}what makes videos chunk by chunk is a transformer whose frames can be told times of their own "
                f"and whose attention can be cut by frames ({' or '.join(SUPPORTED)}), found "
                "CogVideoXTransformer3DModel: in it text and video attend to one another, so that later frames reach "
                "earlier ones, and all frames have one time. Use it as a bidirectional teacher or student."
            )
        case _:
            raise ConfigError(
                f"{said}wanted a video transformer of the class {' or '.join(SUPPORTED)}, found "
                f"{type(network).__name__}."
            )


def network_dtype(network: nn.Module) -> torch.dtype:
    """The number format of a network's inputs; of one in half precision diffusers keeps some parameters in fp32."""
    found = getattr(network, "dtype", None)
    return found if isinstance(found, torch.dtype) else next(p.dtype for p in network.parameters())


def _config(network: nn.Module) -> Any:
    return cast(Any, network).config


def _require(network: nn.Module, settings: Mapping[str, object], said: str) -> None:
    config = _config(network)
    for key, wanted in settings.items():
        if config.get(key) != wanted:
            raise ConfigError(
                f"{said}wanted a {type(network).__name__} of text alone ({key}: null), found {config[key]}. "
                "Use another model."
            )
    if config.patch_size[0] != 1:
        raise ConfigError(
            f"{said}wanted a {type(network).__name__} with patches of one latent frame, found patch_size "
            f"{list(config.patch_size)}. Use another model."
        )


def _frame_tokens(network: nn.Module, height: int, width: int) -> int:
    _, rows, columns = _config(network).patch_size
    return (height // rows) * (width // columns)


# --- Wan --------------------------------------------------------------------------------------------------------


class CausalWanProcessor(WanAttnProcessor):
    """Self-attention number `layer` of a Wan transformer; as diffusers' own where no causal pass is on."""

    def __init__(self, call: Call, layer: int):
        super().__init__()
        self.call, self.layer = call, layer

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if not isinstance(rotary_emb, Places):
            out: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return out
        query, key = (
            _rotated(t.unflatten(2, (attn.heads, -1)), *rotary_emb.rotary)
            for t in (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)))
        )
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        mixed = rotary_emb.attend(self.layer, query, key, value)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3).type_as(query))))


def _rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels [samples, tokens, heads, width] turned by their angles, as Wan does it."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * c - second * s, first * s + second * c], -1).flatten(-2).type_as(tokens)


def _prepare_wan(network: nn.Module) -> Call:
    blocks: Any = cast(Any, network).blocks
    installed = blocks[0].attn1.processor
    if isinstance(installed, CausalWanProcessor):
        return installed.call
    call = Call()
    for layer, block in enumerate(blocks):
        block.attn1.set_processor(CausalWanProcessor(call, layer))
    rope: nn.Module = cast(Any, network).rope
    rope.register_forward_pre_hook(call.lengthen, with_kwargs=True)
    rope.register_forward_hook(_Rotary(call, axis=1))
    return call


class _Rotary:
    """Hands the places of a causal pass on in place of rotary tables."""

    def __init__(self, call: Call, axis: int):
        self.call, self.axis = call, axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rotary: tuple[Tensor, Tensor]) -> object:
        return self.call.places(rotary, self.axis)


def _ask_wan(network: nn.Module, x: Tensor, t: Tensor, text: Tensor, tokens: int) -> Tensor:
    dtype = network_dtype(network)
    times = t.repeat_interleave(tokens, dim=1) if t.ndim == 2 else t
    out: Tensor = network(x.to(dtype), timestep=times, encoder_hidden_states=text.to(dtype), return_dict=False)[0]
    return out


_WAN = Family(_prepare_wan, _ask_wan, _frame_tokens, lambda network: int(_config(network).rope_max_seq_len))


# --- Cosmos -----------------------------------------------------------------------------------------------------


class CausalCosmosProcessor(CosmosAttnProcessor2_0):
    """Self-attention number `layer` of a Cosmos transformer; as diffusers' own where no causal pass is on."""

    def __init__(self, call: Call, layer: int):
        super().__init__()
        self.call, self.layer = call, layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if not isinstance(image_rotary_emb, Places):
            out: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return out
        parts: Any = attn  # which diffusers declares as optional
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (parts.to_q, parts.to_k, parts.to_v)
        )
        tables: Any = image_rotary_emb.rotary
        query, key = (
            cast(Tensor, apply_rotary_emb(t, tables, use_real=True, use_real_unbind_dim=-2)).transpose(1, 2)
            for t in (parts.norm_q(query), parts.norm_k(key))
        )
        mixed = image_rotary_emb.attend(self.layer, query, key, value.transpose(1, 2))
        return cast(Tensor, parts.to_out[1](parts.to_out[0](mixed.flatten(2, 3).type_as(query))))


def _prepare_cosmos(network: nn.Module) -> Call:
    blocks: Any = cast(Any, network).transformer_blocks
    installed = blocks[0].attn1.processor
    if isinstance(installed, CausalCosmosProcessor):
        return installed.call
    call = Call()
    for layer, block in enumerate(blocks):
        block.attn1.set_processor(CausalCosmosProcessor(call, layer))
    rope: nn.Module = cast(Any, network).rope
    rope.register_forward_pre_hook(call.lengthen, with_kwargs=True)
    rope.register_forward_hook(_Rotary(call, axis=0))
    learned: nn.Module | None = cast(Any, network).learnable_pos_embed
    if learned is not None:
        learned.register_forward_pre_hook(call.lengthen, with_kwargs=True)
        learned.register_forward_hook(_Learned(call))
    return call


class _Learned:
    """Cuts learned positions down to the frames of a causal pass."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, module: nn.Module, args: tuple[Any, ...], table: Tensor) -> Tensor:
        return table if self.call.frames is None else self.call.chosen(table, 1)


def _ask_cosmos(network: nn.Module, x: Tensor, t: Tensor, text: Tensor, tokens: int) -> Tensor:
    config, dtype = _config(network), network_dtype(network)
    padding = x.new_zeros(1, 1, *x.shape[3:], dtype=dtype) if config.concat_padding_mask else None
    # A model that also continues videos has a channel that says which frames are given; here none are.
    condition = x.new_zeros(x.shape[0], 1, *x.shape[2:], dtype=dtype) if config.in_channels > x.shape[1] else None
    out: Tensor = network(
        x.to(dtype),
        timestep=(t[:, None, :, None, None] if t.ndim == 2 else t) / COSMOS_TIMES,
        encoder_hidden_states=text.to(dtype),
        condition_mask=condition,
        padding_mask=padding,
        return_dict=False,
    )[0]
    return out


_COSMOS = Family(_prepare_cosmos, _ask_cosmos, _frame_tokens, lambda network: int(_config(network).max_size[0]))
