"""Rows of text: what they hold, in which split, and that they depend on nothing but files and settings."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import tiny_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.sources import text
from raydistill.sources.text import TextRow, require_rows, rows, split_of, text_content, units


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


def source(*paths: Path, **settings: object) -> TextSource:
    common = {"tokenizer": "none", "seq_len": 16, "add_bos": False, "add_eos": False}
    return TextSource.model_validate({"paths": list(map(str, paths)), **common, **settings})


def write_lines(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def all_rows(
    config: TextSource, tokenizer: PreTrainedTokenizerBase, held_out: float = 0.0, dropped: Counter[str] | None = None
) -> list[TextRow]:
    return [row for unit in units(config) for row in rows(unit, config, tokenizer, held_out, dropped)]


def same(one: list[TextRow], other: list[TextRow]) -> bool:
    return len(one) == len(other) and all(
        all(np.array_equal(a, b) for a, b in zip(astuple(x), astuple(y), strict=True))
        for x, y in zip(one, other, strict=True)
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: characters outside ASCII are several tokens with one place in the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_document_becomes_its_tokens_with_the_ends_marked(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write_lines(tmp_path / "a.jsonl", ["abc"])
    (row,) = all_rows(source(path, add_bos=True, add_eos=True), tokenizer)
    assert tokenizer.decode(row.input_ids) == "<|begin|>abc<|end|>"
    assert row.target.tolist() == [True, True, True, True, False]
    assert row.segments.tolist() == [5]
    assert (row.row_id, row.split, row.text_bytes) == ("a.jsonl#0.0", "train", 3)
    assert row.input_ids.dtype == row.segments.dtype == np.int32
    (bare,) = all_rows(source(path), tokenizer)
    assert tokenizer.decode(bare.input_ids) == "abc"
    assert bare.text_bytes == 2  # the first token is nobody's target


def test_pieces_of_a_long_document_cover_its_text_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    content = "the quick brown fox jumps over the lazy dog, twice"
    path = write_lines(tmp_path / "a.jsonl", [content])
    found = all_rows(source(path, add_bos=True), tokenizer)
    assert [row.row_id for row in found] == [f"a.jsonl#0.{k}" for k in range(len(found))]
    assert "".join(tokenizer.decode(row.input_ids[1:]) for row in found) == content
    assert sum(row.text_bytes for row in found) == len(content)


@pytest.mark.parametrize("seq_len", [2, 3, 5, 64])
def test_text_bytes_add_up_when_a_character_is_several_tokens(tmp_path: Path, seq_len: int) -> None:
    content = "naïve 文字 😀😀 end"
    tokenizer = byte_tokenizer()
    path = write_lines(tmp_path / "a.jsonl", [content])
    found = all_rows(source(path, seq_len=seq_len), tokenizer)
    assert sum(row.text_bytes for row in found) == len(content.encode()) - 1
    assert sum(row.target.sum() for row in found) == len(content.encode()) - 1


def test_a_document_longer_than_a_block_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "one line\n" * 5 + "x" * 40 + "\nnaïve 😀 end"
    path = write_lines(tmp_path / "a.jsonl", [content, "short"])
    config = source(path, seq_len=200)
    whole = all_rows(config, byte_tokenizer())
    monkeypatch.setattr(text, "ENCODE_CHARS", 16)
    assert same(all_rows(config, byte_tokenizer()), whole)


def test_packed_rows_keep_documents_apart_and_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["a" * 9, "b" * 5, "c" * 7, "d" * 2, "e" * 40]
    path = write_lines(tmp_path / "a.jsonl", texts)
    found = all_rows(source(path, packing=True), tokenizer)
    assert all(row.segments.sum() == len(row.input_ids) <= 16 for row in found)
    pieces = []
    for row in found:
        for segment in np.split(np.arange(len(row.input_ids)), np.cumsum(row.segments)[:-1]):
            assert not row.target[segment[-1]], "the last token of a document must not predict the next document"
            assert row.target[segment[:-1]].all()
            pieces.append(tokenizer.decode(row.input_ids[segment]))
    unpacked = [tokenizer.decode(row.input_ids) for row in all_rows(source(path), tokenizer)]
    assert sorted(pieces) == sorted(unpacked)
    assert len(found) < len(unpacked)
    assert len({row.row_id for row in found}) == len(found)
    assert sum(row.text_bytes for row in found) == sum(len(t) - 1 for t in texts)


def test_no_packed_row_mixes_the_splits(tmp_path: Path) -> None:
    texts: list[str | None] = [f"document {i}" for i in range(200)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    tokenizer = tiny_tokenizer()
    wanted = {t: split_of(t, 0.3) for t in texts if t}
    for packing in (False, True):
        found = all_rows(source(path, packing=packing, seq_len=64), tokenizer, held_out=0.3)
        for row in found:
            for segment in np.split(row.input_ids, np.cumsum(row.segments)[:-1]):
                assert wanted[tokenizer.decode(segment)] == row.split


def test_the_split_follows_the_text_alone_and_grows_with_the_share() -> None:
    texts = [f"text {i}" for i in range(4000)]
    small = {t for t in texts if split_of(t, 0.02) == "held_out"}
    large = {t for t in texts if split_of(t, 0.2) == "held_out"}
    assert small < large
    assert abs(len(large) / 4000 - 0.2) < 0.03
    assert not {t for t in texts if split_of(t, 0.0) == "held_out"}


def test_rows_do_not_depend_on_the_folder_the_unit_size_or_the_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document number {i}" * (1 + i % 3) for i in range(60)]
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "a.jsonl", list(texts[:20]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": t}) + "\n" for t in texts[20:40])
    pq.write_table(pa.table({"text": texts[40:]}), folder / "c.parquet", row_group_size=7)
    whole = all_rows(source(folder), tokenizer, 0.2)
    assert {row.row_id.split("#")[0] for row in whole} == {"a.jsonl", "b.jsonl.gz", "c.parquet"}
    shutil.copytree(folder, tmp_path / "elsewhere/data")
    assert same(all_rows(source(tmp_path / "elsewhere/data"), tokenizer, 0.2), whole)
    assert text_content(source(folder), tokenizer) == text_content(source(tmp_path / "elsewhere/data"), tokenizer)
    assert len(units(source(folder))) == 1
    monkeypatch.setattr(text, "UNIT_BYTES", 1)
    assert len(units(source(folder))) == 5
    assert same(all_rows(source(folder), tokenizer, 0.2), whole)


def test_content_changes_with_whatever_changes_the_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["abc"])
    tokenizer = tiny_tokenizer()
    first = text_content(source(path), tokenizer)
    assert json.loads(json.dumps(first)) == first
    for change in ({"seq_len": 17}, {"packing": True}, {"add_eos": True}, {"long_documents": "drop"}):
        assert text_content(source(path, **change), tokenizer) != first
    other = tiny_tokenizer()
    other.chat_template = "{{ messages }}"
    assert text_content(source(path), other) != first
    write_lines(path, ["abd"])
    assert text_content(source(path), tokenizer) != first


def test_dropped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [None, "", "  \n", "x", "x" * 99, "fine"])
    dropped: Counter[str] = Counter()
    config = source(path, long_documents="drop")
    found = all_rows(config, tiny_tokenizer(), dropped=dropped)
    assert [row.row_id for row in found] == ["a.jsonl#5.0"]
    assert dropped == Counter(empty=3, too_short=1, too_long=1)
    require_rows(len(found), dropped, config)


def test_data_without_a_usable_row_says_what_became_of_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["", "x"])
    dropped: Counter[str] = Counter()
    config = source(path)
    found = all_rows(config, tiny_tokenizer(), dropped=dropped)
    with pytest.raises(DataError, match=r"a\.jsonl gives no usable row; documents dropped: 1 empty, 1 too_short"):
        require_rows(len(found), dropped, config)


def test_a_parquet_file_without_rows_is_empty_data(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no records at all"):
        units(source(tmp_path / "a.parquet"))


def test_a_broken_parquet_file_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing behind it")
    with pytest.raises(DataError, match=r"a\.parquet: unreadable or truncated"):
        units(source(tmp_path / "a.parquet"))


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "ENCODE_CHARS", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "good text"}) + "\n" for _ in range(5000)) + "broken\n")
    config = source(path)
    stream = rows(units(config)[0], config, tiny_tokenizer(), 0.0)
    assert next(stream).row_id == "a.jsonl#0.0"
    with pytest.raises(DataError, match="line 5001"):
        list(stream)


def test_a_tokenizer_that_truncates_by_default_is_not_obeyed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    (row,) = all_rows(source(write_lines(tmp_path / "a.jsonl", ["abcdef"])), tokenizer)
    assert tokenizer.decode(row.input_ids) == "abcdef"


def test_half_a_character_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "a \\ud83d\\ude00 b"}\n')
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(row.input_ids) for row in all_rows(source(path), tokenizer)] == ["a \ufffd b", "a 😀 b"]
