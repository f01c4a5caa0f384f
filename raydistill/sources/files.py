"""Files of records and of plain text: finding, naming, opening and hashing them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

import pyarrow as pa
from pyarrow import fs

from raydistill.errors import DataError
from raydistill.models.hashes import file_hashes, remembered, stream_sha256
from raydistill.models.sources import nearest_names, resolve_source

Format = Literal["parquet", "json_lines", "json", "text"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet", ".jsonl": "json_lines", ".ndjson": "json_lines", ".json": "json", ".txt": "text",
    ".text": "text",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, order=True)
class DataFile:
    """A file of a source. `name` is what row ids carry: the path below the folder that all files share."""

    name: str
    uri: str
    size: int
    format: Format
    compression: str | None

    def open(self) -> BinaryIO:
        """The decompressed bytes."""
        stream = open_uri(self.uri)
        if self.compression == "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
        if self.compression == "bz2":
            return cast(BinaryIO, bz2.BZ2File(stream))
        if self.compression == "xz":
            return cast(BinaryIO, lzma.LZMAFile(stream))
        if self.compression == "zstd":
            return cast(BinaryIO, pa.CompressedInputStream(stream, "zstd"))
        return stream


def open_uri(uri: str) -> BinaryIO:
    """The bytes of a file by its absolute path or URI; seekable."""
    filesystem, path = _place(uri)
    return cast(BinaryIO, filesystem.open_input_file(path))


def _place(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path


def find_files(paths: Sequence[str]) -> list[DataFile]:
    """Every file of `paths` (files, folders, globs, URIs, `package://`, `pypi://`), by name, each once.

    From folders, hidden files and unknown suffixes are left out; a file that is named, or matched by a glob, is plain
    text unless its suffix says otherwise. Raises `DataError` when a path gives nothing or all files are empty.
    """
    found: dict[str, int] = {}
    for path in paths:
        matches = listed(path, _is_data)[1]
        if not matches:
            raise DataError(f"source.paths: {path} gives no file; wanted Parquet, JSON lines, JSON or plain text there")
        found |= matches
    if not any(found.values()):
        raise DataError(f"source.paths: all {len(found)} files are empty: {', '.join(sorted(found)[:5])}")
    split = {uri: PurePosixPath(uri).parts for uri in found}
    shared = 0
    shortest = min(len(parts) for parts in split.values()) - 1
    while shared < shortest and len({parts[shared] for parts in split.values()}) == 1:
        shared += 1
    files = []
    for uri, size in found.items():
        name = "/".join(split[uri][shared:])
        stem, compression = PurePosixPath(uri), None
        if stem.suffix in COMPRESSIONS:
            stem, compression = stem.with_suffix(""), COMPRESSIONS[stem.suffix]
        files.append(DataFile(name, uri, size, SUFFIXES.get(stem.suffix, "text"), compression))
    return sorted(files)


def listed(path: str, is_data: Callable[[PurePosixPath], bool]) -> tuple[str, dict[str, int]]:
    """The files that one entry of `paths` stands for: sizes by absolute path or URI, and the folder they lie below.

    That folder is the entry itself, the part of a glob before its first wildcard, or where a single file lies. In a
    folder only the files with an `is_data` path below it are taken. `DataError` when nothing is there.
    """
    if path.startswith(("pypi://", "package://")):
        path = str(resolve_source(path))
    remote = "://" in path
    filesystem, where = _place(path if remote else str(Path(path).expanduser().absolute()))
    info = filesystem.get_file_info(where)
    fixed = where
    if info.type == fs.FileType.File:
        fixed, infos = str(PurePosixPath(where).parent), [info]
    elif info.type == fs.FileType.Directory:
        below = filesystem.get_file_info(fs.FileSelector(where, recursive=True))
        infos = [i for i in below if is_data(PurePosixPath(i.path[len(where) :].lstrip("/")))]
        if not infos and any(i.extension == "arrow" for i in below):
            raise DataError(f"source.paths: {path} was saved by `datasets`; name it in source.dataset.id instead")
    elif GLOB.search(where):
        fixed, pattern = _split_glob(where)
        selector = fs.FileSelector(fixed, recursive="/" in pattern or "**" in pattern, allow_not_found=True)
        regex = re.compile(glob_regex(pattern))
        named = [(i.path[len(fixed) :].lstrip("/"), i) for i in filesystem.get_file_info(selector)]
        infos = [i for name, i in named if regex.fullmatch(name) and not _is_hidden(name)]
    else:
        near = "" if remote else f"; {nearest_names(Path(where))}"
        raise DataError(f"source.paths: wanted a file or folder {path}, found nothing there{near}")
    prefix = f"{path.split('://')[0]}://" if remote else ""
    return f"{prefix}{fixed}", {f"{prefix}{i.path}": i.size for i in infos if i.type == fs.FileType.File}


def _is_data(path: PurePosixPath) -> bool:
    known = path.suffix in SUFFIXES or (path.suffix in COMPRESSIONS and path.with_suffix("").suffix in SUFFIXES)
    return known and not _is_hidden(str(path)) and not any(part.startswith("_") for part in path.parts)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _split_glob(path: str) -> tuple[str, str]:
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if GLOB.search(part))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a folder, `**/` stands for any number of folders."""
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.findall(r"\*\*/|\*\*|\[[^\]]+\]|.", pattern)
    brackets = {p: "[^" + p[2:] if p.startswith("[!") else p for p in pieces if len(p) > 1 and p.startswith("[")}
    return "".join(meaning.get(p) or brackets.get(p) or re.escape(p) for p in pieces)


def content_hashes(files: Sequence[DataFile]) -> dict[str, str]:
    """Hash of every file's bytes as they lie on disk, by name."""
    local = {file.name: Path(file.uri) for file in files if "://" not in file.uri}
    digests = file_hashes(local.values())
    hashes = {name: digests[path] for name, path in local.items()}
    remote = [file for file in files if "://" in file.uri]
    found = remembered({file.uri: (_remote_stamp(file), partial(_remote_hash, file)) for file in remote})
    return hashes | {file.name: found[file.uri] for file in remote}


def _remote_stamp(file: DataFile) -> str:
    filesystem, path = _place(file.uri)
    info = filesystem.get_file_info(path)
    return f"{info.size}-{info.mtime_ns}" if info.mtime_ns else ""


def _remote_hash(file: DataFile) -> str:
    with open_uri(file.uri) as stream:
        return stream_sha256(stream)
