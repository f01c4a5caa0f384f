"""How much memory tensors take at once while a network runs, found on the meta device, where they take none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """While it is entered, counts the storages that operations make and that are still alive.

    The parameters and buffers of `network` do not count. Attention counts as its output alone: fused kernels, which run
    outside the meta device, keep no matrix of it.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.now = 0
        """Bytes that live."""
        self.most = 0
        """The most that it has been."""
        # Held, so that their ids stay theirs; the others are forgotten with their storages.
        self._known: dict[int, torch.UntypedStorage | None] = {
            id(storage): storage for storage in (tensor.untyped_storage() for tensor in _tensors(network))
        }
        self._attention = _Attention()

    def __enter__(self) -> Living:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known[id(storage)] = None
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class _Attention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return given["query"].new_empty((*given["query"].shape[:-1], given["value"].shape[-1]))
        return func(*args, **(kwargs or {}))


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
