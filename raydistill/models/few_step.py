"""Samples of students of few steps: all frames at once here, chunk by chunk in `rollout`.

From noise, at the times t_0 > … > t_K = 0: predict the clean sample, noise it to the next time, and so on. Source: Song
et al. 2023, arXiv 2303.01469, Alg. 1; with `renoise: same`, Song et al. 2021, arXiv 2010.02502, Eq. 12 (DDIM).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from raydistill.config.models import GeneratorConfig
from raydistill.diffusion.process import Process
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import predict
from raydistill.models.rollout import Noise, Rollout
from raydistill.signals import sample_seed


def generate(
    network: nn.Module,
    process: Process,
    generator: GeneratorConfig,
    noise: Noise,
    conditioning: Mapping[str, Tensor],
    *,
    steps: int | None = None,
) -> Tensor:
    """Clean latents, fp32, that a student makes of `noise` (see `rollout.Noise`) after the first `steps` of its steps.

    A causal student makes chunk after chunk, each in that many steps.
    """
    times = generator.t_list[:-1]
    count = len(times) if steps is None else steps
    if generator.causal is not None:
        causal = CausalDenoiser(network, generator.causal.chunk_frames)
        return Rollout(causal, process, generator)(noise, conditioning, exit_step=count - 1)
    x = noise("start").float()
    clean = x
    for step in range(count):
        t = torch.full((len(x),), times[step], dtype=torch.float64, device=x.device)
        clean = process.clean_of(predict(network, x, process.told(t), conditioning), x, t)
        if step + 1 < count:
            after = torch.full_like(t, times[step + 1])
            eps = noise(f"step {step + 1}") if generator.renoise == "fresh" else _implied(process, x, clean, t)
            x = process.noised(clean, eps, after)
    return clean


def _implied(process: Process, x: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The noise that is left of x_t when the clean sample is taken out."""
    shape = (-1, *(1,) * (x.ndim - 1))
    alpha, sigma = (level.view(shape) for level in process.at_time(t))
    return ((x.double() - alpha * clean.double()) / sigma).float()


def seeded_noise(names: list[str], start: Tensor, seed: int) -> Noise:
    """Noise for the samples called `names`, which begin with `start`; what comes later follows from the names alone."""

    def noise(use: str) -> Tensor:
        if use == "start":
            return start
        draws = [np.random.Philox(sample_seed(name, 0, f"few steps {use}", seed)) for name in names]
        values = [np.random.Generator(d).standard_normal(tuple(start.shape[1:]), dtype=np.float32) for d in draws]
        return torch.from_numpy(np.stack(values)).to(start.device)

    return noise
