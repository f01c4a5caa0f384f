"""A teacher's tensors, read one by one, so that a model is projected on a machine that cannot hold it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from raydistill.errors import DataError
from raydistill.models.sources import require_inside

INDEX = "*.safetensors.index.json"
EXPERT_PARTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
)
"""How files name the three matrices of an expert: Qwen's and DeepSeek's way, and Mixtral's."""

Index = tuple[int | slice, ...]
"""A part of a tensor; `()` is the whole."""


class Tensors(Protocol):
    """Named tensors, none of which is in memory before it is asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        ...

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor or a part of it, in the dtype it is stored in."""
        ...


class FileTensors:
    """The tensors of safetensors files. Each is read when asked for, and its memory is the caller's alone."""

    def __init__(self, files: Sequence[Path]):
        self._file: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    self._file[name] = file
                    self._shapes[name] = tuple(handle.get_slice(name).get_shape())

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return self._shapes

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor or a part of it."""
        with _opened(self._file[name]) as handle:
            if not index or not self._shapes[name]:
                return handle.get_tensor(name)
            return handle.get_slice(name)[index]


class MemoryTensors:
    """The tensors of a model that is in memory already."""

    def __init__(self, model: nn.Module):
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor or a part of it."""
        return self._state[name][index]


class ShapeTensors:
    """The names and shapes of a model, and no numbers: what is read lies on the meta device."""

    def __init__(self, model: nn.Module):
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return self._shapes

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor or a part of it, without memory."""
        return torch.empty(self._shapes[name], device="meta")[index]


class StackedExperts:
    """Tensors of `inner` under the names that a model of transformers has in memory.

    There the experts of a layer are two stacked tensors, `experts.gate_up_proj` [experts, 2 units, width] and
    `experts.down_proj` [experts, width, units]; files keep three matrices per expert.
    """

    def __init__(self, inner: Tensors, wanted: Mapping[str, tuple[int, ...]]):
        self._inner = inner
        self._stacked: dict[str, tuple[str, tuple[str, ...]]] = {}
        shapes = dict(inner.shapes)
        for name, shape in wanted.items():
            found = re.fullmatch(r"(.*\bexperts)\.(gate_up_proj|down_proj)", name)
            if name in shapes or found is None:
                continue
            for prefix in (found[1], _mixtral(found[1])):
                for gate, up, down in EXPERT_PARTS:
                    parts: tuple[str, ...] = (gate, up) if found[2] == "gate_up_proj" else (down,)
                    if f"{prefix}.0.{parts[0]}.weight" in shapes:
                        self._stacked[name] = (prefix, parts)
            if name in self._stacked:
                prefix, parts = self._stacked[name]
                for expert in range(shape[0]):
                    for part in parts:
                        shapes.pop(f"{prefix}.{expert}.{part}.weight", None)
                shapes[name] = shape
        for name in wanted:
            stored = _mixtral(name)
            if name not in shapes and stored in shapes:
                shapes[name] = shapes.pop(stored)
        self._shapes = shapes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return self._shapes

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor or a part of it."""
        if name not in self._stacked:
            return self._inner.read(name if name in self._inner.shapes else _mixtral(name), index)
        prefix, parts = self._stacked[name]
        if index and isinstance(index[0], int):
            return self._expert(prefix, parts, index[0])[index[1:]]
        experts = torch.stack([self._expert(prefix, parts, e) for e in range(self._shapes[name][0])])
        return experts[index]

    def _expert(self, prefix: str, parts: tuple[str, ...], expert: int) -> Tensor:
        return torch.cat([self._inner.read(f"{prefix}.{expert}.{part}.weight") for part in parts])


def _mixtral(name: str) -> str:
    """What files of Mixtral call the mixture at `name`."""
    return re.sub(r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1", name)


def files_in(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index lists, or else all; `DataError` when one is missing."""
    indices = sorted(folder.glob(INDEX))
    if not indices:
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise DataError(f"{indices[0]} is no index of weights ({error}). Write or copy the folder again.") from error
    require_inside(indices[0], names)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{indices[0]}: wanted the {len(names)} files it lists, found {len(names) - len(missing)}; missing: "
            f"{', '.join(missing[:3])}. Copy the folder again."
        )
    return [folder / name for name in names]


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"cannot read {file} as safetensors: {error}. The file is damaged or not whole; copy or make it again."
        ) from error
