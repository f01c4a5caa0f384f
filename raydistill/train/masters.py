"""Where the fp32 masters of the weights and AdamW's moments live, under every ZeRO stage and precision.

DeepSpeed scatters the state of a parameter over flat buffers, differently at each stage. Here every rank sees it as
`Fragment`s: the stretch `[start, stop)` of a named parameter's numbers that this rank owns. Checkpoints, moving
averages and the final weights are written by name in these terms, so they fit any number of ranks and any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
Named: TypeAlias = Mapping[str, nn.Parameter]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """The stretch `[start, stop)` of a flattened parameter that one rank owns; it may be empty."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Numbers in the whole parameter."""
        return torch.Size(self.shape).numel()


class Masters(Protocol):
    """The training state of one engine's parameters on this rank."""

    fragments: Sequence[Fragment]
    replicated: bool
    """Whether every rank owns everything (stage 0) instead of its share."""

    def read(self, fragment: Fragment, kind: Kind = "master") -> Tensor:
        """The fragment's numbers, [stop - start] fp32; not to be written to."""

    def write(self, fragment: Fragment, value: Tensor, kind: Kind = "master") -> None:
        """Replace the fragment's numbers."""

    def set_steps(self, steps: int) -> None:
        """Set the number of steps that AdamW's bias correction counts."""

    def publish(self) -> None:
        """After `write`s of masters: bring the weights that the forward pass uses in line. All ranks together."""


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of `parameter`, made (as AdamW itself would, at 0 steps) where there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        # torch's AdamW counts steps in a tensor, DeepSpeed's CPU Adam in an int.
        state["step"] = torch.tensor(0.0) if isinstance(optimizer, torch.optim.AdamW) else 0  # type: ignore[assignment]
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


class PlainMasters:
    """Stage 0 in fp32: the parameters are their own masters, and every rank has all of them."""

    replicated = True

    def __init__(self, named: Named, optimizer: torch.optim.Optimizer):
        self._named, self._optimizer = named, optimizer
        self.fragments: Sequence[Fragment] = [Fragment(n, tuple(p.shape), 0, p.numel()) for n, p in named.items()]

    def _find(self, fragment: Fragment, kind: Kind) -> Tensor:
        parameter = self._named[fragment.name]
        tensor = parameter.detach() if kind == "master" else _state(self._optimizer, parameter)[kind]
        return tensor.view(-1)

    def read(self, fragment: Fragment, kind: Kind = "master") -> Tensor:
        return self._find(fragment, kind)

    def write(self, fragment: Fragment, value: Tensor, kind: Kind = "master") -> None:
        self._find(fragment, kind).copy_(value)

    def set_steps(self, steps: int) -> None:
        for parameter in self._named.values():
            _set_step(_state(self._optimizer, parameter), steps)

    def publish(self) -> None:
        """Nothing to do: forward uses the masters."""


class FlatMasters:
    """Stages 1 and 2 (and 0 in bf16): one flat fp32 partition per group, linked to parameters by `_hp_mapping`."""

    replicated = False

    def __init__(self, named: Named, zero: torch.optim.Optimizer, optimizer: torch.optim.Optimizer):
        self._named, self._zero, self._optimizer = named, zero, optimizer
        fragments = []
        for name, parameter in named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            start = mapping.lp_fragment_address.start if mapping is not None else 0
            length = mapping.lp_fragment_address.numel if mapping is not None else 0
            fragments.append(Fragment(name, tuple(parameter.shape), start, start + length))
        self.fragments: Sequence[Fragment] = fragments

    def _find(self, fragment: Fragment, kind: Kind) -> Tensor:
        mapping = self._named[fragment.name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0)
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        tensor = flat.detach() if kind == "master" else _state(self._optimizer, flat)[kind]
        address = mapping.hp_fragment_address
        return tensor.narrow(0, address.start, address.numel)

    def read(self, fragment: Fragment, kind: Kind = "master") -> Tensor:
        return self._find(fragment, kind)

    def write(self, fragment: Fragment, value: Tensor, kind: Kind = "master") -> None:
        self._find(fragment, kind).copy_(value)

    def set_steps(self, steps: int) -> None:
        for group in self._optimizer.param_groups:
            _set_step(_state(self._optimizer, group["params"][0]), steps)

    def publish(self) -> None:
        self._zero.update_lp_params()  # type: ignore[attr-defined]


class PartitionedMasters:
    """Stage 3: each rank owns an equal stretch of every parameter, kept in flat fp32 sub-groups.

    The padding of the last ranks' stretches is not part of the fragments; it stays 0.
    """

    replicated = False

    def __init__(self, named: Named, zero: torch.optim.Optimizer, optimizer: torch.optim.Optimizer):
        self._named, self._zero, self._optimizer = named, zero, optimizer
        fragments = []
        for name, parameter in named.items():
            share = int(parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]
            start = min(share * dist.get_rank(), int(parameter.ds_numel))  # type: ignore[attr-defined]
            stop = min(start + share, int(parameter.ds_numel))  # type: ignore[attr-defined]
            fragments.append(Fragment(name, tuple(parameter.ds_shape), start, stop))  # type: ignore[attr-defined]
        self.fragments: Sequence[Fragment] = fragments

    def _make_states(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:  # type: ignore[attr-defined]
            _state(self._optimizer, flat)

    def read(self, fragment: Fragment, kind: Kind = "master") -> Tensor:
        if kind != "master":
            self._make_states()
        key = None if kind == "master" else kind
        whole = self._zero.get_local_fp32_param(self._named[fragment.name], key)  # type: ignore[attr-defined]
        return whole.detach().narrow(0, 0, fragment.stop - fragment.start)

    def write(self, fragment: Fragment, value: Tensor, kind: Kind = "master") -> None:
        if kind != "master":
            self._make_states()
        parameter = self._named[fragment.name]
        padded = value.new_zeros(int(parameter.ds_tensor.ds_numel))  # type: ignore[attr-defined]
        padded[: value.numel()] = value
        key = None if kind == "master" else kind
        self._zero.set_local_hp_param(padded, parameter, key)  # type: ignore[attr-defined]

    def set_steps(self, steps: int) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:  # type: ignore[attr-defined]
            _set_step(_state(self._optimizer, flat), steps)

    @torch.no_grad()
    def publish(self) -> None:
        # The order of DeepSpeed's own step: partition, copy each sub-group, gather the small persistent parameters.
        zero = self._zero
        zero._partition_all_parameters()  # type: ignore[attr-defined]
        for index in range(len(zero.fp16_groups)):  # type: ignore[attr-defined]
            zero._reassign_or_swap_out_partitioned_parameters(index)  # type: ignore[attr-defined]
        zero._post_step(set())  # type: ignore[attr-defined]


def _set_step(state: dict[str, Tensor], steps: int) -> None:
    old = state["step"]
    state["step"] = torch.full_like(old, steps) if isinstance(old, Tensor) else steps


def assembled(
    masters: Masters, values: Mapping[str, Tensor] | None = None, *, keep: bool
) -> Iterator[tuple[str, Tensor | None]]:
    """Every whole parameter by name, on the CPU, one at a time: masters, or `values` laid out like them.

    All ranks must iterate together; ranks with `keep=False` get None instead of the tensors.
    """
    for fragment in masters.fragments:
        piece = masters.read(fragment) if values is None else values[fragment.name]
        if not masters.replicated and dist.is_initialized() and dist.get_world_size() > 1:
            # The stretches do not overlap, so the sum over ranks is exact.
            whole = torch.zeros(fragment.numel, dtype=torch.float32, device=piece.device)
            whole[fragment.start : fragment.stop] = piece
            dist.all_reduce(whole)
            piece = whole
        yield fragment.name, piece.detach().clone().cpu().view(fragment.shape) if keep else None
