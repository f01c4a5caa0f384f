"""Credentials stay out of files and logs; what comes from data stays inside its folder; nothing is unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_reliability import finish, problem, write_config
from toys import save_model, tiny_llama

from raydistill.config.load import load_config
from raydistill.config.models import TransformersModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import read_weights
from raydistill.models.load import load_language_model
from raydistill.models.projection.tensors import files_in
from raydistill.sources.image_files import find_image_files
from raydistill.sources.tars import samples

__all__ = ["problem"]
CONFIG = str(Path(__file__).parents[1] / "configs/lm_topk.yaml")
PLANTED = {
    "AWS_ACCESS_KEY_ID": "planted-access-key",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "HF_TOKEN": "planted-hub-token",
    "WANDB_API_KEY": "planted-wandb-key",
    "GOOGLE_APPLICATION_CREDENTIALS": "/planted/credentials.json",
}


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=s3://planted-key:planted-secret@bucket/run",
        "cache.dir=s3://planted-key:planted-secret@bucket/cache",
        "teachers.0.model.source=https://planted-user:planted-secret@host/x",
        f"teachers.0.model.source=hf_{'planted' * 6}",
        "name=AKIAPLANTEDPLANTED00",
    ],
)
def test_credentials_in_a_configuration_are_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        load_config([CONFIG], [override])
    assert "planted" not in str(caught.value).lower()


@pytest.mark.parametrize("uri", ["s3://bucket/run", "gs://bucket/a@b:c", "https://host:8080/x"])
def test_addresses_without_credentials_pass(uri: str) -> None:
    assert load_config([CONFIG], [f"run_dir={uri}"]).run_dir == uri


@pytest.mark.slow
def test_planted_credentials_of_the_environment_are_in_no_file_and_no_log(
    problem: Path,
    tmp_path: Path,
) -> None:
    finish(write_config(problem, tmp_path), **PLANTED)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.json" for path in files)
    assert any(path.name == "log.txt" for path in files)
    for path in files:
        found = [value for value in PLANTED.values() if value.encode() in path.read_bytes()]
        assert not found, path


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"])
def test_an_index_of_weights_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DataError, match="wanted files of its own folder"):
        read_weights(folder)
    with pytest.raises(DataError, match="wanted files of its own folder"):
        files_in(folder)


def test_a_tar_is_read_in_memory_and_its_links_are_passed_by(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name in ("../outside.png", "a.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = list(samples(find_image_files([str(file)])[0], None))
    assert [sample.key for sample in found] == ["../outside", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]
    assert not (tmp_path.parent / "outside.png").exists()


class Evil:
    """What pickle would run on loading."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(tmp_path / "ran")}))
    with pytest.raises((ConfigError, DataError)):
        load_language_model(TransformersModel(source=str(tmp_path / "model")))
    assert not (tmp_path / "ran").exists()
