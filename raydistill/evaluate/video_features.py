"""Generated videos against others, through the eyes of another network: the Fréchet distance of videos.

It is the distance of `features`, of one vector for each video, with the same bias at few videos; it is called FVD only
with the I3D network of its paper, and always told with the extractor's name and the number of videos.
Source: Unterthiner et al. 2018, arXiv 1812.01717, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.evaluate.features import Extractor, feature_distances, resized
from raydistill.signals import JsonValue

KEY = "evaluate.videos.feature_extractor"


class VideoExtractor(Extractor):
    """A TorchScript network from videos to feature vectors.

    Frames are resized (bilinear, anti-aliased) to `size`² and fed as [1, 3, frames, size, size] with (x - 128) / 128 of
    x in [0, 255], as published TorchScript files of I3D want them.
    """

    def __init__(self, source: str, size: int, device: torch.device):
        super().__init__(source, size, device, key=KEY)

    @torch.no_grad()
    def __call__(self, images: Iterable[Float[Tensor, "3 frames h w"]]) -> Float[Tensor, "n d"]:
        """Features of videos with values in [0, 1]; fp32 on the CPU."""
        found = []
        for video in images:
            frames = torch.stack([resized(frame, self.size) for frame in video.unbind(1)], 1)
            found.append(self.network((255 * frames[None].to(self.device) - 128) / 128))
        if not all(isinstance(f, Tensor) and f.numel() == found[0].numel() for f in found):
            raise ConfigError(
                f"{KEY}: wanted a network that gives one vector per video, found one that gives "
                f"{type(found[0]).__name__} ({self.name})."
            )
        return torch.stack([f.flatten().float().cpu() for f in found])


def video_distance(
    extractor: VideoExtractor,
    generated: Iterable[Float[Tensor, "3 frames h w"]],
    others: Iterable[Float[Tensor, "3 frames h w"]],
) -> dict[str, JsonValue]:
    """Fréchet and kernel distance of two sets of videos, by the name of the extractor and with their numbers."""
    return feature_distances(extractor(generated), extractor(others), extractor.name)
