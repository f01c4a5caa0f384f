"""Remembered hashes: never stale, never computed twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from raydistill.models import hashes
from raydistill.models.hashes import file_hashes, file_sha256


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "RACY_SECONDS", -1.0)
    return tmp_path / "home"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_hash_is_computed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    compute = hashes._hash
    monkeypatch.setattr(hashes, "_hash", lambda path: (read.append(path), compute(path))[1])
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert [file_sha256(path) for _ in range(3)] == [digest(b"one")] * 3
    assert len(read) == 1
    path.write_bytes(b"three")
    assert file_sha256(path) == digest(b"three")


def test_other_bytes_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert file_sha256(path) == digest(b"one")
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == digest(b"two")


def test_a_file_that_is_still_being_written_is_not_remembered(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "RACY_SECONDS", 60.0)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert file_sha256(path) == digest(b"one")
    assert not (own_home / "hashes.json").exists()


def test_hashes_of_different_callers_are_kept_together(tmp_path: Path, own_home: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    assert file_hashes(paths[:2]) == {path: digest(path.name.encode()) for path in paths[:2]}
    file_hashes(paths[2:])
    assert set(json.loads((own_home / "hashes.json").read_text())) == {str(path.resolve()) for path in paths}
