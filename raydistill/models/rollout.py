"""Making a video chunk by chunk in a few steps, for samples and for training on a student's own context.

For each chunk, at the times t_0 > … > t_K = 0 of the student: predict the clean chunk, noise it to the next time, and
so on; then show the finished chunk to the network once more, at the time of context, so that later chunks see it.
Source: Huang et al. 2025, arXiv 2506.08009, Alg. 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.config.models import GeneratorConfig
from raydistill.diffusion.process import Process
from raydistill.models.causal import CausalDenoiser
from raydistill.models.causal_attention import KVCache

Noise: TypeAlias = Callable[[str], Tensor]
"""Standard normal noise for a whole video [samples, channels, frames, height, width], by the name of its use: `start`,
`step 1`, `step 2` …, `context`. The same for a name whenever it is asked."""


class Rollout:
    """How a causal student makes videos: its network, its times and its noise between them."""

    def __init__(self, causal: CausalDenoiser, process: Process, generator: GeneratorConfig):
        """`generator.causal` says at which time finished chunks are kept as context."""
        assert generator.causal is not None, "a rollout makes chunks"
        self.causal, self.process = causal, process
        self.times = generator.t_list[:-1]
        """Times at which the network predicts, falling."""
        self._renoise, self._context = generator.renoise, generator.causal.context_noise

    def __call__(
        self, noise: Noise, conditioning: Mapping[str, Tensor], *, exit_step: int | None = None
    ) -> Float[Tensor, "samples channels frames height width"]:
        """Clean latents, fp32.

        With `exit_step` (of 0 … K-1) every chunk ends with the prediction of that step, which alone is run with
        gradients, where they are on; by default all steps are taken. Context never carries gradients.
        """
        last = len(self.times) - 1 if exit_step is None else exit_step
        assert 0 <= last < len(self.times), f"exit step {exit_step} of {len(self.times)}"
        draw = cache(noise)
        start = draw("start")
        frames = start.shape[2]
        known, parts = self.causal.new_cache(frames), []
        for a, b in self.causal.spans(frames):
            clean = self._chunk(start, draw, conditioning, known, (a, b), last)
            parts.append(clean)
            if b < frames:
                with torch.no_grad():
                    self._remember(clean.detach(), draw, conditioning, known, (a, b))
        return torch.cat(parts, 2)

    def _chunk(
        self,
        start: Tensor,
        draw: Noise,
        conditioning: Mapping[str, Tensor],
        known: KVCache,
        span: tuple[int, int],
        last: int,
    ) -> Tensor:
        """The clean chunk that step `last` predicts."""
        a, b = span
        x = start[:, :, a:b].float()
        with torch.no_grad():
            for step in range(last):
                clean = self._clean(x, self.times[step], conditioning, known, a)
                after = self.times[step + 1]
                if self._renoise == "fresh":
                    eps = draw(f"step {step + 1}")[:, :, a:b]
                else:
                    eps = self._implied(clean, x, self.times[step])
                x = self.process.noised(clean, eps, _times(x, after))
        return self._clean(x, self.times[last], conditioning, known, a)

    def _remember(
        self,
        clean: Tensor,
        draw: Noise,
        conditioning: Mapping[str, Tensor],
        known: KVCache,
        span: tuple[int, int],
    ) -> None:
        a, b = span
        if self._context > 0:
            clean = self.process.noised(clean, draw("context")[:, :, a:b], _times(clean, self._context))
        self.causal.predict_chunk(clean, self.process.told(_times(clean, self._context)), conditioning, known, a)

    def _clean(self, x: Tensor, t: float, conditioning: Mapping[str, Tensor], known: KVCache, first: int) -> Tensor:
        own = self.causal.predict_chunk(x, self.process.told(_times(x, t)), conditioning, known, first)
        return self.process.clean_of(own, x, _times(x, t))

    def _implied(self, clean: Tensor, x: Tensor, t: float) -> Tensor:
        """The noise that is left of x_t when the clean chunk is taken out."""
        alpha, sigma = self.process.at_time(torch.tensor(t, dtype=torch.float64))
        return ((x.double() - alpha.to(x.device) * clean.double()) / sigma.to(x.device)).float()


def _times(like: Tensor, t: float) -> Tensor:
    return torch.full((len(like),), t, dtype=torch.float64, device=like.device)
