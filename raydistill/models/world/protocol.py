"""What a world model has to offer to teach: three methods of a `torch.nn.Module`, whatever is inside.

A teacher of `library: python` is what the user's function returns, usually a few lines around a model:

    class GameVideoModel(torch.nn.Module):                      # a video diffusion transformer with key presses
        def __init__(self, pipeline, num_actions, frame_shape):
            super().__init__()
            self.transformer, self.vae, self.pipeline = pipeline.transformer, pipeline.vae, pipeline
            self.num_actions, self.frame_shape = num_actions, frame_shape

        def encode(self, frames):                               # [B, T, C, H, W] in [0, 1] -> [B, T, tokens, width]
            latents = self.vae.encode(frames.flatten(0, 1) * 2 - 1).latent_dist.mode()
            return latents.flatten(2).mT.unflatten(0, frames.shape[:2])

        def forward(self, frames, actions):                     # what follows each frame, given all before it
            return WorldOutput(frames=self.pipeline(history=frames[:, :-1], keys=actions))

        def rollout(self, initial, actions):                    # [B, T, …], [B, T - 1 + S] -> [B, S, C, H, W]
            return self.pipeline.play(initial, actions)

A tokenizer with a dynamics transformer gives `logits` and `codes` too, as `raydistill.models.world.model` does. Hidden
states and attention maps need no method: `taps` reads them by the names of modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raydistill.errors import ConfigError


@dataclass
class WorldOutput:  # without slots: at stage 3 DeepSpeed looks for tensors in the `__dict__` of what a module returns
    """What a world model says about B clips of T frames and T - 1 actions. Frames have values about in [0, 1]."""

    frames: Float[Tensor, "clips steps channels height width"]
    """The T - 1 frames after the first, each predicted from the true frames and actions before it."""
    logits: Float[Tensor, "clips steps tokens codes"] | None = None
    """Of the codes of those frames, where the model predicts codes."""
    codes: Int[Tensor, "clips frames tokens"] | None = None
    """Codes of all T frames, where there is a codebook."""
    assignment: Float[Tensor, "clips frames tokens codes"] | None = None
    """Logits of those codes: how near each latent is to each entry of the codebook."""
    reconstruction: Float[Tensor, "clips frames channels height width"] | None = None
    """The T frames out of their own codes, where it was asked for."""
    latents: Float[Tensor, "clips frames tokens width"] | None = None
    """What is quantised."""
    quantised: Float[Tensor, "clips frames tokens width"] | None = None
    """The entries of the codebook that latents became."""


@runtime_checkable
class WorldModel(Protocol):
    """A world model. All methods take fp32 frames in [0, 1] and whole-number actions below `num_actions`."""

    num_actions: int
    frame_shape: tuple[int, int, int]
    """Channels, height, width."""

    def __call__(self, frames: Tensor, actions: Tensor) -> WorldOutput:
        """Predictions for `frames` [B, T, C, H, W] under `actions` [B, T - 1]."""

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, T, tokens, width] of `frames` [B, T, C, H, W]."""

    def rollout(self, initial: Tensor, actions: Tensor) -> Tensor:
        """The S frames [B, S, C, H, W] that follow `initial` [B, T, C, H, W] under `actions` [B, T - 1 + S]."""


def require_world_model(model: nn.Module, *, where: str) -> WorldModel:
    """`model`, which must have what a world model has; `ConfigError` names what is missing."""
    wanted = ("forward", "encode", "rollout", "num_actions", "frame_shape")
    missing = [name for name in wanted if not hasattr(model, name) or (name == "forward" and _no_forward(model))]
    if missing:
        raise ConfigError(
            f"{where}: wanted a world model with {', '.join(wanted)}, found {type(model).__name__} without "
            f"{', '.join(missing)}; see raydistill.models.world.protocol for an adapter."
        )
    assert isinstance(model, WorldModel), "it has every member"
    return model


def _no_forward(model: nn.Module) -> bool:
    return type(model).forward is nn.Module.forward


def check_clips(frames: Tensor, actions: Tensor, model: WorldModel, *, where: str) -> None:
    """`ConfigError` unless clips and actions are those of the model: shapes, lengths, actions that it knows."""
    if frames.ndim != 5 or tuple(frames.shape[2:]) != tuple(model.frame_shape):
        raise ConfigError(
            f"{where}: wanted frames [clips, frames, {', '.join(map(str, model.frame_shape))}], found "
            f"{list(frames.shape)}; set source.frame_size and channels to the model's."
        )
    if tuple(actions.shape) != (frames.shape[0], frames.shape[1] - 1):
        raise ConfigError(
            f"{where}: wanted one action less than frames, [{frames.shape[0]}, {frames.shape[1] - 1}], found actions "
            f"{list(actions.shape)}."
        )
    if actions.numel() and not 0 <= int(actions.min()) <= int(actions.max()) < model.num_actions:
        raise ConfigError(
            f"{where}: wanted actions from 0 to {model.num_actions - 1}, found {int(actions.min())} to "
            f"{int(actions.max())}; use a model with a larger num_actions."
        )


@torch.no_grad()
def meta_clip(model: WorldModel, *, clip_frames: int) -> tuple[Tensor, Tensor]:
    """One clip and its actions on the meta device, to ask a model for shapes."""
    frames = torch.zeros(1, clip_frames, *model.frame_shape, device="meta")
    return frames, torch.zeros(1, clip_frames - 1, dtype=torch.long, device="meta")
