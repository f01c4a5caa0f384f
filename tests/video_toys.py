"""Tiny video transformers of diffusers with random weights, and clips and captions for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, CosmosTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from raydistill.config.models import CausalConfig, GeneratorConfig
from raydistill.diffusion.process import Process
from raydistill.models.score import LocalScore, Score
from raydistill.recipes.online import Online
from raydistill.signals import JsonValue

CHANNELS, SIDE, TEXT, TOKENS = 3, 4, 10, 5
FLOW: dict[str, JsonValue] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 5.0,
}


def tiny_wan(seed: int = 0, *, dtype: torch.dtype = torch.float32, layers: int = 2, heads: int = 2) -> nn.Module:
    """Two blocks, 2×2 patches; 20 thousand parameters."""
    return _seeded(
        seed,
        dtype,
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def tiny_cosmos(seed: int = 0, *, dtype: torch.dtype = torch.float32, learned: bool = True) -> nn.Module:
    """Two blocks with learned positions besides the rotary ones."""
    return _seeded(
        seed,
        dtype,
        CosmosTransformer3DModel,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        adaln_lora_dim=8,
        max_size=(32, 16, 16),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable" if learned else None,
    )


def tiny_cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=1,
        sample_width=SIDE,
        sample_height=SIDE,
        max_text_seq_length=TOKENS,
    )


FAMILIES = {"wan": tiny_wan, "cosmos": tiny_cosmos}


def clips(samples: int, frames: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise in the shape of latents, [samples, channels, frames, height, width]."""
    return torch.randn(
        samples, CHANNELS, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def captions(samples: int, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random text embeddings."""
    g = torch.Generator().manual_seed(seed)
    return {"prompt_embeds": torch.randn(samples, TOKENS, TEXT, generator=g, dtype=dtype)}


def _seeded(seed: int, dtype: torch.dtype, kind: type, **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(**settings)
        with torch.no_grad():  # large enough that every part of the network matters
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return nn.Module.to(network.eval(), dtype)


def causal_student(network: nn.Module, *, chunk_frames: int = 2, context_noise: float = 0.1) -> nn.Module:
    """A network as a student of three steps that makes chunks."""
    settings: Any = network
    settings.process = Process.from_scheduler(FLOW)
    settings.generator = GeneratorConfig(
        t_list=(1.0, 0.9, 0.5, 0.0), causal=CausalConfig(chunk_frames=chunk_frames, context_noise=context_noise)
    )
    return network


def teacher(network: nn.Module, *, guidance: float = 3.0, chunk_frames: int | None = None) -> Online:
    """A network as a teacher that is asked online, with a critic that is its twin."""
    process = Process.from_scheduler(FLOW)
    score = Score(network, process, guidance=guidance, chunk_frames=chunk_frames)
    return Online(LocalScore(score), process, score, copy.deepcopy(network).requires_grad_(True))


def video_batch(samples: int, frames: int = 4, *, seed: int = 0) -> dict[str, Tensor]:
    """Clips and captions with a negative prompt; the first sample does not count if there are several."""
    weight = torch.ones(samples)
    weight[0] = 0.0 if samples > 1 else 1.0
    return {
        "latents": clips(samples, frames, seed=100 + seed),
        "latent_shape": torch.tensor([[CHANNELS, frames, SIDE, SIDE]]).repeat(samples, 1),
        **captions(samples, seed=200 + seed),
        "empty_embeds": captions(1, seed=300)["prompt_embeds"].repeat(samples, 1, 1),
        "weight": weight,
    }
