"""A Hub that answers, refuses, or cannot be reached."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from raydistill.errors import DataError
from raydistill.models import hub


def no_network(*_: object, **__: object) -> None:
    raise httpx2.ConnectError("Name or service not known")


def test_a_hub_out_of_reach_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.HfApi, "model_info", no_network)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"org/model is neither a folder .*cannot be reached \(Name or service not known\)"
    ):
        hub.hub_folder("org/model", weights=True)
    assert time.monotonic() - start < 5


def test_what_was_downloaded_before_is_used_when_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached(repo: str, **options: object) -> str:
        asked.append(options)
        if not (tmp_path / "config.json").exists():
            raise LocalEntryNotFoundError("nothing")
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(hub, "snapshot_download", cached)
    with pytest.raises(DataError, match="nor in the Hub's download cache"):
        hub.hub_folder("org/model", weights=False)
    (tmp_path / "config.json").touch()
    assert hub.hub_folder("org/model", weights=False) == tmp_path
    with pytest.raises(DataError, match="nor in the Hub's download cache"):
        hub.hub_folder("org/model", weights=True)  # a tokenizer alone was downloaded
    (tmp_path / "pytorch_model.bin").touch()
    assert hub.hub_folder("org/model", weights=True) == tmp_path
    assert all(options["local_files_only"] for options in asked)


@pytest.mark.parametrize(("files", "weights"), [(["model.safetensors", "pytorch_model.bin"], "model*.safetensors")])
def test_safetensors_are_preferred_and_subfolders_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], weights: str
) -> None:
    asked = {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.update(options) or str(tmp_path))
    assert hub.hub_folder("org/model", "v1", weights=True) == tmp_path
    assert weights in asked["allow_patterns"]
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["*/*"]
    assert asked["revision"] == "v1"


def test_a_repository_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub/api/models/org/model"))
        raise RepositoryNotFoundError("Repository Not Found for url", response=response)

    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    with pytest.raises(DataError, match="org/model is no local folder, and the Hub refuses it: Repository Not Found"):
        hub.hub_folder("org/model", weights=True)


def test_parts_of_a_pipeline_leave_the_checkpoints_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "model_index.json", "whole.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "unet/config.json", "unet/model.safetensors",
        "tokenizer/merges.txt", "vae/deeper/model.safetensors", "vae/model.bin",
    ]  # fmt: skip
    asked: dict[str, list[str]] = {}
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.update(options) or str(tmp_path))

    def parts(**options: object) -> list[str]:
        assert hub.hub_parts("org/model", "v1", **options) == tmp_path
        return asked["allow_patterns"]

    own = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert parts(folders=["vae"], weights=True) == own
    assert parts(folders=["vae"], weights=False) == own[:1]
    assert parts(folders=["vae", ""], beside=["tokenizer"], weights=True) == sorted(
        [*own, "model_index.json", "tokenizer/merges.txt"]
    )
    info.siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
    assert parts(folders=["vae", ""], weights=True) == ["config.json", "model.safetensors"]


def test_parts_that_were_downloaded_before_are_used_when_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo: str, **options: object) -> str:
        assert options["local_files_only"]
        if not any(tmp_path.iterdir()):
            raise LocalEntryNotFoundError("nothing")
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(hub, "snapshot_download", cached)
    with pytest.raises(DataError, match="nor in the Hub's download cache"):
        hub.hub_parts("org/model", folders=["vae"], weights=True)
    (tmp_path / "vae").mkdir()
    assert hub.hub_parts("org/model", folders=["vae"], weights=True) == tmp_path
