"""Hidden states and heads against the models' own logits, and packing against documents alone."""

import pytest
import torch
from families import FAMILIES, MOE, VOCAB, tiny

from raydistill.errors import ConfigError
from raydistill.models.language import (
    head_of,
    hidden_states,
    is_packed,
    isolates_documents,
    num_experts,
    require_own_logits,
    router_aux_coefficient,
    router_aux_loss,
)


def _ids(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def _positions(*lengths, pad=0):
    return torch.cat([*(torch.arange(n) for n in lengths), torch.zeros(pad, dtype=torch.long)])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_and_hidden_states_give_the_models_own_logits(family):
    model, ids = tiny(family), _ids(2, 9)
    head = head_of(model)
    states = hidden_states(model, ids, _positions(9).expand(2, -1)).states
    ours = head.logits(states.flatten(0, 1)).view(2, 9, VOCAB)
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    require_own_logits(model, VOCAB)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_and_padding_change_nothing(family, attention):
    model, ids = tiny(family, attention=attention), _ids(2, 14)
    packed = hidden_states(model, ids, torch.stack([_positions(5, 6, pad=3), _positions(4, 10)])).states
    for row, start, stop in [(0, 0, 5), (0, 5, 11), (1, 0, 4), (1, 4, 14)]:
        alone = hidden_states(model, ids[row : row + 1, start:stop], _positions(stop - start)[None]).states[0]
        torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-3, atol=1e-4)
    assert isolates_documents(model)


@torch.no_grad()
def test_padded_but_unpacked_rows_take_the_path_without_a_mask():
    model, ids = tiny("llama"), _ids(2, 10)
    positions = torch.stack([_positions(6, pad=4), _positions(10)])
    assert not is_packed(positions)
    padded = hidden_states(model, ids, positions).states
    alone = hidden_states(model, ids[:1, :6], _positions(6)[None]).states
    torch.testing.assert_close(padded[:1, :6], alone, rtol=1e-4, atol=1e-5)


def test_single_token_documents_do_not_count_as_packing():
    assert not is_packed(_positions(1, 1)[None])
    assert is_packed(_positions(1, 2)[None])
    assert is_packed(_positions(3, 2, pad=2)[None])


def test_model_without_positions_refuses_packed_rows():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, conv_kernel=2)
    model = MambaForCausalLM(config).eval()
    assert not isolates_documents(model)
    with pytest.raises(ConfigError, match="packing"):
        hidden_states(model, _ids(1, 6), _positions(3, 3)[None])
    hidden_states(model, _ids(1, 6), _positions(6)[None])


def test_model_whose_logits_are_something_else_is_refused():
    model = tiny("granite")
    model.config.logits_scaling = 2.0
    wrong = model.forward
    model.forward = lambda **inputs: type("Output", (), {"logits": wrong(**inputs).logits * 3})()
    with pytest.raises(ConfigError, match="not supported"):
        require_own_logits(model, VOCAB)


def test_vocabulary_larger_than_the_head_is_refused():
    with pytest.raises(ConfigError, match=f"has {VOCAB + 1} ids.*only {VOCAB} rows"):
        head_of(tiny("llama"), VOCAB + 1)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("padding", [0, 4])
def test_router_loss_is_transformers_own_with_its_gradient(family, padding):
    model, ids = tiny(family), _ids(2, 10)
    assert num_experts(model) == 4
    assert router_aux_coefficient(model) == 0.02
    valid = torch.arange(10).expand(2, -1) < torch.tensor([[10], [10 - padding]])
    positions = torch.where(valid, torch.arange(10), 0)
    hidden = hidden_states(model, ids, positions, router_logits=True)
    ours = router_aux_loss(model, hidden.router_logits, valid)
    theirs = model(input_ids=ids, attention_mask=valid.long(), output_router_logits=True).aux_loss
    torch.testing.assert_close(ours, theirs)
    gates = [p for n, p in model.named_parameters() if "gate" in n or "router" in n]
    for a, b in zip(
        torch.autograd.grad(ours, gates, allow_unused=True),
        torch.autograd.grad(theirs, gates, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_router_logits_survive_activation_checkpointing():
    model, ids = tiny("qwen3_moe"), _ids(1, 8)
    valid = torch.ones(1, 8, dtype=torch.bool)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        hidden = hidden_states(model, ids, _positions(8)[None], router_logits=True)
        assert len(hidden.router_logits) == 2
        loss = router_aux_loss(model, hidden.router_logits, valid)
        gradients.append(torch.autograd.grad(loss, model.model.layers[0].mlp.gate.weight)[0])
    torch.testing.assert_close(*gradients)


def test_dense_models_have_no_router_loss():
    assert num_experts(tiny("llama")) == 0
    assert router_aux_coefficient(tiny("llama")) == 0.0
