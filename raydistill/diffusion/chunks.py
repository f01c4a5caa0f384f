"""How the frames of a video are cut into chunks, which a causal student makes one after the other."""

from __future__ import annotations

from raydistill.errors import ConfigError


def chunk_spans(num_frames: int, chunk_frames: int) -> tuple[tuple[int, int], ...]:
    """First and past-the-end latent frame of each chunk; the first chunk takes the remainder.

    8 frames in chunks of 3 are (0, 2), (2, 5), (5, 8). `ConfigError` when a chunk is longer than the video.
    """
    if not 1 <= chunk_frames <= num_frames:
        raise ConfigError(
            f"chunk_frames: wanted a chunk of 1 to {num_frames} latent frames, the length of the video, found "
            f"{chunk_frames}; make chunk_frames smaller or the videos longer."
        )
    first = num_frames % chunk_frames or chunk_frames
    starts = range(first, num_frames, chunk_frames)
    return ((0, first), *((start, start + chunk_frames) for start in starts))
