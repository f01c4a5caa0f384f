"""Features of a network's modules, taken out of a forward pass by hooks, and linear maps between two widths.

A tap is the output of a module, by its path (`mid_block`, `down_blocks.1.attentions.0`); of a tuple, its first tensor.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raydistill.errors import ConfigError


class Taps:
    """Keeps what modules of `network` put out, by the name of the tap, in forward passes inside `with`.

        with taps:
            network(...)
        taps.features["mid"]                                    # [samples, channels, height, width]

    The hooks are there inside `with` only: gradient checkpointing runs modules again in the backward pass, which must
    not replace the features. They come after those that DeepSpeed has set, so that a feature is what ZeRO-3 hands on,
    whose backward pass gathers the module's parameters. `where` begins the message about a path that is none.
    """

    def __init__(self, network: nn.Module, paths: Mapping[str, str], *, where: str):
        self._modules = {name: _module(network, path, f"{where}, tap {name!r}") for name, path in paths.items()}
        self._handles: list[RemovableHandle] = []
        self.features: dict[str, Tensor] = {}
        """Of the last forward pass, by tap: [samples, …], with their graph."""

    def __enter__(self) -> Self:
        self.features = {}
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            silent = sorted(set(self._modules) - set(self.features))
            if silent:
                raise ConfigError(
                    f"wanted the features of the taps {', '.join(silent)}, found that the forward pass does not use "
                    "their modules; choose modules that it runs."
                )

    def taken(self) -> dict[str, Tensor]:
        """The features, which are let go here."""
        features, self.features = self.features, {}
        return features

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            self.features[name] = first_tensor(output)

        return keep


def first_tensor(output: object) -> Tensor:
    """The output of a module, or the first tensor of a tuple of them."""
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"wanted a module that puts out a tensor or a tuple of them to tap, found {type(output).__name__}."
        )
    return output


def feature_shapes(
    network: nn.Module, paths: Mapping[str, str], forward: Callable[[nn.Module], object], *, where: str
) -> dict[str, tuple[int, ...]]:
    """Shape of each tap for one sample, from a forward pass without numbers.

    `forward` gets the network with all weights on the meta device and calls it there with one sample, so that even a
    large network costs no time and no memory. The network itself stays as it is.
    """
    call = _Call(network, forward)
    state = {name: tensor.detach().to("meta") for name, tensor in (*call.named_parameters(), *call.named_buffers())}
    with torch.no_grad(), Taps(network, paths, where=where) as taps:
        torch.func.functional_call(call, state, ())
    return {name: tuple(feature.shape[1:]) for name, feature in taps.taken().items()}


class _Call(nn.Module):
    """A forward pass of a network as a module, whose weights can be exchanged."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module], object]):
        super().__init__()
        self.network = network
        self._call = call

    def forward(self) -> object:
        return self._call(self.network)


def feature_width(shape: tuple[int, ...]) -> int:
    """Width of a feature of one sample: channels of [channels, height, width], else the last axis."""
    return shape[0] if len(shape) == 3 else shape[-1]


def adapter(student: tuple[int, ...], teacher: tuple[int, ...], *, seed: int, where: str) -> nn.Module:
    """A linear map from the student's features to the teacher's, both given as shapes of one sample.

    A 1×1 convolution for maps [channels, height, width], a linear layer for tokens [tokens, width]; the identity where
    the widths are equal. `seed` decides the first weights, on every rank alike. `ConfigError` when one is a map and the
    other is not.
    """
    if len(student) != len(teacher) or len(student) not in (1, 2, 3):
        raise ConfigError(
            f"{where}: wanted features of one kind (maps [channels, height, width] or tokens [tokens, width]), found "
            f"{list(student)} of the student and {list(teacher)} of the teacher; tap modules of the same kind."
        )
    widths = feature_width(student), feature_width(teacher)
    if widths[0] == widths[1]:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(*widths, kernel_size=1) if len(student) == 3 else nn.Linear(*widths)


def _module(network: nn.Module, path: str, where: str) -> nn.Module:
    modules = dict(network.named_modules(remove_duplicate=False))
    if path and path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=3, cutoff=0.5) or [n for n in modules if n][:3]
    raise ConfigError(
        f"{where}: wanted a module of {type(network).__name__}, found no {path!r}; names that come near: "
        f"{', '.join(near)}"
    )
