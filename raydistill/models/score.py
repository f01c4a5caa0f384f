"""A denoiser as a score: which clean video it expects behind a noised one, guided, and what it saw on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.diffusion.process import Process
from raydistill.errors import SignalMismatch
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import predict, with_one_sample
from raydistill.models.taps import Taps, feature_shapes, feature_width
from raydistill.signals import Batch


class RealScore(Protocol):
    """Whoever answers for the teacher: a network here, or actors elsewhere."""

    def start(self, x_t: Tensor, t: Tensor, batch: Batch, context: Tensor | None = None) -> Callable[[], Tensor]:
        """Begin to predict; the result waits for the clean videos, as `Score.clean` gives them."""


class Score:
    """A network that is asked for clean videos [samples, channels, frames, height, width].

    With `chunk_frames` it sees chunk by chunk: each chunk of the noised video beside the clean context before it
    (autoregressive); without, all frames see one another (bidirectional).
    """

    def __init__(self, network: nn.Module, process: Process, *, guidance: float = 1.0, chunk_frames: int | None = None):
        self.network, self.process, self.guidance = network, process, guidance
        self._causal = None if chunk_frames is None else CausalDenoiser(network, chunk_frames)

    def own(
        self,
        x_t: Float[Tensor, "samples channels frames height width"],
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        context: Tensor | None = None,
    ) -> Tensor:
        """The prediction of the network's own type, unguided, fp32.

        `t` in [0, 1] is that of samples [samples] or of their frames [samples, frames].
        """
        told = self.process.told(t)
        if self._causal is None:
            return predict(self.network, x_t, told, conditioning)
        frames = told if told.ndim == 2 else told[:, None].expand(-1, x_t.shape[2])
        if context is None:
            return self._causal.predict(x_t, frames, conditioning)
        return self._causal.predict(x_t, frames, conditioning, clean=context, clean_t=torch.zeros_like(frames))

    def clean(self, x_t: Tensor, t: Tensor, batch: Batch, context: Tensor | None = None) -> Tensor:
        """The clean video behind x_t, guided by `uncond + w (cond - uncond)` (Ho & Salimans 2022, arXiv 2207.12598).

        `batch` holds the conditions, and for a guidance other than 1 `empty_embeds`. `context` is the clean video whose
        earlier chunks an autoregressive score sees.
        """
        own = self.own(x_t, t, batch, context)
        if self.guidance != 1:
            if "empty_embeds" not in batch:
                raise SignalMismatch(
                    f"guidance {self.guidance:g} wants the embeddings of a negative prompt (empty_embeds), found none; "
                    'set source.negative_prompt ("" is the empty prompt), or guidance_scale: 1.'
                )
            without = self.own(x_t, t, {**batch, "prompt_embeds": batch["empty_embeds"]}, context)
            own = without + self.guidance * (own - without)
        return self.process.clean_of(own, x_t, t)


class LocalScore:
    """A teacher in this process: frozen, on the device of what it is asked about."""

    def __init__(self, score: Score):
        self.score = score
        score.network.requires_grad_(False)

    def start(self, x_t: Tensor, t: Tensor, batch: Batch, context: Tensor | None = None) -> Callable[[], Tensor]:
        """Predict at once, without gradients."""
        self.score.network.to(x_t.device)
        with torch.no_grad():
            clean = self.score.clean(x_t, t, batch, context)
        return lambda: clean


class FeatureHeads(nn.Module):
    """Small heads on the token features of a frozen network, one per module, which tell real from made.

    Each is a LayerNorm and two linear layers for every token alike, so that a verdict falls at each place.
    """

    WIDTH = 256
    """Most hidden units of a head."""

    def __init__(self, score: Score, modules: tuple[str, ...], *, seed: int):
        """`seed` decides the first weights, on every rank alike."""
        super().__init__()
        network = score.network
        paths = {path: path for path in modules}
        where = "recipe.gan.features"
        shapes = feature_shapes(network, paths, lambda net: with_one_sample(net, frames=1), where=where)
        self._score, self._taps = score, Taps(network, paths, where=where)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_head(feature_width(shapes[path])) for path in modules)

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch) -> Float[Tensor, "samples places"]:
        """Verdicts at every token of every tapped module: above 0 is real. Gradients reach x_t through the network."""
        self._score.network.to(x_t.device)
        with self._taps:
            self._score.own(x_t, t, batch)
        features = self._taps.taken()
        dtype = next(self.parameters()).dtype
        return torch.cat([h(f.to(dtype))[..., 0] for h, f in zip(self.heads, features.values(), strict=True)], 1)


def _head(width: int) -> nn.Module:
    hidden = min(width, FeatureHeads.WIDTH)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
