"""How far a projected student's blocks, and the whole student, are from the teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.models.projection.maps import Map
from raydistill.models.projection.measure import Calibration, arguments

STREAM = "hidden_states"
"""The parameter by which blocks take their stream."""
NUMBERS = 1 << 26
"""Most numbers of the student's streams that are kept at once."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A block of the student and the teacher's that it is made from."""

    teacher: str
    """Name of the teacher's module."""
    student: str
    """Name of the student's module."""
    stream: Map
    """The map of the stream that they take and give."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two networks."""

    network: nn.Module
    outputs: tuple[str, ...]
    """What its blocks give back, by the names of the parameters that they take it as."""

    def given(self, output: Any) -> Tensor:
        """The stream among what a block gives back."""
        found: Tensor = output[self.outputs.index(STREAM)] if isinstance(output, tuple) else output
        return found


def compare(
    teacher: Side, student: Side, pairs: Sequence[Pair], calibration: Calibration
) -> tuple[tuple[float | None, ...], float]:
    """Relative error of what each block of the student adds to its stream, and how far the student's output is from the
    teacher's, on the first rows.

    For the blocks each is given the projected input of the teacher's block:
    |student's addition - projected addition of the teacher| / |projected addition of the teacher|; None where the
    student's block stands at another resolution, as in a UNet of fewer stages.
    """
    kept = 2 * sum(pair.stream.size for pair in pairs)
    batch = calibration.few(calibration.batches[0], NUMBERS // max(kept, 1))
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    with _kept(teacher, pairs, taken, given):
        wanted = calibration.run(teacher.network, batch)
    with torch.no_grad():
        found = calibration.run(student.network, batch)
    output = calibration.change(teacher.network, wanted, student.network, found)
    errors: dict[str, float] = {}
    with _fed(student, pairs, taken, given, errors, batch.get("valid")), torch.no_grad():
        calibration.run(student.network, batch)
    return tuple(errors.get(pair.student) for pair in pairs), output


@contextmanager
def _kept(side: Side, pairs: Sequence[Pair], taken: dict[str, Tensor], given: dict[str, Tensor]) -> Iterator[None]:
    """While the teacher runs, keep what its blocks take and give, in the student's spaces, by the student's block."""

    def keep(pair: Pair) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = arguments(module, args, kwargs)[STREAM].float(), side.given(output).float()
            taken[pair.student] = pair.stream(before, before.ndim - 1)
            given[pair.student] = pair.stream(after, after.ndim - 1)

        return look

    with ExitStack() as stack:
        for pair in pairs:
            handle = side.network.get_submodule(pair.teacher).register_forward_hook(keep(pair), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _fed(
    side: Side,
    pairs: Sequence[Pair],
    taken: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    errors: dict[str, float],
    valid: Tensor | None,
) -> Iterator[None]:
    """While the student runs, give each block the teacher's input, and put its error into `errors`."""

    def feed(name: str) -> Callable[..., Any]:
        def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            if bound.arguments[STREAM].shape == taken[name].shape:
                bound.arguments[STREAM] = taken[name].to(bound.arguments[STREAM].dtype)
            return bound.args, bound.kwargs

        return put

    def look_at(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = side.given(output).float()
            if out.shape != taken[name].shape:
                return
            ours, wanted = out - taken[name], given[name] - taken[name]
            if valid is not None and valid.shape == wanted.shape[:2]:
                ours, wanted = ours[valid], wanted[valid]
            errors[name] = float((ours - wanted).norm() / wanted.norm().clamp_min(1e-20))

        return look

    with ExitStack() as stack:
        for pair in pairs:
            module = side.network.get_submodule(pair.student)
            stack.callback(module.register_forward_pre_hook(feed(pair.student), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(look_at(pair.student)).remove)
        yield
