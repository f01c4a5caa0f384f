"""Time of making 21 latent frames chunk by chunk: with a key-value cache, and by recomputing all frames at every step.

The same network, noise and steps in each way; the videos agree to rounding. `mask` is diffusers' own forward pass of
all 21 frames under a block-causal mask, `chunks` the same pass without a mask (a chunk attends to slices of the keys),
`cache` asks about one chunk at a time. Ways alternate, so that a change of the machine's speed meets all.

    python benchmarks/causal_generation.py [tiny | wan1.3b] [repeats]
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from machine import write
from torch import Tensor

from raydistill.config.models import CausalConfig, GeneratorConfig
from raydistill.diffusion.chunks import chunk_spans
from raydistill.diffusion.process import Process
from raydistill.models.causal import CausalDenoiser
from raydistill.models.rollout import Rollout

FRAMES, CHUNK = 21, 3
GENERATOR = GeneratorConfig(t_list=(1.0, 0.9375, 0.8333, 0.625, 0.0), causal=CausalConfig(chunk_frames=CHUNK))
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 384, "num_layers": 4, "text_dim": 32,
             "side": (16, 16), "tokens": 16},
    "wan1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30,
                "text_dim": 4096, "side": (60, 104), "tokens": 512},
}  # fmt: skip


class Masked(WanAttnProcessor):
    """diffusers' self-attention under a mask."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def __call__(self, attn: Any, hidden: Tensor, text: Any = None, mask: Any = None, rotary: Any = None) -> Tensor:
        out: Tensor = super().__call__(attn, hidden, text, self.mask, rotary)
        return out


Ask = Callable[[Tensor, Tensor], Tensor]
"""(all frames, their times [samples, frames]) → the flow of all frames."""


def recompute(ask: Ask, noise: Callable[[str], Tensor]) -> Tensor:
    """The rollout by asking about all frames at every step; flows, context at time 0."""
    times, made = GENERATOR.t_list[:-1], torch.zeros_like(noise("start"))
    for a, b in chunk_spans(FRAMES, CHUNK):
        x = noise("start")[:, :, a:b]
        for step, t in enumerate(times):
            whole, at = made.clone(), torch.zeros(len(made), FRAMES, device=made.device)
            whole[:, :, a:b], at[:, a:b] = x, t
            clean = x - t * ask(whole, 1000 * at)[:, :, a:b]
            if step + 1 < len(times):
                s = times[step + 1]
                x = (1 - s) * clean + s * noise(f"step {step + 1}")[:, :, a:b]
        made[:, :, a:b] = clean
    return made


def main(size: str, repeats: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = dict(SIZES[size])
    (height, width), tokens = settings.pop("side"), settings.pop("tokens")
    torch.manual_seed(0)
    with torch.device(device):
        network: Any = torch.nn.Module.to(WanTransformer3DModel(**settings).eval(), dtype)
    masked = copy.deepcopy(network)
    frame = (height // 2) * (width // 2)
    chunk_of = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(chunk_spans(FRAMES, CHUNK))])
    block = chunk_of.repeat_interleave(frame).to(device)
    mask = block[:, None] >= block[None, :]
    for part in masked.blocks:
        part.attn1.set_processor(Masked(mask))
    seeds = {"start": 0, "step 1": 1, "step 2": 2, "step 3": 3}
    drawn = {
        use: torch.randn(1, 16, FRAMES, height, width, generator=torch.Generator().manual_seed(s)).to(device)
        for use, s in seeds.items()
    }
    text: Mapping[str, Tensor] = {"prompt_embeds": torch.randn(1, tokens, settings["text_dim"], device=device)}
    causal = CausalDenoiser(network, CHUNK)
    rollout = Rollout(causal, Process.from_scheduler({"shift": 5.0, "num_train_timesteps": 1000}), GENERATOR)

    def by_mask(x: Tensor, told: Tensor) -> Tensor:
        times = told.repeat_interleave(frame, dim=1)
        out: Tensor = masked(x.to(dtype), times, text["prompt_embeds"].to(dtype), return_dict=False)[0]
        return out.float()

    ways: dict[str, Callable[[], Tensor]] = {
        "cache": lambda: rollout(drawn.__getitem__, text),
        "chunks": lambda: recompute(lambda x, told: causal.predict(x, told, text), drawn.__getitem__),
        "mask": lambda: recompute(by_mask, drawn.__getitem__),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    videos: dict[str, Tensor] = {}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                videos[name] = way()
                if device == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    scale = videos["mask"].abs().max()
    write(
        "causal_generation" if size == "tiny" else f"causal_generation_{size}",
        {
            "network": {"parameters": sum(p.numel() for p in network.parameters()), "dtype": str(dtype)},
            "video": {"latent_frames": FRAMES, "chunk_frames": CHUNK, "tokens_per_frame": frame, "steps": 4},
            "seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
            "frames_per_second": {name: round(FRAMES / value, 2) for name, value in middle.items()},
            "cache_over_mask": round(middle["mask"] / middle["cache"], 2),
            "cache_over_chunks": round(middle["chunks"] / middle["cache"], 2),
            "largest_difference": {n: float((v - videos["mask"]).abs().max() / scale) for n, v in videos.items()},
        },
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny", int(sys.argv[2]) if len(sys.argv) > 2 else 5)
