"""Inputs caches of images: what they hold, and the same bytes whoever built them and however often it was killed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest_cache import InProcess, Killed, cache_bytes
from PIL import Image
from tiny_encoders import (
    POOLED,
    TOKENS,
    WIDTH,
    picture,
    png,
    save_sdxl_encoders,
    sdxl_text_encoders,
    tiny_vae,
    write_pictures,
)

from raydistill.cache import image_inputs
from raydistill.cache.build import build_inputs
from raydistill.cache.content import inputs_content
from raydistill.cache.dense import DenseShard, read_dense
from raydistill.cache.ledger import Ledger, write_damaged
from raydistill.cache.manifest import Manifest, fingerprint_of
from raydistill.cache.verify import check_inputs
from raydistill.config.schema import RunConfig
from raydistill.config.sources import TextEncoderConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.text_encoder import TextEncoders
from raydistill.signals import sample_seed
from raydistill.storage import Store

MakeConfig = Callable[..., RunConfig]
BUCKETS = ((8, 8), (8, 16))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the encoders of a pipeline (`pipeline`) and one with 30 captioned images (`images`)."""
    folder = tmp_path_factory.mktemp("parts")
    save_sdxl_encoders(folder / "pipeline")
    captions = {f"{'ab'[i % 2]}/{i:02}.png": ["a cat", "two dogs", "", "a red bird"][i % 4] for i in range(30)}
    write_pictures(folder / "images", captions)
    for i in range(0, 30, 3):  # wide ones
        (folder / "images" / f"{'ab'[i % 2]}/{i:02}.png").write_bytes(png(picture(100 + i, 9 + i % 3, 21)))
    return folder


@pytest.fixture
def make_config(parts: Path, tmp_path: Path) -> MakeConfig:
    return partial(image_config, parts, tmp_path)


def image_config(parts: Path, home: Path, folder: str = "cache", *, actors: int = 1, **source: Any) -> RunConfig:
    """A run on the images of `parts` whose caches lie in `home/<folder>`; `source` are overrides of that section."""
    model = {"library": "diffusers", "source": str(parts)}
    images = {
        "kind": "images", "paths": [str(parts / "images")], "buckets": [list(b) for b in BUCKETS], "shard_rows": 6,
        "vae": {"source": str(parts / "pipeline")}, "text_encoders": sdxl_text_encoders(parts / "pipeline"),
        "encode_rows": 4,
    }  # fmt: skip
    recipe = {"kind": "noise_prediction", "alpha": 0.0}
    phase = {"name": "p", "steps": 1, "batch": {"global_size": 2, "micro_size": 2}, "recipe": recipe}
    return RunConfig.model_validate(
        {
            "name": "toy", "run_dir": str(home / "run"), "cache": {"dir": str(home / folder)},
            "source": images | source, "student": {"model": model}, "evaluate": {"held_out": 0.3},
            "phases": [phase | {"optimizer": {"student": {"lr": 1e-3}}}],
            "resources": {"teacher": {"actors": [actors, actors], "cpus": 0.5}, "decode": {"cpus": 0.5}},
        }
    )  # fmt: skip


def build(config: RunConfig) -> tuple[Store, Manifest]:
    return build_inputs(config, Store(config.cache.dir))


def shards(store: Store, manifest: Manifest) -> list[DenseShard]:
    return [read_dense(store, record.name) for record in manifest.shards]


def by_row(store: Store, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    return {
        row_id: shard.tensor(name)[row]
        for shard in shards(store, manifest)
        for row, row_id in enumerate(shard.texts("row_ids"))
    }


# --- what they hold ---------------------------------------------------------------------------------------------


def test_shards_are_pure_sorted_and_hold_every_image_once(make_config: MakeConfig, in_process: InProcess) -> None:
    store, manifest = build(make_config())
    keys: dict[str, list[tuple[Any, ...]]] = {"train": [], "held_out": []}
    for record, shard in zip(manifest.shards, shards(store, manifest), strict=True):
        prompts, index = shard.texts("captions"), shard.tensor("prompt_index").tolist()
        assert shard.meta["split"] == record.split
        assert 1 <= len(index) == record.rows <= 6
        for row_id, place in zip(shard.texts("row_ids"), index, strict=True):
            sha = hashlib.sha256(prompts[place].encode()).hexdigest()[:16]
            keys[record.split].append((tuple(shard.meta["bucket"]), sha, row_id))
    assert all(found == sorted(found) for found in keys.values())
    ids = [key[-1] for found in keys.values() for key in found]
    assert sorted(ids) == sorted(f"{'ab'[i % 2]}/{i:02}.png" for i in range(30))
    assert manifest.facts["num_rows"] == {split: len(found) for split, found in keys.items()}
    assert all(found for found in keys.values())
    assert manifest.facts["buckets"] == [[8, 8], [8, 16]]
    assert manifest.facts["bucket_rows"] == [20, 10]
    assert [r.split for r in manifest.shards] == sorted((r.split for r in manifest.shards), reverse=True)


def test_a_prompt_is_stored_once_per_shard_and_the_empty_one_last(
    make_config: MakeConfig, in_process: InProcess
) -> None:
    store, manifest = build(make_config(shard_rows=100))
    for shard in shards(store, manifest):
        prompts = shard.texts("captions")
        assert len(prompts) == len(set(prompts)) <= 4
        assert prompts[-1] == ""
        assert shard.tensor("prompt_embeds").shape == (len(prompts), TOKENS, 2 * WIDTH)
        assert shard.tensor("pooled").shape == (len(prompts), POOLED)


def test_latents_prompts_and_sizes_are_what_a_second_implementation_says(
    parts: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    store, manifest = build(make_config())
    vae = tiny_vae()
    encoders = TextEncoders([TextEncoderConfig.model_validate(e) for e in sdxl_text_encoders(parts / "pipeline")])
    with_caption = [json.loads(line) for line in (parts / "images" / "metadata.jsonl").read_text().splitlines()]
    captions = {record["file_name"]: record["caption"] for record in with_caption}
    for shard in shards(store, manifest):
        height, width = shard.meta["bucket"]
        for row, row_id in enumerate(shard.texts("row_ids")):
            image = Image.open(parts / "images" / row_id)
            scale = max(height / image.height, width / image.width)
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            pixels = np.asarray(image.resize(size, kind)).astype(np.float32) / 127.5 - 1
            top, left = (size[1] - height) // 2, (size[0] - width) // 2
            cut = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None]
            wanted = vae.encode(cut).latent_dist.mode() * vae.config.scaling_factor
            torch.testing.assert_close(shard.tensor("latents")[row].float(), wanted[0].detach(), atol=2e-3, rtol=1e-3)
            assert shard.tensor("time_ids")[row].tolist() == [image.height, image.width, top, left, height, width]
            place = int(shard.tensor("prompt_index")[row])
            assert shard.texts("captions")[place] == captions[row_id]
            embeds, pooled = encoders([captions[row_id]], batch=1)
            torch.testing.assert_close(shard.tensor("prompt_embeds")[place].float(), embeds[0], atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(shard.tensor("pooled")[place].float(), pooled[0], atol=2e-3, rtol=1e-3)


def test_facts_say_what_a_reader_must_know(make_config: MakeConfig, in_process: InProcess) -> None:
    store, manifest = build(make_config())
    facts = manifest.facts
    assert (facts["latent_channels"], facts["vae_factor"]) == (4, 2)
    assert (facts["text_width"], facts["pooled_width"], facts["text_tokens"]) == (2 * WIDTH, POOLED, TOKENS)
    assert facts["scaling"] == {"scaling_factor": 0.13025}
    assert (facts["dropped"], facts["unreadable"]) == ({}, [])
    assert facts["device"] == "cpu"
    assert "pillow" in facts["versions"]
    assert set(manifest.fields) == {"latents", "time_ids", "prompt_index", "prompt_embeds", "pooled"}
    assert check_inputs(store, manifest) == []


def test_pixels_without_text(make_config: MakeConfig, in_process: InProcess) -> None:
    store, manifest = build(make_config(vae="none", text_encoders=[], store_dtype="float32", buckets=[[8, 8]]))
    for shard in shards(store, manifest):
        assert set(shard.names) == {"latents", "time_ids"}
        assert shard.meta["captions"] == []
        assert shard.tensor("latents").shape[1:] == (3, 8, 8)
        assert -1 <= float(shard.tensor("latents").min()) < float(shard.tensor("latents").max()) <= 1
    assert (manifest.facts["scaling"], manifest.facts["text_width"]) == ("pixels", 0)
    assert check_inputs(store, manifest) == []


def test_samples_of_latents_come_from_row_id_and_seed_alone(
    parts: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    def latents(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        vae = {"source": str(parts / "pipeline"), "latents": "sample", "seed": seed}
        return by_row(*build(make_config(vae=vae, store_dtype="float32", **settings)), "latents")

    first, again, other = latents(1), latents(1, shard_rows=4, encode_rows=3), latents(2)
    mode = by_row(*build(make_config(store_dtype="float32")), "latents")
    vae = tiny_vae()
    for row_id, sample in first.items():
        torch.testing.assert_close(sample, again[row_id])
        assert not torch.allclose(sample, other[row_id], atol=1e-3)
        noise = np.random.Generator(np.random.Philox(sample_seed(row_id, 0, "vae", 1)))
        noise = torch.from_numpy(noise.standard_normal(sample.shape, dtype=np.float32))
        std = (sample - mode[row_id]) / noise / vae.config.scaling_factor
        assert bool((std[noise.abs() > 0.1] > 0).all())


def test_max_rows_takes_the_first_images_and_reads_no_further(
    make_config: MakeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_inputs, "FIRST_WAVE", 2)
    monkeypatch.setattr("raydistill.sources.images.UNIT_BYTES", 1)  # every image is a unit
    manifest = build(make_config(max_rows=5))[1]
    assert sum(manifest.facts["num_rows"].values()) == 5
    units = [item for item in in_process.items if isinstance(item, int)]
    assert units == [0, 1, 2, 3, 4, 5]
    store, manifest = build(make_config(max_rows=5))
    assert sorted(by_row(store, manifest, "time_ids")) == [f"a/{i:02}.png" for i in range(0, 10, 2)]


# --- what cannot be built ---------------------------------------------------------------------------------------


def test_a_bucket_that_the_factor_does_not_divide_is_refused_before_anything_is_read(
    make_config: MakeConfig, in_process: InProcess
) -> None:
    with pytest.raises(ConfigError, match=r"bucket \[8, 15\] is not divisible by the autoencoder's factor of 2 pixels"):
        build(make_config(buckets=[[8, 8], [8, 15]]))
    with pytest.raises(ConfigError, match=r"factor of 2 .*resolution and bucket_step"):
        build(make_config(buckets=[], resolution=15, bucket_step=5))
    assert in_process.items == []


def test_unusable_images_are_left_out_named_and_counted(
    parts: Path, tmp_path: Path, make_config: MakeConfig, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(parts / "images", folder)
    (folder / "a" / "04.png").write_bytes(b"no image")
    (folder / "new.png").write_bytes(png(picture(0)))
    paths = {"paths": [str(folder)]}
    with pytest.raises(
        DataError, match=r"2 of 31 images cannot be used(.|\n)*a/04\.png: cannot identify(.|\n)*new\.png"
    ):
        build(make_config(**paths))
    assert all(isinstance(item, int) for item in in_process.items)  # nothing was encoded
    store, manifest = build(make_config(**paths, max_corrupt=0.1))
    assert sum(manifest.facts["num_rows"].values()) == 29
    assert manifest.facts["dropped"] == {"no_caption": 1, "unreadable": 1}
    assert manifest.facts["unreadable"] == ["a/04.png: cannot identify image file", "new.png: no caption"]
    assert (
        "2 of 31 images left out: a/04.png (cannot identify image file), new.png (no caption)"
        in capsys.readouterr().out
    )
    assert "a/04.png" not in by_row(store, manifest, "time_ids")
    assert not store.exists("staging")


def test_two_rows_of_one_id_are_refused(tmp_path: Path, make_config: MakeConfig, in_process: InProcess) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for key in ("x", "y", "x"):
            for suffix, data in (("png", png(picture(0))), ("txt", b"a cat")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"1 row ids of the source appear more than once: twice\.tar#x"):
        build(make_config(paths=[str(tmp_path / "twice.tar")]))


def test_an_image_that_changes_while_the_cache_is_built_is_noticed(
    parts: Path, tmp_path: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(parts / "images", folder)

    def overwrite(items: Sequence[Any]) -> Sequence[Any]:
        if isinstance(items[0], str):  # shards, not units: indexing is over
            (folder / "a" / "04.png").write_bytes(png(picture(77)))
        return items

    in_process.order = overwrite
    with pytest.raises(
        DataError, match=r"a/04\.png .* changed while the inputs were built: .*Run the same command again"
    ):
        build(make_config(paths=[str(folder)]))


def test_latents_that_overflow_are_an_error(
    tmp_path: Path, parts: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    tiny_vae(scaling_factor=1e7).save_pretrained(tmp_path / "vae")
    with pytest.raises(DataError, match="latents holds NaN or infinity in float16"):
        build(make_config(vae={"source": str(tmp_path)}))
    build(make_config(vae={"source": str(tmp_path)}, store_dtype="bfloat16"))


# --- the same bytes ---------------------------------------------------------------------------------------------


def with_every_kind(parts: Path, folder: Path) -> list[str]:
    """Loose images, a Parquet file and a tar."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    images = [png(picture(200 + i)) for i in range(8)]
    pq.write_table(pa.table({"image": images, "caption": ["a cat", "a dog"] * 4}), folder / "p.parquet")
    with tarfile.open(folder / "t.tar", "w") as tar:
        for i in range(8):
            for suffix, data in (("png", png(picture(300 + i))), ("txt", b"a bird")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [str(parts / "images"), str(folder)]


def test_order_of_work_and_kills_at_any_item_change_no_byte(
    parts: Path, tmp_path: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    settings = {"paths": with_every_kind(parts, tmp_path / "more"), "shard_rows": 12}
    store, manifest = build(make_config(**settings))
    wanted, work = cache_bytes(store), len(in_process.items)
    assert work == 2 + len(manifest.shards)  # loose images and Parquet in one unit, the tar in another
    assert check_inputs(store, manifest) == []
    for stop_after in (0, 1, 2, work // 2, work - 1):
        config = make_config("other", **settings)
        in_process.items.clear()
        in_process.stop_after = stop_after
        in_process.order = lambda items: list(reversed(items))
        with pytest.raises(Killed):
            build(config)
        in_process.stop_after = None
        in_process.order = list
        again, _ = build(config)
        assert len(in_process.items) == work  # nothing is done twice
        assert cache_bytes(again) == wanted
        shutil.rmtree(config.cache.dir)


def test_a_complete_cache_is_returned_without_any_work(make_config: MakeConfig, in_process: InProcess) -> None:
    manifest = build(make_config())[1]
    in_process.items.clear()
    assert build(make_config())[1] == manifest
    assert in_process.items == []


def test_a_kill_before_the_manifest_needs_no_encoder_to_finish(
    make_config: MakeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cache_bytes(build(make_config())[0])

    def killed(*_: object, **__: object) -> None:
        raise Killed

    config = make_config("other")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "finish", killed)
        with pytest.raises(Killed):
            build(config)
    in_process.items.clear()
    assert cache_bytes(build(config)[0]) == wanted
    assert in_process.items == []


def test_only_damaged_and_absent_shards_are_built_again(make_config: MakeConfig, in_process: InProcess) -> None:
    store, manifest = build(make_config())
    wanted = cache_bytes(store)
    names = [record.name for record in manifest.shards]
    Path(store.path(names[0])).write_bytes(b"nothing")
    Path(store.path(names[2])).unlink()
    write_damaged(store, {names[0]: "truncated"})
    in_process.items.clear()
    build(make_config())
    assert [item for item in in_process.items if isinstance(item, str)] == [names[0], names[2]]
    assert cache_bytes(store) == wanted


def test_fingerprints_follow_content_and_nothing_else(
    parts: Path, tmp_path: Path, make_config: MakeConfig, in_process: InProcess
) -> None:
    def name(**source: Any) -> str:
        return fingerprint_of(inputs_content(make_config(**source)))

    base = name()
    shutil.copytree(parts, tmp_path / "moved")
    moved = {
        "paths": [str(tmp_path / "moved" / "images")], "vae": {"source": str(tmp_path / "moved" / "pipeline")},
        "text_encoders": sdxl_text_encoders(tmp_path / "moved" / "pipeline"),
    }  # fmt: skip
    for same in (moved, {"noise": {"seed": 3, "draws_per_row": 4}}, {"max_corrupt": 0.5}, {"actors": 3}):
        assert name(**same) == base
    vae = {"source": str(parts / "pipeline")}
    text = sdxl_text_encoders(parts / "pipeline")
    tiny_vae(9).save_pretrained(tmp_path / "other_vae")
    (tmp_path / "moved" / "images" / "a" / "00.png").write_bytes(png(picture(55)))
    others = [
        name(shard_rows=7), name(encode_rows=5), name(store_dtype="float32"), name(background=(0, 0, 0)),
        name(buckets=[[8, 8]]), name(max_rows=9), name(vae="none"), name(vae=vae | {"latents": "sample"}),
        name(vae=vae | {"dtype": "bfloat16"}), name(vae={"source": str(tmp_path / "other_vae")}),
        name(text_encoders=text[::-1]), name(text_encoders=text[:1]), name(text_encoders=[]),
        name(text_encoders=[text[0] | {"layer": -1}, text[1]]), name(paths=moved["paths"]),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


# --- with Ray ---------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, sys
import ray
from raydistill.cache.build import build_inputs
from raydistill.config.schema import RunConfig
from raydistill.storage import Store

config = RunConfig.model_validate(json.loads(sys.argv[1]))
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
build_inputs(config, Store(config.cache.dir))
"""


@pytest.mark.slow
@pytest.mark.fault("actors that encode images are killed", "same cache bytes as one undisturbed actor")
def test_three_actors_that_were_killed_write_the_bytes_of_one(
    parts: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    def start(config: RunConfig) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RAYDISTILL_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", DRIVER, config.model_dump_json()]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def folder(config: RunConfig) -> Store:
        return Store(next(Path(config.cache.dir).glob("inputs-*")))

    paths = with_every_kind(parts, tmp_path / "more")
    one, three = make_config("one", paths=paths), make_config("three", actors=3, paths=paths)
    driver = start(three)
    deadline = time.monotonic() + 600
    while not list(Path(three.cache.dir).glob("inputs-*/records/*.json")):
        assert driver.poll() is None
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not list(Path(three.cache.dir).glob("inputs-*/manifest.json"))
    for config in (three, one):
        assert start(config).wait(900) == 0
    assert cache_bytes(folder(three)) == cache_bytes(folder(one))
