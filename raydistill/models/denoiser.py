"""Denoisers of diffusers: loading one from the `source` of a configuration, and asking it for a prediction.

Weights come from safetensors alone; nothing is unpickled and no code of a checkpoint is run.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn

from raydistill.config.models import DiffusersModel
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError, DataError, SignalMismatch
from raydistill.models.assemble import differences, fill_network, read_weights
from raydistill.models.causal_families import network_dtype
from raydistill.models.hub import hub_parts
from raydistill.models.parts import Part, find_part, listing, load_errors_explained, read_settings
from raydistill.models.sources import resolve_source
from raydistill.models.video_denoiser import ask_video
from raydistill.signals import JsonValue

NETWORKS: dict[str, type[ModelMixin]] = {
    kind.__name__: kind
    for kind in (
        UNet2DConditionModel,
        UNet2DModel,
        SD3Transformer2DModel,
        PixArtTransformer2DModel,
        WanTransformer3DModel,
        CosmosTransformer3DModel,
        CogVideoXTransformer3DModel,
    )
}
"""Classes that `predict` knows how to ask, by their name in config.json."""
VIDEO_NETWORKS = (WanTransformer3DModel, CosmosTransformer3DModel, CogVideoXTransformer3DModel)
"""Those among them that see frames; an image is one frame to them."""
FOLDERS = ("unet", "transformer")
"""Where a denoiser lies inside a pipeline."""
SCHEDULER = "scheduler_config.json"
TIME_IDS = 6
"""Numbers of SDXL's size conditioning: original size, crop corner, target size, each height first."""


# --- loading ----------------------------------------------------------------------------------------------------


def load_denoiser(model: DiffusersModel, *, dtype: torch.dtype | None = None) -> ModelMixin:
    """The denoiser with its weights, in evaluation mode on the CPU, in `dtype` (by default that of the configuration).

    Raises `DataError` when weights are missing, unreadable or do not fill the architecture, `ConfigError` for a class
    that `predict` does not know.
    """
    if model.overrides:
        raise ConfigError(
            f"{model.source}: overrides {sorted(model.overrides)} change the architecture, so its weights do not fit; "
            "use init.kind: random or blocks, or drop the overrides."
        )
    part = _part(model, weights=True)
    config = _config(part)
    kind: Any = network_class(config, model.source)
    wanted = dtype or getattr(torch, model.dtype)
    if not part.weights:
        raise DataError(
            f"{model.source}: wanted weights (diffusion_pytorch_model*.safetensors) in {part.folder}, found "
            f"{listing(part.folder)}. Weights in other formats are not read; save them as safetensors."
        )
    if part.is_file:
        return _from_file(part, config, wanted)
    with load_errors_explained(model.source), _quiet():
        network, info = kind.from_pretrained(
            str(part.folder), dtype=wanted, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if problem := differences(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), []):
        raise DataError(
            f"{model.source}: wanted the tensors of {kind.__name__} in {part.folder}, found {problem}. "
            "Use the weights and the config.json of one and the same model."
        )
    loaded: ModelMixin = network.eval()
    return loaded


def _from_file(part: Part, config: Mapping[str, JsonValue], dtype: torch.dtype) -> ModelMixin:
    """A denoiser from one file, whose tensors are named as in diffusers or as in the original code of its family."""
    state = read_weights(part.root)
    blank = blank_network(config, source=part.source)
    names = set(blank.state_dict())
    if 2 * len(names & set(state)) > len(names):
        fill_network(blank, state, where=part.source, dtype=dtype)
        return blank
    kind: Any = type(blank)
    with load_errors_explained(part.source), _quiet():
        network: ModelMixin = kind.from_single_file(
            state, config=str(_config_folder(part)), local_files_only=True, dtype=dtype
        )
    # What the file lacks is left without memory.
    empty = [name for name, parameter in network.named_parameters() if parameter.device.type == "meta"]
    if empty:
        raise DataError(
            f"{part.source}: wanted the tensors of {kind.__name__}, found {differences(empty, [], [])}. "
            "Use the weights and the config.json of one and the same model."
        )
    return network.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings about weights that do not fit: those are errors here, and said as such."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def stored(model: DiffusersModel) -> tuple[dict[str, JsonValue], list[Path]]:
    """The config.json of a denoiser and its safetensors files, neither of which is read any further."""
    part = _part(model, weights=True)
    if not part.weights:
        raise DataError(
            f"{model.source}: wanted weights (diffusion_pytorch_model*.safetensors) in {part.folder}, found "
            f"{listing(part.folder)}. Weights in other formats are not read; save them as safetensors."
        )
    return _config(part), part.weights


def denoiser_config(model: DiffusersModel) -> dict[str, JsonValue]:
    """Its config.json with `overrides` applied; reads no weights. `ConfigError` for unknown overrides or classes."""
    config = _config(_part(model, weights=False))
    kind = network_class(config, model.source)
    known = inspect.signature(kind.__init__).parameters
    for key in model.overrides:
        if key not in known or key == "self":
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(k for k in known if k != 'self')}"
            raise ConfigError(f"overrides.{key}: the configuration of {model.source} has no such key{hint}")
    return {**config, **model.overrides}


def blank_network(config: Mapping[str, JsonValue], *, source: str) -> ModelMixin:
    """A network of a config.json, parameters on the meta device, buffers real; `DataError` when it cannot be made."""
    kind: Any = network_class(config, source)
    with load_errors_explained(source), _quiet(), init_empty_weights(include_buffers=False):
        network: ModelMixin = kind.from_config(dict(config))
    return network.eval()


def empty_denoiser(model: DiffusersModel) -> ModelMixin:
    """The denoiser without weights, wholly on the meta device: names, shapes and counts for nothing."""
    network = blank_network(denoiser_config(model), source=model.source)
    torch.nn.Module.to(network, "meta")
    return network


def denoiser_identity(model: DiffusersModel) -> dict[str, JsonValue]:
    """What decides its predictions, for fingerprints: weights' hashes or Hub commit, architecture, dtype, process."""
    part = _part(model, weights=False)
    return {**part.identity(), "dtype": model.dtype, "process": process_of(model).to_json()}


def network_class(config: Mapping[str, JsonValue], source: str) -> type[ModelMixin]:
    """The class that a config.json names; `ConfigError` unless `predict` can ask a model of that class and settings."""
    name = str(config.get("_class_name"))
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        name = "PixArtTransformer2DModel"  # what PixArt's own checkpoints call it
    if name not in NETWORKS:
        raise ConfigError(
            f"{source}: wanted a denoiser of the class {', '.join(NETWORKS)}, found {name}. Use one of these."
        )
    for key, allowed in _UNDERSTOOD.get(name, {}).items():
        if config.get(key) not in allowed:
            raise ConfigError(
                f"{source}: wanted a {name} with {key}: {' or '.join(map(json.dumps, allowed))}, found "
                f"{json.dumps(config[key])}, a condition that images with captions do not have. Use another model."
            )
    return NETWORKS[name]


_UNDERSTOOD: dict[str, dict[str, tuple[JsonValue, ...]]] = {
    "UNet2DConditionModel": {
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
    },
    "UNet2DModel": {"class_embed_type": (None,), "num_class_embeds": (None,)},
    "WanTransformer3DModel": {"image_dim": (None,)},
    "CogVideoXTransformer3DModel": {"patch_size_t": (None,), "ofs_embed_dim": (None,)},
}
"""Settings that ask for inputs which we do not have, and their values that do not."""


# --- its files --------------------------------------------------------------------------------------------------


def _part(model: DiffusersModel, *, weights: bool) -> Part:
    return find_part(
        model.source, model.subfolder, model.revision, names=FOLDERS, beside=("scheduler",), weights=weights
    )


def _config(part: Part) -> dict[str, JsonValue]:
    folder = _config_folder(part) if part.is_file else part.folder
    return Part(part.source, part.root, folder, part.commit).config


def _config_folder(part: Part) -> Path:
    """The folder whose config.json describes a single file: beside it, else that of the model family it belongs to."""
    if (part.folder / "config.json").is_file():
        return part.folder
    with load_errors_explained(part.source):
        family: dict[str, str] = fetch_diffusers_config(read_weights(part.root))
    try:
        root = hub_parts(family["pretrained_model_name_or_path"], folders=FOLDERS, weights=False)
    except DataError as error:
        raise DataError(
            f"{part.source}: wanted the config.json of its denoiser in {part.folder}, found none, and that of "
            f"{family['pretrained_model_name_or_path']}, which it looks like, cannot be had: {error}"
        ) from error
    return next(root / name for name in FOLDERS if (root / name / "config.json").is_file())


def scheduler_config(model: DiffusersModel) -> dict[str, JsonValue]:
    """The scheduler configuration that belongs to a denoiser; `ConfigError` when it has none."""
    if model.scheduler is not None:
        place = resolve_source(model.scheduler)
        root = hub_parts(place, folders=("scheduler", ""), weights=False) if isinstance(place, str) else place
        places = [root] if root.is_file() else [root / SCHEDULER, root / "scheduler" / SCHEDULER]
    else:
        part = _part(model, weights=False)
        root = part.folder if part.is_file else part.root
        places = [root / "scheduler" / SCHEDULER, part.folder / SCHEDULER, part.folder.parent / "scheduler" / SCHEDULER]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{model.source}: wanted the configuration of its scheduler, which says what it predicts and under which "
            f"noise schedule, found none at {' or '.join(map(str, places))}. Name its folder with model.scheduler."
        )
    return read_settings(found, source=model.source)


def process_of(model: DiffusersModel) -> Process:
    """Noise schedule and prediction type of a denoiser, from the configuration of its scheduler."""
    return process_of_scheduler(scheduler_config(model))


def process_of_scheduler(config: Mapping[str, JsonValue]) -> Process:
    """The process of a scheduler_config.json, in which diffusers leaves out what its class has by default."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return Process.from_scheduler({**defaults, **config})


# --- shapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a denoiser wants of its inputs."""

    latent_channels: int
    text_width: int
    """Width of the text embeddings; 0 for one without text."""
    pooled_width: int
    """Width of the vector of the whole caption; 0 for one without."""
    multiple: int
    """Height and width of latents are multiples of this: its own downsampling."""

    def facts(self) -> dict[str, JsonValue]:
        """As it stands in manifests."""
        return {
            "latent_channels": self.latent_channels,
            "text_width": self.text_width,
            "pooled_width": self.pooled_width,
        }


def shapes_of(network: nn.Module) -> Shapes:
    """What `network`, which may be on the meta device, wants of its inputs."""
    config: Any = getattr(network, "config", None)
    match network:
        case UNet2DConditionModel():
            text = pooled = 0
            if any("CrossAttn" in str(b) for b in (*config.down_block_types, config.mid_block_type)):
                cross = config.encoder_hid_dim or config.cross_attention_dim
                text = max(cross) if isinstance(cross, tuple | list) else int(cross)
            if config.addition_embed_type == "text_time":
                pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
            return Shapes(config.in_channels, text, pooled, 2 ** (len(config.down_block_types) - 1))
        case UNet2DModel():
            return Shapes(config.in_channels, 0, 0, 2 ** (len(config.down_block_types) - 1))
        case SD3Transformer2DModel():
            return Shapes(
                config.in_channels, config.joint_attention_dim, config.pooled_projection_dim, config.patch_size
            )
        case PixArtTransformer2DModel():
            return Shapes(config.in_channels, config.caption_channels, 0, config.patch_size)
        case WanTransformer3DModel():
            return Shapes(config.in_channels, config.text_dim, 0, config.patch_size[1])
        case CosmosTransformer3DModel():
            return Shapes(config.out_channels, config.text_embed_dim, 0, config.patch_size[1])
        case CogVideoXTransformer3DModel():
            return Shapes(config.in_channels, config.text_embed_dim, 0, config.patch_size)
        case _:
            raise _unknown(network)


def shape_facts(network: nn.Module) -> dict[str, JsonValue]:
    """`latent_channels`, `text_width` and `pooled_width` of a denoiser."""
    return shapes_of(network).facts()


# --- predictions ------------------------------------------------------------------------------------------------


def predict(network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """What `network` predicts of x_t [samples, channels, (frames,) height, width], in its own prediction type, fp32.

    `t` [samples] is what the network is told: `Process.times(timesteps)` or `Process.told(times)`; Wan and Cosmos may
    be told one for each latent frame, [samples, frames]. `conditioning` holds `prompt_embeds`,
    `pooled` and `time_ids` as far as the network wants them (others are passed over); inputs take the network's dtype.
    Learned variances are cut off. `SignalMismatch` names what is missing.
    """
    dtype = network_dtype(network)
    x = x_t.to(dtype)

    def wanted(name: str) -> Tensor:
        if name not in conditioning:
            raise SignalMismatch(
                f"{type(network).__name__} wants {name}, found {', '.join(sorted(conditioning)) or 'nothing'}; give "
                "source.text_encoders what it was trained with."
            )
        return conditioning[name] if name == "time_ids" else conditioning[name].to(dtype)

    match network:
        case UNet2DConditionModel():
            text = wanted("prompt_embeds") if shapes_of(network).text_width else None
            added: dict[str, Tensor | None] | None = None
            if shapes_of(network).pooled_width:
                added = {"text_embeds": wanted("pooled"), "time_ids": wanted("time_ids")}
            out = network(x, t, text, added_cond_kwargs=added, return_dict=False)[0]
        case UNet2DModel():
            out = network(x, t, return_dict=False)[0]
        case SD3Transformer2DModel():
            out = network(
                x,
                encoder_hidden_states=wanted("prompt_embeds"),
                pooled_projections=wanted("pooled"),
                timestep=t,
                return_dict=False,
            )[0]
        case PixArtTransformer2DModel():
            added = {"resolution": None, "aspect_ratio": None}
            if network.use_additional_conditions:
                sizes = wanted("time_ids").to(dtype)
                added = {"resolution": sizes[:, :2], "aspect_ratio": (sizes[:, 4] / sizes[:, 5])[:, None]}
            states = wanted("prompt_embeds")
            out = network(
                x,
                encoder_hidden_states=states,
                encoder_attention_mask=(states != 0).any(-1),  # padded places are 0, and it never looked at them
                timestep=t,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        case WanTransformer3DModel() | CosmosTransformer3DModel() | CogVideoXTransformer3DModel():
            video = x if x.ndim == 5 else x[:, :, None]
            said = ask_video(network, video, t, wanted("prompt_embeds"))
            out = said if x.ndim == 5 else said[:, :, 0]
        case _:
            raise _unknown(network)
    return out[:, : x_t.shape[1]].float()


def with_one_sample(
    network: nn.Module, *, size: tuple[int, int] | None = None, tokens: int = 1, frames: int | None = None
) -> Tensor:
    """A forward pass with one sample, on the network's device; on the meta device it costs nothing.

    `size` is the height and width of its latents, by default the network's usual one, `tokens` the length of its text,
    `frames` the number of its latent frames, None for an image.
    """
    shapes = shapes_of(network)
    usual = getattr(getattr(network, "config", None), "sample_size", None) or 8 * shapes.multiple
    height, width = size or ((usual, usual) if isinstance(usual, int) else usual)
    device = next(network.parameters()).device
    given = {"time_ids": torch.ones(1, TIME_IDS, device=device)}
    given |= {"prompt_embeds": torch.zeros(1, tokens, shapes.text_width, device=device)} if shapes.text_width else {}
    given |= {"pooled": torch.zeros(1, shapes.pooled_width, device=device)} if shapes.pooled_width else {}
    length = () if frames is None else (frames,)
    x_t = torch.zeros(1, shapes.latent_channels, *length, height, width, device=device)
    return predict(network, x_t, torch.zeros(1, device=device), given)


def _unknown(network: nn.Module) -> ConfigError:
    return ConfigError(f"wanted a denoiser of the class {', '.join(NETWORKS)}, found {type(network).__name__}.")
