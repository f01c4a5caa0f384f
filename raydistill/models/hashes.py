"""Hashes of files that are too big to read twice, remembered in `home()/hashes.json`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

from filelock import FileLock

from raydistill.storage import Store

BLOCK = 8 << 20
RACY_SECONDS = 2.0
"""A file that changed this recently may change again within one tick of its time stamp: its hash is not remembered."""


def home() -> Path:
    """The folder of downloads, conversions and remembered hashes: `$RAYDISTILL_HOME`, else `~/.cache/raydistill`."""
    folder = os.environ.get("RAYDISTILL_HOME")
    return Path(folder).expanduser().absolute() if folder else Path.home() / ".cache" / "raydistill"


def stream_sha256(stream: IO[bytes]) -> str:
    """Hash of what is left in `stream`, in hexadecimal."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def remembered(wanted: Mapping[str, tuple[str, Callable[[], str]]]) -> dict[str, str]:
    """Hash by key for `{key: (stamp, compute)}`; `compute` runs only where no hash is remembered under that stamp.

    An empty stamp means that the hash must not be remembered.
    """
    memo = _read_memo()
    found: dict[str, str] = {}
    fresh: dict[str, list[str]] = {}
    for key, (stamp, compute) in wanted.items():
        if stamp and memo.get(key, ["", ""])[0] == stamp:
            found[key] = memo[key][1]
            continue
        found[key] = compute()
        if stamp:
            fresh[key] = [stamp, found[key]]
    if fresh:
        folder = home()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "hashes.lock"):
            Store(folder).publish("hashes.json", json.dumps(_read_memo() | fresh, indent=0, sort_keys=True))
    return found


def file_sha256(path: Path) -> str:
    """Hash of a local file, remembered by path, size and times."""
    return file_hashes([path])[path]


def file_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Hashes of local files, remembered by path, size and times."""
    names = {path: str(path.resolve()) for path in paths}
    hashes = remembered({name: (_stamp(path), partial(_hash, path)) for path, name in names.items()})
    return {path: hashes[name] for path, name in names.items()}


def group_hashes(groups: Mapping[str, Mapping[str, Path]]) -> dict[str, str]:
    """One hash per group of many small local files, by their names and bytes, remembered by their sizes and times.

    A group that changes is read again as a whole; it costs one entry of `hashes.json`.
    """
    return remembered({key: (_group_stamp(files), partial(_group_hash, files)) for key, files in groups.items()})


def _group_hash(files: Mapping[str, Path]) -> str:
    lines = "".join(f"{_hash(path)}  {name}\n" for name, path in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _group_stamp(files: Mapping[str, Path]) -> str:
    stamps = {name: _stamp(path) for name, path in sorted(files.items())}
    return hashlib.sha256(repr(stamps).encode()).hexdigest() if all(stamps.values()) else ""


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return stream_sha256(stream)


def _stamp(path: Path) -> str:
    status = path.stat()
    # The change time comes along because copying tools can carry the modification time over to other bytes.
    if time.time() - max(status.st_mtime, status.st_ctime) < RACY_SECONDS:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _read_memo() -> dict[str, list[str]]:
    path = home() / "hashes.json"
    memo: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    return memo
