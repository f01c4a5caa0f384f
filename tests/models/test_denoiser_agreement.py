"""Denoisers that do not fit to latents, text, sizes or each other are refused before anything runs."""

import pytest
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_denoisers import POOLED_WIDTH, SCHEDULE, TEXT_WIDTH, save_pipeline, tiny_sdxl, tiny_unet
from toys import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.models.denoiser_agreement import check_denoisers

SQUARE = [(16, 16)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline with everything, and variants of it that each differ in one thing."""
    folder = tmp_path_factory.mktemp("models")
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    for name, width, pooled in (
        ("text", TEXT_WIDTH, POOLED_WIDTH),
        ("narrow", 8, POOLED_WIDTH),
        ("flat", TEXT_WIDTH, 4),
    ):
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, projection_dim=pooled,
        )  # fmt: skip
        CLIPTextModelWithProjection(text).save_pretrained(folder / name / "text_encoder")
        tokenizer.save_pretrained(folder / name / "tokenizer")
    vae.save_pretrained(folder / "vae")
    save_pipeline(tiny_sdxl(), folder / "sdxl")
    save_pipeline(tiny_sdxl(in_channels=8, out_channels=8), folder / "wide")
    save_pipeline(tiny_unet(), folder / "pixels")
    save_pipeline(tiny_sdxl(), folder / "linear", DDPMScheduler())
    save_pipeline(tiny_sdxl(), folder / "flow", FlowMatchEulerDiscreteScheduler())
    zero = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    save_pipeline(tiny_sdxl(), folder / "zero", zero)
    save_pipeline(tiny_sdxl(), folder / "short", DDPMScheduler(**SCHEDULE, num_train_timesteps=100))
    return folder


def _config(
    home,
    *,
    student="sdxl",
    teachers=("sdxl",),
    vae="vae",
    text="text",
    noise=None,
    overrides=None,
    taps=None,
    tapped=(),
    **student_keys,
):
    def model(name):
        return {"library": "diffusers", "source": str(home / name)}

    return RunConfig.model_validate(
        {
            "name": "x",
            "source": {
                "kind": "images",
                "paths": ["a"],
                "vae": vae if vae == "none" else {"source": str(home / vae)},
                "text_encoders": [
                    {"source": str(home / text), "subfolder": "text_encoder", "pooled": "projection", "layer": -2}
                ]
                if text
                else [],
                "noise": noise or {},
            },
            "teachers": [
                {"signal": "noise_prediction", "name": f"t{i}", "model": model(name), "taps": taps or {}}
                for i, name in enumerate(teachers)
            ],
            "student": {"model": model(student) | {"overrides": overrides or {}}, **student_keys},
            "phases": [
                {
                    "name": "a",
                    "steps": 1,
                    "recipe": {"kind": "noise_prediction", "taps": list(tapped)},
                    "batch": {"global_size": 1, "micro_size": 1},
                    "optimizer": {"student": {"lr": 1}},
                }
            ],
        }
    )


def test_models_that_fit_pass(home):
    check_denoisers(_config(home), SQUARE)
    check_denoisers(_config(home, student="pixels", teachers=("pixels",), vae="none", text=None), SQUARE)
    check_denoisers(
        _config(home, overrides={"layers_per_block": 1, "mid_block_type": None}, init={"kind": "blocks"}), SQUARE
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teachers": ("sdxl", "wide")}, r"teachers\.t1 .*wanted latents of 8 channels, found 4 of source\.vae"),
        ({"student": "wide"}, r"student\.model .*wanted latents of 8 channels, found 4"),
        ({"vae": "none"}, r"wanted latents of 4 channels, found 3 of pixels \(source\.vae: none\)"),
        ({"text": "narrow"}, r"wanted text embeddings of width 16, found 8 of source\.text_encoders"),
        ({"text": None}, r"wanted text embeddings of width 16, found none"),
        ({"text": "flat"}, r"wanted pooled text embeddings of width 8, found 4"),
        ({"teachers": ("sdxl", "linear")}, r"teachers\.t1 .*noise schedule of the student.*from timestep 0 on"),
        ({"teachers": ("flow",)}, r"teachers\.t0 .*found another: flow and variance_preserving.*model\.scheduler"),
        ({"teachers": ("sdxl", "short")}, r"teachers\.t1 .*found another: 100 and 1000 timesteps"),
        (
            {"student": "short", "teachers": ("short",)},
            r"student\.model: .*found a noise schedule of 100; end the range at 100",
        ),
        (
            {"student": "zero", "teachers": ("zero",)},
            r"student\.model predicts v_prediction: .*timestep 999.*prediction_type: v_prediction",
        ),
        (
            {"taps": {"deep": "mid_blok"}},
            r"teachers\.t0\.taps, tap 'deep': wanted a module .*found no 'mid_blok'.*mid_block",
        ),
        (
            {
                "taps": {"deep": "mid_block"},
                "tapped": ({"teacher": "t0", "tap": "deep", "student": "mid_block"},),
                "overrides": {"mid_block_type": None},
                "init": {"kind": "blocks"},
            },
            r"phases\.0\.recipe\.taps, tap 't0\.deep': wanted a module .*found no 'mid_block'",
        ),
        (
            {"overrides": {"block_out_channels": [4, 4]}, "init": {"kind": "blocks"}},
            r"student\.init \(blocks of .*Change numbers of blocks and layers, not widths",
        ),
        (
            {"overrides": {"layers_per_block": 3}, "init": {"kind": "blocks"}},
            r"student\.init .*wanted at most \d+ down_blocks\.0\.resnets.*found 3",
        ),
    ],
    ids=[
        "teacher channels",
        "student channels",
        "pixels",
        "text",
        "no text",
        "pooled",
        "schedule",
        "flow",
        "short",
        "both short",
        "snr",
        "tap of a teacher",
        "tap of the student",
        "narrower blocks",
        "more blocks",
    ],
)
def test_what_does_not_fit_is_named(home, settings, words):
    with pytest.raises(ConfigError, match=words):
        check_denoisers(_config(home, **settings), SQUARE)


def test_zero_terminal_snr_works_with_v_prediction(home):
    noise = {"prediction_type": "v_prediction"}
    check_denoisers(_config(home, student="zero", teachers=("zero",), noise=noise), SQUARE)


def test_size_that_the_network_cannot_halve_is_refused(home):
    with pytest.raises(ConfigError, match=r"multiples of 4 \(the autoencoder's 2 × the network's own 2\).*\[16, 18\]"):
        check_denoisers(_config(home), [(16, 16), (16, 18)])
