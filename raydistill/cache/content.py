"""What defines a cache: the content whose hash is its fingerprint. Needs no Ray, so anyone may ask if it is there."""

from __future__ import annotations

from collections.abc import Mapping

from raydistill.cache.batches import BATCH_RULE
from raydistill.cache.codecs import CODEC_VERSIONS
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import INPUTS_FORMAT
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import TeacherConfig
from raydistill.models.load import load_tokenizer, model_identity
from raydistill.signals import JsonValue
from raydistill.sources.text import text_content

SIGNAL_VERSION = 1
"""Raised when a teacher would write other numbers for the same settings."""


def inputs_content(config: RunConfig) -> dict[str, JsonValue]:
    """What decides the bytes of an inputs cache: the files' hashes, the tokenizer, every setting of the source."""
    tokenizer = load_tokenizer(config.source.tokenizer)
    return {
        **text_content(config.source, tokenizer),
        "held_out": config.evaluate.held_out,
        "format": INPUTS_FORMAT,
    }


def signal_content(config: RunConfig, teacher: TeacherConfig, inputs_manifest: Manifest) -> dict[str, JsonValue]:
    """What decides the bytes of a signal cache: inputs, the teacher's weights and settings, batch rule and codec."""
    settings = teacher.model_dump(mode="json", exclude={"name", "weight", "model"})
    attention: Mapping[str, JsonValue] = {"attention": getattr(teacher.model, "attention", None)}
    return {
        **settings,
        **attention,
        "inputs": inputs_manifest.fingerprint,
        "model": model_identity(teacher.model),
        "batch_rule": BATCH_RULE,
        "codec_version": CODEC_VERSIONS[teacher.codec],
        "signal_version": SIGNAL_VERSION,
    }
