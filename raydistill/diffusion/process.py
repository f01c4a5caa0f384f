"""The diffusion process: how clean data becomes noise, and what a denoiser may predict of it.

Everywhere x_t = alpha(t) x0 + sigma(t) eps, and a prediction is a linear mix m0 x0 + m1 eps:

| kind           | m0        | m1       | D = alpha m1 - sigma m0 |
|----------------|-----------|----------|-------------------------|
| `epsilon`      | 0         | 1        | alpha                   |
| `sample`       | 1         | 0        | -sigma                  |
| `v_prediction` | -sigma(t) | alpha(t) | alpha² + sigma²         |
| `flow`         | -1        | 1        | alpha + sigma           |

Solving the two equations for x0 and eps turns a prediction p of one kind (m) into q of another (n):
q = (D_n p + (n0 m1 - n1 m0) x_t) / D_m. Sources: Salimans & Ho 2022, arXiv 2202.00512, App. D (v); Lipman et al. 2023,
arXiv 2210.02747, Eq. 23 (flow).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.signals import JsonValue

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow"]
Kind: TypeAlias = Literal["variance_preserving", "flow"]

_PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "flow",
    "flow": "flow",
}
"""Names in scheduler configurations, and ours."""
_BETAS = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "snr_shift_scale",
    "rescale_betas_zero_snr",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Process:
    """x_t = alpha(t) x0 + sigma(t) eps at the integer timesteps 0 … T-1 of a noise schedule."""

    alphas: Float[Tensor, " timesteps"]
    """alpha(t), fp64, on the CPU."""
    sigmas: Float[Tensor, " timesteps"]
    """sigma(t), fp64, on the CPU."""
    kind: Kind
    prediction_type: PredictionType
    """What the model that came with this scheduler predicts itself."""
    schedule: Mapping[str, JsonValue] = field(default_factory=dict)
    """The settings that alphas and sigmas were made from."""
    _devices: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_timesteps(self) -> int:
        """T: timesteps are 0 … T-1."""
        return len(self.alphas)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the timesteps `t` [samples], fp64, with the axes of `like` [samples, …] and its device."""
        if like.device not in self._devices:
            self._devices[like.device] = (self.alphas.to(like.device), self.sigmas.to(like.device))
        index = t.to(like.device).long()
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (table[index].reshape(shape) for table in self._devices[like.device])
        return alpha, sigma

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [samples, …] in fp32."""
        alpha, sigma = self.at(t, x0)
        return (alpha * x0.double() + sigma * eps.double()).float()

    def times(self, t: Tensor) -> Tensor:
        """What a network is told in place of the timestep `t`: t itself, for a flow T sigma(t) in fp32.

        diffusers' flow schedulers count time in multiples of sigma, so that a shift moves it too.
        """
        if self.kind == "variance_preserving":
            return t
        return (self.num_timesteps * self.at(t, t)[1]).float()

    def at_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, fp64, at times t of any shape on the scale from 0 (clean) to 1 (noise), on t's device.

        A flow's t is sigma itself. With betas t is the timestep over T, where between timesteps the logarithm of
        sigma / alpha is interpolated, as samplers with steps in between do (Karras et al. 2022, arXiv 2206.00364,
        Alg. 1's grid in diffusers); 0 is the clean data. `ConfigError` for times outside.
        """
        if bool((t < 0).any()) or bool((t > 1).any()):
            raise ConfigError(f"wanted times from 0 to 1, found {float(t.min()):g} to {float(t.max()):g}.")
        t = t.double()
        if self.kind == "flow":
            return 1 - t, t
        place = (self.num_timesteps * t).clamp(max=self.num_timesteps - 1)
        ratio = (self.sigmas.log() - self.alphas.log()).to(t.device)
        low = place.floor().long()
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        share = place - low
        # Where alpha ends at 0 its logarithm has no finite value, and none is needed unless it is asked for.
        between = torch.where(share == 0, ratio[low], ratio[low] + share * (ratio[high] - ratio[low]))
        alpha, sigma = torch.sigmoid(-2 * between).sqrt(), torch.sigmoid(2 * between).sqrt()
        clean = t == 0
        return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)

    def told(self, t: Tensor) -> Tensor:
        """What a network is told in place of times t on the scale from 0 to 1: T t, fp32, of the same shape."""
        return (self.num_timesteps * t.double()).float()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t in fp32 at times t on the scale from 0 to 1, one per sample [B] or per frame of a sample [B, T]."""
        alpha, sigma = (on_frames(level, x0) for level in self.at_time(t))
        return (alpha * x0.double() + sigma * eps.double()).float()

    def clean_of(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction of this process's own kind at x_t means; t as for `noised`."""
        alpha, sigma = (on_frames(level, x_t) for level in self.at_time(t))
        return convert_at(pred, x_t, alpha, sigma, source=self.prediction_type, target="sample")

    def own_of(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What a perfect prediction of this process's own kind at x_t says if x0 is behind it; t above 0."""
        alpha, sigma = (on_frames(level, x_t) for level in self.at_time(t))
        return convert_at(x0, x_t, alpha, sigma, source="sample", target=self.prediction_type)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: PredictionType) -> Tensor:
        """What a perfect prediction of `kind` says, in fp32."""
        m0, m1 = _mix(kind, *self.at(t, x0))
        return (m0 * x0.double() + m1 * eps.double()).float()

    def convert(
        self, pred: Tensor, x_t: Tensor, t: Tensor, *, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """The prediction `pred` of kind `source` as one of kind `target`; linear in `pred`, and so differentiable.

        Computed in fp64, returned in the wider dtype of `pred` and `x_t`. `ConfigError` where `source` says nothing:
        epsilon at alpha = 0, clean data at sigma = 0.
        """
        if source == target:
            return pred.to(torch.promote_types(pred.dtype, x_t.dtype))
        alpha, sigma = self.at(t, x_t)
        self._require_defined(source, _determinant(source, alpha, sigma), t)
        return convert_at(pred, x_t, alpha, sigma, source=source, target=target)

    def error_scale(self, t: Tensor, *, source: PredictionType, target: PredictionType) -> Float[Tensor, " samples"]:
        """By how much an error of kind `source` grows when it is stated for kind `target`: |D_target / D_source|, fp64.

        The squared error of the clean data is therefore `error_scale(t, source="epsilon", target="sample") ** 2`
        = (sigma/alpha)² times that of the noise.
        """
        alpha, sigma = self.at(t, t)
        if source == target:
            return torch.ones_like(alpha)
        self._require_defined(source, _determinant(source, alpha, sigma), t)
        return (_determinant(target, alpha, sigma) / _determinant(source, alpha, sigma)).abs()

    def snr(self, t: Tensor) -> Float[Tensor, " samples"]:
        """Signal-to-noise ratio alpha²/sigma² at the timesteps, fp64."""
        alpha, sigma = self.at(t, t)
        return (alpha / sigma) ** 2

    def undefined(self, kind: PredictionType, timesteps: tuple[int, int]) -> int | None:
        """The first timestep in [first, end) at which predictions of `kind` say nothing about the data, if any does."""
        first, end = timesteps
        values = _determinant(kind, self.alphas[first:end], self.sigmas[first:end])
        zeros = (values == 0).nonzero()
        return first + int(zeros[0]) if len(zeros) else None

    def _require_defined(self, kind: PredictionType, values: Tensor, t: Tensor) -> None:
        # Asking the table first spares a GPU the wait for its answer in all ordinary schedules.
        if self.undefined(kind, (0, self.num_timesteps)) is None or not bool((values == 0).any()):
            return
        raise ConfigError(
            f"timestep {int(t.flatten()[(values.flatten() == 0).nonzero()[0]])}: wanted a prediction that says "
            f"something about the image, found {kind} where the noise schedule leaves nothing of it (zero terminal "
            "SNR). Set source.noise.prediction_type: v_prediction, or end source.noise.timesteps before it."
        )

    def differs(self, other: Process, *, timesteps: bool = True) -> str | None:
        """Words for where the schedules of two processes differ; None where they are one, whatever is predicted.

        Without `timesteps` flows of another shift are one: the same path from noise to data, in other steps.
        """
        if self.kind != other.kind:
            return f"{self.kind} and {other.kind}"
        if self.num_timesteps != other.num_timesteps:
            return f"{self.num_timesteps} and {other.num_timesteps} timesteps"
        if self.kind == "flow" and not timesteps:
            return None
        apart = ((self.alphas - other.alphas).abs() > 1e-6) | ((self.sigmas - other.sigmas).abs() > 1e-6)
        if not apart.any():
            return None
        t = int(apart.nonzero()[0])
        return (
            f"from timestep {t} on: alpha {self.alphas[t]:.6f} and {other.alphas[t]:.6f}, "
            f"sigma {self.sigmas[t]:.6f} and {other.sigmas[t]:.6f}"
        )

    @classmethod
    def from_scheduler(cls, config: Mapping[str, JsonValue]) -> Process:
        """The process of a diffusers `scheduler_config.json`, all defaults written out.

        A configuration with `shift` and no betas, or with `use_flow_sigmas`, is a flow. `ConfigError` for schedulers of
        neither kind (consistency, EDM) and for settings that are missing.
        """
        name = str(config.get("_class_name", "the scheduler"))
        if config.get("use_flow_sigmas") or ("beta_start" not in config and "shift" in config):
            return _flow(config, name)
        missing = [
            key for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end") if key not in config
        ]
        if missing:
            raise ConfigError(
                f"{name}: wanted the configuration of a scheduler with betas (DDPM, DDIM, Euler, DPM-Solver …) or of a "
                f"flow (FlowMatch…), found none of {', '.join(missing)}. Name another one with model.scheduler."
            )
        for key in ("num_train_timesteps", "beta_start", "beta_end"):
            _require_number(config, key, name)
        schedule = {key: config[key] for key in _BETAS if config.get(key) not in (None, False)}
        alpha_bar = _alpha_bar(schedule, name)
        return cls(
            alphas=alpha_bar.sqrt(),
            sigmas=(1 - alpha_bar).sqrt(),
            kind="variance_preserving",
            prediction_type=_prediction(config.get("prediction_type") or "epsilon", name),
            schedule=schedule,
        )

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` makes the same process from; goes into manifests."""
        return {"kind": self.kind, "prediction_type": self.prediction_type, "schedule": dict(self.schedule)}

    @classmethod
    def from_json(cls, facts: Mapping[str, JsonValue]) -> Process:
        """The process that wrote `facts` with `to_json`."""
        schedule = facts["schedule"]
        assert isinstance(schedule, dict), "facts of a process come from to_json"
        return cls.from_scheduler({**schedule, "prediction_type": facts["prediction_type"]})


def convert_at(
    pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, *, source: PredictionType, target: PredictionType
) -> Tensor:
    """As `Process.convert`, at any alpha and sigma (fp64, broadcast to x_t); the quotient is not guarded."""
    dtype = torch.promote_types(pred.dtype, x_t.dtype)
    if source == target:
        return pred.to(dtype)
    (m0, m1), (n0, n1) = _mix(source, alpha, sigma), _mix(target, alpha, sigma)
    mixed = _determinant(target, alpha, sigma) * pred.double() + (n0 * m1 - n1 * m0) * x_t.double()
    return (mixed / _determinant(source, alpha, sigma)).to(dtype)


def on_frames(values: Tensor, like: Tensor) -> Tensor:
    """Values of samples [B], or of their frames [B, T], with the axes of `like`: [B, C, h, w] or [B, C, T, h, w]."""
    if values.ndim == 1:
        return values.view(-1, *(1,) * (like.ndim - 1))
    return values[:, None, :, None, None]


def _mix(kind: PredictionType, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """m0 and m1 of a prediction m0 x0 + m1 eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha), "flow": (-one, one)}[kind]


def _determinant(kind: PredictionType, alpha: Tensor, sigma: Tensor) -> Tensor:
    m0, m1 = _mix(kind, alpha, sigma)
    return alpha * m1 - sigma * m0


def _prediction(name: JsonValue, scheduler: str) -> PredictionType:
    if name not in _PREDICTIONS:
        raise ConfigError(
            f"{scheduler}: prediction_type: wanted one of {', '.join(_PREDICTIONS)}, found {name!r}. "
            "Name another scheduler with model.scheduler."
        )
    return _PREDICTIONS[str(name)]


def _require_number(config: Mapping[str, JsonValue], key: str, name: str) -> None:
    found = config[key]
    if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
        raise ConfigError(
            f"{name}: {key}: wanted a number above 0, found {found!r}. Name another scheduler with model.scheduler."
        )


def _flow(config: Mapping[str, JsonValue], name: str) -> Process:
    """s(t) = k u / (1 + (k-1) u) with u = (t+1)/T and the shift k: Esser et al. 2024, arXiv 2403.03206, Eq. 23.

    A shift that depends on the size of the image (`use_dynamic_shifting`) belongs to sampling and is left out.
    """
    key = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    dynamic = bool(config.get("use_dynamic_shifting"))
    for number in ("num_train_timesteps", *(() if dynamic else (key,))):
        if number in config:
            _require_number(config, number, name)
    shift = 1.0 if dynamic else float(str(config.get(key, 1.0)))
    if config.get("invert_sigmas"):
        raise ConfigError(
            f"{name}: wanted sigmas that fall from 1, found invert_sigmas. Name another scheduler with model.scheduler."
        )
    num = int(str(config.get("num_train_timesteps", 1000)))
    u = torch.arange(1, num + 1, dtype=torch.float64) / num
    sigmas = shift * u / (1 + (shift - 1) * u)
    return Process(
        alphas=1 - sigmas,
        sigmas=sigmas,
        kind="flow",
        prediction_type=_prediction(config.get("prediction_type") or "flow", name),
        schedule={"num_train_timesteps": num, "shift": shift},
    )


def _alpha_bar(schedule: Mapping[str, JsonValue], name: str) -> Tensor:
    """Π (1 - beta_s) up to each timestep, fp64."""
    num = int(str(schedule["num_train_timesteps"]))
    start, end = (float(str(schedule[key])) for key in ("beta_start", "beta_end"))
    grid = torch.linspace(0, 1, num, dtype=torch.float64)
    trained = schedule.get("trained_betas")
    match schedule["beta_schedule"]:
        case _ if isinstance(trained, list):
            betas = torch.tensor(trained, dtype=torch.float64)
        case "linear":
            betas = start + (end - start) * grid
        case "scaled_linear":  # Rombach et al. 2022, arXiv 2112.10752: linear in the square root
            betas = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * grid) ** 2
        case "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17
            edges = torch.cos((torch.arange(num + 1, dtype=torch.float64) / num + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - edges[1:] / edges[:-1]).clamp_max(0.999)
        case "sigmoid":
            betas = torch.sigmoid(-6 + 12 * grid) * (end - start) + start
        case other:
            raise ConfigError(
                f"{name}: beta_schedule: wanted linear, scaled_linear, squaredcos_cap_v2 or sigmoid, found {other!r}. "
                "Name another scheduler with model.scheduler."
            )
    alpha_bar = torch.cumprod(1 - betas, 0)
    if shift := float(str(schedule.get("snr_shift_scale", 0))):  # SNR / shift: Yang et al. 2024, arXiv 2408.06072
        alpha_bar = alpha_bar / (shift + (1 - shift) * alpha_bar)
    if schedule.get("rescale_betas_zero_snr"):  # Lin et al. 2023, arXiv 2305.08891, Alg. 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar
