"""Tiny autoencoders and text encoders with random weights, in folders as pipelines have them; and little pictures."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENS = 12
WIDTH, POOLED = 8, 8


def tiny_vae(seed: int = 0, **settings: object) -> AutoencoderKL:
    """An autoencoder of two levels, so of factor 2."""
    plain = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.13025,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**{**plain, **settings}).eval()


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A token per letter; `pad` as in SDXL's two tokenizers."""
    tokens = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "!", "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=pad)


def tiny_clip(seed: int = 0, *, projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of three layers."""
    config = CLIPTextConfig(
        vocab_size=55, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=POOLED, bos_token_id=53, eos_token_id=54, pad_token_id=54,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
        for parameter in model.parameters():  # the usual 0.02 makes all captions look alike
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save_sdxl_encoders(folder: Path) -> Path:
    """The autoencoder, both text encoders and both tokenizers of a pipeline in the manner of SDXL."""
    tiny_vae().save_pretrained(folder / "vae")
    tiny_clip(1, projection=False).save_pretrained(folder / "text_encoder")
    tiny_clip(2, projection=True).save_pretrained(folder / "text_encoder_2")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    clip_tokenizer("!").save_pretrained(folder / "tokenizer_2")
    return folder


def sdxl_text_encoders(folder: Path) -> list[dict[str, object]]:
    """The configuration of both."""
    return [
        {"source": str(folder), "subfolder": "text_encoder"},
        {"source": str(folder), "subfolder": "text_encoder_2", "pooled": "projection"},
    ]


def save_bert(folder: Path) -> Path:
    """A tiny encoder with attention in both directions and its tokenizer, in the manner of MiniLM."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "blue"]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=16).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(tokens), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=16,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    """A smooth random picture [height, width, channels], uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BILINEAR) for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def png(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    """A picture as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def write_pictures(folder: Path, captions: dict[str, str | None]) -> Path:
    """A folder of small pictures by name, and a `metadata.jsonl` with the captions that are not None."""
    for seed, name in enumerate(captions):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(picture(seed, 8 + seed % 3, 8 + seed % 2)))
    lines = [json.dumps({"file_name": n, "caption": c}) for n, c in captions.items() if c is not None]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
