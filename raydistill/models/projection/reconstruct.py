"""How far a projected student's blocks, and the whole student, are from the teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.models.projection.maps import Map
from raydistill.models.projection.measure import Batch, Calibration, arguments
from raydistill.models.projection.structure import Structure

STREAM = "hidden_states"
"""The parameter by which blocks take the residual stream."""
NUMBERS = 1 << 26
"""Most numbers of the student's streams that are kept at once."""


class BlockErrors:
    """Compares blocks. The teacher runs first; what its blocks take and give is kept in the student's basis."""

    def __init__(self, teacher: Structure, student: Structure, blocks: Sequence[int], residual: Map):
        self._teacher, self._student = teacher, student
        self._blocks, self._residual = tuple(blocks), residual
        self._taken: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Keep the streams of the teacher `network` while it runs one batch."""
        place = self._teacher.block_outputs.index(STREAM)

        def keep(block: int) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                taken = arguments(module, args, kwargs)[STREAM]
                given = output[place] if isinstance(output, tuple) else output
                self._taken[block] = self._moved(taken)
                self._given[block] = self._moved(given)

            return look

        handles = [
            network.get_submodule(self._teacher.block_modules[block]).register_forward_hook(
                keep(block), with_kwargs=True
            )
            for block in set(self._blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def errors(self, network: nn.Module, run: Callable[[], Tensor], valid: Tensor | None) -> tuple[float, ...]:
        """Relative error of what each block of the student adds to the stream, each given the teacher's input."""
        found = [float("nan")] * len(self._blocks)
        place = self._student.block_outputs.index(STREAM)

        def give(block: int) -> Callable[..., Any]:
            def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                bound.arguments[STREAM] = self._taken[self._blocks[block]].to(bound.arguments[STREAM].dtype)
                return bound.args, bound.kwargs

            return put

        def compare(block: int) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                taken, given = self._taken[self._blocks[block]], self._given[self._blocks[block]]
                ours = (output[place] if isinstance(output, tuple) else output).float() - taken
                wanted = given - taken
                if valid is not None and valid.shape == wanted.shape[:2]:
                    ours, wanted = ours[valid], wanted[valid]
                found[block] = float((ours - wanted).norm() / wanted.norm().clamp_min(1e-20))

            return look

        handles = []
        for block, name in enumerate(self._student.block_modules):
            module = network.get_submodule(name)
            handles.append(module.register_forward_pre_hook(give(block), with_kwargs=True))
            handles.append(module.register_forward_hook(compare(block)))
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        return tuple(found)

    def _moved(self, x: Tensor) -> Tensor:
        return self._residual(x.float(), x.ndim - 1)


def compare(
    teacher_network: nn.Module,
    student_network: nn.Module,
    teacher: Structure,
    student: Structure,
    blocks: Sequence[int],
    maps: Mapping[str, Map],
    calibration: Calibration,
) -> tuple[tuple[float, ...], float]:
    """Relative error of each block of the student, and how far its output is from the teacher's, on the first batch."""
    errors = BlockErrors(teacher, student, blocks, maps["residual"])
    batch = _cut(calibration.batches[0], maps["residual"].size * 2 * len(set(blocks)))
    with errors.watching(teacher_network):
        wanted = calibration.run(teacher_network, batch)
    with torch.no_grad():
        found = calibration.run(student_network, batch)
    output = calibration.change(teacher_network, wanted, student_network, found)
    return errors.errors(student_network, lambda: calibration.run(student_network, batch), batch.get("valid")), output


def _cut(batch: Batch, numbers_per_token: int) -> Batch:
    """The first rows, as many as there is room for the streams of; at least one."""
    valid = batch.get("valid")
    if valid is None:
        return batch
    rows = max(1, min(len(valid), NUMBERS // max(numbers_per_token * valid.shape[1], 1)))
    return {name: tensor[:rows] for name, tensor in batch.items()}
