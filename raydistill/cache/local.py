"""Shards unpacked onto the local disk and mapped into memory.

A shard in its cache is compressed, and possibly on an object store; a shuffled reader wants single rows of many shards.
So each shard is unpacked once per machine, as an uncompressed file that is mapped: rows are then read in place,
the operating system keeps in memory what is in use, and all processes of the machine share it. The folder is bounded:
files that were not opened for longest go first, and losing any of them costs only time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from raydistill.errors import DataError
from raydistill.storage import OTHER_LOCAL_DISK, full_disk_explained

V = TypeVar("V")
SUFFIXES = (".arrow", ".safetensors")
"""Endings of the files in the folder."""
NUM_LOCKS = 64
STALE_SECONDS = 3600
"""An unfinished file of this age was left behind by a process that was killed."""


def local_folder() -> Path:
    """Where this user's unpacked shards lie: below the folder for temporary files (`TMPDIR`)."""
    folder = Path(tempfile.gettempdir()) / f"raydistill-{os.getuid()}" / "shards"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in (folder, folder.parent):
        found = part.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
            raise DataError(f"{part} belongs to somebody else; set TMPDIR to a folder of your own on a local disk")
    return folder


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A shard that is ready to be written to the local disk."""

    nbytes: int
    write: Callable[[Path], None]


class LocalFiles(Generic[V]):
    """Files by key, made on demand in a folder of at most `limit_bytes`, and mapped.

    `limit_bytes` is by default a third of what is free on the disk; a removed file takes room for as long as somebody
    maps it, so in all two thirds are used at most. The file that was asked for last always stays, so a folder that is
    too small makes reading slow, never wrong. Safe to use from several threads and processes.

    `view` maps a file and turns it into whatever the reader wants to keep of it, beside its size in bytes; it is called
    once per mapping and may raise `FileNotFoundError`.
    """

    def __init__(
        self,
        view: Callable[[Path], tuple[V, int]],
        *,
        suffix: str,
        folder: Path | None = None,
        limit_bytes: int | None = None,
    ):
        assert suffix in SUFFIXES, "files of another ending would never be removed"
        self._view = view
        self._suffix = suffix
        self._folder = folder or local_folder()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._limit = limit_bytes or _third_of_the_disk(self._folder)
        self._mapped: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: str, make: Callable[[], Unpacked]) -> V:
        """The view of file `key`; `make` is called when it is not on this machine yet."""
        with self._guard:
            if key in self._mapped:
                self._mapped.move_to_end(key)
                return self._mapped[key][0]
        while True:
            path = self.unpack(key, make)
            try:
                view, nbytes = self._view(path)
                break
            except FileNotFoundError:  # another process made room in between
                continue
        with self._guard:
            self._mapped[key] = (view, nbytes)
            while len(self._mapped) > 1 and sum(size for _, size in self._mapped.values()) > self._limit:
                self._mapped.popitem(last=False)
        return view

    def unpack(self, key: str, make: Callable[[], Unpacked]) -> Path:
        """The file of `key`, made by one process or thread while the others wait."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = self._folder / f"{name}{self._suffix}"
        with (self._folder / f"lock-{int(name, 16) % NUM_LOCKS}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                os.utime(path)
                return path
            made = make()
            self._make_room(made.nbytes)
            part = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
            try:
                with full_disk_explained(path, elsewhere=OTHER_LOCAL_DISK):
                    made.write(part)
                    os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for longest until `size` more bytes fit."""
        files = sorted(_files(self._folder))
        total = sum(file_size for _, file_size, _ in files)
        for _, file_size, path in files:
            if total + size <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= file_size


class LocalShards(Generic[V]):
    """Arrow tables by key in a folder of `LocalFiles`; `view` turns a mapped table into what the reader keeps of it."""

    def __init__(self, view: Callable[[pa.Table], V], *, folder: Path | None = None, limit_bytes: int | None = None):
        def mapped(path: Path) -> tuple[V, int]:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            return view(table), table.nbytes

        self._files = LocalFiles(mapped, suffix=".arrow", folder=folder, limit_bytes=limit_bytes)

    def get(self, key: str, read: Callable[[], pa.Table]) -> V:
        """The view of table `key`; `read` makes the table when it is not on this machine yet."""
        return self._files.get(key, partial(_unpacked, read))

    def unpack(self, key: str, read: Callable[[], pa.Table]) -> Path:
        """The file of `key`, made by one process or thread while the others wait."""
        return self._files.unpack(key, partial(_unpacked, read))


def _unpacked(read: Callable[[], pa.Table]) -> Unpacked:
    table = read()

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    return Unpacked(table.nbytes, write)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, bytes and path of the files that may be removed."""
    for path in (path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}")):
        try:
            found = path.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        if not path.name.startswith(".tmp-") or found.st_mtime < time.time() - STALE_SECONDS:
            yield found.st_mtime, found.st_size, path


def _third_of_the_disk(folder: Path) -> int:
    return (shutil.disk_usage(folder).free + sum(size for _, size, _ in _files(folder))) // 3
