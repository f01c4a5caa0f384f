"""Buckets: the few sizes that images are brought to."""

from __future__ import annotations

from diffusers.training_utils import generate_aspect_ratio_buckets

from raydistill.config.sources import Pictures
from raydistill.sources.pixels import Bucket

WIDE_RATIOS = (2.5, 3.0, 4.0)
"""Ratios of sides beyond the 2:1 at which diffusers' own list ends."""


def buckets_of(source: Pictures) -> tuple[Bucket, ...]:
    """The sizes that images are brought to: those of the configuration, or else about `resolution`² pixels each, with
    sides in multiples of `bucket_step` and at most `max_aspect` apart. Sorted."""
    if source.buckets:
        return tuple(sorted(source.buckets))
    side = source.resolution
    found = {(int(h), int(w)) for h, w in generate_aspect_ratio_buckets(side, source.bucket_step)}
    wide = [(1.0, ratio) for ratio in WIDE_RATIOS] + [(ratio, 1.0) for ratio in WIDE_RATIOS]
    found |= {(int(h), int(w)) for h, w in generate_aspect_ratio_buckets(side, source.bucket_step, wide)}
    return tuple(sorted(b for b in found if max(b) <= source.max_aspect * min(b)))
