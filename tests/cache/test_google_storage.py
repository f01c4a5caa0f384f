"""Caches on Google Cloud Storage, spoken to by the real protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from gs_server import GsServer, gs, gs_running, gs_store
from safetensors.torch import save_file
from test_object_store import content

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.dense import META, read_dense, read_description
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store, local_folder

__all__ = ["gs", "gs_running", "gs_store"]


@pytest.mark.parametrize("size", [0, 1, 12_000_000])
def test_a_file_on_google_storage_comes_back_as_it_was(gs_store: Store, tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert gs_store.publish("a/b", data) == hashlib.sha256(data).hexdigest() == gs_store.sha256("a/b")
    assert gs_store.read("a/b") == data
    assert gs_store.size("a/b") == size
    gs_store.fetch("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with local_folder(f"{gs_store.uri}/a") as copied:
        assert (copied / "b").read_bytes() == data
    assert (gs_store / "a").names() == ["b"]
    gs_store.delete("a/b")
    assert not gs_store.exists("a/b")


def test_a_folder_on_google_storage_goes_with_all_that_is_in_it(gs_store: Store) -> None:
    for name in ("a/b", "a/c/d", "ab"):
        gs_store.publish(name, "text")
    assert gs_store.folders() == ["a"]
    gs_store.delete_folder("a")
    assert gs_store.folders() == []
    assert not gs_store.exists("a")
    assert not gs_store.exists("a/c/d")
    assert gs_store.names() == ["ab"]
    gs_store.delete_folder("a")


def test_the_description_of_a_shard_on_google_storage_is_read_without_the_shard(gs_store: Store) -> None:
    metadata = {META: json.dumps({"rows": 3})}
    gs_store.publish("x.safetensors", lambda path: save_file({"x": torch.ones(3)}, path, metadata=metadata))
    assert read_description(gs_store, "x.safetensors") == {"rows": 3}
    assert read_dense(gs_store, "x.safetensors").tensor("x").tolist() == [1.0, 1.0, 1.0]


def test_a_bucket_that_is_not_there_is_said_in_words(gs: GsServer) -> None:
    store = Store("gs://another-bucket/x")
    assert not store.exists("a")
    with pytest.raises(ConfigError, match=r"cannot write gs://another-bucket/x/a: there is no such bucket"):
        store.publish("a", "text")


@pytest.mark.slow
@pytest.mark.fault("Google Cloud Storage answers 503 for a while", "asked again; nothing is lost")
def test_google_storage_that_is_busy_for_a_while_is_asked_again(gs: GsServer, gs_store: Store) -> None:
    gs.busy(2)
    gs_store.publish("a", "text")
    assert gs.still_busy == 0
    gs.busy(2)
    assert gs_store.read_text("a") == "text"
    assert gs.still_busy == 0


def test_a_cache_on_google_storage_has_the_bytes_of_a_local_one(
    gs_store: Store, make_config: Callable[..., RunConfig], in_process: object
) -> None:
    config = make_config()
    found: list[Mapping[str, str]] = []
    for store in (Store(config.cache.dir), gs_store):
        inputs, manifest = build_inputs(config, store)
        build_signal(config, config.teachers[0], inputs, manifest, store)
        hashes = content(store)
        found.append({name: value for name, value in hashes.items() if not name.endswith("build.json")})
    assert found[0] == found[1]
    assert any("/records/" in name for name in found[1])
