"""Students: building them, keeping them in a run's `init/` folder, and exporting them for everybody."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from raydistill.config.models import (
    CheckpointInit,
    DiffusersModel,
    LanguageModelConfig,
    LayersInit,
    PretrainedInit,
    ProjectionInit,
    RandomInit,
    SharedCoreInit,
    StudentConfig,
    TransformersModel,
)
from raydistill.config.world import WorldModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import differences, fill, own_state, read_weights, require_plain_numbers, skeleton
from raydistill.models.denoiser_student import (
    build_denoiser,
    export_denoiser,
    load_denoiser_student,
    save_denoiser,
)
from raydistill.models.hub import hub_folder
from raydistill.models.layers import keep_layers, num_blocks, spread
from raydistill.models.load import WEIGHT_PATTERNS, language_config, load_language_model, resolve_source
from raydistill.models.projection.language_student import project_language
from raydistill.models.projection.measure import Rows
from raydistill.models.projection.report import REPORT, ProjectionReport, table
from raydistill.models.shared_core import materialise, ranks_of, share_core, with_empty_cores
from raydistill.models.world.files import build_world, load_world_folder, save_world
from raydistill.models.world.model import WorldNetwork
from raydistill.progress import say
from raydistill.signals import JsonValue
from raydistill.storage import Store

VERSION = 1
COMPACT = "compact"
"""Folder, inside an export, of the form that keeps cores and wrappers apart."""
INCIDENTAL = ("transformers_version", "architectures", "dtype", "_name_or_path")
"""Keys of a configuration that say who wrote it, not what it describes."""


Student: TypeAlias = PreTrainedModel | ModelMixin | WorldNetwork
"""A language model of transformers, a denoiser of diffusers with `.process`, or a world model."""


def build_student(student: StudentConfig, *, seed: int, rows: Rows | None = None) -> Student:
    """The student before training: fp32, on the CPU, in evaluation mode.

    `rows` gives training rows, for a projection that is calibrated; it leaves its report in `.projection`.

    `seed` decides a random initialisation, which is the same in every process. Weights are read in
    `student.model.dtype`; a shared core is computed layer by layer from them, so that the whole model never exists in
    fp32 before it is small. `ConfigError` says what does not fit.
    """
    source, init = student.model, student.init
    if isinstance(source, DiffusersModel):
        return build_denoiser(student, seed=seed, rows=rows)
    if isinstance(source, WorldModel):
        return build_world(student, seed=seed)
    match init:
        case RandomInit():
            return _random(source, seed)
        case ProjectionInit():
            model = _random(source, seed)
            report = project_language(model, init, rows, source=source.source)
            say(table(report))
            cast(Any, model).projection = report
            return model
        case CheckpointInit(path=path):
            model = _from_checkpoint(source, path)
        case PretrainedInit():
            model = load_language_model(source)
        case LayersInit():
            model = load_language_model(source)
            require_plain_numbers(model, source=source.source)
            keep = spread(num_blocks(model), init.num_layers) if init.num_layers is not None else init.layers or ()
            model = keep_layers(model, keep)
        case SharedCoreInit(rank=rank):
            model = load_language_model(source)
            require_plain_numbers(model, source=source.source)
            model = share_core(model, rank)
    require_plain_numbers(model, source=source.source)
    model = model.float().eval()
    model.config.dtype = torch.float32
    return model


def _random(source: LanguageModelConfig, seed: int) -> PreTrainedModel:
    config = language_config(source)
    attention = source.attention if isinstance(source, TransformersModel) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
        )
    return model.eval()


def _from_checkpoint(source: LanguageModelConfig, path: str) -> PreTrainedModel:
    """The architecture of `source` with the weights at `path`, every tensor accounted for."""
    place = resolve_source(path)
    resolved = place if isinstance(place, Path) else hub_folder(place, None, weights=True)
    config = language_config(source)
    if (resolved / "student.json").exists():
        model = load_student(resolved)
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"student.init.path: wanted weights for {source.source}, found another kind of model in {resolved}. "
                "Point at the weights of a language model."
            )
        changed = changed_keys(config, model.config)
        if changed:
            raise ConfigError(
                f"student.init.path: wanted weights for {source.source}, found a model with other settings in "
                f"{resolved}: {', '.join(changed)}. Point student.model.source at the model that the weights belong to."
            )
        if isinstance(source, TransformersModel):
            model.set_attn_implementation(source.attention)
        return model
    blank = skeleton(config, attention=source.attention if isinstance(source, TransformersModel) else None)
    state: dict[str, Tensor] | None = None
    if resolved.is_file():
        state = read_weights(resolved)
    elif not any(any(resolved.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ConfigError(
            f"student.init.path: wanted weights (*.safetensors) in {resolved}, found none. Point at a folder that "
            "transformers or raydistill wrote, or at one safetensors file."
        )
    # transformers knows the other layouts in which its models were ever stored, so it does the reading.
    loaded: Any = type(blank).from_pretrained(
        None if state is not None else resolved,
        config=blank.config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation=blank.config._attn_implementation,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    read: PreTrainedModel = loaded[0]
    found: Mapping[str, set[Any]] = loaded[1]
    shapes = [f"{n} (wanted {list(b)}, found {list(a)})" for n, a, b in sorted(found["mismatched_keys"])]
    problem = differences(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), shapes)
    if problem:
        raise ConfigError(
            f"student.init.path: wanted the weights of {source.source} ({type(blank).__name__}) in {resolved}, found "
            f"{problem}. Point student.model.source at the model that the weights belong to."
        )
    return read


def publish_student(student: StudentConfig, *, seed: int, run: Store, rows: Rows | None = None) -> None:
    """Build the student and put it into the folder `init/` of a run; student.json comes last and says it is whole.

    `rows` gives training rows, for a projection that is calibrated; `projection.json` says what it made.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = build_student(student, seed=seed, rows=rows)
        save_student(model, Path(folder))
        report = getattr(model, "projection", None)
        if isinstance(report, ProjectionReport):
            (Path(folder) / REPORT).write_text(report.model_dump_json(indent=1) + "\n")
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "student.json"):
            run.publish(f"init/{path.name}", partial(shutil.copyfile, path))


def save_student(model: Student, folder: Path) -> None:
    """Write `model` so that `load_student` gives it back bit for bit.

    The folder gets `config.json`, `generation_config.json` (a denoiser: `scheduler_config.json`), `model.safetensors`
    (tensors by the names they have in memory, fp32 if the model is) and, last, `student.json`; where that stands, the
    folder is whole.
    """
    if isinstance(model, ModelMixin):
        return save_denoiser(model, folder)
    if isinstance(model, WorldNetwork):
        return save_world(model, folder)
    config = _clean_config(model)
    _require_described(model, config)
    store = Store(folder)
    store.publish("config.json", config.to_json_string(use_diff=False))
    if model.generation_config is not None:
        store.publish("generation_config.json", model.generation_config.to_json_string(use_diff=True))
    state = own_state(model)
    store.publish("model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    ranks = ranks_of(model)
    about: dict[str, JsonValue] = {
        "version": VERSION,
        "kind": "plain" if ranks is None else "shared_core",
        "ranks": None if ranks is None else dict(asdict(ranks)),
        "attention": model.config._attn_implementation,
    }
    store.publish("student.json", json.dumps(about, indent=1) + "\n")


def load_student(folder: Path, *, weights: Path | None = None, dtype: torch.dtype | None = None) -> Student:
    """The student of `folder` with its own weights, or with those of `weights`: a safetensors file or a folder of them.

    Weights may be sharded (`model.safetensors.index.json`), tied ones stored once or twice. Evaluation mode, CPU, in
    `dtype` or as they were saved. `DataError` names tensors that are missing, unexpected or of another shape.
    """
    if not (folder / "student.json").exists():
        raise DataError(
            f"wanted a student in {folder}, found no student.json. Run the stage init first (--stages init)."
        )
    about = json.loads((folder / "student.json").read_text())
    if about["version"] != VERSION:
        raise DataError(
            f"{folder}/student.json: wanted version {VERSION}, found {about['version']}. "
            "Delete the folder and run the stage init again."
        )
    if about["kind"] == "denoiser":
        return load_denoiser_student(folder, weights=weights, dtype=dtype)
    if about["kind"] == "world":
        return load_world_folder(folder, weights=weights, dtype=dtype)
    model = skeleton(AutoConfig.from_pretrained(folder), attention=about["attention"])
    if about["ranks"] is not None:
        model = with_empty_cores(model, about["ranks"])
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    path = folder if weights is None else weights
    return fill(model, read_weights(path), where=str(path), dtype=dtype)


def export_student(model: Student, folder: Path, *, dtype: torch.dtype) -> None:
    """Write `model` as a plain folder of transformers, in `dtype`; experts with a shared core are materialised.

    A denoiser is written as parts of a pipeline of diffusers: `unet/` or `transformer/`, and `scheduler/`. A shared
    core is also written as it is into `compact/`, which `load_student` reads. `model` stays as it is. The written
    configuration is read back, and `DataError` raised if it does not say what the model is.
    """
    if isinstance(model, ModelMixin):
        return export_denoiser(model, folder, dtype=dtype)
    if isinstance(model, WorldNetwork):
        return save_world(model, folder, dtype=dtype)
    config = _clean_config(model)
    _require_described(model, config)
    plain = fill(skeleton(config), own_state(model), where="the student", dtype=dtype) if ranks_of(model) is None else (
        materialise(model, dtype=dtype)
    )  # fmt: skip
    plain.config = _clean_config(plain)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    changed = changed_keys(plain.config, AutoConfig.from_pretrained(folder))
    if changed:
        raise DataError(
            f"{folder}/config.json: wanted the settings of the student, found that transformers wrote others: "
            f"{', '.join(changed)}. Do not use this export."
        )
    if ranks_of(model) is not None:
        save_student(_in_dtype(model, dtype), folder / COMPACT)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model with shared cores in another number format."""
    ranks = ranks_of(model)
    assert ranks is not None, "only models with shared cores have a compact form"
    blank = with_empty_cores(skeleton(model.config), asdict(ranks))
    blank.generation_config = model.generation_config
    return fill(blank, own_state(model), where="the student", dtype=dtype)


def changed_keys(wanted: PreTrainedConfig, found: PreTrainedConfig) -> list[str]:
    """Settings in which two model configurations differ, as `key (wanted …, found …)`."""
    a, b = _plain_json(wanted), _plain_json(found)
    keys = sorted(k for k in {*a, *b} if k not in INCIDENTAL and a.get(k) != b.get(k))
    return [f"{k} (wanted {json.dumps(a.get(k))}, found {json.dumps(b.get(k))})" for k in keys]


def _plain_json(config: PreTrainedConfig) -> Mapping[str, JsonValue]:
    return json.loads(config.to_json_string(use_diff=False))


def _clean_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's configuration without a mark of quantisation, which its plain weights no longer bear."""
    require_plain_numbers(model, source=type(model).__name__)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    return config


def _require_described(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """`DataError` unless a model made from `config` alone has the tensors of `model`."""
    blank = skeleton(config)
    ranks = ranks_of(model)
    if ranks is not None:
        blank = with_empty_cores(blank, asdict(ranks))
    ours = {name: tensor.shape for name, tensor in own_state(blank).items()}
    theirs = {name: tensor.shape for name, tensor in own_state(model).items()}
    shapes = [
        f"{n} (config {list(ours[n])}, model {list(theirs[n])})" for n in ours if ours[n] != theirs.get(n, ours[n])
    ]
    problem = differences(sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours)), shapes)
    if problem:
        raise DataError(
            f"the student's configuration does not describe it: {problem}. "
            "It was changed after it was built; change its configuration alike."
        )
