"""Tiny denoisers of diffusers with random weights, and folders of them as pipelines and exports have them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

TEXT_WIDTH = 16
POOLED_WIDTH = 8
SDXL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 4,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_sdxl(seed: int = 0, **overrides: object) -> UNet2DConditionModel:
    """A UNet in the manner of SDXL: two text widths, size conditioning; 128 thousand parameters."""
    return _seeded(UNet2DConditionModel, seed, {**SDXL, **overrides})


def tiny_unet(seed: int = 0, **overrides: object) -> UNet2DModel:
    """A UNet without text."""
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return _seeded(UNet2DModel, seed, {**settings, **overrides})


def tiny_sd3(seed: int = 0, **overrides: object) -> SD3Transformer2DModel:
    """A transformer in the manner of Stable Diffusion 3."""
    settings = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED_WIDTH,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    }
    return _seeded(SD3Transformer2DModel, seed, {**settings, **overrides})


def tiny_pixart(seed: int = 0, **overrides: object) -> PixArtTransformer2DModel:
    """A transformer in the manner of PixArt, which predicts a variance besides."""
    settings = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
        "caption_channels": TEXT_WIDTH,
        "use_additional_conditions": True,
        "attention_type": "default",
    }
    return _seeded(PixArtTransformer2DModel, seed, {**settings, **overrides})


def save_pipeline(network: torch.nn.Module, folder: Path, scheduler: object = None, *, inside: str = "unet") -> Path:
    """`folder` with the denoiser in `inside` and its scheduler in `scheduler/`, as a pipeline has them."""
    network.save_pretrained(folder / inside)
    save_scheduler(scheduler or DDPMScheduler(**SCHEDULE), folder / "scheduler")
    return folder


def save_scheduler(scheduler: object, folder: Path) -> None:
    """The configuration of a scheduler of diffusers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": type(scheduler).__name__, **dict(scheduler.config)}
    (folder / "scheduler_config.json").write_text(json.dumps(config))


def conditioning(samples: int, *, seed: int = 0, tokens: int = 5) -> dict[str, torch.Tensor]:
    """Random text embeddings and the size conditioning of 64×64 images."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(samples, tokens, TEXT_WIDTH, generator=generator),
        "pooled": torch.randn(samples, POOLED_WIDTH, generator=generator),
        "time_ids": torch.tensor([[64.0, 48.0, 0.0, 4.0, 64.0, 64.0]]).expand(samples, 6).clone(),
    }


def _seeded(kind: type, seed: int, settings: dict[str, object]):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(**settings)
        with torch.no_grad():  # large enough that every part of the network matters
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


def original_names(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of a UNet as checkpoints in one file have them, by the names of Stability's own code."""
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)}
    places |= {f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1)}
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places |= {"mid_block.resnets.1": "middle_block.2"}
    at = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            at += 1
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{at}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{at}.1"
        if block.downsamplers:
            at += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
    at = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            at += 1
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{at}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{at}.1"
        if block.upsamplers:
            after = 2 if hasattr(block, "attentions") else 1
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{at}.{after}.conv"
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    found = {}
    for name, tensor in unet.state_dict().items():
        ours = next(place for place in sorted(places, key=len, reverse=True) if name.startswith(f"{place}."))
        rest = name.removeprefix(f"{ours}.")
        if ".resnets." in name:
            part, _, kind = rest.partition(".")
            rest = f"{inner[part]}.{kind}"
        found[f"model.diffusion_model.{places[ours]}.{rest}"] = tensor
    return found
