"""How fast a denoiser is, and how much memory a forward pass takes."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPEED_SECONDS = 4.0
"""Longest time spent on measuring the speed of one model."""


def samples_per_second(
    forward: Callable[[int], int], device: torch.device, *, turns: int, seconds: float = SPEED_SECONDS
) -> float:
    """Samples per second of `forward(turn)`, which returns how many it did; turn 0 is done twice, to warm up.

    It is the median over turns, so that what else the machine does for a moment counts little.
    """
    rates: list[float] = []
    spent = 0.0
    for number, turn in enumerate([0, *range(turns)]):
        _wait(device)
        start = time.perf_counter()
        count = forward(turn)
        _wait(device)
        if number:
            rates.append(count / (elapsed := time.perf_counter() - start))
            spent += elapsed
        if spent > seconds:
            break
    return statistics.median(rates)


def peak_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Most bytes that tensors took at one time during `forward()`, beside those that were there before it.

    Counted by the allocator of a GPU; on a CPU by the tensors that operators return, without their scratch space.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Living() as living:
        forward()
    return living.most


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Living(TorchDispatchMode):
    """Adds up the storages that operators make for as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget() -> None:
            self._known.discard(key)
            self.bytes -= size

        self._known.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, forget)
