"""Loading models and tokenizers, and what identifies them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import tiny_llama, tiny_tokenizer

from raydistill.config.models import PythonModel, TransformersModel
from raydistill.errors import ConfigError, DataError
from raydistill.models.load import (
    effective_vocab_size,
    empty_language_model,
    language_config,
    load_language_model,
    load_tokenizer,
    model_identity,
    require_same_vocabulary,
    tokenizer_identity,
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(source: Path | str, **settings: object) -> TransformersModel:
    return TransformersModel.model_validate({"source": str(source), "dtype": "float32", **settings})


def test_a_folder_gives_back_the_saved_weights_ready_for_evaluation(folder: Path) -> None:
    loaded = load_language_model(config(folder, attention="eager"))
    original = tiny_llama()
    ids = torch.arange(30)[None]
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)
    assert not loaded.training
    assert loaded.config._attn_implementation == "eager"
    assert load_language_model(config(folder, dtype="bfloat16")).dtype == torch.bfloat16
    assert load_language_model(config(folder, dtype="bfloat16"), dtype=torch.float32).dtype == torch.float32


def test_an_architecture_without_the_wanted_attention_is_told_what_to_set(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    small = Gemma2Config(**shape, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager")
    Gemma2ForCausalLM(small).save_pretrained(tmp_path / "gemma")
    for load in (load_language_model, language_config, empty_language_model):
        with pytest.raises(ConfigError, match=r"attention: sdpa.* Gemma2ForCausalLM; set attention: eager"):
            load(config(tmp_path / "gemma"))
    assert load_language_model(config(tmp_path / "gemma", attention="eager")).config._attn_implementation == "eager"


def test_the_empty_model_has_the_names_and_shapes_and_no_memory(folder: Path) -> None:
    empty = empty_language_model(config(folder))
    full = load_language_model(config(folder))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


def test_overrides_change_the_architecture_and_refuse_its_pretrained_weights(folder: Path) -> None:
    smaller = config(folder, overrides={"num_hidden_layers": 1, "intermediate_size": 8})
    assert empty_language_model(smaller).model.layers[0].mlp.up_proj.weight.shape == (8, 32)
    assert len(empty_language_model(smaller).model.layers) == 1
    with pytest.raises(ConfigError, match="its pretrained weights do not fit"):
        load_language_model(smaller)
    with pytest.raises(ConfigError, match=r"overrides\.num_hiden_layers: .* did you mean num_hidden_layers\?"):
        language_config(config(folder, overrides={"num_hiden_layers": 1}))


def test_a_list_with_one_entry_per_layer_follows_an_override_of_their_number(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    Qwen3Config(num_hidden_layers=4, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "q")
    cut = language_config(config(tmp_path / "q", overrides={"num_hidden_layers": 2}))
    assert len(cut.layer_types) == cut.num_hidden_layers == 2


def test_a_folder_without_a_model_or_without_weights_says_what_it_holds(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"wanted a model \(config\.json, weights\), found nothing in"):
        load_language_model(config(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"wanted weights \(\*\.safetensors\), found only config\.json"):
        load_language_model(config(folder))
    assert language_config(config(folder)).hidden_size == 32


def test_truncated_weights_are_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="model cannot be loaded: "):
        load_language_model(config(folder))


def test_missing_tensors_are_never_filled_with_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"lack 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight; they would be random"
    ):
        load_language_model(config(folder))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_weights_that_are_a_program_are_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    assert load_language_model(config(folder)).num_parameters() == tiny_llama().num_parameters()
    torch.save({"model.norm.weight": Evil(str(tmp_path / "owned"))}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="holds more than tensors"):
        load_language_model(config(folder))
    assert not (tmp_path / "owned").exists()


def test_code_that_comes_with_a_checkpoint_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw |= {
        "model_type": "their_own",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_language_model(config(folder))
    assert not (tmp_path / "owned").exists()


def test_a_file_that_is_no_gguf_is_not_a_model(folder: Path) -> None:
    with pytest.raises(DataError, match=r"wanted a folder or a \.gguf file, found the file model\.safetensors"):
        load_language_model(config(folder / "model.safetensors"))


def test_a_users_own_function_builds_the_model() -> None:
    model = PythonModel(library="python", source="toys:tiny_llama", arguments={"hidden": 16}, dtype="bfloat16")
    loaded = load_language_model(model)
    assert (loaded.config.hidden_size, loaded.dtype, loaded.training) == (16, torch.bfloat16, False)
    assert empty_language_model(model).model.norm.weight.is_meta
    assert language_config(model).hidden_size == 16
    for change, message in (
        ({"source": "toys:tiny_lama"}, "cannot import this function"),
        ({"source": "no_such_module:f"}, "cannot import this function"),
        ({"arguments": {"hiden": 16}}, "unexpected keyword argument 'hiden'"),
        ({"source": "toys:tiny_tokenizer", "arguments": {}}, "wanted a model of transformers, found"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_language_model(model.model_copy(update=change))


def test_a_model_is_identified_by_its_content_and_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    first = model_identity(config(folder))
    assert json.loads(json.dumps(first)) == first
    assert model_identity(config(tmp_path / "elsewhere")) == first
    assert model_identity(config(folder, attention="eager")) == first
    assert model_identity(config(folder, dtype="bfloat16")) != first
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"transformers_version": "9.9"}))
    assert model_identity(config(folder)) == first
    (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-3}))
    assert model_identity(config(folder)) != first
    tiny_llama(seed=1).save_pretrained(tmp_path / "elsewhere")
    assert model_identity(config(tmp_path / "elsewhere")) != first


def test_a_tokenizer_is_found_or_named_as_missing(folder: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    with pytest.raises(DataError, match=r"wanted a tokenizer \(tokenizer\.json\), found only config\.json"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(DataError, match="model cannot be loaded"):
        load_tokenizer(str(folder))


def test_a_tokenizer_is_identified_by_the_ids_it_gives(tokenizer_folder: Path) -> None:
    first = tokenizer_identity(tiny_tokenizer())
    assert tokenizer_identity(load_tokenizer(str(tokenizer_folder))) == first
    same = tiny_tokenizer()
    same.chat_template = "{{ messages }}"
    same.padding_side = "left"
    same.backend_tokenizer.enable_truncation(5)
    assert tokenizer_identity(same) == first
    more = tiny_tokenizer()
    more.add_tokens(["<extra>"])
    assert tokenizer_identity(more) != first
    assert (effective_vocab_size(tiny_tokenizer()), effective_vocab_size(more)) == (97, 98)
    lower = copy.deepcopy(tiny_tokenizer())
    from tokenizers.normalizers import Lowercase

    lower.backend_tokenizer.normalizer = Lowercase()
    assert tokenizer_identity(lower) != first


def test_different_vocabularies_are_told_apart_by_their_first_difference() -> None:
    require_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(), names=("a", "b"))
    more = tiny_tokenizer()
    more.add_tokens(["<extra>"])
    with pytest.raises(
        DataError, match=r"teacher x .* 98 and 97 tokens, 1 ids differ, first id 97: '<extra>' and None"
    ):
        require_same_vocabulary(more, tiny_tokenizer(), names=("teacher x", "source.tokenizer"))
