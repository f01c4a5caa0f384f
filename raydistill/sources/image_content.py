"""What defines a source of images: the content that its cache's fingerprint is made of, and what cannot be encoded.

Reads the headers of autoencoder and text encoders, never their weights.
"""

from __future__ import annotations

from raydistill.config.sources import Pictures, VideosSource
from raydistill.errors import ConfigError
from raydistill.models.autoencoder import space_facts, space_identity
from raydistill.models.text_encoder import text_facts, text_identity
from raydistill.signals import JsonValue
from raydistill.sources.buckets import buckets_of
from raydistill.sources.image_files import file_content, find_image_files
from raydistill.sources.images import captions_of

ROWS_VERSION = 1
"""Raised when the same files and settings would give other rows or other pixels."""


def require_fitting_buckets(source: Pictures) -> None:
    """Raise `ConfigError`, with the bucket and the factor, unless every bucket is a whole number of latents."""
    factor = space_facts(source.vae, clips=isinstance(source, VideosSource)).factor
    for size in buckets_of(source):
        remedy = "source.buckets" if source.buckets else "source.resolution and bucket_step"
        require_fitting_size(size, factor, remedy)


def require_fitting_size(size: tuple[int, int], factor: int, remedy: str) -> None:
    """Raise `ConfigError` unless a height and width in pixels are whole latents; `remedy` says what to change."""
    if size[0] % factor or size[1] % factor:
        what = "source.size" if remedy == "source.size" else "source.buckets: the bucket"
        raise ConfigError(
            f"{what} {list(size)} is not divisible by the autoencoder's factor of {factor} pixels per latent; wanted "
            f"multiples of {factor}. Change {remedy}."
        )


def require_fitting_frames(frames: int, factor: int) -> None:
    """Raise `ConfigError` unless an autoencoder that makes one latent of every `factor` frames but the first can encode
    a clip of `frames` frames without a rest."""
    if (frames - 1) % factor:
        near = (frames - 1) // factor * factor + 1
        raise ConfigError(
            f"source.frames: wanted {factor} k + 1 frames, of which the autoencoder makes k + 1 latents, found "
            f"{frames}; set it to {near} or {near + factor}."
        )


def image_content(source: Pictures) -> dict[str, JsonValue]:
    """What defines the rows and their encodings, for the fingerprint: the files' hashes, autoencoder and text encoders
    with their settings, the buckets, and every setting of the source but its noise.

    Raises `ConfigError` for what cannot be encoded: see `require_fitting_buckets` and `text_facts`.
    """
    require_fitting_buckets(source)
    if isinstance(source, VideosSource):
        require_fitting_frames(source.frames, space_facts(source.vae, clips=True).frame_factor)
    text_facts(source.text_encoders)
    files = find_image_files(source.paths, clips=isinstance(source, VideosSource))
    settings = source.model_dump(
        mode="json",
        exclude={"paths", "imported", "noise", "vae", "text_encoders", "buckets", "max_corrupt", "resolution"},
    )
    for key in ("bucket_step", "max_aspect"):  # what they decide are the buckets
        settings.pop(key)
    if not source.text_encoders:
        settings.pop("caption_key")
    if not any(file.kind == "parquet" for file in files):
        settings.pop("image_key")
    return {
        **settings,
        **file_content(files, captions_of(files, source).files),
        "buckets": [list(bucket) for bucket in buckets_of(source)],
        "vae": space_identity(source.vae),
        "text_encoders": [text_identity(encoder) for encoder in source.text_encoders],
        "rows_version": ROWS_VERSION,
    }
