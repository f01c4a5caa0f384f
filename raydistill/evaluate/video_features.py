"""Generated videos against others, through the eyes of another network: the Fréchet distance of videos.

It is the distance of `features`, of one vector for each video, with the same bias at few videos; it is FVD only with
the I3D network of its paper, and always told with the extractor's name and the number of videos.
Source: Unterthiner et al. 2018, arXiv 1812.01717, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.evaluate.features import extractor_file, extractor_name, feature_distances, load_torchscript, resized
from raydistill.models.i3d import LEAST_FRAMES, SIZE, load_i3d
from raydistill.signals import JsonValue

CHECKPOINT = ".ckpt"
"""Ending of the file of I3D; other files are TorchScript."""


class VideoExtractor:
    """A network from videos to feature vectors: I3D out of its published checkpoint, or TorchScript.

    Frames are resized (bilinear, anti-aliased) to `size`². I3D is fed [1, 3, frames, 224, 224] in [-1, 1] and gives its
    400 logits; TorchScript is fed (x - 128) / 128 of x in [0, 255], as published files of I3D want them.
    """

    def __init__(self, source: str, size: int, device: torch.device, *, key: str = "evaluate.videos.feature_extractor"):
        """`key` begins the messages about a file or a size that will not do."""
        self.name, self.size, self.device, self._key = extractor_name(source), size, device, key
        path = extractor_file(source, key=key)
        self.is_i3d = path.suffix == CHECKPOINT
        self._network: nn.Module = load_i3d(path).to(device) if self.is_i3d else load_torchscript(path, device, key=key)
        if self.is_i3d and size != SIZE:
            raise ConfigError(f"{key}: I3D looks at frames of {SIZE} × {SIZE}, found feature_size {size}; set {SIZE}.")

    @torch.no_grad()
    def __call__(self, videos: Iterable[Float[Tensor, "3 frames h w"]]) -> Float[Tensor, "n d"]:
        """Features of videos with values in [0, 1]; fp32 on the CPU."""
        found = []
        for video in videos:
            if self.is_i3d:
                require_frames(video.shape[1], key=self._key)
            frames = torch.stack([resized(frame, self.size) for frame in video.unbind(1)], 1)[None].to(self.device)
            found.append(self._network(2 * frames - 1 if self.is_i3d else (255 * frames - 128) / 128))
        if not all(isinstance(f, Tensor) and f.numel() == found[0].numel() for f in found):
            raise ConfigError(
                f"{self._key}: wanted a network that gives one vector per video, found one that gives "
                f"{type(found[0]).__name__} ({self.name})."
            )
        return torch.stack([f.flatten().float().cpu() for f in found]) if found else torch.empty(0, 1)


def check_video_extractor(source: str, frames: int, *, key: str) -> None:
    """Raise what would be found out only after training: a missing file, or videos too short for I3D."""
    if extractor_file(source, key=key).suffix == CHECKPOINT:
        require_frames(frames, key=key)


def require_frames(frames: int, *, key: str) -> None:
    """`ConfigError` for videos that are too short for I3D."""
    if frames < LEAST_FRAMES:
        raise ConfigError(
            f"{key}: I3D looks at videos of at least {LEAST_FRAMES} frames, found {frames}; make longer ones, or give "
            "a TorchScript network that looks at shorter ones."
        )


def video_distance(
    extractor: str, generated: Float[Tensor, "n d"], others: Float[Tensor, "m d"], *, remedy: str
) -> dict[str, JsonValue]:
    """Fréchet and kernel distance of the features of two sets of videos, by the name of the extractor and with n.

    `remedy` says what to do where there are too few.
    """
    return feature_distances(generated, others, extractor, things="videos", remedy=remedy)
