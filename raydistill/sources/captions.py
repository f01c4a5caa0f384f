"""Captions of loose images: lines of `metadata.jsonl`, or a `.txt` beside each image.

A `metadata.jsonl` speaks for the images of its folder and of all folders below; the nearest one that names an image
wins, then the `.txt`. In a line, `file_name` is the path from the folder of the file, as in the Hub's image folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow import fs

from raydistill.errors import DataError
from raydistill.sources.files import open_uri
from raydistill.sources.image_files import FRAMES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, ImageFile

METADATA = "metadata.jsonl"
LOOSE = IMAGE_SUFFIXES | VIDEO_SUFFIXES | {FRAMES}
FILE_NAME = "file_name"


@dataclass(frozen=True, slots=True)
class Captions:
    """What is known of the captions of loose images, before any `.txt` is read."""

    texts: dict[str, str | None]
    """Captions out of metadata files by URI of the image; None where the line has none."""
    sidecars: dict[str, str]
    """URI of the `.txt` of each other image that has one, by URI of the image."""
    files: dict[str, str]
    """Every caption file that counts, URI by name: they belong to the identity of the source."""


def find_captions(files: Iterable[ImageFile], caption_key: str) -> Captions:
    """The captions of the loose images among `files`.

    Raises `DataError` for a metadata file that is no JSON lines, names a file that is not there or one twice, or in
    which no line has `caption_key`.
    """
    images = {file.uri: file for file in files if file.is_loose}
    folders = _Folders()
    texts: dict[str, str | None] = {}
    sidecars: dict[str, str] = {}
    used: dict[str, str] = {}
    read: dict[str, dict[str, str | None]] = {}
    for uri, image in images.items():
        for folder in _upwards(uri, image.root):
            place = f"{folder}/{METADATA}"
            if METADATA not in folders.names(folder):
                continue
            if folder not in read:
                read[folder] = _read_metadata(place, caption_key, folders)
            used[_renamed(image, place)] = place
            if uri in read[folder]:
                texts[uri] = read[folder][uri]
                break
        else:
            folder, _, name = uri.rpartition("/")
            beside = str(PurePosixPath(name).with_suffix(".txt"))
            if beside in folders.names(folder):
                sidecars[uri] = f"{folder}/{beside}"
                used[_renamed(image, sidecars[uri])] = sidecars[uri]
    return Captions(texts, sidecars, used)


def read_sidecar(uri: str) -> str:
    """The caption in a `.txt`, without white space around it; `DataError` when it is no UTF-8."""
    with open_uri(uri) as stream:
        try:
            return stream.read().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{uri}: wanted a caption in UTF-8, found {error.reason} at byte {error.start}") from error


def caption_text(value: object, where: str, key: str) -> str | None:
    """A caption as it stands in a record; None when there is none. `DataError` for anything but text."""
    if value is not None and not isinstance(value, str):
        shown = repr(value)
        raise DataError(f"{where}: wanted a text in {key!r}, found {shown if len(shown) <= 60 else shown[:60] + '…'}")
    return value


class _Folders:
    """Names of the files and of the folders of frames in folders, each listed once."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def names(self, folder: str) -> set[str]:
        if folder not in self._names:
            filesystem, path = fs.FileSystem.from_uri(folder) if "://" in folder else (fs.LocalFileSystem(), folder)
            infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
            self._names[folder] = {
                i.base_name for i in infos if i.type == fs.FileType.File or i.base_name.endswith(FRAMES)
            }
        return self._names[folder]


def _upwards(uri: str, root: str) -> Iterator[str]:
    """The folder of a file, and those above it up to `root`."""
    folder = uri.rpartition("/")[0]
    while len(folder) > len(root):
        yield folder
        folder = folder.rpartition("/")[0]
    yield root.rstrip("/")


def _renamed(image: ImageFile, uri: str) -> str:
    """What a caption file is called where `image` is called by its name."""
    label = image.name.removesuffix(image.uri[len(image.root) :].lstrip("/"))
    return label + uri[len(image.root) :].lstrip("/")


def _read_metadata(uri: str, caption_key: str, folders: _Folders) -> dict[str, str | None]:
    """Captions by URI of the image."""
    folder = uri.rpartition("/")[0]
    captions: dict[str, str | None] = {}
    keys: set[str] = set()
    absent = []
    for where, record in _lines(uri):
        name = record.get(FILE_NAME)
        if not isinstance(name, str):
            raise DataError(f"{where}: wanted the image's path in {FILE_NAME!r}, found the keys {_shown(record)}")
        name = str(PurePosixPath(name))  # `./a.png` is `a.png`
        inside, _, base = name.rpartition("/")
        image = f"{folder}/{name}"
        if PurePosixPath(name).suffix.lower() not in LOOSE or base not in folders.names(
            f"{folder}/{inside}".rstrip("/")
        ):
            absent.append(f"{name} ({where.rpartition(', ')[2]})")
        if image in captions:
            raise DataError(f"{where}: {name} has a line already; wanted one line per image")
        keys |= set(record)
        captions[image] = caption_text(record.get(caption_key), where, caption_key)
    if absent:
        raise DataError(
            f"{uri} names {len(absent)} file(s) that are no images or not there: {', '.join(absent[:5])}. Get them, or "
            "take their lines out."
        )
    if captions and caption_key not in keys:
        found = ", ".join(sorted(keys - {FILE_NAME})) or "nothing else"
        raise DataError(
            f"{uri}: no line has {caption_key!r} beside {FILE_NAME!r}, found {found}; set source.caption_key"
        )
    return captions


def _lines(uri: str) -> Iterator[tuple[str, dict[str, object]]]:
    with open_uri(uri) as stream:
        for number, line in enumerate(stream.read().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{uri}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: no valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: wanted an object with {FILE_NAME!r}, found {str(record)[:60]}")
            yield where, record


def _shown(record: dict[str, object]) -> str:
    return ", ".join(sorted(record)) or "of an empty object"
