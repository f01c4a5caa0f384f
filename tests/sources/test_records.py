"""Documents out of files of every kind, and what is said when a file is broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.sources import records
from raydistill.sources.files import find_files
from raydistill.sources.records import Document, documents

TEXTS = ["first line\nsecond line", "naïve 文字 😀", "third"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def source(path: Path, **settings: str) -> TextSource:
    return TextSource.model_validate({"paths": [str(path)], "tokenizer": "none", "seq_len": 8, **settings})


def read(path: Path, **settings: str) -> list[Document]:
    (file,) = find_files([str(path)])
    return list(documents(file, source(path, **settings)))


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, table: dict[str, object], **options: int) -> Path:
    pq.write_table(pa.table(table), path, **options)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(TEXTS)))
    assert read(path) == [Document(i, text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_a_truncated_file_is_an_error_and_not_an_early_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.jsonl{suffix}"
    whole = COMPRESS[suffix](json_lines([f"document number {i} of many" for i in range(2000)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data\.jsonl\.\w+: unreadable or truncated"):
        read(path)


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_members_of_a_concatenated_file_are_all_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n"))
    assert [d.text for d in read(path, format="lines")] == ["one", "two"]


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_a_file_that_is_not_what_its_suffix_says_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.txt{suffix}"
    path.write_text("plain text that nobody compressed")
    with pytest.raises(DataError, match=r"data\.txt\.\w+: unreadable or truncated"):
        read(path)


def test_a_bad_json_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: no valid JSON .*: \{\"text\": \"b\""):
        read(path)


def test_blank_lines_do_not_shift_record_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert read(path) == [Document(0, "a"), Document(2, "b")]


@pytest.mark.parametrize(
    "layout",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\n".join(json.dumps(row) for row in rows),
        lambda rows: "\n\n".join(json.dumps(row, indent=1) for row in rows),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_json_arrays_and_concatenated_objects_read_alike_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[[list[dict[str, str]]], str], block: int
) -> None:
    monkeypatch.setattr(records, "READ_CHARS", block)
    path = tmp_path / "data.json"
    path.write_text(layout([{"text": text, "note": "]}, {"} for text in TEXTS]))
    assert read(path) == [Document(i, text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', "record 1: no valid JSON"),
        ('[{"text": "a"},', "record 1: no valid JSON .* found the end of the file"),
        ('[{"text": "a"}, oops]', "record 1: no valid JSON .* found oops"),
        ('[{"text": "a"}, "b"]', "record 1: wanted an object with the key 'text', found 'b'"),
    ],
)
def test_a_broken_json_file_is_named_by_its_record(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_row_groups_of_parquet_keep_the_row_numbers_of_the_file(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "data.parquet", {"n": range(10), "text": [f"t{i}" for i in range(10)]}, row_group_size=3
    )
    (file,) = find_files([str(path)])
    assert list(documents(file, source(path), (1, 2))) == [Document(i, f"t{i}") for i in range(3, 9)]
    assert [d.record for d in documents(file, source(path))] == list(range(10))


def test_a_missing_text_column_names_the_columns_found(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", {"id": [1], "content": ["a"]})
    with pytest.raises(
        DataError, match=r"data\.parquet: wanted the text column 'text' .*found the columns 'id', 'content'"
    ):
        read(path)
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"line 2: wanted the text column 'text' .*found the columns 'body'"):
        read(lines)


def test_a_text_column_that_holds_no_text_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", {"text": [1, 2]})
    with pytest.raises(DataError, match="row 0: wanted text in 'text', found 1"):
        read(path)


def test_truncated_and_foreign_parquet_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", {"text": [f"some text {i}" for i in range(1000)]})
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"PAR1 but not really", whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"data\.parquet: unreadable or truncated"):
            read(path)


def test_conversations_come_from_the_messages_key_without_invented_nulls(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "x"}]
    path = write_parquet(tmp_path / "data.parquet", {"messages": [messages], "id": [7]})
    assert read(path) == [Document(0, messages=messages)]


def test_a_conversation_is_used_only_where_there_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"text": "a", "messages": messages}, {"text": None, "messages": messages}, {"messages": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read(path) == [Document(0, "a"), Document(1, messages=messages), Document(2)]


def test_messages_of_another_shape_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": ["hi"]}')
    with pytest.raises(DataError, match=r"line 1: wanted a list of \{role, content\} objects"):
        read(path)


def test_plain_text_is_one_document_or_lines_or_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\r\none\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert read(path) == [Document(0, "\none\ntwo\n \n\nthree\n")]
    assert read(path, format="paragraphs") == [Document(0, "one\ntwo"), Document(1, "three")]
    assert [d.text for d in read(path, format="lines") if d.text] == ["one", "two", " ", "three"]
    assert [d.record for d in read(path, format="lines") if d.text == "three"] == [5]


def test_bytes_that_are_no_utf_8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"abc \xff")
    with pytest.raises(DataError, match=r"data\.txt: wanted UTF-8 text, found the byte 0xff"):
        read(path)


def test_a_file_too_large_for_one_document_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_DOCUMENT_BYTES", 10)
    path = tmp_path / "data.txt"
    path.write_text("0123456789abc\n")
    with pytest.raises(DataError, match=r"set source\.format to lines or paragraphs"):
        read(path)
