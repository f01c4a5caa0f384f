"""How a plan says numbers."""

from __future__ import annotations

from raydistill.plan.accelerators import ACCELERATORS

UNKNOWN = "?"
"""What stands for a number that cannot be known."""

Section = tuple[str, list[tuple[str, str]]]
"""A title, and lines of label and text."""


def block(title: str, lines: list[tuple[str, str]]) -> str:
    """A section as text, labels of one width."""
    width = max((len(label) for label, _ in lines), default=0)
    return "\n".join([title, *(f"  {label.ljust(width)}  {text}" if label else f"  {text}" for label, text in lines)])


def hours_of(hours: float | None, accelerator: str) -> str:
    """Accelerator time."""
    if hours is None:
        return UNKNOWN
    text = f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"
    return f"{text} of {accelerator}"


def too_big(size: float | None, accelerator: str) -> str:
    """Words for what does not fit onto one accelerator, none for what does."""
    known = ACCELERATORS.get(accelerator)
    return f": more than one {accelerator} has" if known and size is not None and size > known.memory_bytes else ""


def si(number: float | None, unit: str = "") -> str:
    """Three digits with a prefix."""
    if number is None:
        return UNKNOWN
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            short = {"G": "B"}.get(prefix, prefix) if not unit else prefix
            return f"{number / size:.3g} {short}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def bytes_of(size: float | None) -> str:
    """Bytes with a prefix."""
    return UNKNOWN if size is None else si(size, "B")
