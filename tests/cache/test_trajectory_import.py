"""Trajectories of other trainers: read safely, with the sigmas that are stated, and trained on like our own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_cache import InProcess
from video_run import FRAMES, SIDE, T_LIST, video_config, write_parts

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.open import open_dataset
from raydistill.cache.trajectory_import import import_trajectories
from raydistill.cache.verify import verify
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.trajectory import make_validator
from raydistill.storage import Store

SIGMAS = T_LIST[:-1]
SHAPE = (3, FRAMES, SIDE, SIDE)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def write_samples(folder: Path, *, prompts: int = 4, each: int = 2, lead: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(prompts):
        for k in range(each):
            place = folder / f"{i:03}-{k}"
            place.mkdir(parents=True)
            (place / "prompt.txt").write_text(f"prompt {i}\n")
            clean, path = torch.randn(SHAPE, generator=generator), torch.randn(3, *SHAPE, generator=generator)
            torch.save(clean[None] if lead else clean, place / "latent.pth")
            torch.save(path[None] if lead else path, place / "path.pth")


def config_of(parts: Path, home: Path, imported: str | None = None) -> RunConfig:
    plain = video_config(parts, home, source={"paths": [str(home / "pairs/*/prompt.txt")]}).model_dump(mode="json")
    plain["teachers"][0]["imported"] = imported
    return RunConfig.model_validate(plain)


@pytest.mark.parametrize("lead", [False, True])
def test_imported_trajectories_are_what_the_files_hold(
    in_process: InProcess, parts: Path, tmp_path: Path, lead: bool
) -> None:
    write_samples(tmp_path / "pairs", lead=lead)
    caches = Store(tmp_path / "cache")
    inputs, manifest = build_inputs(config_of(parts, tmp_path), caches)
    store = import_trajectories(config_of(parts, tmp_path), "ode", tmp_path / "pairs", SIGMAS)
    config = config_of(parts, tmp_path, store.uri.rpartition("/")[2])
    signal, kept = build_signal(config, config.teachers[0], inputs, manifest, caches)
    assert signal.uri == store.uri
    assert kept.facts["sigmas"] == SIGMAS
    assert verify(config, inputs, manifest, {"ode": (signal, kept)}) == []
    seen = 0
    for split in ("train", "held_out"):
        dataset = open_dataset(config, inputs, {"ode": signal}, split=split, fields={"ode": ("clean", "path")})
        for index in range(dataset.num_rows):
            batch: Any = dataset.batch([index])
            draw = index % 2
            text = dataset.captions([index])[0]
            place = tmp_path / f"pairs/{int(text.split()[1]):03}-{draw}"
            wanted = torch.load(place / "path.pth", weights_only=True).reshape(3, *SHAPE)
            assert torch.equal(batch["ode/path"][0], wanted.bfloat16())
            assert torch.equal(batch["noise"], batch["ode/path"][:, 0].float())
            seen += 1
    assert seen == 8
    validator = make_validator(config, inputs=inputs.uri, signals={"ode": signal.uri})
    assert validator.rows.teacher == "ode"


def importing(parts: Path, home: Path, sigmas: list[float] = SIGMAS) -> None:
    build_inputs(config_of(parts, home), Store(home / "cache"))
    import_trajectories(config_of(parts, home), "ode", home / "pairs", sigmas)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran.txt").write_text, ("ran",))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("pickle", "weights_only"), ("list", "one tensor, found list"),
        ("shape", r"wanted the shape \[3, 3, 5, 8, 8\]"), ("nan", "NaN"), ("missing", r"found no path\.pth"),
        ("uneven", r"wanted 2 sample\(s\)"), ("cut", "weights_only"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_named(
    in_process: InProcess, parts: Path, tmp_path: Path, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "pairs")
    file = tmp_path / "pairs/001-0/path.pth"
    match fault:
        case "pickle":
            file.write_bytes(pickle.dumps(Evil()))
        case "list":
            torch.save([torch.zeros(2)], file)
        case "shape":
            torch.save(torch.zeros(4, *SHAPE), file)
        case "nan":
            torch.save(torch.full((3, *SHAPE), torch.nan), file)
        case "missing":
            file.unlink()
        case "uneven":
            for name in ("prompt.txt", "latent.pth", "path.pth"):
                (tmp_path / "pairs/001-0" / name).unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=words):
        importing(parts, tmp_path)
    assert not (tmp_path / "ran.txt").exists()


def test_sigmas_must_fall_and_be_as_many_as_the_states(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "pairs")
    with pytest.raises(ConfigError, match="falling sigmas"):
        importing(parts, tmp_path, [0.5, 0.9, 1.0])
    with pytest.raises(DataError, match="State as many sigmas as there are states"):
        importing(parts, tmp_path, [1.0, 0.5])
