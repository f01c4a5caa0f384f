"""Signals of denoisers are built whole, the same however they are built, and what they hold is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest_cache import InProcess, Killed, cache_bytes
from dense_toys import (
    SCHEDULE,
    BuiltImages,
    ToyDenoiser,
    build_images,
    image_config,
    model_folder,
    toy_denoiser,
    write_image_inputs,
)
from diffusers import UNet2DModel
from PIL import Image

from raydistill.cache import dense_capture
from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.content import signal_content
from raydistill.cache.dense import dense_name, read_dense, row_sha, write_dense
from raydistill.cache.dense_batch import denoiser_batch, draws_of
from raydistill.cache.dense_capture import OWN_FIELDS, capture_draws, signal_meta
from raydistill.cache.ledger import write_damaged
from raydistill.cache.manifest import Manifest, fingerprint_of
from raydistill.cache.open import open_dataset
from raydistill.cache.verify import verify
from raydistill.config.schema import RunConfig
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError, DataError, VerificationFailed
from raydistill.signals import Batch
from raydistill.storage import Store


def rebuilt(built: BuiltImages, factory: object = toy_denoiser) -> tuple[Store, Manifest]:
    config = built.config
    return build_signal(
        config,
        config.teachers[0],
        built.inputs,
        built.inputs_manifest,
        Store(config.cache.dir),
        factory=factory,  # type: ignore[arg-type]
    )


def test_the_manifest_says_what_readers_must_know(in_process: InProcess, tmp_path: Path) -> None:
    built = build_images(image_config(tmp_path))
    store, manifest = built.signals["t0"]
    assert (manifest.kind, manifest.parent) == ("signal", built.inputs_manifest.fingerprint)
    assert [(r.name, r.rows) for r in manifest.shards] == [(r.name, r.rows) for r in built.inputs_manifest.shards]
    assert manifest.facts["noise"] == built.config.images.noise.model_dump(mode="json")
    assert {"prediction_type", "own_prediction_type", "process", "taps", "device", "versions"} <= {*manifest.facts}
    described = {n: (f.dtype, f.dims) for n, f in manifest.fields.items()}
    assert described == {
        "prediction": ("float16", ("draw", "channel", "height", "width")),
        "tap.mean": ("float16", ("draw", "channel")),
        "timestep": ("int32", ("draw",)),
        "noise_sha": ("int64", ("draw",)),
    }
    for record in manifest.shards:
        shard = read_dense(store, record.name)
        assert {n: str(t.dtype).removeprefix("torch.") for n, t in shard.tensors().items()} == {
            n: dtype for n, (dtype, _) in described.items()
        }
    assert not (Path(store.root) / "content.json").exists()


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_an_interrupted_build_ends_in_the_same_bytes(in_process: InProcess, tmp_path: Path, stop_after: int) -> None:
    whole = build_images(image_config(tmp_path, "whole"))
    in_process.items.clear()
    in_process.stop_after = stop_after
    in_process.order = lambda names: list(reversed(list(names)))
    config = image_config(tmp_path, "torn")
    with pytest.raises(Killed):
        build_images(config)
    in_process.stop_after = None
    done = set(in_process.items)
    torn = build_images(config)
    assert len(in_process.items) == len(set(in_process.items)), "no shard is computed twice"
    assert len(done) == stop_after
    assert cache_bytes(torn.signal) == cache_bytes(whole.signal)


def test_the_bytes_do_not_depend_on_what_is_already_there(in_process: InProcess, tmp_path: Path) -> None:
    built = build_images(image_config(tmp_path))
    before = cache_bytes(built.signal)
    for name in ("00001.safetensors", "00004.safetensors"):
        built.signal.delete(name)
    write_damaged(built.signal, {"00001.safetensors": "gone", "00004.safetensors": "gone"})
    in_process.items.clear()
    rebuilt(built)
    assert in_process.items == ["00001.safetensors", "00004.safetensors"]
    assert cache_bytes(built.signal) == before


def test_a_shard_rebuilt_otherwise_is_audited(in_process: InProcess, tmp_path: Path) -> None:
    built = build_images(image_config(tmp_path))
    name = "00001.safetensors"
    write_damaged(built.signal, {name: "a hole"})
    with pytest.raises(VerificationFailed, match=r"rebuilt with another hash, and the audit fails"):
        rebuilt(built, lambda *_: Fickle())
    write_damaged(built.signal, {name: "a hole"})
    store, manifest = rebuilt(built, lambda *_: ToyDenoiser(1.001))
    assert next(r for r in manifest.shards if r.name == name) != next(
        r for r in built.signals["t0"][1].shards if r.name == name
    )
    assert '"changed": {\n   "00001' in store.read_text("build.json")


class Fickle(ToyDenoiser):
    """Says something else every time."""

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.gain += 1
        return super().__call__(batch)


def test_the_identity_holds_the_noise_and_not_the_name_or_weight(in_process: InProcess, tmp_path: Path) -> None:
    _, inputs = write_image_inputs(tmp_path / "cache")

    def identity(teacher: dict[str, object] | None = None, **noise: object) -> str:
        source = {"noise": {"draws_per_row": 2, "seed": 5, **noise}}
        config = image_config(tmp_path, teachers=(teacher or {},), source=source)
        return fingerprint_of(signal_content(config, config.teachers[0], inputs))

    same = identity()
    assert identity({"name": "other", "weight": 3.0}) == same
    others = [
        identity(seed=6), identity(draws_per_row=1), identity(timesteps=[0, 500]), identity(caption_dropout=0.1),
        identity(prediction_type="flow"), identity({"guidance_scale": 2.0}), identity({"batch_rows": 3}),
        identity({"store_dtype": "bfloat16"}), identity({"taps": {"mid": "mid_block"}}),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)


def test_batches_never_cross_a_shard_and_cut_rows_where_they_must(in_process: InProcess, tmp_path: Path) -> None:
    store, _ = write_image_inputs(tmp_path)
    teacher = ToyDenoiser()
    capture_draws(
        teacher, read_dense(store, dense_name(0)), NoiseConfig(draws_per_row=3), batch_rows=4,
        dtype=torch.float32, where="here",
    )  # fmt: skip
    assert [len(batch["latents"]) for batch in teacher.batches] == [4, 4, 1]
    latents = torch.cat([batch["latents"] for batch in teacher.batches])
    assert torch.equal(latents, read_dense(store, dense_name(0)).tensor("latents").float().repeat_interleave(3, 0))


def test_a_batch_that_does_not_fit_into_memory_says_what_to_lower(tmp_path: Path) -> None:
    class Huge(ToyDenoiser):
        def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    store, _ = write_image_inputs(tmp_path)
    with pytest.raises(
        ConfigError, match=r"teacher x: .*batch of 4 latents of \(2, 4, 4\) .*Lower teachers.*batch_rows"
    ):
        capture_draws(
            Huge(), read_dense(store, dense_name(0)), NoiseConfig(draws_per_row=2), batch_rows=4,
            dtype=torch.float16, where="teacher x",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "error", "words"),
    [
        (1e6, ConfigError, r"row train/4x4/00\d.png, draw 0 has a value of .*store_dtype: bfloat16 or float32"),
        (float("nan"), DataError, r"prediction of row train/4x4/000.png, draw 0 is not finite"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named(
    tmp_path: Path, gain: float, error: type[Exception], words: str
) -> None:
    store, _ = write_image_inputs(tmp_path)
    shard = read_dense(store, dense_name(0))
    with pytest.raises(error, match=words):
        capture_draws(ToyDenoiser(gain), shard, NoiseConfig(), batch_rows=4, dtype=torch.float16, where="here")
    if gain == 1e6:
        capture_draws(ToyDenoiser(gain), shard, NoiseConfig(), batch_rows=4, dtype=torch.bfloat16, where="here")


def test_the_first_batch_is_there_before_the_teacher_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()

    def noticed(*arguments: object) -> dict[str, torch.Tensor]:
        batch = denoiser_batch(*arguments)  # type: ignore[arg-type]
        made.set()
        return batch

    @contextmanager
    def busy() -> Iterator[None]:
        assert made.wait(10), "nothing was made while another shard had its turn"
        yield

    monkeypatch.setattr(dense_capture, "denoiser_batch", noticed)
    store, _ = write_image_inputs(tmp_path)
    shard = read_dense(store, dense_name(0))
    capture_draws(
        ToyDenoiser(), shard, NoiseConfig(), batch_rows=4, dtype=torch.float16, where="here", turn=busy()
    )  # fmt: skip


def test_progress_counts_samples(tmp_path: Path) -> None:
    store, _ = write_image_inputs(tmp_path)
    steps: list[int] = []
    shard = read_dense(store, dense_name(0))
    capture_draws(
        ToyDenoiser(), shard, NoiseConfig(draws_per_row=3), batch_rows=4, dtype=torch.float16, where="here",
        progress=steps.append,
    )  # fmt: skip
    assert sum(steps) == len(draws_of(shard, 3)) == 9


def test_a_draw_of_1024_pixels_takes_at_most_132_kb_and_its_prompt_is_stored_once(tmp_path: Path) -> None:
    rows, draws, store = 8, 2, Store(tmp_path)
    latents = torch.zeros(rows, 4, 128, 128, dtype=torch.float16)
    ids = [f"a/folder/with/images/number-{i:09}.jpg" for i in range(rows)]
    meta = {
        "kind": "inputs", "format": 1, "split": "train", "bucket": [1024, 1024], "row_ids": ids,
        "row_sha": [row_sha(z, "a caption") for z in latents], "captions": ["a caption", ""],
    }  # fmt: skip
    text = {
        "prompt_embeds": torch.zeros(2, 77, 2048, dtype=torch.float16),
        "pooled": torch.zeros(2, 1280, dtype=torch.float16),
        "prompt_index": torch.zeros(rows, dtype=torch.int32),
    }
    size = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).repeat(rows, 1)
    with_text = write_dense(
        store,
        "0",
        {"latents": latents, "time_ids": size, **text},
        meta=meta,
        split="train",
        rows=rows,  # type: ignore[arg-type]
    )
    prompts = 2 * (77 * 2048 + 1280) * 2
    assert with_text.bytes - prompts < rows * 132_000, "latents once per image, text once per prompt"
    signal = {
        "prediction": torch.zeros(rows, draws, 4, 128, 128, dtype=torch.float16),
        **{n: torch.zeros(rows, draws, dtype=f.dtype) for n, f in OWN_FIELDS.items()},
    }
    record = write_dense(store, "1", signal, meta=signal_meta(read_dense(store, "0")), split="train", rows=rows)
    assert 4 * 128 * 128 * 2 == 131_072
    assert record.bytes <= rows * draws * 132_000


def test_a_run_of_another_seed_makes_another_cache_beside_the_first(in_process: InProcess, tmp_path: Path) -> None:
    first = build_images(image_config(tmp_path))
    other: RunConfig = image_config(tmp_path, source={"noise": {"draws_per_row": 2, "seed": 6}})
    second = build_images(other)
    assert second.inputs.uri == first.inputs.uri, "noise is no part of the inputs"
    assert second.signal.uri != first.signal.uri


def test_images_of_a_folder_become_the_batches_that_a_denoiser_was_asked(in_process: InProcess, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(7):
        pixels = torch.randint(0, 256, (12 + 8 * (i % 2), 12, 3), dtype=torch.uint8, generator=generator)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )  # fmt: skip
    folder = model_folder(tmp_path / "unet")
    network.save_pretrained(folder)
    source = {"paths": [str(tmp_path / "images")], "buckets": [[8, 8], [16, 8]], "shard_rows": 2}
    model = {"library": "diffusers", "source": str(folder), "dtype": "float32"}
    teacher = {"model": model, "store_dtype": "float32"}
    config = image_config(tmp_path, teachers=(teacher,), source=source, evaluate={"held_out": 0.3})
    caches = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, caches)
    signals = {"t0": build_signal(config, config.teachers[0], inputs, manifest, caches)}
    assert verify(config, inputs, manifest, signals) == []
    process, seen = Process.from_scheduler({**SCHEDULE, "prediction_type": "epsilon"}), 0
    for split in ("train", "held_out"):
        dataset = open_dataset(config, inputs, {"t0": signals["t0"][0]}, split=split, fields={"t0": ("prediction",)})
        for index in range(dataset.num_rows):
            batch = dataset.batch([index])
            x_t = process.noisy(batch["latents"], batch["noise"], batch["timestep"])
            with torch.no_grad():
                said = network.eval()(x_t, batch["timestep"]).sample
            assert torch.allclose(batch["t0/prediction"], said, atol=1e-4)
            seen += 1
    assert seen == 7 * 2
