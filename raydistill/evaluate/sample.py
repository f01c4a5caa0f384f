"""Samples of a finished student of few steps for prompts of one's own.

    python -m raydistill.evaluate.sample RUN "a smiling face" ["a sad one" …] [--frames N] [--seed S] [--out FOLDER]

RUN is a run folder: its config.json says how prompts are encoded and latents decoded, its export/ is the student. Each
prompt gives an MP4 file, or a PNG where the student makes images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from raydistill.config.models import DiffusersModel, GeneratorConfig
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, VideosSource
from raydistill.diffusion.draws import noise_of
from raydistill.errors import ConfigError, DataError, RaydistillError
from raydistill.evaluate.generate import png
from raydistill.evaluate.job import device
from raydistill.models.autoencoder import load_space
from raydistill.models.denoiser import load_denoiser, process_of
from raydistill.models.few_step import generate, seeded_noise
from raydistill.models.text_encoder import TextEncoders
from raydistill.sources.films import mp4
from raydistill.storage import Store

GENERATOR = "generator.json"


@torch.no_grad()
def sample(run: Path, prompts: Sequence[str], *, frames: int | None = None, seed: int = 0) -> dict[str, bytes]:
    """A file for each prompt, by its name.

    `frames` are latent frames, by default those that the student was trained on. The same prompt and seed give the same
    sample. `DataError` for a folder that is no finished run, `ConfigError` for students that are not of few steps.
    """
    config, generator = _opened(run)
    source = config.latents
    if frames is not None and (isinstance(source, ImagesSource) or source.frames is None):
        raise ConfigError("--frames: wanted none, since this student makes images; leave it out.")
    if not source.text_encoders:
        raise ConfigError(f"{run}: wanted a student that reads prompts, found a run without source.text_encoders.")
    place = device()
    model = DiffusersModel(library="diffusers", source=str(run / "export"), dtype=config.student.model.dtype)
    network, process = load_denoiser(model, dtype=_dtype(model, place)), process_of(model)
    torch.nn.Module.to(network, place)
    space = load_space(source.vae, str(place))
    clip_frames = None if isinstance(source, ImagesSource) else source.frames
    shape = space.facts.latent_shape(_size(config), clip_frames)
    if frames is not None and clip_frames is not None:
        shape = (shape[0], frames, *shape[2:])
    height, width = _size(config)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=place)
    embeds, pooled = TextEncoders(source.text_encoders, str(place))(prompts, batch=1)
    made = {}
    for number, prompt in enumerate(prompts):
        name = f"{prompt}@{seed}"
        noise = seeded_noise([name], noise_of(prompt, 0, shape, seed)[None].to(place), seed)
        given = {"prompt_embeds": embeds[[number]].to(place), "pooled": pooled[[number]].to(place), "time_ids": sizes}
        picture = (space.decode(generate(network, process, generator, noise, given))[0] / 2 + 0.5).clamp(0, 1)
        still = picture.ndim == 3
        made[f"{number:02}.{'png' if still else 'mp4'}"] = (
            png(picture) if still else mp4(picture, config.evaluate.videos.fps)
        )
    return made


def _opened(run: Path) -> tuple[RunConfig, GeneratorConfig]:
    for name in ("config.json", f"export/{GENERATOR}"):
        if not (run / name).is_file():
            raise DataError(
                f"{run}: wanted a finished run of a student of few steps, found no {name}; give its folder, and run "
                "--stages export if it was left out."
            )
    config = RunConfig.model_validate(json.loads((run / "config.json").read_text())["config"])
    return config, GeneratorConfig.model_validate_json((run / "export" / GENERATOR).read_text())


def _size(config: RunConfig) -> tuple[int, int]:
    """Height and width of samples in pixels."""
    match config.source:
        case PromptsSource(size=size):
            return size
        case ImagesSource() | VideosSource() as source:
            return source.buckets[0] if source.buckets else (source.resolution, source.resolution)
        case other:
            raise ConfigError(f"source.kind: wanted images, videos or prompts, found {other.kind}.")


def _dtype(model: DiffusersModel, place: torch.device) -> torch.dtype:
    """A CPU computes float16 by detours."""
    wanted: torch.dtype = getattr(torch, model.dtype)
    return torch.float32 if wanted == torch.float16 and place.type == "cpu" else wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m raydistill.evaluate.sample", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--frames", type=int, help="latent frames; by default those of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples", help="folder of the files")
    asked = parser.parse_args(arguments)
    try:
        made = sample(asked.run, asked.prompts, frames=asked.frames, seed=asked.seed)
    except RaydistillError as error:
        print(error, file=sys.stderr)
        return 2
    for name, content in made.items():
        Store(asked.out).publish(name, content)
        print(f"{asked.out}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
