"""A plan as text."""

from __future__ import annotations

from raydistill.plan.accelerators import ACCELERATORS
from raydistill.plan.estimate import PhasePlan, Plan, TeacherPlan

UNKNOWN = "?"


def table(plan: Plan) -> str:
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
    return "\n\n".join(_block(title, lines) for title, lines in sections if lines)


Section = tuple[str, list[tuple[str, str]]]


def _block(title: str, lines: list[tuple[str, str]]) -> str:
    width = max((len(label) for label, _ in lines), default=0)
    return "\n".join([title, *(f"  {label.ljust(width)}  {text}" if label else f"  {text}" for label, text in lines)])


def _header(plan: Plan) -> Section:
    device = ACCELERATORS[plan.accelerator]
    return f"Plan of {plan.name}", [
        ("accelerator", f"{plan.accelerator}, {_si(device.flops, 'FLOP/s')} dense bf16, {_bytes(device.memory_bytes)}"),
        ("", f"({device.source}; hours at {plan.utilisation:.0%} of the peak)"),
    ]


def _inputs(plan: Plan) -> Section:
    inputs = plan.inputs
    if inputs is None:
        return "Inputs", [("rows, tokens", UNKNOWN)]
    about = "" if inputs.cached else "about "
    return "Inputs", [
        ("rows", f"{about}{inputs.rows:,} ({inputs.train_rows:,} to train on)"),
        (
            "tokens",
            f"{about}{_si(inputs.tokens)} ({_si(inputs.train_tokens)} to train on, {_si(inputs.targets)} predicted)",
        ),
        ("cache", f"{about}{inputs.bytes_per_token:.2f} B/token, {_bytes(inputs.total_bytes)}"),
        ("", f"({inputs.basis})"),
    ]


def _teacher(teacher: TeacherPlan, plan: Plan) -> Section:
    title = f"Teacher {teacher.name}"
    lines = [
        ("model", teacher.source.partition("#")[0]),
        ("parameters", _parameters(teacher.parameters, teacher.active_parameters)),
    ]
    lines.append(("weights", f"{_bytes(teacher.weight_bytes)} per actor{_too_big(teacher.weight_bytes, plan)}"))
    cache = teacher.cache
    if cache is not None and cache.cached:
        lines.append(("cache", f"is there: {cache.bytes_per_token:.1f} B/token, {_bytes(cache.total_bytes)}"))
    elif cache is not None:
        total = _bytes(cache.total_bytes) if plan.inputs else UNKNOWN
        size = f"about {cache.bytes_per_token:.0f} B/token on disk ({cache.raw_bytes_per_token:.0f} before compression)"
        lines.append(("cache", f"{size}, {total}"))
    lines.append(("forward", f"{_si(teacher.flops_per_token, 'FLOP')}/token, {_si(teacher.flops, 'FLOP')} in all"))
    lines.append(("time", _hours(teacher.hours, plan)))
    return title, lines


def _student(plan: Plan) -> Section:
    return "Student", [
        ("parameters", _parameters(plan.student_parameters, plan.student_active_parameters)),
        ("forward", f"{_si(plan.student_forward_flops, 'FLOP')}/token"),
    ]


def _phase(phase: PhasePlan, plan: Plan) -> Section:
    steps = UNKNOWN if phase.steps is None else f"{phase.steps:,}"
    lines = [
        ("steps", f"{steps}, {_si(phase.tokens)} tokens"),
        ("trained", f"{_si(phase.trained_parameters)} parameters"),
        ("training", f"{_si(phase.flops_per_token, 'FLOP')}/token, {_si(phase.flops, 'FLOP')} in all"),
        ("time", _hours(phase.hours, plan)),
    ]
    memory = phase.memory
    if memory is not None:
        parts = {
            "weights": memory.weights, "gradients": memory.gradients, "fp32 masters": memory.masters,
            "Adam moments": memory.moments, "EMA": memory.ema,
        }  # fmt: skip
        text = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
        each = f"{plan.workers} worker{'s' if plan.workers > 1 else ''}"
        lines.append(("memory", f"{_bytes(memory.device)} on each of {each}{_too_big(memory.device, plan)}"))
        lines.append(
            ("", f"({text}{f'; {_bytes(memory.host)} of it offloaded' if memory.host else ''}; activations extra)")
        )
    speed = f"{_si(phase.bytes_per_second, 'B')}/s for {_si(phase.tokens_per_second)} tokens/s over all workers"
    lines.append(("reads", speed))
    return f"Phase {phase.name}", lines


def _total(plan: Plan) -> Section:
    lines = [("baseline", f"{_hours(plan.baseline_hours, plan)} (the same student without a teacher)")]
    if plan.baseline_hours == 0:
        lines = []
    lines.append(("all", _hours(plan.hours, plan)))
    if plan.price is not None:
        lines.append(("price", f"{plan.price:,.2f}"))
    lines.append(("", "(verification and evaluation are not counted)"))
    return "Total", lines


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
    return _si(all_) if all_ == active else f"{_si(all_)}, {_si(active)} of them active per token"


def _hours(hours: float | None, plan: Plan) -> str:
    if hours is None:
        return UNKNOWN
    text = f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"
    return f"{text} of {plan.accelerator}"


def _too_big(size: float | None, plan: Plan) -> str:
    return f": more than one {plan.accelerator} has" if size is not None and size > plan.memory_bytes else ""


def _si(number: float | None, unit: str = "") -> str:
    if number is None:
        return UNKNOWN
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            short = {"G": "B"}.get(prefix, prefix) if not unit else prefix
            return f"{number / size:.3g} {short}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _bytes(size: float | None) -> str:
    return UNKNOWN if size is None else _si(size, "B")
