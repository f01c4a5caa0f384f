"""Dense shards: the same bytes for the same tensors, read in place, and named when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyarrow import fs

from raydistill.cache.dense import DenseShard, dense_name, read_dense, read_description, signed, write_dense
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.storage import Store

META: dict[str, JsonValue] = {"row_ids": ["a", "b", "ç"], "split": "train", "bucket": [8, 16]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 4, 2, 2, generator=generator).half(),
        "brain": torch.randn(3, 5, generator=generator).bfloat16(),
        "index": torch.arange(3, dtype=torch.int32),
        "hash": torch.tensor([-1, 2**63 - 1, 0]),
        "nothing": torch.zeros(0, 7),
    }


def test_the_order_of_tensors_and_keys_does_not_change_a_byte(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = write_dense(store, "0.safetensors", tensors(), meta=META, split="train", rows=3)
    other = dict(reversed(tensors().items()))
    two = write_dense(store, "1.safetensors", other, meta=dict(reversed(META.items())), split="train", rows=3)
    assert one.sha256 == two.sha256
    assert (one.rows, one.tokens, one.bytes) == (3, 0, (tmp_path / "0.safetensors").stat().st_size)


def test_what_was_written_is_read_bit_by_bit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_dense(store, dense_name(12), tensors(), meta=META, split="train", rows=3)
    shard = read_dense(store, "00012.safetensors")
    assert shard.meta == META
    assert (shard.row_ids, shard.rows) == (["a", "b", "ç"], 3)
    for name, tensor in tensors().items():
        assert shard.tensor(name).dtype == tensor.dtype
        assert torch.equal(shard.tensor(name).view(torch.uint8), tensor.view(torch.uint8))
    assert set(shard.tensors()) == set(tensors())


def test_the_description_is_read_without_the_tensors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_dense(store, "s", tensors(), meta=META, split="train", rows=3)
    with (tmp_path / "s").open("r+b") as file:
        file.truncate(2000)
    assert read_description(store, "s") == META


def test_a_fetched_file_is_a_second_name_or_a_copy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_dense(store, "s", tensors(), meta=META, split="train", rows=3)
    store.fetch("s", tmp_path / "link")
    assert (tmp_path / "link").samefile(tmp_path / "s")
    far = Store(tmp_path)
    far.filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    far.fetch("s", tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(tmp_path / "s")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "s").read_bytes()


def test_slices_and_transposes_are_written_as_their_values(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    write_dense(Store(tmp_path), "s", {"part": whole.T[1:3]}, meta=META, split="train", rows=2)
    assert torch.equal(read_dense(Store(tmp_path), "s").tensor("part"), whole.T[1:3])


def test_tensors_are_mapped_and_outlive_the_files_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_dense(store, "s", tensors(), meta=META, split="train", rows=3)
    shard = read_dense(store, "s")
    values = shard.tensor("half")
    start, stop = next(
        (int(begin, 16), int(end, 16))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(f"{tmp_path}/s")
        for begin, end in [line.split()[0].split("-")]
    )
    assert start <= values.data_ptr() < stop
    store.delete("s")
    assert torch.equal(values, tensors()["half"])
    assert torch.equal(shard.tensor("brain"), tensors()["brain"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "short", "text", "no description"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    write_dense(store, "s", tensors(), meta=META, split="train", rows=3)
    path = tmp_path / "s"
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "short":
            path.write_bytes(path.read_bytes()[:5])
        case "text":
            path.write_bytes(b"not at all a shard")
        case "no description":
            from safetensors.torch import save_file

            save_file(tensors(), path)
    with pytest.raises(DataError, match=r"cannot read the shard .*/s: .*--stages verify"):
        read_dense(store, "s")
    if damage != "truncated":
        with pytest.raises(DataError, match=r"cannot read the shard .*/s: .*--stages verify"):
            read_description(store, "s")


def test_shards_of_an_object_store_are_fetched(tmp_path: Path) -> None:
    far = Store(tmp_path)
    far.filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    write_dense(far, "s", tensors(), meta=META, split="train", rows=3)
    assert torch.equal(read_dense(far, "s").tensor("half"), tensors()["half"])
    with pytest.raises(DataError, match=r"cannot read the shard .*/none"):
        read_dense(far, "none")


def test_an_absent_tensor_or_list_is_named(tmp_path: Path) -> None:
    write_dense(Store(tmp_path), "s", tensors(), meta=META, split="train", rows=3)
    shard = DenseShard(tmp_path / "s")
    with pytest.raises(DataError, match=r"wanted the tensor 'pooled', found \['brain'"):
        shard.tensor("pooled")
    with pytest.raises(DataError, match="has no list 'captions'"):
        shard.texts("captions")


def test_eight_bytes_of_a_hash_survive_as_a_signed_number() -> None:
    for digest in (bytes(8), b"\xff" * 8, bytes(range(8)), b"\x80" + bytes(7)):
        assert signed(digest).to_bytes(8, "little", signed=True) == digest
