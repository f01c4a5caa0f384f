"""The two halves of a causal language model of transformers: hidden states, and the head that makes logits of them."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistill.errors import ConfigError
from raydistill.losses.head import Head as Head

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the backbone says about a batch."""

    states: Float[Tensor, "batch seq hidden"]
    """Hidden states after the final norm."""
    router_logits: tuple[Tensor, ...] | None
    """For MoE models asked for it: the gate's logits of each layer, [batch · seq, experts]."""


def require_language_model(module: nn.Module, *, where: str) -> PreTrainedModel:
    """`module` as a model of transformers; raises `ConfigError` when it is none."""
    if not isinstance(module, PreTrainedModel):
        raise ConfigError(f"{where} wants a causal language model of transformers, found {type(module).__name__}")
    return module


def head_of(model: PreTrainedModel, vocab_size: int | None = None) -> Head:
    """The head of `model` over the first `vocab_size` rows (all rows by default).

    Its weight is looked up at each call, inside the forward pass: ZeRO-3 gathers a partitioned weight when it is
    accessed. Raises `ConfigError` when the model has no linear head or fewer rows than the vocabulary.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ConfigError(
            f"wanted a causal language model with a linear output head, found {type(model).__name__} without one; "
            "use a model that AutoModelForCausalLM loads"
        )
    rows = _shape(layer.weight)[0]
    vocab_size = rows if vocab_size is None else vocab_size
    if vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, but the head of {type(model).__name__} has only {rows} rows; "
            "use the tokenizer that belongs to the model, or resize the model's embeddings"
        )
    return Head(layer.weight, getattr(layer, "bias", None), _scale(model), _softcap(model), vocab_size)


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the head's weight, padding included; also when ZeRO-3 has partitioned it."""
    layer = model.get_output_embeddings()
    return 0 if layer is None else _shape(layer.weight)[0]


def _shape(weight: Tensor) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)


def _scale(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    scale = 1.0
    for name in _SCALES:
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    return float(scale * scaling if config.model_type == "hyperclovax" else scale / scaling)


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config()
    caps = [getattr(config, name) for name in _CAPS if getattr(config, name, None)]
    return float(caps[0]) if caps else None


def hidden_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"],
    *,
    router_logits: bool = False,
) -> Hidden:
    """Run the backbone on right-padded rows whose positions restart at 0 in every document (and are 0 in padding).

    Documents packed into one row do not see each other: without an attention mask transformers derives the documents
    from `position_ids`. Padding comes after everything it could disturb, so it needs no mask either.
    Raises `ConfigError` for packed rows and a model that takes no positions.
    """
    backbone = model.base_model
    inputs: dict[str, Tensor | bool] = {"input_ids": input_ids, "use_cache": False}
    if router_logits:
        inputs["output_router_logits"] = True
    takes_positions = _takes_positions(model)
    packed = is_packed(position_ids)
    if packed and not takes_positions:
        raise ConfigError(
            f"{type(model).__name__} takes no position ids, so packed documents would see each other; "
            "set source.packing: false"
        )
    # flash_attention_2 finds the documents only in a batch of one row.
    flat = packed and "flash" in str(model.config._attn_implementation)
    if flat:
        inputs["input_ids"], position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    elif not packed:
        # Counting on through the padding keeps the fast causal path, which needs no [seq, seq] mask.
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if takes_positions:
        inputs["position_ids"] = position_ids
    output = backbone(**inputs)
    states = output.last_hidden_state
    return Hidden(
        states=states.reshape(*input_ids.shape, -1) if flat else states,
        router_logits=output.router_logits if router_logits else None,
    )


def is_packed(position_ids: Int[Tensor, "batch seq"]) -> bool:
    """Whether a row holds a second document of two or more tokens: a 1 anywhere but at index 1."""
    return bool((position_ids[:, 2:] == 1).any()) if position_ids.shape[1] > 2 else False


@torch.no_grad()
def require_own_logits(model: PreTrainedModel, vocab_size: int | None) -> None:
    """Try `model` on six tokens and raise `ConfigError` unless `head_of` and `hidden_states` give its own logits.

    So no scale, cap or adapter of an unknown family goes unnoticed.
    """
    head = head_of(model, vocab_size)
    ids = torch.arange(6, device=head.weight.device)[None] % head.vocab_size
    ours = head.logits(hidden_states(model, ids, ids.new_tensor([range(6)])).states[0])
    theirs = model(input_ids=ids, use_cache=False).logits[0, :, : head.vocab_size].to(ours.dtype)
    if not _close(ours, theirs, head.weight.dtype):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not its head applied to its last hidden states "
            f"(they differ by up to {(ours - theirs).abs().max():.3g}); this architecture is not supported"
        )


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Whether a packed document's hidden states are those it has alone; tried on six tokens.

    True without a trial for a model whose weights are not here (meta device, ZeRO-3 partitions).
    """
    weight = next(model.parameters())
    if weight.is_meta or weight.numel() == 0:
        return True
    if not _takes_positions(model):
        return False
    ids = torch.arange(6, device=weight.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    both = hidden_states(model, ids, ids.new_tensor([[0, 1, 2, 0, 1, 2]])).states[0, 3:]
    alone = hidden_states(model, ids[:, 3:], ids.new_tensor([[0, 1, 2]])).states[0]
    model.train(training)
    return _close(both, alone, weight.dtype)


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of a model in `dtype`."""
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    differs = a != b  # logits of -inf are equal, but their difference is not 0
    error = torch.where(differs, a - b, 0.0).norm()
    return bool(error <= tolerance * b[b.isfinite()].norm().clamp_min(1e-6))


def num_experts(model: PreTrainedModel) -> int:
    """Routed experts per MoE layer; 0 for a dense model."""
    text = model.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    return int(experts) if experts > 1 else 0


def router_aux_coefficient(model: PreTrainedModel) -> float:
    """The model's own weight of the load-balancing loss; 0 for dense models."""
    if not num_experts(model):
        return 0.0
    return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def router_aux_loss(
    model: PreTrainedModel, router_logits: tuple[Tensor, ...], valid: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """The load-balancing loss as the model's own family computes it, over the tokens that are not padding.

    A statistic of the batch: `experts · Σ_e (share of tokens routed to e) · (mean gate probability of e)`, k when even.
    Source: Fedus et al. 2021, arXiv 2101.03961, Eq. 4-6.
    """
    families = [sys.modules[c.__module__] for c in type(model).__mro__]
    balance = next((f.load_balancing_loss_func for f in families if hasattr(f, "load_balancing_loss_func")), None)
    if balance is None:
        raise ConfigError(
            f"{type(model).__name__} has no load-balancing loss in transformers; set the recipe's router_aux_weight: 0"
        )
    top_k = model.config.get_text_config().num_experts_per_tok
    loss: Tensor = balance(router_logits, num_experts(model), top_k, valid)
    return loss
