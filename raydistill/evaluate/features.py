"""Generated images against held-out ones, through the eyes of another network: FID, KID and the CLIP score.

The Fréchet distance has a bias that grows with the number of features d and falls with the number of images n, so it is
only ever reported with n and the extractor's name, and marked where n < 2 d. The kernel distance has none.
Sources: Heusel et al. 2017, arXiv 1706.08500, Eq. 6; Bińkowski et al. 2018, arXiv 1801.01401, Eq. 4 and Sec. 4;
Hessel et al. 2021, arXiv 2104.08718, Eq. 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from raydistill.errors import ConfigError, DataError
from raydistill.models.hub import hub_folder
from raydistill.models.sources import resolve_source
from raydistill.signals import JsonValue

ENOUGH_IMAGES = 2
"""Images per feature below which a Fréchet distance is marked as unreliable."""
SUBSETS, SUBSET_SIZE = 50, 100
"""Subsets over which the kernel distance is averaged, and the most images in one."""
BATCH = 16


class Extractor:
    """A TorchScript network from images to feature vectors.

    Images are resized (bilinear, anti-aliased) to `size`² and fed as (x - 128) / 128 with x in [0, 255], as the
    Inception networks of the FID papers want them.
    """

    def __init__(self, source: str, size: int, device: torch.device, *, key: str = "evaluate.images.feature_extractor"):
        """`key` begins the messages about a file that is none."""
        self.name, self.size, self.device = extractor_name(source), size, device
        self.network = load_torchscript(extractor_file(source, key=key), device, key=key)

    @torch.no_grad()
    def __call__(self, images: Iterable[Float[Tensor, "3 h w"]]) -> Float[Tensor, "n d"]:
        """Features of images with values in [0, 1], which may differ in size; fp32 on the CPU."""
        sized = [resized(image, self.size).to(self.device) for image in images]
        batches = [torch.stack(sized[i : i + BATCH]) for i in range(0, len(sized), BATCH)]
        found = [self.network((255 * batch - 128) / 128) for batch in batches]
        if not all(isinstance(f, Tensor) and f.flatten(1).ndim == 2 for f in found):
            raise ConfigError(
                f"evaluate.images.feature_extractor: wanted a network that gives one vector per image, found one that "
                f"gives {type(found[0]).__name__} ({self.name})."
            )
        return torch.cat([f.flatten(1).float().cpu() for f in found])


def extractor_file(source: str, *, key: str = "evaluate.images.feature_extractor") -> Path:
    """The local file of an extractor; `ConfigError` or `DataError` when there is none."""
    path = resolve_source(source)
    if not isinstance(path, Path) or not path.is_file():
        raise ConfigError(f"{key}: wanted a TorchScript file, found {source}.")
    return path


def load_torchscript(path: Path, device: torch.device, *, key: str) -> nn.Module:
    """The network in a TorchScript file; `DataError` when it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is what published extractors are
            return cast(nn.Module, torch.jit.load(str(path), map_location=device)).eval()
    except RuntimeError as error:
        raise DataError(
            f"{key}: {path} is no TorchScript file that this torch can read: {str(error).splitlines()[0]}. "
            "Give a file written by torch.jit.save."
        ) from error


def extractor_name(source: str) -> str:
    """What an extractor is called in tables: the name of its file."""
    return Path(source.partition("#")[0]).stem


def resized(image: Float[Tensor, "3 h w"], size: int) -> Float[Tensor, "3 size size"]:
    """An image brought to `size`²."""
    batch = image[None].float()
    return interpolate(batch, size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def feature_distances(
    generated: Float[Tensor, "n d"],
    held_out: Float[Tensor, "m d"],
    extractor: str,
    *,
    things: str = "images",
    remedy: str = "raise evaluate.images.feature_images and evaluate.held_out",
) -> dict[str, JsonValue]:
    """Fréchet and kernel distance between two sets of features.

    `reliable` is false where the smaller set has fewer than 2 d images: then only the kernel distance tells much.
    `things` and `remedy` are the words of the `DataError` where there are too few.
    """
    images = min(len(generated), len(held_out))
    if images < 2:
        raise DataError(
            f"wanted at least 2 generated and 2 held-out {things} to compare their features, found {len(generated)} "
            f"and {len(held_out)}; {remedy}."
        )
    kernel, deviation = _kernel_distance(generated, held_out)
    return {
        "extractor": extractor,
        "things": things,
        "dimensions": generated.shape[1],
        "generated": len(generated),
        "held_out": len(held_out),
        "frechet_distance": _frechet_distance(generated, held_out),
        "reliable": images >= ENOUGH_IMAGES * generated.shape[1],
        "kernel_distance": kernel,
        "kernel_distance_deviation": deviation,
    }


class _Given(nn.Module):
    """Passes features through, where torchmetrics wants a network that makes them."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _frechet_distance(generated: Tensor, held_out: Tensor) -> float:
    a, b = generated.double(), held_out.double()
    if len(a) + len(b) < a.shape[1]:
        # All images lie in a space of n + m dimensions: there the distance is the same, and much sooner found.
        basis = torch.linalg.qr(torch.cat([a, b]).T).Q
        a, b = a @ basis, b @ basis
    metric = FrechetInceptionDistance(_Given(a.shape[1]))
    metric.update(b, real=True)
    metric.update(a, real=False)
    return float(metric.compute())


def _kernel_distance(generated: Tensor, held_out: Tensor) -> tuple[float, float]:
    size = min(SUBSET_SIZE, len(generated), len(held_out))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory
        torch.manual_seed(0)  # of the subsets
        metric = KernelInceptionDistance(_Given(generated.shape[1]), subsets=SUBSETS, subset_size=size)
        metric.update(held_out.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class ClipScore:
    """100 max(cos(image, caption), 0) of a CLIP model."""

    def __init__(self, source: str, device: torch.device):
        found = resolve_source(source)
        folder = found if isinstance(found, Path) else hub_folder(found, weights=True)
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"evaluate.images.clip_model: {source} is no folder of a CLIP model with its tokenizer and image "
                f"processor: {str(error).splitlines()[0]}"
            ) from error
        self.name, self.device = Path(source).name, device
        nn.Module.to(self.model, device)

    @torch.no_grad()
    def total(self, images: Sequence[Float[Tensor, "3 h w"]], captions: Sequence[str]) -> float:
        """Sum of the scores of images with values in [0, 1] and their captions."""
        total = 0.0
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            pixels = self.processor([(255 * image.clamp(0, 1)).byte() for image in images[part]], return_tensors="pt")
            text = self.tokenizer(list(captions[part]), padding=True, truncation=True, return_tensors="pt")
            found = self.model(
                input_ids=text["input_ids"].to(self.device),
                attention_mask=text["attention_mask"].to(self.device),
                pixel_values=pixels["pixel_values"].to(self.device),
            )
            total += float((found.image_embeds * found.text_embeds).sum(-1).clamp(min=0).sum())
        return 100 * total
