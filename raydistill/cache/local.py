"""Shards unpacked onto the local disk and mapped into memory.

A shard in its cache is compressed, and possibly on an object store; a shuffled reader wants single rows of many shards.
So each shard is unpacked once per machine, as an uncompressed Arrow file that is mapped: rows are then read in place,
the operating system keeps in memory what is in use, and all processes of the machine share it. The folder is bounded:
files that were not opened for longest go first, and losing any of them costs only time.
"""

from __future__ import annotations

import errno
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
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from raydistill.errors import DataError, OutOfSpace

V = TypeVar("V")
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


class LocalShards(Generic[V]):
    """Arrow tables by key, unpacked on demand into a folder of at most `limit_bytes`.

    `limit_bytes` is by default a third of what is free on the disk; a removed file takes room for as long as somebody
    maps it, so in all two thirds are used at most. The table that was asked for last always stays, so a folder that is
    too small makes reading slow, never wrong. Safe to use from several threads and processes.

    `view` turns a mapped table into whatever the reader wants to keep of it; it is called once per mapping.
    """

    def __init__(self, view: Callable[[pa.Table], V], *, folder: Path | None = None, limit_bytes: int | None = None):
        self._view = view
        self._folder = folder or local_folder()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._limit = limit_bytes or _third_of_the_disk(self._folder)
        self._mapped: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: str, read: Callable[[], pa.Table]) -> V:
        """The view of table `key`; `read` makes the table when it is not on this machine yet."""
        with self._guard:
            if key in self._mapped:
                self._mapped.move_to_end(key)
                return self._mapped[key][0]
        while True:
            path = self.unpack(key, read)
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                break
            except FileNotFoundError:  # another process made room in between
                continue
        view = self._view(table)
        with self._guard:
            self._mapped[key] = (view, table.nbytes)
            while len(self._mapped) > 1 and sum(size for _, size in self._mapped.values()) > self._limit:
                self._mapped.popitem(last=False)
        return view

    def unpack(self, key: str, read: Callable[[], pa.Table]) -> Path:
        """The file of `key`, made by one process or thread while the others wait."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = self._folder / f"{name}.arrow"
        with (self._folder / f"lock-{int(name, 16) % NUM_LOCKS}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                os.utime(path)
                return path
            table = read()
            self._make_room(table.nbytes)
            part = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
            try:
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table.combine_chunks())
                os.replace(part, path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise OutOfSpace(
                        f"cannot unpack {table.nbytes} bytes into {self._folder}: the disk is full. "
                        "Set TMPDIR to a folder on a local disk with room and run the same command again."
                    ) from error
                raise
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


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, bytes and path of the files that may be removed."""
    for path in folder.glob("*.arrow"):
        try:
            found = path.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        if not path.name.startswith(".tmp-") or found.st_mtime < time.time() - STALE_SECONDS:
            yield found.st_mtime, found.st_size, path


def _third_of_the_disk(folder: Path) -> int:
    return (shutil.disk_usage(folder).free + sum(size for _, size, _ in _files(folder))) // 3
