"""What a teacher does on calibration rows: which channels carry how much, and what its blocks are good for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.models.projection.maps import Map
from raydistill.models.projection.structure import RESIDUAL, Structure

Batch = Mapping[str, Tensor]
Rows = Callable[[int], Sequence[Batch]]
"""Gives that many training rows as batches: of text `input_ids`, `position_ids` and `valid`, of images `latents`,
`noise`, `timestep` and what else a denoiser is told."""
Hook = Callable[[Tensor], None]
REMOVED = 8
"""Copies of rows that go through a network at once, each without another block."""
REMOVAL_TOKENS = 2048
"""Tokens of a batch on which the removal of blocks is measured, as far as one row has not more."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows that a network runs on."""

    batches: Sequence[Batch]
    """Each goes through the whole network at once."""
    run: Callable[[nn.Module, Batch], Tensor]
    """The output of a network on a batch: [..., width] of what is compared."""
    change: Callable[[nn.Module, Tensor, nn.Module, Tensor], float]
    """How far the output of the second network is from that of the first."""
    row_tokens: Callable[[Batch], int]
    """Tokens that a row of a batch has in the network, about."""

    def few(self, batch: Batch, tokens: int) -> Batch:
        """The first rows of a batch, as many as have no more than `tokens` together; at least one."""
        rows = max(1, tokens // max(self.row_tokens(batch), 1))
        return {name: tensor[:rows] for name, tensor in batch.items()}


@dataclass(slots=True)
class Measured:
    """Statistics of a teacher."""

    moments: dict[str, Tensor] = field(default_factory=dict)
    """By stored name of a matrix: mean square of each channel that it reads."""
    covariance: Tensor | None = None
    """[n, n]: mean of x xᵀ / mean(x²) over tokens and over the norms that read the residual stream."""
    routed: dict[str, Tensor] = field(default_factory=dict)
    """By canonical name of a router: share of the choices that each expert got."""
    removal: dict[str, float] = field(default_factory=dict)
    """By module of a block: how far the output goes when it is left out."""
    kept: dict[str, float] = field(default_factory=dict)
    """By canonical name of a norm: the share of its input's length that the student's space keeps."""


def measure(
    network: nn.Module, structure: Structure, calibration: Calibration, *, covariance: bool, top_k: int
) -> Measured:
    """Moments, the residual stream's covariance where it is wanted, and how often experts are chosen."""
    found = Measured()
    counts: dict[str, int] = {}
    modules = dict(network.named_modules())
    hooks: dict[str, Hook] = {}
    outputs: dict[str, Hook] = {}

    def moment(name: str) -> Hook:
        def add(x: Tensor) -> None:
            found.moments[name] = found.moments.get(name, 0) + x.pow(2).sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return add

    def spread(x: Tensor) -> None:
        unit = x / x.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        total = unit.T @ unit / len(unit)
        found.covariance = total if found.covariance is None else found.covariance + total

    def choices(name: str) -> Hook:
        def add(logits: Tensor) -> None:
            chosen = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=logits.shape[-1]).float()
            found.routed[name] = found.routed.get(name, 0) + chosen

        return add

    for piece in structure.pieces.values():
        module = piece.stored.removesuffix(".weight")
        if len(piece.spaces) > 1 and not piece.is_table and module in modules:
            hooks[module] = moment(piece.stored)
        if piece.name.endswith(".router.weight") and top_k:
            outputs[module] = choices(piece.name)
    stream = [norm.module for norm in structure.norms.values() if norm.space == RESIDUAL] if covariance else []
    hooks |= dict.fromkeys(stream, spread)
    with _inputs_of(network, hooks, calibration) as runs, _outputs_of(network, outputs):
        runs()
    found.moments = {name: total / counts[name] for name, total in found.moments.items()}
    found.routed = {name: total / total.sum() for name, total in found.routed.items()}
    if found.covariance is not None:
        found.covariance /= max(len(stream), 1) * len(calibration.batches)
    return found


def kept_lengths(
    network: nn.Module, structure: Structure, calibration: Calibration, maps: Mapping[str, Map]
) -> dict[str, float]:
    """For each norm the root mean square of |student's part of its input| / |its input|.

    `maps` are by the norm's canonical name. Of layer norms lengths are those after the mean is taken off.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    hooks: dict[str, Hook] = {}

    def ratio(name: str) -> Hook:
        norm, moved = structure.norms[name], maps[name]

        def add(x: Tensor) -> None:
            x = x.reshape(-1, moved.of)
            part = moved(x, 1)
            if norm.kind == "layer":
                x, part = x - x.mean(1, keepdim=True), part - part.mean(1, keepdim=True)
            share = part.pow(2).sum(1) / x.pow(2).sum(1).clamp_min(1e-20)
            sums[name] = sums.get(name, 0.0) + float(share.sum())
            counts[name] = counts.get(name, 0) + len(x)

        return add

    for name in maps:
        hooks[structure.norms[name].module] = ratio(name)
    with _inputs_of(network, hooks, calibration) as runs:
        runs()
    return {name: (sums[name] / counts[name]) ** 0.5 for name in sums}


def removal_changes(
    network: nn.Module, structure: Structure, calibration: Calibration, *, at_once: int = REMOVED
) -> dict[str, float]:
    """By module of a block: how far the output goes from what it is when it alone is left out; mean over batches.

    A few rows of each batch go through the network once more for each block left out, `at_once` of these copies side by
    side, so that a teacher that is read from disk is read blocks / at_once times.
    Source: Muralidharan et al. 2024, arXiv 2407.14679, Sec. 2.2.
    """
    blocks = structure.block_modules
    changes = [0.0] * len(blocks)
    for batch in (calibration.few(batch, REMOVAL_TOKENS) for batch in calibration.batches):
        rows = len(next(iter(batch.values())))
        whole = calibration.run(network, batch)
        for start in range(0, len(blocks), at_once):
            left_out = blocks[start : start + at_once]
            copies = {name: torch.cat([tensor] * len(left_out)) for name, tensor in batch.items()}
            with _left_out(
                network, structure, {name: slice(i * rows, (i + 1) * rows) for i, name in enumerate(left_out)}
            ):
                out = calibration.run(network, copies)
            for i, part in enumerate(out.split(len(out) // len(left_out))):
                changes[start + i] += calibration.change(network, whole, network, part) / len(calibration.batches)
    return dict(zip(blocks, changes, strict=True))


@contextmanager
def _left_out(network: nn.Module, structure: Structure, rows: Mapping[str, slice]) -> Iterator[None]:
    """Blocks give back what they were given, each in some of the rows."""

    def hook(here: slice) -> Callable[..., Any]:
        def put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = arguments(module, args, kwargs)
            outputs = output if isinstance(output, tuple) else (output,)
            changed = []
            for name, value in zip(structure.block_outputs, outputs, strict=False):
                copy = None if value is None else value.clone()
                if copy is not None:
                    copy[here] = given[name][here]
                changed.append(copy)
            changed += outputs[len(changed) :]
            return tuple(changed) if isinstance(output, tuple) else changed[0]

        return put_back

    handles = [
        network.get_submodule(name).register_forward_hook(hook(here), with_kwargs=True) for name, here in rows.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module was called with, by the names of its parameters."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


@contextmanager
def _inputs_of(network: nn.Module, hooks: Mapping[str, Hook], calibration: Calibration) -> Iterator[Callable[[], None]]:
    """Gives a function that runs all batches; hooks see the inputs of modules as fp32 [tokens, channels]."""
    valid: list[Tensor | None] = [None]

    def seen(hook: Hook) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            hook(flat(module, given, valid[0]))

        return look

    def run() -> None:
        for batch in calibration.batches:
            valid[0] = batch.get("valid")
            calibration.run(network, batch)

    handles = [
        network.get_submodule(name).register_forward_pre_hook(seen(hook), with_kwargs=True)
        for name, hook in hooks.items()
    ]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _outputs_of(network: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Hooks see the first output of modules as fp32 [tokens, channels]."""

    def seen(hook: Hook) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            hook(first.float().reshape(-1, first.shape[-1]))

        return look

    handles = [network.get_submodule(name).register_forward_hook(seen(hook)) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flat(module: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """What goes into a module as fp32 [tokens, channels], without padding."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.GroupNorm):
        x = x.movedim(1, -1)
    elif valid is not None and x.shape[:2] == valid.shape:
        x = x[valid]
    return x.float().reshape(-1, x.shape[-1])
