"""Students: every kind of initialisation, the folder they are kept in, and their export."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from raydistill.config.models import StudentConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.assemble import own_state, read_weights, skeleton
from raydistill.models.layers import keep_layers, spread
from raydistill.models.student import build_student, export_student, load_student, save_student

IDS = torch.arange(3, 51).reshape(4, 12)
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def llama(*, layers=6, tied=True, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=tied)).eval()


def student_config(folder, init, **model):
    model = {"library": "transformers", "source": str(folder), "dtype": "float32", **model}
    return StudentConfig.model_validate({"model": model, "init": init})


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def assert_same_state(one, other):
    a, b = own_state(one), own_state(other)
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def assert_cache_changes_nothing(model):
    with_cache, without = (
        model.generate(IDS[:2], max_new_tokens=16, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=1)
        for cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


# --- kinds ---


def test_pretrained_is_the_source_in_fp32_and_on_the_cpu(tmp_path):
    source = llama()
    source.save_pretrained(tmp_path)
    student = build_student(student_config(tmp_path, {"kind": "pretrained"}), seed=0)
    assert_same_state(student, source)
    rounded = build_student(student_config(tmp_path, {"kind": "pretrained"}, dtype="bfloat16"), seed=0)
    assert {(p.dtype, p.device.type) for p in rounded.parameters()} == {(torch.float32, "cpu")}
    assert torch.equal(rounded.model.norm.weight, source.model.norm.weight.bfloat16().float())
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight


def test_random_is_a_function_of_the_seed_alone(tmp_path):
    llama().save_pretrained(tmp_path)
    config = student_config(tmp_path, {"kind": "random"}, overrides={"num_hidden_layers": 2, "hidden_size": 16})
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = build_student(config, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert_same_state(build_student(config, seed=3), one)
    assert not torch.equal(build_student(config, seed=4).lm_head.weight, one.lm_head.weight)
    assert (one.config.num_hidden_layers, one.config.hidden_size, len(one.model.layers)) == (2, 16, 2)
    torch.manual_seed(3)
    assert_same_state(one, AutoModelForCausalLM.from_config(one.config))


@pytest.mark.parametrize(
    ("blocks", "keep", "expected"),
    [(30, 2, (0, 29)), (12, 6, (0, 2, 4, 7, 9, 11)), (6, 6, (0, 1, 2, 3, 4, 5)), (7, 4, (0, 2, 4, 6)), (9, 1, (0,))],
)
def test_spread_keeps_both_ends(blocks, keep, expected):
    assert spread(blocks, keep) == expected


def test_spread_never_takes_a_block_twice():
    for blocks in range(1, 40):
        for keep in range(1, blocks + 1):
            assert len(set(spread(blocks, keep))) == keep


@pytest.mark.parametrize("tied", [True, False])
def test_layers_copies_the_chosen_blocks_and_everything_around_them(tmp_path, tied):
    source = llama(tied=tied)
    source.save_pretrained(tmp_path)
    student = build_student(student_config(tmp_path, {"kind": "layers", "num_layers": 3}), seed=0)
    assert student.config.num_hidden_layers == 3
    state, theirs = own_state(student), own_state(source)
    for name, tensor in state.items():
        old = name
        for new, block in ((2, 5), (1, 2), (0, 0)):
            old = old.replace(f"layers.{new}.", f"layers.{block}.") if f"layers.{new}." in name else old
        assert torch.equal(tensor, theirs[old]), name
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1, 2]
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert_cache_changes_nothing(student)


def test_layers_computes_what_the_source_does_without_the_other_blocks(tmp_path):
    source = llama()
    student = keep_layers(source, (1, 4))
    source.model.layers = torch.nn.ModuleList([source.model.layers[1], source.model.layers[4]])
    source.config.num_hidden_layers = 2
    with torch.no_grad():
        assert torch.equal(student(IDS, use_cache=False).logits, source(IDS, use_cache=False).logits)


def test_layers_keeps_the_attention_kind_of_each_block(tmp_path):
    """Gemma alternates sliding and full attention; block 5 of 6 is the full one."""
    torch.manual_seed(0)
    source = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, num_hidden_layers=6, sliding_window=4)).eval()
    source.save_pretrained(tmp_path)
    assert source.config.layer_types[4:] == ["sliding_attention", "full_attention"]
    student = build_student(student_config(tmp_path, {"kind": "layers", "layers": [0, 5]}), seed=0)
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert_cache_changes_nothing(student)
    export_student(student, tmp_path / "export", dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), logits(student))


def test_layers_of_a_mixture_with_dense_blocks_stay_what_they_are(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE, num_hidden_layers=6, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=2, mlp_only_layers=[3],
    )  # fmt: skip
    source = Qwen3MoeForCausalLM(config).eval()  # dense: 0, 2, 3, 4; mixtures: 1, 5
    source.save_pretrained(tmp_path)
    student = build_student(student_config(tmp_path, {"kind": "layers", "layers": [1, 3, 5]}), seed=0)
    for new, old in enumerate((1, 3, 5)):
        assert type(student.model.layers[new].mlp) is type(source.model.layers[old].mlp)
    save_student(student, tmp_path / "init")
    assert torch.equal(logits(load_student(tmp_path / "init")), logits(student))


def test_layers_refuses_a_pattern_that_the_configuration_cannot_express():
    source = llama()
    source.model.layers[4].self_attn.scaling = 0.5
    with pytest.raises(ConfigError, match=r"wanted block 4 of the model as block 1.*self_attn\.scaling"):
        keep_layers(source, (0, 4))


def test_more_layers_than_there_are(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="wanted 9 blocks, found a model of 6"):
        build_student(student_config(tmp_path, {"kind": "layers", "num_layers": 9}), seed=0)
    with pytest.raises(ConfigError, match=r"blocks 0 to 5; not there: \[6, 8\]"):
        build_student(student_config(tmp_path, {"kind": "layers", "layers": [0, 6, 8]}), seed=0)


@pytest.mark.parametrize("kind", ["pretrained", "layers", "shared_core"])
def test_overrides_do_not_go_with_weights(kind):
    more = {"layers": {"num_layers": 2}, "shared_core": {"rank": 2}}.get(kind, {})
    with pytest.raises(ValueError, match=r"model\.overrides"):
        student_config("some/model", {"kind": kind, **more}, overrides={"num_hidden_layers": 2})


# --- checkpoints ---


def test_checkpoint_takes_a_folder_one_file_and_a_saved_student(tmp_path):
    llama(seed=0).save_pretrained(tmp_path / "model")
    trained = llama(seed=1)
    trained.save_pretrained(tmp_path / "export")
    trained.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    save_student(trained, tmp_path / "init")
    for path in ("export", "sharded", "init", "export/model.safetensors"):
        config = student_config(tmp_path / "model", {"kind": "checkpoint", "path": str(tmp_path / path)})
        assert_same_state(build_student(config, seed=0), trained)


def test_checkpoint_of_a_mixture_in_the_layout_of_its_files_and_in_that_of_memory(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SHAPE, num_hidden_layers=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    trained = Qwen3MoeForCausalLM(config).eval()
    trained.save_pretrained(tmp_path / "export")
    save_student(trained, tmp_path / "init")
    stored = load_file(tmp_path / "export/model.safetensors"), load_file(tmp_path / "init/model.safetensors")
    assert not set(stored[0]) >= set(stored[1])
    for path in ("export", "export/model.safetensors", "init/model.safetensors"):
        checkpoint = {"kind": "checkpoint", "path": str(tmp_path / path)}
        assert_same_state(build_student(student_config(tmp_path / "export", checkpoint), seed=0), trained)


def test_checkpoint_names_what_does_not_fit(tmp_path):
    llama().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    state["teacher.bias"] = torch.zeros(2)
    save_file(state, tmp_path / "odd.safetensors")
    config = student_config(tmp_path, {"kind": "checkpoint", "path": str(tmp_path / "odd.safetensors")})
    with pytest.raises(ConfigError) as error:
        build_student(config, seed=0)
    message = str(error.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: teacher.bias" in message
    assert "1 of another shape: model.layers.0.self_attn.q_proj.weight (wanted [32, 32], found [3, 3])" in message


def test_checkpoint_of_another_architecture_and_without_weights(tmp_path):
    llama(layers=6).save_pretrained(tmp_path / "model")
    save_student(llama(layers=4), tmp_path / "init")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"num_hidden_layers \(wanted 6, found 4\)"):
        build_student(
            student_config(tmp_path / "model", {"kind": "checkpoint", "path": str(tmp_path / "init")}), seed=0
        )
    with pytest.raises(ConfigError, match="found none"):
        build_student(
            student_config(tmp_path / "model", {"kind": "checkpoint", "path": str(tmp_path / "empty")}), seed=0
        )


# --- the folder of a student ---


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_student_comes_back_bit_for_bit(tmp_path, tied):
    student = llama(tied=tied)
    student.generation_config.temperature = 0.25
    student.generation_config.do_sample = True
    save_student(student, tmp_path)
    loaded = load_student(tmp_path)
    assert_same_state(loaded, student)
    assert torch.equal(logits(loaded), logits(student))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training
    assert loaded.generation_config.temperature == 0.25
    assert load_student(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied


def test_other_weights_in_the_same_architecture(tmp_path):
    first, second = llama(seed=0), llama(seed=1)
    save_student(first, tmp_path / "init")
    state = own_state(second)
    (tmp_path / "final").mkdir()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, some in parts.items():
        save_file({n: state[n] for n in some}, tmp_path / "final" / file)
    index = {"metadata": {}, "weight_map": {n: file for file, some in parts.items() for n in some}}
    (tmp_path / "final/model.safetensors.index.json").write_text(json.dumps(index))
    # a training checkpoint may hold both names of a tied weight
    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "final/ema.safetensors"
    )
    for weights in (tmp_path / "final", tmp_path / "final/ema.safetensors"):
        assert_same_state(load_student(tmp_path / "init", weights=weights), second)

    (tmp_path / "final/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"] | {"model.gone.weight": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(DataError, match=r"1 missing: model\.gone\.weight"):
        read_weights(tmp_path / "final")


def test_training_a_loaded_student_leaves_the_file_alone(tmp_path):
    save_student(llama(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_student(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "1 unexpected: extra"),
        (
            lambda s: s.update({"model.norm.weight": torch.zeros(5)}),
            r"1 of another shape: .*wanted \[32\], found \[5\]",
        ),
        (lambda s: s.update({"lm_head.weight": torch.zeros(97, 32)}), "found two that differ"),
    ],
)
def test_weights_that_do_not_fit_the_folder_are_named(tmp_path, change, message):
    student = llama()
    save_student(student, tmp_path)
    state = own_state(student)
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=message):
        load_student(tmp_path, weights=tmp_path / "other.safetensors")


def test_folders_without_a_student_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no student\.json"):
        load_student(tmp_path)
    save_student(llama(), tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_student(tmp_path, weights=tmp_path / "nothing")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_student(tmp_path, weights=tmp_path / "cut.safetensors")


def test_a_student_that_its_configuration_does_not_describe_is_not_saved(tmp_path):
    student = llama(tied=False)
    student.lm_head = torch.nn.Linear(32, 120, bias=False)
    with pytest.raises(DataError, match=r"lm_head\.weight \(config \[97, 32\], model \[120, 32\]\)"):
        save_student(student, tmp_path / "init")
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        export_student(student, tmp_path / "export", dtype=torch.float32)
    assert not (tmp_path / "init").exists()


# --- export ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_is_a_plain_folder_in_the_number_format_asked_for(tmp_path, tied, dtype):
    student = llama(tied=tied)
    student.config.quantization_config = {"quant_method": "gguf"}
    export_student(student, tmp_path, dtype=dtype)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == str(dtype).removeprefix("torch.")
    assert written["architectures"] == ["LlamaForCausalLM"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert exported.dtype == dtype
    assert_same_state(exported, student.to(dtype))
    assert not (tmp_path / "compact").exists()


def test_the_export_leaves_the_student_as_it_was(tmp_path):
    student = llama()
    before = {n: (t.dtype, t.clone()) for n, t in student.state_dict().items()}
    export_student(student, tmp_path, dtype=torch.bfloat16)
    for name, (dtype, tensor) in before.items():
        assert student.state_dict()[name].dtype == dtype
        assert torch.equal(student.state_dict()[name], tensor)
    assert student.config.dtype in (None, torch.float32)


def test_a_configuration_that_transformers_writes_differently_is_refused(tmp_path, monkeypatch):
    student = llama()
    read = AutoConfig.from_pretrained

    def changed(*args, **kwargs):
        config = read(*args, **kwargs)
        config.rms_norm_eps = 0.5
        return config

    monkeypatch.setattr("raydistill.models.student.AutoConfig.from_pretrained", changed)
    with pytest.raises(DataError, match=r"rms_norm_eps \(wanted 1e-06, found 0\.5\)"):
        export_student(student, tmp_path, dtype=torch.float32)


def test_a_skeleton_has_real_rotary_frequencies_and_touches_no_memory():
    config = LlamaConfig(**{**SHAPE, "vocab_size": 2_000_000, "hidden_size": 512}, num_hidden_layers=4)
    blank = skeleton(config)
    assert sum(p.numel() for p in blank.parameters()) > 2_000_000_000
    expected = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1)).model.rotary_emb.inv_freq
    assert torch.equal(blank.model.rotary_emb.inv_freq, expected)
