"""What a run of world models will cost: parameters, FLOP, bytes, hours, and whether to keep signals or ask online."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.config.training import PhaseConfig
from raydistill.config.world import EpisodesSource, WorldModel, WorldSizes, WorldTeacher
from raydistill.errors import RaydistillError
from raydistill.models.taps import Taps
from raydistill.models.world.features import per_clip
from raydistill.models.world.files import world_sizes
from raydistill.models.world.model import empty_world
from raydistill.plan.estimate import MemoryPlan, memory_of
from raydistill.plan.hardware import (
    AnyPlan,
    Hardware,
    baseline_hours,
    bill_of,
    hardware_lines,
    hardware_of,
    hours_at,
    total_lines,
    total_of,
)
from raydistill.plan.words import UNKNOWN, Section, block, bytes_of, hours_of, si, too_big
from raydistill.train.parameters import parameter_groups

RANK = 64
"""What `rank` is tried with, beside the configured one."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BACKWARD = 2.0
"""FLOP of a backward pass over those of the forward pass."""


class WorldCounts(Config):
    """What a world model costs; counted on the meta device."""

    parameters: int
    """Numbers in the model."""
    parts: dict[str, int]
    """The same by part."""
    clip_flops: float
    """FLOP of a forward pass over one clip."""
    frame_flops: float
    """FLOP of one frame of play, keys and values kept."""


class WorldTeacherPlan(Config):
    """What a teacher costs; None where its architecture could not be read."""

    name: str
    """Name of the teacher."""
    counts: WorldCounts | None
    """Its size."""
    weight_bytes: int | None
    """Memory of its weights."""
    clip_bytes: float | None
    """Bytes that its signal keeps of a clip."""
    total_bytes: float | None
    """Bytes of the whole signal; 0 for a teacher that is asked online."""
    flops_per_clip: float | None
    """FLOP of asking it about one clip."""
    hours: float | None
    """Accelerator hours of asking it about every clip once, or, online, in every step."""
    accelerator: str
    """Accelerator that it runs on: that of the students where it is asked in their workers."""
    other_hours: float | None
    """The same for the other way: online if it is cached, cached if it is online."""
    online: Literal["no", "local", "actors"]
    """Whether, and where, it is asked while the student trains."""
    smaller: dict[str, float]
    """Bytes per clip under settings that keep less, by the settings."""
    sent_bytes: float | None
    """Bytes per clip and step that actors would send to a worker at most: all of the signal in fp32."""


class WorldPhasePlan(Config):
    """What a phase costs."""

    name: str
    """Name of the phase."""
    steps: int | None
    """Optimizer steps."""
    clips: float | None
    """Clips trained on."""
    trained_parameters: int | None
    """Numbers that are trained."""
    flops_per_clip: float | None
    """FLOP of a training step on one clip."""
    hours: float | None
    """Accelerator hours."""
    memory: MemoryPlan | None
    """Memory of one worker."""


class WorldPlan(AnyPlan):
    """What a run with world models will cost."""

    clips: int | None
    """Clips of the source, of all splits; None when the source must be read first."""
    clip_bytes: int
    """Bytes of a clip in the inputs cache."""
    teachers: tuple[WorldTeacherPlan, ...]
    """Teachers."""
    student: WorldCounts | None
    """The student."""
    phases: tuple[WorldPhasePlan, ...]
    """Phases."""
    baseline_hours: float | None
    """Accelerator hours of training the same student without a teacher; 0 when that is not asked for."""


def plan_worlds(config: RunConfig) -> WorldPlan:
    """The cost of `config`, whose paths are resolved. Runs nothing; what cannot be known is None and in `missing`."""
    missing: list[str] = []
    source = config.episodes
    hardware = hardware_of(config, missing)
    trained = hardware.rate(hardware.train)
    clips = _clips(source)
    if clips is None:
        missing.append("number of clips: the source must be read first (--stages inputs)")
    student = _counted("student", config.student.model, source, missing)
    workers = config.resources.train.workers
    fewest = max(1, workers if isinstance(workers, int) else workers[0])
    seen = [_clips_seen(phase, config, clips) for phase in config.phases]
    taught = total_of([n for n, phase in zip(seen, config.phases, strict=True) if phase.recipe.uses_teacher])
    teachers = tuple(
        _teacher(t, config, clips, taught, hardware, missing) for t in config.teachers if isinstance(t, WorldTeacher)
    )
    beside = _local_bytes(teachers)
    phases = tuple(
        _phase(phase, config, student, n, trained, fewest, beside if phase.recipe.uses_teacher else 0.0)
        for n, phase in zip(seen, config.phases, strict=True)
    )
    training = total_of([p.hours for p in phases])
    baseline = baseline_hours(config, training)
    bill = bill_of(
        config, *((t.accelerator, t.hours) for t in teachers), (hardware.train, training), (hardware.train, baseline)
    )
    frame = 3 * source.frame_size[0] * source.frame_size[1]
    return WorldPlan(
        name=config.name,
        hardware=hardware,
        workers=fewest,
        clips=clips,
        clip_bytes=source.clip_frames * frame + 4 * source.clip_frames,
        teachers=teachers,
        student=student,
        phases=phases,
        baseline_hours=baseline,
        bill=bill,
        missing=tuple(missing),
    )


def _clips(source: EpisodesSource) -> int | None:
    """Clips of all games, if none ends early; None when there are files, which must be read first."""
    clips = 0
    for part in source.parts.values():
        game = part.environment
        if game is None:
            return None
        clips += min(game.episodes, source.max_episodes or game.episodes) * -(-game.steps // source.step)
    return clips


def count_world(sizes: WorldSizes, clip_frames: int) -> WorldCounts:
    """Parameters and FLOP of a model of the reference family, without its numbers."""
    network = empty_world(sizes)
    frames = torch.zeros(1, clip_frames, sizes.channels, *sizes.frame_size, device="meta")
    actions = torch.zeros(1, clip_frames - 1, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        network(frames, actions)
    with torch.no_grad(), FlopCounterMode(display=False) as play:
        network.rollout(frames[:, :1], actions)
    return WorldCounts(
        parameters=sum(p.numel() for p in network.parameters()),
        parts={name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()},
        clip_flops=float(forward.get_total_flops()),
        frame_flops=play.get_total_flops() / (clip_frames - 1),
    )


def _counted(who: str, model: object, source: EpisodesSource, missing: list[str]) -> WorldCounts | None:
    if not isinstance(model, WorldModel):
        missing.append(f"size and cost of {who}: it is built by a function of the user's")
        return None
    try:
        return count_world(world_sizes(model), source.clip_frames)
    except RaydistillError as error:
        missing.append(f"size and cost of {who}: {error}")
        return None


def _teacher(
    teacher: WorldTeacher,
    config: RunConfig,
    clips: int | None,
    taught: float | None,
    hardware: Hardware,
    missing: list[str],
) -> WorldTeacherPlan:
    source, online = config.episodes, teacher.online != "no"
    accelerator = hardware.train if teacher.online == "local" else hardware.teacher
    rate = hardware.rate(accelerator)
    smaller: dict[str, float] = {}
    sent = None
    counts = _counted(f"teacher {teacher.name}", teacher.model, source, missing)
    per_clip_bytes = hours = other = flops = None
    if counts is not None and isinstance(teacher.model, WorldModel):
        sizes = world_sizes(teacher.model)
        per_clip_bytes = float(signal_bytes(teacher, sizes, source.clip_frames))
        smaller = _smaller(teacher, sizes, source.clip_frames, per_clip_bytes)
        whole = teacher.model_copy(update={"store_dtype": "float32"})
        sent = float(signal_bytes(whole, sizes, source.clip_frames))
        flops = counts.clip_flops + (
            counts.frame_flops * (source.clip_frames - 1) if teacher.signal == "rollout" else 0
        )
        cached = None if clips is None else hours_at(flops * clips, rate)
        asked = None if taught is None else hours_at(flops * taught, rate)
        hours, other = (asked, cached) if online else (cached, asked)
    total = None if clips is None or per_clip_bytes is None else 0.0 if online else per_clip_bytes * clips
    return WorldTeacherPlan(
        name=teacher.name,
        counts=counts,
        weight_bytes=None if counts is None else counts.parameters * BYTES[teacher.model.dtype],
        clip_bytes=per_clip_bytes,
        total_bytes=total,
        flops_per_clip=flops,
        hours=hours,
        other_hours=None if teacher.signal == "rollout" else other,
        accelerator=accelerator,
        online=teacher.online,
        smaller=smaller,
        sent_bytes=None if teacher.signal == "rollout" else sent,
    )


def _smaller(teacher: WorldTeacher, sizes: WorldSizes, clip_frames: int, kept: float) -> dict[str, float]:
    """Bytes per clip at half precision, at a low rank, and at both, as far as that is less than what is kept now."""
    half: dict[str, object] = {"store_dtype": "float16"}
    low: dict[str, object] = {"rank": min(RANK, teacher.rank or RANK)}
    found: dict[str, float] = {}
    for change in (half, low, {**half, **low}):
        size = signal_bytes(teacher.model_copy(update=change), sizes, clip_frames)
        if size < min([kept, *found.values()]):
            found[", ".join(f"{key}: {value}" for key, value in change.items())] = float(size)
    return found


def signal_bytes(teacher: WorldTeacher, sizes: WorldSizes, clip_frames: int) -> int:
    """Bytes that a signal keeps of one clip: frames, logits, codes, taps, and the clips of rollouts."""
    network = empty_world(sizes)
    frames = torch.zeros(1, clip_frames, sizes.channels, *sizes.frame_size, device="meta")
    actions = torch.zeros(1, clip_frames - 1, dtype=torch.long, device="meta")
    taps = Taps(network, {name: tap.module for name, tap in teacher.taps.items()}, where=f"teachers.{teacher.name}")
    with torch.no_grad(), taps:
        said = network(frames, actions)
    size = BYTES[teacher.store_dtype]
    numbers = said.frames.numel()
    if teacher.logits and said.logits is not None:
        numbers += said.logits.numel()
    for name, feature in taps.taken().items():
        numbers += _kept(teacher, name, per_clip(feature, teacher.taps[name].kind, 1, where=name))
    whole = numbers * size + 4 * (0 if said.codes is None else said.codes.numel())
    return whole + (frames.numel() + 4 * actions.numel() if teacher.signal == "rollout" else 0)


def _kept(teacher: WorldTeacher, name: str, feature: Tensor) -> int:
    width = feature.shape[-1]
    rank = teacher.rank if teacher.taps[name].kind == "hidden" else None
    return feature.numel() // width * min(width, rank or width)


def _clips_seen(phase: PhaseConfig, config: RunConfig, clips: int | None) -> float | None:
    """Clips that a phase trains on, each as often as it is shown."""
    if phase.steps is not None:
        return float(phase.steps * phase.batch.global_size)
    if clips is None or phase.epochs is None:
        return None
    return phase.epochs * clips * (1 - config.evaluate.held_out)


def _phase(
    phase: PhaseConfig,
    config: RunConfig,
    student: WorldCounts | None,
    seen: float | None,
    rate: float | None,
    workers: int,
    beside: float,
) -> WorldPhasePlan:
    """The cost of a phase that trains on `seen` clips, with `beside` bytes of teachers in each worker."""
    steps = phase.steps
    if steps is None and seen is not None:
        steps = -(-int(seen) // phase.batch.global_size)
    trained = memory = hours = flops = None
    if student is not None:
        assert isinstance(config.student.model, WorldModel)
        network = empty_world(world_sizes(config.student.model))
        where = f"phases: {phase.name}: trainable"
        parameter_groups(network, phase.trainable, next(iter(phase.optimizer.values())), where=where)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        memory = memory_of(student.parameters, trained, phase, workers)
        memory = memory.model_copy(update={"device": memory.device + beside})
        passes = 1 + BACKWARD + (1 if config.student.gradient_checkpointing else 0)
        flops = passes * student.clip_flops
        hours = None if seen is None else hours_at(flops * seen, rate)
    return WorldPhasePlan(
        name=phase.name, steps=steps, clips=seen, trained_parameters=trained, flops_per_clip=flops, hours=hours,
        memory=memory,
    )  # fmt: skip


def _local_bytes(teachers: tuple[WorldTeacherPlan, ...]) -> float:
    """Weights of the teachers that are asked in the training process itself, as far as they are known."""
    return float(sum(t.weight_bytes or 0 for t in teachers if t.online == "local"))


def world_table(plan: WorldPlan) -> str:
    """The plan for a terminal; what is not known is a question mark, and the reasons stand at the end."""
    about = UNKNOWN if plan.clips is None else f"about {plan.clips:,}"
    total = None if plan.clips is None else float(plan.clips * plan.clip_bytes)
    sections: list[Section] = [
        (f"Plan of {plan.name}", hardware_lines(plan.hardware)),
        ("Episodes", [("clips", about), ("cache", f"{bytes_of(plan.clip_bytes)} per clip, {bytes_of(total)}")]),
        *(_teacher_lines(teacher, plan) for teacher in plan.teachers),
        _student_lines(plan),
        *(_phase_lines(phase, plan) for phase in plan.phases),
        ("Total", total_lines(plan, plan.baseline_hours, "verification and evaluation are not counted")),
        ("Not known", [("", reason) for reason in plan.missing]),
    ]
    return "\n\n".join(block(title, lines) for title, lines in sections if lines)


def _size(counts: WorldCounts | None) -> str:
    if counts is None:
        return UNKNOWN
    return f"{si(counts.parameters)} ({', '.join(f'{name} {si(n)}' for name, n in counts.parts.items())})"


def _teacher_lines(teacher: WorldTeacherPlan, plan: WorldPlan) -> Section:
    counts, name = teacher.counts, teacher.accelerator
    kept = f"{bytes_of(teacher.clip_bytes)} per clip, {bytes_of(teacher.total_bytes)}"
    asked = teacher.online != "no"
    way, other = ("asked online", "a cache") if asked else ("cached", "asking online")
    lines = [
        ("parameters", _size(counts)),
        ("weights", f"{bytes_of(teacher.weight_bytes)}{too_big(teacher.weight_bytes, name)}"),
        ("signal", f"none is kept ({kept.partition(',')[0]} if it were)" if asked else kept),
        *(("", f"{bytes_of(size)} per clip with {change}") for change, size in teacher.smaller.items()),
        ("forward", f"{si(counts.clip_flops if counts else None, 'FLOP')}/clip"),
        ("play", f"{si(counts.frame_flops if counts else None, 'FLOP')}/frame"),
        ("time", f"{hours_of(teacher.hours, name)}, {way}"),
    ]
    if teacher.other_hours is not None and teacher.hours is not None:
        cheaper = way if teacher.hours <= teacher.other_hours else other
        lines.append(("", f"({other}: {hours_of(teacher.other_hours, name)}; cheaper is {cheaper})"))
    if teacher.sent_bytes is not None:
        held = bytes_of(teacher.weight_bytes)
        lines.append(("online", f"local: {held} in each of {plan.workers} workers"))
        lines.append(("", f"actors: {held} in each, and at most {bytes_of(teacher.sent_bytes)} per clip to a worker"))
    return f"Teacher {teacher.name}", lines


def _student_lines(plan: WorldPlan) -> Section:
    counts = plan.student
    lines = [
        ("parameters", _size(counts)),
        ("forward", f"{si(counts.clip_flops if counts else None, 'FLOP')}/clip"),
        ("play", f"{si(counts.frame_flops if counts else None, 'FLOP')}/frame"),
    ]
    for teacher in plan.teachers:
        if counts is not None and teacher.counts is not None:
            fewer = teacher.counts.parameters / counts.parameters
            faster = teacher.counts.frame_flops / counts.frame_flops
            lines.append(
                ("", f"{fewer:.1f} × fewer parameters than {teacher.name}, {faster:.1f} × fewer FLOP per frame")
            )
    return "Student", lines


def _phase_lines(phase: WorldPhasePlan, plan: WorldPlan) -> Section:
    lines: list[tuple[str, str]] = [
        ("steps", f"{UNKNOWN if phase.steps is None else f'{phase.steps:,}'}, {si(phase.clips)} clips"),
        ("trained", f"{si(phase.trained_parameters)} parameters"),
        ("time", hours_of(phase.hours, plan.hardware.train)),
    ]
    if phase.memory is not None:
        size = phase.memory.device
        lines.append(("memory", f"{bytes_of(size)} on each of {plan.workers}{too_big(size, plan.hardware.train)}"))
    return f"Phase {phase.name}", lines
