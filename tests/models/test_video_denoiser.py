"""Video transformers asked about [samples, channels, frames, height, width], as diffusers' own pipelines ask them."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, CosmosTransformer3DModel, WanTransformer3DModel

from raydistill.errors import ConfigError
from raydistill.models.denoiser import predict, shapes_of


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
    ).eval()  # fmt: skip


def cosmos() -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 8, 8), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).eval()  # fmt: skip


def cogvideox(rotary: bool) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=5, use_rotary_positional_embeddings=rotary,
    ).eval()  # fmt: skip


X = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = {"prompt_embeds": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))}


@torch.no_grad()
def test_wan_with_one_time_for_all_frames_equals_wan_with_that_time_for_each_frame():
    network = wan()
    t = torch.tensor([700.0, 300.0])
    whole = predict(network, X, t, TEXT)
    assert whole.shape == X.shape
    torch.testing.assert_close(predict(network, X, t[:, None].expand(2, 3), TEXT), whole, rtol=0, atol=1e-6)
    direct = network(X, timestep=t, encoder_hidden_states=TEXT["prompt_embeds"], return_dict=False)[0]
    assert torch.equal(whole, direct)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame():
    network, t = wan(), torch.tensor([700.0, 300.0])
    assert torch.equal(predict(network, X[:, :, 0], t, TEXT), predict(network, X[:, :, :1], t, TEXT)[:, :, 0])


@torch.no_grad()
def test_cosmos_is_told_the_noise_level_itself():
    network, t = cosmos(), torch.tensor([700.0, 300.0])
    direct = network(X, timestep=t / 1000, encoder_hidden_states=TEXT["prompt_embeds"], return_dict=False)[0]
    assert torch.equal(predict(network, X, t, TEXT), direct)
    assert shapes_of(network).latent_channels == 4


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
def test_cogvideox_gets_its_frames_first_and_the_positions_of_its_pipeline(rotary):
    network, t = cogvideox(rotary), torch.tensor([700, 300])
    positions = None
    if rotary:
        pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
        pipeline.vae_scale_factor_spatial, pipeline.transformer = 8, network
        positions = pipeline._prepare_rotary_positional_embeddings(64, 64, 3, torch.device("cpu"))
    direct = network(
        X.transpose(1, 2), TEXT["prompt_embeds"], t, image_rotary_emb=positions, return_dict=False
    )[0].transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(predict(network, X, t, TEXT), direct, rtol=0, atol=1e-6)


def test_cogvideox_has_one_time_for_all_frames():
    with pytest.raises(ConfigError, match="one time for all frames"):
        predict(cogvideox(False), X, torch.full((2, 3), 500.0), TEXT)
