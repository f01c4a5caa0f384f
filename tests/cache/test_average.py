"""The average of several teachers' signals: exact, and only of signals that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_cache import InProcess, cache_bytes
from dense_toys import BuiltImages, build_images, image_config

from raydistill.cache.average import averaged
from raydistill.cache.build import build_average
from raydistill.cache.dense import DenseShard, read_dense, write_dense
from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.manifest import Manifest
from raydistill.errors import CacheMismatch, SignalMismatch
from raydistill.storage import Store

TEACHERS: tuple[dict[str, Any], ...] = (
    {"weight": 1.0, "guidance_scale": 1.5},
    {"weight": 3.0, "guidance_scale": 0.5},
    {"weight": 0.0, "guidance_scale": 9.0},
)


@pytest.fixture
def built(in_process: InProcess, tmp_path: Path) -> BuiltImages:
    return build_images(image_config(tmp_path, teachers=TEACHERS))


def average(built: BuiltImages) -> tuple[Store, Manifest]:
    return build_average(built.config, built.inputs_manifest, built.signals, Store(built.config.cache.dir))


def test_the_mean_has_the_gradient_of_the_weighted_loss_and_variance_is_its_floor(built: BuiltImages) -> None:
    store, _ = average(built)
    dataset = DenseDataset(
        built.inputs,
        {"average": store, **{name: signal for name, (signal, _) in built.signals.items()}},
        built.config.images.noise,
        split="train",
        fields={"average": ("prediction", "variance"), "t0": ("prediction",), "t1": ("prediction",)},
    )
    batch = dataset.batch(range(6))
    guess = torch.randn(batch["latents"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    guess.requires_grad_()

    def mse(teacher: str) -> torch.Tensor:
        return (guess - batch[f"{teacher}/prediction"].double()).square().flatten(1).mean(1)

    each = 0.25 * mse("t0") + 0.75 * mse("t1")
    (wanted,) = torch.autograd.grad(each.sum(), guess)
    (found,) = torch.autograd.grad(mse("average").sum(), guess)
    size = float(wanted.norm())
    assert float((wanted - found).norm()) < 1e-3 * size, "fp16 rounding of the mean"
    assert torch.allclose(each, mse("average") + batch["average/variance"].double(), rtol=1e-3)
    assert (batch["average/variance"] > 0.01).all()


def test_in_fp32_the_gradient_is_that_of_the_weighted_loss_to_1e_6(in_process: InProcess, tmp_path: Path) -> None:
    exact = tuple({**teacher, "store_dtype": "float32"} for teacher in TEACHERS)
    built = build_images(image_config(tmp_path, teachers=exact))
    store, manifest = average(built)
    assert manifest.fields["prediction"].dtype == "float32"
    name = manifest.shards[0].name
    mean = read_dense(store, name).tensor("prediction").double()
    parts = [read_dense(built.signals[t][0], name).tensor("prediction").double() for t in ("t0", "t1")]
    wanted = 0.25 * parts[0] + 0.75 * parts[1]
    assert float((mean - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())
    variance = 0.25 * (parts[0] - wanted).square() + 0.75 * (parts[1] - wanted).square()
    found = read_dense(store, name).tensor("variance").double()
    assert torch.allclose(found, variance.flatten(2).mean(2), rtol=1e-5)


def test_weights_are_normalised_and_a_part_of_the_identity(built: BuiltImages, tmp_path: Path) -> None:
    store, manifest = average(built)
    first, second, third = (manifest for _, manifest in built.signals.values())
    assert manifest.facts["weights"] == {first.fingerprint: 0.25, second.fingerprint: 0.75}
    assert third.fingerprint not in str(manifest.content)

    def weighing(*weights: float) -> str:
        teachers = tuple({**t, "weight": w} for t, w in zip(TEACHERS, weights, strict=True))
        config = image_config(tmp_path, teachers=teachers)
        return average(BuiltImages(config, built.inputs, built.inputs_manifest, built.signals))[0].uri

    assert weighing(2.0, 6.0, 0.0) == store.uri
    assert weighing(2.0, 5.0, 0.0) != store.uri


def test_the_order_of_teachers_does_not_change_a_byte(built: BuiltImages, tmp_path: Path) -> None:
    store, _ = average(built)
    before = cache_bytes(store)
    store.delete_folder("")
    turned = image_config(tmp_path, teachers=tuple({**t, "name": f"t{i}"} for i, t in enumerate(TEACHERS))[::-1])
    assert [t.name for t in turned.teachers] == ["t2", "t1", "t0"]
    again, _ = average(BuiltImages(turned, built.inputs, built.inputs_manifest, built.signals))
    assert cache_bytes(again) == before


def test_a_half_built_average_is_completed(built: BuiltImages, in_process: InProcess) -> None:
    store, _ = average(built)
    before = cache_bytes(store)
    for name in ("manifest.json", "00002.safetensors"):
        store.delete(name)
    in_process.items.clear()
    average(built)
    assert in_process.items == ["00002.safetensors"]
    assert cache_bytes(store) == before


def test_teachers_that_disagree_on_noise_are_refused_with_row_and_draw(tmp_path: Path) -> None:
    def shard(name: str, **changes: torch.Tensor) -> DenseShard:
        tensors = {
            "prediction": torch.ones(2, 2, 1, 2, 2), "timestep": torch.zeros(2, 2, dtype=torch.int32),
            "noise_sha": torch.zeros(2, 2, dtype=torch.int64),
        } | changes  # fmt: skip
        write_dense(Store(tmp_path), name, tensors, meta={"row_ids": ["a", "b"]}, split="train", rows=2)
        return read_dense(Store(tmp_path), name)

    one = shard("one")
    averaged([(one, 0.5), (shard("same"), 0.5)])
    with pytest.raises(SignalMismatch, match=r"disagree on the noise of row b, draw 0: .*one and .*two"):
        averaged([(one, 0.5), (shard("two", noise_sha=torch.tensor([[0, 0], [1, 0]])), 0.5)])
    with pytest.raises(SignalMismatch, match=r"disagree on the timestep of row a, draw 1"):
        averaged([(one, 0.5), (shard("three", timestep=torch.tensor([[0, 7], [0, 0]], dtype=torch.int32)), 0.5)])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prediction_type", "flow", "prediction_type; that of t0|prediction_type; that of t1"),
        ("noise", {"seed": 1}, "noise; that of"),
        (
            "process",
            {"kind": "variance_preserving", "prediction_type": "epsilon", "schedule": {
                "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}},
            "noise schedule; that of .*from timestep",
        ),
    ],
)  # fmt: skip
def test_teachers_of_different_kinds_are_refused(built: BuiltImages, key: str, value: object, words: str) -> None:
    store, manifest = built.signals["t1"]
    other = manifest.model_copy(update={"facts": {**manifest.facts, key: value}})
    changed = BuiltImages(built.config, built.inputs, built.inputs_manifest, {**built.signals, "t1": (store, other)})
    with pytest.raises(CacheMismatch, match=words):
        average(changed)
