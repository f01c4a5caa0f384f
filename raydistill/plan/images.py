"""What a run on images will cost: FLOP, hours, memory by ZeRO stage, bytes, and when its caches have paid off."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.cache.manifest import Manifest
from raydistill.config.base import Config
from raydistill.config.models import DiffusersModel
from raydistill.config.recipes import CausalConsistencyRecipe, SelfForcingRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher
from raydistill.config.training import PhaseConfig
from raydistill.errors import ConfigError, RaydistillError
from raydistill.models.denoiser import empty_denoiser, process_of, scheduler_config, with_one_sample
from raydistill.models.denoiser_counts import DenoiserCounts, count_denoiser, empty_denoiser_student
from raydistill.models.projection.forecast import Row
from raydistill.plan.estimate import ENOUGH, BreakEven, MemoryPlan, break_even, memory_of
from raydistill.plan.hardware import AnyPlan, Hardware, baseline_hours, bill_of, hardware_of, hours_at, total_of
from raydistill.plan.image_inputs import (
    BYTES,
    DRAW_BYTES,
    DrawCachePlan,
    ImageInputsPlan,
    ImageShape,
    image_shape,
    plan_draw_cache,
    plan_image_inputs,
)
from raydistill.plan.projection import ProjectionPlan, plan_projection
from raydistill.plan.rollouts import answered_flops, players_beside, training_flops
from raydistill.teachers.ode_trajectory import make_sampler
from raydistill.train.parameters import parameter_groups

STAGES = (0, 1, 2, 3)
"""ZeRO stages whose memory is compared."""


class DenoiserPlan(Config):
    """What a teacher costs; None where its architecture could not be read."""

    name: str
    """Name of the teacher."""
    source: str
    """Its model."""
    parameters: int | None
    """Numbers in the model."""
    weight_bytes: int | None
    """Memory of the weights in one actor."""
    passes: int
    """Forward passes per draw: two with guidance, and so many for each step of a trajectory."""
    flops_per_draw: float | None
    """FLOP of a draw."""
    flops: float | None
    """FLOP of the whole cache; 0 when it is there."""
    hours: float | None
    """Accelerator hours of the whole cache; 0 when it is there."""
    cache: DrawCachePlan | None
    """Its cache."""


class ImagePhasePlan(Config):
    """What a phase costs; None where the student's architecture or the number of images is not known."""

    name: str
    """Name of the phase."""
    stage: int
    """Its ZeRO stage."""
    steps: int | None
    """Optimizer steps."""
    draws: float | None
    """Draws trained on."""
    trained_parameters: int | None
    """Numbers that are trained."""
    flops_per_draw: float | None
    """FLOP of a training step per draw."""
    flops: float | None
    """FLOP of the phase."""
    hours: float | None
    """Accelerator hours of the phase, over all workers."""
    actor_hours: float | None
    """Those of a teacher that answers from actors; 0 where it is asked in the workers."""
    memory: dict[int, MemoryPlan] | None
    """Memory of one worker by ZeRO stage, offloading as configured where the stage allows it."""
    draws_per_second: float | None
    """Draws that all workers together take per second at the assumed utilisation."""
    bytes_per_second: float | None
    """What they then read from the caches."""


class ImagePlan(AnyPlan):
    """What a run with images or videos will cost."""

    draws_per_row: int
    """Draws of noise per image."""
    shape: ImageShape
    """Sizes of latents and captions."""
    inputs: ImageInputsPlan | None
    """Images; None when they are not known."""
    teachers: tuple[DenoiserPlan, ...]
    """Teachers."""
    average: DrawCachePlan | None
    """The cache that stands for all teachers, where there is one."""
    student_parameters: int | None
    """Numbers in the student."""
    student_forward_flops: float | None
    """FLOP of the student's forward pass for one image."""
    projection: ProjectionPlan | None
    """What the student begins with, where that is a projection of a teacher."""
    phases: tuple[ImagePhasePlan, ...]
    """Phases."""
    baseline_hours: float | None
    """Accelerator hours of training the same student without a teacher; 0 when that is not asked for."""
    break_even: BreakEven | None
    """When the caches have paid for themselves; a use is one pass over the training draws."""


def plan_images(config: RunConfig) -> ImagePlan:
    """The cost of `config`, whose paths are resolved. Runs nothing; what cannot be known is None and in `missing`."""
    missing: list[str] = []
    hardware = hardware_of(config, missing)
    asked = hardware.rate(hardware.teacher)
    shape = image_shape(config, missing)
    inputs, manifest = plan_image_inputs(config, shape, missing)
    counts = _Counts(shape)
    teachers = tuple(
        _teacher(t, config, counts, inputs, manifest, asked, missing)
        for t in config.teachers
        if isinstance(t, NoisePredictionTeacher | OdeTrajectoryTeacher)
    )
    average = _average(config, shape, inputs)
    workers = config.resources.train.workers
    fewest = max(1, workers if isinstance(workers, int) else workers[0])
    student = _student(config, counts, missing)
    read = _bytes_read(config, shape, inputs, teachers, average)
    phases = tuple(
        _phase(p, config, inputs, student, _asked(p, config, counts, missing), hardware, fewest, read)
        for p in config.phases
    )
    training = total_of([p.hours for p in phases])
    baseline = baseline_hours(config, training)
    by_teachers = [*(t.hours for t in teachers), *(p.actor_hours for p in phases)]
    bill = bill_of(
        config, (hardware.teacher, total_of(by_teachers)), (hardware.train, training), (hardware.train, baseline)
    )
    return ImagePlan(
        name=config.name,
        hardware=hardware,
        workers=fewest,
        draws_per_row=config.latents.noise.draws_per_row,
        shape=shape,
        inputs=inputs,
        teachers=teachers,
        average=average,
        student_parameters=student.parameters if student else None,
        student_forward_flops=student.forward if student else None,
        projection=plan_projection(config, Row(shape.text_tokens, shape.size), missing),
        phases=phases,
        baseline_hours=baseline,
        bill=bill,
        break_even=_break_even(config, inputs, teachers, phases),
        missing=tuple(missing),
    )


class _Counts:
    """Counts of denoisers asked about images of one shape; each model is counted once."""

    def __init__(self, shape: ImageShape):
        self.shape = shape
        self._known: dict[str, DenoiserCounts] = {}

    def __call__(self, model: DiffusersModel) -> DenoiserCounts:
        key = model.model_dump_json()
        if key not in self._known:
            tokens = max(self.shape.text_tokens, 1)
            self._known[key] = count_denoiser(
                empty_denoiser(model), latents=self.shape.size, tokens=tokens, frames=self.shape.frames
            )
        return self._known[key]


def _teacher(
    teacher: NoisePredictionTeacher | OdeTrajectoryTeacher, config: RunConfig, counted: _Counts,
    inputs: ImageInputsPlan | None, manifest: Manifest | None, rate: float | None, missing: list[str],
) -> DenoiserPlan:  # fmt: skip
    passes = 1 if teacher.guidance_scale in (None, 1) else 2
    taps = 0
    try:
        counts = counted(teacher.model)
        if isinstance(teacher, OdeTrajectoryTeacher):
            passes *= make_sampler(teacher, scheduler_config(teacher.model), process_of(teacher.model)).num_steps
        elif teacher.taps:
            taps = tap_numbers(empty_denoiser(teacher.model), teacher.taps, counted.shape)
    except RaydistillError as error:
        missing.append(f"size and cost of teacher {teacher.name}: {error} {ENOUGH}")
        return DenoiserPlan(
            name=teacher.name, source=teacher.model.source, parameters=None, weight_bytes=None, passes=passes,
            flops_per_draw=None, flops=None, hours=None, cache=None,
        )  # fmt: skip
    cache = plan_draw_cache(config, teacher, inputs, manifest, counted.shape.prediction, taps)
    per_draw = passes * counts.forward
    draws = config.latents.noise.draws_per_row * inputs.rows if inputs is not None else None
    flops = 0.0 if cache.cached else per_draw * draws if draws is not None else None
    return DenoiserPlan(
        name=teacher.name,
        source=teacher.model.source,
        parameters=counts.parameters,
        weight_bytes=counts.parameters * BYTES[teacher.model.dtype],
        passes=passes,
        flops_per_draw=per_draw,
        flops=flops,
        hours=hours_at(flops, rate),
        cache=cache,
    )


def tap_numbers(network: nn.Module, taps: Mapping[str, str], shape: ImageShape) -> int:
    """Numbers per draw that the outputs of the tapped modules have together; `network` is on the meta device."""
    sizes: list[int] = []

    def note(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        sizes.append((output if isinstance(output, Tensor) else output[0]).numel())

    for name, path in taps.items():
        if path not in dict(network.named_modules()):
            raise ConfigError(f"taps.{name}: wanted a module of {type(network).__name__}, found {path}.")
        network.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        with_one_sample(network, size=shape.size, tokens=max(shape.text_tokens, 1), frames=shape.frames)
    return sum(sizes)


def _average(config: RunConfig, shape: ImageShape, inputs: ImageInputsPlan | None) -> DrawCachePlan | None:
    """The cache of the weighted mean, in the widest number format of the teachers, with the variance of each draw."""
    if config.cache.store != "average" or not config.teachers:
        return None
    kept = [t.store_dtype for t in config.teachers if isinstance(t, NoisePredictionTeacher)]
    per_draw = max(BYTES[dtype] for dtype in kept) * shape.prediction + DRAW_BYTES + BYTES["float32"]
    draws = config.latents.noise.draws_per_row * inputs.rows if inputs is not None else None
    total = per_draw * draws if draws is not None else None
    return DrawCachePlan(bytes_per_draw=per_draw, total_bytes=total, cached=False)


def _student(config: RunConfig, counted: _Counts, missing: list[str]) -> DenoiserCounts | None:
    model = config.student.model
    assert isinstance(model, DiffusersModel), "the configuration lets images be learnt by denoisers alone"
    try:
        return counted(model)
    except RaydistillError as error:
        missing.append(f"size and cost of the student: {error} {ENOUGH}")
        return None


def _asked(phase: PhaseConfig, config: RunConfig, counted: _Counts, missing: list[str]) -> DenoiserCounts | None:
    """The teacher that a recipe asks while it trains, if it asks any."""
    match phase.recipe:
        case SelfForcingRecipe(real_score=model) | CausalConsistencyRecipe(teacher=model):
            found = model or next((t.model for t in config.teachers), None)
        case _:
            return None
    assert isinstance(found, DiffusersModel), "checked with the configuration"
    try:
        return counted(found)
    except RaydistillError as error:
        missing.append(f"cost of the teacher that phase {phase.name} asks, taken to be that of the student: {error}")
        return None


def _phase(
    phase: PhaseConfig, config: RunConfig, inputs: ImageInputsPlan | None,
    student: DenoiserCounts | None, asked: DenoiserCounts | None, hardware: Hardware, workers: int, read: float | None,
) -> ImagePhasePlan:  # fmt: skip
    steps, draws = phase.steps, None
    if phase.steps is not None:
        draws = float(phase.steps * phase.batch.global_size)
    elif inputs is not None and phase.epochs is not None:
        draws = phase.epochs * inputs.train_rows * config.latents.noise.draws_per_row
        steps = math.ceil(draws / phase.batch.global_size)
    rate = hardware.rate(hardware.train)
    per_draw = speed = trained = memory = None
    answered = 0.0
    if student is not None:
        trained = _trained(phase, config) if phase.trainable else student.trained_parameters
        per_draw = training_flops(phase.recipe, config, student, asked)
        answered = answered_flops(phase.recipe, student, asked)
        speed = workers * rate / (per_draw - answered) if rate is not None else None
        more, more_trained = players_beside(phase.recipe, asked or student)
        sizes = student.parameters + more, trained + more_trained
        memory = {stage: _memory(*sizes, phase, stage, workers) for stage in STAGES}
    flops = per_draw * draws if per_draw is not None and draws is not None else None
    return ImagePhasePlan(
        name=phase.name,
        stage=phase.zero.stage,
        steps=steps,
        draws=draws,
        trained_parameters=trained,
        flops_per_draw=per_draw,
        flops=flops,
        hours=None if flops is None or draws is None else hours_at(flops - answered * draws, rate),
        actor_hours=hours_at(answered * draws if draws is not None else None, hardware.rate(hardware.teacher)),
        memory=memory,
        draws_per_second=speed,
        bytes_per_second=speed * read if speed is not None and read is not None and phase.recipe.uses_teacher else None,
    )


def _trained(phase: PhaseConfig, config: RunConfig) -> int:
    """Numbers that the phase's rules leave to be trained; `ConfigError` for a rule that matches nothing."""
    network = empty_denoiser_student(config.student)
    optimizer = next(iter(phase.optimizer.values()))
    parameter_groups(network, phase.trainable, optimizer, where=f"phases: {phase.name}: trainable")
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _memory(parameters: int, trained: int, phase: PhaseConfig, stage: int, workers: int) -> MemoryPlan:
    """Memory of one worker if the phase ran at `stage`; what a stage cannot offload stays on the accelerator."""
    zero = phase.zero
    optimizer = zero.offload_optimizer if stage >= (3 if _on_nvme(phase) else 1) else None
    settings = {"stage": stage, "offload_optimizer": optimizer}
    settings["offload_parameters"] = zero.offload_parameters if stage == 3 else None
    return memory_of(parameters, trained, phase.model_copy(update={"zero": zero.model_copy(update=settings)}), workers)


def _on_nvme(phase: PhaseConfig) -> bool:
    offload = phase.zero.offload_optimizer
    return offload is not None and offload.device == "nvme"


def _bytes_read(
    config: RunConfig, shape: ImageShape, inputs: ImageInputsPlan | None, teachers: tuple[DenoiserPlan, ...],
    average: DrawCachePlan | None,
) -> float | None:  # fmt: skip
    """Bytes that a student reads per draw: latents, caption, and the prediction of every teacher or their average."""
    caches = [average.bytes_per_draw] if average else [t.cache.bytes_per_draw if t.cache else None for t in teachers]
    total = total_of([*caches])
    if inputs is None or total is None:
        return None
    return inputs.bytes_per_image + inputs.bytes_per_caption + total


def _break_even(
    config: RunConfig, inputs: ImageInputsPlan | None, teachers: tuple[DenoiserPlan, ...],
    phases: tuple[ImagePhasePlan, ...],
) -> BreakEven | None:  # fmt: skip
    teacher = total_of([t.flops_per_draw for t in teachers])
    used = [p for p, c in zip(phases, config.phases, strict=True) if c.recipe.uses_teacher]
    draws, flops = total_of([p.draws for p in used]), total_of([p.flops for p in used])
    if inputs is None or not teacher or not draws or not flops or not inputs.train_rows:
        return None
    return break_even(
        teacher=teacher,
        student=flops / draws,
        cached_per_trained=inputs.rows / inputs.train_rows,
        uses_of_this_run=draws / (inputs.train_rows * config.latents.noise.draws_per_row),
    )
