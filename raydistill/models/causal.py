"""A video transformer of diffusers that makes its frames in chunks, each of which sees those before it only.

The network stays what it is: its class, its names and its files. Only its self-attention gets processors that know of
chunks, and its positions hooks that know where a chunk lies in the video; outside the calls of `CausalDenoiser` both do
what diffusers' own do. Every parameter is used inside the module that owns it, so ZeRO-3 can gather it there.
Sources: Yin et al. 2024, arXiv 2412.07772 (block-causal attention); Huang et al. 2025, arXiv 2506.08009, Alg. 1
(rollout with a key-value cache).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.diffusion.chunks import chunk_spans
from raydistill.errors import SignalMismatch
from raydistill.models.causal_attention import Call, KVCache, Span
from raydistill.models.causal_families import family_of


class CausalDenoiser:
    """Asks a video transformer for predictions in chunks of `chunk_frames` latent frames.

    `network` is one that `raydistill.models.causal_families` knows; `ConfigError` names what is not supported. Several
    of these may share a network.
    """

    def __init__(self, network: nn.Module, chunk_frames: int):
        self.network = network
        self.chunk_frames = chunk_frames
        self._family = family_of(network)
        self._call = self._family.prepare(network)

    def spans(self, num_frames: int) -> tuple[tuple[int, int], ...]:
        """First and past-the-end frame of each chunk of a video; the first takes the remainder."""
        return chunk_spans(num_frames, self.chunk_frames)

    def new_cache(self, num_frames: int) -> KVCache:
        """An empty cache for a video of `num_frames` latent frames."""
        self._family.require_room(self.network, num_frames)
        return KVCache(num_frames)

    def predict(
        self,
        x_t: Float[Tensor, "samples channels frames height width"],
        t: Float[Tensor, "samples frames"],
        conditioning: Mapping[str, Tensor],
        *,
        clean: Float[Tensor, "samples channels frames height width"] | None = None,
        clean_t: Float[Tensor, "samples frames"] | None = None,
    ) -> Float[Tensor, "samples channels frames height width"]:
        """The prediction for all frames at once, in the network's own prediction type, fp32.

        A chunk sees itself and the chunks before it: as they are in `x_t`, or, with `clean`, as they are there
        (teacher forcing), of which the network is told the times `clean_t`. `t` is what the network is told of each
        frame; `conditioning` holds `prompt_embeds` [samples, tokens, width].
        """
        frames, tokens = x_t.shape[2], self._tokens(x_t)
        spans = self.spans(frames)
        self._family.require_room(self.network, frames)
        if clean is None:
            pieces = [Span(_tokens(a, b, tokens), (_tokens(0, b, tokens),)) for a, b in spans]
            return self._ask(x_t, t, conditioning, range(frames), tuple(pieces))
        assert clean_t is not None, "the times of the clean frames"
        # Nothing comes after the last chunk, so nobody looks at it as context.
        known = spans[-1][0]
        pieces = [Span(_tokens(a, b, tokens), (_tokens(0, b, tokens),)) for a, b in spans[:-1]]
        for a, b in spans:
            own = _tokens(known + a, known + b, tokens)
            pieces.append(Span(own, (_tokens(0, a, tokens), own) if a else (own,)))
        both = torch.cat([clean[:, :, :known].to(x_t.dtype), x_t], dim=2)
        times = torch.cat([clean_t[:, :known].to(t.dtype), t], dim=1)
        places = (*range(known), *range(frames))
        return self._ask(both, times, conditioning, places, tuple(pieces))[:, :, known:]

    def predict_chunk(
        self,
        x_t: Float[Tensor, "samples channels frames height width"],
        t: Float[Tensor, " samples"],
        conditioning: Mapping[str, Tensor],
        cache: KVCache,
        start: int,
    ) -> Float[Tensor, "samples channels frames height width"]:
        """The prediction for frames `start` … of a video whose earlier frames are in `cache`, in fp32.

        All frames of the chunk have one time `t`, as the network is told it. Without gradients the chunk's keys and
        values are written into the cache (see `KVCache`).
        """
        end = start + x_t.shape[2]
        assert end <= cache.num_frames, f"frames {start} to {end} of a cache for {cache.num_frames}"
        return self._ask(x_t, t, conditioning, range(start, end), (), cache=cache, first=start)

    def _tokens(self, x_t: Tensor) -> int:
        """Tokens of a frame."""
        return self._family.frame_tokens(self.network, x_t.shape[3], x_t.shape[4])

    def _ask(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        frames: Sequence[int],
        spans: tuple[Span, ...],
        *,
        cache: KVCache | None = None,
        first: int = 0,
    ) -> Tensor:
        if "prompt_embeds" not in conditioning:
            raise SignalMismatch(
                f"{type(self.network).__name__} wants prompt_embeds, found "
                f"{', '.join(sorted(conditioning)) or 'nothing'}; give source.text_encoders what it was trained with."
            )
        call = self._call
        places = torch.tensor(frames, device=x.device)
        with _entered(call, places, self._tokens(x), max(frames) + 1, spans, cache, first):
            return self._family.ask(self.network, x, t, conditioning["prompt_embeds"], self._tokens(x)).float()


def _tokens(first: int, end: int, tokens: int) -> slice:
    return slice(first * tokens, end * tokens)


@contextmanager
def _entered(
    call: Call,
    frames: Tensor,
    tokens: int,
    length: int,
    spans: tuple[Span, ...],
    cache: KVCache | None,
    first: int,
) -> Iterator[None]:
    call.frames, call.tokens, call.length = frames, tokens, length
    call.spans, call.cache, call.first = spans, cache, first
    try:
        yield
    finally:
        call.frames, call.spans, call.cache = None, (), None
