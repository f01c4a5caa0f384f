"""Text as rows of tokens: the units of work, what defines them, and the rows of one unit.

Everything here is a function of the files, the tokenizer and the configuration: never of workers or paths.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.models.load import tokenizer_identity
from raydistill.signals import JsonValue
from raydistill.sources import hub_data
from raydistill.sources.chat import RENDER_ERRORS, Span, rendered, require_template
from raydistill.sources.files import DataFile, content_hashes, find_files
from raydistill.sources.packing import Bool, Int32, Int64, Packer, Tokens, pieces
from raydistill.sources.records import Document, documents, open_parquet
from raydistill.sources.splits import LONE_SURROGATE, Split, split_of

ROWS_VERSION = 1
"""Raised when the same files and settings would give other rows."""
UNIT_BYTES = 32 << 20
"""Files and Parquet row groups are put together up to this size on disk."""
ENCODE_CHARS = 1 << 20
"""Text that is tokenised at once; a longer document is tokenised in blocks that end after a line."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, some row groups of a Parquet file, or a range of a data set."""

    file: DataFile | None = None
    row_groups: tuple[int, ...] | None = None
    records: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What one task reads. Units are few and small, and their rows are the source's rows in order."""

    index: int
    parts: tuple[Part, ...]
    num_bytes: int
    """Size on disk (of a data set: in memory), for shares of progress."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """One sequence of the inputs cache; several documents if `segments` has several lengths."""

    row_id: str
    split: Split
    input_ids: Int32
    target: Bool
    segments: Int32
    text_bytes: int


def units(source: TextSource) -> list[Unit]:
    """The source cut into units of work, in source order. Raises `DataError` for missing, empty or broken files."""
    if source.dataset is not None:
        sized = [(Part(records=span), size) for span, size in hub_data.ranges(source.dataset, UNIT_BYTES)]
    else:
        sized = [pair for file in find_files(source.paths) for pair in _parts(file)]
    if not sized:
        raise DataError(f"source: {_named(source)} holds no records at all")
    grouped: list[tuple[list[Part], int]] = []
    for part, size in sized:
        if not grouped or grouped[-1][1] + size > UNIT_BYTES:
            grouped.append(([], 0))
        members, total = grouped.pop()
        grouped.append(([*members, part], total + size))
    return [Unit(index, tuple(members), total) for index, (members, total) in enumerate(grouped)]


def _parts(file: DataFile) -> list[tuple[Part, int]]:
    if file.format != "parquet":
        return [(Part(file), file.size)] if file.size else []
    metadata = open_parquet(file).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    before = np.cumsum([0, *sizes])[:-1] // UNIT_BYTES
    filled = [i for i in range(len(sizes)) if metadata.row_group(i).num_rows]
    groups = [list(members) for _, members in groupby(filled, key=lambda i: before[i])]
    return [(Part(file, tuple(members)), sum(sizes[i] for i in members)) for members in groups]


def text_content(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, JsonValue]:
    """What defines the rows, for the fingerprint: hashes of the files, tokenizer, template and every setting."""
    settings = source.model_dump(mode="json", exclude={"paths", "dataset", "tokenizer"})
    if source.dataset is not None:
        data: dict[str, JsonValue] = {"dataset": hub_data.identity(source.dataset)}
    else:
        data = {"files": dict(content_hashes(find_files(source.paths)))}
    template = tokenizer.chat_template
    return {
        **settings,
        **data,
        "rows_version": ROWS_VERSION,
        "tokenizer": tokenizer_identity(tokenizer),
        "template": _short_hash(json.dumps(template, sort_keys=True)) if template else None,
        "bos": _token_id(tokenizer.bos_token_id) if source.add_bos else None,
        "eos": _token_id(tokenizer.eos_token_id) if source.add_eos else None,
    }


def rows(
    unit: Unit,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    dropped: Counter[str] | None = None,
) -> Iterator[TextRow]:
    """The rows of one unit; `held_out` is the share of documents that is kept out of training.

    `dropped` counts what gave no row: documents that are `empty` or `too_long`, pieces that are `too_short` or have
    `no_target` (nothing that the assistant wrote).
    """
    dropped = Counter() if dropped is None else dropped
    if not source.packing:
        for split, piece in _pieces(unit, source, tokenizer, held_out, dropped):
            yield _row(split, [piece])
        return
    packers: dict[Split, Packer] = {"train": Packer(source.seq_len), "held_out": Packer(source.seq_len)}
    for split, piece in _pieces(unit, source, tokenizer, held_out, dropped):
        for full in packers[split].add(piece):
            yield _row(split, full)
    for split, packer in packers.items():
        for full in packer.rest():
            yield _row(split, full)


def require_rows(num_rows: int, dropped: Counter[str], source: TextSource) -> None:
    """Raise `DataError`, with what became of the documents, when a whole source gave no row."""
    if num_rows:
        return
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())) or "none were found"
    raise DataError(
        f"source: {_named(source)} gives no usable row; documents dropped: {counts}. See source.text_key, "
        f"source.min_tokens ({source.min_tokens}), source.seq_len ({source.seq_len}) and source.long_documents."
    )


def _row(split: Split, members: list[Tokens]) -> TextRow:
    return TextRow(
        row_id=members[0].name,
        split=split,
        input_ids=np.concatenate([m.input_ids for m in members]),
        target=np.concatenate([m.target for m in members]),
        segments=np.array([len(m.input_ids) for m in members], dtype=np.int32),
        text_bytes=sum(m.text_bytes for m in members),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """A document ready for the tokenizer; `spans` are the assistant's words in a conversation, None in plain text."""

    name: str
    split: Split
    text: str
    spans: list[Span] | None


def _pieces(
    unit: Unit, source: TextSource, tokenizer: PreTrainedTokenizerBase, held_out: float, dropped: Counter[str]
) -> Iterator[tuple[Split, Tokens]]:
    batch: list[_Text] = []
    chars = 0
    for text in _texts(unit, source, tokenizer, held_out, dropped):
        batch.append(text)
        chars += len(text.text)
        if chars >= ENCODE_CHARS:
            yield from _encoded(batch, source, tokenizer, dropped)
            batch, chars = [], 0
    yield from _encoded(batch, source, tokenizer, dropped)


def _texts(
    unit: Unit, source: TextSource, tokenizer: PreTrainedTokenizerBase, held_out: float, dropped: Counter[str]
) -> Iterator[_Text]:
    for part in unit.parts:
        for document, name in _documents(part, source):
            if document.messages:
                require_template(tokenizer, name)
                try:
                    text, spans = rendered(document.messages, tokenizer)
                except RENDER_ERRORS as error:
                    raise DataError(f"{name}: the chat template does not accept this conversation: {error}") from error
                except DataError as error:
                    raise DataError(f"{name}: {error}") from error
                split = split_of(json.dumps(document.messages, sort_keys=True), held_out)
                yield _Text(name, split, LONE_SURROGATE.sub("\ufffd", text), spans)
            elif document.text and not document.text.isspace():
                text = LONE_SURROGATE.sub("\ufffd", document.text)
                yield _Text(name, split_of(text, held_out), text, None)
            else:
                dropped["empty"] += 1


def _documents(part: Part, source: TextSource) -> Iterator[tuple[Document, str]]:
    if part.file is not None:
        for document in documents(part.file, source, part.row_groups):
            yield document, f"{part.file.name}#{document.record}"
    elif source.dataset is not None and part.records is not None:
        for document in hub_data.documents(source.dataset, part.records, source):
            yield document, f"{hub_data.name_of(source.dataset)}#{document.record}"


def _encoded(
    batch: list[_Text], source: TextSource, tokenizer: PreTrainedTokenizerBase, dropped: Counter[str]
) -> Iterator[tuple[Split, Tokens]]:
    if not batch:
        return
    for text, (ids, starts) in zip(batch, _tokenise([t.text for t in batch], tokenizer), strict=True):
        num_bytes = _bytes_per_token(text.text, starts)
        if text.spans is None:
            learn = np.ones(len(ids), dtype=np.bool_)
            first = tokenizer.bos_token_id if source.add_bos else None
            last = tokenizer.eos_token_id if source.add_eos else None
            for token, place in ((first, 0), (last, len(ids) + (first is not None))):
                if token is not None:
                    ids, learn = np.insert(ids, place, token), np.insert(learn, place, True)
                    num_bytes = np.insert(num_bytes, place, 0)
        else:
            learn = np.zeros(len(ids), dtype=np.bool_)
            for start, end in text.spans:
                learn |= (starts >= start) & (starts < end)
        for piece in pieces(
            text.name, ids.astype(np.int32), learn, num_bytes, seq_len=source.seq_len,
            long_documents=source.long_documents, min_tokens=source.min_tokens, dropped=dropped,
        ):  # fmt: skip
            yield text.split, piece


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Int64, Int64]]:
    """Token ids and the character at which each token starts, [tokens] each, per text; without special tokens added."""
    if not tokenizer.is_fast:
        # Tokenizers written in Python know no offsets: tokens are taken to be equally long.
        for text in texts:
            plain = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
                "input_ids"
            ]
            yield np.array(plain, dtype=np.int64), np.arange(len(plain)) * len(text) // max(len(plain), 1)
        return
    blocks = [list(_blocks(text)) for text in texts]
    flat = [block for members in blocks for block in members]
    encoded = tokenizer(
        flat, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False,
        return_token_type_ids=False, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    place = 0
    for members in blocks:
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for block in members:
            ids += encoded["input_ids"][place]
            starts += [offset + start for start, _ in encoded["offset_mapping"][place]]
            offset += len(block)
            place += 1
        yield np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)


def _blocks(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > ENCODE_CHARS:
        end = text.rfind("\n", start, start + ENCODE_CHARS) + 1 or start + ENCODE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _bytes_per_token(text: str, starts: Int64) -> Int64:
    """UTF-8 bytes from the start of each token to the start of the next; they sum to those of the text, [tokens]."""
    if not len(starts):
        return starts
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    ends = np.concatenate([[0], np.cumsum(width)])
    places = np.maximum.accumulate(starts)
    places[0] = 0
    return np.diff(ends[np.append(places, len(text))])


def _token_id(token: int | list[int] | None) -> int | list[JsonValue] | None:
    return list(token) if isinstance(token, list) else token


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(source: TextSource) -> str:
    return source.dataset.id if source.dataset is not None else ", ".join(source.paths)
