"""An inputs cache and the signals made from it, as one: opened only when they belong together and are sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from raydistill.cache.ledger import DAMAGED, MANIFEST
from raydistill.cache.manifest import Manifest, ShardRecord, parse_manifest
from raydistill.errors import CacheMismatch, VerificationFailed
from raydistill.storage import Store

V = TypeVar("V")
M = TypeVar("M")
Seen = TypeVar("Seen", covariant=True)
Made = TypeVar("Made", contravariant=True)


def open_manifest(store: Store) -> Manifest:
    """The manifest of a finished cache.

    Raises `CacheMismatch` when there is none, or one that this version cannot read, `DataError` when it is damaged.
    """
    if not store.exists(MANIFEST):
        state = f"is not finished: it has no {MANIFEST}" if store.exists() else "does not exist"
        raise CacheMismatch(f"the cache {store.uri} {state}. Run --stages inputs,signals, which completes it.")
    return parse_manifest(store.read(MANIFEST), where=f"{store.uri}/{MANIFEST}")


class Local(Protocol[Seen, Made]):
    """Files by key on the local disk, made on demand (`LocalFiles`, `LocalShards`)."""

    def get(self, key: str, make: Callable[[], Made], /) -> Seen:
        """What a reader keeps of the file."""

    def unpack(self, key: str, make: Callable[[], Made], /) -> Path:
        """The file."""


class Joined:
    """The shards of one split: inputs under the name `""`, and the signals of the teachers that `fields` names.

    Raises `CacheMismatch` when a signal was not made from these inputs or lacks a field, `VerificationFailed` when a
    cache is listed as damaged.
    """

    def __init__(self, inputs: Store, signals: Mapping[str, Store], *, split: str, fields: Mapping[str, Sequence[str]]):
        self.inputs_manifest = sound_manifest(inputs, "inputs")
        self.fields = {teacher: tuple(names) for teacher, names in fields.items() if names}
        self.stores: dict[str, Store] = {"": inputs}
        self.records: dict[str, tuple[ShardRecord, ...]] = {"": self.inputs_manifest.split_shards(split)}
        self.signal_manifests: dict[str, Manifest] = {}
        for teacher, names in self.fields.items():
            if teacher not in signals:
                raise CacheMismatch(
                    f"the recipe reads {sorted(names)} of teacher {teacher!r}, found signals of {sorted(signals)}. "
                    "Run --stages signals."
                )
            manifest = sound_manifest(signals[teacher], "signal")
            require_same_rows(signals[teacher], manifest, self.inputs_manifest)
            manifest.require_fields(tuple(names), where=signals[teacher].uri)
            self.signal_manifests[teacher] = manifest
            self.stores[teacher] = signals[teacher]
            self.records[teacher] = manifest.split_shards(split)

    def names(self) -> list[str]:
        """Names of the shards, in order."""
        return [record.name for record in self.records[""]]

    def where(self, source: str, shard: int) -> str:
        """Path of a shard, for messages."""
        return f"{self.stores[source].uri}/{self.records[source][shard].name}"

    def places(self, max_rows: int | None) -> tuple[np.ndarray, np.ndarray, slice | np.ndarray]:
        """Shard of each row, its place in the shard, and which rows of the split were kept.

        `max_rows` rows are kept, evenly spread over the split (shards are sorted, so the first rows are no sample).
        """
        counts = np.array([record.rows for record in self.records[""]], np.int64)
        shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        row = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
        if max_rows is None or max_rows >= len(shard):
            return shard, row, slice(None)
        kept = np.arange(max_rows) * len(shard) // max_rows
        return shard[kept], row[kept], kept


class OpenShards(Generic[V, M]):
    """The shards of `joined` on the local disk, mapped: the inputs (under `""`) and the signals, as one.

    `key` gives the name of a file in `local` for a source and a shard, and what makes the file; `check` gets inputs and
    a signal, and where that is, when they are first opened.
    """

    def __init__(
        self,
        joined: Joined,
        local: Local[V, M],
        key: Callable[[str, int], tuple[str, Callable[[], M]]],
        check: Callable[[V, V, str], None],
    ):
        self._joined, self._local, self._key, self._check = joined, local, key, check
        self._checked: set[int] = set()

    def unpack(self, shard: int) -> None:
        """Have a shard on the local disk by the time it is opened."""
        for source in self._joined.stores:
            self._local.unpack(*self._key(source, shard))

    def open(self, shard: int) -> dict[str, V]:
        """Inputs and signals of a shard, which belong together."""
        opened = {source: self._local.get(*self._key(source, shard)) for source in self._joined.stores}
        if shard not in self._checked:
            for teacher in self._joined.fields:
                self._check(opened[""], opened[teacher], self._joined.where(teacher, shard))
            self._checked.add(shard)
        return opened


def sound_manifest(store: Store, kind: str) -> Manifest:
    """The manifest of a cache of `kind` that is not listed as damaged."""
    manifest = open_manifest(store)
    if manifest.kind != kind:
        raise CacheMismatch(f"{store.uri} should be a cache of kind {kind!r}, found {manifest.kind!r}")
    if store.exists(DAMAGED):
        raise VerificationFailed(
            f"{store.uri}/{DAMAGED} lists damaged shards. Run --stages inputs,signals, which builds them again."
        )
    return manifest


def require_same_rows(store: Store, manifest: Manifest, inputs: Manifest) -> None:
    """Raise `CacheMismatch` unless a signal was made from these inputs and has their shards."""
    if manifest.parent != inputs.fingerprint:
        raise CacheMismatch(
            f"{store.uri} was made from the inputs {manifest.parent}, wanted {inputs.fingerprint}"
            f"{_differing(store, manifest, inputs)}. Run --stages inputs,signals with this configuration."
        )
    wanted = [(record.name, record.rows) for record in inputs.shards]
    found = [(record.name, record.rows) for record in manifest.shards]
    if wanted != found:
        differing = sorted({name for name, _ in {*wanted} ^ {*found}})
        raise CacheMismatch(
            f"{store.uri} should have the shards and row counts of its inputs; these differ: {differing[:5]}. "
            "Run --stages verify, then --stages signals."
        )


def _differing(store: Store, manifest: Manifest, inputs: Manifest) -> str:
    """In which settings the inputs of a signal are others, where they still lie beside it."""
    before = Store(f"{store.uri.rpartition('/')[0]}/inputs-{manifest.parent}")
    if not before.exists(MANIFEST):
        return ""
    found = open_manifest(before).content
    keys = sorted(key for key in {*found, *inputs.content} if found.get(key) != inputs.content.get(key))
    return "; these differ: " + ", ".join(
        f"{key} (wanted {json.dumps(inputs.content.get(key))}, found {json.dumps(found.get(key))})" for key in keys
    )
