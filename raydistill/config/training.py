"""Phases: what is trained, how long, with which optimizer."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raydistill.config.base import Config
from raydistill.config.recipes import LmLogitsRecipe, RecipeConfig
from raydistill.config.teachers import Name


class BatchConfig(Config):
    """Samples per optimizer step and per forward pass."""

    global_size: int = Field(ge=1)
    """Samples in one optimizer step, over all workers."""
    micro_size: int = Field(ge=1)
    """Samples in one forward pass of one worker; must divide `global_size`."""
    shuffle_shards: int = Field(default=64, ge=1)
    """Rows are shuffled within windows of this many (permuted) shards."""
    shuffle: bool = True
    """Turn off to read rows in cache order."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_size % self.micro_size:
            raise ValueError(
                f"global_size ({self.global_size}) must be a multiple of micro_size ({self.micro_size}); "
                f"set micro_size to a divisor, e.g. {_divisor(self.global_size, self.micro_size)}."
            )
        return self


def _divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    decay_norms_and_biases: bool = False
    """Whether biases and norm scales (parameters of fewer than two axes) decay too."""
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up: step i (from 0) has (i + 1) / `warmup_steps` of the peak, so the first is not lost."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of `lr` (linear and cosine schedules)."""
    restart_steps: int | None = Field(default=None, ge=1)
    """First cycle of `cosine_restarts`, in steps."""
    restart_factor: float = Field(default=1.0, ge=1)
    """Each cycle of `cosine_restarts` is this many times as long as the one before."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters; null turns clipping off."""

    @model_validator(mode="after")
    def _restarts(self) -> Self:
        if (self.schedule == "cosine_restarts") != (self.restart_steps is not None):
            raise ValueError("restart_steps: goes with schedule cosine_restarts, and only with it.")
        return self


class TrainableRule(Config):
    """Parameters whose name matches are trained; the first rule that matches a name decides."""

    match: str
    """Regular expression, searched for in the parameter's name."""
    lr_scale: float = Field(default=1.0, ge=0)
    """Factor on the learning rate; 0 freezes."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of these parameters (biases and norms included) instead of the optimizer's."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"wanted a regular expression, found {match!r}: {error}.") from error
        return match


class OffloadConfig(Config):
    """Where DeepSpeed keeps a part of the state."""

    device: Literal["cpu", "nvme"]
    """Host memory, or a local NVMe disk."""
    nvme_path: str | None = None
    """Folder on the NVMe disk."""
    pin_memory: bool = False
    """Use pinned host memory."""

    @model_validator(mode="after")
    def _path(self) -> Self:
        if (self.device == "nvme") != (self.nvme_path is not None):
            raise ValueError("nvme_path: goes with device: nvme, and only with it.")
        return self


class ZeroConfig(Config):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 0
    """What is partitioned over the workers: nothing, optimizer state, + gradients, + parameters. With `precision:
    bf16`, 0 runs as DeepSpeed's stage 1, since its bf16 optimizer takes a stray step at stage 0."""
    offload_optimizer: OffloadConfig | None = None
    """Offload optimizer state (stages 1 to 3)."""
    offload_parameters: OffloadConfig | None = None
    """Offload parameters (stage 3)."""

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.offload_optimizer is not None and self.stage == 0:
            raise ValueError("offload_optimizer: needs stage 1, 2 or 3, found stage 0.")
        if self.offload_optimizer is not None and self.offload_optimizer.device == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer: device nvme needs stage 3, found stage {self.stage}.")
        if self.offload_parameters is not None and self.stage != 3:
            raise ValueError(f"offload_parameters: needs stage 3, found stage {self.stage}.")
        return self


class EmaConfig(Config):
    """Exponential moving average of the fp32 weights."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old average kept at each update."""
    every_steps: int = Field(default=1, ge=1)
    """Steps between updates."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at update n, so that the average forgets the initial weights."""


class CheckpointConfig(Config):
    """When and how many checkpoints are kept."""

    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    best_metric: str | None = None
    """Also keep the checkpoint with the best value of this evaluation metric, and hand it to the next phase
    and the export."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a small or a large `best_metric` is good."""


class PhaseConfig(Config):
    """One training run: its own recipe, trainable parameters, batch, optimizer and ZeRO stage."""

    name: Name
    """Name of the phase and of its folder."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give `steps` or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; a fraction is allowed."""
    recipe: RecipeConfig = LmLogitsRecipe()
    """How the student learns."""
    batch: BatchConfig
    """Samples per step."""
    optimizer: dict[str, OptimizerConfig]
    """One optimizer per player; most recipes have the one player `student`."""
    trainable: tuple[TrainableRule, ...] = ()
    """Rules for the parameters: first match wins and unmatched parameters are frozen. No rules: everything is
    trained."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of forward and backward pass; masters and optimizer state are fp32."""
    zero: ZeroConfig = ZeroConfig()
    """Partitioning of the training state."""
    ema: EmaConfig | None = None
    """Moving average of the weights; none by default."""
    start_from: Literal["weights", "ema"] = "weights"
    """What the phase takes over from the phase before."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Steps between logged lines."""
    explode_factor: float = Field(default=20.0, gt=1)
    """Stop when the loss exceeds this many times its median over the last 100 steps."""

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("wanted exactly one of steps and epochs.")
        return self
