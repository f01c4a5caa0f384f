"""The export of an image model: a denoiser and its scheduler as diffusers keeps them in a pipeline, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from raydistill.config.recipes import NoisePredictionRecipe, RecipeConfig, TrajectoryRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TeacherConfig
from raydistill.evaluate.comparison import Line
from raydistill.export.card import columns, lines_of, phase_line, rendered, table, versions
from raydistill.export.card import shown as shown_whole
from raydistill.models.student import export_student
from raydistill.signals import JsonValue

LINES = {
    "mse_to_teacher": "error to the teachers",
    "mse_to_mean": "error to their weighted mean",
    "mse_to_noise": "error to what is true",
    "clip_score": "CLIP score",
    "parameters": "parameters",
    "samples_per_second": "denoising steps per second",
    "images_per_second": "images per second",
    "frames_per_second": "frames of samples per second",
    "peak_memory_bytes": "peak memory of a sample, bytes",
}
PACKAGES = ("raydistill", "torch", "diffusers", "transformers", "deepspeed", "ray")
FOLDERS = ("unet", "transformer")
PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
}
"""The pipeline of diffusers that a denoiser belongs into; a UNet with size conditioning is one of SDXL."""

CARD = """\
---
library_name: diffusers
pipeline_tag: {{ task }}
tags:
- distillation
- raydistill
---

# {{ name }}

A denoiser for {{ kind_of_samples }}, {{ origin }} with raydistill.

```python
{{ usage }}
```

{{ space }}
{% if teachers %}

## Teachers

{% for teacher in teachers %}
* `{{ teacher.name }}`: {{ teacher.source }}, weight {{ teacher.weight }}{{ teacher.more }}
{% endfor %}
{% endif %}

## Data

{{ data }}

## Settings

* student: {{ student }}
{% for phase in phases %}
* phase {{ phase }}
{% endfor %}
* seed {{ seed }}

## Measured{% if held_out %} on {{ held_out }}{% endif %}


{{ table }}

Errors are mean squared differences of {{ kind }}.{{ notes }} Speeds are of one machine and tell how the
models relate.

## Limits

The model learnt from the data above alone{% if teachers %} and inherits the faults of its teachers. The licences of the
teachers' weights and of the data apply{% else %}. The licence of the data applies{% endif %}.

## Versions

{{ versions }}
"""

SDXL_USAGE = """\
import torch
from diffusers import {pipeline}, {network}

denoiser = {network}.from_pretrained("path/to/this/folder", subfolder="{folder}", torch_dtype=torch.float16)
pipeline = {pipeline}.from_pretrained(
    "{base}", {folder}=denoiser, torch_dtype=torch.float16
)
image = pipeline("a lighthouse at dusk").images[0]"""

PLAIN_USAGE = """\
from diffusers import {network}, {scheduler}

denoiser = {network}.from_pretrained("path/to/this/folder", subfolder="{folder}")
scheduler = {scheduler}.from_pretrained("path/to/this/folder", subfolder="scheduler")"""


def shown(source: str) -> str:
    """A source as others can use it, without its hash."""
    return shown_whole(source).partition("#")[0]


def write_images(config: RunConfig, student: nn.Module, folder: Path) -> None:
    """Write the denoiser and its scheduler into `folder`."""
    export_student(cast(Any, student), folder, dtype=getattr(torch, config.student.model.dtype))


def image_card(config: RunConfig, metrics: Mapping[str, JsonValue], folder: Path | None = None) -> str:
    """README.md of the export: teachers, data, settings, measured numbers, versions. `folder` holds its files."""
    roles = columns(config)
    if config.export.weights != "ema":
        roles = {**roles, "student_ema": "its moving average"}
    teachers = [_teacher(t) for t in config.teachers]
    samples = "images" if _frames(config) is None else "videos"
    renamed = {"images_per_second": f"{samples} per second"}
    if config.student.generator is not None:
        renamed["samples_per_second"] = "samples per second"
    lines = {role: _flat(line) for role, line in lines_of(metrics, roles).items()}
    return rendered(
        CARD,
        name=config.name,
        task=_task(config),
        kind_of_samples=samples,
        origin=f"distilled from {' and '.join(t['source'] for t in teachers)}" if teachers else "trained",
        teachers=teachers,
        usage=_usage(config, folder),
        space=_space(config) + _steps(config),
        data=_data(config),
        student=f"`{shown(config.student.model.source)}`, init {config.student.init.kind}",
        phases=[phase_line(p, _recipe(p.recipe), "draws") for p in config.phases],
        seed=config.seed,
        held_out=_held_out(metrics, samples),
        table=table("", _titles(lines) | renamed, lines, roles) if lines else "Nothing was measured.",
        kind=(
            "samples to the teacher's from the same noise"
            if config.student.generator is not None
            else f"predictions of kind `{config.latents.noise.prediction_type}`"
        ),
        notes=_notes(lines),
        versions=versions(PACKAGES),
    )


def _teacher(teacher: TeacherConfig) -> dict[str, str]:
    kinds = NoisePredictionTeacher | OdeTrajectoryTeacher
    assert isinstance(teacher, kinds), "the configuration lets denoisers learn from these alone"
    guided = teacher.guidance_scale not in (None, 1)
    return {
        "name": teacher.name,
        "source": f"`{shown(teacher.model.source)}`",
        "weight": f"{teacher.weight:g}",
        "more": f", guided with `uncond + {teacher.guidance_scale:g} (cond - uncond)`" if guided else "",
    }


def _frames(config: RunConfig) -> int | None:
    """Frames of a sample; None for images."""
    return None if isinstance(config.latents, ImagesSource) else config.latents.frames


def _task(config: RunConfig) -> str:
    what = "video" if _frames(config) is not None else "image"
    return f"text-to-{what}" if config.latents.text_encoders else f"unconditional-{what}-generation"


def _usage(config: RunConfig, folder: Path | None) -> str:
    """Lines of Python that load the export."""
    place = next((name for name in FOLDERS if folder is not None and (folder / name).is_dir()), FOLDERS[0])
    about = _json(folder, f"{place}/config.json")
    network = str(about.get("_class_name", "UNet2DConditionModel"))
    pipeline = PIPELINES.get(network)
    encoders = config.latents.text_encoders
    # Text encoders out of a pipeline that diffusers finds by itself: the denoiser fits into that.
    in_pipeline = encoders and encoders[0].subfolder and "://" not in encoders[0].source
    if config.latents.vae == "none" or not in_pipeline or pipeline is None:
        scheduler = str(_json(folder, "scheduler/scheduler_config.json").get("_class_name", "DDIMScheduler"))
        return PLAIN_USAGE.format(network=network, scheduler=scheduler, folder=place)
    if about.get("addition_embed_type", "text_time" if folder is None else None) == "text_time":
        pipeline = "StableDiffusionXLPipeline"
    return SDXL_USAGE.format(network=network, pipeline=pipeline, folder=place, base=_base(config))


def _base(config: RunConfig) -> str:
    """A pipeline that has the other parts: where the text encoders come from."""
    return shown(config.latents.text_encoders[0].source)


def _json(folder: Path | None, name: str) -> Mapping[str, JsonValue]:
    if folder is None or not (folder / name).is_file():
        return {}
    found: Mapping[str, JsonValue] = json.loads((folder / name).read_text())
    return found


def _space(config: RunConfig) -> str:
    source = config.latents
    if source.vae == "none":
        what = "It works on pixels, scaled to [-1, 1]"
    else:
        what = f"It works on the latents of the autoencoder `{shown(source.vae.source)}`"
    if not source.text_encoders:
        return f"{what}, and takes no captions."
    encoders = " and ".join(
        f"`{shown(e.source)}{f'/{e.subfolder}' if e.subfolder else ''}`" for e in source.text_encoders
    )
    return f"{what}, conditioned on captions as {encoders} encode them."


def _steps(config: RunConfig) -> str:
    """How a student of few steps makes samples; nothing for others."""
    generator = config.student.generator
    if generator is None:
        return ""
    times = ", ".join(f"{t:g}" for t in generator.t_list[:-1])
    chunks = ""
    if generator.causal is not None:
        chunks = f", {generator.causal.chunk_frames} latent frames at a time, each seeing those before it"
    return (
        f" It makes a sample in {len(generator.t_list) - 1} step(s), at the times {times} (1 is noise){chunks}; "
        "`generator.json` says the same. From the folder of the run: "
        '`python -m raydistill.evaluate.sample RUN "a prompt"`.'
    )


def _data(config: RunConfig) -> str:
    source = config.latents
    what = ", ".join(f"`{shown(path)}`" for path in source.paths)
    if isinstance(source, PromptsSource):
        size = f"{source.size[0]} × {source.size[1]}" + (f" × {source.frames} frames" if source.frames else "")
        return (
            f"{what}: prompts; {source.noise.draws_per_row} sample(s) of {size} per prompt, made by the teachers; "
            f"{100 * config.evaluate.held_out:g} % of the prompts were held out."
        )
    sizes = ", ".join(f"{h} × {w}" for h, w in source.buckets)
    if not sizes:
        sizes = f"about {source.resolution} × {source.resolution}"
        sizes += f", sides up to {source.max_aspect:g} : 1" if source.max_aspect > 1 else ""
    draws = source.noise.draws_per_row
    name = "image" if isinstance(source, ImagesSource) else "clip"
    return (
        f"{what}: {name}s of {sizes}; {draws} draw{'s' if draws > 1 else ''} of noise per {name}, timesteps "
        f"{source.noise.timesteps[0]} to {source.noise.timesteps[1] - 1}; "
        f"{100 * config.evaluate.held_out:g} % of the {name}s were held out."
    )


def _recipe(recipe: RecipeConfig) -> str:
    if isinstance(recipe, TrajectoryRecipe):
        return "trajectory" + (f", chunk by chunk ({recipe.context} context)" if recipe.causal else "")
    if not isinstance(recipe, NoisePredictionRecipe):
        return recipe.kind
    weighting = "" if recipe.timestep_weighting == "constant" else f", {recipe.timestep_weighting} weighting"
    if not recipe.uses_teacher:
        return f"plain diffusion loss ({recipe.loss}){weighting}"
    taps = f", {len(recipe.taps)} feature taps" if recipe.taps else ""
    return f"{recipe.kind} with alpha {recipe.alpha:g}, {recipe.loss}{weighting}{taps}"


def _held_out(metrics: Mapping[str, JsonValue], samples: str) -> str:
    found = metrics.get("held_out")
    if not isinstance(found, dict):
        return ""
    return f"{found['rows']:,} held-out {samples} ({found['draws']:,} draws of noise)"


def _distances(line: Line) -> dict[str, Any] | None:
    """The distances of features that a line has, of images or of videos."""
    found = line.get("features", line.get("video_features_to_teacher"))
    return found if isinstance(found, dict) else None


def _flat(line: Line) -> Line:
    """A line with the distances of features among its numbers."""
    features = _distances(line)
    if features is None:
        return line
    name = features["extractor"]
    return {**line, f"fd/{name}": features["frechet_distance"], f"kd/{name}": features["kernel_distance"]}


def _titles(lines: Mapping[str, Line]) -> dict[str, str]:
    """Titles of the table's rows: those that are known, with the errors to single teachers and the features between."""
    titles = dict(LINES)
    found = dict.fromkeys(name for line in lines.values() for name in line)
    extra = {name: f"error to `{name.removeprefix('mse_to/')}`" for name in found if name.startswith("mse_to/")}
    extra |= {name: f"Fréchet distance of `{name.removeprefix('fd/')}`" for name in found if name.startswith("fd/")}
    extra |= {name: f"kernel distance of `{name.removeprefix('kd/')}`" for name in found if name.startswith("kd/")}
    place = list(titles).index("clip_score")
    return dict([*list(titles.items())[:place], *extra.items(), *list(titles.items())[place:]])


def _notes(lines: Mapping[str, Line]) -> str:
    """What has to be said beside distances of features: of how many images, and whether that is enough."""
    features = next((f for line in lines.values() if (f := _distances(line)) is not None), None)
    if features is None:
        return ""
    made, others = features["generated"], features["held_out"]
    what = f"generated and {others:,} held-out images"
    if features.get("things") == "videos":
        what = f"generated videos and {others:,} of the teacher's"
    text = f" Distances of features are between {made:,} {what}"
    if not features["reliable"]:
        text += f", too few for a Fréchet distance in {features['dimensions']:,} dimensions"
    return text + "."
