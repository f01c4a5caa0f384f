from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from raydistill.cache.local import STALE_SECONDS, LocalShards
from raydistill.errors import OutOfSpace


def table(value: int, rows: int = 1000) -> pa.Table:
    return pa.table({"x": pa.array([value] * rows, pa.int64())})


def first(mapped: pa.Table) -> int:
    return mapped["x"][0].as_py()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.arrow"))


def test_a_shard_is_unpacked_once_however_many_ask_at_the_same_time(tmp_path: Path) -> None:
    reads: list[int] = []

    def read() -> pa.Table:
        reads.append(1)
        time.sleep(0.05)
        return table(7)

    found: list[int] = []
    readers = [LocalShards(first, folder=tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=lambda r=r: found.append(r.get("key", read))) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, reads) == ([7] * 4, [1])


def test_the_folder_keeps_what_was_used_last(tmp_path: Path) -> None:
    shards = LocalShards(first, folder=tmp_path, limit_bytes=20_000)
    reads: list[int] = []

    def read(key: int) -> pa.Table:
        reads.append(key)
        return table(key)

    def get(key: int) -> int:
        time.sleep(0.02)  # file times must differ by more than the kernel's tick
        return LocalShards(first, folder=tmp_path, limit_bytes=20_000).get(str(key), lambda: read(key))

    assert [get(key) for key in (0, 1, 0, 2, 0, 1)] == [0, 1, 0, 2, 0, 1]
    assert reads == [0, 1, 2, 1], "1 made room for 2, since 0 was used after it"
    assert size_of(tmp_path) <= 20_000
    assert shards.get("large", lambda: table(9, 10_000)) == 9, "what is larger than the folder is read all the same"


def test_a_removed_file_can_still_be_read_by_who_maps_it(tmp_path: Path) -> None:
    shards = LocalShards(lambda mapped: mapped, folder=tmp_path)
    mapped = shards.get("key", lambda: table(5))
    for path in tmp_path.glob("*.arrow"):
        path.unlink()
    assert mapped["x"].to_pylist() == [5] * 1000
    assert shards.get("key", lambda: table(6)) is mapped


def test_leftovers_of_killed_processes_are_removed_and_files_being_written_are_not(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp-0-old.arrow", tmp_path / ".tmp-1-young.arrow"
    for path in (old, young):
        path.write_bytes(bytes(20_000))
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    LocalShards(first, folder=tmp_path, limit_bytes=10_000).get("key", lambda: table(1))
    assert not old.exists()
    assert young.exists()


def test_an_interrupted_read_leaves_nothing_behind(tmp_path: Path) -> None:
    shards = LocalShards(first, folder=tmp_path)

    def broken() -> pa.Table:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        shards.get("key", broken)
    assert shards.get("key", lambda: table(3)) == 3


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")],
)
@pytest.mark.fault("the disk for unpacked shards is full", "one message that names TMPDIR; nothing half is left")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutOfSpace, match=r"the disk is full.* set TMPDIR"):
        LocalShards(first, folder=tmp_path).get("key", lambda: table(3))
    assert not list(tmp_path.glob("*.arrow"))
