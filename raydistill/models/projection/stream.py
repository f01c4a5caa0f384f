"""Running a teacher that does not fit into memory: a block's weights are read when it runs and dropped after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydistill.models.projection.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Streamed:
    """A network whose parameters are on the meta device and whose buffers are real, and where its weights come from."""

    network: nn.Module
    tensors: Tensors
    dtype: torch.dtype
    """Number format in which it runs."""
    blocks: tuple[str, ...]
    """Modules that are read one after another; what stands outside them is read at once."""
    tied: Mapping[str, str]
    """Names of parameters that are another's, by that one."""

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The network, to be run without gradients; its memory is given back at the end."""
        inside = tuple(f"{block}." for block in self.blocks)
        outer = [name for name in self._names() if not name.startswith(inside)]
        handles = []
        for block in self.blocks:
            module = self.network.get_submodule(block)
            names = [name for name in self._names() if name.startswith(f"{block}.")]
            handles.append(module.register_forward_pre_hook(lambda _, __, names=names: self._load(names)))
            # Prepended, so that whoever looks at the block afterwards still sees it with its weights.
            handles.append(module.register_forward_hook(lambda _, __, ___, names=names: self._drop(names)))
        try:
            self._load(outer)
            with torch.no_grad():
                yield self.network
        finally:
            for handle in handles:
                handle.remove()
            self._drop(list(self._names()))

    def _names(self) -> Iterator[str]:
        parameters = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        return (name for name in self.network.state_dict() if name in parameters or name in self.tensors.shapes)

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.tied or name in self.tensors.shapes:
                self._put(name, self.tensors.read(name))
        for alias, source in self.tied.items():
            if alias in names and alias not in self.tensors.shapes:
                module, leaf = self._place(alias)
                module._parameters[leaf] = self.network.get_parameter(source)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            module, leaf = self._place(name)
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _put(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._place(name)
        value = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.network.get_submodule(path), leaf
