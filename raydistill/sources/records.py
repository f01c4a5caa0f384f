"""Documents out of files, one at a time, with the place of whatever cannot be read."""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from typing import BinaryIO, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.sources.files import DataFile

Message: TypeAlias = dict[str, JsonValue]
READ_CHARS = 1 << 20
MOST_RECORD_CHARS = 1 << 28
BETWEEN = re.compile(r"[\s,]*")
READ_ROWS = 256
MOST_DOCUMENT_BYTES = 1 << 30
"""A whole plain-text file is one document only up to this size, since a document is held in memory."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document or conversation as it stands in its file; both are None when the record is empty."""

    record: int
    """Position in the file, from 0: Parquet row, line, JSON element or block."""
    text: str | None = None
    messages: list[Message] | None = None


def documents(file: DataFile, source: TextSource, row_groups: tuple[int, ...] | None = None) -> Iterator[Document]:
    """The documents of `file` in order; of a Parquet file only those of `row_groups`, when given.

    Raises `DataError` that names the file, and the line or record, for anything unreadable.
    """
    with _explained(file):
        if file.format == "parquet":
            yield from _parquet(file, source, row_groups)
        elif file.format == "json_lines":
            yield from _json_lines(file, source)
        elif file.format == "json":
            yield from _json(file, source)
        else:
            yield from _text(file, source)


@contextmanager
def _explained(file: DataFile) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{file.uri}: wanted UTF-8 text, found the byte {error.object[error.start]:#04x}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        # zlib, lzma, gzip and Arrow each have their own words for a file that ends too early or is no such file.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{file.uri}: unreadable or truncated ({reason}); it has {file.size:,} bytes. Get the file again, "
            "or take it out of source.paths."
        ) from error


def open_parquet(file: DataFile) -> pq.ParquetFile:
    """The Parquet file; `DataError` when it is broken."""
    with _explained(file):
        return pq.ParquetFile(file.open())


def _parquet(file: DataFile, source: TextSource, row_groups: tuple[int, ...] | None) -> Iterator[Document]:
    table = pq.ParquetFile(file.open())
    present = table.schema_arrow.names
    columns = [key for key in (source.text_key, source.messages_key) if key in present]
    if not columns:
        raise _no_column(file.uri, source, present)
    groups = range(table.num_row_groups) if row_groups is None else row_groups
    first = sum(table.metadata.row_group(i).num_rows for i in range(groups[0])) if len(groups) else 0
    for batch in table.iter_batches(batch_size=READ_ROWS, row_groups=list(groups), columns=columns):
        for row in batch.to_pylist():
            yield document_of(row, first, source, f"{file.uri}, row {first}")
            first += 1


def _json_lines(file: DataFile, source: TextSource) -> Iterator[Document]:
    with file.open() as stream:
        for index, line in enumerate(_lines(stream)):
            if not line.strip():
                continue
            where = f"{file.uri}, line {index + 1}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at column {error.colno}"
                raise DataError(f"{where}: no valid JSON ({problem}): {_shown(line)}") from error
            yield document_of(record, index, source, where)


def _lines(stream: BinaryIO) -> TextIOWrapper:
    return TextIOWrapper(stream, encoding="utf-8-sig")


def _json(file: DataFile, source: TextSource) -> Iterator[Document]:
    with file.open() as stream:
        for index, record in enumerate(_json_values(_lines(stream), file.uri)):
            yield document_of(record, index, source, f"{file.uri}, record {index}")


def _json_values(stream: TextIOWrapper, where: str) -> Iterator[object]:
    """The elements of one JSON array, or JSON values one after another, holding little more than one of them."""
    decoder = json.JSONDecoder()
    buffer, place, count, step = stream.read(READ_CHARS).lstrip(), 0, 0, READ_CHARS
    in_array = buffer.startswith("[")
    place += in_array
    while True:
        place = BETWEEN.match(buffer, place).end()  # type: ignore[union-attr]  # matches the empty string too
        if in_array and buffer.startswith("]", place):
            return
        try:
            value, place = decoder.raw_decode(buffer, place)
        except json.JSONDecodeError as error:
            # Either the value goes on beyond the buffer or it is wrong; only the end of the file tells.
            more = stream.read(step) if len(buffer) < MOST_RECORD_CHARS else ""
            if more:
                buffer, place, step = buffer[place:] + more, 0, 2 * step
                continue
            if place == len(buffer) and not in_array:
                return
            found = _shown(buffer[place:]) or "the end of the file"
            raise DataError(f"{where}, record {count}: no valid JSON ({error.msg}); found {found}") from error
        yield value
        count, step = count + 1, READ_CHARS


def _text(file: DataFile, source: TextSource) -> Iterator[Document]:
    with file.open() as stream:
        if source.format == "lines":
            for index, line in enumerate(_lines(stream)):
                yield Document(index, line.rstrip("\n"))
        elif source.format == "paragraphs":
            for index, block in enumerate(_blocks(_lines(stream))):
                yield Document(index, block)
        else:
            text = _lines(stream).read(MOST_DOCUMENT_BYTES)
            if len(text) == MOST_DOCUMENT_BYTES:
                raise DataError(
                    f"{file.uri}: too large to be one document (more than {MOST_DOCUMENT_BYTES:,} characters); "
                    "set source.format to lines or paragraphs"
                )
            yield Document(0, text)


def _blocks(lines: TextIOWrapper) -> Iterator[str]:
    """Runs of lines that are not blank."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\n")
            block = []
    if block:
        yield "".join(block).rstrip("\n")


def document_of(record: object, index: int, source: TextSource, where: str) -> Document:
    """The document or conversation in a record; `DataError` when the keys are missing or hold something else."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: wanted an object with the key {source.text_key!r}, found {_shown(repr(record))}")
    if source.text_key not in record and source.messages_key not in record:
        raise _no_column(where, source, list(record))
    text, messages = record.get(source.text_key), record.get(source.messages_key)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: wanted text in {source.text_key!r}, found {_shown(repr(text))}")
    if text is not None or messages is None:
        return Document(index, text=text)
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise DataError(
            f"{where}: wanted a list of {{role, content}} objects in {source.messages_key!r}, "
            f"found {_shown(repr(messages))}"
        )
    return Document(index, messages=[without_nulls(message) for message in messages])


def without_nulls(message: Mapping[str, JsonValue]) -> Message:
    """The message without the keys that a columnar file had to invent."""
    return {key: value for key, value in cast("dict[str, JsonValue]", message).items() if value is not None}


def _no_column(where: str, source: TextSource, found: list[str]) -> DataError:
    return DataError(
        f"{where}: wanted the text column {source.text_key!r} (or conversations in {source.messages_key!r}), found the "
        f"columns {', '.join(map(repr, found)) or 'nothing'}; set source.text_key or source.messages_key"
    )


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else f"{text[:60]}…"
