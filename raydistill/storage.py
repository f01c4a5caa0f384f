"""Files on local disks, network file systems and object stores, through one code path (`pyarrow.fs`).

`publish` is the only way a file comes into being: temporary name, sync and rename on file systems, one completed put
on object stores. A file that has its final name is therefore whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from raydistill.errors import ConfigError, DataError, OutOfSpace, StorageFailed

V = TypeVar("V")
RETRY_SECONDS = (1.0, 3.0, 9.0, 27.0)
"""Pauses before an object store is asked again."""
OTHER_LOCAL_DISK = "set TMPDIR to a folder on a local disk with room"
LEFTOVER_SECONDS = 24 * 3600
"""An unfinished file that nobody wrote to for this long has no writer any more."""


GS_RETRY_SECONDS = 15
"""What lies under gs:// tries for a quarter of an hour by default, also to find credentials where there are none."""
REFUSALS = (
    "ACCESS_DENIED", "AccessDenied", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
"""Words of stores that will not; asking again would not help."""


class Store:
    """A folder, given as a path or as a URI (`s3://…`, `gs://…`).

    Raises `ConfigError` for a URI that nobody knows, `StorageFailed` for a bucket that cannot be asked where it is.
    """

    def __init__(self, uri: str | os.PathLike[str]):
        self.uri = str(uri).rstrip("/")
        if "://" in self.uri:
            self.filesystem, self.root = _opened(self.uri)
        else:
            self.filesystem, self.root = fs.LocalFileSystem(), str(Path(self.uri).absolute())

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether the files have paths of this machine's file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Path of `name` within `self.filesystem`."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder `name` is there."""
        return self._info(name).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of the files directly in this folder, sorted; leftovers of interrupted writes are not among them."""
        selector = fs.FileSelector(self.root, allow_not_found=True)
        infos = self._patiently(lambda: self.filesystem.get_file_info(selector), f"list {self.uri}")
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and not i.base_name.startswith(".tmp-"))

    def folders(self) -> list[str]:
        """Names of the folders directly in this folder, sorted. On gs:// they are known by what is in them alone."""
        deep = self.filesystem.type_name == "gcs"
        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=deep)
        infos = self._patiently(lambda: self.filesystem.get_file_info(selector), f"list {self.uri}")
        paths = [f"{i.path}/" if i.type == fs.FileType.Directory else i.path for i in infos]
        inside = [path.removeprefix(self.root).lstrip("/") for path in paths]
        return sorted({path.partition("/")[0] for path in inside if "/" in path})

    def size(self, name: str) -> int:
        """Bytes of file `name`."""
        return int(self._info(name).size)

    def _info(self, name: str) -> fs.FileInfo:
        return self._patiently(lambda: self.filesystem.get_file_info(self.path(name)), f"look for {self.uri}/{name}")

    def read(self, name: str) -> bytes:
        """Content of file `name`; `DataError` when it is missing or cannot be read."""

        def act() -> bytes:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return bytes(stream.read())

        try:
            return self._patiently(act, f"read {self.uri}/{name}")
        except OSError as error:
            raise DataError(f"cannot read {self.uri}/{name}: {error}") from error

    def read_text(self, name: str) -> str:
        """Content of a UTF-8 file."""
        return self.read(name).decode()

    def publish(self, name: str, write: bytes | str | Callable[[Path], None]) -> str:
        """Make file `name` appear, whole, with the given content or what `write(path)` writes to a local path.

        Returns its sha256, in hexadecimal.
        """
        if self.is_local:
            final = Path(self.path(name))
            part = final.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{final.name}")
            with refusal_explained(f"write {final}"), full_disk_explained(final):
                final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with refusal_explained(f"write {final}"), full_disk_explained(final):
                    _write(part, write)
                    with ThreadPoolExecutor(1) as pool:  # hashed while the disk is still writing
                        digest = pool.submit(_sha256, part)
                        _sync(part)
                    os.replace(part, final)
                    _sync(final.parent)
            finally:
                part.unlink(missing_ok=True)
            return digest.result()
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "file"
            with full_disk_explained(part):
                _write(part, write)
            try:
                self._patiently(lambda: self._put(part, name), f"write {self.uri}/{name}")
            except FileNotFoundError as error:
                raise ConfigError(f"cannot write {self.uri}/{name}: there is no such bucket: {error}") from error
            return _sha256(part)

    def _put(self, part: Path, name: str) -> None:
        """Send a local file as one object.

        In a single call, since a stream that is left by an exception, such as that of Ctrl-C, is closed, and closing
        makes an object of what was sent so far.
        """
        size = part.stat().st_size
        with self.filesystem.open_output_stream(self.path(name)) as out:
            if size:
                out.write(pa.memory_map(str(part)).read_buffer())
        found = self.filesystem.get_file_info(self.path(name)).size
        if found != size:
            raise OSError(f"{found} of {size} bytes arrived")

    def _patiently(self, act: Callable[[], V], what: str) -> V:
        """`act`, tried again for a while when an object store is busy or out of reach. A local disk is asked once.

        (What lies under `pyarrow.fs` tries every request three times by itself, within a second or two.)
        """
        pauses = iter(RETRY_SECONDS)
        while True:
            try:
                with refusal_explained(what):
                    return act()
            except FileNotFoundError:
                raise
            except OSError as error:
                if self.is_local or _is_full(error):
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise StorageFailed(
                        f"cannot {what}, tried {len(RETRY_SECONDS) + 1} times: {error}. What is finished is kept; run "
                        "the same command again when the store answers."
                    ) from error
            time.sleep(pause)

    def fetch(self, name: str, path: Path) -> None:
        """Have file `name` under a local path: a second name for it where that is possible, else a copy.

        Raises `FileNotFoundError` when there is no such file.
        """
        if self.is_local:
            with contextlib.suppress(OSError):  # on another disk, or one without hard links
                path.hardlink_to(self.path(name))
                return

        def act() -> None:
            with self.filesystem.open_input_stream(self.path(name)) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, 8 << 20)

        with full_disk_explained(path, elsewhere=OTHER_LOCAL_DISK):
            self._patiently(act, f"read {self.uri}/{name}")

    def delete(self, name: str) -> None:
        """Remove file `name` if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def delete_leftovers(self) -> None:
        """Remove the unfinished files that killed writers left directly in this folder of a file system.

        A younger file than a day stays: it may be that of another run, which shares the folder and is writing it.
        """
        if not self.is_local:
            return
        for part in Path(self.root).glob(".tmp-*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just published it
                if part.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                    part.unlink()

    def delete_folder(self, name: str) -> None:
        """Remove folder `name` and everything in it if it is there."""
        if self.exists(name):
            with contextlib.suppress(FileNotFoundError):  # on gs:// a folder that is empty by now is nothing to remove
                self.filesystem.delete_dir(self.path(name))

    def sha256(self, name: str) -> str:
        """Hash of file `name`, in hexadecimal."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A folder or file as a local path; copied for as long as it is needed when it is on an object store."""
    store = Store(uri)
    if store.is_local:
        yield Path(store.path())
        return
    with tempfile.TemporaryDirectory() as folder:
        fs.copy_files(store.path(), folder, source_filesystem=store.filesystem)
        yield Path(folder)


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    asked = f"{uri}?retry_limit_seconds={GS_RETRY_SECONDS}" if uri.startswith("gs://") and "?" not in uri else uri
    try:
        with refusal_explained(f"open {uri}"):
            filesystem, root = fs.FileSystem.from_uri(asked)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"{uri}: wanted a path, s3://bucket/folder or gs://bucket/folder: {error}") from error
    except OSError as error:
        raise StorageFailed(f"cannot open {uri}: {error}") from error
    return filesystem, root


@contextlib.contextmanager
def refusal_explained(what: str) -> Iterator[None]:
    """Raise `ConfigError` in place of the error of a disk or store that will not let this user do `what`."""
    try:
        yield
    except OSError as error:
        by_disk = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not by_disk and not any(word in str(error) for word in REFUSALS):
            raise
        raise ConfigError(
            f"cannot {what}: {error}. Check the name, and that this user or these credentials may read and write there."
        ) from error


def _write(path: Path, write: bytes | str | Callable[[Path], None]) -> None:
    if callable(write):
        write(path)
    else:
        path.write_bytes(write.encode() if isinstance(write, str) else write)
    readable_by_others(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def full_disk_explained(path: Path, *, elsewhere: str = "point run_dir or cache.dir elsewhere") -> Iterator[None]:
    """Raise `OutOfSpace` in place of what writers raise when the disk is full (safetensors has an error of its own)."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfSpace) or not _is_full(error):
            raise
        raise OutOfSpace(
            f"cannot write {path}: the disk is full. Everything written before is kept; "
            f"make room (or {elsewhere}) and run the same command again."
        ) from error


def _is_full(error: Exception) -> bool:
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def readable_by_others(path: Path) -> None:
    """Give a file the permissions of any new file: some writers make theirs readable by their user alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
