"""How the video transformers of diffusers are asked about latents [samples, channels, frames, height, width]."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from raydistill.errors import ConfigError, SignalMismatch
from raydistill.models.causal_families import family_of


def ask_video(network: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """What `network` says of `x` [samples, channels, frames, height, width], all frames seeing one another.

    `t` is what it is told, [samples] or, but for CogVideoX, [samples, frames]; `text` [samples, tokens, width].
    """
    if isinstance(network, CogVideoXTransformer3DModel):
        return _ask_cogvideox(network, x, t, text)
    family = family_of(network)
    return family.ask(network, x, t, text, family.frame_tokens(network, *x.shape[3:]))


def _ask_cogvideox(network: CogVideoXTransformer3DModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    if t.ndim != 1:
        raise ConfigError(
            "CogVideoXTransformer3DModel has one time for all frames of a video, found one for each; use a Wan- or "
            "Cosmos-shaped model."
        )
    config: Any = cast(Any, network).config
    if not config.use_rotary_positional_embeddings and text.shape[1] != config.max_text_seq_length:
        raise SignalMismatch(
            f"CogVideoXTransformer3DModel wants captions of {config.max_text_seq_length} places, which its positions "
            f"are for, found {text.shape[1]}; set max_tokens: {config.max_text_seq_length} in source.text_encoders."
        )
    rotary = None
    if config.use_rotary_positional_embeddings:
        frames, height, width = x.shape[2], x.shape[3] // config.patch_size, x.shape[4] // config.patch_size
        usual = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        rotary = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid((height, width), usual[1], usual[0]),
            grid_size=(height, width),
            temporal_size=frames,
            device=x.device,
        )
    out: Tensor = network(
        x.transpose(1, 2), encoder_hidden_states=text, timestep=t, image_rotary_emb=rotary, return_dict=False
    )[0]
    return out.transpose(1, 2)
