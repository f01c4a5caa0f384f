"""What a run will cost, before it runs: FLOP, hours, memory, bandwidth, and when its cache has paid for itself."""

from __future__ import annotations

import math

from raydistill.cache.manifest import Manifest
from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import TopKLogitsTeacher
from raydistill.config.training import PhaseConfig
from raydistill.errors import RaydistillError
from raydistill.models.counts import Counts, count, empty_student
from raydistill.models.load import empty_language_model
from raydistill.models.projection.forecast import Row
from raydistill.plan.hardware import AnyPlan, baseline_hours, bill_of, hardware_of, hours_at, total_of
from raydistill.plan.inputs import CachePlan, InputsPlan, plan_cache, plan_inputs
from raydistill.plan.projection import ProjectionPlan, plan_projection
from raydistill.train.parameters import parameter_groups

USES = (1, 3, 10)
"""Uses of a cache at which its saving is shown."""
ENOUGH = "For a plan, a folder that holds nothing but the model's config.json is enough."
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class TeacherPlan(Config):
    """What a teacher costs; None where its architecture could not be read."""

    name: str
    """Name of the teacher."""
    source: str
    """Its model."""
    parameters: int | None
    """Numbers in the model."""
    active_parameters: int | None
    """Those that one token uses."""
    weight_bytes: int | None
    """Memory of the weights in one actor."""
    flops_per_token: float | None
    """FLOP of the forward pass."""
    flops: float | None
    """FLOP of the whole cache; 0 when it is there."""
    hours: float | None
    """Accelerator hours of the whole cache; 0 when it is there."""
    cache: CachePlan | None
    """Its cache."""


class MemoryPlan(Config):
    """Bytes of model state on one worker; activations come on top."""

    weights: float
    """Weights as the forward pass uses them."""
    gradients: float
    """Gradients, with the fp32 accumulators of bf16 training."""
    masters: float
    """fp32 copies of the trained weights."""
    moments: float
    """AdamW's two moments."""
    ema: float
    """Moving average."""
    device: float
    """Sum of what lies on the accelerator."""
    host: float
    """Sum of what offloading puts into host memory or on NVMe."""


class PhasePlan(Config):
    """What a phase costs; None where the student's architecture or the inputs are not known."""

    name: str
    """Name of the phase."""
    steps: int | None
    """Optimizer steps."""
    tokens: float | None
    """Tokens trained on."""
    trained_parameters: int | None
    """Numbers that are trained."""
    flops_per_token: float | None
    """FLOP of a training step per token."""
    flops: float | None
    """FLOP of the phase."""
    hours: float | None
    """Accelerator hours of the phase, over all workers."""
    memory: MemoryPlan | None
    """Memory of one worker."""
    tokens_per_second: float | None
    """Tokens that all workers together take per second at the assumed utilisation."""
    bytes_per_second: float | None
    """What they then read from the caches."""


class BreakEven(Config):
    """A cache against a teacher that runs beside the student in every use.

    A use is one pass over the training tokens: epochs × students × trials. With t and s the FLOP per token of teacher
    and student and r ≥ 1 the cached tokens per training token, u uses cost u (t + s) with an online teacher and
    r t + u s with a cache. The cache has paid for itself after r uses.
    """

    uses: float
    """Uses after which the cache has paid for itself."""
    uses_of_this_run: float
    """Uses that this run makes."""
    student_stage: float
    """How much faster training is without the teacher beside it: (t + s) / s."""
    total: dict[int, float]
    """How much faster everything is, by number of uses: u (t + s) / (r t + u s)."""


class Plan(AnyPlan):
    """What a run with language models will cost."""

    inputs: InputsPlan | None
    """Rows and tokens; None when they are not known."""
    teachers: tuple[TeacherPlan, ...]
    """Teachers."""
    student_parameters: int | None
    """Numbers in the student."""
    student_active_parameters: int | None
    """Those that one token uses."""
    student_forward_flops: float | None
    """FLOP per token of the student's forward pass."""
    projection: ProjectionPlan | None
    """What the student begins with, where that is a projection of a teacher."""
    phases: tuple[PhasePlan, ...]
    """Phases."""
    baseline_hours: float | None
    """Accelerator hours of training the same student without a teacher; 0 when that is not asked for."""
    break_even: BreakEven | None
    """When the cache has paid for itself."""


def plan_text(config: RunConfig) -> Plan:
    """The cost of `config`, whose paths are resolved. Runs nothing; what cannot be known is None and in `missing`."""
    missing: list[str] = []
    hardware = hardware_of(config, missing)
    asked, trained = hardware.rate(hardware.teacher), hardware.rate(hardware.train)
    inputs, manifest = plan_inputs(config, missing)
    length = min(config.text.seq_len, inputs.tokens / max(inputs.rows, 1)) if inputs else float(config.text.seq_len)
    teachers = tuple(
        _teacher(t, config, inputs, manifest, length, asked, missing)
        for t in config.teachers
        if isinstance(t, TopKLogitsTeacher)
    )
    workers = config.resources.train.workers
    fewest = max(1, workers if isinstance(workers, int) else workers[0])
    student = _student(config, missing)
    read = _bytes_read(inputs, teachers, config)
    phases = tuple(_phase(p, config, inputs, student, length, trained, fewest, read) for p in config.phases)
    training = total_of([p.hours for p in phases])
    baseline = baseline_hours(config, training)
    bill = bill_of(
        config, *((hardware.teacher, t.hours) for t in teachers), (hardware.train, training), (hardware.train, baseline)
    )
    return Plan(
        name=config.name,
        hardware=hardware,
        workers=fewest,
        inputs=inputs,
        teachers=teachers,
        student_parameters=student.parameters if student else None,
        student_active_parameters=student.active_parameters if student else None,
        student_forward_flops=student.forward(length) if student else None,
        projection=plan_projection(config, Row(config.text.seq_len), missing),
        phases=phases,
        baseline_hours=baseline,
        bill=bill,
        break_even=_break_even(config, inputs, teachers, phases),
        missing=tuple(missing),
    )


def _teacher(
    teacher: TopKLogitsTeacher, config: RunConfig, inputs: InputsPlan | None, manifest: Manifest | None, length: float,
    rate: float | None, missing: list[str],
) -> TeacherPlan:  # fmt: skip
    try:
        model = empty_language_model(teacher.model)
    except RaydistillError as error:
        missing.append(f"size and cost of teacher {teacher.name}: {error} {ENOUGH}")
        return TeacherPlan(
            name=teacher.name, source=teacher.model.source, parameters=None, active_parameters=None,
            weight_bytes=None, flops_per_token=None, flops=None, hours=None, cache=None,
        )  # fmt: skip
    counts = count(model)
    cache = plan_cache(config, teacher, inputs, manifest, model.config.get_text_config().vocab_size)
    per_token = counts.forward(length)
    flops = 0.0 if cache.cached else per_token * inputs.tokens if inputs else None
    return TeacherPlan(
        name=teacher.name,
        source=teacher.model.source,
        parameters=counts.parameters,
        active_parameters=counts.active_parameters,
        weight_bytes=counts.parameters * BYTES[teacher.model.dtype],
        flops_per_token=per_token,
        flops=flops,
        hours=hours_at(flops, rate),
        cache=cache,
    )


def _student(config: RunConfig, missing: list[str]) -> Counts | None:
    try:
        return count(empty_student(config.student))
    except RaydistillError as error:
        missing.append(f"size and cost of the student: {error} {ENOUGH}")
        return None


def _phase(
    phase: PhaseConfig, config: RunConfig, inputs: InputsPlan | None, student: Counts | None, length: float,
    rate: float | None, workers: int, read: float | None,
) -> PhasePlan:  # fmt: skip
    steps, tokens = phase.steps, None
    if phase.steps is not None:
        per_row = inputs.train_tokens / max(inputs.train_rows, 1) if inputs else config.text.seq_len
        tokens = phase.steps * phase.batch.global_size * per_row
    elif inputs is not None and phase.epochs is not None:
        tokens = phase.epochs * inputs.train_tokens
        steps = math.ceil(phase.epochs * inputs.train_rows / phase.batch.global_size)
    per_token = speed = memory = trained = None
    if student is not None:
        counts = _trained(phase, config) if phase.trainable else student
        trained = counts.trained_parameters
        per_token = counts.training(length, recompute=config.student.gradient_checkpointing)
        speed = workers * rate / per_token if rate is not None else None
        memory = memory_of(counts.parameters, trained, phase, workers)
    flops = per_token * tokens if per_token is not None and tokens is not None else None
    return PhasePlan(
        name=phase.name,
        steps=steps,
        tokens=tokens,
        trained_parameters=trained,
        flops_per_token=per_token,
        flops=flops,
        hours=hours_at(flops, rate),
        memory=memory,
        tokens_per_second=speed,
        bytes_per_second=speed * read if speed is not None and read is not None else None,
    )


def _trained(phase: PhaseConfig, config: RunConfig) -> Counts:
    """Counts of the student with what the phase's rules freeze; `ConfigError` for a rule that matches nothing."""
    model = empty_student(config.student)
    optimizer = next(iter(phase.optimizer.values()))
    parameter_groups(model, phase.trainable, optimizer, where=f"phases: {phase.name}: trainable")
    return count(model)


def memory_of(parameters: int, trained: int, phase: PhaseConfig, workers: int) -> MemoryPlan:
    """Model state on one worker.

    Bytes per number: 2 of weights and 2 + 4 of gradients in bf16 (4 and 4 in fp32), 4 of masters (none in fp32 at stage
    0), 8 of moments, 4 of the moving average. Masters, moments and average are split over the workers from stage 1 on,
    gradients from stage 2, weights at stage 3. In bf16, stage 0 runs as stage 1.

    Source: Rajbhandari et al. 2020, arXiv 1910.02054, Sec. 5, with fp32 gradient accumulation.
    """
    bf16, zero = phase.precision == "bf16", phase.zero
    stage = max(zero.stage, 1) if bf16 else zero.stage

    def share(number: float, from_stage: int) -> float:
        return number / workers if stage >= from_stage else number

    weights = share((2 if bf16 else 4) * parameters, 3)
    gradients = share((6 if bf16 else 4) * trained, 2)
    masters = share(4 * trained, 1) if bf16 or stage else 0.0
    moments = share(8 * trained, 1)
    ema = share(4 * trained, 1) if phase.ema else 0.0
    host = (masters + moments if zero.offload_optimizer else 0.0) + (weights if zero.offload_parameters else 0.0)
    total = weights + gradients + masters + moments + ema
    return MemoryPlan(
        weights=weights, gradients=gradients, masters=masters, moments=moments, ema=ema, device=total - host, host=host
    )


def _bytes_read(inputs: InputsPlan | None, teachers: tuple[TeacherPlan, ...], config: RunConfig) -> float | None:
    """Bytes that a student reads per token, of the inputs and of every teacher in use."""
    signals = [t.cache.bytes_per_token if t.cache else None for t in teachers]
    total = total_of(signals)
    if inputs is None or total is None:
        return None
    return inputs.bytes_per_token + total * inputs.targets / max(inputs.tokens, 1)


def _break_even(
    config: RunConfig, inputs: InputsPlan | None, teachers: tuple[TeacherPlan, ...], phases: tuple[PhasePlan, ...]
) -> BreakEven | None:
    teacher = total_of([t.flops_per_token for t in teachers])
    used = [p for p, c in zip(phases, config.phases, strict=True) if c.recipe.uses_teacher]
    tokens, flops = total_of([p.tokens for p in used]), total_of([p.flops for p in used])
    if inputs is None or teacher is None or not tokens or not flops:
        return None
    return break_even(
        teacher=teacher,
        student=flops / tokens,
        cached_per_trained=inputs.tokens / max(inputs.train_tokens, 1),
        uses_of_this_run=tokens / max(inputs.train_tokens, 1),
    )


def break_even(
    *, teacher: float, student: float, cached_per_trained: float = 1.0, uses_of_this_run: float = 1.0
) -> BreakEven:
    """The accounting of `BreakEven` for the FLOP per token of teacher and student."""
    both = teacher + student
    return BreakEven(
        uses=cached_per_trained,
        uses_of_this_run=uses_of_this_run,
        student_stage=both / student,
        total={u: u * both / (cached_per_trained * teacher + u * student) for u in USES},
    )
