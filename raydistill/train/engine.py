"""One player's training engine: DeepSpeed ZeRO behind a small door. No other module imports deepspeed.

DeepSpeed gets a player, a module whose forward is the loss, and not a network: two engines that share an autograd
graph crash in DeepSpeed 0.19.8. The caller owns the accumulation boundary, so that a step may have any number of
micro-batches.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydistill.config.base import Config
from raydistill.config.training import OffloadConfig, OptimizerConfig, PhaseConfig
from raydistill.recipes.base import Recipe
from raydistill.signals import Batch, Draws, JsonValue
from raydistill.train.masters import FlatMasters, Masters, PartitionedMasters, PlainMasters
from raydistill.train.parameters import Group
from raydistill.train.schedule import lr_factor

MICRO_BATCHES = "micro_batches"
"""The count over which batch statistics (parts without a count of their own) are averaged."""
T = TypeVar("T")


class Player(nn.Module):
    """What DeepSpeed wraps: the network(s) of one player, whose forward is the recipe's loss."""

    def __init__(self, name: str, recipe: Recipe[Config]):
        super().__init__()
        self.name = name
        self.network = recipe.players()[name]
        self.terms: dict[str, tuple[float, str]] = {}
        """Weight and count of each part, as of the last forward pass."""
        self._recipe = [recipe]  # in a list, so that a recipe that is a module is not registered here

    def forward(
        self,
        batch: Batch,
        rng: Draws | None,
        scales: Mapping[str, float],
        instead: Callable[[], None] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`Σ weight · sum · scale[count]` and the detached part sums; or `instead` is run and nothing computed.

        ZeRO-3 gathers parameters for what runs inside a forward pass, so evaluation has to run there too.
        """
        if instead is not None:
            instead()
            return torch.zeros(()), {}
        assert rng is not None
        loss = self._recipe[0].loss(self.name, batch, rng)
        self.terms = {name: (part.weight, part.count or MICRO_BATCHES) for name, part in loss.parts.items()}
        total: Tensor | None = None
        for part in loss.parts.values():
            if part.weight:
                term = part.weight * scales[part.count or MICRO_BATCHES] * part.sum.float()
                total = term if total is None else total + term
        assert total is not None, f"the recipe gave player {self.name!r} no part with a weight"
        return total, {name: part.sum.detach() for name, part in loss.parts.items()}


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step measured, the same on every rank except `unsound`."""

    loss: float
    parts: dict[str, float]
    """`sum / count` by part, unweighted."""
    counts: dict[str, float]
    """Denominators of the whole step."""
    grad_norm: float
    """Norm of the gradient before clipping; NaN when no step was taken."""
    lr: dict[str, float]
    """Learning rate by group."""
    unsound: tuple[int, ...]
    """This rank's micro-batches whose loss is not finite."""
    taken: bool
    """Whether a step was taken: not where the loss of any rank's micro-batch is not finite."""


class Engine:
    """The optimizer of one player: `update` makes one step out of this rank's micro-batches."""

    def __init__(
        self,
        recipe: Recipe[Config],
        player: str,
        groups: Sequence[Group],
        phase: PhaseConfig,
        optimizer: OptimizerConfig,
        *,
        num_steps: int,
        device: torch.device,
    ):
        ensure_process_group(device)
        deepspeed = _deepspeed(device)
        self.device, self.player, self.groups = device, player, tuple(groups)
        self._recipe, self._config, self._num_steps = recipe, optimizer, num_steps
        self._module = Player(player, recipe)
        # DeepSpeed would make the masters from the rounded bf16 weights; they are restored from these below.
        exact = {n: p.detach() for g in groups for n, p in zip(g.names, g.parameters, strict=True)}
        self._adam = _adamw(groups, optimizer, phase, device)
        self._clip_norm, self._grad_norm = optimizer.clip_norm, math.nan
        self.num_updates = 0
        """Steps taken by this player."""
        stage = phase.zero.stage
        if stage == 0 and phase.precision == "fp32":
            self._adam.register_step_pre_hook(self._clip)
        with _quiet(), _short_collections():
            self._engine, *_ = deepspeed.initialize(
                model=self._module,
                optimizer=self._adam,
                config=deepspeed_config(phase, optimizer, device),
                dist_init_required=False,
            )
        named = {n: p for g in groups for n, p in zip(g.names, g.parameters, strict=True)}
        self.masters: Masters
        if stage == 3:
            self.masters = PartitionedMasters(named, self._engine.optimizer, self._adam)
        elif stage == 0 and phase.precision == "fp32":
            self.masters = PlainMasters(named, self._adam)
        else:
            self.masters = FlatMasters(named, self._engine.optimizer, self._adam)
        if phase.precision == "bf16":
            for fragment in self.masters.fragments:
                self.masters.write(fragment, exact[fragment.name].reshape(-1)[fragment.start : fragment.stop])
            self.masters.publish()

    def update(self, batches: Sequence[Batch], rngs: Sequence[Draws], step: int) -> Update:
        """Optimizer step `step` (from 0) over the micro-batches of all ranks; every rank brings equally many.

        Counts are summed over ranks and micro-batches before the first backward pass, and each micro-batch's loss is
        scaled by ranks / count, since DeepSpeed averages gradients over ranks. So a gradient depends on the samples of
        the step alone.
        """
        counts = self._reduced(_sum(_counts(self._recipe, b) for b in batches))
        ranks = dist.get_world_size()
        scales = {name: ranks / count if count else 0.0 for name, count in counts.items()}
        lr = self._set_learning_rates(step)
        sums: dict[str, Tensor] = {}
        finite: list[Tensor] = []
        with self._others_frozen():
            for batch, rng in zip(batches, rngs, strict=True):
                live = 1.0 if any(_counts(self._recipe, batch).values()) else 0.0
                own = {**scales, MICRO_BATCHES: scales[MICRO_BATCHES] * live}
                loss, parts = self._engine(_to(batch, self.device), rng, own)
                self._engine.backward(loss, scale_wrt_gas=False)
                finite.append(loss.detach().isfinite())
                for name, value in parts.items():
                    weighed = value.double() * (live if self._module.terms[name][1] == MICRO_BATCHES else 1.0)
                    sums[name] = sums[name] + weighed if name in sums else weighed
        terms = self._module.terms
        totals = self._reduced({name: float(value) for name, value in sums.items()})
        parts_mean = {n: totals[n] / counts[terms[n][1]] if counts[terms[n][1]] else 0.0 for n in totals}
        total_loss = math.fsum(terms[n][0] * value for n, value in parts_mean.items())
        unsound = tuple(i for i, ok in enumerate(finite) if not ok)
        taken = self._reduced({"unsound": float(len(unsound))})["unsound"] == 0 and math.isfinite(total_loss)
        self._grad_norm = math.nan
        if taken:
            self._engine.step()
            if not isinstance(self.masters, PlainMasters):  # where `_clip` has measured it
                self._grad_norm = float(self._engine.get_global_grad_norm())
            self.num_updates += 1
        return Update(total_loss, parts_mean, counts, self._grad_norm, lr, unsound, taken)

    def inside_forward(self, call: Callable[[], T]) -> T:
        """The result of `call`, run without gradients where ZeRO-3's parameters are gathered as they are used."""
        results: list[T] = []
        modes = [(m, m.training) for m in self._module.modules()]
        with torch.no_grad():
            self._engine({}, None, {}, lambda: results.append(call()))
        for module, mode in modes:
            module.training = mode
        return results[0]

    def resume(self, num_updates: int) -> None:
        """After `masters` was written from a checkpoint: continue as after `num_updates` steps. All ranks together."""
        self.num_updates = num_updates
        self.masters.set_steps(num_updates)
        self.masters.publish()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the player's network."""
        self._engine.destroy()

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        factor = lr_factor(step, self._config, self._num_steps)
        for group, settings in zip(self.groups, self._adam.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        return {group.name: group.lr * factor for group in self.groups}

    def _clip(self, adam: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for g in self.groups for p in g.parameters]
        limit = math.inf if self._clip_norm is None else self._clip_norm
        self._grad_norm = float(nn.utils.clip_grad_norm_(parameters, limit))

    def _reduced(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, added in fp64."""
        names = sorted(sums)
        values = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    @contextlib.contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Keep the other players' parameters out of this player's graph."""
        own = {id(p) for p in self._module.parameters()}
        others = [
            p
            for name, network in self._recipe.players().items()
            if name != self.player
            for p in network.parameters()
            if p.requires_grad and id(p) not in own
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        yield
        for parameter in others:
            parameter.requires_grad_(True)


def deepspeed_config(phase: PhaseConfig, optimizer: OptimizerConfig, device: torch.device) -> dict[str, JsonValue]:
    """DeepSpeed's configuration of a phase.

    In bf16, stage 0 runs as stage 1: DeepSpeed's stage-0 optimizer accumulates gradients in bf16 and takes a stray
    AdamW step while it is built, whereas stage 1 keeps fp32 masters and gradients, in less memory.
    """
    stage: int = phase.zero.stage
    if stage == 0 and phase.precision == "bf16":
        stage = 1
    zero: dict[str, JsonValue] = {"stage": stage, "overlap_comm": stage == 2 and device.type == "cuda"}
    if stage == 3:
        # By default DeepSpeed treats blocks of experts as one module, for experts that a rank may not use. Those of
        # transformers 5 are stacked and always used, and its hook breaks where a block's input needs no gradient,
        # as in a model that is frozen up to its first experts.
        zero["leaf_module"] = {"classes": []}
    if phase.zero.offload_optimizer is not None:
        zero["offload_optimizer"] = _offload(phase.zero.offload_optimizer)
    if phase.zero.offload_parameters is not None:
        zero["offload_param"] = _offload(phase.zero.offload_parameters)
    config: dict[str, JsonValue] = {
        "train_micro_batch_size_per_gpu": 1,  # only feeds DeepSpeed's own sample counter
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    # DeepSpeed clips at 1 unless told otherwise. Stage 0 is clipped by torch (`Engine._clip`), which tells the norm.
    config["gradient_clipping"] = (optimizer.clip_norm or 0.0) if stage > 0 else 0.0
    if phase.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def ensure_process_group(device: torch.device) -> None:
    """Make a group of one rank where no launcher has made any."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)


def _offload(offload: OffloadConfig) -> dict[str, JsonValue]:
    settings: dict[str, JsonValue] = {"device": offload.device, "pin_memory": offload.pin_memory}
    if offload.nvme_path is not None:
        settings["nvme_path"] = offload.nvme_path
    return settings


def _adamw(
    groups: Sequence[Group], optimizer: OptimizerConfig, phase: PhaseConfig, device: torch.device
) -> torch.optim.Optimizer:
    settings = [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups]
    if phase.zero.offload_optimizer is not None and device.type == "cuda":
        # With the state in host memory the step runs there; DeepSpeed's vectorised Adam is several times faster.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(settings, betas=optimizer.betas, eps=optimizer.eps, adamw_mode=True)
    return torch.optim.AdamW(settings, betas=optimizer.betas, eps=optimizer.eps)


def _deepspeed(device: torch.device):  # type: ignore[no-untyped-def]
    """The deepspeed module, imported late (it takes seconds) and quietly."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # what launchers set; without one there is one rank
    # DeepSpeed builds a small extension with ninja, which may be installed beside this interpreter only.
    beside = os.path.dirname(sys.executable)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _short_collections() -> Iterator[None]:
    """DeepSpeed's bf16 optimizer collects garbage several times while it is built; spare it all older objects."""
    gc.freeze()
    yield
    gc.unfreeze()


def _counts(recipe: Recipe[Config], batch: Batch) -> dict[str, float]:
    counts = recipe.counts(batch)
    return {**counts, MICRO_BATCHES: 1.0} if any(counts.values()) else {**counts, MICRO_BATCHES: 0.0}


def _sum(terms: Iterator[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for term in terms:
        for name, value in term.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _to(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
