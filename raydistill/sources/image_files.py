"""Files of images: loose ones, Parquet and WebDataset tars; finding, naming, opening and hashing them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from raydistill.errors import DataError
from raydistill.models.hashes import group_hashes
from raydistill.signals import JsonValue
from raydistill.sources.files import DataFile, content_hashes, listed, open_uri

Kind = Literal["image", "parquet", "tar"]
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"]
)
CONTAINERS: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar"}


@dataclass(frozen=True, slots=True, order=True)
class ImageFile:
    """An image, or a container of images. `name` is what row ids carry."""

    name: str
    uri: str
    size: int
    kind: Kind
    root: str
    """The folder of `source.paths` that it was found below."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an image lie: in a file from `offset` on."""

    uri: str
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """The whole file."""
        return open_uri(self.uri)

    def read(self) -> bytes:
        """The bytes."""
        with self.open() as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def kind_of(path: PurePosixPath) -> Kind | None:
    """What a file is by its suffix, None for anything but images and their containers."""
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else CONTAINERS.get(suffix)


def find_image_files(paths: Sequence[str]) -> list[ImageFile]:
    """Every file of `paths` (files, folders, globs, URIs, `package://`, `pypi://`), by name, each once.

    A name is the path below the folder that `paths` names; where there are several such folders, with as much of their
    own path in front as tells them apart. So names do not change when files come along, or when a folder moves.
    Raises `DataError` when a path gives no image.
    """
    roots: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for path in paths:
        root, found = listed(path, _is_data)
        known = {uri: size for uri, size in found.items() if kind_of(PurePosixPath(uri))}
        if not known:
            raise DataError(
                f"source.paths: {path} gives no image; wanted image files ({', '.join(sorted(IMAGE_SUFFIXES))}), "
                ".parquet or .tar there"
            )
        for uri in known:
            roots.setdefault(uri, root)
        sizes |= known
    labels = _labels(sorted(set(roots.values())))
    files = []
    for uri, root in roots.items():
        kind = kind_of(PurePosixPath(uri))
        assert kind is not None
        files.append(ImageFile(labels[root] + uri[len(root) :].lstrip("/"), uri, sizes[uri], kind, root))
    return sorted(files)


def _is_data(path: PurePosixPath) -> bool:
    return kind_of(path) is not None and not any(part.startswith((".", "_")) for part in path.parts)


def _labels(roots: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the roots' paths that differ, all of one length, each with a slash behind it."""
    parts = {root: PurePosixPath(root).parts for root in roots}
    length = 0
    while len({tail[len(tail) - min(length, len(tail)) :] for tail in parts.values()}) < len(roots):
        length += 1
    return {root: "".join(f"{part}/" for part in tail[len(tail) - length :]) for root, tail in parts.items()}


def file_content(files: Sequence[ImageFile], captions: Mapping[str, str]) -> dict[str, JsonValue]:
    """What the files hold, for the fingerprint: a hash per container, and one of all loose images and caption files.

    `captions` are the caption files, URI by name.
    """
    containers = [_data_file(file.name, file.uri) for file in files if file.kind != "image"]
    loose = {file.name: file.uri for file in files if file.kind == "image"} | dict(captions)
    content: dict[str, JsonValue] = {"files": dict(content_hashes(containers))}
    if not loose:
        return content
    folders: dict[str, dict[str, Path]] = {}
    remote = []
    for name, uri in loose.items():
        if "://" in uri:
            remote.append(_data_file(name, uri))
        else:
            folders.setdefault(str(Path(uri).parent), {})[name] = Path(uri)
    parts = [*group_hashes(folders).values(), *(f"{name} {sha}" for name, sha in content_hashes(remote).items())]
    digest = hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()
    return content | {"images": {"files": len(loose), "sha256": digest}}


def _data_file(name: str, uri: str) -> DataFile:
    return DataFile(name, uri, 0, "text", None)
