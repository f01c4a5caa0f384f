"""Trains the small autoencoder of configs/tiny/sdxl_vae.yaml on the emoji of both styles, into `vae/` beside it.

    python configs/tiny/teachers/train_vae.py [steps]

AutoencoderKL of diffusers, 24 × 24 pixels to 4 × 12 × 12 latents; loss: mean absolute error + 1e-4 KL to the standard
normal. `scaling_factor` is one over the standard deviation of the latents, as in Rombach et al. 2021, arXiv 2112.10752.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent
SIDE = 24


def images(path: Path) -> Tensor:
    """[n, 3, 24, 24] in [-1, 1], on white."""
    pixels = []
    for content in pq.read_table(path)["image"].to_pylist():
        image = Image.open(io.BytesIO(content)).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        pixels.append(np.asarray(white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def main(steps: int = 1500) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    data = torch.cat([images(path) for path in sorted((HERE.parents[1] / "data/emoji").glob("*.parquet"))])
    vae = AutoencoderKL(
        block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        batch = data[torch.randint(len(data), (32,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).abs().mean()
        loss = error + 1e-4 * posterior.kl().mean() / batch[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: mean absolute error {error.item():.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in data.split(64)])
        scale = round(1 / latents.std().item(), 5)
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    vae.register_to_config(scaling_factor=scale)
    vae.half().save_pretrained(HERE / "vae")
    print(f"scaling_factor {scale}; mean absolute error of decoded modes {(decoded - data).abs().mean():.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
