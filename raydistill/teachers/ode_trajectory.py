"""The signal `ode_trajectory`: samples that a denoiser makes, and some states on the way from noise to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import OdeTrajectoryTeacher as TeacherSection
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import VIDEO_NETWORKS, predict
from raydistill.models.sampler import Sampler
from raydistill.signals import Batch, Field, JsonValue, Schema
from raydistill.teachers.noise_prediction import CONDITIONS, GUIDANCE


def make_sampler(config: TeacherSection, scheduler: Mapping[str, JsonValue], process: Process) -> Sampler:
    """The sampler of a teacher; raises as `Sampler`."""
    return Sampler(
        scheduler,
        process,
        steps=config.steps,
        keep_t=config.keep_t,
        insert=config.off_grid == "insert",
        where=f"teachers.{config.name}",
    )


class OdeTrajectory:
    """Samples from the noise of a batch with the sampler of the teacher's own scheduler.

    Batch of B samples: `noise` [B, C, (T,) h, w] fp32 and, as far as the denoiser wants them, `prompt_embeds`, `pooled`
    and `time_ids`; for guidance also the negative prompt's `empty_embeds` and `empty_pooled`. The result has `clean`
    [B, C, (T,) h, w] and `path` [B, K, C, (T,) h, w], fp32, on the CPU: state k is x at `facts["t"][k]`, whose alpha
    and sigma `facts` has as the sampler used them. Video transformers have frames, all others none.
    """

    def __init__(
        self,
        config: TeacherSection,
        network: nn.Module,
        process: Process,
        scheduler: Mapping[str, JsonValue],
        noise: NoiseConfig,
    ):
        """`scheduler` is the scheduler_config.json of `network`, and `process` what it says. `ConfigError` for a
        sampler that cannot be, or that cannot stand at `keep_t`."""
        self._config, self._network, self._process = config, network.eval().requires_grad_(False), process
        self._scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        self._sampler = make_sampler(config, scheduler, process)
        self._causal = None if config.chunk_frames is None else CausalDenoiser(network, config.chunk_frames)
        frames = ("frame",) if isinstance(network, VIDEO_NETWORKS) else ()
        axes = ("channel", *frames, "height", "width")
        self.schema: Schema = {
            "clean": Field(torch.float32, axes, "sample that the noise leads to, latents"),
            "path": Field(torch.float32, ("step", *axes), "states of the sampler at the times `t`, latents"),
        }
        kept = [self._sampler.nodes[index] for index in self._sampler.kept]
        self.facts: Mapping[str, JsonValue] = {
            "t": [node.t for node in kept],
            "alphas": [node.alpha for node in kept],
            "sigmas": [node.sigma for node in kept],
            "grid": [node.t for node in self._sampler.nodes],
            "sampler": self._sampler.name,
            "steps": config.steps,
            "evaluations": self._sampler.num_steps * (1 if self._scale == 1.0 else 2),
            "process": process.to_json(),
            "noise": noise.model_dump(mode="json"),
            "guidance_scale": config.guidance_scale,
            "guidance_formula": GUIDANCE,
            "teacher_attention": config.teacher_attention,
            "chunk_frames": config.chunk_frames,
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        device = next(self._network.parameters()).device
        noise = batch["noise"].to(device)
        wanted = len(self.schema["clean"].dims) + 1
        if noise.ndim != wanted:
            raise ConfigError(
                f"teachers.{self._config.name}: {type(self._network).__name__} makes samples with "
                f"{wanted - 1} axes, found noise of the shape {list(noise.shape[1:])}; a video transformer wants "
                "source.frames (1 for images), all others none."
            )
        given = {name: batch[name].to(device) for name in CONDITIONS if name in batch}
        without = self._without(given, batch)

        def guided(x_t: Tensor, told: Tensor) -> Tensor:
            cond = predict(self._network, x_t, told, given)
            if without is None:
                return cond
            uncond = predict(self._network, x_t, told, without)
            return uncond + self._scale * (cond - uncond)

        if self._causal is None:
            clean, path = self._sampler(noise, guided)
        else:
            clean, path = self._by_chunks(self._causal, noise, given, without)
        return {"clean": clean.cpu(), "path": path.cpu()}

    def _by_chunks(
        self, causal: CausalDenoiser, noise: Tensor, given: Mapping[str, Tensor], without: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The same with the path of each chunk beside the finished chunks before it."""
        asked = [given] if without is None else [given, without]
        known = [causal.new_cache(noise.shape[2]) for _ in asked]
        parts: list[tuple[Tensor, Tensor]] = []
        for a, b in causal.spans(noise.shape[2]):

            def guided(x_t: Tensor, told: Tensor, a: int = a) -> Tensor:
                said = [causal.predict_chunk(x_t, told, c, k, a) for c, k in zip(asked, known, strict=True)]
                return said[0] if len(said) == 1 else said[1] + self._scale * (said[0] - said[1])

            parts.append(self._sampler(noise[:, :, a:b], guided))
            guided(parts[-1][0], torch.zeros(len(noise), device=noise.device))  # later chunks see it clean
        return torch.cat([clean for clean, _ in parts], 2), torch.cat([path for _, path in parts], 3)

    def _without(self, given: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor] | None:
        """The conditions of the negative prompt; None without guidance."""
        if self._scale == 1.0:
            return None
        if "empty_embeds" not in batch:
            raise ConfigError(
                f"guidance_scale {self._scale:g}: wanted a negative prompt to lead away from, found inputs without "
                "source.text_encoders; remove teachers.*.guidance_scale."
            )
        empty = {"prompt_embeds": batch["empty_embeds"]}
        empty |= {"pooled": batch["empty_pooled"]} if "empty_pooled" in batch else {}
        return {**given, **{name: values.to(given["prompt_embeds"].device) for name, values in empty.items()}}
