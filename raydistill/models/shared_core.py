"""Mixtures of experts whose experts share one core: W_e = W_core + expand_e · reduce_e.

The core is the mean of a layer's experts and the low-rank wrapper of an expert the truncated SVD of what is left, which
is the best approximation of its rank in the Frobenius norm (Eckart and Young 1936). No data is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations import moe

from raydistill.errors import ConfigError
from raydistill.models.assemble import fill, own_state, skeleton
from raydistill.progress import Progress

MATRICES = ("gate_up_proj", "down_proj")
"""The two stacked matrices of experts, by the names transformers gives them."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks of the wrappers; 0 means that a matrix has none."""

    gate_up_proj: int
    down_proj: int


class Wrapper(nn.Module):
    """One low-rank map per expert, stacked: y = expand_e (reduce_e x)."""

    reduce: Float[Tensor, "experts rank in"]
    expand: Float[Tensor, "experts out rank"]

    def __init__(self, num_experts: int, in_size: int, out_size: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.reduce = nn.Parameter(torch.empty(num_experts, rank, in_size, dtype=dtype))
        self.expand = nn.Parameter(torch.empty(num_experts, out_size, rank, dtype=dtype))

    def forward(self, x: Float[Tensor, "pairs in"], counts: Int[Tensor, " experts"]) -> Float[Tensor, "pairs out"]:
        """Apply each expert to its rows; `x` is sorted by expert and `counts` says how many rows each one has."""
        return per_expert(per_expert(x, self.reduce, counts), self.expand, counts)


class SharedCoreExperts(nn.Module):
    """Experts W_e = W_core + expand_e · reduce_e in place of the stacked experts of transformers.

    The function is that of the materialised experts, computed without forming them. The part of the core is linear on
    both sides of the gate, so it is done once per token instead of once per token and expert:
    W_core x before the gate, and W_core Σ_e g_e h_e after it.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, ranks: Ranks, act_fn: nn.Module, dtype: torch.dtype
    ):
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = act_fn
        sizes = {"gate_up_proj": (hidden_size, 2 * inner_size), "down_proj": (inner_size, hidden_size)}
        self.shared_core = nn.ModuleDict()
        self.wrapper = nn.ModuleDict()
        for name, (in_size, out_size) in sizes.items():
            self.shared_core[name] = _linear(in_size, out_size, dtype)
            rank: int = getattr(ranks, name)
            if rank:
                self.wrapper[name] = Wrapper(num_experts, in_size, out_size, rank, dtype)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ_k g_k expert_k(x), as the experts of transformers compute it."""
        num_tokens, k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(experts, minlength=self.num_experts)
        token = order // k

        inner = self.core("gate_up_proj")(hidden_states)[token]
        wrapper = self.wrapping("gate_up_proj")
        if wrapper is not None:
            inner = inner + wrapper(hidden_states[token], counts)
        gate, up = inner.chunk(2, dim=-1)
        weight = top_k_weights.reshape(-1)[order, None]
        inner = (self.act_fn(gate) * up * weight).to(hidden_states.dtype)

        def per_token(rows: Float[Tensor, "pairs size"]) -> Float[Tensor, "tokens size"]:
            return rows[place].view(num_tokens, k, -1).sum(dim=1)

        out: Tensor = self.core("down_proj")(per_token(inner))
        wrapper = self.wrapping("down_proj")
        return out if wrapper is None else out + per_token(wrapper(inner, counts))

    def core(self, name: str) -> nn.Linear:
        """The core of one of `MATRICES`."""
        module = self.shared_core[name]
        assert isinstance(module, nn.Linear), "cores are linear layers"
        return module

    def wrapping(self, name: str) -> Wrapper | None:
        """The wrappers of one of `MATRICES`; None at rank 0."""
        if name not in self.wrapper:
            return None
        module = self.wrapper[name]
        assert isinstance(module, Wrapper), "wrappers are of class Wrapper"
        return module

    def matrix(self, name: str) -> Float[Tensor, "experts out in"]:
        """The stacked matrices of all experts, materialised: in fp32, or in fp64 where the model is."""
        weight = self.core(name).weight.detach()
        core = weight.to(torch.promote_types(weight.dtype, torch.float32))
        wrapper = self.wrapping(name)
        if wrapper is None:
            return core.expand(self.num_experts, -1, -1).contiguous()
        return torch.baddbmm(core, wrapper.expand.detach().to(core.dtype), wrapper.reduce.detach().to(core.dtype))


def _linear(in_size: int, out_size: int, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without bias whose weight is not initialised."""
    layer = nn.Linear(in_size, out_size, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
    return layer


def per_expert(
    x: Float[Tensor, "pairs in"], weights: Float[Tensor, "experts out in"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "pairs out"]:
    """Rows of `x`, sorted by expert, times the transposed matrix of their expert."""
    aligned = all(size % 8 == 0 for size in weights.shape[1:])
    if x.is_cuda and x.dtype == weights.dtype == torch.bfloat16 and aligned:
        # One kernel for all experts; it wants rows that begin at multiples of 16 bytes.
        return F.grouped_mm(x, weights.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    # unbind, not indexing: the gradient of weights[e] would be a zero tensor of the whole stack for every expert.
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights.unbind(), strict=True)])


def factorise(
    residual: Float[Tensor, "out in"], rank: int, floor: float
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """`reduce` and `expand` whose product is the best approximation of `residual` of rank `rank`, in fp64.

    The left singular vectors U come from the Gram matrix of the smaller side, which costs a fraction of an SVD, and the
    product U Uᵀ R is then the exact projection. Each component is divided evenly between the factors, √σ to either, as
    balanced factors train best; `floor` bounds σ from below there, so that a component that starts at zero has one
    factor that is not zero and can still be learnt.
    """
    matrix = residual.double()
    flipped = matrix.shape[0] > matrix.shape[1]
    if flipped:
        matrix = matrix.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    basis = vectors[:, -rank:].flip(1)
    scale = squares[-rank:].flip(0).clamp_min(0).sqrt().clamp_min(floor).sqrt()
    left, right = basis * scale, (basis.T @ matrix) / scale[:, None]
    return (left.T, right.T) if flipped else (right, left)


def plain_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The stacked experts of `model` by module name; `ConfigError` when it has none that can share a core."""
    found = {name: module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "experts"}
    strange = sorted({type(module).__name__ for module in found.values() if not _has_plain_shape(module)})
    if strange or not found:
        what = f"experts of class {', '.join(strange)}" if strange else f"{type(model).__name__} without experts"
        raise ConfigError(
            f"student.init.kind: shared_core wants a mixture of experts with stacked gate_up_proj [experts, 2 inner, "
            f"hidden] and down_proj [experts, hidden, inner], without biases and with the usual gate (Qwen3-MoE, "
            f"Qwen2-MoE, Mixtral, OLMoE and their relatives), found {what}. Choose such a model or another init.kind."
        )
    return found


def _has_plain_shape(module: nn.Module) -> bool:
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    flags["has_post_expert_norm"] = False
    return (
        all(getattr(module, name, None) is value for name, value in flags.items())
        and {name for name, _ in module.named_parameters()} == set(MATRICES)
        and all(getattr(module, name).ndim == 3 for name in MATRICES)
        and getattr(type(module), "_apply_gate", None) is moe._default_apply_gate
    )


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """Ranks of a model with shared cores, None for a plain model."""
    for module in model.modules():
        if isinstance(module, SharedCoreExperts):
            gate_up, down = module.wrapping("gate_up_proj"), module.wrapping("down_proj")
            return Ranks(gate_up.reduce.shape[1] if gate_up else 0, down.reduce.shape[1] if down else 0)
    return None


def share_core(model: PreTrainedModel, rank: int, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Turn the experts of `model` into shared cores and wrappers of `rank`, in place and layer by layer.

    A matrix whose full rank is below `rank` gets its full rank and is then reproduced exactly.
    """
    layers = plain_experts(model)
    num_threads = torch.get_num_threads()
    # One thread per matrix: many times faster than many threads in one matrix after another, and the result does not
    # depend on their number. MKL's own setting is shared by all threads, so it is put back at the end.
    with (
        Progress("shared core", total=len(layers), unit="layers") as progress,
        ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        for name, experts in layers.items():
            model.set_submodule(name, _compressed(experts, rank, dtype, pool))
            progress.advance(1)
    torch.set_num_threads(num_threads)
    return model


@torch.no_grad()
def _compressed(experts: nn.Module, rank: int, dtype: torch.dtype, pool: Executor) -> SharedCoreExperts:
    stacks: dict[str, Tensor] = {name: getattr(experts, name).detach() for name in MATRICES}
    full = {name: min(stack.shape[1:]) for name, stack in stacks.items()}
    if rank > max(full.values()):
        raise ConfigError(
            f"student.init.rank: wanted {rank}, found expert matrices of rank {full['gate_up_proj']} (gate and up) and "
            f"{full['down_proj']} (down). At most {max(full.values())} has a meaning; far less saves memory."
        )
    module = _empty(experts, Ranks(**{name: min(rank, full[name]) for name in MATRICES}), dtype)
    for name, stack in stacks.items():
        core = stack.mean(dim=0, dtype=torch.float64).to(dtype)
        module.core(name).weight.copy_(core)
        wrapper = module.wrapping(name)
        if wrapper is None:
            continue
        root_mean_square_sigma = float(core.double().norm()) / full[name] ** 0.5
        floor = 1e-3 * (root_mean_square_sigma or 1.0)
        work = partial(_factors, core=core, rank=wrapper.reduce.shape[1], floor=floor)
        for number, (reduce, expand) in enumerate(pool.map(work, stack)):
            wrapper.reduce[number].copy_(reduce)
            wrapper.expand[number].copy_(expand)
    return module


def _factors(matrix: Tensor, core: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor]:
    return factorise(matrix.double() - core.double(), rank, floor)


def _empty(experts: nn.Module, ranks: Ranks, dtype: torch.dtype) -> SharedCoreExperts:
    num_experts, hidden_size, inner_size = experts.get_parameter("down_proj").shape
    act_fn = experts.get_submodule("act_fn")
    return SharedCoreExperts(num_experts, hidden_size, inner_size, ranks, act_fn, dtype)


def with_empty_cores(model: PreTrainedModel, ranks: Mapping[str, int]) -> PreTrainedModel:
    """Give a skeleton the structure of shared cores, not initialised; for loading."""
    for name, experts in plain_experts(model).items():
        model.set_submodule(name, _empty(experts, Ranks(**ranks), torch.float32))
    return model


@torch.no_grad()
def materialise(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The plain model of transformers that computes what `model` does, in `dtype`; shares tensors where it can.

    The products are formed in fp32 (fp64 for a model in fp64) and rounded to `dtype` layer by layer.
    """
    cores = {name: module for name, module in model.named_modules() if isinstance(module, SharedCoreExperts)}
    state = {}
    for name, tensor in own_state(model).items():
        if not any(name.startswith(f"{core}.") for core in cores):
            state[name] = tensor
    for core, module in cores.items():
        for name in MATRICES:
            stack = module.matrix(name)
            state[f"{core}.{name}"] = stack if dtype is None else stack.to(dtype)
    plain = skeleton(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    return fill(plain, state, where=f"the materialised {type(model).__name__}", dtype=dtype)
