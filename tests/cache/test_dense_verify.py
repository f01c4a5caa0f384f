"""Every kind of damage to caches of images is named, listed, and repaired by the command that built them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest_cache import InProcess, cache_bytes, map_in_process
from dense_toys import BuiltImages, ToyDenoiser, build_images, image_config, replace_shard, toy_denoiser, unet_folder
from safetensors.torch import load_file
from torch import Tensor

from raydistill.cache.build import build_average, build_signal
from raydistill.cache.ledger import read_damaged
from raydistill.cache.verify import Damage, require_sound, verify
from raydistill.errors import VerificationFailed
from raydistill.signals import JsonValue
from raydistill.storage import Store
from raydistill.teachers import build_teacher

NAME = "00001.safetensors"
Change = Callable[[dict[str, Tensor], dict[str, JsonValue]], object]


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of finished caches."""
    home = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        map_in_process(patch)
        build_images(image_config(home))
    return home


@pytest.fixture
def built(built_once: Path, in_process: InProcess, tmp_path: Path) -> BuiltImages:
    """A test's own copy of them."""
    shutil.copytree(built_once / "cache", tmp_path / "cache")
    shutil.copytree(built_once / "model", tmp_path / "model")
    found = build_images(image_config(tmp_path))
    assert in_process.items == []
    return found


def check(built: BuiltImages, factory: object = toy_denoiser) -> list[Damage]:
    return verify(built.config, built.inputs, built.inputs_manifest, built.signals, factory=factory)  # type: ignore[arg-type]


def put(name: str, at: tuple[int, ...], value: float) -> Change:
    return lambda tensors, _: tensors[name].__setitem__(at, value)


def swapped(tensors: dict[str, Tensor], meta: dict[str, JsonValue]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]
    for key in ("row_ids", "row_sha"):
        values = meta[key]
        assert isinstance(values, list)
        values[0], values[1] = values[1], values[0]


def without_empty(tensors: dict[str, Tensor], meta: dict[str, JsonValue]) -> None:
    meta["captions"] = meta["captions"][:-1]  # type: ignore[index]
    tensors.update({name: tensors[name][:-1] for name in ("prompt_embeds", "pooled")})


def other_noise(tensors: dict[str, Tensor], meta: dict[str, JsonValue]) -> None:
    tensors["noise_sha"][2, 1] ^= 1 << 40


def test_sound_caches_have_no_damage(built: BuiltImages, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(built) == []
    require_sound([])
    assert not built.signal.exists("damaged.json")
    out = capsys.readouterr().out
    assert "18 rows, sound" in out
    assert "audit of 4 draws: relative rms difference mean 0.0e+00, largest 0.0e+00" in out


@pytest.mark.parametrize("cache", ["inputs", "signal"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-30]), "truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"?"), "sha256"),
        (lambda f: f.unlink(), "shard is missing"),
        (lambda f: (f.parent / "records" / f"{f.name}.json").unlink(), "record is missing"),
    ],
)
def test_damaged_files_are_named(built: BuiltImages, cache: str, damage: Callable[[Path], object], words: str) -> None:
    store: Store = getattr(built, cache)
    damage(Path(store.path(NAME)))
    found = check(built)
    assert [(d.cache, d.shard) for d in found] == [(store.uri, NAME)]
    assert words in found[0].what
    assert list(read_damaged(store)) == [NAME]
    with pytest.raises(VerificationFailed, match=words):
        require_sound(found)


SIGNAL_FAULTS: dict[str, tuple[Change, str]] = {
    "foreign noise": (
        other_noise, r"a row whose noise does not match its seed: row train/4x4/005\.png, draw 1",
    ),
    "foreign timestep": (
        put("timestep", (0, 1), 3),
        r"a row whose timestep does not match its seed: row train/4x4/003\.png, draw 1 has 3",
    ),
    "not a number": (
        put("prediction", (1, 0, 1, 2, 2), float("nan")), r"'prediction' has a value that is not finite .*4x4/004",
    ),
    "infinite tap": (put("tap.mean", (2, 1, 0), float("inf")), r"'tap.mean' has a value that is not finite .*4x4/005"),
    "other order": (swapped, "another order than the inputs"),
    "other rows": (lambda _, meta: meta.update(row_ids=["x", "y", "z"]), "row ids are not those of the inputs"),
    "changed image": (
        lambda _, meta: meta.update(row_sha=["0" * 16, *meta["row_sha"][1:]]),  # type: ignore[index,misc]
        r"have changed since the teacher saw them \(row train/4x4/003.png\): the signal is stale",
    ),
    "lost field": (lambda tensors, _: tensors.pop("tap.mean"), "its fields are .* the manifest has"),
    "other dtype": (
        lambda tensors, _: tensors.update(prediction=tensors["prediction"].float()), "'prediction' is float32",
    ),
    "fewer draws": (
        lambda tensors, _: tensors.update({n: t[:, :1] for n, t in tensors.items()}),
        r"rows and draws instead of \(3, 2\)",
    ),
    "other shape": (
        lambda tensors, _: tensors.update(prediction=tensors["prediction"][..., :2]), r"predictions have the shape",
    ),
    "another answer": (
        lambda tensors, _: tensors["prediction"].mul_(1.5), "the teacher says something else than its cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIGNAL_FAULTS)
def test_damaged_content_of_a_signal_is_named_and_repaired(
    built: BuiltImages, in_process: InProcess, kind: str
) -> None:
    change, words = SIGNAL_FAULTS[kind]
    before = cache_bytes(built.signal)
    manifest = replace_shard(built.signal, NAME, change)
    built.signals["t0"] = built.signal, manifest
    audited = built.config.model_copy(update={"cache": built.config.cache.model_copy(update={"audit_rows": 50})})
    found = check(BuiltImages(audited, built.inputs, built.inputs_manifest, built.signals))
    assert [(d.cache, d.shard) for d in found] == [(built.signal.uri, NAME)]
    assert re.search(words, found[0].what), found[0].what
    assert list(read_damaged(built.signal)) == [NAME]
    in_process.items.clear()
    again = build_images(built.config)
    assert in_process.items == [NAME]
    shards = {name: data for name, data in cache_bytes(again.signal).items() if name.startswith(("0", "records"))}
    assert shards == {name: before[name] for name in shards}
    assert check(again) == []


INPUTS_FAULTS: dict[str, tuple[Change, str]] = {
    "another image": (put("latents", (1, 0, 0, 0), 7.0), r"row train/4x4/004\.png are not those of its row_sha"),
    "another caption": (
        lambda _, meta: meta.update(captions=["picture 7", *meta["captions"][1:]]),  # type: ignore[index,misc]
        "not those of its row_sha",
    ),
    "caption that is not there": (put("prompt_index", (0,), 9), "row_sha|caption that is not there"),
    "no empty caption": (without_empty, "last caption is not the empty one"),
    "text not a number": (put("pooled", (1, 0), float("nan")), r"'pooled' has a value that is not finite \(caption"),
    "other bucket": (lambda _, meta: meta.update(bucket=[8, 8]), r"those of its bucket \[8, 8\] are \(3, 2, 8, 8\)"),
    "id twice": (lambda _, meta: meta.update(row_ids=["a", "a", "b"]), "2 different row ids instead of 3"),
    "lost rows": (lambda tensors, _: tensors.update(time_ids=tensors["time_ids"][:2]), "time_ids has 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS_FAULTS)
def test_damaged_content_of_inputs_is_named(built: BuiltImages, kind: str) -> None:
    change, words = INPUTS_FAULTS[kind]
    manifest = replace_shard(built.inputs, NAME, change)
    every = check(BuiltImages(built.config, built.inputs, manifest, built.signals))
    found = [damage for damage in every if damage.cache == built.inputs.uri]
    assert [damage.shard for damage in found] == [NAME]
    assert re.search(words, found[0].what), found[0].what


def test_an_image_that_appears_in_two_shards_is_named(built: BuiltImages) -> None:
    def twin(_: dict[str, Tensor], meta: dict[str, JsonValue]) -> None:
        ids = meta["row_ids"]
        assert isinstance(ids, list)
        ids[0] = "train/4x4/000.png"

    manifest = replace_shard(built.inputs, NAME, twin)
    found = check(BuiltImages(built.config, built.inputs, manifest, built.signals))
    assert ("manifest.json", "1 row ids appear twice, the first is train/4x4/000.png") in [
        (d.shard, d.what) for d in found
    ]


def test_another_teacher_in_the_place_of_the_right_one_is_found(built: BuiltImages) -> None:
    found = check(built, lambda *_: ToyDenoiser(1.2))
    assert found
    assert all("relative rms difference mean" in d.what and "tolerance 0.05" in d.what for d in found)
    assert check(built, lambda *_: ToyDenoiser(1.01)) == []


def test_a_teacher_that_says_no_number_now_is_found(built: BuiltImages) -> None:
    assert check(built, lambda *_: ToyDenoiser(float("nan")))


def test_a_real_denoiser_agrees_with_its_cache(
    in_process: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"library": "diffusers", "source": str(unet_folder(tmp_path / "unet"))}
    noise = {"draws_per_row": 2, "prediction_type": "flow", "caption_dropout": 0.3}
    teacher = {"model": model, "guidance_scale": 3.0, "taps": {"mid": "mid_block"}, "batch_rows": 5}
    config = image_config(tmp_path, teachers=(teacher,), source={"noise": noise})
    built = build_images(config, factory=build_teacher)
    assert built.signals["t0"][1].facts["own_prediction_type"] == "v_prediction"
    assert check(built, build_teacher) == []
    found = re.search(r"relative rms difference mean \S+, largest (\S+);?\n", capsys.readouterr().out)
    assert found
    assert float(found[1]) < 1e-3
    other = {**teacher, "guidance_scale": 1.0}
    plain = image_config(tmp_path, teachers=(other,), source={"noise": noise})
    wrong = verify(plain, built.inputs, built.inputs_manifest, built.signals)
    assert all("the teacher says something else" in damage.what for damage in wrong)
    assert wrong


def test_a_signal_of_other_inputs_is_stale(built: BuiltImages) -> None:
    manifest = built.signals["t0"][1].model_copy(update={"parent": "0123456789abcdef"})
    built.signals["t0"] = built.signal, manifest
    assert any("it was made from the inputs 0123456789abcdef" in d.what for d in check(built))


def test_an_average_is_checked_against_its_teachers(in_process: InProcess, tmp_path: Path) -> None:
    config = image_config(tmp_path, teachers=({"guidance_scale": 2.0}, {"guidance_scale": 0.5, "weight": 2.0}))
    built = build_images(config)
    store, manifest = build_average(config, built.inputs_manifest, built.signals, Store(config.cache.dir))
    signals = {**built.signals, "average": (store, manifest)}
    assert verify(config, built.inputs, built.inputs_manifest, signals, factory=toy_denoiser) == []
    for name, words in (
        ("prediction", "not the average of the teachers' signals"),
        ("noise_sha", "does not match its seed"),
    ):

        def change(tensors: dict[str, Tensor], _: dict[str, JsonValue], name: str = name) -> None:
            tensors[name] = tensors[name] * 2

        before = Path(store.path(NAME)).read_bytes()
        changed = replace_shard(store, NAME, change)
        audited = config.model_copy(update={"cache": config.cache.model_copy(update={"audit_rows": 50})})
        found = verify(
            audited, built.inputs, built.inputs_manifest, {**signals, "average": (store, changed)}, factory=toy_denoiser
        )
        assert [(d.cache, d.shard) for d in found] == [(store.uri, NAME)]
        assert words in found[0].what
        build_average(config, built.inputs_manifest, built.signals, Store(config.cache.dir))
        assert Path(store.path(NAME)).read_bytes() == before


def test_repair_is_the_same_command(built: BuiltImages, in_process: InProcess) -> None:
    before = cache_bytes(built.signal)
    Path(built.signal.path(NAME)).write_bytes(b"")
    assert [d.shard for d in check(built)] == [NAME]
    config = built.config
    build_signal(
        config, config.teachers[0], built.inputs, built.inputs_manifest, Store(config.cache.dir), factory=toy_denoiser
    )
    assert in_process.items == [NAME]
    assert cache_bytes(built.signal) == before


def test_the_noise_of_every_row_is_looked_at(built: BuiltImages) -> None:
    shard = load_file(built.signal.path(NAME))
    for row in range(3):
        for draw in range(2):

            def change(tensors: dict[str, Tensor], _: dict[str, JsonValue], at: tuple[int, int] = (row, draw)) -> None:
                tensors.update({n: t.clone() for n, t in shard.items()})
                tensors["noise_sha"][at] += 1

            built.signals["t0"] = built.signal, replace_shard(built.signal, NAME, change)
            (found,) = check(built)
            assert f"does not match its seed: row train/4x4/{row + 3:03}.png, draw {draw}" in found.what
