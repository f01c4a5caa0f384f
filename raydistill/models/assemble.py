"""Putting a model together from a configuration and named tensors, exactly or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from raydistill.errors import ConfigError, DataError
from raydistill.models.sources import require_inside

NAMES_SHOWN = 4
"""Tensor names that a message lists before it only counts."""


def skeleton(config: PreTrainedConfig, *, attention: str | None = None) -> PreTrainedModel:
    """A model of `config` in fp32 whose parameters are not initialised and not tied yet; `fill` does both.

    Its parameters are untouched memory, which costs nothing until it is written to, and `fill` replaces them without
    writing, so that a model is never held twice. Buffers that no checkpoint holds (rotary frequencies) are real.
    """
    config = copy.deepcopy(config)
    with no_init_weights():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention or config._attn_implementation
        )


def fill(
    model: PreTrainedModel, state: Mapping[str, Tensor], *, where: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Give `model` exactly the tensors of `state`, as `dtype` (by default as they are), and tie its weights.

    Tensors are taken over, not copied. A tied weight may be stored once or twice. `DataError` names what is missing,
    unexpected, of another shape or tied but different.
    """
    given = dict(state)
    tied = model.all_tied_weights_keys
    for alias, source in tied.items():
        if alias not in given:
            continue
        if source in given and not torch.equal(given[alias], given[source]):
            raise DataError(
                f"{where}: wanted one tensor for the tied weights {alias} and {source}, found two that differ. "
                "Set tie_word_embeddings to false in its config.json if they were trained apart."
            )
        given.setdefault(source, given[alias])
        del given[alias]
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    _require_all(wanted, given, where=where, kind=type(model).__name__)
    given = _in_dtype(given, dtype)
    for alias, source in tied.items():
        given[alias] = given[source]
    model.load_state_dict(given, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = next(model.parameters()).dtype
    return model.eval()


def fill_network(
    network: nn.Module, state: Mapping[str, Tensor], *, where: str, dtype: torch.dtype | None = None
) -> None:
    """Give a network without tied weights exactly the tensors of `state`, as `fill` does."""
    _require_all(network.state_dict(), state, where=where, kind=type(network).__name__)
    network.load_state_dict(_in_dtype(state, dtype), strict=True, assign=True)
    network.eval()


def _require_all(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str, kind: str) -> None:
    shapes = [
        f"{name} (wanted {list(wanted[name].shape)}, found {list(given[name].shape)})"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problem = differences([n for n in wanted if n not in given], [n for n in given if n not in wanted], shapes)
    if problem:
        raise DataError(
            f"{where}: wanted the {len(wanted)} tensors of {kind}, found {len(given)} tensors; "
            f"{problem}. Use the weights and the config.json of one and the same model."
        )


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in state.items()}


def differences(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """What is wrong with a set of tensors, with counts and the first names; empty when nothing is."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names)


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, …"


def own_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of `model` by name, each once: a tied weight only under the name of its source."""
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }


def read_weights(path: Path, *, name: str = "model.safetensors") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with the file `name` or its sharded form, memory-mapped."""
    if path.is_dir():
        index = path / f"{name}.index.json"
        if not index.exists():
            return _read_file(path / name)
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        require_inside(index, names.values())
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(names.values())):
            tensors.update(_read_file(path / file))
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise DataError(
                f"{index}: wanted the {len(names)} tensors it lists, found {len(tensors)} in its files; "
                f"{differences(missing, [], [])}. Write or copy the folder again."
            )
        return tensors
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise DataError(f"wanted weights in {path}, found no such file. Point at a safetensors file or its folder.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"cannot read {path} as safetensors: {error}. The file is damaged; make it again.") from error


def require_plain_numbers(model: PreTrainedModel, *, source: str) -> None:
    """`ConfigError` unless all parameters are ordinary floating-point numbers, which alone can be trained."""
    ordinary = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    odd = [f"{n} ({p.dtype})" for n, p in model.named_parameters() if p.dtype not in ordinary]
    if odd:
        raise ConfigError(
            f"student {source}: wanted weights in fp32, bf16 or fp16, found {len(odd)} quantised tensors: "
            f"{_first(odd)}. Start from the unquantised form of the model."
        )
