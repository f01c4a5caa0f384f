"""Language models projected from larger ones: identities, exact cases, and what is refused."""

import json
import math
import shutil

import pytest
import torch
from families import FAMILIES, tiny
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from raydistill.config.models import ProjectionInit, StudentConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import own_state
from raydistill.models.student import build_student, load_student, publish_student
from raydistill.storage import Store

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-12,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
IDS = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(5))


def rows(number):
    return [
        {
            "input_ids": IDS[:number],
            "position_ids": torch.arange(12).expand(len(IDS[:number]), 12),
            "valid": torch.ones(len(IDS[:number]), 12, dtype=torch.bool),
        }
    ]


def llama(kind=LlamaForCausalLM, config=LlamaConfig, *, seed=0, **changes):
    torch.manual_seed(seed)
    model = kind(config(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def projected(folder, overrides=None, *, rows=rows, seed=0, **init):
    model = {"library": "transformers", "source": str(folder), "dtype": "float32", "attention": "eager"}
    student = {
        "model": {**model, "overrides": overrides or {}},
        "init": {"kind": "projection", "teacher": model, **init},
    }
    return build_student(StudentConfig.model_validate(student), seed=seed, rows=rows)


def saved(model, tmp_path, **options):
    model.save_pretrained(tmp_path / "teacher", **options)
    return tmp_path / "teacher"


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def origins(model):
    return {t.name: t.origin for t in model.projection.tensors}


# --- identities ---


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "phi"]
)
@pytest.mark.parametrize("basis", ["importance", "pca", "weights"])
def test_equal_shape_is_the_teacher_bit_for_bit(family, basis, tmp_path):
    teacher = tiny(family)
    folder = saved(teacher, tmp_path)
    student = projected(folder, basis=basis, depth="importance", calibration_rows=2, rows=lambda n: _few(rows(n)))
    ours, theirs = own_state(student), own_state(teacher)
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    report = student.projection
    assert (report.exact.parameters, report.projected.tensors, report.random.tensors) == (
        sum(t.numel() for t in theirs.values()), 0, 0,
    )  # fmt: skip
    assert report.coverage == 1.0
    assert max(block.error for block in report.blocks) < 1e-5
    assert report.output_error == pytest.approx(0.0, abs=1e-6)
    assert report.left_out == {}


def _few(batches):
    return [{**b, "input_ids": b["input_ids"] % 60} for b in batches]


def in_subspace(model, width, *, seed=3, rotated=True):
    """`model` with everything that is written into its residual stream put into a random subspace of `width`."""
    torch.manual_seed(seed)
    size = model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] if rotated else torch.eye(size).double()
    basis = basis[:, :width].float()
    onto = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.copy_(onto @ layer.self_attn.o_proj.weight)
            layer.mlp.down_proj.weight.copy_(onto @ layer.mlp.down_proj.weight)
    return model


@pytest.mark.parametrize("basis", ["pca", "weights"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
def test_a_teacher_that_lives_in_a_subspace_is_reproduced_by_a_student_of_its_width(kind, basis, tmp_path):
    tied = {"tie_word_embeddings": kind == "llama-tied"}
    teacher = llama(**tied) if kind != "qwen3" else llama(Qwen3ForCausalLM, Qwen3Config)
    folder = saved(in_subspace(teacher, 16), tmp_path)
    student = projected(folder, {"hidden_size": 16, "tie_word_embeddings": False}, basis=basis, calibration_rows=6)
    assert relative(logits(student), logits(teacher)) < 1e-5
    assert max(block.error for block in student.projection.blocks) < 1e-4
    # One basis per weight, or cutting each weight by itself, would be far off: the bases have to be one.
    cut = projected(folder, {"hidden_size": 16, "tie_word_embeddings": False}, basis="importance", calibration_rows=6)
    assert relative(logits(cut), logits(teacher)) > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_that_uses_some_channels_alone_is_reproduced_by_selecting_them(tied, tmp_path):
    teacher = in_subspace(llama(tie_word_embeddings=tied), 16, rotated=False)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for name, tensor in own_state(teacher).items():  # the sixteen channels lie anywhere
        axes = [
            axis for axis, n in enumerate(tensor.shape) if n == 32 and not ("_proj" in name and axis != _axis(name))
        ]
        for axis in axes:
            tensor.copy_(tensor.index_select(axis, order))
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"hidden_size": 16}, basis="importance", calibration_rows=6)
    assert relative(logits(student), logits(teacher)) < 1e-5


def _axis(name):
    return 0 if ("o_proj" in name or "down_proj" in name) else 1


def test_scaled_embeddings_of_gemma_keep_their_length(tmp_path):
    teacher = tiny("gemma3_text")
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, 16:] = 0
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[16:] = 0
            layer.mlp.down_proj.weight[16:] = 0
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight[16:] = -1.0  # the gain is 1 + this
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"hidden_size": 16}, calibration_rows=6)
    assert relative(logits(student), logits(teacher)) < 1e-4
    with pytest.raises(ConfigError, match=r"basis: pca rotates .* norms between a layer and the residual stream"):
        projected(folder, {"hidden_size": 16, "tie_word_embeddings": False}, basis="pca")


def test_units_heads_and_numbers_that_do_nothing_are_the_ones_that_go(tmp_path):
    teacher = llama(num_attention_heads=4, num_key_value_heads=4)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
            layer.self_attn.o_proj.weight[:, 8:16] = 0
            layer.self_attn.o_proj.weight[:, 24:] = 0
    folder = saved(teacher, tmp_path)
    overrides = {"intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
    for calibration_rows in (0, 6):
        student = projected(folder, overrides, calibration_rows=calibration_rows)
        assert relative(logits(student), logits(teacher)) < 1e-5
        attention, layer = student.model.layers[0].self_attn, teacher.model.layers[0].self_attn
        kept = torch.cat([torch.arange(8), torch.arange(16, 24)])
        for part in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(attention, part).weight, getattr(layer, part).weight[kept]), part
        assert torch.equal(attention.o_proj.weight, layer.o_proj.weight[:, kept])


def test_q_k_and_v_keep_their_own_values(tmp_path):
    teacher = llama(attention_bias=True)
    with torch.no_grad():
        for value, part in enumerate(("q_proj", "k_proj", "v_proj", "o_proj"), start=1):
            for layer in teacher.model.layers:
                getattr(layer.self_attn, part).weight.fill_(value)
                getattr(layer.self_attn, part).bias.fill_(value)
    folder = saved(teacher, tmp_path)
    student = projected(
        folder, {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    )
    for layer in student.model.layers:
        means = [getattr(layer.self_attn, p).weight.unique().tolist() for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
        assert means == [[1.0], [2.0], [3.0], [4.0]]
        assert layer.self_attn.k_proj.bias.unique().tolist() == [2.0]


def test_fused_q_k_v_and_gates_are_cut_apart_first(tmp_path):
    teacher = llama(Phi3ForCausalLM, Phi3Config)
    sizes = {"self_attn.qkv_proj": (32, 16, 16), "mlp.gate_up_proj": (40, 40)}
    with torch.no_grad():
        for layer in teacher.model.layers:
            for name, parts in sizes.items():
                for value, rows in enumerate(layer.get_submodule(name).weight.split(parts), start=1):
                    rows.fill_(value)
    overrides = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    student = projected(saved(teacher, tmp_path), {**overrides, "num_hidden_layers": 2})
    for layer in student.model.layers:
        for name, parts in {"self_attn.qkv_proj": (16, 8, 8), "mlp.gate_up_proj": (24, 24)}.items():
            found = [rows.unique().tolist() for rows in layer.get_submodule(name).weight.split(parts)]
            assert found == [[float(value)] for value in range(1, len(parts) + 1)]


def test_smaller_heads_keep_rotary_pairs_and_the_size_of_the_logits(tmp_path):
    teacher = llama(num_key_value_heads=4)
    keep = torch.tensor([0, 2, 4, 6])  # pairs (0, 4) and (2, 6): every second angle is what half as many pairs have
    with torch.no_grad():
        for layer in teacher.model.layers:
            attention = layer.self_attn
            for part in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(attention, part).weight.view(4, 8, 32)
                weight[:, [i for i in range(8) if i not in keep.tolist()]] = 0
            attention.o_proj.weight.view(32, 4, 8)[..., [i for i in range(8) if i not in keep.tolist()]] = 0
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"head_dim": 4}, calibration_rows=6)
    assert relative(logits(student), logits(teacher)) < 1e-5
    scaled = student.model.layers[1].self_attn.q_proj.weight.view(4, 4, 32)
    wanted = teacher.model.layers[1].self_attn.q_proj.weight.view(4, 8, 32)[:, keep] / math.sqrt(2)
    assert torch.allclose(scaled, wanted)


def test_key_heads_are_shared_by_averaging_and_unshared_by_copying(tmp_path):
    teacher = llama(num_key_value_heads=4)
    folder = saved(teacher, tmp_path)
    shared = projected(folder, {"num_key_value_heads": 2})
    key = teacher.model.layers[0].self_attn.k_proj.weight.view(2, 2, 8, 32).mean(1).reshape(16, 32)
    assert torch.allclose(shared.model.layers[0].self_attn.k_proj.weight, key)
    grouped = llama(num_key_value_heads=2, seed=1)
    folder = saved(grouped, tmp_path)
    unshared = projected(folder, {"num_key_value_heads": 4})
    assert relative(logits(unshared), logits(grouped)) < 1e-5


def test_heads_named_by_the_user_are_kept(tmp_path):
    teacher = llama(num_key_value_heads=4)
    folder = saved(teacher, tmp_path)
    overrides = {"num_attention_heads": 2, "num_key_value_heads": 2}
    student = projected(folder, overrides, heads={r".*\.0\.self_attn": (1, 3)})
    wanted = teacher.model.layers[0].self_attn.v_proj.weight.view(4, 8, 32)[[1, 3]].reshape(16, 32)
    assert torch.equal(student.model.layers[0].self_attn.v_proj.weight, wanted)
    with pytest.raises(ConfigError, match=r"wanted 2 of the teacher's heads 0 to 3, found \[1, 2, 3\]"):
        projected(folder, overrides, heads={".*": (1, 2, 3)})


# --- depth ---


def one_step_block(model):
    """Blocks that move one coordinate from 0 to 1 and do nothing when it is there: applied twice as good as once.

    Tokens are (1, 0, code) with |code| = 1. A gate that reads the first coordinate minus the second is shut at 1.
    """
    size = model.config.hidden_size
    with torch.no_grad():
        codes = torch.randn(SHAPE["vocab_size"], size)
        codes[:, :2] = 0
        codes = torch.nn.functional.normalize(codes, dim=1)
        codes[:, 0] = 1
        model.model.embed_tokens.weight.copy_(codes)
        unit = math.sqrt(size / 2)  # what the norm makes of a coordinate of 1 in a vector of length sqrt(2)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for part in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, part).weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1)
            layer.mlp.gate_proj.weight[0, 0], layer.mlp.gate_proj.weight[0, 1] = 1, -1
            layer.mlp.up_proj.weight[0, 0] = 1
            layer.mlp.down_proj.weight[1, 0] = 1 / (torch.nn.functional.silu(torch.tensor(unit)) * unit)
    return model


def test_dropping_the_last_of_two_identical_blocks_is_exact_where_the_second_has_nothing_to_do(tmp_path):
    teacher = one_step_block(llama(num_hidden_layers=2))
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"num_hidden_layers": 1}, depth="importance")
    assert [b.teacher for b in student.projection.blocks] == [0]
    assert relative(logits(student), logits(teacher)) < 1e-6
    # What the block does is not nothing: without it the output is another one.
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.zero_()
    assert relative(logits(student), logits(teacher)) > 0.05


def test_the_blocks_that_go_are_those_whose_removal_changes_least(tmp_path):
    teacher = llama(num_hidden_layers=5)
    with torch.no_grad():
        for idle in (1, 3):
            teacher.model.layers[idle].self_attn.o_proj.weight.zero_()
            teacher.model.layers[idle].mlp.down_proj.weight.zero_()
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"num_hidden_layers": 3}, depth="importance", calibration_rows=3)
    assert [b.teacher for b in student.projection.blocks] == [0, 2, 4]
    assert relative(logits(student), logits(teacher)) < 1e-6
    removal = list(student.projection.removal.values())
    assert removal[1] == pytest.approx(0, abs=1e-7)
    assert removal[3] == pytest.approx(0, abs=1e-7)
    for block in (0, 2, 4):  # a second implementation: the model without that block
        short = llama(num_hidden_layers=5)
        short.load_state_dict(teacher.state_dict())
        del short.model.layers[block]
        short.config.num_hidden_layers = 4
        p, q = logits(teacher, IDS[:3]).log_softmax(-1), logits(short, IDS[:3]).log_softmax(-1)
        assert removal[block] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("rule", "kept"), [("uniform", [0, 2, 5]), ("first", [0, 1, 2]), ("last", [3, 4, 5]), ([0, 4, 5], [0, 4, 5])]
)
def test_rules_of_depth(rule, kept, tmp_path):
    teacher = llama(num_hidden_layers=6)
    student = projected(saved(teacher, tmp_path), {"num_hidden_layers": 3}, depth=rule, calibration_rows=0)
    assert [b.teacher for b in student.projection.blocks] == kept
    for new, old in enumerate(kept):
        ours, theirs = student.model.layers[new].state_dict(), teacher.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert student.projection.left_out == {"blocks": 3 * sum(p.numel() for p in teacher.model.layers[0].parameters())}


def test_blocks_of_a_list_are_named_by_the_user(tmp_path):
    folder = saved(llama(num_hidden_layers=6), tmp_path)
    student = projected(folder, {"num_hidden_layers": 2}, layers={r"model\.layers": (2, 5)}, calibration_rows=0)
    assert [b.teacher for b in student.projection.blocks] == [2, 5]


def test_names_given_by_the_user_win_over_the_rules(tmp_path):
    teacher = llama()
    folder = saved(teacher, tmp_path)
    rules = {r"lm_head\.weight": "model.embed_tokens.weight", r"(.*layers)\.3\.mlp\.(.*)": r"\1.0.mlp.\2"}
    student = projected(folder, rename=rules, calibration_rows=0)
    assert torch.equal(student.lm_head.weight, teacher.model.embed_tokens.weight)
    ours, theirs = student.model.layers, teacher.model.layers
    assert torch.equal(ours[3].mlp.up_proj.weight, theirs[0].mlp.up_proj.weight)
    assert torch.equal(ours[3].self_attn.q_proj.weight, theirs[3].self_attn.q_proj.weight)
    assert sorted(student.projection.left_out) == [
        "lm_head.weight", *(f"model.layers.3.mlp.{part}_proj.weight" for part in ("down", "gate", "up")),
    ]  # fmt: skip


# --- mixtures ---


def mixture(**changes):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return llama(Qwen3MoeForCausalLM, Qwen3MoeConfig, **{"decoder_sparse_step": 1, **experts, **changes})


def test_experts_that_are_never_chosen_are_the_ones_that_go(tmp_path):
    teacher = mixture()
    with torch.no_grad():
        for layer in teacher.model.layers:
            # The norm's output has no sign that is always the same, so a bias-free router needs a constant channel.
            teacher.model.embed_tokens.weight[:, 0] = 8
            layer.mlp.gate.weight[[1, 3], 0] -= 20
            layer.mlp.experts.down_proj[:, 0] = 0
            layer.self_attn.o_proj.weight[0] = 0
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"num_experts": 2})
    assert relative(logits(student), logits(teacher)) < 1e-5
    ours, theirs = student.model.layers[1].mlp.experts, teacher.model.layers[1].mlp.experts
    assert torch.equal(ours.gate_up_proj, theirs.gate_up_proj[[0, 2]])
    assert torch.equal(ours.down_proj, theirs.down_proj[[0, 2]])


def test_merged_experts_are_means_weighted_by_routing(tmp_path):
    teacher = mixture(num_experts_per_tok=1)
    folder = saved(teacher, tmp_path)
    seen = {}

    def count(module, args, output):
        seen[module] = torch.bincount(output[2].flatten(), minlength=4).double()

    for layer in teacher.model.layers:
        layer.mlp.gate.register_forward_hook(count)
    student = projected(folder, {"num_experts": 2, "num_experts_per_tok": 1}, experts="merge", calibration_rows=6)
    logits(teacher)
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        routed = seen[theirs.mlp.gate] / seen[theirs.mlp.gate].sum()
        kept = sorted(sorted(range(4), key=lambda e: (-routed[e], e))[:2])
        rows_ = torch.nn.functional.normalize(theirs.mlp.gate.weight.detach(), dim=1)
        members = {k: [k] for k in kept}
        for expert in set(range(4)) - set(kept):
            members[max(kept, key=lambda k: float(rows_[expert] @ rows_[k]))].append(expert)
        for new, old in enumerate(kept):
            weights = (routed[members[old]] / routed[members[old]].sum()).float()
            wanted = torch.einsum("e,eij->ij", weights, theirs.mlp.experts.down_proj[members[old]])
            assert torch.allclose(ours.mlp.experts.down_proj[new], wanted, atol=1e-6)
            router = torch.einsum("e,ej->j", weights, theirs.mlp.gate.weight[members[old]])
            assert torch.allclose(ours.mlp.gate.weight[new], router, atol=1e-6)


# --- reading ---


def test_a_sharded_teacher_gives_the_same_student_as_one_file(tmp_path):
    teacher = llama()
    overrides = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    whole = projected(saved(teacher, tmp_path), overrides)
    shutil.rmtree(tmp_path / "teacher")
    folder = saved(teacher, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = projected(folder, overrides)
    for name, tensor in own_state(whole).items():
        assert torch.equal(tensor, own_state(sharded)[name]), name


def test_the_teacher_is_never_read_as_a_whole(tmp_path, monkeypatch):
    from raydistill.models.projection import tensors

    folder = saved(llama(num_hidden_layers=8), tmp_path, max_shard_size="20KB")
    monkeypatch.setattr("raydistill.models.projection.language_student.load_language_model", None)
    sizes, read = [], tensors.FileTensors.read

    def watched(self, name, index=()):
        found = read(self, name, index)
        sizes.append(found.untyped_storage().nbytes())
        return found

    monkeypatch.setattr(tensors.FileTensors, "read", watched)
    projected(folder, {"hidden_size": 16, "num_hidden_layers": 2}, depth="importance", basis="pca")
    assert max(sizes) <= 4 * 61 * 32


def test_the_init_folder_holds_the_report_and_loads(tmp_path):
    folder = saved(llama(), tmp_path)
    model = {"library": "transformers", "source": str(folder), "dtype": "float32"}
    student = StudentConfig.model_validate(
        {
            "model": {**model, "overrides": {"hidden_size": 16}},
            "init": {"kind": "projection", "teacher": model, "calibration_rows": 0},
        }
    )
    publish_student(student, seed=0, run=Store(tmp_path / "run"))
    report = json.loads((tmp_path / "run/init/projection.json").read_text())
    assert report["coverage"] == 1.0
    assert report["spaces"]["residual"] == "32 → 16, selected"
    assert sum(t["parameters"] for t in report["tensors"]) == sum(
        report[origin]["parameters"] for origin in ("exact", "projected", "random")
    )
    again = load_student(tmp_path / "run/init")
    assert torch.equal(logits(again), logits(build_student(student, seed=0)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("overrides", "init", "message"),
    [
        ({"num_hidden_layers": 5}, {}, "at most 4 blocks, as many as the teacher has, found 5"),
        ({"hidden_size": 48}, {}, "no wider than the teacher, found 48 for residual, where the teacher has 32"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, {}, "at most 4 query heads"),
        (
            {"num_attention_heads": 5},
            {},
            r"'num_attention_heads': 5.* is not a multiple of the number of attention heads",
        ),
        (
            {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1},
            {},
            r"query heads per key head that 2 .* divides, found 3",
        ),
        ({"num_hidden_layers": 2}, {"depth": (0, 4)}, r"2 blocks .* of the teacher's 0 to 3, found \[0, 4\]"),
        ({"num_hidden_layers": 2}, {"depth": (0, 1, 2)}, r"wanted 2 blocks .* found \[0, 1, 2\]"),
        ({"hidden_size": 16, "tie_word_embeddings": True}, {"basis": "weights"}, "tie_word_embeddings: false"),
        (
            {"attention_bias": True},
            {"min_coverage": 1.0},
            r"at least 100% .* found 9\d\.\d%; 16 tensors have no counter",
        ),
        (
            {},
            {"rename": {r"lm_head\.weight": "head.weight"}},
            "wanted the teacher's tensor head.weight for lm_head.weight",
        ),
        (
            {},
            {"rename": {r"lm_head\.weight": "model.layers.0.mlp.up_proj.weight"}},
            r"axes mean what those of lm_head.weight do \(vocab, residual\), found .*up_proj.weight \(blocks.0.mlp.in",
        ),
        (
            {},
            {"rename": {"head": "lm_head.weight"}},
            "init.rename: .* the student's tensors, found head, which matches",
        ),
        ({}, {"layers": {"h": (0, 1)}}, "init.layers: .* lists of blocks, found h, which matches none of model"),
        (
            {},
            {"heads": {"attn": (0,)}},
            "init.heads: .* attention modules, found attn, .* model.layers.0.self",
        ),
        ({"hidden_size": 16}, {"rows": None}, "wanted 16 rows of the inputs cache, found none at hand"),
    ],
)
def test_what_does_not_go_together_is_one_message(overrides, init, message, tmp_path):
    folder = saved(llama(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        projected(folder, overrides, **init)


def test_a_family_without_rules_is_named(tmp_path):
    folder = saved(tiny("gpt2"), tmp_path)
    with pytest.raises(
        ConfigError, match=r"teacher .*: wanted a decoder whose blocks are named like Llama's.*GPT2LMHead"
    ):
        projected(folder, {})


def test_a_missing_and_a_truncated_tensor_are_said(tmp_path):
    folder = saved(llama(), tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file({n: t for n, t in state.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"lack 1 tensors .*{name}"):
        projected(folder, {"hidden_size": 16})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read .*model.safetensors as safetensors"):
        projected(folder, {"hidden_size": 16})


def test_patterns_and_their_groups_are_checked_before_anything_is_read():
    for rename, message in (({"(": "x"}, "unterminated"), ({r"lm_head\.weight": r"model\2"}, "group reference 2")):
        with pytest.raises(ValidationError, match=message):
            ProjectionInit(kind="projection", rename=rename)


def test_numbers_that_are_not_finite_are_said_and_not_passed_on(tmp_path):
    teacher = llama()
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(DataError, match=r"finite numbers .* found some that are not, made from .*up_proj.weight"):
        projected(saved(teacher, tmp_path), {"num_hidden_layers": 3}, depth=(0, 1, 3), calibration_rows=0)


def test_a_lone_file_of_tensors_is_sent_back_for_its_folder(tmp_path):
    file = saved(llama(), tmp_path) / "model.safetensors"
    with pytest.raises(DataError, match=r"found the file model.safetensors. Name the folder that holds it"):
        projected(file, {"hidden_size": 16})


def test_a_shard_that_is_not_there_is_said(tmp_path):
    folder = saved(llama(), tmp_path, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(DataError, match=r"files it lists, found .*missing: model-00002"):
        projected(folder, {"hidden_size": 16})


def test_tensors_are_accounted_for_by_number_of_parameters(tmp_path):
    teacher = llama()
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"vocab_size": 70}, calibration_rows=0, min_coverage=0.5)
    report = student.projection
    assert origins(student)["lm_head.weight"] == "projected"
    total = sum(p.numel() for p in student.parameters())
    assert report.coverage == pytest.approx(1 - 2 * 9 * 32 / total)
    assert torch.equal(student.lm_head.weight[:61], teacher.lm_head.weight)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(t.name for t in report.tensors)


def test_the_families_are_those_of_the_other_tests():
    assert {"llama", "qwen3", "gemma3_text", "qwen3_moe", "mixtral", "phi"} <= set(FAMILIES)
