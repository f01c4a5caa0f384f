"""What defines a cache: the content whose hash is its fingerprint. Needs no Ray, so anyone may ask if it is there."""

from __future__ import annotations

from raydistill.cache.batches import BATCH_RULE
from raydistill.cache.codecs import CODEC_VERSIONS
from raydistill.cache.dense_batch import BATCH_RULE as DRAWS_RULE
from raydistill.cache.episode_batch import CLIPS_RULE, EPISODES_FORMAT
from raydistill.cache.image_index import IMAGES_FORMAT
from raydistill.cache.joined import open_manifest
from raydistill.cache.ledger import DAMAGED, MANIFEST
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import INPUTS_FORMAT
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TeacherConfig, TopKLogitsTeacher
from raydistill.config.world import EpisodesSource, WorldTeacher
from raydistill.errors import ConfigError
from raydistill.models.denoiser import denoiser_identity, scheduler_config
from raydistill.models.load import load_tokenizer, model_identity
from raydistill.models.world.files import world_identity
from raydistill.signals import JsonValue
from raydistill.sources.episodes import episodes_content
from raydistill.sources.image_content import image_content
from raydistill.sources.prompts import PROMPTS_FORMAT, prompts_content
from raydistill.sources.text import text_content
from raydistill.storage import Store

SIGNAL_VERSION = 1
"""Raised when a teacher would write other numbers for the same settings."""


def inputs_content(config: RunConfig) -> dict[str, JsonValue]:
    """What decides the bytes of an inputs cache: the files' hashes, the models that encode, and every setting of the
    source but the noise of images.

    Raises `ConfigError` for images that cannot be encoded so.
    """
    match config.source:
        case ImagesSource(imported=str() as name):
            return imported_content(config, name, "source.imported")
        case TextSource():
            content, layout = text_content(config.source, load_tokenizer(config.source.tokenizer)), INPUTS_FORMAT
        case ImagesSource() | VideosSource():
            content, layout = image_content(config.source), IMAGES_FORMAT
        case EpisodesSource():
            content, layout = episodes_content(config.source), EPISODES_FORMAT
        case PromptsSource():
            content, layout = prompts_content(config.source), PROMPTS_FORMAT
    return {**content, "held_out": config.evaluate.held_out, "format": layout}


def signal_content(config: RunConfig, teacher: TeacherConfig, inputs_manifest: Manifest) -> dict[str, JsonValue]:
    """What decides the bytes of a signal cache: inputs, the teacher's weights and settings, and how it is asked."""
    if isinstance(teacher, NoisePredictionTeacher | OdeTrajectoryTeacher) and teacher.imported is not None:
        if not teacher.imported.startswith(f"{teacher.name}-"):
            raise ConfigError(f"teachers.*.imported: wanted a cache of {teacher.name!r}, found {teacher.imported!r}")
        return imported_content(config, teacher.imported, "teachers.*.imported")
    settings: dict[str, JsonValue] = {
        **teacher.model_dump(mode="json", exclude={"name", "weight", "model", "imported", "previews", "online"}),
        "inputs": inputs_manifest.fingerprint,
        "signal_version": SIGNAL_VERSION,
    }
    match teacher:
        case TopKLogitsTeacher():
            return {
                **settings,
                "attention": getattr(teacher.model, "attention", None),
                "model": model_identity(teacher.model),
                "batch_rule": BATCH_RULE,
                "codec_version": CODEC_VERSIONS[teacher.codec],
            }
        case NoisePredictionTeacher():
            return {
                **settings,
                "model": denoiser_identity(teacher.model),
                "noise": config.latents.noise.model_dump(mode="json"),
                "batch_rule": DRAWS_RULE,
            }
        case WorldTeacher():
            return {**settings, "model": world_identity(teacher.model), "batch_rule": CLIPS_RULE}
        case OdeTrajectoryTeacher():
            return {
                **settings,
                "model": denoiser_identity(teacher.model),
                "sampler": scheduler_config(teacher.model),
                "noise": config.latents.noise.model_dump(mode="json"),
                "batch_rule": DRAWS_RULE,
            }


def imported_content(config: RunConfig, name: str, key: str) -> dict[str, JsonValue]:
    """What an imported cache says of itself; `ConfigError` when it is not there whole."""
    store = Store(config.cache.dir) / name
    if not store.exists(MANIFEST) or store.exists(DAMAGED):
        state = "lists damaged shards" if store.exists(DAMAGED) else f"has no {MANIFEST}"
        raise ConfigError(
            f"{key}: wanted a finished cache at {store.uri}, which {state}. Import it (again): "
            "python -m raydistill.cache.per_sample import."
        )
    return open_manifest(store).content
