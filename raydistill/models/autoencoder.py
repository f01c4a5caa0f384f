"""The space in which denoisers work: the latents of an autoencoder of diffusers, or pixels themselves.

Pixels are fp32 in [-1, 1], [n, 3, height, width]. Latents are normalised as diffusers' pipelines do it before the
denoiser sees them: (z - mean) scale / std with per-channel statistics, (z - shift) scale without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan, AutoencoderTiny
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.config.sources import VaeConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.hub import hub_parts
from raydistill.models.parts import Part, find_part, load_errors_explained
from raydistill.signals import JsonValue

CLASSES: dict[str, type[Any]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLWan": AutoencoderKLWan,
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
}
"""The autoencoders that are known to encode and to decode, by `_class_name` of their config.json."""
VIDEO = (AutoencoderKLWan, AutoencoderKLCogVideoX)
"""Those of videos (Wan's is that of Cosmos-Predict2 too); to them an image is a video of one frame."""
DISTRIBUTIONS = (AutoencoderKL, *VIDEO)
"""Those that give a distribution of latents."""
INSIDE_CHECKPOINT = "first_stage_model."
"""How the names of an autoencoder begin in one file of a whole Stable Diffusion checkpoint."""


@dataclass(frozen=True, slots=True)
class SpaceFacts:
    """What can be known of a space without weights."""

    channels: int
    """Channels of a latent; 3 for pixels."""
    factor: int
    """Pixels per latent along one side."""
    scaling: Literal["pixels"] | dict[str, JsonValue]
    """`scaling_factor`, and `shift_factor` or `latents_mean` and `latents_std` where there are any."""
    frame_factor: int = 1
    """One latent is made of this many frames, but the first latent of one frame."""

    def to_json(self) -> dict[str, JsonValue]:
        """As it stands in the facts of a cache."""
        return {"latent_channels": self.channels, "vae_factor": self.factor, "scaling": self.scaling}

    def latent_shape(self, size: tuple[int, int], frames: int | None) -> tuple[int, ...]:
        """Shape of the latents of pictures of a height and width: (channels, height, width), of clips with their frames
        after the channels."""
        length = () if frames is None else ((frames - 1) // self.frame_factor + 1,)
        return (self.channels, *length, size[0] // self.factor, size[1] // self.factor)


class Space(Protocol):
    """From pixels to what the denoiser sees, and back."""

    facts: SpaceFacts

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """fp32 latents [n, channels, height / factor, width / factor] on the CPU; of clips [n, 3, frames, height,
        width] latents [n, channels, latent frames, height / factor, width / factor].

        Without `noise` the mode of the distribution, else mean + std · noise.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """fp32 pixels [n, 3, (frames,) height, width] on the CPU, not clamped."""
        ...


class PixelSpace:
    """No autoencoder at all."""

    facts = SpaceFacts(channels=3, factor=1, scaling="pixels")

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pixels; nothing is sampled."""
        return pixels.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The pixels."""
        return latents.float().cpu()


class LatentSpace:
    """An autoencoder in evaluation mode, on the device and in the number format it was given."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)
        self._like = next(network.parameters())
        self.facts = _facts(network)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Space`. Raises `ConfigError` for noise where the encoder has no distribution."""
        with torch.no_grad():
            given = pixels.to(self._like)
            encode = cast(Any, self.network).encode
            if isinstance(self.network, DISTRIBUTIONS):
                found = encode(self._framed(given)).latent_dist
                mean, std = (self._unframed(value, pixels).float().cpu() for value in (found.mean, found.std))
                raw: Tensor = mean if noise is None else mean + std * noise
            elif noise is not None:
                raise _no_distribution(type(self.network).__name__)
            else:
                out = encode(given)
                raw = (out.latents if isinstance(self.network, AutoencoderTiny) else out.latent).float().cpu()
        shift, scale = _affine(_config(self.network), raw.ndim)
        return (raw - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """See `Space`."""
        shift, scale = _affine(_config(self.network), latents.ndim)
        with torch.no_grad():
            raw = latents.float().cpu() / scale + shift
            found: Tensor = cast(Any, self.network).decode(self._framed(raw.to(self._like))).sample
            return self._unframed(found, latents).float().cpu()

    def _framed(self, given: Tensor) -> Tensor:
        """Images as videos of one frame, where the autoencoder wants videos."""
        return given[:, :, None] if isinstance(self.network, VIDEO) and given.ndim == 4 else given

    def _unframed(self, found: Tensor, given: Tensor) -> Tensor:
        return found[:, :, 0] if isinstance(self.network, VIDEO) and given.ndim == 4 else found


def load_space(vae: VaeConfig | Literal["none"], device: str = "cpu") -> Space:
    """The space of a configuration, with the weights on `device`.

    Raises `DataError` for an autoencoder that is missing, unreadable or incomplete, `ConfigError` for one of an unknown
    class.
    """
    if vae == "none":
        return PixelSpace()
    part = _part(vae, weights=True)
    empty = _empty(vae, part)
    upcast = vae.dtype == "float16" and _config(empty).get("force_upcast", False)
    dtype = torch.float32 if upcast else getattr(torch, vae.dtype)
    with load_errors_explained(vae.source):
        if part.is_file:
            network, missing = _from_file(empty, part.root)
        else:
            network, info = CLASSES[type(empty).__name__].from_pretrained(
                part.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"{vae.source}: the weights in {part.root} lack {len(missing)} tensors of {type(empty).__name__}, for "
            f"instance {', '.join(missing[:3])}; they would be random. Use the folder of the whole autoencoder."
        )
    return LatentSpace(nn.Module.to(network, device, dtype))


def space_facts(vae: VaeConfig | Literal["none"], *, clips: bool = False) -> SpaceFacts:
    """What can be known of a space from its config.json alone; raises as `load_space`, and `ConfigError` when `clips`
    are to be encoded by an autoencoder of images."""
    if vae == "none":
        return PixelSpace.facts
    empty = _empty(vae, _part(vae, weights=False))
    if clips and not isinstance(empty, VIDEO):
        raise ConfigError(
            f"source.vae: wanted an autoencoder of videos ({', '.join(kind.__name__ for kind in VIDEO)}), found "
            f"{type(empty).__name__} in {vae.source}. Name the one that the teacher was trained with."
        )
    if vae.latents == "sample" and not isinstance(empty, DISTRIBUTIONS):
        raise _no_distribution(type(empty).__name__)
    return _facts(empty)


def space_identity(vae: VaeConfig | Literal["none"]) -> JsonValue:
    """What decides the latents, for fingerprints: weights, architecture, number format, mode or sample and its seed."""
    if vae == "none":
        return "none"
    settings: dict[str, JsonValue] = {"dtype": vae.dtype, "latents": vae.latents}
    if vae.latents == "sample":
        settings["seed"] = vae.seed
    return settings | _part(vae, weights=False).identity()


def _part(vae: VaeConfig, *, weights: bool) -> Part:
    return find_part(vae.source, vae.subfolder, vae.revision, names=("vae",), weights=weights)


def _facts(network: nn.Module) -> SpaceFacts:
    config = _config(network)
    channels, frames = "latent_channels", 1
    match network:
        case AutoencoderKL():
            factor = 2 ** (len(config["block_out_channels"]) - 1)
        case AutoencoderKLWan():
            factor, channels = int(config["scale_factor_spatial"]), "z_dim"
            frames = int(config["scale_factor_temporal"])
        case AutoencoderKLCogVideoX():
            factor, frames = 2 ** (len(config["block_out_channels"]) - 1), int(config["temporal_compression_ratio"])
        case _:
            factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    scaling: dict[str, JsonValue] = {"scaling_factor": float(config.get("scaling_factor", 1.0))}
    if config.get("shift_factor"):
        scaling["shift_factor"] = float(config["shift_factor"])
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            scaling[key] = [float(value) for value in config[key]]
    return SpaceFacts(channels=int(config[channels]), factor=factor, scaling=scaling, frame_factor=frames)


def _config(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a model of diffusers, with the defaults of its class."""
    return cast("Mapping[str, Any]", network.config)


def _affine(config: Mapping[str, Any], ndim: int) -> tuple[Tensor, Tensor]:
    """Shift and scale that normalise raw latents z of so many axes as (z - shift) scale; scalars or one per channel."""
    scale = torch.tensor(float(config.get("scaling_factor", 1.0)))  # Wan's has mean and std alone
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (-1, *(1,) * (ndim - 2))
        return torch.tensor(mean).view(shape), scale / torch.tensor(std).view(shape)
    return torch.tensor(float(config.get("shift_factor") or 0.0)), scale


def _empty(vae: VaeConfig, part: Part) -> nn.Module:
    """The autoencoder without weights, on the meta device."""
    if part.is_file and not (part.folder / "config.json").is_file():
        config = _config_of_checkpoint(vae, part.root)
    else:
        config = part.config
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        raise ConfigError(
            f"source.vae: {part.source} holds {name if '_class_name' in config else 'no model of diffusers'} in "
            f"{part.folder}; wanted {', '.join(CLASSES)}. Name the folder of the autoencoder in source.vae.subfolder."
        )
    with load_errors_explained(part.source), torch.device("meta"):
        return CLASSES[name].from_config(config)


def _from_file(empty: nn.Module, file: Path) -> tuple[nn.Module, list[str]]:
    """The autoencoder of one file in fp32, and the tensors that the file lacks.

    The file is an autoencoder as diffusers saves it, or one in the names of the original Stable Diffusion, alone or
    inside a whole checkpoint.
    """
    wanted, names = set(empty.state_dict()), set(_shapes(file))
    if 2 * len(wanted & names) > len(wanted):  # the two ways of naming share a few names
        network = CLASSES[type(empty).__name__].from_config(_config(empty))
        return network, sorted(network.load_state_dict(load_file(file), strict=False).missing_keys)
    if isinstance(empty, AutoencoderTiny):
        return empty, sorted(wanted - names)
    beside = (file.parent / "config.json").is_file()
    place = file.parent if beside else _hub_config(file)
    network = CLASSES[type(empty).__name__].from_single_file(str(file), config=str(place), local_files_only=True)
    return network, sorted(name for name, tensor in network.state_dict().items() if tensor.is_meta)


def _config_of_checkpoint(vae: VaeConfig, file: Path) -> dict[str, JsonValue]:
    """The configuration of the autoencoder of a whole checkpoint in one file, which diffusers tells by its tensors."""
    if not any(name.startswith(INSIDE_CHECKPOINT) for name in _shapes(file)):
        raise DataError(
            f"source.vae: {vae.source} is an autoencoder alone in one file, and that does not say its scaling (0.18215 "
            f"and 0.13025 are both common). Put its config.json into {file.parent}, or use a folder."
        )
    return Part(vae.source, file, _hub_config(file), None).config | {"_class_name": "AutoencoderKL"}


def _hub_config(file: Path) -> Path:
    """Folder of the configuration that belongs to a whole checkpoint in one file."""
    known = fetch_diffusers_config(_shapes(file))["pretrained_model_name_or_path"]
    return hub_parts(str(known), folders=["vae"], weights=False) / "vae"


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a file without their values, on the meta device."""
    with load_errors_explained(str(file)), safe_open(file, framework="pt") as tensors:
        return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}  # noqa: SIM118


def _no_distribution(name: str) -> ConfigError:
    return ConfigError(f"source.vae.latents: {name} gives one latent and no distribution; set latents: mode.")
