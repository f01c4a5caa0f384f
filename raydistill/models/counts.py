"""Parameters and floating-point operations of a language model, counted on the meta device.

A token's forward pass costs 2 FLOP per weight that multiplies it, plus attention. Weights that only some tokens meet
(routed experts) count by the share that meets a token; embeddings are looked up and cost nothing.
Source: Kaplan et al. 2020, arXiv 2001.08361, Sec. 2.1 (2 N forward, 4 N backward).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from raydistill.config.models import DiffusersModel, LayersInit, SharedCoreInit, StudentConfig
from raydistill.config.world import WorldModel
from raydistill.models.layers import keep_layers, num_blocks, spread
from raydistill.models.load import empty_language_model
from raydistill.models.shared_core import MATRICES, plain_experts, with_empty_cores

_EXPERT = re.compile(r"(^|\.)experts\.(\d+\.|wrapper\.|\w+$)")
"""Parameters of routed experts: a numbered one's, stacked wrappers or experts. Every token meets a shared core."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention layer."""

    width: int
    """heads · (size of a query + size of a value): multiply-adds per token and key."""
    window: int | None = None
    """Most keys that a token sees; None: all before it."""

    def flops(self, length: float) -> float:
        """FLOP per token in the forward pass, averaged over a causal document of `length` tokens: 2 · width · keys."""
        keys = (length + 1) / 2
        if self.window is not None and self.window < length:
            keys = (self.window * (self.window + 1) / 2 + (length - self.window) * self.window) / length
        return 2 * self.width * keys


@dataclass(frozen=True, slots=True)
class Counts:
    """What one token costs."""

    parameters: int
    """Numbers in the model, tied ones once."""
    active_parameters: int
    """Those that a token uses: all but the experts it is not routed to."""
    products: int
    """Weights that multiply one token."""
    trained_products: int
    """Those of them that are trained."""
    trained_parameters: int
    """Numbers that are trained."""
    head_products: int
    """Weights of the output head."""
    attention: tuple[Attention, ...]

    def forward(self, length: float) -> float:
        """FLOP per token of a forward pass over documents of `length` tokens."""
        return 2.0 * self.products + sum(layer.flops(length) for layer in self.attention)

    def training(self, length: float, *, recompute: bool) -> float:
        """FLOP per token of a training step: forward, gradients of activations and gradients of the trained weights.

        6 N plus three times the attention when everything is trained. `recompute` adds the blocks' forward pass, as
        gradient checkpointing does. Where the first blocks are frozen this is an upper bound.
        """
        attention = sum(layer.flops(length) for layer in self.attention)
        total = 4.0 * self.products + 2.0 * self.trained_products + 3.0 * attention
        return total + 2.0 * (self.products - self.head_products) + attention if recompute else total


def count(model: PreTrainedModel) -> Counts:
    """Count a model, which may be on the meta device; a parameter with `requires_grad` is one that is trained."""
    config = model.config.get_text_config()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    head_weight = head.weight if isinstance(head, nn.Linear) else None
    looked_up.discard(id(head_weight))
    num_experts, top_k = experts_of(config)
    totals = dict.fromkeys(("all", "active", "products", "trained products", "trained"), 0)
    for name, parameter in model.named_parameters():
        size, used = parameter.numel(), parameter.numel()
        routed = bool(_EXPERT.search(name)) and num_experts > 0
        if routed:
            used = size * top_k // num_experts
        multiplies = (
            _is_matrix(parameter, routed and parameter.shape[0] == num_experts) and id(parameter) not in looked_up
        )
        totals["all"] += size
        totals["active"] += used
        totals["products"] += used if multiplies else 0
        totals["trained"] += size if parameter.requires_grad else 0
        totals["trained products"] += used if multiplies and parameter.requires_grad else 0
    return Counts(
        parameters=totals["all"],
        active_parameters=totals["active"],
        products=totals["products"],
        trained_products=totals["trained products"],
        trained_parameters=totals["trained"],
        head_products=0 if head_weight is None else head_weight.numel(),
        attention=tuple(_attention(config)),
    )


def _is_matrix(parameter: torch.Tensor, stacked: bool) -> bool:
    """Whether a parameter multiplies tokens; norms and biases do not, and stacked experts have an axis more."""
    return parameter.ndim >= (3 if stacked else 2)


def experts_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Routed experts of a layer and how many of them a token meets; (0, 0) for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    number = next((int(n) for name in names if (n := getattr(config, name, None))), 0)
    chosen = next((int(n) for name in ("num_experts_per_tok", "moe_topk") if (n := getattr(config, name, None))), 0)
    return (number, chosen) if number > 1 and chosen else (0, 0)


def _attention(config: PreTrainedConfig) -> Iterable[Attention]:
    heads: int = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query: int = getattr(config, "qk_head_dim", None) or head_dim
    value: int = getattr(config, "v_head_dim", None) or head_dim
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind in ("full_attention", "sliding_attention", "chunked_attention"):
            window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
            yield Attention(heads * (query + value), window)


def empty_student(student: StudentConfig) -> PreTrainedModel:
    """The structure of a language model as student on the meta device, whatever its `init`."""
    assert not isinstance(student.model, DiffusersModel | WorldModel), "other models are counted elsewhere"
    model = empty_language_model(student.model)
    init = student.init
    with torch.device("meta"):
        if isinstance(init, LayersInit):
            keep = spread(num_blocks(model), init.num_layers) if init.num_layers is not None else init.layers or ()
            return keep_layers(model, keep)
        if isinstance(init, SharedCoreInit):
            experts = next(iter(plain_experts(model).values()))
            full = {name: min(experts.get_parameter(name).shape[1:]) for name in MATRICES}
            return with_empty_cores(model, {name: min(init.rank, size) for name, size in full.items()})
    return model
