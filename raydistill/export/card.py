"""What the model cards of all kinds of models say alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from raydistill.config.schema import RunConfig
from raydistill.config.training import PhaseConfig
from raydistill.evaluate.comparison import Line
from raydistill.signals import JsonValue

COLUMNS = {
    "teacher": "teacher",
    "student_init": "untrained student",
    "student_ce": "student without a teacher",
    "student": "**this model**",
}


def columns(config: RunConfig) -> dict[str, str]:
    """Heads of the table's columns by role."""
    if config.export.weights == "ema":
        return {**COLUMNS, "student": "before averaging", "student_ema": "**this model**"}
    return COLUMNS


def rendered(card: str, **parts: object) -> str:
    """A card from its template; `StrictUndefined` finds what was forgotten."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    return environment.from_string(card).render(**parts)


def shown(source: str) -> str:
    """A source as others can use it: of a path on this machine only the name."""
    return Path(source).name if Path(source).is_absolute() else source


def versions(packages: Sequence[str]) -> str:
    """Packages with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def phase_line(phase: PhaseConfig, recipe: str, samples: str) -> str:
    """A phase in words; `recipe` are those of its recipe, `samples` what a step takes several of."""
    optimizer = phase.optimizer["student"]
    length = f"{phase.steps:,} steps" if phase.steps is not None else f"{phase.epochs:g} epochs"
    return (
        f"`{phase.name}`: {length} of {phase.batch.global_size} {samples}, {recipe}; "
        f"AdamW with learning rate {optimizer.lr:g} ({optimizer.schedule}), weight decay {optimizer.weight_decay:g}, "
        f"{phase.precision}, ZeRO {phase.zero.stage}"
    )


def lines_of(metrics: Mapping[str, JsonValue], roles: Mapping[str, str]) -> dict[str, Line]:
    """The measured lines by role, in the order of columns."""
    return {role: line for role in roles if isinstance(line := metrics.get(role), dict)}


def table(corner: str, names: Mapping[str, str], lines: Mapping[str, Line], roles: Mapping[str, str]) -> str:
    """Metrics by model; a metric that nobody has is left out."""
    rows = [
        [title, *(said(name, line.get(name)) for line in lines.values())]
        for name, title in names.items()
        if any(line.get(name) is not None for line in lines.values())
    ]
    return markdown([corner, *(roles[role] for role in lines)], rows)


def said(name: str, value: JsonValue) -> str:
    """A value of metric `name` as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if name in ("parameters", "tokens_per_second") or 1000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
