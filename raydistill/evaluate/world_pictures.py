"""Frames as film strips and animations."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

GAP = 1
"""Pixels between the frames of a strip."""


def as_bytes(frames: Float[Tensor, "s c h w"]) -> np.ndarray:
    """Frames with values about in [0, 1] as [S, H, W, 3] uint8."""
    levels = (frames.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy().transpose(0, 2, 3, 1)
    return levels.repeat(3, axis=3) if levels.shape[3] == 1 else levels[..., :3]


def strip(frames: Float[Tensor, "s c h w"]) -> bytes:
    """A PNG with the frames side by side."""
    images = as_bytes(frames)
    count, height, width, _ = images.shape
    whole = np.full((height, count * (width + GAP) - GAP, 3), 255, np.uint8)
    for place, image in enumerate(images):
        whole[:, place * (width + GAP) : place * (width + GAP) + width] = image
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def animation(frames: Float[Tensor, "s c h w"], *, fps: float = 5.0, scale: int = 1) -> bytes:
    """A GIF that plays the frames for ever."""
    images = [Image.fromarray(image) for image in as_bytes(frames)]
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    buffer = io.BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def actions_line(actions: Sequence[int]) -> str:
    """Actions as a line of numbers."""
    return " ".join(str(int(action)) for action in actions)
