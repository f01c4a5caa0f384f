"""Images of every model from the same noise and held-out captions: for people to look at, and for FID, KID and CLIP.

samples.json: `{"kind": "images", "steps": n, "guidance_scale": w, "samples": [{"prompt": caption,
"row_id": id, "reference": file, "outputs": {who: file}}]}`, where files are PNGs in the run folder, `reference` is the
held-out image itself, and `who` is a role of metrics.json or `teacher/<name>`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.cache.dense_read import DenseDataset
from raydistill.config.schema import ImageEvaluation, RunConfig
from raydistill.diffusion.process import Process
from raydistill.evaluate.denoiser import Draws
from raydistill.evaluate.features import ClipScore, Extractor, feature_distances
from raydistill.evaluate.generate import Sampling, first_noise, png, sample
from raydistill.models.autoencoder import load_space
from raydistill.signals import JsonValue
from raydistill.sources.films import webp
from raydistill.storage import Store

FOLDER = "samples"
REFERENCE = "held-out"


@dataclass(frozen=True, slots=True)
class Subject:
    """A held-out row whose caption images are made for."""

    index: int
    """Of its first sample in the data set."""
    row_id: str
    caption: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One image to make: which caption, and which of its noises."""

    subject: Subject
    number: int = 0


@dataclass
class Gallery:
    """Pictures by model, filled model by model."""

    config: RunConfig
    dataset: Draws
    subjects: tuple[Subject, ...]
    """All held-out rows."""
    device: torch.device
    files: dict[str, bytes] = field(default_factory=dict)
    """PNG files by their name in the run folder."""
    _outputs: dict[int, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = self.settings
        self.shown = [Picture(subject) for subject in spread(self.subjects, images.samples)]
        self.counted = [
            Picture(self.subjects[i % len(self.subjects)], i // len(self.subjects))
            for i in range(images.feature_images if images.feature_extractor is not None else 0)
        ]
        self.space = load_space(self.config.images.vae, str(self.device))
        self.extractor: Extractor | None = None
        self.clip: ClipScore | None = None
        self._held_out: Tensor | None = None
        if images.feature_extractor is not None:
            self.extractor = Extractor(images.feature_extractor, images.feature_size, self.device)
        if images.clip_model is not None and any(subject.caption for subject in self.subjects):
            self.clip = ClipScore(images.clip_model, self.device)

    @property
    def settings(self) -> ImageEvaluation:
        """How images are made and measured."""
        return self.config.evaluate.images

    def sampling(self, guidance_scale: float | None = None) -> Sampling:
        """How a model is sampled; `guidance_scale` replaces that of the configuration."""
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        return Sampling(self.settings.sample_steps, scale, clip=self.config.images.vae == "none")

    def add(
        self, who: str, network: nn.Module, process: Process, guidance_scale: float | None = None
    ) -> dict[str, JsonValue]:
        """Let a model make its pictures; returns what metrics.json says of them."""
        how, seconds, score, features = self.sampling(guidance_scale), 0.0, 0.0, []
        pictures = list(dict.fromkeys([*self.shown, *self.counted]))
        shown = {picture: place for place, picture in enumerate(self.shown)}
        start = time.perf_counter()
        for part, latents in self._sampled(network, process, how, pictures):
            images = self.decode(latents)
            seconds += time.perf_counter() - start
            for picture, image in zip(part, images, strict=True):
                if picture in shown:
                    self._keep(shown[picture], who, image)
            if self.clip is not None:
                score += self.clip.total(list(images), [picture.subject.caption for picture in part])
            if self.extractor is not None:
                counted = set(self.counted)
                chosen = [image for picture, image in zip(part, images, strict=True) if picture in counted]
                features += [self.extractor(chosen)] if chosen else []
            start = time.perf_counter()
        line: dict[str, JsonValue] = {"images_per_second": len(pictures) / seconds}
        if self.clip is not None:
            line |= {"clip_score": score / len(pictures), "clip_images": len(pictures)}
        if self.extractor is not None:
            line["features"] = feature_distances(torch.cat(features), self._held_out_features(), self.extractor.name)
        return line

    def add_held_out(self) -> None:
        """Keep the held-out images that the pictures' captions belong to."""
        for place, picture in enumerate(self.shown):
            latents = self.dataset.batch([picture.subject.index])["latents"]
            self._keep(place, REFERENCE, self.decode(latents)[0])

    def decode(self, latents: Float[Tensor, "b c ..."]) -> Float[Tensor, "b 3 ..."]:
        """Images or videos with values in [0, 1], on the CPU."""
        return (self.space.decode(latents) / 2 + 0.5).clamp(0, 1)

    def as_json(self) -> dict[str, JsonValue]:
        """The content of samples.json."""
        samples: list[JsonValue] = []
        for place, picture in enumerate(self.shown):
            outputs = dict(self._outputs.get(place, {}))
            reference = outputs.pop(REFERENCE, None)
            samples.append(
                {
                    "prompt": picture.subject.caption,
                    "row_id": picture.subject.row_id,
                    "reference": reference,
                    "outputs": {**outputs},
                }
            )
        return {
            "kind": "images",
            "steps": self.settings.sample_steps,
            "guidance_scale": self.settings.guidance_scale,
            "samples": samples,
        }

    def _keep(self, place: int, who: str, image: Float[Tensor, "3 ..."]) -> None:
        name = f"{FOLDER}/{place:02}-{who.replace('/', '-')}"
        if image.ndim == 4:
            name, content = f"{name}.webp", webp(image, self.config.evaluate.videos.fps)
        else:
            name, content = f"{name}.png", png(image)
        self.files[name] = content
        self._outputs.setdefault(place, {})[who] = name

    def _sampled(
        self, network: nn.Module, process: Process, how: Sampling, pictures: Sequence[Picture]
    ) -> Iterator[tuple[list[Picture], Float[Tensor, "b c h w"]]]:
        """Latents of pictures, batch by batch; a batch has one size."""
        for part in self._parts(pictures):
            given = dict(self.dataset.batch([picture.subject.index for picture in part]))
            shape = tuple(given.pop("latents").shape[1:])
            seed = self.config.seed
            noise = torch.stack([first_noise(p.subject.row_id, p.number, shape, seed) for p in part])
            yield part, sample(network, process, noise, given, how)

    def _parts(self, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
        buckets, size = self.dataset.buckets, self.config.phases[-1].batch.micro_size
        groups: dict[int, list[Picture]] = {}
        for picture in pictures:
            groups.setdefault(0 if buckets is None else int(buckets[picture.subject.index]), []).append(picture)
        for group in groups.values():
            yield from (group[i : i + size] for i in range(0, len(group), size))

    def _held_out_features(self) -> Float[Tensor, "m d"]:
        """Features of all held-out images: of what the autoencoder makes of their latents, where there is one."""
        if self._held_out is None:
            assert self.extractor is not None, "asked for features without an extractor"
            found = []
            for part in self._parts([Picture(subject) for subject in self.subjects]):
                latents = self.dataset.batch([picture.subject.index for picture in part])["latents"]
                found.append(self.extractor(list(self.decode(latents))))
            self._held_out = torch.cat(found)
        return self._held_out


def open_gallery(config: RunConfig, *, inputs: str, device: torch.device) -> Gallery:
    """A gallery without pictures; `inputs` is the URI of the finished cache."""
    dataset: Draws = DenseDataset(
        Store(inputs), {}, config.images.noise, split="held_out", fields={}, max_rows=config.evaluate.max_rows
    )
    firsts: dict[str, int] = {}
    for index, name in enumerate(dataset.row_ids(range(dataset.num_rows))):
        firsts.setdefault(name.rpartition("@")[0], index)
    captions = dataset.captions([*firsts.values()])
    subjects = tuple(
        Subject(index, row_id, text) for (row_id, index), text in zip(firsts.items(), captions, strict=True)
    )
    return Gallery(config, dataset, subjects, device)


def spread(subjects: Sequence[Subject], count: int) -> list[Subject]:
    """`count` subjects spread over all, no caption twice as long as there are others."""
    firsts = list({subject.caption: subject for subject in reversed(subjects)}.values())[::-1]
    pool = firsts if len(firsts) >= min(count, len(subjects)) else list(subjects)
    count = min(count, len(pool))
    return [pool[i * len(pool) // count] for i in range(count)]
