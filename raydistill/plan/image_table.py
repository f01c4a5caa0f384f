"""A plan of a run on images as text."""

from __future__ import annotations

from raydistill.plan.hardware import hardware_lines, total_lines
from raydistill.plan.images import DenoiserPlan, ImagePhasePlan, ImagePlan
from raydistill.plan.projection import projection_lines
from raydistill.plan.words import UNKNOWN, Section, block, bytes_of, hours_of, si, too_big


def image_table(plan: ImagePlan) -> str:
    """The plan for a terminal; what is not known is a question mark, and the reasons stand at the end."""
    sections = [
        (f"Plan of {plan.name}", hardware_lines(plan.hardware)),
        _inputs(plan),
        *(_teacher(t, plan) for t in plan.teachers),
        _average(plan),
        _student(plan),
        *(_phase(p, plan) for p in plan.phases),
        _total(plan),
        _break_even(plan),
        ("Not known", [("", reason) for reason in plan.missing]),
    ]
    return "\n\n".join(block(title, lines) for title, lines in sections if lines)


def _inputs(plan: ImagePlan) -> Section:
    shape, what = " × ".join(map(str, plan.shape.latents)), "an image" if plan.shape.frames is None else "a video"
    square = " square" if plan.shape.size[0] == plan.shape.size[1] else ""
    what = f"a{square} {what.split()[1]}" if square else what
    lines = [("latents", f"{shape} of {what}, {si(plan.shape.prediction)} numbers")]
    inputs = plan.inputs
    title = "Images" if plan.shape.frames is None else "Videos"
    if inputs is None:
        return title, [("rows", UNKNOWN), *lines]
    about, most = ("", "") if inputs.cached else ("about ", "at most ")
    draws = f"{inputs.rows * plan.draws_per_row:,} draws of noise, {plan.draws_per_row} per row"
    per_caption = f", {bytes_of(inputs.bytes_per_caption)} per caption" if inputs.bytes_per_caption else ""
    return title, [
        ("rows", f"{about}{inputs.rows:,} ({inputs.train_rows:,} to train on), {draws}"),
        *lines,
        ("cache", f"{bytes_of(inputs.bytes_per_image)} per row{per_caption}, {most}{bytes_of(inputs.total_bytes)}"),
        ("", f"({inputs.basis})"),
    ]


def _teacher(teacher: DenoiserPlan, plan: ImagePlan) -> Section:
    weights = teacher.weight_bytes
    lines = [
        ("model", teacher.source.partition("#")[0]),
        ("parameters", si(teacher.parameters)),
        ("weights", f"{bytes_of(weights)} per actor{too_big(weights, plan.hardware.teacher)}"),
    ]
    cache = teacher.cache
    if cache is not None:
        there = "is there: " if cache.cached else ""
        lines.append(("cache", f"{there}{bytes_of(cache.bytes_per_draw)} per draw, {bytes_of(cache.total_bytes)}"))
    passes = {1: "", 2: " (two passes: guidance)"}.get(teacher.passes, f" ({teacher.passes} passes)")
    lines.append(("forward", f"{si(teacher.flops_per_draw, 'FLOP')}/draw{passes}, {si(teacher.flops, 'FLOP')} in all"))
    lines.append(("time", hours_of(teacher.hours, plan.hardware.teacher)))
    return f"Teacher {teacher.name}", lines


def _average(plan: ImagePlan) -> Section:
    cache = plan.average
    if cache is None:
        return "Average of the teachers", []
    return "Average of the teachers", [
        ("cache", f"{bytes_of(cache.bytes_per_draw)} per draw, {bytes_of(cache.total_bytes)}")
    ]


def _student(plan: ImagePlan) -> Section:
    return "Student", [
        ("parameters", si(plan.student_parameters)),
        ("forward", f"{si(plan.student_forward_flops, 'FLOP')}/sample and step"),
        *projection_lines(plan.projection),
    ]


def _phase(phase: ImagePhasePlan, plan: ImagePlan) -> Section:
    steps = UNKNOWN if phase.steps is None else f"{phase.steps:,}"
    lines = [
        ("steps", f"{steps}, {si(phase.draws)} draws"),
        ("trained", f"{si(phase.trained_parameters)} parameters"),
        ("training", f"{si(phase.flops_per_draw, 'FLOP')}/draw, {si(phase.flops, 'FLOP')} in all"),
        ("time", hours_of(phase.hours, plan.hardware.train)),
        *([("actors", hours_of(phase.actor_hours, plan.hardware.teacher))] if phase.actor_hours != 0 else []),
        *_memory(phase, plan),
    ]
    if phase.bytes_per_second is not None:
        speed = f"{si(phase.bytes_per_second, 'B')}/s for {si(phase.draws_per_second)} draws/s over all workers"
        lines.append(("reads", speed))
    return f"Phase {phase.name}", lines


def _memory(phase: ImagePhasePlan, plan: ImagePlan) -> list[tuple[str, str]]:
    """A row for each ZeRO stage; the phase's own is marked."""
    if phase.memory is None:
        return []
    workers = f"{plan.workers} worker{'s' if plan.workers > 1 else ''}"
    heads = ["", "weights", "gradients", "masters", "moments", "EMA", "offloaded", "together"]
    rows = [
        [
            f"{'*' if stage == phase.stage else ' '}ZeRO {stage}",
            *(
                bytes_of(size) if size else "–"
                for size in (m.weights, m.gradients, m.masters, m.moments, m.ema, m.host)
            ),
            bytes_of(m.device) + too_big(m.device, plan.hardware.train),
        ]
        for stage, m in phase.memory.items()
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads) - 1)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]])
        for row in (heads, *rows)
    ]
    title = f"of model state on each of {workers} by ZeRO stage (* this run's); activations extra"
    return [("memory", title), *(("", line) for line in table)]


def _total(plan: ImagePlan) -> Section:
    return "Total", total_lines(
        plan, plan.baseline_hours, "encoding of the inputs, verification and evaluation are not counted"
    )


def _break_even(plan: ImagePlan) -> Section:
    found = plan.break_even
    title = "Cache against online teachers (a use: one pass over the training draws)"
    if found is None:
        return title, [("", UNKNOWN)] if plan.teachers else []
    total = ", ".join(f"{speed:.2f}× at {uses} use{'s' if uses > 1 else ''}" for uses, speed in found.total.items())
    return title, [
        ("pays after", f"{found.uses:.2f} uses; this run makes {found.uses_of_this_run:.2f}"),
        ("training", f"{found.student_stage:.2f}× faster"),
        ("everything", total),
    ]
