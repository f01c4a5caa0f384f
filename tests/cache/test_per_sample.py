"""One file per image and teacher: written as others read it, and read as others write it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest_cache import InProcess, cache_bytes
from dense_toys import (
    CHANNELS,
    POOLED,
    SCHEDULE,
    TOKENS,
    WIDTH,
    BuiltImages,
    ToyDenoiser,
    build_images,
    image_config,
    toy_denoiser,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.ledger import write_damaged
from raydistill.cache.per_sample import AXES, DTYPES, main, read_entry
from raydistill.cache.verify import verify
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.errors import CacheMismatch, ConfigError
from raydistill.signals import sample_seed
from raydistill.storage import Store

TEACHERS = ({"guidance_scale": 1.0}, {"guidance_scale": 2.0})


@pytest.fixture
def built(in_process: InProcess, tmp_path: Path) -> BuiltImages:
    return build_images(image_config(tmp_path, teachers=TEACHERS))


def exported(built: BuiltImages, to: Path, *more: str) -> Path:
    signals = [f"--signal={name}={store.uri}" for name, (store, _) in built.signals.items()]
    assert main(["export", "--inputs", built.inputs.uri, *signals, "--to", str(to), *more]) == 0
    return to


def imported(folder: Path, to: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Store]:
    capsys.readouterr()
    arguments = ["import", "--from", str(folder), "--teachers", "t0", "t1", "--latents", str(folder / "latents")]
    assert main([*arguments, "--to", str(to), "--shard-rows", "4", "--held-out", "0.2", *more]) == 0
    return {name: Store(uri) for name, uri in json.loads(capsys.readouterr().out).items()}


def foreign(folder: Path, *, teachers: tuple[str, ...] = ("t0", "t1"), images: int = 6) -> Path:
    """Files as another trainer writes them: no metadata, seeds of 32 bits, noise that is only in the files."""
    generator = torch.Generator().manual_seed(4)
    for i in range(images):
        height, width = (32, 64) if i % 2 else (32, 32)
        key = hashlib.sha1(f"picture{i}|{width}x{height}|1".encode()).hexdigest()
        shape = (CHANNELS, height // 8, width // 8)
        shared = {
            "noise": torch.randn(shape, generator=generator).half(),
            "timestep": torch.randint(0, 1000, (1,), generator=generator),
            "seed": torch.randint(0, 2**32, (1,), generator=generator),
            "resolution": torch.tensor([width, height], dtype=torch.int32),
            "encoder_hidden_states": torch.full((TOKENS, WIDTH), i % 3, dtype=torch.float16),
            "pooled_embeds": torch.full((POOLED,), i % 3, dtype=torch.float16),
        }
        latent = torch.randn(shape, generator=generator).bfloat16()
        for place, teacher in enumerate(teachers):
            (folder / teacher).mkdir(parents=True, exist_ok=True)
            prediction = (place + 1) * (latent.float() + shared["noise"].float() * float(shared["timestep"]) / 1000)
            prediction += shared["encoder_hidden_states"].float().mean()
            entry = {"teacher_pred": prediction.half(), **shared}
            save_file(entry, folder / teacher / f"{key}_{width}x{height}.safetensors")
        (folder / "latents").mkdir(exist_ok=True)
        save_file({"latent": latent}, folder / "latents" / f"{key}_{width}x{height}.safetensors")
    return folder


def test_an_export_has_the_seven_tensors_of_the_layout(built: BuiltImages, tmp_path: Path) -> None:
    folder = exported(built, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["latents", "t0", "t1"]
    names = sorted(path.name for path in (folder / "t0").iterdir())
    assert len(names) == 18
    assert names == sorted(path.name for path in (folder / "latents").iterdir())
    key = hashlib.sha1(b"train/4x8/002|8x4|1").hexdigest()
    tensors = load_file(folder / "t1" / f"{key}_8x4.safetensors")
    shapes = {
        "teacher_pred": (CHANNELS, 4, 8), "noise": (CHANNELS, 4, 8), "timestep": (1,), "seed": (1,), "resolution": (2,),
        "encoder_hidden_states": (TOKENS, WIDTH), "pooled_embeds": (POOLED,),
    }  # fmt: skip
    assert {name: tuple(values.shape) for name, values in tensors.items()} == shapes
    assert {name: values.dtype for name, values in tensors.items()} == DTYPES
    assert {name: values.ndim for name, values in tensors.items()} == AXES
    assert tensors["resolution"].tolist() == [8, 4], "width before height"
    row_id, noise = "train/4x8/002.png", built.config.images.noise
    assert torch.equal(tensors["noise"], noise_of(row_id, 0, (CHANNELS, 4, 8), noise.seed).half())
    assert tensors["timestep"].item() == timestep_of(row_id, 0, noise)
    assert tensors["seed"].item() % 2**64 == sample_seed(row_id, 0, "noise", noise.seed)


def test_the_export_holds_what_the_cache_holds(built: BuiltImages, tmp_path: Path) -> None:
    folder = exported(built, tmp_path / "out", "--draw", "1")
    signals = {name: store for name, (store, _) in built.signals.items()}
    fields = {"t0": ("prediction",), "t1": ("prediction",)}
    dataset = DenseDataset(built.inputs, signals, built.config.images.noise, split="train", fields=fields)
    for index in range(1, dataset.num_rows, 2):
        batch, (name,) = dataset.batch([index]), dataset.row_ids([index])
        width, height = batch["latents"].shape[3], batch["latents"].shape[2]
        key = hashlib.sha1(f"{name.removesuffix('.png@1')}|{width}x{height}|1".encode()).hexdigest()
        for teacher in ("t0", "t1"):
            file = load_file(folder / teacher / f"{key}_{width}x{height}.safetensors")
            assert torch.equal(file["teacher_pred"], batch[f"{teacher}/prediction"][0])
            assert torch.equal(file["noise"], batch["noise"][0].half())
            assert torch.equal(file["encoder_hidden_states"], batch["prompt_embeds"][0].half())
            assert torch.equal(file["pooled_embeds"], batch["pooled"][0].half())
        latent = load_file(folder / "latents" / f"{key}_{width}x{height}.safetensors")["latent"]
        assert torch.equal(latent.float(), batch["latents"][0])


def test_export_import_export_is_the_identity(
    built: BuiltImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(built, tmp_path / "out")
    stores = imported(folder, tmp_path / "caches", capsys)
    again = tmp_path / "again"
    signals = [f"--signal={name}={store.uri}" for name, store in stores.items() if name != "inputs"]
    assert main(["export", "--inputs", stores["inputs"].uri, *signals, "--to", str(again)]) == 0
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert {str(path.relative_to(again)): path.read_bytes() for path in again.rglob("*.safetensors")} == files


def test_files_of_others_survive_import_and_export_bit_by_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "theirs")
    stores = imported(folder, tmp_path / "caches", capsys)
    signals = [f"--signal={name}={store.uri}" for name, store in stores.items() if name != "inputs"]
    assert main(["export", "--inputs", stores["inputs"].uri, *signals, "--to", str(tmp_path / "again")]) == 0
    for path in folder.rglob("*.safetensors"):
        wanted, found = load_file(path), load_file(tmp_path / "again" / path.relative_to(folder))
        assert found.keys() == wanted.keys()
        assert all(found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted)


def test_an_imported_cache_is_read_verified_and_joined_by_new_teachers(
    in_process: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    folder = foreign(tmp_path / "theirs")
    (tmp_path / "scheduler.json").write_text(json.dumps({**SCHEDULE, "prediction_type": "epsilon"}))
    stores = imported(folder, tmp_path / "cache", capsys, "--scheduler", str(tmp_path / "scheduler.json"))
    names = {name: Path(store.uri).name for name, store in stores.items()}
    config = image_config(
        tmp_path,
        teachers=({"imported": names["t0"]}, {"imported": names["t1"], "guidance_scale": 2.0}, {"guidance_scale": 3.0}),
        source={"imported": names["inputs"], "noise": {}},
    )
    caches = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, caches)
    signals = {t.name: build_signal(config, t, inputs, manifest, caches, factory=toy_denoiser) for t in config.teachers}
    assert (inputs.uri, signals["t1"][0].uri) == (stores["inputs"].uri, stores["t1"].uri)
    assert in_process.items == [record.name for record in manifest.shards], "only the third teacher is run"
    assert verify(config, inputs, manifest, signals, factory=toy_denoiser) == []
    opened = {name: store for name, (store, _) in signals.items()}
    fields = dict.fromkeys(opened, ("prediction",))
    for split in ("train", "held_out"):
        dataset = DenseDataset(inputs, opened, config.images.noise, split=split, fields=fields)
        for index in range(dataset.num_rows):
            batch, (name,) = dataset.batch([index]), dataset.row_ids([index])
            height, width = (8 * side for side in batch["latents"].shape[2:])
            file = load_file(folder / "t0" / f"{name.removesuffix('@0')}_{width}x{height}.safetensors")
            assert torch.equal(batch["noise"][0], file["noise"].float())
            assert torch.equal(batch["timestep"], file["timestep"])
            assert torch.equal(batch["t0/prediction"][0], file["teacher_pred"])
            assert batch["time_ids"].tolist() == [[width, height, 0, 0, width, height]], "as their teachers were asked"
            assert not batch["empty_embeds"].any()
            assert torch.equal(batch["t2/prediction"], ToyDenoiser(3.0)(batch)["prediction"].half())


def test_an_import_is_the_same_every_time_and_keeps_finished_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "theirs")
    one, two = (imported(folder, tmp_path / name, capsys) for name in ("one", "two"))
    for name in one:
        assert cache_bytes(one[name]) == cache_bytes(two[name])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    assert imported(folder, tmp_path / "one", capsys).keys() == one.keys()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == times


def test_images_give_ids_captions_and_latents_by_their_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = foreign(tmp_path / "theirs"), tmp_path / "images"
    images.mkdir()
    for i in range(6):
        path = images / f"picture{i}.jpg"
        path.write_bytes(b"x" * (i + 1))
        (images / f"picture{i}.txt").write_text(f"  caption {i % 3}\n")
        os.utime(path, ns=(0, 10**15 + i))
        size = "64x32" if i % 2 else "32x32"
        key = hashlib.sha1(f"picture{i}|{size}|1".encode()).hexdigest()
        own = hashlib.sha1(f"picture{i}.jpg|{i + 1}|{10**15 + i}|{size}|1".encode()).hexdigest()
        (folder / "latents" / f"{key}_{size}.safetensors").rename(folder / "latents" / f"{own}_{size}.safetensors")
    stores = imported(folder, tmp_path / "caches", capsys, "--images", str(images))
    seen = {}
    for split in ("train", "held_out"):
        data = DenseDataset(stores["inputs"], {}, NoiseConfig(), split=split, fields={})
        seen |= dict(zip(data.row_ids(range(data.num_rows)), data.captions(range(data.num_rows)), strict=True))
    assert seen == {f"picture{i}@0": f"caption {i % 3}" for i in range(6)}


def break_file(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def broken(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return broken


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), r"t1: wanted the images of all teachers, 1 are missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "cannot read .*t1/"),
    "key": (break_file(lambda t: t.pop("seed")), r"t1/.*missing: seed"),
    "nan": (break_file(lambda t: t["teacher_pred"].fill_(float("nan"))), "teacher_pred has a value that is not finite"),
    "noise": (break_file(lambda t: t["noise"].mul_(2)), "the teachers disagree on noise: .*t0/.* and .*t1/"),
    "timestep": (break_file(lambda t: t["timestep"].copy_((t["timestep"] + 1) % 1000)), "disagree on timestep"),
    "text": (break_file(lambda t: t["pooled_embeds"].add_(1)), "disagree on pooled_embeds"),
    "range": (break_file(lambda t: t["timestep"].fill_(1000)), "timestep should be 0 to 999, found 1000"),
    "shape": (
        break_file(lambda t: t.update(teacher_pred=t["teacher_pred"][:, :2].clone())), "teacher_pred and noise differ",
    ),
    "size": (break_file(lambda t: t["resolution"].add_(1)), "does not belong to an image of"),
    "latents": (lambda p: (p.parent.parent / "latents" / p.name).unlink(), "cannot read .*latents/"),
    "other latents": (
        lambda p: save_file({"x": torch.zeros(1)}, p.parent.parent / "latents" / p.name), "wanted the tensor latent of",
    ),
    "name": (lambda path: path.rename(path.with_name("cover.safetensors")), "wanted"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    folder = foreign(tmp_path / "theirs")
    damage, words = FAULTS[kind]
    damage(sorted((folder / "t1").iterdir())[2])
    arguments = ["import", "--from", str(folder), "--teachers", "t0", "t1", "--latents", str(folder / "latents")]
    assert main([*arguments, "--to", str(tmp_path / "caches")]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not list((tmp_path / "caches").rglob("manifest.json"))


def test_imported_noise_takes_no_other_draws(
    in_process: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = imported(foreign(tmp_path / "theirs"), tmp_path / "cache", capsys)
    for noise in (NoiseConfig(draws_per_row=2), NoiseConfig(caption_dropout=0.1)):
        with pytest.raises(CacheMismatch, match=r"imported and hold 1 draw\(s\) of noise per row"):
            DenseDataset(stores["inputs"], {"t0": stores["t0"]}, noise, split="train", fields={"t0": ("prediction",)})
    config = image_config(tmp_path, source={"imported": Path(stores["inputs"].uri).name})
    inputs, manifest = build_inputs(config, Store(config.cache.dir))
    with pytest.raises(CacheMismatch, match="Set them to 1 and 0"):
        build_signal(config, config.teachers[0], inputs, manifest, Store(config.cache.dir), factory=toy_denoiser)


def test_an_imported_cache_that_is_damaged_or_absent_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = imported(foreign(tmp_path / "theirs"), tmp_path / "cache", capsys)
    config = image_config(tmp_path, source={"imported": "inputs-0000000000000000"})
    with pytest.raises(ConfigError, match=r"source.imported: wanted a finished cache at .*inputs-0000000000000000"):
        build_inputs(config, Store(config.cache.dir))
    write_damaged(stores["inputs"], {"00000.safetensors": "gone"})
    config = image_config(tmp_path, source={"imported": Path(stores["inputs"].uri).name})
    with pytest.raises(ConfigError, match=r"lists damaged shards. Import it"):
        build_inputs(config, Store(config.cache.dir))


def test_our_files_say_where_they_come_from_in_their_metadata(built: BuiltImages, tmp_path: Path) -> None:
    path = sorted((exported(built, tmp_path / "out") / "t0").iterdir())[0]
    with safe_open(path, framework="pt") as file:
        assert set(json.loads(file.metadata()["raydistill"])) == {"row_id", "caption", "time_ids"}
    entry = read_entry(path)
    assert entry.origin is not None
    assert str(entry.origin["row_id"]).endswith(".png")


def test_a_cache_without_text_cannot_be_exported(in_process: InProcess, tmp_path: Path) -> None:
    built = build_images(image_config(tmp_path), text=False)
    arguments = ["export", "--inputs", built.inputs.uri, "--signal", f"t0={built.signal.uri}"]
    assert main([*arguments, "--to", str(tmp_path / "out")]) == 2
