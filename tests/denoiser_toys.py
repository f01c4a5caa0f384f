"""Tiny denoisers with a noise schedule, signals of made-up teachers and batches of them, for recipes and trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.process import PredictionType, Process
from raydistill.recipes.base import TeacherView
from raydistill.signals import JsonValue

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow")
DDPM: dict[str, JsonValue] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012,
}  # fmt: skip
FLOW: dict[str, JsonValue] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3}
CHANNELS, SIDE = 3, 8
TEXT, POOLED = 8, 6


def process_of(kind: PredictionType = "epsilon", scheduler: Mapping[str, JsonValue] = DDPM) -> Process:
    return Process.from_scheduler({**scheduler, "prediction_type": kind})


def tiny_unet(
    kind: PredictionType = "epsilon", *, seed: int = 0, width: int = 8, scheduler: Mapping[str, JsonValue] = DDPM
) -> UNet2DConditionModel:
    """A random SDXL-shaped UNet in fp32 and eval mode; 33 thousand parameters at width 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            transformer_layers_per_block=1,
            attention_head_dim=(1, 2),
            norm_num_groups=2,
            cross_attention_dim=TEXT,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=POOLED + 6 * 4,
            use_linear_projection=True,
        )
    unet.process = process_of(kind, scheduler)
    unet.scheduler_config = {**scheduler, "prediction_type": {"flow": "flow_prediction"}.get(kind, kind)}
    unet.kept = None
    return unet.eval()


def view(
    name: str,
    weight: float,
    *,
    kind: PredictionType = "epsilon",
    taps: Mapping[str, Sequence[int]] | None = None,
    scheduler: Mapping[str, JsonValue] = DDPM,
    noise: NoiseConfig | None = None,
) -> TeacherView:
    """A teacher whose signal holds predictions of `kind` and `taps` of these shapes."""
    noise = noise or NoiseConfig(prediction_type=kind)
    facts: dict[str, JsonValue] = {
        "prediction_type": kind,
        "own_prediction_type": "epsilon",
        "process": process_of("epsilon", scheduler).to_json(),
        "noise": noise.model_dump(mode="json"),
        "taps": {tap: {"module": "mid_block", "shape": list(shape)} for tap, shape in (taps or {}).items()},
    }
    return TeacherView(name, weight, facts)


def batch_of(rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Samples with text, noise and timesteps over the whole range, without any signal; all of them count."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    return {
        "latents": normal(rows, CHANNELS, SIDE, SIDE),
        "noise": normal(rows, CHANNELS, SIDE, SIDE),
        "timestep": torch.randint(0, 1000, (rows,), generator=g),
        "prompt_embeds": normal(rows, 4, TEXT),
        "pooled": normal(rows, POOLED),
        "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(rows, 1).to(dtype),
        "empty_embeds": normal(1, 4, TEXT).repeat(rows, 1, 1),
        "empty_pooled": normal(1, POOLED).repeat(rows, 1),
        "weight": torch.ones(rows),
    }


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, which are forgotten in the module."""
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found
