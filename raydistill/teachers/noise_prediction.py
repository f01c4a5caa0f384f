"""The signal `noise_prediction`: what a denoiser says about noised latents, at draws that all teachers share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher as TeacherSection
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.denoiser import predict, with_one_sample
from raydistill.models.denoiser_agreement import require_convertible
from raydistill.models.taps import Taps, feature_shapes
from raydistill.signals import Batch, Field, JsonValue, Schema

GUIDANCE = "uncond + w (cond - uncond)"
"""Ho & Salimans 2022, arXiv 2207.12598, Eq. 6 with their w one less: 1 is the plain prediction, as in diffusers."""
CONDITIONS = ("prompt_embeds", "pooled", "time_ids")
AXES = {3: ("channel", "height", "width"), 2: ("token", "width"), 1: ("width",)}
"""Names of a feature's axes by their number."""


class NoisePrediction:
    """Keeps a denoiser's prediction, stated as one of `source.noise.prediction_type`, and features of its modules.

    Batch of B samples: `latents` and `noise` [B, C, h, w] fp32, `timestep` [B] int64 and, as far as the denoiser wants
    them, `prompt_embeds` [B, L, D], `pooled` [B, P] and `time_ids` [B, 6]; for guidance also the empty caption's
    `empty_embeds` and `empty_pooled`. The result has `prediction` [B, C, h, w] and `tap.<name>` [B, ...], fp32, on the
    CPU. With guidance the taps are those of the conditional pass.
    """

    def __init__(self, config: TeacherSection, network: nn.Module, process: Process, noise: NoiseConfig):
        """`process` is the schedule of `network` and what it predicts. `ConfigError` for settings that cannot be."""
        where = f"teachers.{config.name}"
        require_convertible(process, noise, where=where)
        self._network, self._process, self._noise = network.eval().requires_grad_(False), process, noise
        self._scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        self._taps = Taps(network, config.taps, where=where)
        shapes = feature_shapes(network, config.taps, with_one_sample, where=where) if config.taps else {}
        for name, shape in shapes.items():
            if len(shape) not in AXES:
                raise ConfigError(
                    f"{where}.taps.{name}: wanted features [channels, height, width], [tokens, width] or [width], "
                    f"found {list(shape)} from {config.taps[name]}; tap another module."
                )
        self.schema: Schema = {
            "prediction": Field(torch.float32, AXES[3], f"prediction of the kind {noise.prediction_type}"),
            **{
                f"tap.{name}": Field(
                    torch.float32,
                    tuple(f"{name}.{axis}" for axis in AXES[len(shape)]),
                    f"output of {config.taps[name]}",
                )
                for name, shape in shapes.items()
            },
        }
        self.facts: Mapping[str, JsonValue] = {
            "prediction_type": noise.prediction_type,
            "own_prediction_type": process.prediction_type,
            "process": process.to_json(),
            "noise": noise.model_dump(mode="json"),
            "guidance_scale": config.guidance_scale,
            "guidance_formula": GUIDANCE,
            "taps": {name: {"module": config.taps[name], "shape": list(shape)} for name, shape in shapes.items()},
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        device = next(self._network.parameters()).device
        latents, noise, timestep = (batch[name].to(device) for name in ("latents", "noise", "timestep"))
        x_t, told = self._process.noisy(latents, noise, timestep), self._process.times(timestep)
        given = {name: batch[name].to(device) for name in CONDITIONS if name in batch}
        with self._taps as taps:
            own = predict(self._network, x_t, told, given)
        if self._scale != 1.0:
            own = self._guided(own, x_t, told, given, batch)
        kinds = {"source": self._process.prediction_type, "target": self._noise.prediction_type}
        said = {"prediction": self._process.convert(own, x_t, timestep, **kinds)}
        said |= {f"tap.{name}": feature.float() for name, feature in taps.taken().items()}
        return {name: values.cpu() for name, values in said.items()}

    def _guided(self, cond: Tensor, x_t: Tensor, told: Tensor, given: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The guided prediction, in the network's own prediction type.

        Two passes rather than one of twice the batch: they take the same time, and half the memory.
        """
        if "empty_embeds" not in batch:
            raise ConfigError(
                f"guidance_scale {self._scale:g}: wanted text to leave out, found inputs without source.text_encoders; "
                "remove teachers.*.guidance_scale."
            )
        empty = {"prompt_embeds": batch["empty_embeds"]}
        empty |= {"pooled": batch["empty_pooled"]} if "empty_pooled" in batch else {}
        without = {**given, **{name: values.to(x_t.device) for name, values in empty.items()}}
        uncond = predict(self._network, x_t, told, without)
        return uncond + self._scale * (cond - uncond)
