"""GGUF files: converted once, exactly, and loaded like folders from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from raydistill.config.models import TransformersModel
from raydistill.errors import DataError
from raydistill.models import gguf, load


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


def test_a_gguf_file_gives_its_weights_tokenizer_and_template_and_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_gguf(tmp_path / "tiny.gguf")
    config = TransformersModel(source=str(tmp_path / "tiny.gguf"), dtype="float32")
    loaded = load.load_language_model(config)
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    tokenizer = load.load_tokenizer(config.source)
    assert tokenizer.decode(tokenizer("the naïve 😀 cat")["input_ids"]) == "the naïve 😀 cat"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert load.language_config(config).num_hidden_layers == 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", refuse)
    ids = torch.arange(20)[None]
    again = gguf.gguf_folder(tmp_path / "tiny.gguf", torch.float32)
    assert (again / "model.safetensors").exists()
    assert (again / "tokenizer.json").exists()
    assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_a_converted_file_is_found_under_another_name_and_a_changed_one_is_not(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", seed=1)
    a, b, c = (gguf.gguf_base(tmp_path / f"{name}.gguf") for name in "abc")
    assert a == b != c


def test_broken_gguf_files_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"not at all"):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.gguf"):
            load.load_language_model(TransformersModel(source=str(tmp_path / "bad.gguf")))
        with pytest.raises(DataError, match=r"bad\.gguf"):
            gguf.gguf_folder(tmp_path / "bad.gguf", torch.float32)
    left = [p for p in (tmp_path / "home/converted").iterdir() if p.is_dir()]
    assert not [p for p in left if p.name.startswith(".") or p.name.endswith("float32")]
