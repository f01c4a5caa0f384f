"""WebDataset tars: files with the same name up to the first dot, one after another, are one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from raydistill.errors import DataError
from raydistill.sources.captions import caption_text
from raydistill.sources.files import open_uri
from raydistill.sources.image_files import IMAGE_SUFFIXES, ImageFile, Place


@dataclass(slots=True)
class Sample:
    """One sample of a tar."""

    key: str
    """Path of its files inside the tar, up to the first dot of the name."""
    data: bytes | None = None
    """The first file with the suffix of an image."""
    place: Place | None = None
    caption: str | None = None
    extensions: list[str] = field(default_factory=list)


def samples(file: ImageFile, caption_key: str | None, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Iterator[Sample]:
    """The samples of a tar in order, whose images (or clips) are the files with one of `suffixes`.

    A caption is the `.txt`, else `.<caption_key>`, else `caption_key` in the `.json`; none is looked for where
    `caption_key` is None.

    Raises `DataError` for captions that are no text, and what `tarfile` raises for a broken tar.
    """
    with open_uri(file.uri) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        sample: Sample | None = None
        texts: dict[str, bytes] = {}
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.name.startswith("."):
                continue
            base, _, extension = path.name.partition(".")
            key = str(path.with_name(base))
            if sample is not None and key != sample.key:
                yield _with_caption(sample, texts, file, caption_key)
                sample = None
            if sample is None:
                sample, texts = Sample(key), {}
            sample.extensions.append(extension)
            is_image = f".{extension.lower()}" in suffixes
            if is_image and sample.data is None:
                sample.data = _content(tar, member)
                sample.place = Place(file.uri, member.offset_data, member.size)
            elif extension in ("txt", "json", caption_key):
                texts[extension] = _content(tar, member)
        if tar.offset + tarfile.BLOCKSIZE > file.size:  # `tarfile` takes a missing end for the end
            raise tarfile.ReadError("the block that ends a tar is missing")
        if sample is not None:
            yield _with_caption(sample, texts, file, caption_key)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


def _with_caption(sample: Sample, texts: dict[str, bytes], file: ImageFile, caption_key: str | None) -> Sample:
    where = f"{file.uri}, sample {sample.key}"
    if caption_key is None:
        return sample
    try:
        for extension in ("txt", caption_key):
            if extension in texts and extension != "json":
                sample.caption = texts[extension].decode("utf-8-sig").strip()
                return sample
        if "json" in texts:
            record = json.loads(texts["json"])
            if isinstance(record, dict):
                sample.caption = caption_text(record.get(caption_key), where, caption_key)
    except ValueError as error:
        raise DataError(f"{where}: its caption cannot be read: {error}") from error
    return sample
