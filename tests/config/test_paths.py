from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from raydistill.config import paths
from raydistill.config.load import load_config
from raydistill.config.paths import read, require_shared_folder, resolve_paths, source_or_id, written
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("RAYDISTILL_HOME", "RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def load(settings: dict[str, JsonValue]) -> RunConfig:
    base: dict[str, JsonValue] = {
        "name": "toy",
        "source": {"paths": ["data/*.txt"], "tokenizer": "gpt2", "seq_len": 16},
        "teachers": [{"name": "big", "model": {"source": "org/big"}}],
        "student": {"model": {"source": "models/small"}},
        "phases": [
            {
                "name": "one",
                "steps": 2,
                "batch": {"global_size": 8, "micro_size": 4},
                "optimizer": {"student": {"lr": 1}},
            }
        ],
    }
    return load_config([], (), {**base, **settings})


def test_paths_are_taken_against_the_working_folder(work: Path) -> None:
    config = resolve_paths(load({}))
    assert config.run_dir == f"{work}/runs/toy"
    assert config.cache.dir == f"{work}/runs/toy/cache"
    assert config.source.paths == (f"{work}/data/*.txt",)


def test_home_comes_before_the_working_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    assert resolve_paths(load({})).run_dir == f"{tmp_path}/home/runs/toy"
    (work / "data").mkdir()
    (work / "data" / "a.txt").write_text("x")
    assert read("data/*.txt") == f"{work}/data/*.txt"
    (tmp_path / "home" / "data").mkdir(parents=True)
    (tmp_path / "home" / "data" / "a.txt").write_text("x")
    assert read("data/*.txt") == f"{tmp_path}/home/data/*.txt"


def test_hub_ids_stay_and_paths_become_absolute(work: Path) -> None:
    assert source_or_id("org/big") == "org/big"
    (work / "models" / "small").mkdir(parents=True)
    assert source_or_id("models/small") == f"{work}/models/small"
    assert source_or_id("./absent") == f"{work}/absent"
    assert source_or_id("weights/x.gguf") == f"{work}/weights/x.gguf"
    assert source_or_id("run://configs/tiny.yaml") == f"run://{work}/configs/tiny.yaml"
    config = resolve_paths(load({}))
    assert (config.teachers[0].model.source, config.student.model.source) == ("org/big", f"{work}/models/small")


@pytest.mark.parametrize("uri", ["s3://bucket/run", "gs://bucket/a", "/absolute/run"])
def test_uris_and_absolute_paths_stay(work: Path, uri: str) -> None:
    assert written(uri) == uri
    assert read(uri) == uri


def test_package_sources_stay(work: Path) -> None:
    for source in ("pypi://a==1/b.gguf#sha256=00", "package://a/b.gguf"):
        assert source_or_id(source) == source


def test_a_job_writes_into_the_home_folder_and_reads_its_own_files(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (work / "a.txt").write_text("x")
    config = resolve_paths(load({"source.paths": ["a.txt"]}))
    assert config.run_dir == f"{tmp_path}/me/raydistill/runs/toy"
    assert config.source.paths == (f"{work}/a.txt",)
    require_shared_folder(config, 1)
    with pytest.raises(ConfigError, match=r"cluster of 2.*RAYDISTILL_HOME") as caught:
        require_shared_folder(config, 2)
    assert caught.value.exit_status == 2


def test_a_job_with_shared_folders_may_run_on_several_nodes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    require_shared_folder(resolve_paths(load({"run_dir": "s3://bucket/run"})), 8)
    assert paths.inside_ray_job()
