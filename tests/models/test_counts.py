from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from torch.utils.flop_counter import FlopCounterMode

from raydistill.config.models import (
    InitConfig,
    LayersInit,
    PretrainedInit,
    RandomInit,
    SharedCoreInit,
    StudentConfig,
    TransformersModel,
)
from raydistill.models.counts import Attention, count, empty_student
from raydistill.models.load import empty_language_model
from raydistill.models.student import build_student

LLAMA: dict[str, JsonValue] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
MOE: dict[str, JsonValue] = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
    "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 8,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
"""Weights of a Llama block: query, key and value, output, gated MLP."""


def source(folder: Path, config: dict[str, JsonValue]) -> TransformersModel:
    """A model folder that holds nothing but its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return TransformersModel(source=str(folder), attention="eager", dtype="float32")


def test_parameters_and_flops_of_a_dense_model(tmp_path: Path) -> None:
    counts = count(empty_language_model(source(tmp_path, LLAMA)))
    assert counts.products == 2 * BLOCK + 96 * 32
    assert counts.parameters == counts.active_parameters == counts.products + 96 * 32 + 5 * 32
    # 15 tokens see 8 keys on average; a key costs 2 products of 4 heads of 8.
    attention = 2 * 8 * (4 * 8 + 4 * 8)
    assert counts.forward(15) == 2 * counts.products + 2 * attention
    assert counts.training(15, recompute=False) == 6 * counts.products + 3 * 2 * attention
    again = 2 * 2 * BLOCK + 2 * attention
    assert counts.training(15, recompute=True) == counts.training(15, recompute=False) + again


def test_tied_embeddings_are_one_tensor_that_still_multiplies(tmp_path: Path) -> None:
    apart = count(empty_language_model(source(tmp_path, LLAMA)))
    tied = count(empty_language_model(source(tmp_path, {**LLAMA, "tie_word_embeddings": True})))
    assert apart.parameters - tied.parameters == 96 * 32
    assert apart.products == tied.products


def test_a_token_meets_only_the_experts_it_is_routed_to(tmp_path: Path) -> None:
    counts = count(empty_language_model(source(tmp_path, MOE)))
    expert, attention, router = 3 * 32 * 16, 2 * 32 * 32 + 2 * 32 * 16, 8 * 32
    assert counts.products == 2 * (attention + router + 2 * expert) + 512 * 32
    assert counts.parameters - counts.active_parameters == 2 * 6 * expert


def test_a_shared_core_is_met_by_every_token_and_wrappers_by_those_routed_to_them(tmp_path: Path) -> None:
    student = StudentConfig(model=source(tmp_path, MOE), init=SharedCoreInit(kind="shared_core", rank=4))
    counts = count(empty_student(student))
    core, wrapper = 3 * 32 * 16, 4 * (32 + 32) + 4 * (16 + 32)
    rest = 2 * 32 * 32 + 2 * 32 * 16 + 8 * 32
    assert counts.products == 2 * (rest + core + 2 * wrapper) + 512 * 32


def test_frozen_weights_need_no_gradient_of_their_own(tmp_path: Path) -> None:
    model = empty_language_model(source(tmp_path, LLAMA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name)
    counts = count(model)
    assert counts.trained_products == BLOCK
    assert counts.trained_parameters == BLOCK + 2 * 32
    assert counts.training(1, recompute=False) == 4 * counts.products + 2 * BLOCK + 3 * 2 * 2 * 64


@pytest.mark.parametrize(
    ("length", "window", "keys"), [(7, None, 4.0), (7, 7, 4.0), (7, 3, (1 + 2 + 5 * 3) / 7), (1, 3, 1)]
)
def test_keys_that_a_token_sees(length: int, window: int | None, keys: float) -> None:
    assert Attention(width=10, window=window).flops(length) == pytest.approx(2 * 10 * keys)


@pytest.mark.parametrize(
    ("config", "rank"), [(LLAMA, None), (MOE, None), (MOE, 4)], ids=["dense", "experts", "shared core"]
)
def test_the_products_are_those_that_torch_counts(
    tmp_path: Path, config: dict[str, JsonValue], rank: int | None
) -> None:
    random = RandomInit(kind="random")
    model = build_student(StudentConfig(model=source(tmp_path / "model", config), init=random), seed=0)
    if rank is not None:
        model.save_pretrained(tmp_path / "weights")
        saved = TransformersModel(source=str(tmp_path / "weights"), attention="eager", dtype="float32")
        model = build_student(StudentConfig(model=saved, init=SharedCoreInit(kind="shared_core", rank=rank)), seed=0)
    elif config is MOE:
        model.set_experts_implementation("eager")  # the others are kernels that torch does not count
    counts, length = count(model), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    pairs = sum(2 * layer.width * length * length for layer in counts.attention)  # eager attention computes all pairs
    assert counter.get_total_flops() == 2 * length * counts.products + pairs


@pytest.mark.parametrize(
    "init",
    [PretrainedInit(), RandomInit(kind="random"), LayersInit(kind="layers", num_layers=1)],
    ids=lambda init: init.kind,
)
def test_an_empty_student_has_the_shapes_of_a_built_one(tmp_path: Path, init: InitConfig) -> None:
    folder = source(tmp_path / "model", LLAMA)
    build_student(StudentConfig(model=folder, init=RandomInit(kind="random")), seed=0).save_pretrained(tmp_path / "w")
    student = StudentConfig(model=TransformersModel(source=str(tmp_path / "w")), init=init)
    empty, built = empty_student(student), build_student(student, seed=0)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert {p.device.type for p in empty.parameters()} == {"meta"}
