"""Which shards of a cache are done, which are to be built, and the files that say so.

While a cache grows: `content.json` (what it is to become), the shards, `records/<shard>.json` right after each shard,
and for a signal `teacher.json` (the teacher's fields and facts). A shard is done when its record and its file are there
and `damaged.json` does not list it. `manifest.json` comes last and holds nothing of times, hosts or actors; those go
to `build.json`. So resuming and repairing are one set difference, after a kill at any moment.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel, JsonValue, RootModel

from raydistill.cache.manifest import (
    FieldRecord,
    JsonObject,
    Manifest,
    ShardRecord,
    fingerprint_of,
    parse_manifest,
    parsed,
)
from raydistill.cache.shards import RECORDS, read_records
from raydistill.config.base import Config
from raydistill.errors import CacheMismatch, ConfigError
from raydistill.storage import Store

MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
CONTENT = "content.json"
TEACHER = "teacher.json"
BUILD = "build.json"
LISTING_SECONDS = 60.0
"""A network file system may show a folder as it was this long ago."""


class _Damaged(Config):
    """damaged.json."""

    shards: dict[str, str]


class _Description(Config):
    """teacher.json."""

    fields: dict[str, FieldRecord]
    facts: dict[str, JsonValue]


class Build(BaseModel, extra="allow"):
    """How a cache came about, one of the times that it was finished."""

    started: float
    """Seconds since 1970."""
    seconds: float
    actors: tuple[int, int] = (0, 0)
    """Fewest and most actors of a teacher."""
    shards: tuple[str, ...] = ()
    """The shards that were built."""


class _Builds(RootModel[list[Build]]):
    """build.json."""


class Ledger:
    """The state of one cache folder."""

    def __init__(self, store: Store, content: Mapping[str, JsonValue]):
        self.store = store
        self.content = dict(content)
        self.fingerprint = fingerprint_of(content)
        self._started = time.time()

    @classmethod
    def below(cls, caches: Store, name: str, content: Mapping[str, JsonValue]) -> Ledger:
        """The ledger of the cache `<name>-<fingerprint>` in the folder of all caches."""
        return cls(caches / f"{name}-{fingerprint_of(content)}", content)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, if the cache was ever finished and `verify` found nothing wrong with the manifest itself.

        Raises `CacheMismatch` when it is that of another configuration, `DataError` when it is damaged.
        """
        if not self.store.exists(MANIFEST) or MANIFEST in self.damaged():
            return None
        manifest = parse_manifest(self.store.read(MANIFEST), where=f"{self.store.uri}/{MANIFEST}")
        manifest.require(fingerprint=self.fingerprint, content=self.content, where=self.store.uri)
        return manifest

    @property
    def finished(self) -> Manifest | None:
        """The manifest when nothing is left to do."""
        manifest = self.manifest
        return None if manifest is None or self.store.exists(DAMAGED) else manifest

    def begin(self) -> None:
        """Write down what this folder is to hold, and take away a damaged manifest.

        `CacheMismatch` when something else is being built in it.
        """
        if self.store.exists(CONTENT):
            remedy = "Remove this file and run the same command again; the shards that are built are kept."
            found = parsed(
                JsonObject, self.store.read(CONTENT), where=f"{self.store.uri}/{CONTENT}", remedy=remedy
            ).root
            if fingerprint_of(found) != self.fingerprint:
                keys = sorted(k for k in {*found, *self.content} if found.get(k) != self.content.get(k))
                raise CacheMismatch(
                    f"{self.store.uri} holds the unfinished cache of another configuration; these keys differ: "
                    f"{', '.join(keys)}. Point cache.dir at another folder, or move this one away."
                )
        elif self.manifest is None:
            self.store.publish(CONTENT, json.dumps(self.content, indent=1, sort_keys=True))
        if self.manifest is None:
            self.store.delete(MANIFEST)  # one that verify found wrong

    def damaged(self) -> dict[str, str]:
        """What `verify` found wrong, by shard name."""
        return read_damaged(self.store)

    def done(self) -> set[str]:
        """The shards that are there with their records and not known to be damaged."""
        return set(read_records(self.store, broken={})) & set(self.store.names()) - set(self.damaged())

    def pending(self, names: Sequence[str]) -> list[str]:
        """The shards of `names` that are absent or damaged, or whose record is, in the same order."""
        done = self.done()
        return [name for name in names if name not in done]

    def require_published(self, names: Sequence[str]) -> None:
        """`ConfigError` when this process does not see the records of shards that actors have published."""
        require_seen(self.store / RECORDS, [f"{name}.json" for name in names])

    def report_changed(self, names: Sequence[str]) -> None:
        """Tell the user of shards that were rebuilt with another hash."""
        if names:
            print(
                f"{self.store.uri}: rebuilt with another hash than before: {', '.join(names)} (see build.json)",
                flush=True,
            )

    def finish(
        self,
        names: Sequence[str],
        *,
        kind: str,
        parent: str | None,
        fields: Mapping[str, FieldRecord],
        facts: Mapping[str, JsonValue],
        build: Mapping[str, JsonValue],
    ) -> Manifest:
        """Publish the manifest, note in build.json how it came about, and remove the list of damages.

        Raises `ConfigError` when shards were published where this process does not see them.
        """
        self.require_published(names)
        records = read_records(self.store)
        manifest = Manifest.model_validate(
            {"kind": kind, "content": self.content, "fingerprint": self.fingerprint, "parent": parent}
            | {"fields": dict(fields), "facts": dict(facts), "shards": [records[name] for name in names]}
        )
        now = {"started": round(self._started, 3), "seconds": round(time.time() - self._started, 3)}
        builds = [*read_builds(self.store), Build.model_validate({**now, "host": platform.node(), **build})]
        self.store.publish(BUILD, _Builds(builds).model_dump_json(indent=1, exclude_unset=True))
        self.store.publish(MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        for name in (DAMAGED, CONTENT, TEACHER):
            self.store.delete(name)
        for name in set(records) - set(names):
            (self.store / RECORDS).delete(f"{name}.json")
        self.store.delete_leftovers()
        (self.store / RECORDS).delete_leftovers()
        return manifest


def require_seen(folder: Store, names: Sequence[str]) -> None:
    """`ConfigError` unless this process sees all the files that actors say they have published in `folder`."""
    if missing := _unseen(lambda: sorted(set(names) - set(folder.names()))):
        raise _not_shared(
            f"{len(missing)} of {len(names)} files published elsewhere ({missing[0]} is not in {folder.uri} "
            f"on {platform.node()})"
        )


def require_begun(store: Store) -> None:
    """`ConfigError` unless this process, of an actor, sees the cache that the driver has begun in `store`."""
    if missing := _unseen(lambda: [] if store.exists(CONTENT) or store.exists(MANIFEST) else [CONTENT]):
        raise _not_shared(f"none of the driver's files ({missing[0]} is not in {store.uri} on {platform.node()})")


def _unseen(missing: Callable[[], list[str]]) -> list[str]:
    """What is still `missing` when no folder can be shown as it was before."""
    deadline = time.monotonic() + LISTING_SECONDS
    while (found := missing()) and time.monotonic() < deadline:
        time.sleep(min(1.0, LISTING_SECONDS))
    return found


def _not_shared(found: str) -> ConfigError:
    return ConfigError(
        f"run_dir, cache.dir: wanted folders that all nodes of the cluster see, found {found}. "
        "Point both at a file system that all nodes share, or at an object store, and run the same command again."
    )


def write_description(store: Store, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]) -> None:
    """Write down a teacher's fields and facts, once, so that the manifest does not need the teacher again.

    Not in a finished cache: an actor may be so late that the others have left nothing to do.
    """
    if not is_described(store) and not store.exists(MANIFEST):
        plain = {name: record.model_dump(mode="json") for name, record in fields.items()}
        store.publish(TEACHER, json.dumps({"fields": plain, "facts": dict(facts)}, indent=1, sort_keys=True))


def is_described(store: Store) -> bool:
    """Whether a teacher has written down its fields and facts."""
    return store.exists(TEACHER)


def read_description(store: Store) -> tuple[dict[str, FieldRecord], dict[str, JsonValue]]:
    """The fields and facts of `write_description`."""
    remedy = "Remove this file and run the same command again: a teacher then writes it anew."
    described = parsed(_Description, store.read(TEACHER), where=f"{store.uri}/{TEACHER}", remedy=remedy)
    return described.fields, described.facts


def read_damaged(store: Store) -> dict[str, str]:
    """The content of `damaged.json`: what is wrong, by shard name."""
    if not store.exists(DAMAGED):
        return {}
    remedy = "Run --stages verify, which writes this file anew, or removes it when nothing is damaged."
    return parsed(_Damaged, store.read(DAMAGED), where=f"{store.uri}/{DAMAGED}", remedy=remedy).shards


def read_builds(store: Store) -> list[Build]:
    """The content of `build.json`, oldest first."""
    if not store.exists(BUILD):
        return []
    remedy = "It only tells of times: remove it and run the same command again."
    return parsed(_Builds, store.read(BUILD), where=f"{store.uri}/{BUILD}", remedy=remedy).root


def write_damaged(store: Store, shards: Mapping[str, str]) -> None:
    """Write `damaged.json` anew, or remove it when nothing is damaged."""
    if shards:
        store.publish(DAMAGED, json.dumps({"shards": dict(sorted(shards.items()))}, indent=1))
    else:
        store.delete(DAMAGED)


def changed_hashes(old: Manifest | None, records: Mapping[str, ShardRecord], rebuilt: Iterable[str]) -> list[str]:
    """The rebuilt shards whose hash is not the one that the manifest had."""
    before = {} if old is None else {record.name: record.sha256 for record in old.shards}
    return [name for name in rebuilt if before.get(name, records[name].sha256) != records[name].sha256]
