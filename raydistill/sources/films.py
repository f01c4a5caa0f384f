"""Videos as files: animated WebP for pages, MP4 for players."""

from __future__ import annotations

import io

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

MOST_PIXELS = 320
"""Longest side of an animation on a page; larger ones are made smaller."""


def webp(video: Float[Tensor, "3 frames height width"], fps: float) -> bytes:
    """A video with values in [0, 1] as an animation that repeats, its longest side at most `MOST_PIXELS`."""
    pictures = [Image.fromarray(frame) for frame in _frames(video)]
    for picture in pictures:
        if max(picture.size) > MOST_PIXELS:
            picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0,
        lossless=True,
    )  # fmt: skip
    return buffer.getvalue()


def mp4(video: Float[Tensor, "3 frames height width"], fps: float) -> bytes:
    """A video with values in [0, 1] as the content of an MP4 file (H.264), whose sides are made even."""
    frames = _frames(video)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _frames(video: Tensor) -> np.ndarray:
    """[frames, height, width, 3], uint8."""
    pixels = (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    found: np.ndarray = pixels.cpu().contiguous().numpy()
    return found
