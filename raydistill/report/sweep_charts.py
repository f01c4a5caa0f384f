"""Charts of a sweep: trials in the order they came, over one key, over two keys, over two metrics, over all keys.

A spot is a trial. Its tone says how it stands: `student` the best, `c2` trained to its end, `student_init` stopped
early.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from raydistill.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NARROW,
    RIGHT,
    TOP,
    WIDE,
    Format,
    Point,
    Scale,
    _frame,
    _line,
    _path,
    _range,
    _svg,
    _text,
    linear_ticks,
    log_ticks,
    number,
)
from raydistill.signals import JsonValue

MOST_NAMES = 12
"""Different values up to which an axis names each of them."""
APART = 26.0
"""Least distance between values that an axis names one by one."""
FULL = 960.0
"""Width of a chart over the whole page."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A trial in a chart."""

    x: JsonValue
    y: float
    tone: str
    title: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values of a key stand: on a scale, or each in a place of its own."""

    scale: Scale
    names: tuple[str, ...] = ()
    """Texts of the values where each has its own place."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Positions and texts."""

    def at(self, value: JsonValue) -> float:
        """Position of a value."""
        if self.names:
            return self.scale(self.names.index(said_value(value)) + 0.5)
        assert isinstance(value, int | float), "only numbers stand on a scale"
        return self.scale(float(value))


def said_value(value: JsonValue) -> str:
    """A value of a key in few words."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return json.dumps(value) if not isinstance(value, str) else value
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return " ".join(said_value(v) for v in value.values())
    return "[" + ", ".join(said_value(v) for v in value) + "]"


def is_number(value: JsonValue) -> bool:
    """Whether a value can stand on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def axis_of(values: Sequence[JsonValue], start: float, end: float) -> Axis:
    """The axis for the values of a key, logarithmic where they span more than a factor of 20."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        names = tuple(dict.fromkeys(said_value(v) for v in values))
        scale = Scale(0, len(names), start, end)
        return Axis(scale, names, tuple((scale(i + 0.5), _cut(name, 14)) for i, name in enumerate(names)))
    log = min(numbers) > 0 and max(numbers) / min(numbers) > 20
    low, high = _range(numbers, log=log, zero=False)
    scale = Scale(low, high, start, end, log)
    different = sorted(set(numbers))
    apart = min((abs(scale(b) - scale(a)) for a, b in pairwise(different)), default=APART)
    few = len(different) <= 6 and apart >= APART
    marks = different if few else log_ticks(low, high) if log else linear_ticks(low, high)
    return Axis(scale, (), tuple((scale(v), number(v)) for v in marks))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def spots_chart(
    spots: Sequence[Spot], *, label: str, x_unit: str, width: float = NARROW, y_format: Format = number
) -> str:
    """Trials over the values of one key; empty without a trial."""
    if not spots:
        return ""
    x_axis = axis_of([s.x for s in spots], LEFT + 8, width - RIGHT - 8)
    y_axis, ticks = _y_axis([s.y for s in spots], y_format)
    frame = Scale(0, 1, LEFT, width - RIGHT)
    body = [_frame(frame, y_axis, ticks)]
    body += [_text("tick", x, HEIGHT - 16, text) for x, text in x_axis.ticks]
    body.append(_text("unit", width - RIGHT, HEIGHT - 2, x_unit, "end"))
    body += [_spot(x_axis.at(s.x), y_axis(s.y), s.tone, s.title) for s in _best_last(spots)]
    return _svg(body, width, HEIGHT, label)


def _y_axis(values: Sequence[float], y_format: Format) -> tuple[Scale, list[tuple[float, str]]]:
    log = min(values) > 0 and max(values) / min(values) > 20
    low, high = _range(values, log=log, zero=False)
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    return Scale(low, high, HEIGHT - BOTTOM, TOP, log), [(t, y_format(t)) for t in ticks]


def _best_last(spots: Sequence[Spot]) -> list[Spot]:
    """The best trial is drawn over the others."""
    return sorted(spots, key=lambda s: s.tone == "student")


def _spot(x: float, y: float, tone: str, title: str) -> str:
    radius = 6 if tone == "student" else 4
    inner = f"<title>{escape(title)}</title>"
    return f'<circle class="dot spot {tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inner}</circle>'


def progress_chart(
    spots: Sequence[Spot], *, lower_is_better: bool, label: str, width: float = WIDE, y_format: Format = number
) -> str:
    """Trials in their order, and the best value so far as stairs; `x` is the number of the trial."""
    if not spots:
        return ""
    y_axis, ticks = _y_axis([s.y for s in spots], y_format)
    order = sorted(((float(str(s.x)), s) for s in spots), key=lambda pair: pair[0])
    last = max(order[-1][0], order[0][0] + 1)
    x_axis = Scale(order[0][0], last, LEFT + 8, width - RIGHT - 8)
    body = [_frame(Scale(0, 1, LEFT, width - RIGHT), y_axis, ticks)]
    body += [_text("tick", x_axis(t), HEIGHT - 16, number(t)) for t in linear_ticks(order[0][0], last) if t == int(t)]
    body.append(_text("unit", width - RIGHT, HEIGHT - 2, "trial", "end"))
    stairs: list[Point] = []
    for x, spot in order:
        if spot.tone == "student_init":  # stopped early: not to be compared
            continue
        best = spot.y if not stairs else (min if lower_is_better else max)(stairs[-1][1], spot.y)
        stairs += [(x, stairs[-1][1]), (x, best)] if stairs else [(x, best)]
    if stairs:
        body.append(f'<path class="line student" d="{_path([*stairs, (last, stairs[-1][1])], x_axis, y_axis)}"/>')
    body += [
        _spot(x_axis(x), y_axis(s.y), s.tone, s.title) for x, s in sorted(order, key=lambda p: p[1].tone == "student")
    ]
    return _svg(body, width, HEIGHT, label)


def front_chart(
    spots: Sequence[Spot], front: Sequence[Point], *, label: str, x_unit: str, y_format: Format = number
) -> str:
    """Trials over two metrics, and through the best compromises (sorted by x) a line."""
    if not spots:
        return ""
    xs = [float(str(s.x)) for s in spots]
    log = min(xs) > 0 and max(xs) / min(xs) > 20
    low, high = _range(xs, log=log, zero=False)
    x_axis = Scale(low, high, LEFT + 8, WIDE - RIGHT - 8, log)
    y_axis, ticks = _y_axis([s.y for s in spots], y_format)
    body = [_frame(Scale(0, 1, LEFT, WIDE - RIGHT), y_axis, ticks)]
    marks = log_ticks(low, high) if log else linear_ticks(low, high)
    body += [_text("tick", x_axis(t), HEIGHT - 16, number(t)) for t in marks]
    body.append(_text("unit", WIDE - RIGHT, HEIGHT - 2, x_unit, "end"))
    if len(front) > 1:
        body.append(f'<path class="line student dashed" d="{_path(front, x_axis, y_axis)}"/>')
    body += [_spot(x_axis(float(str(s.x))), y_axis(s.y), s.tone, s.title) for s in _best_last(spots)]
    return _svg(body, WIDE, HEIGHT, label)


def heat_chart(
    cells: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    lower_is_better: bool,
    label: str,
    row_name: str,
    column_name: str,
    y_format: Format = number,
) -> str:
    """A table of two keys: the darker a cell, the better; the best one has a frame. Shades follow the ranks, so that
    one bad corner does not swallow the rest."""
    if not cells:
        return ""
    left, top, cell = 74.0, 24.0, 34.0
    step = (WIDE - left - 4) / len(columns)
    order = sorted(cells.values(), reverse=lower_is_better)
    body = []
    for j, name in enumerate(columns):
        body.append(_text("tick", left + (j + 0.5) * step, top - 7, _cut(name, 10)))
    for i, name in enumerate(rows):
        y = top + i * cell
        body.append(_text("row", left - 8, y + cell / 2 + 4, _cut(name, 10), "end"))
        for j, other in enumerate(columns):
            value = cells.get((name, other))
            if value is None:
                continue
            share = order.index(value) / max(len(order) - 1, 1)
            best = value == order[-1]
            x = left + j * step
            title = f"{row_name} {name}, {column_name} {other}: {y_format(value)}"
            body.append(
                f'<rect class="heat{" best" if best else ""}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{step - 2:.1f}" '
                f'height="{cell - 2:.1f}" style="fill-opacity:{0.06 + 0.74 * share**1.4:.3f}">'
                f"<title>{escape(title)}</title></rect>"
            )
            tone = "value light" if share > 0.72 else "value"
            body.append(_text(tone, x + step / 2, y + cell / 2 + 4.5, y_format(value)))
    height = top + len(rows) * cell + 18
    body.append(_text("unit", WIDE - 4, height - 3, f"across: {column_name}, down: {row_name}", "end"))
    return _svg(body, WIDE, height, label)


def triangle_chart(
    spots: Sequence[tuple[Sequence[float], float, str]],
    corners: Sequence[str],
    *,
    lower_is_better: bool,
    label: str,
    y_format: Format = number,
) -> str:
    """Shares of three that sum to 1 as places in a triangle: (shares, metric, title). The darker a spot, the better, by
    ranks; the best one has a frame and its value. Empty without a trial."""
    if not spots:
        return ""
    places = [(WIDE / 2, 36.0), (92.0, 294.0), (WIDE - 92.0, 294.0)]
    order = sorted((y for _, y, _ in spots), reverse=lower_is_better)
    outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    body = [f'<path class="edge" d="M{outline}Z"/>']
    body.append(_text("row", places[0][0], places[0][1] - 19, corners[0]))
    body += [_text("row", x, y + 26, name) for (x, y), name in zip(places[1:], corners[1:], strict=True)]
    told = []
    for shares, value, title in spots:
        x, y = (sum(s * place[axis] for s, place in zip(shares, places, strict=True)) for axis in (0, 1))
        share = order.index(value) / max(len(order) - 1, 1)
        best = value == order[-1]
        body.append(
            f'<circle class="heat{" best" if best else ""}" cx="{x:.1f}" cy="{y:.1f}" r="{13 if best else 11}" '
            f'style="fill-opacity:{0.06 + 0.74 * share**1.4:.3f}"><title>{escape(title)}</title></circle>'
        )
        told += [_text("value", x, y - 18, y_format(value))] if best else []
    return _svg([*body, *told], WIDE, 328, label)


def parallel_chart(
    trials: Sequence[tuple[Sequence[JsonValue], float, str, str]],
    names: Sequence[str],
    *,
    metric: str,
    label: str,
    y_format: Format = number,
) -> str:
    """One line per trial through an axis per key to the axis of the metric: (values, metric, tone, title). A key that a
    trial does not set is None, and its line runs below that axis."""
    if not trials:
        return ""
    height, top, bottom = 300.0, 30.0, 262.0
    places = [60 + i * (FULL - 130) / len(names) for i in range(len(names) + 1)]
    axes = []
    for k in range(len(names)):
        found = [trial[0][k] for trial in trials if trial[0][k] is not None]
        axes.append(axis_of(found, bottom, top) if found else None)
    scores = axis_of([trial[1] for trial in trials], bottom, top)
    body, ticks = [], []
    for place, name, axis in zip(places, [*names, metric], [*axes, scores], strict=True):
        body += [_line("axis", place, top, place, bottom), _text("mark", place, top - 12, _cut(name, 22))]
        ticks += [_text("tick", place - 6, y + 4, text, "end") for y, text in (axis.ticks if axis else ())]
    for values, score, tone, title in sorted(trials, key=lambda trial: trial[2] == "student"):
        points = [
            (place, axis.at(value) if axis is not None and value is not None else bottom + 18)
            for place, axis, value in zip(places, axes, values, strict=False)
        ]
        points.append((places[-1], scores.at(score)))
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        body.append(f'<path class="line thread {tone}" d="{d}"><title>{escape(title)}</title></path>')
    return _svg([*body, *ticks], FULL, height, label)


def finite(value: object) -> float | None:
    """`value` as a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
