"""Files of images or of video clips: loose ones, Parquet and WebDataset tars; finding, naming and hashing them."""

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

Kind = Literal["image", "frames", "parquet", "tar"]
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"]
)
VIDEO_SUFFIXES = frozenset([".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".webp", ".gif"])
FRAMES = ".frames"
"""Suffix of a folder that is one clip."""
CONTAINERS: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar"}


@dataclass(frozen=True, slots=True, order=True)
class ImageFile:
    """An image or a clip, or a container of them. `name` is what row ids carry."""

    name: str
    uri: str
    size: int
    kind: Kind
    root: str
    """The folder of `source.paths` that it was found below."""
    frames: tuple[str, ...] = ()
    """URIs of the images of a folder of frames, in order."""

    @property
    def is_loose(self) -> bool:
        """Whether it is one image or clip by itself."""
        return self.kind in ("image", "frames")


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


def kind_of(path: PurePosixPath, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Kind | None:
    """What a file is by its suffix, None for anything but images (those of `suffixes`) and their containers."""
    suffix = path.suffix.lower()
    return "image" if suffix in suffixes else CONTAINERS.get(suffix)


def find_image_files(paths: Sequence[str], *, clips: bool = False) -> list[ImageFile]:
    """Every image of `paths` (files, folders, globs, URIs, `package://`, `pypi://`), by name, each once; with `clips`
    every video clip instead, folders of frames among them.

    A name is the path below the folder that `paths` names; where there are several such folders, with as much of their
    own path in front as tells them apart. So names do not change when files come along, or when a folder moves.
    Raises `DataError` when a path gives none.
    """
    roots: dict[str, str] = {}
    sizes: dict[str, int] = {}
    frames: dict[str, list[str]] = {}
    suffixes = VIDEO_SUFFIXES if clips else IMAGE_SUFFIXES
    for path in paths:
        root, found = listed(path, lambda inside: _is_data(inside, suffixes, clips))
        known = {uri: size for uri, size in found.items() if kind_of(PurePosixPath(uri), suffixes)}
        if clips:
            known = _with_frames(found, known, frames)
        if not known:
            what, some = ("clip", "clips") if clips else ("image", "image files")
            more = ", folders *.frames" if clips else ""
            raise DataError(
                f"source.paths: {path} gives no {what}; wanted {some} ({', '.join(sorted(suffixes))}){more}, "
                ".parquet or .tar there"
            )
        for uri in known:
            roots.setdefault(uri, root)
        sizes |= known
    labels = _labels(sorted(set(roots.values())))
    files = []
    for uri, root in roots.items():
        kind: Kind | None = "frames" if uri in frames else kind_of(PurePosixPath(uri), suffixes)
        assert kind is not None
        name, members = labels[root] + uri[len(root) :].lstrip("/"), tuple(sorted(frames.get(uri, ())))
        files.append(ImageFile(name, uri, sizes[uri], kind, root, members))
    return sorted(files)


def _is_data(path: PurePosixPath, suffixes: frozenset[str], clips: bool) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    return kind_of(path, suffixes) is not None or (clips and _frames_folder(path) is not None)


def _frames_folder(path: PurePosixPath) -> str | None:
    """The folder of frames that an image lies in."""
    return str(path.parent) if path.parent.suffix == FRAMES and path.suffix.lower() in IMAGE_SUFFIXES else None


def _with_frames(found: Mapping[str, int], known: dict[str, int], frames: dict[str, list[str]]) -> dict[str, int]:
    """`known` sizes with folders of frames in place of their images, which are listed in `frames`."""
    sizes = {uri: size for uri, size in known.items() if PurePosixPath(uri).parent.suffix != FRAMES}
    for uri, size in found.items():
        if uri.rpartition("/")[0].endswith(FRAMES) and PurePosixPath(uri).suffix.lower() in IMAGE_SUFFIXES:
            folder = uri.rpartition("/")[0]
            if uri not in frames.setdefault(folder, []):
                frames[folder].append(uri)
            sizes[folder] = sizes.get(folder, 0) + size
    return sizes


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
    containers = [_data_file(file.name, file.uri) for file in files if not file.is_loose]
    loose = {file.name: file.uri for file in files if file.kind == "image"} | dict(captions)
    for file in files:
        loose |= {f"{file.name}/{uri.rpartition('/')[2]}": uri for uri in file.frames}
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
