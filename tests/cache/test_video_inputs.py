"""Prompts and clips as inputs, and trajectories made from them: what is stored is what was asked for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest_cache import InProcess, cache_bytes
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from tiny_denoisers import save_pipeline
from video_run import FRAMES, SIDE, T_LIST, film, video_config, write_clips, write_film, write_parts

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.dense import read_dense
from raydistill.cache.open import open_dataset
from raydistill.cache.verify import verify
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.stage import check_evaluation
from raydistill.models.denoiser import load_denoiser, predict
from raydistill.models.denoiser_agreement import check_denoisers
from raydistill.sources.clips import read_clip
from raydistill.storage import Store

CLIPS: dict[str, Any] = {
    "kind": "videos", "frames": 5, "fps": 8, "buckets": [[SIDE, SIDE]], "vae": "none", "shard_rows": 2,
    "store_dtype": "float32", "noise": {"prediction_type": "flow"},
}  # fmt: skip
PLAIN = {"kind": "noise_prediction", "alpha": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def clips_config(parts: Path, home: Path, paths: list[str], **source: Any) -> RunConfig:
    """Plain diffusion training on clips."""
    plain = video_config(parts, home).model_dump(mode="json")
    plain["source"] = {**CLIPS, "paths": paths, "text_encoders": plain["source"]["text_encoders"], **source}
    plain["teachers"] = []
    plain["student"]["generator"] = None
    plain["phases"][0]["recipe"] = PLAIN
    return RunConfig.model_validate(plain)


def built_rows(config: RunConfig) -> dict[str, torch.Tensor]:
    """Latents by row id."""
    store, manifest = build_inputs(config, Store(config.cache.dir))
    assert verify(config, store, manifest, {}) == []
    rows = {}
    for record in manifest.shards:
        shard = read_dense(store, record.name)
        rows |= dict(zip(shard.row_ids, shard.tensor("latents"), strict=True))
    return rows


# --- clips ------------------------------------------------------------------------------------------------------


def test_the_frames_of_a_film_are_those_that_are_shown_at_the_times(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    frames = film(1)
    (tmp_path / "clips").mkdir()
    write_film(tmp_path / "clips/a.mp4", frames, fps=8)
    write_film(tmp_path / "clips/b.mkv", frames, fps=8)
    for name in "ab":
        (tmp_path / f"clips/{name}.txt").write_text("a clip")
    for fps, places in ((None, [0, 1, 2, 3]), (8.0, [0, 1, 2, 3]), (4.0, [0, 2, 4, 6]), (16.0, [0, 0, 1, 1])):
        config = clips_config(parts, tmp_path / str(fps), [str(tmp_path / "clips")], fps=fps, frames=4)
        rows = built_rows(config)
        assert {*rows} == {"a.mp4", "b.mkv"}
        for latents in rows.values():
            assert latents.shape == (3, 4, SIDE, SIDE)
            wanted = torch.from_numpy(frames[places][:, 0, 0]).float().T / 127.5 - 1
            torch.testing.assert_close(latents.mean((2, 3)), wanted, rtol=0, atol=0.03)  # the codec's rounding


def test_a_folder_of_frames_and_an_animation_are_clips_too(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    frames = film(2)
    folder = tmp_path / "clips/one.frames"
    folder.mkdir(parents=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    for place, picture in enumerate(pictures):
        picture.save(folder / f"{place:03}.png")
    pictures[0].save(
        tmp_path / "clips/two.webp", save_all=True, append_images=pictures[1:], duration=125, lossless=True
    )
    lines = [{"file_name": name, "caption": "a clip"} for name in ("one.frames", "two.webp")]
    (tmp_path / "clips/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = built_rows(clips_config(parts, tmp_path, [str(tmp_path / "clips")]))
    wanted = torch.from_numpy(frames[:5, :SIDE, :SIDE]).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert torch.equal(rows["one.frames"], wanted)
    assert torch.equal(rows["two.webp"], wanted)


def test_a_changed_frame_makes_another_cache(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips/one.frames"
    folder.mkdir(parents=True)
    for place, frame in enumerate(film(3)):
        Image.fromarray(frame).save(folder / f"{place}.png")
    (tmp_path / "clips/one.txt").write_text("a clip")
    config = clips_config(parts, tmp_path, [str(tmp_path / "clips")])
    before = build_inputs(config, Store(config.cache.dir))[0].uri
    Image.fromarray(film(4)[0]).save(folder / "7.png")
    assert build_inputs(config, Store(config.cache.dir))[0].uri != before


@pytest.mark.parametrize(
    ("fault", "words"),
    [("cut", r"bad\.mp4: "), ("text", r"bad\.mp4: "), ("short", r"bad\.mp4: wanted 5 frames at 8 frames per second")],
)
def test_a_clip_that_cannot_be_used_is_named(
    in_process: InProcess, parts: Path, tmp_path: Path, fault: str, words: str
) -> None:
    write_clips(tmp_path / "clips", 2)
    bad = tmp_path / "clips/bad.mp4"
    (tmp_path / "clips/bad.txt").write_text("a clip")
    write_film(bad, film(0, 3 if fault == "short" else 9))
    if fault == "cut":
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 3])
    elif fault == "text":
        bad.write_text("no film at all")
    with pytest.raises(DataError, match=words):
        built_rows(clips_config(parts, tmp_path, [str(tmp_path / "clips")]))
    rows = built_rows(clips_config(parts, tmp_path / "more", [str(tmp_path / "clips")], max_corrupt=0.5))
    assert {*rows} == {"0.mp4", "1.mp4"}


def test_a_negative_prompt_stands_in_for_no_caption(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    paths = [str(parts / "clips")]
    config = clips_config(parts, tmp_path, paths, negative_prompt="ugly")
    store, manifest = build_inputs(config, Store(config.cache.dir))
    assert verify(config, store, manifest, {}) == []
    dataset = open_dataset(config, store, {}, split="train", fields={})
    batch = dataset.batch([0, 1])
    other = clips_config(parts, tmp_path, [str(tmp_path / "clip")], negative_prompt="")
    (tmp_path / "clip").mkdir()
    write_film(tmp_path / "clip/a.mp4", film(0))
    (tmp_path / "clip/a.txt").write_text("ugly")
    store, _ = build_inputs(other, Store(other.cache.dir))
    split = (
        "train" if "train" in {r.split for r in build_inputs(other, Store(other.cache.dir))[1].shards} else "held_out"
    )
    alone = open_dataset(other, store, {}, split=split, fields={}).batch([0])
    torch.testing.assert_close(batch["empty_embeds"][0], alone["prompt_embeds"][0], rtol=0, atol=1e-3)


# --- prompts ----------------------------------------------------------------------------------------------------


def test_a_prompt_keeps_its_noise_whatever_stands_beside_it(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("a blue dog\na new prompt\na blue dog\n")
    found = {}
    for name, path in (("all", parts / "prompts.txt"), ("few", few)):
        config = video_config(parts, tmp_path / name, source={"paths": [str(path)]})
        caches = Store(config.cache.dir)
        inputs, manifest = build_inputs(config, caches)
        signal, _ = build_signal(config, config.teachers[0], inputs, manifest, caches)
        for record in manifest.shards:
            shard, said = read_dense(inputs, record.name), read_dense(signal, record.name)
            captions = [shard.texts("captions")[i] for i in shard.tensor("prompt_index").tolist()]
            if "a blue dog" in captions:
                place = captions.index("a blue dog")
                found[name] = (said.tensor("noise_sha")[place], said.tensor("clean")[place])
    assert torch.equal(found["all"][0], found["few"][0])
    torch.testing.assert_close(found["all"][1], found["few"][1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("content", "words"),
    [("a cat\n\na dog\n  \n", r"empty lines \(2, 4\)"), ("", "an empty file"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_bad_prompts_are_named(parts: Path, tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = video_config(parts, tmp_path, source={"paths": [str(path)]})
    with pytest.raises(DataError, match=words):
        build_inputs(config, Store(config.cache.dir))


def test_guidance_without_a_negative_prompt_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teachers\.0\.guidance_scale: guidance leads away from a negative prompt"):
        video_config(parts, tmp_path, source={"negative_prompt": None})


def test_a_student_time_that_is_not_kept_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.generator\.t_list: .*wants the states at \[0\.7\]"):
        video_config(parts, tmp_path, student={"generator": {"t_list": [1.0, 0.7, 0.0], "causal": {"chunk_frames": 2}}})


# --- trajectories -----------------------------------------------------------------------------------------------


def test_the_cache_of_trajectories_is_the_same_in_any_order_and_after_a_kill(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    caches = {}
    for name in ("plain", "reversed"):
        config = video_config(parts, tmp_path / name)
        in_process.order = list if name == "plain" else lambda items: items[::-1]
        folder = Store(config.cache.dir)
        inputs, manifest = build_inputs(config, folder)
        signal, _ = build_signal(config, config.teachers[0], inputs, manifest, folder)
        caches[name] = cache_bytes(inputs) | cache_bytes(signal)
    assert caches["plain"] == caches["reversed"]


def test_states_and_samples_are_those_of_the_teacher_and_no_larger_than_they_must_be(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    config = video_config(parts, tmp_path, source={"shard_rows": 8, "noise": {"draws_per_row": 16}})
    folder = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, folder)
    signal, kept = build_signal(config, config.teachers[0], inputs, manifest, folder)
    assert kept.facts["t"] == pytest.approx(T_LIST[:-1], abs=1e-9)
    assert kept.facts["sigmas"] == pytest.approx(T_LIST[:-1], abs=1e-9)  # of a flow
    latent = 3 * FRAMES * SIDE * SIDE
    samples = 6 * 16
    assert sum(record.bytes for record in kept.shards) <= 1.02 * samples * (len(T_LIST) - 1 + 1) * latent * 2 + 4096
    dataset = open_dataset(config, inputs, {"ode": signal}, split="train", fields={"ode": ("clean", "path")})
    batch = dataset.batch([0, 17])
    assert batch["ode/path"].shape == (2, 3, 3, FRAMES, SIDE, SIDE)
    assert batch["ode/path"].dtype == torch.bfloat16
    torch.testing.assert_close(batch["ode/path"][:, 0].float(), batch["noise"], rtol=1e-2, atol=1e-2)
    # The sampler's last step, taken once more from the state before it, ends in the sample.
    grid = [float(str(t)) for t in kept.facts["grid"]]  # type: ignore[union-attr]
    assert 0.9 in grid
    network = load_denoiser(config.teachers[0].model)  # type: ignore[arg-type]
    x = batch["noise"]
    with torch.no_grad():
        for t, after in pairwise(grid):
            told = torch.full((2,), 1000 * t)
            cond = predict(network, x, told, batch)
            uncond = predict(network, x, told, {"prompt_embeds": batch["empty_embeds"]})
            x = x + (after - t) * (uncond + 2.0 * (cond - uncond))
    torch.testing.assert_close(batch["ode/clean"].float(), x, rtol=2e-2, atol=2e-2)


def test_damaged_trajectories_are_named(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    config = video_config(parts, tmp_path)
    folder = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, folder)
    signals = {"ode": build_signal(config, config.teachers[0], inputs, manifest, folder)}
    assert verify(config, inputs, manifest, signals) == []
    path = Path(signals["ode"][0].path("00000.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert [damage.shard for damage in verify(config, inputs, manifest, signals)] == ["00000.safetensors"]


def test_pairs_of_noise_and_sample_are_the_special_case(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    plain = video_config(parts, tmp_path).model_dump(mode="json")
    plain["teachers"][0] |= {"keep_t": [1.0], "store_dtype": "float32"}
    plain["student"]["generator"] |= {"t_list": [1.0, 0.0]}
    config = RunConfig.model_validate(plain)
    folder = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, folder)
    signal, _ = build_signal(config, config.teachers[0], inputs, manifest, folder)
    dataset = open_dataset(config, inputs, {"ode": signal}, split="train", fields={"ode": ("clean", "path")})
    batch = dataset.batch([0])
    assert torch.equal(batch["ode/path"][:, 0], batch["noise"])


def test_a_video_of_no_frames_is_not_asked_of_a_video_transformer(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    plain = video_config(parts, tmp_path, source={"frames": None}).model_dump(mode="json")
    plain["student"]["generator"]["causal"] = None
    plain["phases"][0]["recipe"]["causal"] = False
    config = RunConfig.model_validate(plain)
    folder = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, folder)
    with pytest.raises(ConfigError, match=r"wants source\.frames"):
        build_signal(config, config.teachers[0], inputs, manifest, folder)


def test_previews_are_videos_beside_the_shards_and_change_nothing_in_them(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    found = {}
    for name, number in (("without", 0), ("with", 1)):
        plain = video_config(parts, tmp_path / name).model_dump(mode="json")
        plain["teachers"][0]["previews"] = number
        config = RunConfig.model_validate(plain)
        folder = Store(config.cache.dir)
        inputs, manifest = build_inputs(config, folder)
        signal, kept = build_signal(config, config.teachers[0], inputs, manifest, folder)
        found[name] = {n: c for n, c in cache_bytes(signal).items() if not n.startswith("previews/")}
        films = (signal / "previews").names() if number else []
        assert len(films) == number * len(kept.shards)
    assert found["with"] == found["without"]
    film_bytes = (signal / "previews").read(films[0])
    frames = read_clip(film_bytes, frames=FRAMES, fps=None, background=(255, 255, 255))
    assert frames[0].size == (SIDE, SIDE)


# --- said before anything is run --------------------------------------------------------------------------------


def test_a_chunk_beyond_the_samples_is_refused(parts: Path, tmp_path: Path) -> None:
    config = video_config(parts, tmp_path, student={"generator": {"t_list": T_LIST, "causal": {"chunk_frames": 6}}})
    with pytest.raises(ConfigError, match=r"chunk_frames: wanted a chunk of at most 5 latent frames"):
        check_denoisers(config, ((SIDE, SIDE),))
    check_denoisers(video_config(parts, tmp_path), ((SIDE, SIDE),))


def test_a_model_of_other_latents_is_refused(parts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=1,
    )  # fmt: skip
    save_pipeline(other, tmp_path / "other", FlowMatchEulerDiscreteScheduler(), inside="transformer")
    plain = video_config(parts, tmp_path).model_dump(mode="json")
    plain["teachers"][0]["model"]["source"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="wanted latents of 4 channels, found 3 of pixels"):
        check_denoisers(RunConfig.model_validate(plain), ((SIDE, SIDE),))


def test_an_odd_length_and_an_odd_size_name_the_next_ones(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(tmp_path / "vae")
    for source, words in (
        ({"frames": 7, "size": [16, 16]}, r"wanted 4 k \+ 1 frames.* found 7; set it to 5 or 9"),
        ({"frames": 5, "size": [12, 16]}, r"source\.size \[12, 16\] is not divisible by the autoencoder's factor of 8"),
    ):
        config = video_config(parts, tmp_path, source={"vae": {"source": str(tmp_path / "vae")}, **source})
        with pytest.raises(ConfigError, match=words):
            build_inputs(config, Store(config.cache.dir))


def test_clips_become_latents_of_a_video_autoencoder(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.5, 3.0]}
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).eval()
    vae.save_pretrained(tmp_path / "vae")
    source = {"vae": {"source": str(tmp_path / "vae")}, "buckets": [[16, 16]]}
    rows = built_rows(clips_config(parts, tmp_path, [str(parts / "clips")], **source))
    found = rows["0.mp4"]
    assert found.shape == (4, 2, 2, 2)
    frames = read_clip((parts / "clips/0.mp4").read_bytes(), frames=5, fps=8, background=(255, 255, 255))
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        raw = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()[0]
    mean, std = (torch.tensor(statistics[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(found, (raw - mean) / std, rtol=0, atol=1e-4)


def test_measurements_of_images_on_videos_are_refused(parts: Path, tmp_path: Path) -> None:
    evaluate = {"held_out": 0.4, "baseline": False, "images": {"clip_model": "x"}}
    with pytest.raises(ConfigError, match=r"evaluate\.images\.clip_model: looks at images, found a source of videos"):
        check_evaluation(video_config(parts, tmp_path, evaluate=evaluate))
    check_evaluation(video_config(parts, tmp_path))
