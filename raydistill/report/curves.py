"""The training curves of a run: metrics.jsonl, with the baseline's lines over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from raydistill.evaluate.convergence import converged
from raydistill.report.charts import NARROW, WIDE, Format, Point, Series, line_chart, needs_log, number, percent
from raydistill.report.words import PARTS, Metric, as_number, metric_of, said
from raydistill.signals import JsonValue
from raydistill.storage import Store

JsonLine = Mapping[str, JsonValue]
DISTILLED, BASELINE = "distilled", "without a teacher"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its heading; `log` is the same chart on a logarithmic axis, where that makes sense."""

    title: str
    note: str
    chart: str
    log: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    """(name, tone) of each line, where there are several."""


@dataclass(frozen=True, slots=True)
class Log:
    """The lines of one metrics.jsonl, with steps counted over all phases."""

    lines: tuple[tuple[float, JsonLine], ...]
    phases: tuple[tuple[float, str], ...]
    """First step and name of each phase."""

    def points(self, value: Callable[[JsonLine], JsonValue]) -> list[Point]:
        """(step, value) of the lines that have the value."""
        found = ((x, as_number(value(line))) for x, line in self.lines)
        return [(x, y) for x, y in found if y is not None]

    def keys(self, section: str) -> list[str]:
        """Names inside a mapping of the lines (`parts`, `lr`, `evaluation`), in order of appearance."""
        names = (name for _, line in self.lines for name in _section(line, section))
        return list(dict.fromkeys(names))


def read_log(store: Store, name: str) -> Log:
    """The log `name`, or an empty one."""
    text = store.read_text(name) if store.exists(name) else ""
    return _arranged([json.loads(line) for line in text.splitlines() if line.strip()])


def _arranged(lines: Iterable[JsonLine]) -> Log:
    """Lay the phases end to end: each one counts its steps from 0."""
    placed: list[tuple[float, JsonLine]] = []
    phases: list[tuple[float, str]] = []
    offset = end = 0.0
    for line in lines:
        phase, step = str(line.get("phase", "")), as_number(line.get("step")) or 0.0
        if not phases or phases[-1][1] != phase:
            offset = end
            phases.append((offset, phase))
        end = max(end, offset + step)
        placed.append((offset + step, line))
    return Log(tuple(placed), tuple(phases))


def _section(line: JsonLine, name: str) -> Mapping[str, JsonValue]:
    value = line.get(name)
    return value if isinstance(value, Mapping) else {}


def _of(section: str, name: str) -> Callable[[JsonLine], JsonValue]:
    return lambda line: _section(line, section).get(name)


def loss_figures(log: Log, baseline: Log, parts: Mapping[str, Metric] = PARTS) -> list[Figure]:
    """The optimised loss, then each part; the baseline is drawn where it has the same part.

    `parts` says what they are called.
    """
    shown = [log.points(_loss)]
    names = []
    for name in log.keys("parts"):  # a part alone is the whole loss, and the only teacher is all teachers
        if (points := log.points(_of("parts", name))) not in shown:
            shown.append(points)
            names.append(name)
    width = NARROW if in_thirds(1 + len(names)) else WIDE
    figures = [_pair("Loss", "what is optimised", log, baseline, _loss, overlay=False, width=width)]
    for name in names:
        metric = _part(name, parts)
        figures.append(_pair(metric.title, metric.meaning, log, baseline, _of("parts", name), metric.unit, width=width))
    return [f for f in figures if f.chart]


def _part(name: str, parts: Mapping[str, Metric]) -> Metric:
    first, _, teacher = name.partition("/")
    known = parts.get(first, Metric(first, _words(first), "part of the loss"))
    return replace(known, title=f"{known.title} · {teacher}") if teacher else known


def in_thirds(count: int) -> bool:
    """Whether `count` charts stand better in three columns than in two."""
    return count == 3 or count > 4


def _loss(line: JsonLine) -> JsonValue:
    return line.get("loss")


def held_out_figures(log: Log, baseline: Log) -> list[Figure]:
    """The evaluations during training."""
    figures = []
    for name in log.keys("evaluation"):
        if name == "loss":  # perplexity says it
            continue
        metric = metric_of(name) or Metric(name, _words(name), "on held-out rows")
        value = _of("evaluation", name)
        figures.append(_pair(metric.title, metric.meaning, log, baseline, value, metric.unit, width=NARROW))
    return [f for f in figures if f.chart]


def convergence_words(log: Log, name: str = "mse_to_teacher") -> list[str]:
    """Of each phase with enough evaluations, whether the error `name` on held-out rows has stopped falling."""
    sentences = []
    for _, phase in log.phases:
        of_phase = [line for _, line in log.lines if line.get("phase") == phase]
        points = [(line.get("step"), as_number(_of("evaluation", name)(line))) for line in of_phase]
        known = [(int(str(step)), value) for step, value in points if value is not None]
        if not known:
            continue
        found = converged([step for step, _ in known], [value for _, value in known])
        gain, step = as_number(found["gain"]), as_number(found["step"])
        if gain is None:
            continue
        title = (metric_of(name) or Metric(name, _words(name), "")).title
        over = f"over the last {found['patience']} evaluations"
        if step is None:
            said_of = f"still falls, by {percent(gain)} {over}: it has not converged"
        else:
            least = percent(as_number(found["least_gain"]) or 0.0)
            said_of = f"has converged at step {number(step)}: from there on it fell by less than {least} {over}"
        sentences.append(f"{phase}: {title[:1].lower()}{title[1:]} {said_of}.")
    return sentences


def machine_figures(log: Log) -> list[Figure]:
    """Learning rate, gradient norm, speed and waiting."""
    groups = log.keys("lr")
    rates = [Series(g, log.points(_of("lr", g)), f"c{i % 6}") for i, g in enumerate(groups)]
    has_tokens = bool(log.points(lambda line: line.get("tokens_per_second")))
    speed = "tokens_per_second" if has_tokens else "samples_per_second"
    figures = [
        _single("Learning rate", "by parameter group" if len(groups) > 1 else "", rates, log, smooth=False),
        _single("Gradient norm", "before clipping", [_plain(log, lambda line: line.get("grad_norm"))], log),
        _single("Speed", speed.replace("_", " "), [_plain(log, lambda line: line.get(speed))], log),
        _single(
            "Waiting for data",
            "share of a step's time",
            [Series(DISTILLED, _waiting(log), "student")],
            log,
            y_format=percent,
        ),
    ]
    return [f for f in figures if f.chart]


def _waiting(log: Log) -> list[Point]:
    """Share of the time between two logged lines that was spent waiting; their `seconds` count up in each phase."""
    points, before = [], ("", 0.0)
    for x, line in log.lines:
        waited, seconds = as_number(line.get("data_wait_seconds")), as_number(line.get("seconds"))
        if waited is None or seconds is None:
            continue
        phase = str(line.get("phase"))
        spent = seconds - (before[1] if before[0] == phase else 0.0)
        before = phase, seconds
        if spent > 0:
            points.append((x, waited / spent))
    return points


def _plain(log: Log, value: Callable[[JsonLine], JsonValue]) -> Series:
    return Series(DISTILLED, log.points(value), "student")


def _single(
    title: str, note: str, series: Sequence[Series], log: Log, *, smooth: bool = True, y_format: Format = number
) -> Figure:
    chart = line_chart(series, label=title, zero=True, smooth=smooth, marks=_marks(log), y_format=y_format)
    return Figure(title, note, chart, legend=_legend(series))


def _pair(
    title: str,
    note: str,
    log: Log,
    baseline: Log,
    value: Callable[[JsonLine], JsonValue],
    unit: str = "",
    *,
    overlay: bool = True,
    width: float = WIDE,
) -> Figure:
    """The distilled student's curve with the baseline's, on both kinds of axis (a share only on a linear one)."""
    series = [Series(DISTILLED, log.points(value), "student")]
    if overlay and (points := baseline.points(value)):
        series.append(Series(BASELINE, points, "student_ce", dashed=True))
    chart, log_chart = (
        line_chart(series, label=title, width=width, log=is_log, marks=_marks(log), y_format=partial(said, unit=unit))
        for is_log in (False, True)
    )
    if unit == "share" or any(y <= 0 for s in series for _, y in s.points):
        log_chart = ""
    elif needs_log(series):  # the logarithmic chart is the better first view
        chart, log_chart = log_chart, chart
        note += ", logarithmic axis"
    return Figure(title, note, chart, log_chart, _legend(series))


def _legend(series: Sequence[Series]) -> tuple[tuple[str, str], ...]:
    return tuple((s.name, s.tone) for s in series) if len(series) > 1 else ()


def _marks(log: Log) -> list[tuple[float, str]]:
    return list(log.phases) if len(log.phases) > 1 else []


def _words(name: str) -> str:
    """`mse` as `MSE`, `feature_loss` as `Feature loss`."""
    words = name.replace("_", " ")
    return words.upper() if len(words) <= 3 else words[:1].upper() + words[1:]
