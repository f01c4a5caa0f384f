"""What is known of a projection before weights are read: where everything comes from, and the memory it takes."""

import json

import pytest
import torch
from tiny_denoisers import save_pipeline, tiny_sdxl
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.config.models import StudentConfig
from raydistill.errors import ConfigError
from raydistill.models.projection.forecast import BESIDES, Row, forecast
from raydistill.models.projection.living import Living
from raydistill.models.student import build_student

WAN_A14B = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-06,
}
"""Either transformer of Wan 2.2 T2V A14B: `transformer` for noise, `transformer_2` for detail."""
WAN_LITE = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "num_layers": 16}
PIXART_LITE = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "cross_attention_dim": 1024,
    "caption_channels": 4096,
    "sample_size": 128,
    "patch_size": 2,
    "attention_bias": True,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}
EVENLY = [0, 3, 5, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 36, 39]


def student_of(teacher, pattern=None, overrides=None, **init):
    model = {"library": "diffusers", "source": str(teacher)}
    return StudentConfig.model_validate(
        {
            "model": {**model, "source": str(pattern or teacher), "overrides": overrides or {}},
            "init": {"kind": "projection", "teacher": model, **init},
        }
    )


def folder_of(config, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["one frame", "two dimensions"])
def test_every_tensor_of_a_small_image_student_of_wan_a14b_is_accounted_for(kind, tmp_path):
    teacher = folder_of(WAN_A14B, tmp_path / "wan")
    if kind == "one frame":
        found = forecast(student_of(teacher, overrides=WAN_LITE), Row(512, (64, 64)))
    else:
        found = forecast(student_of(teacher, folder_of(PIXART_LITE, tmp_path / "pixart")), Row(512, (64, 64)))
    report = found.report
    assert report.coverage == 1.0
    assert report.random.tensors == 0
    assert [block.teacher for block in report.blocks] == EVENLY
    assert 281_000_000 < report.projected.parameters < 283_000_000
    assert report.spaces["residual"] == "5120 → 1024, selected"
    assert report.spaces["blocks.*.attn1.query"] == "5120 → 1024, selected"
    assert report.spaces["text"] == "4096, all"
    # 14 billion parameters are 28 GB in bf16; projecting them takes less than a fifth of that.
    assert found.student + found.weights < 2.4e9
    assert found.peak < 5e9
    if kind == "two dimensions":
        patch = next(t for t in report.tensors if t.name == "pos_embed.proj.weight")
        assert (patch.origin, patch.teacher) == ("projected", ("patch_embedding.weight",))


def test_living_tensors_are_counted_while_they_live_and_weights_and_attention_are_not():
    layers = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 20)).to("meta")
    with torch.no_grad(), Living(layers) as living:
        out = layers(torch.empty(8, 10, device="meta"))
        assert living.most == 4 * 8 * (10 + 1000 + 1000)  # what goes in, what the ReLU takes and what it gives
        assert living.now == 4 * out.numel()
        states = torch.empty(1, 2, 512, 8, device="meta")
        found = nn.functional.scaled_dot_product_attention(states, states, value=states[..., :4])
        assert found.shape == (1, 2, 512, 4)
        assert living.now == 4 * (out.numel() + states.numel() + found.numel())


def test_more_images_take_more_memory_and_the_weights_alone_none_for_running(tmp_path):
    teacher = folder_of({**WAN_A14B, "num_layers": 2}, tmp_path / "wan")
    overrides = {**WAN_LITE, "num_layers": 1}
    none, one, eight = (
        forecast(student_of(teacher, overrides=overrides, calibration_rows=rows), Row(512, (64, 64)))
        for rows in (0, 1, 8)
    )
    assert (none.activations, eight.activations) == (0, 8 * one.activations)
    assert none.peak < one.peak < eight.peak


def test_a_forecast_is_what_is_made(tmp_path):
    folder = save_pipeline(tiny_sdxl(), tmp_path)
    for overrides in ({"layers_per_block": 1}, {"block_out_channels": [4, 8]}, {"cross_attention_dim": 8}):
        student = student_of(folder, overrides=overrides, calibration_rows=0, min_coverage=0.5)
        planned, made = forecast(student).report, build_student(student, seed=0).projection
        assert planned == made


@pytest.mark.parametrize("tied", [False, True])
def test_a_forecast_of_a_language_model_is_what_is_made(tied, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = {"library": "transformers", "source": str(tmp_path)}
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": tied}
    student = StudentConfig.model_validate(
        {
            "model": {**model, "overrides": settings},
            "init": {
                "kind": "projection",
                "teacher": model,
                "basis": "importance" if tied else "weights",
                "calibration_rows": 0,
            },
        }
    )
    found = forecast(student, Row(64))
    made = build_student(student, seed=0)
    assert found.report == made.projection
    assert found.teacher_blocks == 3
    assert found.student == 4 * sum(p.numel() for p in made.parameters())
    assert found.peak == found.student + found.reading + BESIDES  # nothing runs without calibration
    deep = student.model_copy(
        update={"model": student.model.model_copy(update={"overrides": {"num_hidden_layers": 4}})}
    )
    with pytest.raises(ConfigError, match="at most 3 blocks"):
        forecast(deep, Row(64))
