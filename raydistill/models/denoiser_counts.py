"""Parameters and floating-point operations of a denoiser, counted in a forward pass on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raydistill.config.models import DiffusersModel, StudentConfig
from raydistill.models.denoiser import empty_denoiser, with_one_sample


@dataclass(frozen=True, slots=True)
class DenoiserCounts:
    """What one sample costs."""

    parameters: int
    """Numbers in the model."""
    trained_parameters: int
    """Numbers that are trained."""
    forward: float
    """FLOP of a forward pass: 2 for each multiply-add of convolutions, linear layers and attention."""

    def training(self, *, recompute: bool) -> float:
        """FLOP of a training step: forward, gradients of activations and of weights, each as dear as the forward pass.

        `recompute` adds one forward pass, as gradient checkpointing does. Where blocks are frozen this is an upper
        bound.
        """
        return (4.0 if recompute else 3.0) * self.forward


def count_denoiser(
    network: nn.Module, *, latents: tuple[int, int] | None = None, tokens: int = 1, frames: int | None = None
) -> DenoiserCounts:
    """Count a network on the meta device, asked about one sample of `latents` (height, width), `frames` latent frames
    (None: an image) and `tokens` of text.

    By default the network's usual size. A parameter with `requires_grad` is one that is trained.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with_one_sample(network, size=latents, tokens=tokens, frames=frames)
    return DenoiserCounts(
        parameters=sum(p.numel() for p in network.parameters()),
        trained_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        forward=float(counter.get_total_flops()),
    )


def empty_denoiser_student(student: StudentConfig) -> nn.Module:
    """A student's structure on the meta device, whatever its `init`; reads no weights."""
    model = student.model
    assert isinstance(model, DiffusersModel), "the caller dispatches by the library of the model"
    return empty_denoiser(model)
