"""Frozen text encoders: what they make of a caption, put side by side along the feature axis.

CLIP encoders read their padding as diffusers' pipelines let them. All others (BERT, MiniLM, T5, …) get an attention
mask, and their states at padded places are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raydistill.config.sources import TextEncoderConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.load import load_tokenizer, tokenizer_identity
from raydistill.models.parts import Part, find_part, load_errors_explained
from raydistill.signals import JsonValue

CLIP_TYPES = ("clip", "clip_text_model")
"""`model_type` of CLIP as a whole and of its text half alone."""
NO_LIMIT = 1_000_000
"""Tokenizers that know no limit state a huge number."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What is known of text encoders side by side without running them."""

    width: int = 0
    """Features of a token, of all encoders together; 0 without encoders."""
    pooled_width: int = 0
    """Features of a whole caption; 0 when no encoder gives any."""
    tokens: int = 0
    """Tokens of a caption, padding included."""

    def to_json(self) -> dict[str, JsonValue]:
        """As it stands in the facts of a cache."""
        return {"text_width": self.width, "pooled_width": self.pooled_width, "text_tokens": self.tokens}


def text_facts(encoders: Sequence[TextEncoderConfig]) -> TextFacts:
    """Widths and length of what `encoders` give together.

    Raises `ConfigError` for a layer, a length or a pooling that an encoder does not have, and for encoders of different
    lengths, which cannot stand side by side; `DataError` for files that are missing.
    """
    each = [_open(encoder, index).facts for index, encoder in enumerate(encoders)]
    return _together(encoders, each)


def _together(encoders: Sequence[TextEncoderConfig], each: Sequence[TextFacts]) -> TextFacts:
    if not each:
        return TextFacts()
    for index, facts in enumerate(each):
        if facts.tokens != each[0].tokens:
            raise ConfigError(
                f"source.text_encoders.{index}.max_tokens: encoders stand side by side along the feature axis and need "
                f"one length, found {each[0].tokens} ({encoders[0].source}) and {facts.tokens} "
                f"({encoders[index].source}); set max_tokens."
            )
    return TextFacts(sum(f.width for f in each), sum(f.pooled_width for f in each), each[0].tokens)


def text_identity(encoder: TextEncoderConfig) -> dict[str, JsonValue]:
    """What decides an encoder's embeddings, for fingerprints: weights, architecture, tokenizer and every setting."""
    settings = encoder.model_dump(mode="json", exclude={"source", "subfolder", "revision"})
    opened = _open(encoder, 0)
    padded = opened.tokenizer("", padding="max_length", max_length=4, truncation=True)["input_ids"]
    read: dict[str, JsonValue] = {"tokenizer": tokenizer_identity(opened.tokenizer), "of_nothing": list(padded)}
    return {**settings, **read, "tokens": opened.facts.tokens, **opened.part.identity()}


class TextEncoders:
    """Encoders side by side, in evaluation mode on one device."""

    def __init__(self, encoders: Sequence[TextEncoderConfig], device: str = "cpu"):
        """Raises as `text_facts`, and `DataError` for weights that are missing, unreadable or incomplete."""
        opened = [_open(encoder, index, weights=True) for index, encoder in enumerate(encoders)]
        self.facts = _together(encoders, [one.facts for one in opened])
        self._encoders = [_Encoder(one, device) for one in opened]

    def __call__(self, captions: Sequence[str], *, batch: int) -> tuple[Tensor, Tensor]:
        """fp32 embeddings [captions, tokens, width] and pooled ones [captions, pooled width], on the CPU.

        Captions are encoded `batch` at a time.
        """
        embeds, pooled = [], []
        for start in range(0, len(captions), batch):
            some = list(captions[start : start + batch])
            pairs = [encoder(some) for encoder in self._encoders]
            embeds.append(torch.cat([one for one, _ in pairs], dim=-1))
            pooled.append(torch.cat([one for _, one in pairs], dim=-1))
        return torch.cat(embeds), torch.cat(pooled)


class _Encoder:
    def __init__(self, opened: _Opened, device: str):
        self._opened = opened
        self._network = nn.Module.to(_load(opened), device)
        self._is_clip = isinstance(self._network, CLIPTextModel | CLIPTextModelWithProjection)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        opened = self._opened
        read = opened.tokenizer(
            captions, padding="max_length", max_length=opened.facts.tokens, truncation=True, return_tensors="pt"
        )
        ids = read["input_ids"].to(self._network.device)
        mask = None if self._is_clip else read["attention_mask"].to(self._network.device)
        found = self._network(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        last, layer = found.last_hidden_state, opened.encoder.layer
        states = last if layer == -1 else found.hidden_states[layer]  # the last one with the encoder's final norm
        keep = torch.ones_like(ids) if mask is None else mask
        match opened.encoder.pooled:
            case "projection":
                pooled = found.text_embeds
            case "mean":
                weights = read["attention_mask"].to(last)[..., None]
                pooled = (last * weights).sum(1) / weights.sum(1).clamp(min=1)
            case "none":
                pooled = last.new_zeros(len(captions), 0)
        return (states * keep[..., None]).float().cpu(), pooled.float().cpu()


@dataclass(frozen=True, slots=True)
class _Opened:
    """An encoder whose files are found, before its weights are read."""

    encoder: TextEncoderConfig
    part: Part
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    facts: TextFacts


def _open(encoder: TextEncoderConfig, index: int, *, weights: bool = False) -> _Opened:
    part = _part(encoder, weights=weights)
    config, tokenizer = _text_config(part), _tokenizer(encoder, part)
    return _Opened(encoder, part, config, tokenizer, _facts(encoder, index, part, config, tokenizer))


def _facts(
    encoder: TextEncoderConfig, index: int, part: Part, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> TextFacts:
    at = f"source.text_encoders.{index}"
    layers = int(config.num_hidden_layers)
    if not -(layers + 1) <= encoder.layer <= -1:
        raise ConfigError(
            f"{at}.layer: {encoder.source} has {layers} layers, so wanted -1 to {-(layers + 1)} (its embeddings), "
            f"found {encoder.layer}."
        )
    projects = config.model_type in CLIP_TYPES and part.config.get("architectures") != ["CLIPTextModel"]
    if encoder.pooled == "projection" and not projects:
        raise ConfigError(
            f"{at}.pooled: {encoder.source} has no projected embedding (that of a CLIP text encoder with projection); "
            "use mean or none."
        )
    width = int(config.hidden_size)
    pooled = {"projection": getattr(config, "projection_dim", 0), "mean": width, "none": 0}[encoder.pooled]
    return TextFacts(width, int(pooled), _length(encoder, config, tokenizer, at))


def _length(encoder: TextEncoderConfig, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, at: str) -> int:
    places = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    if config.model_type in ("t5", "mt5", "umt5"):
        places = NO_LIMIT  # relative positions
    limit = min(int(tokenizer.model_max_length), places)
    if encoder.max_tokens is None and limit >= NO_LIMIT:
        raise ConfigError(f"{at}.max_tokens: the tokenizer of {encoder.source} states no limit; set max_tokens.")
    if encoder.max_tokens is not None and encoder.max_tokens > places:
        raise ConfigError(
            f"{at}.max_tokens: {encoder.source} has places for {places} tokens, found {encoder.max_tokens}; lower it."
        )
    return encoder.max_tokens or limit


def _part(encoder: TextEncoderConfig, *, weights: bool) -> Part:
    beside = [_tokenizer_folder(encoder)] if encoder.subfolder else []
    part = find_part(
        encoder.source, encoder.subfolder, encoder.revision, names=(), beside=[*beside, ""], weights=weights
    )
    if part.is_file:
        raise DataError(f"{encoder.source}: wanted the folder of a text encoder, found the file {part.root.name}")
    return part


def _tokenizer_folder(encoder: TextEncoderConfig) -> str:
    return (encoder.subfolder or "").replace("text_encoder", "tokenizer")


def _tokenizer(encoder: TextEncoderConfig, part: Part) -> PreTrainedTokenizerBase:
    inside = _tokenizer_folder(encoder)
    own = bool(inside) and inside != encoder.subfolder and (part.root / inside).is_dir()
    tokenizer = load_tokenizer(str(part.root / inside if own else part.root))
    if tokenizer.pad_token_id is None:
        raise DataError(f"{encoder.source}: its tokenizer has no padding token; wanted one that pads captions")
    return tokenizer


def _text_config(part: Part) -> PreTrainedConfig:
    kind = str(part.config.get("model_type"))
    with load_errors_explained(part.source):
        if kind in CLIP_TYPES:
            return CLIPTextConfig.from_pretrained(part.folder, local_files_only=True)
        return AutoConfig.from_pretrained(part.folder, trust_remote_code=False, local_files_only=True)


def _load(opened: _Opened) -> PreTrainedModel:
    """The encoder with its weights. A pooler, which is not used, may be missing."""
    encoder, part, config = opened.encoder, opened.part, opened.config
    kind: type[Any]
    if config.model_type in CLIP_TYPES:
        with_projection = encoder.pooled == "projection" or "Projection" in str(part.config.get("architectures"))
        kind = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    else:
        kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    load = cast("Callable[..., tuple[PreTrainedModel, dict[str, set[str]]]]", kind.from_pretrained)
    with load_errors_explained(encoder.source):
        network, info = load(
            part.folder, config=config, dtype=getattr(torch, encoder.dtype), trust_remote_code=False,
            weights_only=True, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise DataError(
            f"{encoder.source}: the weights in {part.folder} lack {len(missing)} tensors of {type(network).__name__}, "
            f"for instance {', '.join(missing[:3])}; they would be random. Use the folder of the whole encoder."
        )
    return network.eval().requires_grad_(False)
