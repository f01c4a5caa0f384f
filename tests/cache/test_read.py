from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs
from toys import Bigram, ToyCaches, signal_shard, write_toy_caches

from raydistill.cache.batches import InputRow
from raydistill.cache.codecs import codec_for
from raydistill.cache.manifest import Manifest
from raydistill.cache.read import Dataset, open_manifest, without_targets
from raydistill.cache.shards import INPUT_FIELDS, field_records, write_inputs, write_signal
from raydistill.errors import CacheMismatch, DataError, SignalMismatch, VerificationFailed
from raydistill.storage import Store

FIELDS = ("ids", "logp", "log_tail", "entropy", "psi", "label_logp")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> ToyCaches:
    teachers = {"a": Bigram.random(seed=0), "b": Bigram.random(seed=1)}
    return write_toy_caches(tmp_path_factory.mktemp("caches"), teachers=teachers, temperatures=(2.0, 4.0))


@pytest.fixture
def broken(tmp_path: Path) -> ToyCaches:
    """Caches that a test may damage."""
    return write_toy_caches(tmp_path, num_rows=20)


def opened(caches: ToyCaches, *, split: str = "train", **options: object) -> Dataset:
    return Dataset(caches.inputs, caches.signals, split=split, fields=dict.fromkeys(caches.signals, FIELDS), **options)  # type: ignore[arg-type]


def change_manifest(store: Store, **changes: object) -> None:
    content = json.loads(store.read_text("manifest.json")) | changes
    store.publish("manifest.json", json.dumps(content))


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def test_padding_and_packing_of_a_handmade_batch(tmp_path: Path) -> None:
    def row(row_id: str, ids: list[int], target: list[int], segments: list[int]) -> InputRow:
        return InputRow(
            row_id, np.array(ids, np.int32), np.array(target, bool), np.array(segments, np.int32), text_bytes=len(ids)
        )

    rows = [row("x#0.0", [5, 6], [1, 0], [2]), row("x#1.0", [7, 8, 9, 3, 4], [1, 1, 0, 1, 0], [3, 2])]
    inputs = Store(tmp_path / "inputs")
    record = write_inputs(inputs, "00000.parquet", rows, split="train")
    manifest = Manifest(
        kind="inputs", content={}, fingerprint="0", fields=field_records(INPUT_FIELDS), shards=(record,)
    )
    inputs.publish("manifest.json", manifest.model_dump_json())
    dataset = Dataset(inputs, {}, split="train", fields={})
    batch = dataset.batch([1, 0], pad_to=6)
    del batch["row_key"]
    assert {name: tensor.int().tolist() for name, tensor in batch.items()} == {
        "input_ids": [[7, 8, 9, 3, 4, 0], [5, 6, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]],
        "target": [[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]],
        "labels": [[8, 9, 0, 4, 0, 0], [6, 0, 0, 0, 0, 0]],
        "valid": [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
    }
    assert dataset.num_tokens.tolist() == [2, 5]
    assert dataset.num_targets.tolist() == [1, 3]
    assert dataset.text_bytes.tolist() == [2, 5]
    assert dataset.row_ids([1, 0, 1]) == ["x#1.0", "x#0.0", "x#1.0"]
    assert dataset.batch([0])["input_ids"].tolist() == [[5, 6]]


def test_rows_and_signals_are_those_that_were_written(caches: ToyCaches) -> None:
    for split, num_shards in (("train", 7), ("held_out", 2)):
        dataset, rows = opened(caches, split=split), caches.rows[split]
        assert dataset.num_rows == len(rows)
        assert len(dataset.shard_rows) == num_shards
        assert dataset.row_ids(range(len(rows))) == [row.row_id for row in rows]
        batch = dataset.batch(range(len(rows)))
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            assert batch["input_ids"][i, :n].tolist() == row.input_ids.tolist()
            for name, bigram in caches.teachers.items():
                for field, wanted in bigram.top_k_signal(row, 8, (2.0, 4.0)).items():
                    found = batch[f"{name}/{field}"][i]
                    np.testing.assert_array_equal(found[batch["target"][i]].numpy(), wanted)
                    assert not found[~batch["target"][i]].any(), "zero outside the targets"
            np.testing.assert_array_equal(
                batch["a/label_logp"][i, :n][row.target].numpy(),
                caches.teachers["a"].label_logp(row).astype(np.float16),
            )


def test_shuffled_rows_are_the_sequential_rows(caches: ToyCaches) -> None:
    dataset = opened(caches)
    sequential = [dataset.batch([i], pad_to=12) for i in range(dataset.num_rows)]
    order = np.random.default_rng(0).permutation(dataset.num_rows)
    for start in range(0, len(order), 7):
        some = order[start : start + 7]
        wanted = {name: torch.cat([sequential[i][name] for i in some]) for name in sequential[0]}
        assert_equal(dataset.batch(some, pad_to=12), wanted)


def test_only_the_fields_asked_for_are_read(caches: ToyCaches) -> None:
    everything = opened(caches).batch([3, 30])
    dataset = Dataset(caches.inputs, caches.signals, split="train", fields={"b": ("ids", "logp"), "a": ()})
    batch = dataset.batch([3, 30])
    assert {name for name in batch if "/" in name} == {"b/ids", "b/logp"}
    assert_equal(batch, {name: everything[name] for name in batch})
    assert dataset.facts("b")["top_k"] == 8


def test_the_8_bit_codec_gives_log_probabilities_without_the_tail_being_asked_for(tmp_path: Path) -> None:
    caches = write_toy_caches(tmp_path, codec="u8")
    dataset = Dataset(caches.inputs, caches.signals, split="train", fields={"toy": ("logp",)})
    batch = dataset.batch(range(dataset.num_rows))
    for i, row in enumerate(caches.rows["train"]):
        wanted = caches.teachers["toy"].top_k_signal(row, 8, ())["logp"]
        np.testing.assert_allclose(batch["toy/logp"][i][batch["target"][i]].numpy(), wanted, atol=0.06)


@pytest.mark.parametrize("codec", ["fp16", "u8"])
def test_rows_without_a_target_have_an_empty_signal(tmp_path: Path, codec: str) -> None:
    caches = write_toy_caches(tmp_path, num_rows=4, shard_rows=4, num_held_out=0)
    rows = [
        InputRow(r.row_id, r.input_ids, r.target & (i == 2), r.segments, 0) for i, r in enumerate(caches.rows["train"])
    ]
    record = write_inputs(caches.inputs, "00000.parquet", rows, split="train")
    change_manifest(caches.inputs, shards=[record.model_dump()])
    shard = signal_shard(caches.teachers["toy"], rows, top_k=8, temperatures=(2.0,))
    record = write_signal(
        caches.signals["toy"], "00000.parquet", shard, codec_for(codec, vocab_size=64), split="train", vocab_size=64
    )
    change_manifest(caches.signals["toy"], shards=[record.model_dump()])
    dataset = opened(caches)
    silent, mixed = dataset.batch([0, 1]), dataset.batch([0, 2])
    assert not silent["toy/logp"].any()
    assert silent["toy/logp"].shape[2:] == (8,)
    found = mixed["toy/ids"][1][mixed["target"][1]].numpy()
    np.testing.assert_array_equal(found, shard.row(2)["ids"])


def test_max_rows_are_spread_over_the_split(caches: ToyCaches) -> None:
    everything, some = opened(caches), opened(caches, max_rows=7)
    kept = [i * 50 // 7 for i in range(7)]
    assert some.row_ids(range(7)) == everything.row_ids(kept)
    assert some.num_tokens.tolist() == everything.num_tokens[kept].tolist()
    assert sum(some.shard_rows) == some.num_rows == 7
    assert opened(caches, max_rows=1000).num_rows == 50


def test_an_empty_split_has_no_rows(tmp_path: Path) -> None:
    dataset = opened(write_toy_caches(tmp_path, num_rows=4, num_held_out=0), split="held_out")
    assert (dataset.num_rows, dataset.num_tokens.tolist(), dataset.shard_rows) == (0, [], [])


def test_without_targets_nothing_is_left_to_learn(caches: ToyCaches) -> None:
    batch = opened(caches).batch([10, 20, 30])
    silent = without_targets(batch)
    assert silent.keys() == batch.keys()
    for name in ("input_ids", "position_ids", "valid", "row_key"):
        assert torch.equal(silent[name], batch[name])
    assert not any(silent[name].any() for name in silent if name in ("target", "labels") or "/" in name)


def test_object_stores_are_read_through_the_local_folder(caches: ToyCaches, tmp_path: Path) -> None:
    def remote(store: Store) -> Store:
        copy = Store(store.uri)
        copy.filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
        assert not copy.is_local
        return copy

    far = Dataset(
        remote(caches.inputs),
        {name: remote(store) for name, store in caches.signals.items()},
        split="train",
        fields=dict.fromkeys(caches.signals, FIELDS),
        local_folder=tmp_path,
    )
    assert_equal(far.batch([0, 49, 25]), opened(caches).batch([0, 49, 25]))
    assert far.num_tokens.tolist() == opened(caches).num_tokens.tolist()
    assert len(list(tmp_path.glob("*.arrow"))) == 9, "three shards of the inputs and of each signal"


def test_a_local_folder_that_is_too_small_stays_small_and_reads_right(caches: ToyCaches, tmp_path: Path) -> None:
    dataset, roomy = opened(caches, local_folder=tmp_path, local_bytes=20_000), opened(caches)
    for some in np.random.default_rng(1).permutation(50).reshape(10, 5):
        assert_equal(dataset.batch(some), roomy.batch(some))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) < 30_000


def test_an_unfinished_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(CacheMismatch, match="not finished"):
        open_manifest(Store(tmp_path / "cache"))
    with pytest.raises(CacheMismatch, match="does not exist"):
        open_manifest(Store(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b'{"version": 1, "kind"', b"", b"\xff", b"[]", b'{"kind": "inputs"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged: .*Remove this file"):
        open_manifest(Store(tmp_path))


def test_a_cache_of_another_format_is_refused(broken: ToyCaches) -> None:
    change_manifest(broken.inputs, version=99)
    with pytest.raises(CacheMismatch, match="version 99"):
        opened(broken)


def test_signals_of_other_inputs_are_refused(broken: ToyCaches) -> None:
    change_manifest(broken.signals["toy"], parent="f" * 16)
    with pytest.raises(CacheMismatch, match="made from the inputs ffff"):
        opened(broken)


def test_inputs_in_the_place_of_a_signal_are_refused(broken: ToyCaches) -> None:
    with pytest.raises(CacheMismatch, match="kind 'signal'"):
        Dataset(broken.inputs, {"toy": broken.inputs}, split="train", fields={"toy": ("ids",)})


def test_a_missing_signal_or_field_is_named(broken: ToyCaches) -> None:
    with pytest.raises(CacheMismatch, match="teacher 'other'"):
        Dataset(broken.inputs, broken.signals, split="train", fields={"other": ("ids",)})
    with pytest.raises(CacheMismatch, match=r"missing: \['tail_ids'\]"):
        Dataset(broken.inputs, broken.signals, split="train", fields={"toy": ("ids", "tail_ids")})


def test_a_missing_shard_is_named(broken: ToyCaches) -> None:
    shards = json.loads(broken.signals["toy"].read_text("manifest.json"))["shards"]
    change_manifest(broken.signals["toy"], shards=shards[1:])
    with pytest.raises(CacheMismatch, match=r"differ: \['00000.parquet'\]"):
        opened(broken)


def test_a_cache_listed_as_damaged_is_not_read(broken: ToyCaches) -> None:
    broken.signals["toy"].publish("damaged.json", "[]")
    with pytest.raises(VerificationFailed, match="lists damaged shards"):
        opened(broken)


def rewrite_signal(caches: ToyCaches, rows: list[InputRow], **changes: object) -> None:
    """Replace the first signal shard by one of other rows; the manifest is told, so only the rows disagree."""
    shard = signal_shard(caches.teachers["toy"], rows, top_k=8, temperatures=(2.0,))
    record = write_signal(
        caches.signals["toy"], "00000.parquet", shard, codec_for("fp16", vocab_size=64), split="train", vocab_size=64
    )
    shards = json.loads(caches.signals["toy"].read_text("manifest.json"))["shards"]
    change_manifest(caches.signals["toy"], shards=[record.model_dump(), *shards[1:]])


def test_a_signal_of_rows_in_another_order_is_refused(broken: ToyCaches) -> None:
    rows = broken.rows["train"][:8]
    rewrite_signal(broken, [rows[1], rows[0], *rows[2:]])
    with pytest.raises(SignalMismatch, match=f"row_id of row 0 should be '{rows[0].row_id}', found '{rows[1].row_id}'"):
        opened(broken).batch([5])


def test_a_signal_of_other_tokens_is_refused(broken: ToyCaches) -> None:
    rows = broken.rows["train"][:8]
    changed = rows[3].input_ids.copy()
    changed[0] = (changed[0] + 1) % 64
    rows[3] = InputRow(rows[3].row_id, changed, rows[3].target, rows[3].segments, rows[3].text_bytes)
    rewrite_signal(broken, rows)
    with pytest.raises(SignalMismatch, match="tokens_sha of row 3"):
        opened(broken).batch([5])


def test_a_signal_of_other_targets_is_refused(broken: ToyCaches) -> None:
    rows = broken.rows["train"][:8]
    rows[6] = InputRow(rows[6].row_id, rows[6].input_ids, np.zeros_like(rows[6].target), rows[6].segments, 0)
    rewrite_signal(broken, rows)
    with pytest.raises(SignalMismatch, match="num_targets of row 6"):
        opened(broken).batch([5])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named(broken: ToyCaches, damage: str) -> None:
    path = Path(broken.signals["toy"].path("00001.parquet"))
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 4] ^= 0xFF
        path.write_bytes(data)
    dataset = opened(broken)
    dataset.batch([0])
    with pytest.raises(DataError, match=r"00001\.parquet"):
        dataset.batch([10])
