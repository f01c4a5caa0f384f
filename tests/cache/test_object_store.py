"""Caches and runs on an object store, spoken to by the real protocol, and what it does when it is in trouble."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs
from s3_server import Server

from raydistill.cache.build import build_inputs
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, OutOfSpace, StorageFailed
from raydistill.storage import Store


def content(store: Store) -> dict[str, str]:
    """Hash of every file below a folder, by its path there."""
    selector = fs.FileSelector(store.root, recursive=True)
    files = [i.path for i in store.filesystem.get_file_info(selector) if i.type == fs.FileType.File]
    return {path.removeprefix(f"{store.root}/"): store.sha256(path.removeprefix(f"{store.root}/")) for path in files}


@pytest.mark.parametrize("size", [0, 1, 12_000_000])
def test_a_file_comes_back_as_it_was(far_store: Store, tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert far_store.publish("a/b", data) == hashlib.sha256(data).hexdigest() == far_store.sha256("a/b")
    assert far_store.read("a/b") == data
    assert far_store.size("a/b") == size
    far_store.fetch("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert (far_store / "a").names() == ["b"]
    assert far_store.folders() == ["a"]
    far_store.delete("a/b")
    assert not far_store.exists("a/b")


@pytest.mark.parametrize("trouble", ["busy", pytest.param("cut", marks=pytest.mark.slow)])
@pytest.mark.fault("S3 answers 503, or cuts the connection, for a while", "asked again; nothing is lost")
def test_a_store_that_is_busy_for_a_while_is_asked_again(s3: Server, far_store: Store, trouble: str) -> None:
    s3.first(4, trouble, method="PUT")
    far_store.publish("a", "text")
    s3.first(4, trouble, method="GET")
    assert far_store.read_text("a") == "text"
    s3.first(4, trouble, method="HEAD")
    assert far_store.exists("a")


@pytest.mark.slow
@pytest.mark.fault("S3 answers 503 for ever", "one message; no object is left")
def test_a_store_that_stays_busy_is_one_clear_message_and_leaves_no_file(s3: Server, far_store: Store) -> None:
    s3.trouble = lambda method, path: "busy" if method == "PUT" else None
    with pytest.raises(StorageFailed, match=r"cannot write s3://bucket/.*/a, tried 5 times: .*run the same command"):
        far_store.publish("a", "text")
    s3.trouble = lambda method, path: None
    assert not far_store.exists("a")


@pytest.mark.fault("one part of an upload is lost", "sent again; same bytes")
def test_a_part_of_an_upload_that_is_lost_is_sent_again(s3: Server, far_store: Store) -> None:
    data = b"0123456789" * 2_500_000
    s3.first(1, "cut", method="PUT", part="partNumber=2")
    far_store.publish("large", data)
    assert far_store.sha256("large") == hashlib.sha256(data).hexdigest()
    assert s3.count("PUT", "partNumber=2") >= 2


@pytest.mark.slow
@pytest.mark.fault("parts of an upload never arrive", "one message; no object is left")
def test_an_upload_whose_parts_never_arrive_makes_no_object(s3: Server, far_store: Store) -> None:
    s3.trouble = lambda method, path: "cut" if "partNumber=2" in path else None
    with pytest.raises(StorageFailed, match="cannot write"):
        far_store.publish("large", b"0123456789" * 2_500_000)
    s3.trouble = lambda method, path: None
    assert not far_store.exists("large")


@pytest.mark.fault("Ctrl-C in the middle of an upload", "a whole object or none")
def test_ctrl_c_in_the_middle_of_an_upload_makes_no_half_object(s3: Server, far_store: Store) -> None:
    data = b"0123456789" * 2_500_000

    def interrupt(method: str, path: str) -> None:
        if "partNumber=2" in path:
            os.kill(os.getpid(), signal.SIGINT)

    s3.trouble = interrupt
    with pytest.raises(KeyboardInterrupt):
        far_store.publish("large", data)
    assert not far_store.exists("large") or far_store.size("large") == len(data)


def test_a_stream_that_is_left_early_would_have_made_a_half_object(far_store: Store) -> None:
    """Why `publish` sends a file in one call: this is what pyarrow does."""

    def interrupted() -> None:
        with far_store.filesystem.open_output_stream(far_store.path("half")) as out:
            out.write(b"x" * 100)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert far_store.size("half") == 100


@pytest.mark.fault("the disk for fetched shards is full", "one message that names TMPDIR, at once")
def test_a_full_local_disk_is_not_blamed_on_the_store(s3: Server, far_store: Store, tmp_path: Path) -> None:
    far_store.publish("a", b"x" * 100_000)
    s3.requests.clear()
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OutOfSpace, match=r"cannot write .*/full: the disk is full.* set TMPDIR"):
        far_store.fetch("a", tmp_path / "full")
    assert s3.count("GET") <= 2


def test_refused_keys_are_not_tried_again(s3: Server, far_store: Store) -> None:
    with pytest.raises(ConfigError, match=r"cannot write s3://another-bucket/x/a: .*NO_SUCH_BUCKET.*these credentials"):
        Store("s3://another-bucket/x").publish("a", "text")
    assert s3.count("POST", "another-bucket") + s3.count("PUT", "another-bucket") <= 2


@pytest.mark.slow
@pytest.mark.fault("S3 fails now and then while a cache is built", "same bytes as on a local disk")
def test_a_cache_on_the_store_has_the_bytes_of_a_local_one_though_the_store_has_trouble(
    s3: Server,
    far_store: Store,
    make_config: Callable[..., RunConfig],
    in_process: object,
) -> None:
    config = make_config()
    local, _ = build_inputs(config, Store(config.cache.dir))
    asked = [0]

    def now_and_then(method: str, path: str) -> str | None:
        asked[0] += 1
        return {3: "busy", 7: "cut"}.get(asked[0] % 11)

    s3.trouble = now_and_then
    far, _ = build_inputs(config, far_store)
    s3.trouble = lambda method, path: None
    here, there = content(local), content(far)
    there.pop("build.json", None), here.pop("build.json", None)
    assert here == there
