"""Shard files: what is written comes back, whatever happened to a file is noticed, and a full disk is said."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raydistill.cache import shards
from raydistill.cache.batches import InputRow
from raydistill.cache.codecs import codec_for
from raydistill.cache.shards import (
    SignalShard,
    publish_record,
    read_index,
    read_inputs,
    read_records,
    read_signal,
    tokens_sha,
    write_inputs,
    write_signal,
)
from raydistill.errors import DataError, OutOfSpace
from raydistill.storage import Store

VOCAB = 70_000


def make_rows(count: int, *, longest: int = 40, seed: int = 0) -> list[InputRow]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(2, longest))
        cut = int(rng.integers(0, length))
        segments = [cut, length - cut] if cut else [length]
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        rows.append(InputRow(f"f.txt#{i}.0", ids, rng.random(length) < 0.6, np.array(segments, np.int32), i))
    return rows


def make_signal(rows: list[InputRow], *, k: int = 4, seed: int = 0) -> SignalShard:
    rng = np.random.default_rng(seed)
    counts = np.array([row.target.sum() for row in rows], np.int32)
    n = int(counts.sum())
    return SignalShard(
        [row.row_id for row in rows],
        [tokens_sha(row.input_ids) for row in rows],
        counts,
        {
            "ids": rng.integers(0, VOCAB, (n, k)).astype(np.int32),
            "logp": -np.sort(rng.random((n, k)) * 9, axis=1).astype(np.float16),
            "log_tail": -rng.random(n).astype(np.float16),
        },
    )


def write(store: Store, shard: SignalShard, name: str = "00000.parquet") -> None:
    record = write_signal(store, name, shard, codec_for("fp16", vocab_size=VOCAB), split="train", vocab_size=VOCAB)
    publish_record(store, record)


def test_input_rows_come_back(tmp_path: Path) -> None:
    rows = make_rows(30)
    record = write_inputs(Store(tmp_path), "00000.parquet", rows, split="held_out")
    assert (record.rows, record.tokens, record.split) == (30, sum(len(r.input_ids) for r in rows), "held_out")
    for found, wanted in zip(read_inputs(Store(tmp_path), "00000.parquet"), rows, strict=True):
        assert (found.row_id, found.text_bytes) == (wanted.row_id, wanted.text_bytes)
        for name in ("input_ids", "target", "segments"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).dtype == getattr(wanted, name).dtype


def test_signal_rows_come_back_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "GROUP_POSITIONS", 50)
    rows = make_rows(40)
    rows[3] = InputRow("without", np.arange(5, dtype=np.int32), np.zeros(5, bool), np.array([5], np.int32), 0)
    shard = make_signal(rows)
    write(Store(tmp_path), shard)
    whole = read_signal(Store(tmp_path), "00000.parquet")
    for i in range(40):
        for name, values in shard.row(i).items():
            np.testing.assert_array_equal(whole.row(i)[name], values)
    groups = read_index(Store(tmp_path), "00000.parquet").group_rows
    assert sum(groups) == 40
    assert len(groups) > 5
    part = read_signal(Store(tmp_path), "00000.parquet", groups=[2, 4], fields=["logp"])
    first = sum(groups[:2])
    assert part.row_ids[: groups[2]] == shard.row_ids[first : first + groups[2]]
    assert set(part.fields) == {"logp", "log_tail"}
    np.testing.assert_array_equal(part.row(0)["logp"], shard.row(first)["logp"])


def test_a_shard_without_rows_or_targets_is_readable(tmp_path: Path) -> None:
    write(Store(tmp_path), make_signal([]), "00000.parquet")
    rows = [InputRow("a", np.arange(3, dtype=np.int32), np.zeros(3, bool), np.array([3], np.int32), 0)]
    write(Store(tmp_path), make_signal(rows), "00001.parquet")
    for name in ("00000.parquet", "00001.parquet"):
        assert read_signal(Store(tmp_path), name).fields["logp"].shape == (0, 4)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(Store(tmp_path / folder), make_signal(make_rows(20)))
        write_inputs(Store(tmp_path / folder), "inputs.parquet", make_rows(20), split="train")
    for name in ("00000.parquet", "inputs.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write(Store(tmp_path), make_signal(make_rows(20)))
    file = tmp_path / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"00000\.parquet.*verify"):
        read_signal(Store(tmp_path), "00000.parquet")


def test_a_flipped_byte_in_any_page_is_noticed(tmp_path: Path) -> None:
    write(Store(tmp_path), make_signal(make_rows(60)))
    file = tmp_path / "00000.parquet"
    whole = file.read_bytes()
    pages = shards.pq.ParquetFile(file).metadata.row_group(0)
    for column in range(pages.num_columns):
        chunk = pages.column(column)
        middle = chunk.data_page_offset + chunk.total_compressed_size // 2
        damaged = bytearray(whole)
        damaged[middle] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="00000"):
            read_signal(Store(tmp_path), "00000.parquet")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"00007\.parquet"):
        read_signal(Store(tmp_path), "00007.parquet")


def test_records_are_what_was_published(tmp_path: Path) -> None:
    write(Store(tmp_path), make_signal(make_rows(5)))
    record = read_records(Store(tmp_path))["00000.parquet"]
    assert record.bytes == (tmp_path / "00000.parquet").stat().st_size
    assert record.sha256 == Store(tmp_path).sha256("00000.parquet")
    assert read_records(Store(tmp_path / "nothing")) == {}


def test_a_truncated_record_is_named(tmp_path: Path) -> None:
    write(Store(tmp_path), make_signal(make_rows(5)))
    write(Store(tmp_path), make_signal(make_rows(5)), "00001.parquet")
    file = tmp_path / "records/00001.parquet.json"
    for content in (file.read_bytes()[:-9], b"", b"\xff\xfe", b"[1]", b'{"name": "00001.parquet"}'):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"00001\.parquet\.json is damaged: .*Remove this file"):
            read_records(Store(tmp_path))
        broken: dict[str, str] = {}
        assert list(read_records(Store(tmp_path), broken=broken)) == ["00000.parquet"]
        assert list(broken) == ["00001.parquet"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_leaves_earlier_shards_alone(small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    write(store, make_signal(make_rows(20)))
    before = store.sha256("00000.parquet")
    with pytest.raises(OutOfSpace, match="disk is full"):
        write(store, make_signal(make_rows(3000), k=64), "00001.parquet")
    assert store.sha256("00000.parquet") == before
    assert store.names() == ["00000.parquet"]
    assert list(read_records(store)) == ["00000.parquet"]
    assert not list((small_disk / "cache").glob(".tmp-*"))
