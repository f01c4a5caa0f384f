"""Charts as inline SVG: small, styled by the page's CSS classes, readable without scripts.

A series, bar or dot has a `tone`: the CSS class that gives it the colour of who it stands for (`teacher`,
`student_init`, `student_ce`, `student`) or of its number (`c0` … `c5`). Hovering shows values, by SVG's own `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW, HEIGHT = 460.0, 330.0, 240.0
"""Two widths in units of text size: charts in two and in three columns."""
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 20.0, 34.0
MOST_POINTS = 240
HOVER_COLUMNS = 48

NBSP = "\N{NO-BREAK SPACE}"

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points sorted by x."""

    name: str
    points: Sequence[Point]
    tone: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a horizontal chart."""

    label: str
    value: float
    text: str
    tone: str
    error: float | None = None
    """Standard error, drawn as a whisker."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A map from values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def number(value: float) -> str:
    """A short form of a number: 1,234 · 12.3 k · 0.0123 · 3e-5."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{_three(value / (limit if unit != 'k' else 1e3))}{NBSP}{unit}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return _three(value) if size >= 1e-4 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def percent(share: float, digits: int = 3) -> str:
    """A share as per cent, with `digits` significant digits."""
    return f"{100 * share:.{digits}g}{NBSP}%"


def _three(value: float) -> str:
    text = f"{value:#.3g}"
    return (text.rstrip("0") if "." in text else text).rstrip(".")


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between `low` and `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`; only the powers when those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    digits = (1, 2, 5) if span < 2.5 else (1,)
    ticks = [m * 10.0**d for d in decades for m in digits if low * (1 - 1e-9) <= m * 10.0**d <= high * (1 + 1e-9)]
    ticks = ticks[:: math.ceil(len(ticks) / 7)] if len(ticks) > 7 else ticks
    return ticks if len(ticks) >= 3 else [t for t in linear_ticks(low, high, 4) if t > 0]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the means of equal runs of neighbours. Points that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    run = math.ceil(len(finite) / most) if finite else 1
    groups = [finite[i : i + run] for i in range(0, len(finite), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Sequence[Point], width: int) -> list[Point]:
    """Each value replaced by the mean of the `width` points around it (fewer at the ends)."""
    half, values = width // 2, [y for _, y in points]
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [(x, sum(w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def needs_log(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis shows more: all values positive, the largest over 20 times the smallest."""
    values = [y for s in series for _, y in thinned(s.points)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    width: float = WIDE,
    log: bool = False,
    zero: bool = False,
    smooth: bool = True,
    marks: Sequence[tuple[float, str]] = (),
    x_unit: str = "step",
    y_format: Format = number,
) -> str:
    """Lines over steps. `marks` name where something (a phase) begins; `zero` starts the axis at 0.

    With `smooth` a line of many points is drawn twice: faint as it is, strong as a moving average.
    Returns an empty text when there is nothing to draw.
    """
    lines = [(s, [p for p in thinned(s.points) if p[1] > 0 or not log]) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    low, high = _range([y for _, points in lines for _, y in points], log=log, zero=zero)
    x_axis = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, width - RIGHT)
    y_axis = Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    body = [_frame(x_axis, y_axis, [(t, y_format(t)) for t in ticks])]
    body += [_text("tick", x_axis(t), HEIGHT - 16, number(t)) for t in linear_ticks(x_axis.low, x_axis.high)]
    body.append(_text("unit", x_axis.end, HEIGHT - 2, x_unit, "end"))
    body += _marks(marks, x_axis)
    for s, points in lines:
        noisy = smooth and len(points) > 40
        shown = smoothed(points, max(len(points) // 20, 3)) if noisy else points
        if noisy:
            body.append(f'<path class="line raw {s.tone}" d="{_path(points, x_axis, y_axis)}"/>')
        classes = f"line {s.tone}" + (" dashed" if s.dashed else "")
        body.append(f'<path class="{classes}" d="{_path(shown, x_axis, y_axis)}"/>')
        if len(points) <= 24:
            body += [_dot(s.tone, x_axis(x), y_axis(y), 2.6) for x, y in points]
    body.append(_hover(lines, x_axis, x_unit, y_format))
    return _svg(body, width, HEIGHT, label)


def dot_chart(
    bars: Sequence[Bar], *, label: str, log: bool = False, zero: bool = False, guide: float | None = None
) -> str:
    """One row per bar: a dot on a common axis, with its value in words; `guide` is a vertical rule."""
    if not bars:
        return ""
    row, left, right = 30.0, 128.0, 64.0
    values = [b.value + sign * (b.error or 0) for b in bars for sign in (-1, 1)] + ([] if guide is None else [guide])
    low, high = _range(values, log=log, zero=zero)
    axis, height = Scale(low, high, left, WIDE - right, log), row * len(bars) + 26
    bottom = height - 22
    body = []
    for tick in log_ticks(low, high) if log else linear_ticks(low, high, 4):
        body += [_line("grid", axis(tick), 4, axis(tick), bottom), _text("tick", axis(tick), height - 7, number(tick))]
    if guide is not None:
        body.append(_line("mark", axis(guide), 4, axis(guide), bottom))
    for i, bar in enumerate(bars):
        y = 4 + row * (i + 0.5)
        body.append(_text("row", 0, y + 4.5, bar.label, "start"))
        body.append(_line(f"stem {bar.tone}", left, y, axis(bar.value), y))
        if bar.error:
            body.append(_line(f"whisker {bar.tone}", axis(bar.value - bar.error), y, axis(bar.value + bar.error), y))
        body.append(_dot(bar.tone, axis(bar.value), y, 5.5))
        body.append(_text("value", WIDE, y + 4.5, bar.text, "end"))
    return _svg(body, WIDE, height, label)


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Horizontal bars from 0, each with its value in words: shares of a whole, times, sizes."""
    if not bars:
        return ""
    row, left, right = 26.0, 92.0, 92.0
    axis = Scale(0, max(b.value for b in bars) or 1.0, left, WIDE - right)
    body = []
    for i, bar in enumerate(bars):
        y, width = row * i, max(axis(bar.value) - left, 1.0)
        body.append(_text("row", 0, y + 17.5, bar.label, "start"))
        body.append(_rect(f"bar {bar.tone}", left, y + 5, width, row - 10))
        body.append(_text("value", left + width + 7, y + 17.5, bar.text, "start"))
    return _svg(body, WIDE, row * len(bars), label)


def histogram(
    edges: Sequence[float],
    shares: Sequence[float],
    *,
    label: str,
    tone: str,
    width: float = NARROW,
    names: Sequence[str] = (),
    mean: float | None = None,
) -> str:
    """Shares of a whole by class. With `names` all columns are equally wide, else they follow the edges."""
    base, high = HEIGHT - BOTTOM, 1.04 * (max(shares, default=0.0) or 1.0)
    columns = [float(i) for i in range(len(shares) + 1)] if names else list(edges)
    axis, up = Scale(columns[0], columns[-1], LEFT, width - RIGHT), Scale(0, high, base, TOP)
    body = [_frame(axis, up, [(t, percent(t)) for t in linear_ticks(0, high, 4)])]
    for i, share in enumerate(shares):
        x, end = axis(columns[i]), axis(columns[i + 1])
        what = names[i] if names else f"{number(edges[i])} to {number(edges[i + 1])}"
        title = f"{what}: {percent(share)}"
        body.append(_rect(f"bar {tone}", x + 1, up(share), max(end - x - 2, 1.0), base - up(share), title))
        if names:
            body.append(_text("tick", (x + end) / 2, base + 15, names[i]))
    if not names:
        body += [_text("tick", axis(t), base + 15, number(t)) for t in linear_ticks(columns[0], columns[-1], 6)]
    if not names and mean is not None:
        body += _marks([(mean, f"mean {number(mean)}")], axis)
    return _svg(body, width, HEIGHT, label)


def _range(values: Sequence[float], *, log: bool, zero: bool) -> tuple[float, float]:
    """Ends of an axis with a little room around `values`; 0 is taken in when it is near."""
    low, high = min(values), max(values)
    if log:
        return low / 1.12, high * 1.12
    room = 0.07 * (high - low or abs(high) or 1.0)
    return (0.0 if zero or 0 <= low < room else low - room), high + room


def _frame(x_axis: Scale, y_axis: Scale, ticks: Sequence[tuple[float, str]]) -> str:
    """Horizontal grid with its labels, and the base line."""
    parts = []
    for value, text in ticks:
        y = y_axis(value)
        parts += [_line("grid", LEFT, y, x_axis.end, y), _text("tick", LEFT - 7, y + 4, text, "end")]
    return "".join([*parts, _line("axis", LEFT, HEIGHT - BOTTOM, x_axis.end, HEIGHT - BOTTOM)])


def _marks(marks: Sequence[tuple[float, str]], x_axis: Scale) -> list[str]:
    """Vertical rules with a text; where something began before the axis does, only its name at the left end."""
    inside = [(x_axis(x), text) for x, text in marks if x_axis.low < x <= x_axis.high]
    before = [text for x, text in marks if x <= x_axis.low]
    parts = [_text("mark", x_axis.start, TOP - 5, before[-1], "start")] if before else []
    for x, text in inside:
        parts.append(_line("mark", x, TOP - 12, x, HEIGHT - BOTTOM))
        late = x > x_axis.end - 60
        parts.append(_text("mark", x - 4 if late else x + 4, TOP - 5, text, "end" if late else "start"))
    return parts


def _path(points: Sequence[Point], x_axis: Scale, y_axis: Scale) -> str:
    return "M" + "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in points)


def _hover(lines: Sequence[tuple[Series, Sequence[Point]]], x_axis: Scale, x_unit: str, y_format: Format) -> str:
    """Invisible columns that light up under the pointer and name the values there."""
    count = min(HOVER_COLUMNS, max(len(points) for _, points in lines))
    width = (x_axis.end - x_axis.start) / count
    columns = []
    for i in range(count):
        x = x_axis.low + (i + 0.5) / count * (x_axis.high - x_axis.low)
        near = [(s, min(points, key=lambda p: abs(p[0] - x))) for s, points in lines]
        title = [f"{x_unit} {number(round(near[0][1][0]))}", *(f"{s.name}: {y_format(y)}" for s, (_, y) in near)]
        start = x_axis.start + i * width
        columns.append(_rect("hover", start, TOP, width, HEIGHT - TOP - BOTTOM, "\n".join(title)))
    return "".join(columns)


def _line(classes: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(classes: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(classes: str, x: float, y: float, width: float, height: float, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{classes}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{inner}</rect>'


def _dot(tone: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="dot {tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _svg(body: Sequence[str], width: float, height: float, label: str) -> str:
    inner = "".join(body)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">{inner}</svg>'
