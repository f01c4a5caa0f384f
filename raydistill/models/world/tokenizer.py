"""The VQ tokenizer: frames to codes on a grid of tokens, and back.

Latents and codebook entries are unit vectors, so that the nearest entry is the one of largest cosine; with few numbers
per entry that keeps the whole codebook in use. Sources: van den Oord et al. 2017, arXiv 1711.00937 (VQ-VAE, straight-
through gradient); Yu et al. 2022, arXiv 2110.04627, Sec. 3.2 (unit vectors of few dimensions).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raydistill.config.world import WorldSizes

SHARPNESS = 10.0
"""Factor on cosines that makes them logits: neighbouring entries differ by some nats."""


class Residual(nn.Module):
    """x + conv(gelu(conv(gelu(norm(x))))), normalised at each place alone: a tile looks the same in any frame."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        normal = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        update: Tensor = self.outer(F.gelu(self.inner(F.gelu(normal))))
        return x + update


class Encoder(nn.Module):
    """Frames [B, T, C, H, W] to unit latents [B, T, tokens, code width]; tokens row by row."""

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        step, width = round(sizes.patch ** (1 / sizes.stages)), sizes.tokenizer_width
        channels = [sizes.channels, *[width] * sizes.stages]
        self.down = nn.ModuleList(nn.Conv2d(a, b, step, stride=step) for a, b in pairwise(channels))
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(sizes.tokenizer_blocks)))
        self.out = nn.Linear(width, sizes.code_width)
        self.latents = nn.Identity()  # a name by which latents are tapped

    def forward(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        x = frames.flatten(0, 1) * 2 - 1
        for conv in self.down:
            x = conv(F.gelu(x) if conv is not self.down[0] else x)
        x = self.blocks(x).flatten(2).mT
        latents: Tensor = self.latents(F.normalize(self.out(x), dim=-1).unflatten(0, frames.shape[:2]))
        return latents


class Codebook(nn.Module):
    """K unit vectors."""

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(sizes.codebook_size, sizes.code_width), dim=-1))

    def forward(self, latents: Float[Tensor, "b t n d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "b t n k"]]:
        """The entries, and the logits of each latent's code."""
        entries = F.normalize(self.weight, dim=-1)
        return entries, SHARPNESS * latents @ entries.T


class Decoder(nn.Module):
    """Vectors [B, T, tokens, code width], codes or mixtures of them, to frames [B, T, C, H, W]."""

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        step, width = round(sizes.patch ** (1 / sizes.stages)), sizes.decoder_width or sizes.tokenizer_width
        self.grid = (sizes.frame_size[0] // sizes.patch, sizes.frame_size[1] // sizes.patch)
        self.inner = nn.Linear(sizes.code_width, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(sizes.tokenizer_blocks)))
        self.hidden = nn.Identity()  # a name by which the decoder's hidden states are tapped
        channels = [*[width] * sizes.stages, sizes.channels]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, step, stride=step) for a, b in pairwise(channels))

    def forward(self, vectors: Float[Tensor, "b t n d"]) -> Float[Tensor, "b t c h w"]:
        x = self.inner(vectors).flatten(0, 1).mT.unflatten(-1, self.grid)
        x = self.blocks(x)
        hidden: Tensor = self.hidden(x.flatten(2).mT.unflatten(0, vectors.shape[:2]))
        x = hidden.flatten(0, 1).mT.unflatten(-1, self.grid)
        for conv in self.up:
            x = conv(F.gelu(x))
        frames: Tensor = x.unflatten(0, vectors.shape[:2]) / 2 + 0.5
        return frames


def nearest(assignment: Float[Tensor, "b t n k"]) -> Int[Tensor, "b t n"]:
    """The codes of latents with these logits."""
    return assignment.argmax(-1)


def straight_through(
    latents: Float[Tensor, "b t n d"], entries: Float[Tensor, "k d"], codes: Int[Tensor, "b t n"]
) -> Float[Tensor, "b t n d"]:
    """The entries of `codes`, whose gradient goes to the latents as if they were these. Source: arXiv 1711.00937."""
    return latents + (entries[codes] - latents).detach()
