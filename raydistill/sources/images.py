"""Images or video clips with captions: the units of work, what defines them, and the rows of one unit.

Everything here is a function of the files and the configuration: never of workers or of where the folders lie.
A row's id is the name of its image file, or that of its Parquet file or tar with `#` and the record's number or key.
An image that cannot be decoded gives no row, nor, where text encoders are to read captions, one without a caption; both
are named and counted, and stop the run above the share `max_corrupt`. An empty caption is a caption.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydistill.config.sources import Pictures, VideosSource
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.sources.captions import Captions, caption_text, find_captions, read_sidecar
from raydistill.sources.clips import packed, read_clip
from raydistill.sources.image_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ImageFile, Place, find_image_files
from raydistill.sources.pixels import Unreadable, decoded
from raydistill.sources.splits import LONE_SURROGATE, Split, split_of
from raydistill.sources.tars import Sample, samples

UNIT_BYTES = 32 << 20
"""Loose images and Parquet row groups are put together up to this size on disk; a tar is a unit by itself."""
READ_ROWS = 16

Reason: TypeAlias = Literal["unreadable", "no_caption"]


@dataclass(frozen=True, slots=True)
class Part:
    """A loose image, a tar, or some row groups of a Parquet file."""

    file: ImageFile
    row_groups: tuple[int, ...] | None = None
    caption: str | None = None
    """Caption of a loose image out of a metadata file."""
    sidecar: str | None = None
    """URI of the `.txt` of a loose image."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task reads. Units are few, and their rows are the source's rows in order."""

    index: int
    parts: tuple[Part, ...]
    num_bytes: int

    def to_json(self) -> dict[str, JsonValue]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, JsonValue]) -> Unit:
        """The inverse of `to_json` after a trip through JSON."""
        parts = []
        for part in cast("list[dict]", plain["parts"]):
            groups = part["row_groups"]
            file = ImageFile(**(part["file"] | {"frames": tuple(part["file"]["frames"])}))
            given = {"file": file, "row_groups": None if groups is None else tuple(groups)}
            parts.append(Part(**(part | given)))
        return cls(cast(int, plain["index"]), tuple(parts), cast(int, plain["num_bytes"]))


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image that can be decoded, and where its bytes are."""

    row_id: str
    split: Split
    caption: str
    height: int
    """Upright, before any resizing."""
    width: int
    sha: bytes
    """sha256 of the bytes of the image file."""
    place: Place | None
    """None where the bytes cannot be read again by themselves."""
    data: bytes

    def without_data(self) -> ImageRow:
        """The row without the bytes of its image."""
        return replace(self, data=b"")


@dataclass(slots=True)
class Lost:
    """The images that gave no row: name, reason and details, in source order."""

    images: list[tuple[str, Reason, str]] = field(default_factory=list)

    def add(self, name: str, reason: Reason, details: str) -> None:
        """Count an image."""
        self.images.append((name, reason, details))


def units(source: Pictures) -> list[Unit]:
    """The source cut into units of work, in source order. Raises `DataError` for missing, empty or broken files."""
    files = find_image_files(source.paths, clips=isinstance(source, VideosSource))
    captions = captions_of(files, source)
    grouped: list[tuple[list[Part], int]] = []
    for part, size in (pair for file in files for pair in _parts(file, captions)):
        joins = grouped and grouped[-1][1] + size <= UNIT_BYTES
        if joins and part.file.kind != "tar" and grouped[-1][0][-1].file.kind != "tar":
            members, total = grouped.pop()
            grouped.append(([*members, part], total + size))
        else:
            grouped.append(([part], size))
    return [Unit(index, tuple(members), total) for index, (members, total) in enumerate(grouped)]


def captions_of(files: list[ImageFile], source: Pictures) -> Captions:
    """The captions of loose images, where text encoders are to read them."""
    return find_captions(files, source.caption_key) if source.text_encoders else Captions({}, {}, {})


def _parts(file: ImageFile, captions: Captions) -> list[tuple[Part, int]]:
    match file.kind:
        case "image" | "frames":
            return [(Part(file, None, captions.texts.get(file.uri), captions.sidecars.get(file.uri)), file.size)]
        case "tar":
            return [(Part(file), file.size)]
        case "parquet":
            metadata = _open_parquet(file).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            before = np.cumsum([0, *sizes])[:-1] // UNIT_BYTES
            filled = [i for i in range(len(sizes)) if metadata.row_group(i).num_rows]
            groups = [list(members) for _, members in groupby(filled, key=lambda i: before[i])]
            return [(Part(file, tuple(members)), sum(sizes[i] for i in members)) for members in groups]


def rows(unit: Unit, source: Pictures, held_out: float, lost: Lost) -> Iterator[ImageRow]:
    """The rows of one unit; `held_out` is the share of images that is kept out of training.

    Images that give no row are added to `lost`. Raises `DataError` for a container that is broken as a whole, or has
    none of the wanted columns or captions.
    """
    for part in unit.parts:
        match part.file.kind:
            case "image" | "frames":
                found = _loose(part, source)
            case "parquet":
                found = _parquet(part, source)
            case "tar":
                found = _tar(part, source)
        for name, data, caption, place in found:
            if isinstance(data, str):
                lost.add(name, "unreadable", data)
                continue
            try:
                image = pictures(data, source)[0]
            except Unreadable as error:
                lost.add(name, "unreadable", str(error))
                continue
            if caption is None and source.text_encoders:
                lost.add(name, "no_caption", "no caption")
                continue
            text = LONE_SURROGATE.sub("\ufffd", caption or "")
            sha = hashlib.sha256(data)
            split = split_of(sha.hexdigest(), held_out)
            yield ImageRow(name, split, text, image.height, image.width, sha.digest(), place, data)


def pictures(data: bytes, source: Pictures) -> list[Image.Image]:
    """The picture of an image file, or the frames that are wanted of a clip; raises `Unreadable`."""
    if isinstance(source, VideosSource):
        return read_clip(data, frames=source.frames, fps=source.fps, background=source.background)
    return [decoded(data, source.background)]


_Found: TypeAlias = "Iterator[tuple[str, bytes | str, str | None, Place | None]]"
"""Row id, bytes (or why there are none), caption and place of each image of a part."""


def _loose(part: Part, source: Pictures) -> _Found:
    caption = part.caption
    if part.sidecar is not None:
        caption = read_sidecar(part.sidecar)
    try:
        if part.file.kind == "frames":
            members = [(uri, Place(uri, 0, 0).open().read()) for uri in part.file.frames]
            yield part.file.name, packed(members), caption, None
        else:
            place = Place(part.file.uri, 0, part.file.size)
            yield part.file.name, place.read(), caption, place
    except OSError as error:
        yield part.file.name, f"cannot be read: {error}", caption, None


def _open_parquet(file: ImageFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(Place(file.uri, 0, file.size).open())
    except (OSError, pa.ArrowException) as error:
        raise _broken(file, error) from error


def _parquet(part: Part, source: Pictures) -> _Found:
    file = part.file
    table = _open_parquet(file)
    present = table.schema_arrow.names
    wanted = [source.image_key, *([source.caption_key] if source.text_encoders else [])]
    for key, column in zip(("image_key", "caption_key"), wanted, strict=False):
        if column not in present:
            raise DataError(
                f"{file.uri}: wanted the column {column!r}, found {', '.join(map(repr, present))}; set source.{key}"
            )
    groups = part.row_groups or ()
    number = sum(table.metadata.row_group(i).num_rows for i in range(groups[0])) if groups else 0
    try:
        for batch in table.iter_batches(batch_size=READ_ROWS, row_groups=list(groups), columns=wanted):
            for record in batch.to_pylist():
                where = f"{file.uri}, row {number}"
                caption = caption_text(record.get(source.caption_key), where, source.caption_key)
                yield f"{file.name}#{number}", _image_bytes(record[source.image_key], where, source), caption, None
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise _broken(file, error) from error


def _image_bytes(value: object, where: str, source: Pictures) -> bytes | str:
    """The bytes in a cell: as such, or in the field `bytes` of a struct (with `path`), as `datasets` writes images."""
    if isinstance(value, dict) and "bytes" in value:
        value = value["bytes"]
        if value is None:
            return "the file holds only a path of this image, no bytes"
    if value is None:
        return "there is no image in this record"
    if not isinstance(value, bytes):
        raise DataError(
            f"{where}: wanted the bytes of an image file in {source.image_key!r} (or a struct with bytes), found "
            f"{type(value).__name__}; set source.image_key"
        )
    return value


def _tar(part: Part, source: Pictures) -> _Found:
    file = part.file
    count, captions = 0, 0
    seen: set[str] = set()
    try:
        suffixes = VIDEO_SUFFIXES if isinstance(source, VideosSource) else IMAGE_SUFFIXES
        for sample in samples(file, source.caption_key if source.text_encoders else None, suffixes):
            seen |= set(sample.extensions)
            count += 1
            captions += sample.caption is not None
            data: bytes | str = sample.data if sample.data is not None else _without_image(sample)
            yield f"{file.name}#{sample.key}", data, sample.caption, sample.place
    except (OSError, tarfile.TarError) as error:
        raise _broken(file, error) from error
    if count and not captions and source.text_encoders:
        raise DataError(
            f"{file.uri}: none of its {count} samples has a caption; wanted a .txt, a .{source.caption_key} or a .json "
            f"with {source.caption_key!r}, found {', '.join(sorted(seen))}; set source.caption_key"
        )


def _without_image(sample: Sample) -> str:
    return f"the sample has no image, only {', '.join(sorted(sample.extensions)) or 'nothing'}"


def _broken(file: ImageFile, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(
        f"{file.uri}: unreadable or truncated ({reason}); it has {file.size:,} bytes. Get the file again, or take it "
        "out of source.paths."
    )


def require_enough(num_rows: int, lost: Lost, source: Pictures) -> None:
    """Raise `DataError`, naming the first images that gave no row, when their share is above `max_corrupt`, or when
    there is no row at all."""
    total = num_rows + len(lost.images)
    too_many = len(lost.images) > source.max_corrupt * total
    if num_rows and not too_many:
        return
    if not total:
        raise DataError(f"source: {', '.join(source.paths)} holds no image at all")
    first = "\n".join(f"  {name}: {details}" for name, _, details in lost.images[:5])
    more = f"\n  and {len(lost.images) - 5:,} more" if len(lost.images) > 5 else ""
    why = f"more than the share source.max_corrupt ({source.max_corrupt:g}) allows" if too_many else "which leaves none"
    remedy = ", or raise source.max_corrupt" if too_many and num_rows else ""
    raise DataError(
        f"source: {len(lost.images):,} of {total:,} images cannot be used, {why}:\n{first}{more}\n"
        f"Mend them or take them out{remedy}. An image may have an empty caption, but not none (an empty .txt or "
        '"" says so).'
    )
