"""Videos as files: mp4 for players, animated WebP for pages."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import cast

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from raydistill.errors import ConfigError

Frames = Float[Tensor, "3 frames height width"]
"""One video with values in [0, 1]; others are cut off there."""
CODECS = ("libx264", "libopenh264", "mpeg4")
"""Encoders of mp4, best first: which of them there are depends on how PyAV was built."""


def pictures(video: Frames) -> np.ndarray:
    """The frames as 8-bit RGB, [frames, height, width, 3]."""
    found: np.ndarray = (255 * video.float().clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return found


def mp4(video: Frames, *, fps: float) -> bytes:
    """An mp4 file. A side of odd length is repeated once at its end, since players want even ones."""
    frames = pictures(video)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise ConfigError(f"wanted a PyAV that encodes mp4 ({', '.join(CODECS)}), found none of them; reinstall av.")
    out = io.BytesIO()
    with av.open(out, mode="w", format="mp4") as file:
        stream = cast(av.VideoStream, file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001)))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return out.getvalue()


def animation(video: Frames, *, fps: float) -> bytes:
    """An endless animated WebP, exact in every pixel."""
    first, *rest = (Image.fromarray(picture) for picture in pictures(video))
    out = io.BytesIO()
    first.save(
        out, "WEBP", save_all=True, append_images=rest, duration=max(1, round(1000 / fps)), loop=0, lossless=True,
        minimize_size=False,
    )  # fmt: skip
    return out.getvalue()
