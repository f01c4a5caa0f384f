"""World models on disk: `config.json` (sizes), `model.safetensors` and, last, `student.json`; and any teacher.

One form serves a run's `init/`, its export, and teachers that are read again.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from raydistill.config.models import CheckpointInit, PretrainedInit, RandomInit, StudentConfig
from raydistill.config.world import WorldModel, WorldPythonModel, WorldSizes, WorldTeacherModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import fill_network, read_weights
from raydistill.models.hashes import file_hashes, file_sha256
from raydistill.models.sources import resolve_source
from raydistill.models.world.model import WorldNetwork, empty_world, random_world
from raydistill.models.world.protocol import require_world_model
from raydistill.signals import JsonValue
from raydistill.storage import Store

VERSION = 1
CLASS = "raydistill.WorldNetwork"


def build_world(student: StudentConfig, *, seed: int) -> WorldNetwork:
    """The student before training: fp32, on the CPU, in evaluation mode; `seed` decides what starts at random."""
    model = student.model
    assert isinstance(model, WorldModel), "the caller dispatches by the library of the model"
    sizes = world_sizes(model)
    match student.init:
        case RandomInit():
            return random_world(sizes, seed=seed)
        case PretrainedInit():
            assert model.source, "the configuration wants weights here"
            return load_world_folder(_folder(model.source), dtype=torch.float32)
        case CheckpointInit(path=path):
            network = empty_world(sizes)
            fill_network(network, read_weights(_place(path)), where=f"student.init.path ({path})", dtype=torch.float32)
            return network
        case other:
            raise ConfigError(
                f"student.init.kind: a world model wants random, pretrained or checkpoint, found {other}."
            )


def world_sizes(model: WorldModel) -> WorldSizes:
    """The architecture of a model of the reference family; `DataError` when its folder does not tell."""
    if model.sizes is not None:
        return model.sizes
    assert model.source, "the configuration wants one of both"
    return read_sizes(_folder(model.source))


def read_sizes(folder: Path) -> WorldSizes:
    """The architecture in the config.json of a folder."""
    path = folder / "config.json"
    if not path.exists():
        raise DataError(f"{folder}: wanted a world model (config.json, model.safetensors), found no config.json.")
    try:
        settings = json.loads(path.read_text())
        if settings.pop("_class", None) != CLASS:
            raise DataError(f"{path}: wanted the configuration of a {CLASS}, found another model's.")
        return WorldSizes.model_validate(settings)
    except (json.JSONDecodeError, ValidationError) as error:
        raise DataError(f"{path} cannot be read as the sizes of a world model: {error}. Export it again.") from error


def save_world(network: WorldNetwork, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `network` so that `load_world_folder` gives it back, in `dtype` or as it is."""
    store = Store(folder)
    settings = {"_class": CLASS, **network.sizes.model_dump(mode="json")}
    store.publish("config.json", json.dumps(settings, indent=1) + "\n")
    state = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in network.state_dict().items()}
    store.publish("model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    about: dict[str, JsonValue] = {"version": VERSION, "kind": "world"}
    store.publish("student.json", json.dumps(about, indent=1) + "\n")


def load_world_folder(folder: Path, *, weights: Path | None = None, dtype: torch.dtype | None = None) -> WorldNetwork:
    """The network of `folder` with its own weights or those of `weights`, in evaluation mode on the CPU.

    `DataError` names tensors that are missing, unexpected or of another shape.
    """
    network = empty_world(read_sizes(folder))
    path = folder if weights is None else weights
    fill_network(network, read_weights(path), where=str(path), dtype=dtype)
    return network


def load_world_teacher(model: WorldTeacherModel) -> nn.Module:
    """A teacher of either library, in evaluation mode on the CPU, with the methods of `protocol.WorldModel`."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    match model:
        case WorldModel():
            if not model.source:
                raise ConfigError("teachers.*.model.sizes: wanted a teacher with weights; name its folder in source.")
            folder = _folder(model.source)
            found = read_sizes(folder)
            if model.sizes is not None and model.sizes != found:
                raise ConfigError(
                    f"{model.source}: wanted the sizes of teachers.*.model.sizes, found {found}; correct them."
                )
            return load_world_folder(folder, dtype=dtype)
        case WorldPythonModel():
            network = _called(model)
            require_world_model(network, where=model.source)
            return network.to(dtype).eval()


def world_identity(model: WorldTeacherModel) -> dict[str, JsonValue]:
    """What decides a teacher's output, for fingerprints: hashes of weights and settings, or of the user's code."""
    match model:
        case WorldModel() if model.source:
            folder = _folder(model.source)
            hashes = file_hashes([folder / "model.safetensors"])
            sizes = read_sizes(folder).model_dump(mode="json")
            return {"sizes": sizes, "weights": [*hashes.values()], "dtype": model.dtype}
        case WorldModel():
            raise ConfigError("teachers.*.model.sizes: wanted a teacher with weights; name its folder in source.")
        case WorldPythonModel():
            file = inspect.getsourcefile(_function(model))
            code = file_sha256(Path(file)) if file else None
            return {"source": model.source, "arguments": dict(model.arguments), "code": code, "dtype": model.dtype}


def _function(model: WorldPythonModel):  # type: ignore[no-untyped-def]
    module, _, name = model.source.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{model.source}: cannot import this function ({error}).") from error


def _called(model: WorldPythonModel) -> nn.Module:
    function = _function(model)
    try:
        inspect.signature(function).bind(**model.arguments)
    except TypeError as error:
        raise ConfigError(f"{model.source}: {error}; `arguments` are {sorted(model.arguments)}.") from error
    built = function(**model.arguments)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{model.source}: wanted a torch.nn.Module, found {type(built).__name__}.")
    return built


def _place(source: str) -> Path:
    place = resolve_source(source)
    if not isinstance(place, Path):
        raise DataError(f"{source}: wanted a folder with a world model, found nothing there.")
    return place


def _folder(source: str) -> Path:
    place = _place(source)
    if not place.is_dir():
        raise DataError(f"{source}: wanted the folder of a world model, found the file {place.name}.")
    return place
