"""Teachers and the signals they write."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from raydistill.config.base import Config, tag_defaults_to
from raydistill.config.models import DiffusersModel, LanguageModelConfig, TeacherAttention
from raydistill.config.world import FeaturesTeacher, RolloutTeacher

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class TopK(Config):
    """Keep the K most probable tokens and the mass of the rest."""

    kind: Literal["top_k"] = "top_k"


class HeadTailSample(Config):
    """Keep an exact head of tokens and an unbiased sample of the tail, seeded by the row id."""

    kind: Literal["head_tail_sample"]
    samples: int = Field(default=32, ge=1, le=255)
    """Tokens drawn from the tail, one per stratum: the tail is cut into this many parts of equal mass, so that a
    probable token may be drawn several times. `top_k` is then the size of the exact head (0 is allowed)."""
    seed: int = 0
    """Base seed of the draws."""


class TopKLogitsTeacher(Config):
    """A causal language model whose next-token distributions are kept in short form."""

    signal: Literal["top_k_logits"] = "top_k_logits"
    name: Name
    """Name of the teacher: of its cache folder, its losses and its lines in reports."""
    model: LanguageModelConfig
    """The teacher."""
    weight: float = Field(default=1.0, ge=0)
    """Share of this teacher in the loss; weights are normalised over the teachers."""
    top_k: int = Field(default=64, ge=0)
    """Ids and log-probabilities kept per token."""
    estimator: Annotated[TopK | HeadTailSample, Field(discriminator="kind")] = TopK()
    """How the tail outside `top_k` is represented."""
    temperatures: tuple[float, ...] = (2.0, 4.0)
    """Temperatures whose exact tail mass is stored, for `temperature_mode: exact`."""
    codec: Literal["fp16", "u8"] = "fp16"
    """How log-probabilities and ids are stored: `fp16` loses nothing beyond fp16, `u8` is smaller and lossy."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens (padding included) in one teacher batch; a longer row is a batch by itself. A part of the cache's
    identity."""
    chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose full logits exist at one time; on a CPU at most 256. A part of the cache's identity."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.estimator.kind == "top_k" and self.top_k == 0:
            raise ValueError("top_k: wanted at least 1 with estimator top_k, found 0 (only head_tail_sample allows 0).")
        if any(t <= 0 for t in self.temperatures) or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures: wanted different numbers above 0, found {list(self.temperatures)}.")
        return self


class NoisePredictionTeacher(Config):
    """A denoiser whose prediction is kept at the draws of noise and timestep of `source.noise`."""

    signal: Literal["noise_prediction"]
    name: Name
    """Name of the teacher: of its cache folder, its losses and its lines in reports."""
    model: DiffusersModel
    """The teacher."""
    weight: float = Field(default=1.0, ge=0)
    """Share of this teacher in the loss; weights are normalised over the teachers."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Keep the guided prediction `uncond + w (cond - uncond)` with this w; null and 1 keep the plain one."""
    taps: dict[Name, str] = Field(default={})
    """Modules whose output is kept too, by the name of the tap, e.g. `mid: mid_block`."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format in which predictions are stored."""
    batch_rows: int = Field(default=8, ge=1)
    """Draws in one teacher batch. A part of the cache's identity."""
    imported: str | None = None
    """Name of a signal cache in `cache.dir`, e.g. `<name>-0123456789abcdef`, that was imported and is used as it is;
    the model is then asked by the audit alone."""


class OdeTrajectoryTeacher(Config):
    """A denoiser that makes samples with its own sampler, of whose path some states are kept.

    A sample costs K + 1 latents: the K states at `keep_t`, from the noise on, and the clean end.
    """

    signal: Literal["ode_trajectory"]
    name: Name
    """Name of the teacher: of its cache folder, its losses and its lines in reports."""
    model: DiffusersModel
    """The teacher. Its scheduler is the sampler."""
    weight: float = Field(default=1.0, ge=0)
    """Share of this teacher in the loss; weights are normalised over the teachers."""
    teacher_attention: TeacherAttention = "bidirectional"
    """An autoregressive teacher makes its videos chunk by chunk, as a causal student does, so that the student can know
    what a state leads to. That of a teacher that sees all frames depends on frames that the student cannot see."""
    chunk_frames: int | None = Field(default=None, ge=1)
    """Latent frames of a chunk of an autoregressive teacher: those of `student.generator.causal`."""
    steps: int = Field(default=50, ge=1)
    """Steps of the sampler."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Sample with the guided prediction `uncond + w (cond - uncond)` with this w; null and 1 sample with the plain
    one."""
    keep_t: tuple[float, ...] = Field(min_length=1)
    """Times of the states that are kept, falling, on the scale of `student.generator.t_list` (1 is noise). One time,
    that of the noise, keeps pairs of noise and sample."""
    off_grid: Literal["insert", "error"] = "insert"
    """What happens to a time that is no step of the sampler: it steps there too, exactly, or the run stops."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """Number format in which states are stored."""
    batch_rows: int = Field(default=1, ge=1)
    """Samples made at a time. A part of the cache's identity."""
    previews: int = Field(default=0, ge=0)
    """Samples of each shard that are also kept as a video, in the folder `previews` of the cache."""
    imported: str | None = None
    """Name of a signal cache in `cache.dir`, e.g. `<name>-0123456789abcdef`, that was imported and is used as it is;
    the model is then asked by the audit alone."""

    @field_validator("keep_t")
    @classmethod
    def _falling(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if any(a <= b for a, b in pairwise(times)) or not 0 < times[-1] <= times[0] <= 1:
            raise ValueError(f"wanted falling times above 0 and at most 1, found {list(times)}.")
        return times

    @model_validator(mode="after")
    def _chunks(self) -> Self:
        if (self.teacher_attention == "autoregressive") != (self.chunk_frames is not None):
            raise ValueError("chunk_frames: goes with teacher_attention: autoregressive, and only with it.")
        return self


TeacherConfig = Annotated[
    TopKLogitsTeacher | NoisePredictionTeacher | OdeTrajectoryTeacher | FeaturesTeacher | RolloutTeacher,
    Field(discriminator="signal"),
    tag_defaults_to("signal", "top_k_logits"),
]
