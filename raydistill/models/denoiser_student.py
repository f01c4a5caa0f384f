"""Denoisers as students: building them, keeping them in a run's `init/` folder, and exporting them for diffusers.

A student carries what its scheduler says: `.process`, the noise schedule and what it predicts, and `.scheduler_config`,
the file that goes with its export; and `.generator`, how one of few steps makes samples (None for others).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from raydistill.config.models import (
    BlocksInit,
    CheckpointInit,
    DiffusersModel,
    GeneratorConfig,
    PretrainedInit,
    ProjectionInit,
    RandomInit,
    StudentConfig,
)
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import fill_network, read_weights
from raydistill.models.blocks import copy_blocks
from raydistill.models.denoiser import (
    SCHEDULER,
    blank_network,
    denoiser_config,
    load_denoiser,
    network_class,
    process_of_scheduler,
    scheduler_config,
)
from raydistill.models.hub import first_line
from raydistill.models.parts import find_part, listing
from raydistill.models.projection.denoiser import project_denoiser
from raydistill.models.projection.measure import Rows
from raydistill.models.projection.report import table
from raydistill.progress import say
from raydistill.signals import JsonValue
from raydistill.storage import Store

VERSION = 1
GENERATOR = "generator.json"
"""File of an export that says how a student of few steps makes samples."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of weights in folders of diffusers; ours are `model.safetensors`."""


def build_denoiser(student: StudentConfig, *, seed: int, rows: Rows | None = None) -> ModelMixin:
    """The student before training: fp32, on the CPU, in evaluation mode, with `.process` and `.scheduler_config`.

    `seed` decides whatever starts at random, the same in every process. `rows` gives training rows for a projection
    that is calibrated. Weights are read in `student.model.dtype`.
    `ConfigError` says what does not fit, or that a scheduler is missing.
    """
    source = student.model
    assert isinstance(source, DiffusersModel), "the caller dispatches by the library of the model"
    schedule = scheduler_config(source)
    kept: dict[str, JsonValue] | None = None
    match student.init:
        case PretrainedInit():
            network = load_denoiser(source)
        case RandomInit():
            network = _random(source, seed)
        case CheckpointInit(path=path):
            network = _from_checkpoint(source, path)
        case BlocksInit():
            network = _random(source, seed)
            larger = load_denoiser(source.model_copy(update={"overrides": {}}))
            found = copy_blocks(network, larger, where=f"student.init (blocks of {source.source})")
            say(f"student: {found}")
            kept = found.facts()
        case ProjectionInit():
            network = _random(source, seed).eval()
            process = process_of_scheduler(schedule)
            report = project_denoiser(network, student.init, rows, process=process, source=source.source)
            say(table(report))
            cast(Any, network).projection = report
        case other:
            raise ConfigError(
                "student.init.kind: a denoiser wants pretrained, checkpoint, random, blocks or projection, found "
                f"{other.kind}."
            )
    nn.Module.to(network, torch.float32)
    _attach(network.eval(), schedule, kept, student.generator)
    return network


def _attach(
    network: ModelMixin,
    schedule: Mapping[str, JsonValue],
    kept: Mapping[str, JsonValue] | None,
    generator: GeneratorConfig | None,
) -> None:
    student = cast(Any, network)
    student.generator = generator
    student.process = process_of_scheduler(schedule)
    student.scheduler_config = dict(schedule)
    student.kept = None if kept is None else dict(kept)


def _random(source: DiffusersModel, seed: int) -> ModelMixin:
    config = denoiser_config(source)
    kind: Any = network_class(config, source.source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network: ModelMixin = kind.from_config(config)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"student.model.overrides: {dict(source.overrides)} make no {kind.__name__} of {source.source}: "
                f"{first_line(error)}. Settings per stage want one entry for each."
            ) from error
    return network


def _from_checkpoint(source: DiffusersModel, path: str) -> ModelMixin:
    """The architecture of `source` with the weights at `path`: a folder of a student or of diffusers, or one file."""
    config = denoiser_config(source)
    part = find_part(path, None, None, names=("unet", "transformer"), weights=True)
    if not part.is_file:
        files = [name for name in ("model.safetensors", WEIGHTS) for _ in part.folder.glob(f"{name}*")]
        if not files:
            raise ConfigError(
                f"student.init.path: wanted weights (model.safetensors or {WEIGHTS}) in {part.folder}, found "
                f"{listing(part.folder)}. Point at a folder that diffusers or raydistill wrote, or at one file."
            )
        state = read_weights(part.folder, name=files[0])
        if (part.folder / "config.json").is_file() and (changed := _changed(config, part.config)):
            raise ConfigError(
                f"student.init.path: wanted weights for {source.source}, found a model with other settings in "
                f"{part.folder}: {', '.join(changed)}. Point student.model.source at the model that they belong to."
            )
    else:
        state = read_weights(part.root)
    network = blank_network(config, source=source.source)
    try:
        fill_network(network, state, where=f"student.init.path ({path})")
    except DataError as error:
        raise ConfigError(f"{error} student.model.source is {source.source}.") from error
    return network


def save_denoiser(network: ModelMixin, folder: Path) -> None:
    """Write a student so that `load_denoiser_student` gives it back bit for bit.

    The folder gets `config.json`, `scheduler_config.json`, `model.safetensors` (tensors by the names they have in
    memory) and, last, `student.json`; where that stands, the folder is whole.
    """
    student = cast(Any, network)
    _require_described(network)
    store = Store(folder)
    store.publish("config.json", json.dumps(clean_config(network), indent=2, sort_keys=True) + "\n")
    store.publish(SCHEDULER, json.dumps(student.scheduler_config, indent=2, sort_keys=True) + "\n")
    state = _state(network)
    store.publish("model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    generator: GeneratorConfig | None = getattr(network, "generator", None)
    about: dict[str, JsonValue] = {
        "version": VERSION, "kind": "denoiser", "kept": student.kept,
        "generator": None if generator is None else generator.model_dump(mode="json"),
    }  # fmt: skip
    store.publish("student.json", json.dumps(about, indent=1) + "\n")


def load_denoiser_student(folder: Path, *, weights: Path | None = None, dtype: torch.dtype | None = None) -> ModelMixin:
    """The student of `folder`, with its own weights or those of `weights`, and with `.process`.

    Evaluation mode, CPU, in `dtype` or as they were saved. `DataError` names tensors that are missing, unexpected or of
    another shape.
    """
    network = blank_network(json.loads((folder / "config.json").read_text()), source=str(folder))
    path = folder if weights is None else weights
    fill_network(network, read_weights(path), where=str(path), dtype=dtype)
    about = json.loads((folder / "student.json").read_text())
    generator = about.get("generator")
    _attach(
        network,
        json.loads((folder / SCHEDULER).read_text()),
        about["kept"],
        None if generator is None else GeneratorConfig.model_validate(generator),
    )
    return network


def export_denoiser(network: ModelMixin, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a student as a part of a diffusers pipeline, in `dtype`: `unet/` or `transformer/`, and `scheduler/`.

    One of few steps also gets `generator.json`.
    `network` stays as it is. The written configuration is read back, and `DataError` raised if it does not say what the
    student is.
    """
    _require_described(network)
    inside = folder / ("transformer" if "Transformer" in type(network).__name__ else "unet")
    plain = cast(Any, blank_network(clean_config(network), source="the student"))
    fill_network(plain, _state(network), where="the student", dtype=dtype)
    plain.save_pretrained(inside)
    found = json.loads((inside / "config.json").read_text())
    if changed := _changed(clean_config(network), found):
        raise DataError(
            f"{inside}/config.json: wanted the settings of the student, found that diffusers wrote others: "
            f"{', '.join(changed)}. Do not use this export."
        )
    schedule = json.dumps(cast(Any, network).scheduler_config, indent=2, sort_keys=True) + "\n"
    Store(folder / "scheduler").publish(SCHEDULER, schedule)
    generator: GeneratorConfig | None = getattr(network, "generator", None)
    if generator is not None:
        Store(folder).publish(GENERATOR, generator.model_dump_json(indent=2) + "\n")


def clean_config(network: nn.Module) -> dict[str, JsonValue]:
    """The config.json of a network: its settings and class, without the place it was read from."""
    settings: Mapping[str, Any] = cast(Any, network).config
    config = {key: value for key, value in settings.items() if not key.startswith("_")}
    written: dict[str, JsonValue] = json.loads(json.dumps(config))
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **written}


def _changed(wanted: Mapping[str, JsonValue], found: Mapping[str, JsonValue]) -> list[str]:
    """Settings in which two configurations, defaults filled in, differ, as `key (wanted …, found …)`."""
    a, b = (clean_config(blank_network(config, source="the student")) for config in (wanted, found))
    return [
        f"{key} (wanted {json.dumps(a.get(key))}, found {json.dumps(b.get(key))})"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def _require_described(network: nn.Module) -> None:
    """`DataError` unless a network made from its configuration alone has its tensors."""
    blank = blank_network(clean_config(network), source="the student").state_dict()
    ours = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wrong = sorted(n for n in {*ours, *blank} if n not in ours or n not in blank or ours[n] != blank[n].shape)
    if wrong:
        raise DataError(
            f"the student's configuration does not describe it: {len(wrong)} tensors differ, for instance "
            f"{', '.join(wrong[:3])}. It was changed after it was built; change its configuration alike."
        )
