"""Images from denoisers: the same noise and captions for every model, with the samplers of diffusers.

Variance-preserving models are sampled with DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12), flows with Euler steps.
Timesteps end at the noisiest one ("trailing": Lin et al. 2023, arXiv 2305.08891, Sec. 3.4), so that a model with zero
terminal SNR starts where it was trained to start.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from raydistill.diffusion.process import PredictionType, Process
from raydistill.models.denoiser import predict
from raydistill.signals import sample_seed

EMPTY = {"prompt_embeds": "empty_embeds", "pooled": "empty_pooled"}
"""Conditioning by the caption, and what stands for the empty caption."""
STREAM = "sample"
"""Stream of the noise that samples begin with: another one than that of training."""

Step = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images are sampled."""

    steps: int
    guidance_scale: float = 1.0
    """w of `uncond + w (cond - uncond)`; 1 needs one forward pass per step."""
    clip: bool = False
    """Clip what is predicted of the clean image to [-1, 1]: right for pixels, wrong for latents."""


def first_noise(row_id: str, number: int, shape: Sequence[int], seed: int) -> Float[Tensor, "*shape"]:
    """The noise that image `number` of a caption begins with: fp32, from its row's id alone."""
    generator = np.random.Generator(np.random.Philox(sample_seed(row_id, number, STREAM, seed)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def sample(
    network: nn.Module, process: Process, noise: Float[Tensor, "b c h w"], given: Mapping[str, Tensor], how: Sampling
) -> Float[Tensor, "b c h w"]:
    """Latents (or pixels) in fp32 that `network` makes of `noise`, conditioned on what is `given`.

    `given` has the keys of a training batch: `prompt_embeds`, `pooled`, `time_ids`, `empty_embeds`, `empty_pooled`, as
    far as the model has them.
    """
    timesteps, kind, step = _flow(process, how) if process.kind == "flow" else _ddim(process, how)
    device = next(network.parameters()).device
    x_t = noise.to(device)
    conditioning = {name: value.to(device) for name, value in given.items()}
    for index, t in enumerate(timesteps):
        times = torch.full((len(x_t),), t, device=device)
        own = guided(network, x_t, process.times(times), conditioning, how.guidance_scale)
        output = process.convert(own.float(), x_t, times, source=process.prediction_type, target=kind)
        x_t = step(output, index, x_t)
    return x_t


def guided(
    network: nn.Module, x_t: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance_scale: float
) -> Tensor:
    """`uncond + w (cond - uncond)`: Ho & Salimans 2022, arXiv 2207.12598, Eq. 6, whose w is ours less 1."""
    cond = predict(network, x_t, times, given)
    if guidance_scale == 1 or "empty_embeds" not in given:
        return cond
    empty = {name: given.get(EMPTY.get(name, name), value) for name, value in given.items()}
    uncond = predict(network, x_t, times, empty)
    return uncond + guidance_scale * (cond - uncond)


def trailing(num_timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from the noisiest one down, evenly spaced."""
    spaced = np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)).astype(int) - 1
    return [int(t) for t in spaced[:steps]]


def _ddim(process: Process, how: Sampling) -> tuple[list[int], PredictionType, Step]:
    alpha_bar = process.alphas**2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    kind: PredictionType = "v_prediction" if process.prediction_type == "flow" else process.prediction_type
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=process.num_timesteps,
        trained_betas=betas.numpy(),
        prediction_type=kind,
        clip_sample=how.clip,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(how.steps)
    timesteps = [int(t) for t in scheduler.timesteps]

    def step(output: Tensor, index: int, x_t: Tensor) -> Tensor:
        done: tuple[Tensor, ...] = scheduler.step(
            output, timesteps[index], x_t, use_clipped_model_output=how.clip, return_dict=False
        )
        return done[0]

    return timesteps, kind, step


def _flow(process: Process, how: Sampling) -> tuple[list[int], PredictionType, Step]:
    timesteps = trailing(process.num_timesteps, how.steps)
    # The process has its shift already, so the scheduler gets sigmas and none of its own.
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=process.num_timesteps, shift=1.0)
    scheduler.set_timesteps(sigmas=[float(process.sigmas[t]) for t in timesteps])

    def step(output: Tensor, index: int, x_t: Tensor) -> Tensor:
        done: tuple[Tensor, ...] = scheduler.step(output, scheduler.timesteps[index], x_t, return_dict=False)
        return done[0]

    return timesteps, "flow", step


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """An image with values in [0, 1] as the content of a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
