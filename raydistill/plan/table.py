"""A plan as text."""

from __future__ import annotations

from raydistill.plan.estimate import PhasePlan, Plan, TeacherPlan
from raydistill.plan.hardware import hardware_lines, total_lines
from raydistill.plan.projection import projection_lines
from raydistill.plan.words import UNKNOWN, Section, block, bytes_of, hours_of, si, too_big


def text_table(plan: Plan) -> str:
    """The plan for a terminal; what is not known is a question mark, and the reasons stand at the end."""
    sections = [
        _header(plan),
        _inputs(plan),
        *(_teacher(t, plan) for t in plan.teachers),
        _student(plan),
        *(_phase(p, plan) for p in plan.phases),
        _total(plan),
        _break_even(plan),
        _missing(plan),
    ]
    return "\n\n".join(block(title, lines) for title, lines in sections if lines)


def _header(plan: Plan) -> Section:
    return f"Plan of {plan.name}", hardware_lines(plan.hardware)


def _inputs(plan: Plan) -> Section:
    inputs = plan.inputs
    if inputs is None:
        return "Inputs", [("rows, tokens", UNKNOWN)]
    about = "" if inputs.cached else "about "
    return "Inputs", [
        ("rows", f"{about}{inputs.rows:,} ({inputs.train_rows:,} to train on)"),
        (
            "tokens",
            f"{about}{si(inputs.tokens)} ({si(inputs.train_tokens)} to train on, {si(inputs.targets)} predicted)",
        ),
        ("cache", f"{about}{inputs.bytes_per_token:.2f} B/token, {bytes_of(inputs.total_bytes)}"),
        ("", f"({inputs.basis})"),
    ]


def _teacher(teacher: TeacherPlan, plan: Plan) -> Section:
    title = f"Teacher {teacher.name}"
    lines = [
        ("model", teacher.source.partition("#")[0]),
        ("parameters", _parameters(teacher.parameters, teacher.active_parameters)),
    ]
    lines.append(
        ("weights", f"{bytes_of(teacher.weight_bytes)} per actor{too_big(teacher.weight_bytes, plan.hardware.teacher)}")
    )
    cache = teacher.cache
    if cache is not None and cache.cached:
        lines.append(("cache", f"is there: {cache.bytes_per_token:.1f} B/token, {bytes_of(cache.total_bytes)}"))
    elif cache is not None:
        total = bytes_of(cache.total_bytes) if plan.inputs else UNKNOWN
        size = f"about {cache.bytes_per_token:.0f} B/token on disk ({cache.raw_bytes_per_token:.0f} before compression)"
        lines.append(("cache", f"{size}, {total}"))
    lines.append(("forward", f"{si(teacher.flops_per_token, 'FLOP')}/token, {si(teacher.flops, 'FLOP')} in all"))
    lines.append(("time", hours_of(teacher.hours, plan.hardware.teacher)))
    return title, lines


def _student(plan: Plan) -> Section:
    return "Student", [
        ("parameters", _parameters(plan.student_parameters, plan.student_active_parameters)),
        ("forward", f"{si(plan.student_forward_flops, 'FLOP')}/token"),
        *projection_lines(plan.projection),
    ]


def _phase(phase: PhasePlan, plan: Plan) -> Section:
    steps = UNKNOWN if phase.steps is None else f"{phase.steps:,}"
    lines = [
        ("steps", f"{steps}, {si(phase.tokens)} tokens"),
        ("trained", f"{si(phase.trained_parameters)} parameters"),
        ("training", f"{si(phase.flops_per_token, 'FLOP')}/token, {si(phase.flops, 'FLOP')} in all"),
        ("time", hours_of(phase.hours, plan.hardware.train)),
    ]
    memory = phase.memory
    if memory is not None:
        parts = {
            "weights": memory.weights, "gradients": memory.gradients, "fp32 masters": memory.masters,
            "Adam moments": memory.moments, "EMA": memory.ema,
        }  # fmt: skip
        text = ", ".join(f"{name} {bytes_of(size)}" for name, size in parts.items() if size)
        each = f"{plan.workers} worker{'s' if plan.workers > 1 else ''}"
        lines.append(
            ("memory", f"{bytes_of(memory.device)} on each of {each}{too_big(memory.device, plan.hardware.train)}")
        )
        lines.append(
            ("", f"({text}{f'; {bytes_of(memory.host)} of it offloaded' if memory.host else ''}; activations extra)")
        )
    speed = f"{si(phase.bytes_per_second, 'B')}/s for {si(phase.tokens_per_second)} tokens/s over all workers"
    lines.append(("reads", speed))
    return f"Phase {phase.name}", lines


def _total(plan: Plan) -> Section:
    return "Total", total_lines(plan, plan.baseline_hours, "verification and evaluation are not counted")


def _break_even(plan: Plan) -> Section:
    found = plan.break_even
    if found is None:
        return "Cache against an online teacher", [("", UNKNOWN)]
    total = ", ".join(f"{speed:.2f}× at {uses} use{'s' if uses > 1 else ''}" for uses, speed in found.total.items())
    return "Cache against an online teacher (a use: one pass over the training tokens)", [
        ("pays after", f"{found.uses:.2f} uses; this run makes {found.uses_of_this_run:.2f}"),
        ("training", f"{found.student_stage:.2f}× faster"),
        ("everything", total),
    ]


def _missing(plan: Plan) -> Section:
    return "Not known", [("", reason) for reason in plan.missing]


def _parameters(all_: int | None, active: int | None) -> str:
    if all_ is None:
        return UNKNOWN
    return si(all_) if all_ == active else f"{si(all_)}, {si(active)} of them active per token"
