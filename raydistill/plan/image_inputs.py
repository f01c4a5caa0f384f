"""How many images there will be, how large, and how many bytes their caches take.

Counted where the caches are there, estimated from the files otherwise; every number says which.
"""

from __future__ import annotations

import math

import pyarrow.parquet as pq

from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.manifest import Manifest
from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, LatentSource, PromptsSource, VideosSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher
from raydistill.errors import RaydistillError
from raydistill.models.autoencoder import SpaceFacts, space_facts
from raydistill.models.denoiser import Shapes, shapes_of
from raydistill.models.denoiser_counts import empty_denoiser_student
from raydistill.models.text_encoder import TextFacts, text_facts
from raydistill.plan.inputs import finished_manifest, has_inputs
from raydistill.sources.buckets import buckets_of
from raydistill.sources.image_files import ImageFile, find_image_files
from raydistill.sources.prompts import read_prompts
from raydistill.sources.tars import samples

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROW_BYTES = 24 + 4 + 120
"""Bytes per image for its size conditioning, the place of its caption, and (a guess) its id, hash and caption."""
DRAW_BYTES = 4 + 8
"""Bytes per draw for its timestep and the hash of its noise."""
USUAL_FACTOR, USUAL_CHANNELS, USUAL_TOKENS, USUAL_FRAME_FACTOR = 8, 4, 77, 4
"""Of the autoencoder and the text encoders of Stable Diffusion, where the configured ones cannot be read."""


class ImageShape(Config):
    """What denoisers are asked about."""

    latents: tuple[int, ...]
    """Channels, height and width of the latents of a square image (of the largest size, where none is square); of a
    video the frames stand after the channels."""
    text_tokens: int
    """Tokens of a caption; 0 without captions."""
    text_width: int
    """Width of a token's embedding."""
    pooled_width: int
    """Width of the vector of a whole caption."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents[-2], self.latents[-1]

    @property
    def frames(self) -> int | None:
        """Latent frames of a video; None for an image."""
        return self.latents[1] if len(self.latents) == 4 else None

    @property
    def prediction(self) -> int:
        """Numbers in a prediction."""
        return math.prod(self.latents)


class ImageInputsPlan(Config):
    """Images of the source."""

    rows: int
    """Images, training and held out; one that cannot be read counts too where this is an estimate."""
    train_rows: int
    """Images that are trained on."""
    cached: bool
    """Whether the inputs cache is there, so that the numbers are exact."""
    basis: str
    """How the numbers came about."""
    bytes_per_image: float
    """Bytes of an image in the inputs cache, without its caption's embeddings."""
    bytes_per_caption: float
    """Bytes of the embeddings of a caption; each is stored once per shard."""
    total_bytes: int
    """Bytes of the inputs cache; at most, where it is an estimate: no two images may share a caption."""


class DrawCachePlan(Config):
    """Size of a cache of predictions."""

    bytes_per_draw: float
    """Bytes of one draw: prediction, timestep, hash of the noise, taps."""
    total_bytes: int | None
    """Bytes of all draws; None when the number of images is not known."""
    cached: bool
    """Whether the cache is there, so that the size is exact and the teacher need not run."""


def image_shape(config: RunConfig, missing: list[str]) -> ImageShape:
    """Sizes of latents and captions; what has to be assumed is added to `missing`."""
    source = config.latents
    frames = None if isinstance(source, ImagesSource) else source.frames
    try:
        space = space_facts(source.vae, clips=True) if frames is not None else space_facts(source.vae)
    except RaydistillError as error:
        missing.append(f"the size of latents, taken to be 1/{USUAL_FACTOR} of each side: {error}")
        shapes = _asked_for(config)
        channels = shapes.latent_channels if shapes else USUAL_CHANNELS
        space = SpaceFacts(
            channels=channels, factor=USUAL_FACTOR, scaling={}, frame_factor=USUAL_FRAME_FACTOR if frames else 1
        )
    try:
        text = text_facts(source.text_encoders)
    except RaydistillError as error:
        tokens = max(encoder.max_tokens or USUAL_TOKENS for encoder in source.text_encoders)
        missing.append(f"the size of captions, taken to be {tokens} tokens of what the student wants: {error}")
        shapes = _asked_for(config)
        text = TextFacts(shapes.text_width, shapes.pooled_width, tokens) if shapes else TextFacts()
    buckets = (source.size,) if isinstance(source, PromptsSource) else buckets_of(source)
    size = max([b for b in buckets if b[0] == b[1]] or buckets, key=math.prod)
    return ImageShape(
        latents=space.latent_shape(size, frames),
        text_tokens=text.tokens,
        text_width=text.width,
        pooled_width=text.pooled_width,
    )


def _asked_for(config: RunConfig) -> Shapes | None:
    """What the student wants of its inputs; None where it cannot be read."""
    try:
        return shapes_of(empty_denoiser_student(config.student))
    except RaydistillError:
        return None  # the student's own plan says why


def plan_image_inputs(
    config: RunConfig, shape: ImageShape, missing: list[str]
) -> tuple[ImageInputsPlan | None, Manifest | None]:
    """The images; reasons why a number cannot be had are added to `missing`."""
    source = config.latents
    item = BYTES[source.store_dtype]
    per_caption = item * (shape.text_tokens * shape.text_width + shape.pooled_width)
    per_image = ROW_BYTES + (0 if isinstance(source, PromptsSource) else item * shape.prediction)
    manifest = _inputs_manifest(config, missing)
    if manifest is not None:
        return ImageInputsPlan(
            rows=sum(s.rows for s in manifest.shards),
            train_rows=sum(s.rows for s in manifest.split_shards("train")),
            cached=True,
            basis="counted in the inputs cache",
            bytes_per_image=per_image,
            bytes_per_caption=per_caption,
            total_bytes=sum(s.bytes for s in manifest.shards),
        ), manifest
    try:
        rows, basis = _rows_of(source)
    except RaydistillError as error:
        missing.append(f"number of {'prompts' if isinstance(source, PromptsSource) else 'images'}: {error}")
        if source.max_rows is None:
            return None, None
        rows, basis = source.max_rows, "if the source has max_rows images"
    if source.max_rows is not None and rows > source.max_rows:
        rows, basis = source.max_rows, "the source has more than max_rows images"
    return ImageInputsPlan(
        rows=rows,
        train_rows=round(rows * (1 - config.evaluate.held_out)),
        cached=False,
        basis=f"estimated: {basis}",
        bytes_per_image=per_image,
        bytes_per_caption=per_caption,
        total_bytes=round(rows * (per_image + per_caption)),
    ), None


def _inputs_manifest(config: RunConfig, missing: list[str]) -> Manifest | None:
    if not has_inputs(config):  # the files need not be hashed, which can take long
        return None
    try:
        return finished_manifest(config, "inputs", inputs_content(config))
    except RaydistillError as error:
        missing.append(f"whether the inputs cache is there: {error}")
        return None


def plan_draw_cache(
    config: RunConfig,
    teacher: NoisePredictionTeacher | OdeTrajectoryTeacher,
    inputs: ImageInputsPlan | None,
    manifest: Manifest | None,
    prediction: int,
    taps: int,
) -> DrawCachePlan:
    """Size of a cache for `prediction` numbers and `taps` more per draw; a trajectory has so many numbers for each kept
    state and for the sample."""
    kept = 1 + len(teacher.keep_t) if isinstance(teacher, OdeTrajectoryTeacher) else 1
    per_draw: float = BYTES[teacher.store_dtype] * (kept * prediction + taps) + DRAW_BYTES
    draws = config.latents.noise.draws_per_row
    if manifest is not None:
        try:
            signal = finished_manifest(config, teacher.name, signal_content(config, teacher, manifest))
        except RaydistillError:
            signal = None  # the teacher's own plan says why its weights cannot be read
        if signal is not None:
            total, rows = sum(s.bytes for s in signal.shards), sum(s.rows for s in signal.shards)
            return DrawCachePlan(bytes_per_draw=total / max(draws * rows, 1), total_bytes=total, cached=True)
    total_bytes = round(per_draw * draws * inputs.rows) if inputs is not None else None
    return DrawCachePlan(bytes_per_draw=per_draw, total_bytes=total_bytes, cached=False)


def _rows_of(source: LatentSource) -> tuple[int, str]:
    """Rows of a source that is not read yet, and how they were counted."""
    if isinstance(source, PromptsSource):
        return len(read_prompts(source, 0.0)), "different lines of the files"
    return _rows_in_files(find_image_files(source.paths, clips=isinstance(source, VideosSource)))


def _rows_in_files(files: list[ImageFile]) -> tuple[int, str]:
    """Images in files, and how they were counted."""
    loose = [f for f in files if f.is_loose]
    tables, tars = ([f for f in files if f.kind == kind] for kind in ("parquet", "tar"))
    rows = len(loose) + sum(pq.read_metadata(f.uri).num_rows for f in tables)
    parts = [(len(loose), "image"), (len(tables), "Parquet file"), (len(tars), "tar")]
    basis = ", ".join(f"{count:,} {what}{'s' if count > 1 else ''}" for count, what in parts if count)
    if tars:
        first = sum(1 for sample in samples(tars[0], None) if sample.data is not None)
        rows += round(first * sum(f.size for f in tars) / max(tars[0].size, 1))
        basis += ", counted in the first tar and scaled by size" if len(tars) > 1 else ""
    return rows, basis
