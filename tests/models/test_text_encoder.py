"""Text encoders against diffusers' own pipeline, and encoders of other kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_denoisers import tiny_sdxl
from tiny_encoders import TOKENS, save_bert, save_sdxl_encoders, sdxl_text_encoders, tiny_clip, tiny_vae
from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5Config

from raydistill.config.sources import TextEncoderConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models import parts
from raydistill.models.text_encoder import TextEncoders, TextFacts, text_facts, text_identity

CAPTIONS = ["a cat", "a red dog in a house far away", "a cat", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl_encoders(tmp_path_factory.mktemp("pipeline"))


def configs(folder: Path) -> list[TextEncoderConfig]:
    return [TextEncoderConfig.model_validate(one) for one in sdxl_text_encoders(folder)]


def test_prompts_are_those_of_the_sdxl_pipeline(folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=tiny_sdxl(), scheduler=DDIMScheduler(), add_watermarker=False,
        text_encoder=tiny_clip(1, projection=False), text_encoder_2=tiny_clip(2, projection=True),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip
    wanted, _, wanted_pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    found, pooled = TextEncoders(configs(folder))(CAPTIONS, batch=3)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, wanted_pooled.detach(), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_last_layer_is_that_of_the_stable_diffusion_pipeline(folder: Path) -> None:
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(), unet=tiny_sdxl(), scheduler=EulerDiscreteScheduler(steps_offset=1), safety_checker=None,
        feature_extractor=None,
        text_encoder=tiny_clip(1, projection=False), tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        requires_safety_checker=False,
    )  # fmt: skip
    wanted, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
    found, pooled = TextEncoders([configs(folder)[0].model_copy(update={"layer": -1})])(CAPTIONS, batch=4)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=1e-5)
    assert pooled.shape == (4, 0)


def test_facts_are_the_shapes_and_need_no_weights(folder: Path, tmp_path: Path) -> None:
    embeds, pooled = TextEncoders(configs(folder))(["a cat"], batch=1)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    facts = text_facts(configs(tmp_path))
    assert (facts.tokens, facts.width) == tuple(embeds.shape[1:])
    assert facts.pooled_width == pooled.shape[1]
    assert text_facts(()) == TextFacts(0, 0, 0)


def test_mean_pooling_and_states_of_an_encoder_with_a_mask(tmp_path: Path) -> None:
    source = save_bert(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    config = TextEncoderConfig(source=str(source), layer=-2, pooled="mean")
    found, pooled = TextEncoders([config])(["a red cat", "a"], batch=2)
    for row, caption in enumerate(["a red cat", "a"]):
        alone = tokenizer(caption, return_tensors="pt")  # no padding at all
        states = model(**alone, output_hidden_states=True)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(found[row, :length], states.hidden_states[-2][0].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled[row], states.last_hidden_state[0].mean(0).detach(), atol=1e-5, rtol=1e-5)
        assert not found[row, length:].any()
    assert text_facts([config]) == TextFacts(8, 8, 16)


def test_captions_are_cut_to_max_tokens(folder: Path) -> None:
    config = configs(folder)[0].model_copy(update={"max_tokens": 6})
    found, _ = TextEncoders([config])(["abcdefghijklmn", "abcdxyz"], batch=2)
    assert found.shape[1] == 6
    assert torch.equal(found[0], found[1])  # four letters between start and end


def test_encoders_of_different_lengths_cannot_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    both = [configs(folder)[0], TextEncoderConfig(source=str(save_bert(tmp_path)))]
    with pytest.raises(
        ConfigError, match=rf"text_encoders\.1\.max_tokens: .* found {TOKENS} .* and 16 .*set max_tokens"
    ):
        text_facts(both)
    both[1] = both[1].model_copy(update={"max_tokens": TOKENS})
    assert text_facts(both).width == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": -5}, "has 3 layers, so wanted -1 to -4"),
        ({"layer": 0}, "has 3 layers, so wanted -1 to -4"),
        ({"pooled": "projection"}, "has no projected embedding"),
        ({"max_tokens": 13}, "has places for 12 tokens, found 13"),
    ],
)
def test_what_an_encoder_does_not_have_is_said_before_it_runs(
    folder: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        text_facts([configs(folder)[0].model_copy(update=change)])


def test_a_tokenizer_without_a_limit_needs_max_tokens(tmp_path: Path) -> None:
    source = save_bert(tmp_path)
    T5Config(d_model=8, num_layers=2, num_heads=2, d_ff=8, vocab_size=10).save_pretrained(source)
    stated = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(stated | {"model_max_length": int(1e30)}))
    with pytest.raises(ConfigError, match="states no limit; set max_tokens"):
        text_facts([TextEncoderConfig(source=str(source), layer=-1)])
    assert text_facts([TextEncoderConfig(source=str(source), layer=-1, max_tokens=200)]).tokens == 200


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    def read(**change: object) -> None:
        TextEncoders([configs(tmp_path)[0].model_copy(update=change)])

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(DataError, match="wanted the folder text_encoder_3"):
        read(subfolder="text_encoder_3")
    with pytest.raises(DataError, match="wanted the folder of a text encoder, found the file"):
        read(source=str(tmp_path / "text_encoder" / "model.safetensors"), subfolder=None)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="wanted a tokenizer"):
        read()
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be loaded"):
        read()
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "many"}))
    with pytest.raises(DataError, match="cannot be loaded"):
        text_facts([configs(tmp_path)[0]])


def test_incomplete_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "text_encoder_2" / "config.json").read_text())
    tiny_clip(1, projection=False).save_pretrained(tmp_path / "text_encoder_2")
    (tmp_path / "text_encoder_2" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"lack 1 tensors of CLIPTextModelWithProjection.*text_projection\.weight"):
        TextEncoders([configs(tmp_path)[1]])


def test_weights_in_a_pickle_are_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save({"code": CLIPTextModelWithProjection}, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(DataError, match="holds more than tensors"):
        TextEncoders([configs(tmp_path)[0]])


def test_hub_parts_are_asked_for_encoder_and_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo: str, revision: str | None, *, folders: list[str], beside: list[str], weights: bool) -> Path:
        asked.append((repo, revision, *folders, "beside", *beside, weights))
        return folder

    monkeypatch.setattr(parts, "hub_parts", snapshot)
    config = TextEncoderConfig(source="org/model", subfolder="text_encoder_2", revision="v1", pooled="projection")
    identity = text_identity(config)
    assert set(asked) == {("org/model", "v1", "text_encoder_2", "beside", "tokenizer_2", "", False)}
    assert (identity["hub"], identity["commit"], identity["subfolder"]) == ("org/model", folder.name, "text_encoder_2")
    assert "weights" not in identity


def test_identity_follows_what_decides_the_embeddings(folder: Path, tmp_path: Path) -> None:
    first, second = configs(folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert text_identity(configs(tmp_path)[0]) == text_identity(first)
    (tmp_path / "tokenizer_2").rename(tmp_path / "spare")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer_2")  # pads with another token
    others = [text_identity(first.model_copy(update=u)) for u in ({"layer": -1}, {"max_tokens": 8})]
    others += [text_identity(c) for c in (second, configs(tmp_path)[1])]
    assert len({json.dumps(one, sort_keys=True) for one in [text_identity(first), *others]}) == 5
