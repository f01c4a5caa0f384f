"""A video whose frames are one number each, x_k = ρ x_(k-1) + √(1-ρ²) ε: everything about it is known exactly.

As a denoiser it is a flow: x_t = (1-t) x0 + t eps, prediction eps - x0. `Ar1Student` stands for a network, `Ar1Causal`
for `CausalDenoiser` over it, with chunks of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from video_toys import FLOW

from raydistill.config.models import CausalConfig, GeneratorConfig
from raydistill.diffusion.process import Process

FRAMES = 5
RHO = 0.8
TIMES = (1.0, 0.6, 0.0)


def videos(samples: int, *, rho: float = RHO, frames: int = FRAMES, seed: int = 0) -> Tensor:
    """[samples, 1, frames, 1, 1] fp32 of the process, in its equilibrium."""
    eps = torch.randn(samples, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = [eps[:, 0]]
    for k in range(1, frames):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * eps[:, k])
    return torch.stack(x, 1)[:, None, :, None, None].float()


def clean_given_past(x_t: Tensor, t: Tensor, past: Tensor, rho: Tensor | float, spread: Tensor | float) -> Tensor:
    """E[x0 | x_t, the frame before] of N(ρ past, spread²)."""
    mean = rho * past
    gain = spread**2 * (1 - t) / ((1 - t) ** 2 * spread**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def end_of_path(x_t: Tensor, t: Tensor, past: Tensor, rho: Tensor | float, spread: Tensor | float) -> Tensor:
    """Where the ODE of that conditional leads x_t at time 0: in a Gaussian, the same quantile."""
    mean = rho * past
    return mean + spread * (x_t - (1 - t) * mean) / ((1 - t) ** 2 * spread**2 + t**2).sqrt()


def clean_given_all(x_t: Tensor, t: Tensor, covariance: Tensor) -> Tensor:
    """E[x0 | all frames of x_t] of N(0, covariance [frames, frames]); t is one for each sample [samples]."""
    flat, a = x_t.flatten(1).double(), (1 - t.double()).view(-1, 1, 1)
    noise = t.double().view(-1, 1, 1) ** 2 * torch.eye(len(covariance), dtype=torch.float64)
    solved = torch.linalg.solve(a**2 * covariance + noise, flat[..., None])
    return (a * covariance @ solved)[..., 0].view_as(x_t).to(x_t.dtype)


def covariance_of(rho: float, spread: float, frames: int = FRAMES) -> Tensor:
    """Of frames x_0 = first spread 1, x_k = rho x_(k-1) + spread ε."""
    mixing = torch.eye(frames, dtype=torch.float64)
    for k in range(1, frames):
        mixing[k, :k] = rho * mixing[k - 1, :k]
        mixing[k, k] = spread
    return mixing @ mixing.T


class Ar1Student(nn.Module):
    """A network of two numbers: ρ and the spread of a frame given the one before; the first frame is N(0, 1).

    `gives` is what its prediction stands for: the mean of the clean frame, as a denoiser's, or the end of its path, as
    a student's of few steps.
    """

    def __init__(self, rho: float, spread: float, gives: Literal["mean", "end"]):
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(rho, dtype=torch.float64))
        self.spread = nn.Parameter(torch.tensor(spread, dtype=torch.float64))
        self.gives = gives
        self.process = Process.from_scheduler(FLOW)
        self.generator = GeneratorConfig(t_list=TIMES, causal=CausalConfig(chunk_frames=1, context_noise=0.0))

    def forward(self, x_t: Tensor, t: Tensor, past: Tensor, first: bool | Tensor) -> Tensor:
        """The flow at x_t; all of one shape, `first` where there is no past."""
        first = torch.as_tensor(first).expand_as(past)
        rho = torch.where(first, torch.zeros_like(self.rho), self.rho)
        spread = torch.where(first, torch.ones_like(self.spread), self.spread)
        find = clean_given_past if self.gives == "mean" else end_of_path
        clean = find(x_t.double(), t.double(), past.double(), rho, spread)
        # At time 0 a flow says nothing of the clean frame, which x_t then is.
        return torch.where(t > 0, (x_t.double() - clean) / t.double().clamp_min(1e-12), 0.0).float()


class Ar1Causal:
    """`CausalDenoiser` over `Ar1Student`."""

    def __init__(self, network: Ar1Student, chunk_frames: int):
        assert chunk_frames == 1
        self.network = network

    def spans(self, frames: int) -> tuple[tuple[int, int], ...]:
        return tuple((k, k + 1) for k in range(frames))

    def new_cache(self, frames: int) -> dict[int, Tensor]:
        return {}

    def predict(
        self, x_t: Tensor, told: Tensor, conditioning: Mapping[str, Tensor], *, clean: Tensor, clean_t: Tensor
    ) -> Tensor:
        assert not clean_t.any()
        past = torch.cat([torch.zeros_like(clean[:, :, :1]), clean[:, :, :-1]], 2)
        first = torch.zeros_like(x_t, dtype=torch.bool)
        first[:, :, 0] = True
        return self.network(x_t, (told / 1000)[:, None, :, None, None].expand_as(x_t), past, first)

    def predict_chunk(
        self, x_t: Tensor, told: Tensor, conditioning: Mapping[str, Tensor], cache: dict[int, Tensor], start: int
    ) -> Tensor:
        past = cache[start - 1] if start else torch.zeros_like(x_t)
        out = self.network(x_t, (told / 1000).view(-1, 1, 1, 1, 1).expand_as(x_t), past, start == 0)
        if not torch.is_grad_enabled():
            cache[start] = x_t
        return out


class Known:
    """A teacher by its formula: (x_t, t, context) → clean video."""

    def __init__(self, clean: Callable[[Tensor, Tensor, Tensor | None], Tensor]):
        self._clean = clean

    def start(self, x_t: Tensor, t: Tensor, batch: Any, context: Tensor | None = None) -> Callable[[], Tensor]:
        found = self._clean(x_t, t, context)
        return lambda: found


def autoregressive(rho: float = RHO) -> Known:
    """The teacher that sees the frame before."""
    exact = Ar1Causal(Ar1Student(rho, (1 - rho**2) ** 0.5, "mean"), 1)

    def clean(x_t: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        with torch.no_grad():
            flow = exact.predict(x_t, 1000 * t, {}, clean=context, clean_t=torch.zeros_like(t))
        return x_t - t[:, None, :, None, None].float() * flow

    return Known(clean)


def bidirectional(rho: float = RHO) -> Known:
    """The teacher that sees all frames, of one time."""
    covariance = covariance_of(rho, (1 - rho**2) ** 0.5)
    return Known(lambda x_t, t, context: clean_given_all(x_t, t, covariance))
