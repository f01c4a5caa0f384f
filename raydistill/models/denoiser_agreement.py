"""Denoisers of one run must fit to its latents, its text and to each other; said before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.config.models import BlocksInit, DiffusersModel
from raydistill.config.recipes import CausalConsistencyRecipe, NoisePredictionRecipe, SelfForcingRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, LatentSource, NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.autoencoder import space_facts
from raydistill.models.blocks import copy_blocks
from raydistill.models.causal_families import family_of
from raydistill.models.denoiser import Shapes, empty_denoiser, process_of, shapes_of
from raydistill.models.taps import Taps
from raydistill.models.text_encoder import text_facts


def check_denoisers(config: RunConfig, buckets: Sequence[tuple[int, int]]) -> None:
    """Raise `ConfigError` unless student and teachers can be asked about the images of `buckets` (height, width).

    That is: channels of the latents, widths of the text, sizes that the networks halve without a rest, one noise
    schedule, predictions that can be stated as `source.noise.prediction_type`, tapped modules that are there, and a
    student whose blocks are those of its larger model. Reads no weights.
    """
    student = config.student.model
    assert isinstance(student, DiffusersModel), "denoisers are models of diffusers"
    source = config.latents
    noise = source.noise
    # Whether anything is learned at timesteps that are drawn; trajectories have times of their own.
    drawn = any(isinstance(phase.recipe, NoisePredictionRecipe) for phase in config.phases)
    models = {"student.model": student}
    models |= {f"teachers.{t.name}": t.model for t in config.teachers if isinstance(t.model, DiffusersModel)}
    models |= _asked(config)
    processes = {where: process_of(model) for where, model in models.items()}
    for where, process in processes.items():
        apart = process.differs(processes["student.model"], timesteps=drawn)
        if apart is not None:
            raise ConfigError(
                f"{where} ({models[where].source}): wanted the noise schedule of the student ({student.source}), found "
                f"another: {apart}. Teachers and student learn at the same noised images; use models of one schedule, "
                "or name the right one with model.scheduler."
            )
    _require_chunks(config)
    _require_causal(config)
    _require_tapped(config, student)
    if isinstance(config.student.init, BlocksInit):
        larger = student.model_copy(update={"overrides": {}})
        copy_blocks(empty_denoiser(student), empty_denoiser(larger), where=f"student.init (blocks of {student.source})")
    seen: list[DiffusersModel] = []
    for where, model in models.items():
        if drawn:
            require_convertible(processes[where], noise, where=where)
        if model not in seen:
            seen.append(model)
            _require_fit(source, shapes_of(empty_denoiser(model)), buckets, f"{where} ({model.source})")


def _require_chunks(config: RunConfig) -> None:
    """Raise `ConfigError` when a chunk of the student is longer than the samples of the source."""
    generator, source = config.student.generator, config.latents
    if generator is None or generator.causal is None or isinstance(source, ImagesSource) or source.frames is None:
        return
    frames = space_facts(source.vae, clips=True).latent_shape((1, 1), source.frames)[1]
    if generator.causal.chunk_frames > frames:
        raise ConfigError(
            f"student.generator.causal.chunk_frames: wanted a chunk of at most {frames} latent frames (source.frames "
            f"{source.frames}), found {generator.causal.chunk_frames}; make chunks smaller or samples longer."
        )


def _require_tapped(config: RunConfig, student: DiffusersModel) -> None:
    """Raise `ConfigError` for taps of modules that a teacher or the student does not have."""
    for teacher in config.teachers:
        if isinstance(teacher, NoisePredictionTeacher) and teacher.taps:
            Taps(empty_denoiser(teacher.model), teacher.taps, where=f"teachers.{teacher.name}.taps")
    for index, phase in enumerate(config.phases):
        rules = phase.recipe.taps if isinstance(phase.recipe, NoisePredictionRecipe) else ()
        if rules:
            paths = {f"{rule.teacher}.{rule.tap}": rule.student for rule in rules}
            Taps(empty_denoiser(student), paths, where=f"phases.{index}.recipe.taps")


def _asked(config: RunConfig) -> dict[str, DiffusersModel]:
    """Models that recipes name and ask while they train."""
    found: dict[str, DiffusersModel | None] = {}
    for index, phase in enumerate(config.phases):
        match phase.recipe:
            case SelfForcingRecipe(real_score=model):
                found[f"phases.{index}.recipe.real_score"] = model
            case CausalConsistencyRecipe(teacher=model):
                found[f"phases.{index}.recipe.teacher"] = model
    return {where: model for where, model in found.items() if model is not None}


def _require_causal(config: RunConfig) -> None:
    """Raise `ConfigError` for models that are to make videos chunk by chunk and cannot."""
    chunked: dict[str, DiffusersModel] = {}
    student, first = config.student.model, config.teachers[0].model if config.teachers else None
    if config.student.generator is not None and config.student.generator.causal is not None:
        assert isinstance(student, DiffusersModel), "denoisers are models of diffusers"
        chunked["student.model"] = student
    for teacher in config.teachers:
        if isinstance(teacher, OdeTrajectoryTeacher) and teacher.teacher_attention == "autoregressive":
            chunked[f"teachers.{teacher.name}"] = teacher.model
    for index, phase in enumerate(config.phases):
        recipe = phase.recipe
        named: DiffusersModel | None
        match recipe:
            case SelfForcingRecipe():
                named = recipe.real_score
            case CausalConsistencyRecipe():
                named = recipe.teacher
            case _:
                continue
        model = named or first
        if recipe.teacher_attention == "autoregressive" and isinstance(model, DiffusersModel):
            chunked[f"phases.{index}.recipe ({recipe.kind}, teacher_attention: autoregressive)"] = model
    for where, model in chunked.items():
        family_of(empty_denoiser(model), where=where)


def require_convertible(process: Process, noise: NoiseConfig, *, where: str) -> None:
    """Raise `ConfigError` unless predictions of this process can be stated as `noise.prediction_type` at all draws."""
    first, end = noise.timesteps
    if end > process.num_timesteps:
        raise ConfigError(
            f"{where}: wanted the timesteps [{first}, {end}) of source.noise.timesteps, found a noise schedule of "
            f"{process.num_timesteps}; end the range at {process.num_timesteps} or before."
        )
    if process.prediction_type == noise.prediction_type:
        return
    for kind in (process.prediction_type, noise.prediction_type):
        at = process.undefined(kind, noise.timesteps)
        if at is not None:
            raise ConfigError(
                f"{where} predicts {process.prediction_type}: wanted it as source.noise.prediction_type "
                f"{noise.prediction_type}, found that {kind} says nothing of the image at timestep {at}, where the "
                "noise schedule leaves nothing of it (zero terminal SNR). Set source.noise.prediction_type: "
                f"{process.prediction_type}, or end source.noise.timesteps at {at}."
            )


def _require_fit(source: LatentSource, shapes: Shapes, buckets: Sequence[tuple[int, int]], where: str) -> None:
    clips = not isinstance(source, ImagesSource) and source.frames is not None
    space, text = space_facts(source.vae, clips=clips), text_facts(source.text_encoders)
    if shapes.latent_channels != space.channels:
        what = "pixels (source.vae: none)" if source.vae == "none" else f"source.vae ({source.vae.source})"
        raise ConfigError(
            f"{where}: wanted latents of {shapes.latent_channels} channels, found {space.channels} of {what}. "
            "Name the autoencoder that this model was trained with."
        )
    for key, wanted, found in (
        ("text embeddings", shapes.text_width, text.width),
        ("pooled text embeddings", shapes.pooled_width, text.pooled_width),
    ):
        if wanted and wanted != found:
            raise ConfigError(
                f"{where}: wanted {key} of width {wanted}, found {found or 'none'} of source.text_encoders. "
                "Name the text encoders that this model was trained with, in their order, and which of them pools."
            )
    step = shapes.multiple * space.factor
    for height, width in buckets:
        if height % step or width % step:
            raise ConfigError(
                f"{where}: wanted heights and widths that are multiples of {step} (the autoencoder's {space.factor} × "
                f"the network's own {shapes.multiple}), found the bucket [{height}, {width}]. Change source.buckets, "
                f"or make source.resolution and source.bucket_step multiples of {step}."
            )
