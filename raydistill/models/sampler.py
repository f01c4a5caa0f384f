"""Deterministic samplers of diffusers with the states on their way: exact alpha, sigma and time of each of them.

States are x_t = alpha x0 + sigma eps throughout, whatever scale a scheduler works in. Samplers of first order (DDIM and
Euler, of flows and of noise schedules) all take the one step x' = alpha' x0 + sigma' eps with the x0 and eps that a
prediction stands for: Song et al. 2021, arXiv 2010.02502, Eq. 12 with eta 0; in x / alpha that is Karras et al. 2022,
arXiv 2206.00364, Eq. 4. Those of second order are diffusers' own, on their own grid with the wanted times put in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from raydistill.diffusion.process import Process, convert_at
from raydistill.errors import ConfigError
from raydistill.signals import JsonValue

SAME_TIME = 1e-6
"""Times that differ by no more are one time."""
FIRST_ORDER = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler")
SECOND_ORDER = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
DETERMINISTIC = {
    "DDPMScheduler": "DDIMScheduler",
    "PNDMScheduler": "DDIMScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "CogVideoXDPMScheduler": "CogVideoXDDIMScheduler",
}
"""What stands for schedulers that draw noise on the way, or whose states lie off the path."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [samples, …], what the network is told [samples]) → prediction in the network's own type."""


@dataclass(frozen=True, slots=True)
class Node:
    """A place where the sampler stands before a step, or at its end."""

    t: float
    """On the scale from 0 (clean) to 1 (noise)."""
    alpha: float
    sigma: float
    told: float
    """What the network is told here."""


class Sampler:
    """A sampler that stands exactly at some wanted times."""

    def __init__(
        self,
        scheduler: Mapping[str, JsonValue],
        process: Process,
        *,
        steps: int,
        keep_t: Sequence[float],
        insert: bool,
        where: str,
    ):
        """`scheduler` is a scheduler_config.json and `process` what it says. The sampler takes `steps` steps, and with
        `insert` one more for every time of `keep_t` that is none of its own.

        `ConfigError`, that begins with `where`, for schedulers that are not known and for times that cannot be kept.
        """
        self.process = process
        named = str(scheduler.get("_class_name"))
        self.name = DETERMINISTIC.get(named, named)
        if self.name not in (*FIRST_ORDER, *SECOND_ORDER):
            raise ConfigError(
                f"{where}.model.scheduler: wanted one of {', '.join((*FIRST_ORDER, *SECOND_ORDER))}, found {named}. "
                "Name the folder of one with the same noise schedule."
            )
        if scheduler.get("use_dynamic_shifting"):
            raise ConfigError(
                f"{where}.model.scheduler: wanted a shift that is one number, found use_dynamic_shifting, which "
                "depends on the size. Name the folder of a scheduler with the shift of this size."
            )
        # diffusers writes settings of other schedulers into these files too and passes over them with a warning.
        kind: Any = getattr(diffusers, self.name)
        self._scheduler: Any = kind.from_config(dict(scheduler))
        self._scheduler.set_timesteps(steps)
        own = self._own_nodes()
        self.nodes, self.kept = _with_times(own, self._end(), keep_t, process, insert, self._first_order, where)

    @property
    def num_steps(self) -> int:
        """Steps that it takes, those at wanted times among them."""
        return len(self.nodes) - 1

    @property
    def _first_order(self) -> bool:
        return self.name in FIRST_ORDER

    def _own_nodes(self) -> list[Node]:
        scheduler, process = self._scheduler, self.process
        timesteps = [float(t) for t in scheduler.timesteps]
        if self.name.endswith("DDIMScheduler"):
            alpha_bar = scheduler.alphas_cumprod.double()
            pairs = [(float(alpha_bar[int(t)].sqrt()), float((1 - alpha_bar[int(t)]).sqrt())) for t in timesteps]
        else:
            pairs = [self._scaled(float(sigma)) for sigma in scheduler.sigmas[: len(timesteps)]]
        times = [s for _, s in pairs] if process.kind == "flow" else [t / process.num_timesteps for t in timesteps]
        return [Node(t, a, s, told) for t, (a, s), told in zip(times, pairs, timesteps, strict=True)]

    def _scaled(self, sigma: float) -> tuple[float, float]:
        """alpha and sigma of a scheduler's own sigma, which is sigma / alpha unless the process is a flow."""
        if self.process.kind == "flow":
            return 1 - sigma, sigma
        alpha = 1 / (1 + sigma**2) ** 0.5
        return alpha, sigma * alpha

    def _end(self) -> Node:
        if self.name.endswith("DDIMScheduler"):
            alpha_bar = float(self._scheduler.final_alpha_cumprod)
            return Node(0.0, alpha_bar**0.5, (1 - alpha_bar) ** 0.5, 0.0)
        alpha, sigma = self._scaled(float(self._scheduler.sigmas[-1]))
        return Node(0.0, alpha, sigma, 0.0)

    @torch.no_grad()
    def __call__(self, noise: Tensor, predict: Predict) -> tuple[Tensor, Tensor]:
        """The sample [samples, …] that `noise` leads to, and the states at the wanted times [samples, times, …], fp32.

        `predict` is asked once per step.
        """
        step = self._first_order_step() if self._first_order else self._scheduler_step()
        x_t = noise.float() * self._first_scale()
        states: dict[int, Tensor] = {}
        for index, node in enumerate(self.nodes[:-1]):
            if index in self.kept:
                states[index] = x_t
            told = torch.full((len(x_t),), node.told, device=x_t.device, dtype=torch.float32)
            x_t = step(index, predict(x_t, told), x_t)
        return x_t, torch.stack([states[index] for index in self.kept], dim=1)

    def _first_scale(self) -> float:
        """By what noise is multiplied to stand at the first node: Euler's steps on noise schedules begin at sigma."""
        if self.name != "EulerDiscreteScheduler":
            return 1.0
        return float(self._scheduler.init_noise_sigma) * self.nodes[0].alpha

    def _first_order_step(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        kind = self.process.prediction_type
        clip = self._scheduler.config.get("clip_sample_range", 1.0) if self._clips() else None

        def step(index: int, said: Tensor, x_t: Tensor) -> Tensor:
            here, there = self.nodes[index], self.nodes[index + 1]
            alpha, sigma = (torch.tensor(v, dtype=torch.float64, device=x_t.device) for v in (here.alpha, here.sigma))
            x, said = x_t.double(), said.double()
            if self.process.kind == "flow" and kind == "flow":
                return (x + (there.sigma - here.sigma) * said).float()  # defined at alpha 0, where eps is not
            x0 = convert_at(said, x, alpha, sigma, source=kind, target="sample")
            eps = convert_at(said, x, alpha, sigma, source=kind, target="epsilon")
            if clip is not None:
                x0 = x0.clamp(-clip, clip)
            return (there.alpha * x0 + there.sigma * eps).float()

        return step

    def _clips(self) -> bool:
        return self.name == "DDIMScheduler" and bool(self._scheduler.config.get("clip_sample"))

    def _scheduler_step(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        scheduler = copy.deepcopy(self._scheduler)  # it remembers predictions of the steps before
        flow = self.process.kind == "flow"
        sigmas = [node.sigma if flow else node.sigma / node.alpha for node in self.nodes]
        scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        scheduler.timesteps = torch.tensor([node.told for node in self.nodes[:-1]])
        scheduler.num_inference_steps = len(self.nodes) - 1
        scheduler.set_begin_index(0)  # which is counted from there: told times need not differ

        def step(index: int, said: Tensor, x_t: Tensor) -> Tensor:
            done: tuple[Tensor, ...] = scheduler.step(said, scheduler.timesteps[index], x_t, return_dict=False)
            return done[0].float()

        return step


def _with_times(
    own: Sequence[Node],
    end: Node,
    keep_t: Sequence[float],
    process: Process,
    insert: bool,
    first_order: bool,
    where: str,
) -> tuple[list[Node], list[int]]:
    """The nodes with the wanted times among them and the end behind them, and which nodes the wanted ones are."""
    nodes = list(own)
    for t in keep_t:
        if min(abs(node.t - t) for node in nodes) <= SAME_TIME:
            continue
        grid = ", ".join(f"{node.t:.6g}" for node in own[:8]) + (", …" if len(own) > 8 else "")
        if not insert:
            raise ConfigError(
                f"{where}.keep_t: wanted times at which the sampler stands ({grid}), found {t:g}; use those, or set "
                "off_grid: insert."
            )
        if t > own[0].t and not (first_order and process.kind == "flow"):
            raise ConfigError(
                f"{where}.keep_t: wanted times from {own[0].t:.6g} down, where the sampler begins, found {t:g}; begin "
                f"with {own[0].t:.6g}."
            )
        alpha, sigma = (float(value) for value in process.at_time(torch.tensor(t, dtype=torch.float64)))
        nodes.append(Node(t, alpha, sigma, process.num_timesteps * t))
    nodes.sort(key=lambda node: -node.t)
    kept = [min(range(len(nodes)), key=lambda i: abs(nodes[i].t - t)) for t in keep_t]
    return [*nodes, end], kept
