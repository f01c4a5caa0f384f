"""Shared cores against the experts they stand for."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from raydistill.config.load import load_config
from raydistill.config.models import StudentConfig
from raydistill.errors import ConfigError
from raydistill.models.shared_core import (
    MATRICES,
    SharedCoreExperts,
    factorise,
    materialise,
    plain_experts,
    ranks_of,
    share_core,
)
from raydistill.models.student import build_student, export_student, load_student, save_student
from raydistill.models.upcycle import mixtral_from_llama
from raydistill.train.parameters import parameter_groups

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, intermediate_size=48, moe_intermediate_size=16, num_experts=5, head_dim=8),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, intermediate_size=48, moe_intermediate_size=16, num_experts=5, shared_expert_intermediate_size=24
    ),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=20, num_local_experts=4),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=16, num_experts=5),
}
FULL_RANK = 32
IDS = torch.arange(3, 51).reshape(4, 12)


def mixture(kind="qwen3_moe", *, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    # the grouped kernel that transformers takes by default knows no fp64
    config = copy.deepcopy(CONFIGS[kind])
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def plain_forward(experts: SharedCoreExperts, x, index, weights):
    """Second implementation: every expert as its own matrices, one token at a time."""
    gate_up, down = experts.matrix("gate_up_proj"), experts.matrix("down_proj")
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, g in zip(index[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += g * (down[e] @ (nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("kind", CONFIGS)
def test_full_rank_gives_the_teacher_back(kind):
    teacher = mixture(kind, dtype=torch.float64)
    student = share_core(copy.deepcopy(teacher), FULL_RANK, dtype=torch.float64)
    assert ranks_of(teacher) is None
    assert (logits(student) - logits(teacher)).abs().max() < 1e-10
    for name, experts in plain_experts(teacher).items():
        for matrix in MATRICES:
            rebuilt = student.get_submodule(name).matrix(matrix)
            assert (rebuilt - getattr(experts, matrix)).abs().max() < 1e-13


@pytest.mark.parametrize("rank", [0, 1, 3, 12])
def test_the_shared_computation_is_that_of_the_materialised_experts(rank):
    student = share_core(mixture(dtype=torch.float64), rank, dtype=torch.float64)
    experts = student.model.layers[1].mlp.experts
    x = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:2] for i in range(40)])
    weights = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (experts(x, index, weights) - plain_forward(experts, x, index, weights)).abs().max() < 1e-12


def test_gradients_are_those_of_the_materialised_experts():
    experts = share_core(mixture(dtype=torch.float64), 3, dtype=torch.float64).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    index = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 0], [3, 1]])  # experts 2 and 4 get no token
    weights = torch.rand(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)

    def forward(x, weights, *parameters):
        names = [name for name, _ in experts.named_parameters()]
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (x, index, weights))

    inputs = (x, weights, *(p for p in experts.parameters()))
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)
    forward(*inputs).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        if "wrapper" in name:
            assert parameter.grad[[2, 4]].abs().max() == 0


def test_one_token_and_tokens_of_one_expert_only():
    experts = share_core(mixture(dtype=torch.float64), 2, dtype=torch.float64).model.layers[0].mlp.experts
    x = torch.randn(1, 32, dtype=torch.float64)
    index, weights = torch.tensor([[4, 0]]), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(experts(x, index, weights), plain_forward(experts, x, index, weights))


@pytest.mark.parametrize("shape", [(24, 32), (32, 12), (16, 16)])
def test_a_wrapper_is_the_best_approximation_of_its_rank(shape):
    """Eckart and Young: the error is the norm of the singular values that are left out."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(matrix)
    for rank in (1, 5, min(shape)):
        reduce, expand = factorise(matrix, rank, 1e-6)
        assert (reduce.shape, expand.shape) == ((rank, shape[1]), (shape[0], rank))
        error = (matrix - expand @ reduce).norm()
        torch.testing.assert_close(error, sigma[rank:].norm(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(expand.norm(dim=0), reduce.norm(dim=1))


def test_the_core_is_the_mean_and_more_rank_never_hurts():
    teacher = mixture(dtype=torch.float64)
    experts = teacher.model.layers[0].mlp.experts
    errors = []
    for rank in (0, 1, 2, 4, 8, 32):
        student = share_core(copy.deepcopy(teacher), rank, dtype=torch.float64).model.layers[0].mlp.experts
        torch.testing.assert_close(student.core("gate_up_proj").weight, experts.gate_up_proj.mean(0))
        errors.append(float((student.matrix("gate_up_proj") - experts.gate_up_proj.detach()).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_equal_experts_leave_wrappers_that_are_zero_but_can_learn():
    teacher = mixture(dtype=torch.float64)
    for experts in plain_experts(teacher).values():
        for name in MATRICES:
            stack = getattr(experts, name).data
            stack.copy_(stack[:1].expand_as(stack))
    expected = logits(teacher)
    student = share_core(teacher, 4, dtype=torch.float64)
    assert (logits(student) - expected).abs().max() < 1e-12
    student(IDS).logits.square().mean().backward()
    for name, parameter in student.named_parameters():
        if "wrapper" in name:
            assert parameter.isfinite().all()
    for matrix in MATRICES:
        wrapper = student.model.layers[0].mlp.experts.wrapping(matrix)
        moved = max(float(wrapper.reduce.grad.abs().max()), float(wrapper.expand.grad.abs().max()))
        assert moved > 1e-6


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was():
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(share_core(mixture(), 3).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_names_separate_cores_wrappers_and_the_rest():
    student = share_core(mixture(), 3)
    names = [name for name, _ in student.named_parameters()]
    assert {n for n in names if "shared_core" in n} == {
        f"model.layers.{i}.mlp.experts.shared_core.{m}.weight" for i in range(2) for m in MATRICES
    }
    assert {n for n in names if "wrapper" in n} == {
        f"model.layers.{i}.mlp.experts.wrapper.{m}.{f}"
        for i in range(2)
        for m in MATRICES
        for f in ("reduce", "expand")
    }
    assert not [n for n in names if "experts" in n and "shared_core" not in n and "wrapper" not in n]
    assert not [n for n, _ in share_core(mixture(), 0).named_parameters() if "wrapper" in n]


@pytest.mark.parametrize("kind", CONFIGS)
def test_router_logits_and_the_auxiliary_loss_are_still_there(kind):
    teacher = mixture(kind)
    student = share_core(copy.deepcopy(teacher), FULL_RANK)
    a, b = (m(IDS, labels=IDS, output_router_logits=True) for m in (teacher, student))
    assert len(b.router_logits) == 2
    torch.testing.assert_close(b.aux_loss, a.aux_loss, rtol=1e-3, atol=1e-4)
    b.aux_loss.backward()
    assert student.model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_gradient_checkpointing_changes_no_gradient():
    student = share_core(mixture(dtype=torch.float64), 3, dtype=torch.float64).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        student.zero_grad()
        student(IDS, use_cache=False).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in student.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_export_computes_the_same_as_a_plain_model_of_transformers(kind, tmp_path):
    student = share_core(mixture(kind), 3)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    export_student(student, tmp_path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ranks_of(plain) is None
    torch.testing.assert_close(logits(plain), logits(student), rtol=1e-4, atol=1e-4)
    for name, tensor in before.items():
        assert torch.equal(student.state_dict()[name], tensor), name

    compact = load_student(tmp_path / "compact")
    assert ranks_of(compact) == ranks_of(student)
    assert torch.equal(logits(compact), logits(student))
    for name, tensor in materialise(compact).state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


@pytest.mark.slow
def test_the_export_needs_no_raydistill(tmp_path):
    student = share_core(mixture(), 3)
    export_student(student, tmp_path, dtype=torch.bfloat16)
    script = (
        "import sys, json, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "ids = torch.arange(3, 51).reshape(4, 12)\n"
        "print(json.dumps([str(model.dtype), model(ids).logits.argmax(-1).tolist(), 'raydistill' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ}
    )
    dtype, top, imported = json.loads(done.stdout.splitlines()[-1])
    assert dtype == "torch.bfloat16"
    assert top == logits(AutoModelForCausalLM.from_pretrained(tmp_path)).argmax(-1).tolist()
    assert not imported


def test_a_student_is_saved_and_loaded_bit_for_bit(tmp_path):
    student = share_core(mixture(), 3)
    save_student(student, tmp_path)
    loaded = load_student(tmp_path)
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in student.named_parameters()
    }
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(student))


def test_build_student_compresses_and_generates(tmp_path):
    mixture().save_pretrained(tmp_path)
    config = StudentConfig.model_validate(
        {"model": {"library": "transformers", "source": str(tmp_path), "dtype": "float32"},
         "init": {"kind": "shared_core", "rank": 32}}
    )  # fmt: skip
    student = build_student(config, seed=0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(student), logits(mixture()), rtol=1e-3, atol=1e-3)
    with_cache, without = (
        student.generate(IDS[:1], max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_a_dense_model_has_no_core_to_share():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ConfigError, match=r"shared_core wants a mixture of experts.*LlamaForCausalLM without experts"):
        share_core(dense, 4)


def test_experts_of_another_shape_are_named():
    odd = mixture()
    odd.model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(ConfigError, match="Qwen3MoeExperts"):
        share_core(odd, 4)


def test_a_rank_beyond_the_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"wanted 33, found expert matrices of rank 32 .* and 16 \(down\)"):
        share_core(mixture(), 33)


@pytest.mark.parametrize("file", ["configs/lm_moe_two_stage.yaml", "configs/tiny/lm_moe_two_stage.yaml"])
def test_every_rule_of_the_shipped_configuration_decides_something(file):
    config = load_config([Path(__file__).parents[2] / file], [])
    torch.manual_seed(0)
    deep = Qwen3MoeConfig(**{**SHAPE, "num_hidden_layers": 12}, moe_intermediate_size=16, num_experts=4, head_dim=8)
    student = share_core(AutoModelForCausalLM.from_config(deep), 2)
    for phase in config.phases:
        groups = parameter_groups(student, phase.trainable, phase.optimizer["student"], where=phase.name)
        trained = {name for group in groups for name in group.names}
        new = {n for n, _ in student.named_parameters() if "shared_core" in n or "wrapper" in n}
        assert trained == new if phase.name == "experts" else trained > new


# --- mixtures made from dense models ---


def small_llama(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_copied_experts_compute_what_the_dense_model_does(tmp_path):
    dense = small_llama(tmp_path)
    mixture = mixtral_from_llama(str(tmp_path), num_experts=3)
    assert mixture.config.tie_word_embeddings
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-4, atol=1e-4)


def test_upcycling_follows_from_its_arguments_and_its_mean_is_the_dense_model(tmp_path):
    dense = small_llama(tmp_path)
    build = lambda seed: mixtral_from_llama(str(tmp_path), noise=0.3, noise_rank=2, seed=seed)  # noqa: E731
    one, again, other = build(1), build(1), build(2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not torch.equal(logits(one), logits(other))
    experts = one.model.layers[2].mlp.experts
    down = dense.model.layers[2].mlp.down_proj.weight
    torch.testing.assert_close(experts.down_proj.mean(0), down, rtol=1e-4, atol=1e-5)
    size = (experts.down_proj - down).square().mean().sqrt() / down.square().mean().sqrt()
    torch.testing.assert_close(size, torch.tensor(0.3), rtol=1e-3, atol=0)


def test_upcycling_on_the_meta_device_has_the_shape_of_the_real_thing(tmp_path):
    small_llama(tmp_path)
    with torch.device("meta"):
        shape = mixtral_from_llama(str(tmp_path), num_layers=2)
    real = mixtral_from_llama(str(tmp_path), num_layers=2)
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {p.device.type for p in shape.parameters()} == {"meta"}
