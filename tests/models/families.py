"""Tiny random models of the architectures that the framework promises to handle."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen3": {**_HEADS, "tie_word_embeddings": True},
    "gemma2": {**_HEADS, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**_HEADS, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 8.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "gpt_neox": {},
    "phi": {},
    "qwen3_moe": {**_HEADS, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "granitemoe": {**_EXPERTS, "num_local_experts": 4, "logits_scaling": 4.0},
}
MOE = ("qwen3_moe", "mixtral", "granitemoe")


def tiny(family, *, seed=0, dtype=torch.float32, attention="sdpa", **overrides):
    """A random model whose weights are large enough that attention and the head matter."""
    config_class = CONFIG_MAPPING[family.split("-")[0]]
    settings = {**_SMALL, **FAMILIES[family], **overrides}
    if family == "gemma2":
        attention = "eager"  # transformers has no other for it
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**settings), dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
