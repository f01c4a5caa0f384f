"""Which weights of a denoiser its smaller copy starts from, and copying them by name.

A UNet that loses stages loses the innermost ones, so that its down stages are the first and its up stages the last of
the larger one. A block that loses layers keeps its first ones; an up block keeps also its last, whose input has the
width of the skip connection from outside. Source: Kim et al. 2023, arXiv 2305.15798, Sec. 3.1. A transformer that loses
blocks keeps blocks evenly spread with both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.models.layers import spread
from raydistill.signals import JsonValue

MIN_SHARE = 0.5
"""Less of the student than this from the larger model is no start from its weights."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a larger model its smaller copy has."""

    tensors: int
    """Tensors copied."""
    parameters: int
    """Numbers copied."""
    of: int
    """Numbers of the smaller model."""
    larger: int
    """Numbers of the larger model."""
    new: tuple[str, ...]
    """Tensors of the smaller model that have another shape in the larger one; they start at random."""

    def facts(self) -> dict[str, JsonValue]:
        """As it stands in student.json."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "of": self.of,
            "larger": self.larger,
            "new": list(self.new),
        }

    def __str__(self) -> str:
        new = f"; {len(self.new)} tensors are new: {', '.join(self.new[:4])}" if self.new else ""
        return (
            f"{self.parameters:,} of the student's {self.of:,} parameters are those of the model with "
            f"{self.larger:,}{new}"
        )


def copy_blocks(student: nn.Module, larger: nn.Module, *, where: str) -> Kept:
    """Give `student` the weights of the blocks of `larger` that it keeps, bit for bit; both of one class.

    Tensors of another shape stay as they are in the student. `ConfigError` when it has more blocks than `larger`, or
    when most of its numbers would not come from there.
    """
    names = source_names(student, larger, where=where)
    have, give = student.state_dict(), larger.state_dict()
    copied = {
        name: give[names[name]] for name in have if names[name] in give and give[names[name]].shape == have[name].shape
    }
    with torch.no_grad():
        for name, tensor in copied.items():
            have[name].copy_(tensor)
    kept = Kept(
        tensors=len(copied),
        parameters=_size(copied),
        of=_size(have),
        larger=_size(give),
        new=tuple(name for name in have if name not in copied),
    )
    if kept.parameters < MIN_SHARE * kept.of:
        raise ConfigError(
            f"{where}: wanted a smaller copy of the model, found that only {kept.parameters:,} of its {kept.of:,} "
            f"parameters fit ({', '.join(kept.new[:3])}, … do not). Change numbers of blocks and layers, not widths, "
            "or use init.kind: random."
        )
    return kept


def source_names(student: nn.Module, larger: nn.Module, *, where: str) -> dict[str, str]:
    """For each tensor of `student` the name of the tensor of `larger` that it would be copied from."""
    prefixes = dict(kept_prefixes(student, larger, where=where))
    found = {}
    for name in student.state_dict():
        parts = name.split(".")
        # The longest path that has moved decides; the rest of the name stays.
        for length in range(len(parts), 0, -1):
            path = ".".join(parts[:length])
            if path in prefixes:
                name_there = ".".join([prefixes[path], *parts[length:]])
                break
        else:
            name_there = name
        found[name] = name_there
    return found


def kept_prefixes(student: nn.Module, larger: nn.Module, *, where: str) -> Iterator[tuple[str, str]]:
    """Paths of the student's modules and those they are copied from."""
    for place in ("down_blocks", "up_blocks"):
        ours, theirs = _list(student, place), _list(larger, place)
        _require_fewer(len(ours), len(theirs), f"{place}", where)
        outermost = len(theirs) - len(ours) if place == "up_blocks" else 0
        for i, block in enumerate(ours):
            here, there = f"{place}.{i}", f"{place}.{i + outermost}"
            yield here, there
            for kind in ("resnets", "attentions"):
                layers, all_layers = _list(block, kind), _list(theirs[i + outermost], kind)
                if not layers or not all_layers:
                    continue
                _require_fewer(len(layers), len(all_layers), f"{here}.{kind}", where)
                for j in range(len(layers)):
                    is_last = place == "up_blocks" and j == len(layers) - 1
                    yield f"{here}.{kind}.{j}", f"{there}.{kind}.{len(all_layers) - 1 if is_last else j}"
    blocks, all_blocks = _list(student, "transformer_blocks"), _list(larger, "transformer_blocks")
    _require_fewer(len(blocks), len(all_blocks), "transformer_blocks", where)
    for k, source in enumerate(spread(len(all_blocks), len(blocks)) if blocks else ()):
        yield f"transformer_blocks.{k}", f"transformer_blocks.{source}"


def _list(module: nn.Module, name: str) -> Sequence[nn.Module]:
    found = getattr(module, name, None)
    return list(found) if isinstance(found, nn.ModuleList) else ()


def _require_fewer(ours: int, theirs: int, what: str, where: str) -> None:
    if ours > theirs:
        raise ConfigError(
            f"{where}: wanted at most {theirs} {what}, as many as the larger model has, found {ours}. Lower "
            "student.model.overrides, or use init.kind: random."
        )


def _size(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
