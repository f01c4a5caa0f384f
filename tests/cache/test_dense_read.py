"""Inputs of images and their signals, joined: the same batch as the teacher saw, and refused when anything differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest_cache import InProcess
from dense_toys import BUCKETS, ToyDenoiser, image_config, replace_shard, toy_denoiser, write_image_inputs
from pyarrow import fs

from raydistill.cache.build import build_signal
from raydistill.cache.dense import read_dense
from raydistill.cache.dense_batch import cut_draws, denoiser_batch, draws_of
from raydistill.cache.dense_capture import capture_draws
from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.ledger import write_damaged
from raydistill.cache.loader import Loader
from raydistill.cache.open import open_dataset
from raydistill.cache.order import Order, Sampler
from raydistill.cache.shards import read_records
from raydistill.config.schema import RunConfig
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import caption_dropped, noise_of, timestep_of
from raydistill.errors import CacheMismatch, SignalMismatch, VerificationFailed
from raydistill.signals import JsonValue
from raydistill.storage import Store

ALL = {"t0": ("prediction", "tap.mean")}
Opened = Callable[..., DenseDataset]


@pytest.fixture
def run(in_process: InProcess, tmp_path: Path) -> tuple[RunConfig, Store, Store]:
    """Finished caches of one toy teacher: configuration, inputs, signal."""
    return built(tmp_path)


def built(home: Path, **sections: object) -> tuple[RunConfig, Store, Store]:
    config = image_config(home, **sections)
    caches = Store(config.cache.dir)
    inputs, manifest = write_image_inputs(Path(caches.root))
    signal, _ = build_signal(config, config.teachers[0], inputs, manifest, caches, factory=toy_denoiser)
    return config, inputs, signal


def opened(run: tuple[RunConfig, Store, Store], **options: object) -> DenseDataset:
    config, inputs, signal = run
    options = {"split": "train", "fields": ALL, **options}
    return DenseDataset(inputs, {"t0": signal}, config.images.noise, **options)  # type: ignore[arg-type]


def test_the_batch_is_what_the_teacher_was_asked_bit_by_bit(run: tuple[RunConfig, Store, Store]) -> None:
    config, inputs, _ = run
    teacher, dataset = ToyDenoiser(), opened(run)
    sample = 0
    for record in dataset.inputs_manifest.split_shards("train"):
        shard = read_dense(inputs, record.name)
        capture_draws(teacher, shard, config.images.noise, batch_rows=4, dtype=torch.float16, where="here")
        for part in cut_draws(draws_of(shard, 2), 4):
            batch = dataset.batch(range(sample, sample + len(part)))
            asked = teacher.batches.pop(0)
            assert all(torch.equal(batch[name], asked[name]) for name in asked)
            assert set(batch) - set(asked) == {"weight", "t0/prediction", "t0/tap.mean"}
            sample += len(part)
    assert sample == dataset.num_rows == 2 * 7 * 2


def test_the_cached_prediction_is_the_online_one(run: tuple[RunConfig, Store, Store]) -> None:
    dataset = opened(run)
    batch = dataset.batch([3, 0, 27 - 14])
    said = ToyDenoiser()(batch)
    for name in ("prediction", "tap.mean"):
        assert torch.equal(batch[f"t0/{name}"], said[name].half())
    assert batch["weight"].tolist() == [1, 1, 1]


def test_noise_timesteps_and_captions_are_those_of_the_row_id(in_process: InProcess, tmp_path: Path) -> None:
    run = built(tmp_path, source={
        "kind": "images", "paths": [str(tmp_path)], "vae": "none", "buckets": [[4, 4], [4, 8]],
        "noise": {"draws_per_row": 3, "seed": 8, "caption_dropout": 0.5, "timesteps": [100, 700]},
    })  # fmt: skip
    dataset, noise = opened(run), run[0].images.noise
    dropped = 0
    for index in range(dataset.num_rows):
        (name,), batch = dataset.row_ids([index]), dataset.batch([index])
        row_id, draw = name.rsplit("@", 1)
        assert index % 3 == int(draw)
        assert torch.equal(batch["noise"][0], noise_of(row_id, int(draw), batch["latents"].shape[1:], 8))
        assert batch["timestep"].item() == timestep_of(row_id, int(draw), noise)
        assert 100 + 200 * int(draw) <= batch["timestep"].item() < 300 + 200 * int(draw)
        drop = caption_dropped(row_id, int(draw), noise)
        for given, empty in (("prompt_embeds", "empty_embeds"), ("pooled", "empty_pooled")):
            assert torch.equal(batch[given], batch[empty]) is drop
        dropped += drop
    assert 0 < dropped < dataset.num_rows


def test_without_fields_the_samples_are_the_same_but_for_their_noise(run: tuple[RunConfig, Store, Store]) -> None:
    config, inputs, _ = run
    plain = open_dataset(config, inputs, {}, split="train", fields={})
    taught = opened(run)
    assert plain.row_ids(range(plain.num_rows)) == taught.row_ids(range(taught.num_rows))
    assert plain.shard_rows == taught.shard_rows
    batch = plain.batch([5, 4])
    assert {*batch} == {
        "latents", "time_ids", "prompt_embeds", "pooled", "empty_embeds", "empty_pooled", "weight"
    }  # fmt: skip
    assert torch.equal(batch["latents"], taught.batch([5, 4])["latents"])


def test_inputs_without_text_give_no_text(in_process: InProcess, tmp_path: Path) -> None:
    config = image_config(tmp_path)
    inputs, manifest = write_image_inputs(tmp_path / "cache", text=False)
    signal, _ = build_signal(
        config, config.teachers[0], inputs, manifest, Store(config.cache.dir), factory=toy_denoiser
    )
    batch = opened((config, inputs, signal)).batch([0, 1])
    assert {*batch} == {"latents", "noise", "timestep", "time_ids", "weight", "t0/prediction", "t0/tap.mean"}


@pytest.mark.parametrize("max_rows", [None, 5])
def test_batches_are_of_one_bucket_and_every_sample_comes_once(
    run: tuple[RunConfig, Store, Store], max_rows: int | None
) -> None:
    dataset = opened(run, max_rows=max_rows)
    assert dataset.num_rows == (28 if max_rows is None else 10)
    order = Order(dataset.shard_rows, seed=1, window=3, bucket=dataset.buckets)
    sampler = Sampler(order, 4)
    loaders = [
        Loader(dataset, sampler, rank=r, world_size=2, micro_size=2, first_step=0, end_step=sampler.steps_per_epoch)
        for r in range(2)
    ]
    seen: list[str] = []
    weights = 0.0
    for steps in zip(*loaders, strict=True):
        assert steps[0].num_real + steps[1].num_real == -(-steps[0].num_rows // 2)
        for batches in steps:
            shapes = {tuple(batch["latents"].shape[2:]) for batch in batches.micro_batches}
            assert len(shapes) == 1
            assert shapes < set(BUCKETS)
            weights += sum(float(batch["weight"].sum()) for batch in batches.micro_batches)
            seen += batches.row_ids
    assert sorted(seen) == sorted(dataset.row_ids(range(dataset.num_rows)))
    assert weights == dataset.num_rows, "filler micro-batches count for nothing"


def test_max_rows_keeps_images_with_all_their_draws(run: tuple[RunConfig, Store, Store]) -> None:
    few, every = opened(run, max_rows=3), opened(run)
    kept = few.row_ids(range(few.num_rows))
    assert len(kept) == 6
    assert [name.rsplit("@")[1] for name in kept] == ["0", "1"] * 3
    for index, name in enumerate(kept):
        same = every.row_ids(range(every.num_rows)).index(name)
        assert torch.equal(few.batch([index])["latents"], every.batch([same])["latents"])


def test_object_stores_are_read_through_the_local_folder(run: tuple[RunConfig, Store, Store], tmp_path: Path) -> None:
    config, inputs, signal = run
    for store in (inputs, signal):
        store.filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    far = opened(run, local_folder=tmp_path / "local")
    assert far.buckets.tolist() == opened((config, Store(inputs.uri), Store(signal.uri))).buckets.tolist()
    batch = far.batch([0, 1])
    assert all(torch.equal(v, opened(run).batch([0, 1])[k]) for k, v in batch.items())
    assert len(list((tmp_path / "local").glob("*.safetensors"))) == 2


def test_a_prediction_of_other_noise_is_refused_with_row_and_draw(run: tuple[RunConfig, Store, Store]) -> None:
    def other(tensors: dict[str, torch.Tensor], meta: dict[str, JsonValue]) -> None:
        tensors["noise_sha"][1, 0] ^= 1

    replace_shard(run[2], "00000.safetensors", other)
    dataset = opened(run)
    dataset.batch([0, 1, 3])
    with pytest.raises(SignalMismatch, match=r"row train/4x4/001.png, draw 0: wanted noise of the hash"):
        dataset.batch([2])


def test_a_prediction_of_another_timestep_is_refused(run: tuple[RunConfig, Store, Store]) -> None:
    def other(tensors: dict[str, torch.Tensor], meta: dict[str, JsonValue]) -> None:
        tensors["timestep"][0, 1] += 1

    replace_shard(run[2], "00000.safetensors", other)
    with pytest.raises(SignalMismatch, match=r"row train/4x4/000.png, draw 1: wanted timestep \d+, found"):
        opened(run).batch([1])


@pytest.mark.parametrize("key", ["row_ids", "row_sha"])
def test_a_signal_of_other_rows_or_content_is_refused(run: tuple[RunConfig, Store, Store], key: str) -> None:
    def other(tensors: dict[str, torch.Tensor], meta: dict[str, JsonValue]) -> None:
        values = list(meta[key])  # type: ignore[arg-type]
        meta[key] = [values[0], "other", *values[2:]]

    replace_shard(run[2], "00000.safetensors", other)
    with pytest.raises(SignalMismatch, match=f"{key} of row 1 should be .*, found other"):
        opened(run).batch([0])


def test_another_seed_is_refused_with_the_keys_that_differ(run: tuple[RunConfig, Store, Store]) -> None:
    config, inputs, signal = run
    wanted = NoiseConfig(draws_per_row=2, seed=6, timesteps=(0, 500))
    with pytest.raises(
        CacheMismatch, match=r"(?s)timesteps: wanted .0, 500., found .0, 1000..*seed: wanted 6, found 5"
    ):
        DenseDataset(inputs, {"t0": signal}, wanted, split="train", fields=ALL)
    assert config.images.noise.seed == 5


def test_a_signal_of_other_inputs_is_refused(run: tuple[RunConfig, Store, Store], tmp_path: Path) -> None:
    config, _, signal = run
    other, _ = write_image_inputs(tmp_path / "cache", seed=1)
    with pytest.raises(CacheMismatch, match=r"was made from the inputs .* differ: seed \(wanted 1, found 0\)"):
        opened((config, other, signal))


def test_an_absent_field_and_a_damaged_cache_are_refused(run: tuple[RunConfig, Store, Store]) -> None:
    with pytest.raises(CacheMismatch, match=r"missing: \['tap.up'\]"):
        opened(run, fields={"t0": ("prediction", "tap.up")})
    write_damaged(run[2], {"00000.safetensors": "a hole"})
    with pytest.raises(VerificationFailed, match="lists damaged shards"):
        opened(run)


def test_bfloat16_is_read_as_the_numbers_it_holds() -> None:
    from raydistill.cache.dense_batch import as_floats, stacked

    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert np.array_equal(as_floats(values), values.float().numpy())
    assert torch.equal(stacked([values[:10], values[10:20]]), values[:20].reshape(2, 10))
    assert torch.equal(stacked([values[3], values[4]]), values[3:5])


def test_the_records_of_a_signal_count_rows_and_no_tokens(run: tuple[RunConfig, Store, Store]) -> None:
    records = read_records(run[2])
    assert sum(record.rows for record in records.values()) == 2 * (7 + 2)
    assert {record.tokens for record in records.values()} == {0}


def test_one_row_may_stand_in_a_batch_twice(run: tuple[RunConfig, Store, Store]) -> None:
    shard = read_dense(run[1], "00000.safetensors")
    once, draws = denoiser_batch(draws_of(shard, 1)[:1], run[0].images.noise), draws_of(shard, 1)[:1] * 2
    twice = denoiser_batch(draws, run[0].images.noise)
    assert all(torch.equal(twice[name], once[name].expand_as(twice[name])) for name in once)
