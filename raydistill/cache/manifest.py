"""What a cache says about itself.

A cache is a folder of immutable shards and a `manifest.json` that is written last. Its fingerprint is the hash of
`content`: everything that decides the bytes of the shards, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, JsonValue, RootModel, ValidationError

from raydistill.config.base import Config
from raydistill.errors import CacheMismatch, DataError

MANIFEST_VERSION = 1

M = TypeVar("M", bound=BaseModel)


class ShardRecord(Config):
    """One shard, as it was when it was published."""

    name: str
    """File name inside the cache folder."""
    split: Literal["train", "held_out"]
    """Every row of a shard belongs to one split."""
    rows: int
    """Samples."""
    tokens: int
    """Tokens of an inputs shard, targets of a signal shard; 0 where the word has no meaning."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file."""


class FieldRecord(Config):
    """A field of the schema, as JSON."""

    dtype: str
    """Name of the torch dtype without its prefix, e.g. `float16`."""
    dims: tuple[str, ...]
    """Axes after the sample axis; `target` is ragged."""
    doc: str
    """Meaning and unit."""


class Manifest(Config):
    """The last file written into a cache."""

    version: int = MANIFEST_VERSION
    kind: Literal["inputs", "signal"]
    content: dict[str, JsonValue]
    """Everything that defines the bytes: weights hash, tokenizer, rows, K, dtype, batch rule, codec version."""
    fingerprint: str
    """`fingerprint_of(content)`."""
    parent: str | None = None
    """Fingerprint of the inputs a signal was made from."""
    fields: dict[str, FieldRecord]
    """What a row holds."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What a reader must know: vocabulary size, K, temperatures, codec, library versions and device kind."""
    shards: tuple[ShardRecord, ...]
    """All shards, in name order."""

    def require(self, *, fingerprint: str, content: Mapping[str, JsonValue], where: str) -> None:
        """Raise `CacheMismatch`, with the keys that differ, unless this cache is the one with `fingerprint`."""
        if self.fingerprint == fingerprint:
            return
        keys = sorted(k for k in {*content, *self.content} if content.get(k) != self.content.get(k))
        lines = [f"  {k}: wanted {json.dumps(content.get(k))}, found {json.dumps(self.content.get(k))}" for k in keys]
        raise CacheMismatch(
            f"{where} holds the cache of another configuration:\n" + "\n".join(lines) + "\n"
            "Point cache.dir at another folder, or move this one away."
        )

    def require_fields(self, names: tuple[str, ...], *, where: str) -> None:
        """Raise `CacheMismatch` unless every field in `names` is in this cache."""
        missing = sorted(set(names) - set(self.fields))
        if missing:
            raise CacheMismatch(
                f"{where}: the recipe reads {sorted(names)}, the cache holds {sorted(self.fields)}; "
                f"missing: {missing}. "
                "Build the cache with the settings that write these fields."
            )

    def split_shards(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of one split, in name order."""
        return tuple(s for s in self.shards if s.split == split)


class JsonObject(RootModel[dict[str, JsonValue]]):
    """Any JSON object, for `parsed`."""


class _Versioned(BaseModel):
    """What is read first, because another version may have other keys."""

    version: int = MANIFEST_VERSION


def parse_manifest(text: bytes, *, where: str) -> Manifest:
    """The manifest that a file holds.

    Raises `DataError` when it is truncated or not a manifest, `CacheMismatch` when this version cannot read it.
    """
    remedy = "Remove this file and run --stages inputs,signals, which writes it again and keeps the shards."
    version = parsed(_Versioned, text, where=where, remedy=remedy).version
    if version != MANIFEST_VERSION:
        raise CacheMismatch(
            f"{where} has version {version} of the cache format; this package reads version {MANIFEST_VERSION}. "
            "Read it with the version that wrote it, or build it again."
        )
    return parsed(Manifest, text, where=where, remedy=remedy)


def parsed(kind: type[M], text: bytes, *, where: str, remedy: str) -> M:
    """`text` as JSON of `kind`; `DataError`, with its first fault and what to do, when it is not that."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise DataError(f"{where} is damaged: wanted whole JSON, found {place}{first['msg']}. {remedy}") from error


def fingerprint_of(content: Mapping[str, JsonValue]) -> str:
    """Hash of the canonical JSON of `content`: 16 hexadecimal digits of its sha256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
