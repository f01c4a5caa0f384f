"""Latents as diffusers' pipelines make and undo them, from every place an autoencoder may lie in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tiny_denoisers import POOLED_WIDTH, TEXT_WIDTH, tiny_sdxl
from tiny_encoders import picture, tiny_vae

from raydistill.config.sources import VaeConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models import autoencoder
from raydistill.models.autoencoder import LatentSpace, load_space, space_facts, space_identity

PIXELS = torch.from_numpy(picture(0, 16, 12)).permute(2, 0, 1)[None].float() / 127.5 - 1


def saved(folder: Path, **settings: object) -> VaeConfig:
    tiny_vae(**settings).save_pretrained(folder / "vae")
    return VaeConfig(source=str(folder))


def test_pixels_are_a_space_of_factor_1() -> None:
    space = load_space("none")
    assert torch.equal(space.encode(PIXELS), PIXELS)
    assert torch.equal(space.decode(PIXELS), PIXELS)
    assert space.facts.to_json() == {"latent_channels": 3, "vae_factor": 1, "scaling": "pixels"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift_factor": 0.11, "scaling_factor": 0.36},
        {"latents_mean": (0.1, -0.2, 0.3, 0.4), "latents_std": (1.5, 2.0, 0.5, 3.0)},
    ],
)
def test_decoding_undoes_the_scaling_exactly(tmp_path: Path, settings: dict[str, object]) -> None:
    vae, space = tiny_vae(**settings), load_space(saved(tmp_path, **settings))
    raw = vae.encode(PIXELS).latent_dist.mode()
    wanted = raw * 0.13025
    if "shift_factor" in settings:
        wanted = (raw - 0.11) * 0.36
    if "latents_mean" in settings:
        mean, std = (torch.tensor(settings[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
        wanted = (raw - mean) * 0.13025 / std
    found = space.encode(PIXELS)
    assert found.shape == (1, 4, 8, 6)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(space.decode(found), vae.decode(raw).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("statistics", [False, True])
def test_decoded_images_are_those_of_the_sdxl_pipeline(tmp_path: Path, statistics: bool) -> None:
    numbers = {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.5, 2.0, 0.5, 3.0)} if statistics else {}
    space = load_space(saved(tmp_path, **numbers))
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(**numbers), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=tiny_sdxl(), scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def sample(kind: str) -> torch.Tensor:
        given = torch.Generator().manual_seed(0)
        return pipeline(
            prompt_embeds=torch.ones(1, 5, TEXT_WIDTH), pooled_prompt_embeds=torch.ones(1, POOLED_WIDTH), height=16,
            width=24, num_inference_steps=1, guidance_scale=1.0, generator=given, output_type=kind,
        ).images  # fmt: skip

    found = (space.decode(sample("latent")) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, sample("pt"), atol=1e-5, rtol=1e-5)


def test_images_of_wans_autoencoder_are_the_first_frame_of_its_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.5, 3.0]}
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).eval()
    vae.save_pretrained(tmp_path / "vae")
    config = VaeConfig(source=str(tmp_path))
    assert space_facts(config).to_json() == {
        "latent_channels": 4, "vae_factor": 8, "scaling": {"scaling_factor": 1.0, **statistics},
    }  # fmt: skip
    space = load_space(config)
    network = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=1,
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=network,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def sample(kind: str) -> torch.Tensor:
        found: torch.Tensor = pipeline(
            prompt_embeds=torch.ones(1, 5, 8), height=32, width=48, num_frames=1, num_inference_steps=1,
            guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type=kind, return_dict=False,
        )[0]  # fmt: skip
        return found

    decoded = (space.decode(sample("latent")[:, :, 0]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, sample("pt")[:, 0], atol=1e-5, rtol=1e-5)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    raw = vae.encode(pixels[:, :, None]).latent_dist
    mean, std = (torch.tensor(statistics[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(space.encode(pixels), (raw.mean[:, :, 0] - mean) / std)
    noise = torch.randn(2, 4, 4, 6)
    wanted = (raw.mean[:, :, 0] + raw.std[:, :, 0] * noise - mean) / std
    torch.testing.assert_close(space.encode(pixels, noise), wanted)


def test_a_sample_is_mean_plus_std_times_noise(tmp_path: Path) -> None:
    space, found = load_space(saved(tmp_path)), tiny_vae().encode(PIXELS).latent_dist
    noise = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(space.encode(PIXELS, noise), (found.mean + found.std * noise) * 0.13025)
    assert torch.equal(space.encode(PIXELS, 0 * noise), space.encode(PIXELS))


def test_an_autoencoder_that_overflows_is_encoded_in_fp32(tmp_path: Path) -> None:
    def dtype(config: VaeConfig, **settings: object) -> torch.dtype:
        space = load_space(config.model_copy(update=settings))
        assert isinstance(space, LatentSpace)
        return next(space.network.parameters()).dtype

    upcast, plain = saved(tmp_path / "a", force_upcast=True), saved(tmp_path / "b", force_upcast=False)
    assert dtype(upcast, dtype="float16") == torch.float32
    assert dtype(plain, dtype="float16") == torch.float16
    assert dtype(upcast, dtype="bfloat16") == torch.bfloat16


def test_facts_need_no_weights(tmp_path: Path) -> None:
    config = saved(tmp_path, shift_factor=0.5)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    facts = space_facts(config)
    assert (facts.channels, facts.factor) == (4, 2)
    assert facts.scaling == {"scaling_factor": 0.13025, "shift_factor": 0.5}
    with pytest.raises(DataError, match=r"cannot be loaded"):
        load_space(config)


def test_one_file_beside_its_config_gives_the_same_latents(tmp_path: Path) -> None:
    config = saved(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    alone = VaeConfig(source=str(file))
    assert torch.equal(load_space(alone).encode(PIXELS), load_space(config).encode(PIXELS))
    assert space_facts(alone) == space_facts(config)


def test_an_original_checkpoint_gives_the_same_latents(tmp_path: Path) -> None:
    config = saved(tmp_path)
    file = tmp_path / "checkpoint" / "model.safetensors"
    file.parent.mkdir()
    save_file(original_names(load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")), file)
    with pytest.raises(DataError, match="does not say its scaling"):
        load_space(VaeConfig(source=str(file)))
    (file.parent / "config.json").write_text((tmp_path / "vae" / "config.json").read_text())
    found = load_space(VaeConfig(source=str(file)))
    torch.testing.assert_close(found.encode(PIXELS), load_space(config).encode(PIXELS))


def test_a_whole_checkpoint_asks_the_hub_for_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = saved(tmp_path)
    weights = original_names(load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))
    file = tmp_path / "whole.safetensors"
    save_file({f"first_stage_model.{name}": value for name, value in weights.items()}, file)
    asked = []

    def snapshot(repo: str, revision: str | None = None, *, folders: list[str], weights: bool) -> Path:
        asked.append((folders, weights))
        return tmp_path

    monkeypatch.setattr(autoencoder, "hub_parts", snapshot)
    found = load_space(VaeConfig(source=str(file)))
    assert set(map(str, asked)) == {"(['vae'], False)"}
    torch.testing.assert_close(found.encode(PIXELS), load_space(config).encode(PIXELS))


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the original Stable Diffusion for an autoencoder of two levels with one layer each."""
    renamed = {}
    for name, value in weights.items():
        new = name
        for ours, theirs in (
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
            ("mid_block.attentions.0.to_k", "mid.attn_1.k"), ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("conv_norm_out", "norm_out"),
            ("down_blocks.", "down."), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
            ("conv_shortcut", "nin_shortcut"),
        ):  # fmt: skip
            new = new.replace(ours, theirs)
        if "up_blocks." in new:  # counted from the other end
            level = int(new.split("up_blocks.")[1][0])
            new = new.replace(f"up_blocks.{level}", f"up.{1 - level}")
        new = new.replace(".resnets.", ".block.")
        renamed[new] = value[..., None, None] if "attn_1" in new and value.ndim == 2 else value
    return renamed


def test_incomplete_weights_are_an_error(tmp_path: Path) -> None:
    config = saved(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors of AutoencoderKL.*encoder\.conv_in\.weight"):
        load_space(config)
    with pytest.raises(DataError, match=r"lack 1 tensors"):
        load_space(VaeConfig(source=str(file)))


def test_what_is_no_autoencoder_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match=r"holds UNet2DModel in .*wanted AutoencoderKL"):
        space_facts(VaeConfig(source=str(tmp_path)))
    with pytest.raises(DataError, match="wanted the folder vae_2"):
        space_facts(VaeConfig(source=str(tmp_path), subfolder="vae_2"))
    config.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        space_facts(VaeConfig(source=str(tmp_path)))
    config.unlink()
    with pytest.raises(DataError, match=r"wanted a config\.json"):
        space_facts(VaeConfig(source=str(tmp_path)))
    (tmp_path / "vae.ckpt").write_bytes(b"")
    with pytest.raises(DataError, match=r"wanted a folder or a \.safetensors file"):
        space_facts(VaeConfig(source=str(tmp_path / "vae.ckpt")))


def test_the_other_kinds_of_autoencoder_have_no_distribution(tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
    ).save_pretrained(tmp_path / "dc")  # fmt: skip
    for name, factor in (("tiny", 2), ("dc", 4)):
        config = VaeConfig(source=str(tmp_path / name))
        space = load_space(config)
        latents = space.encode(PIXELS)
        assert space_facts(config).factor == factor
        assert latents.shape == (1, 4, 16 // factor, 12 // factor)
        assert space.decode(latents).shape == PIXELS.shape
        with pytest.raises(ConfigError, match="set latents: mode"):
            space_facts(config.model_copy(update={"latents": "sample"}))


def test_identity_follows_what_decides_the_latents(tmp_path: Path) -> None:
    config = saved(tmp_path / "a")
    base = space_identity(config)
    saved(tmp_path / "b")
    assert space_identity(VaeConfig(source=str(tmp_path / "b"))) == base
    assert space_identity(config.model_copy(update={"seed": 5})) == base  # nothing is drawn
    changes = [{"dtype": "bfloat16"}, {"latents": "sample"}, {"latents": "sample", "seed": 5}]
    others = [space_identity(config.model_copy(update=change)) for change in changes]
    others.append(space_identity(saved(tmp_path / "c", seed=1)))
    others.append(space_identity(saved(tmp_path / "d", scaling_factor=0.5)))
    assert len({json.dumps(one, sort_keys=True) for one in [base, *others]}) == 6
