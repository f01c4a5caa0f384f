"""Files appear whole, readable, and a full disk is said in words."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raydistill.errors import ConfigError, OutOfSpace
from raydistill.storage import Store, full_disk_explained


def test_weights_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    Store(tmp_path).publish("w.safetensors", lambda path: save_file({"w": torch.ones(2)}, path))
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.fault("the disk is full", "one message; the old file stays")
def test_full_disk_is_said_in_words_and_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    store = Store(tmp_path)
    store.publish("file", "old")

    def fails(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(OutOfSpace, match="disk is full"):
        store.publish("file", fails)
    assert store.read_text("file") == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="no"), full_disk_explained(tmp_path):
        raise PermissionError("no")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_published_is_hashed_as_it_lies_there(tmp_path: Path, scheme: str) -> None:
    store = Store(f"{scheme}{tmp_path}")
    assert store.publish("a", b"some bytes") == hashlib.sha256(b"some bytes").hexdigest() == store.sha256("a")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, os.strerror(errno.EACCES)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        OSError("AWS Error ACCESS_DENIED during CompleteMultipartUpload operation: Access Denied"),
        OSError("google::cloud::Status(PERMISSION_DENIED: Permanent error, Received HTTP status code: 403)"),
    ],
)
def test_what_this_user_may_not_do_is_said_in_words_and_asked_once(tmp_path: Path, error: OSError) -> None:
    asked = []

    def fails(path: Path) -> None:
        asked.append(path)
        raise error

    with pytest.raises(ConfigError, match=r"cannot write .*/file: .*these credentials may read and write there"):
        Store(tmp_path).publish("file", fails)
    assert len(asked) == 1
    assert os.listdir(tmp_path) == []


def test_folders_are_those_directly_inside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("b/x", "a/c/d", "file"):
        store.publish(name, "")
    assert store.folders() == ["a", "b"]
    assert (store / "nothing").folders() == []


def test_an_address_that_nobody_knows_is_said_in_words() -> None:
    with pytest.raises(ConfigError, match=r"^ftp://host/x: wanted a path, s3://bucket/folder or gs://bucket/folder: "):
        Store("ftp://host/x")
