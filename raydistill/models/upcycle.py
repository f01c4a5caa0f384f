"""Mixtures of experts made from dense models, for trying things where no trained mixture can be had.

Each expert starts as a copy of the dense MLP, as in sparse up-cycling.
Source: Komatsuzaki et al. 2023, arXiv 2212.05055.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

from raydistill.config.models import TransformersModel
from raydistill.errors import ConfigError
from raydistill.models.assemble import fill, own_state, skeleton
from raydistill.models.layers import keep_layers, num_blocks, spread
from raydistill.models.load import language_config, load_language_model
from raydistill.signals import sample_seed

MLP = ("gate_proj", "up_proj", "down_proj")


def mixtral_from_llama(
    source: str,
    num_experts: int = 4,
    experts_per_token: int = 2,
    noise: float = 0.0,
    noise_rank: int = 16,
    num_layers: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A Mixtral whose experts are the MLPs of the Llama `source` plus a perturbation of each, in fp32.

    The perturbation has rank `noise_rank` and is `noise` times as large as the matrix (root mean square of the
    entries), and it sums to zero over the experts, so that their mean is the dense MLP. The router is random. Routing
    weights sum to 1, so with `noise=0` the mixture computes what the dense model does. `num_layers` keeps only so many
    blocks, evenly spread. Everything follows from the arguments. On the meta device (`torch.device("meta")`) only the
    shape is built.
    """
    dense_model = TransformersModel(source=source, dtype="float32")
    dense = language_config(dense_model)
    if not isinstance(dense, LlamaConfig) or dense.attention_bias or dense.mlp_bias:
        raise ConfigError(
            f"{source}: wanted a Llama without biases, whose MLPs fit into a Mixtral, found a {dense.model_type}. "
            "Choose such a model."
        )
    config = _mixtral(dense, num_experts, experts_per_token, num_layers)
    if torch.get_default_device().type == "meta":
        shape: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return shape
    model = load_language_model(dense_model)
    if num_layers is not None:
        model = keep_layers(model, spread(num_blocks(model), num_layers))
    given = own_state(model)
    state = {name: tensor for name, tensor in given.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (
            given[f"{prefix}.{name}.weight"] + _deviations(
                given[f"{prefix}.{name}.weight"], num_experts, noise, noise_rank, key=f"{prefix}.{name}", seed=seed
            )
            for name in MLP
        )  # fmt: skip
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{prefix}.experts.down_proj"] = down
        state[f"{prefix}.gate.weight"] = _normal(f"{prefix}.gate", seed, num_experts, config.hidden_size) * 0.02
    mixture = skeleton(config)
    mixture.generation_config = model.generation_config
    return fill(mixture, state, where=f"the mixture made from {source}")


def _mixtral(dense: LlamaConfig, num_experts: int, experts_per_token: int, num_layers: int | None) -> MixtralConfig:
    if not 1 <= experts_per_token <= num_experts:
        raise ConfigError(
            f"mixtral_from_llama: wanted experts_per_token from 1 to num_experts ({num_experts}), found "
            f"{experts_per_token}. Correct student.model.arguments."
        )
    return MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=num_layers or dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads or dense.num_attention_heads,
        head_dim=dense.head_dim,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        initializer_range=dense.initializer_range,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=dense.tie_word_embeddings,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        sliding_window=None,
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
    )


def _deviations(
    weight: Float[Tensor, "out in"], num_experts: int, noise: float, rank: int, *, key: str, seed: int
) -> Float[Tensor, "experts out in"]:
    """Low-rank deviations of the experts, of root mean square `noise` times that of `weight`, summing to zero."""
    if noise == 0:
        return weight.new_zeros(num_experts, *weight.shape)
    left = _normal(f"{key}.left", seed, num_experts, weight.shape[0], rank)
    right = _normal(f"{key}.right", seed, num_experts, rank, weight.shape[1])
    product = left @ right
    product -= product.mean(dim=0)
    return product * (noise * weight.square().mean().sqrt() / product.square().mean().sqrt())


def _normal(key: str, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sample_seed(key, 0, "upcycle", seed) % 2**63)
    return torch.randn(shape, generator=generator)
