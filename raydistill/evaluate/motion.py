"""How videos move: whether neighbouring frames fit, whether chunks join without a jump, and whether long ones drift.

Videos are [videos, 3, frames, height, width] with values in [0, 1]. None of these is good by being high or low: they
are read beside the same numbers of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.signals import JsonValue

Videos = Float[Tensor, "videos 3 frames height width"]
STILL = 1e-6
"""Change of a pixel, or contrast of a frame, below which there is none."""


def motion(videos: Videos, *, seams: Sequence[int] = ()) -> dict[str, JsonValue]:
    """`frame_similarity`, `frame_change` and, with `seams`, `seam_change`, in the mean over videos.

    * `frame_similarity`: correlation of the pixels of neighbouring frames, -1 to 1; 1 where both are of one colour;
    * `frame_change`: mean absolute difference of neighbouring frames, in units of the range of pixels;
    * `seam_change`: the same between the frames before and at each place in `seams` (first frames of chunks), as a
      multiple of that between all other neighbours; 1 where chunks join as smoothly as frames. None for still videos.
    """
    before, after = videos[:, :, :-1].float(), videos[:, :, 1:].float()
    change = (after - before).abs().mean((0, 1, 3, 4))
    a, b = (x - x.mean((1, 3, 4), keepdim=True) for x in (before, after))
    lengths = [x.square().sum((1, 3, 4)).sqrt() for x in (a, b)]
    both = lengths[0] * lengths[1]
    plain = both < STILL
    similarity = torch.where(plain, 1.0, (a * b).sum((1, 3, 4)) / both.clamp_min(STILL))
    found: dict[str, JsonValue] = {
        "frame_similarity": float(similarity.mean()),
        "frame_change": float(change.mean()),
    }
    if seams:
        at = torch.zeros(len(change), dtype=torch.bool)
        at[torch.tensor(sorted(seams)) - 1] = True
        inside = float(change[~at].mean()) if (~at).any() else 0.0
        found["seam_change"] = float(change[at].mean()) / inside if inside > STILL else None
    return found


def drift(videos: Videos, *, window: int) -> dict[str, JsonValue]:
    """How far brightness and contrast of each colour go from those of the first `window` frames.

    `by_frame` is the root mean square difference of the mean and standard deviation of a frame's colours to those of
    the first frames, in the mean over videos; `drift` is its mean over the last `window` frames. Rollouts on their own
    context that saturate or fade show here before anything else.
    """
    frames = videos.float().movedim(2, 1).flatten(3)
    told = torch.cat([frames.mean(3), frames.std(3)], 2)
    away = (told - told[:, :window].mean(1, keepdim=True)).square().mean(2).sqrt().mean(0)
    return {"drift": float(away[-window:].mean()), "by_frame": [float(v) for v in away]}
