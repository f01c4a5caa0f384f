"""The sections of the report, each from one or two files of the run folder; a section without its files is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from raydistill.config.accelerators import without_price
from raydistill.report.charts import NBSP, Bar, bar_chart, dot_chart, number, percent
from raydistill.report.curves import Figure
from raydistill.report.images import feature_metrics, flattened
from raydistill.report.words import (
    IN_TABLE_ELSEWHERE,
    METRICS,
    ROLE_NAMES,
    Metric,
    as_number,
    duration,
    metric_of,
    role_names,
    said,
    spoken,
)
from raydistill.signals import JsonValue

CLOSENESS = ("kl_to_teacher", "mse_to_noise")
"""Metrics of which one is drawn beside the quality."""
Json = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the comparison table."""

    text: str
    role: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A metric, for every model that was measured."""

    title: str
    meaning: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and its continuations: (who, tone, text)."""

    prompt: str
    reference: str | None
    outputs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """Scores by benchmark and model."""

    figures: tuple[Figure, ...]
    roles: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Stages:
    """What each stage took."""

    chart: str
    total: str
    gpu_total: str | None
    price_total: str | None
    unpriced: str
    """Words for what the price leaves out."""
    rows: tuple[tuple[str, str, str, str], ...]
    """Stage, time, time of GPUs and money; none where no stage asked for a GPU."""


def section(value: JsonValue | Json | None) -> Json:
    """`value` as a mapping, an empty one where it is none."""
    return value if isinstance(value, Mapping) else {}


def measured(metrics: Json) -> list[str]:
    """Roles that metrics.json has a line for, in the order of columns."""
    return [role for role in ROLE_NAMES if section(metrics.get(role))]


def quality_figure(metrics: Json) -> Figure | None:
    """Where every model stands on the metric that ranks them."""
    comparison = section(metrics.get("comparison"))
    name = str(comparison.get("quality_metric", ""))
    names = role_names(metrics)
    values = {role: as_number(section(metrics.get(role)).get(name)) for role in names}
    bars = [Bar(names[r], v, number(v), r) for r, v in values.items() if v is not None]
    if len(bars) < 2:
        return None
    log = all(b.value > 0 for b in bars) and max(b.value for b in bars) > 8 * min(b.value for b in bars)
    title = title_of(name)
    note = "lower is better" if comparison.get("lower_is_better") else "higher is better"
    if name == "mse_to_teacher":
        note += "; the teachers' own is how far they are apart"
    note = f"on held-out rows, {note}" + (", logarithmic axis" if log else "")
    return Figure(title, note, dot_chart(bars, label=title, log=log))


def closeness_figure(metrics: Json) -> Figure | None:
    """How far each student is from the teacher."""
    names = role_names(metrics)
    ranked = section(metrics.get("comparison")).get("quality_metric")
    for metric in METRICS:
        if metric.name not in CLOSENESS or metric.name == ranked:
            continue
        values = {r: as_number(section(metrics.get(r)).get(metric.name)) for r in names if r != "teacher"}
        bars = [Bar(names[r], v, said(v, metric.unit), r) for r, v in values.items() if v is not None]
        if len(bars) > 1:
            log = min(b.value for b in bars) > 0 and max(b.value for b in bars) > 20 * min(b.value for b in bars)
            note = metric.meaning + (", logarithmic axis" if log else "")
            return Figure(metric.title, note, dot_chart(bars, label=metric.title, log=log, zero=not log))
    return None


def title_of(name: str) -> str:
    """How the page calls a metric."""
    metric = metric_of(name)
    return metric.title if metric else name.replace("_", " ").capitalize()


def comparison_rows(metrics: Json) -> list[Row]:
    """The comparison table: known metrics first, then whatever else was measured."""
    return _rows({role: section(metrics.get(role)) for role in measured(metrics)}, metrics)


def teacher_rows(metrics: Json) -> tuple[list[str], list[Row]]:
    """Names of several teachers, and the same table of them."""
    lines = {name: section(line) for name, line in section(metrics.get("teachers")).items()}
    return list(lines), _rows(lines, metrics, tone="teacher") if lines else []


def _rows(lines: Mapping[str, Json], metrics: Json, *, tone: str | None = None) -> list[Row]:
    """A row for each metric that some model has; the best student is marked, a teacher never."""
    flat = {who: flattened(line) for who, line in lines.items()}
    features = feature_metrics([*lines.values()])
    names = dict.fromkeys(
        name for line in lines.values() for name in line if name.startswith(("mse_to/", "mse_after/"))
    )
    single = [metric for name in names if (metric := metric_of(name))]
    known = {metric.name for metric in (*METRICS, *single)}
    extra = dict.fromkeys(name for line in lines.values() for name in line if name not in known | IN_TABLE_ELSEWHERE)
    place = next(i for i, metric in enumerate(METRICS) if metric.name == "clip_score")
    others = [Metric(name, name.replace("_", " ").capitalize(), "") for name in extra]
    rows = []
    for metric in (*METRICS[:place], *single, *features, *METRICS[place:], *others):
        values = {who: as_number(line.get(metric.name)) for who, line in flat.items()}
        if all(v is None for v in values.values()):
            continue
        best = None if tone else _best({r: v for r, v in values.items() if r != "teacher"}, metric.better)
        cells = tuple(Cell(said(v, metric.unit), tone or who, who == best) for who, v in values.items())
        rows.append(Row(metric.title, metric.meaning, cells))
    return rows


def _best(values: Mapping[str, float | None], better: str) -> str | None:
    """The student with the best value, where there are several."""
    found = {role: v for role, v in values.items() if v is not None}
    if not better or len(found) < 2:
        return None
    return (min if better == "low" else max)(found, key=found.__getitem__)


def exported_role(config: Json, metrics: Json) -> str:
    """The student that the run leaves to others: that with averaged weights where these are exported."""
    averaged = section(config.get("export")).get("weights") == "ema" and "student_ema" in metrics
    return "student_ema" if averaged else "student"


def tiles(metrics: Json, exported: str = "student") -> list[tuple[str, str, str]]:
    """(figure, what it is, more words) for the head of the page, of the student that is `exported`."""
    comparison, student = section(metrics.get("comparison")), section(metrics.get(exported))
    found = []
    name = str(comparison.get("quality_metric", ""))
    if (quality := as_number(comparison.get("student_quality"))) is not None:
        teacher = as_number(comparison.get("teacher_quality"))
        goal = "at best" if name == "mse_to_teacher" else "teacher"
        found.append((number(quality), spoken(name), f"{goal} {number(teacher)}" if teacher else ""))
    if (closed := as_number(comparison.get("gap_closed"))) is not None:
        baseline = as_number(comparison.get("baseline_gap_closed"))
        more = f"without a teacher {percent(baseline)}" if baseline is not None else ""
        found.append((percent(closed), "of the gap closed", more))
    if count := as_number(student.get("parameters")):
        teacher = as_number(section(metrics.get("teacher")).get("parameters"))
        found.append((number(count), "parameters", f"teacher {number(teacher)}" if teacher else ""))
    if ratio := as_number(comparison.get("speed_ratio")):
        speeds = {"tokens/s": "tokens_per_second", "images/s": "images_per_second", "steps/s": "samples_per_second"}
        known = [f"{number(v)} {unit}" for unit, key in speeds.items() if (v := as_number(student.get(key)))]
        found.append((f"{number(ratio)}×", "the teacher's speed", known[0] if known else ""))
    if (agreement := as_number(student.get("top1_agreement"))) is not None:
        found.append((percent(agreement), "top-1 agreement", "with the teacher"))
    return found


def held_out_words(metrics: Json) -> str:
    """What was measured on, in words."""
    found = section(metrics.get("held_out"))
    if "draws" in found:
        return f"{said(found.get('rows'))} held-out samples with {said(found['draws'])} draws of noise"
    if "targets" in found:
        rows, targets = (f"{as_number(found.get(key)) or 0:,.0f}" for key in ("rows", "targets"))
        return f"{rows} held-out rows with {targets} predicted tokens"
    return ""


def benchmarks(metrics: Json) -> Benchmarks | None:
    """Scores by benchmark, student beside teacher; then those of lm-evaluation-harness."""
    roles = [r for r in measured(metrics) if section(metrics.get(r)).keys() & {"benchmarks", "lm_eval"}]
    results = {r: section(section(metrics.get(r)).get("benchmarks")) for r in roles}
    figures, rows = [], []
    for name in dict.fromkeys(name for r in roles for name in results[r]):
        scores = {r: section(results[r].get(name)) for r in roles}
        figures.append(_accuracy_figure(name, scores))
        for key, title in (("accuracy", "accuracy"), ("accuracy_norm", "per character")):
            values = {r: as_number(s.get(key)) for r, s in scores.items()}
            rows.append(_score_row(name, title, values, {r: _with_error(s, key) for r, s in scores.items()}))
    rows += _harness_rows(roles, metrics)
    return Benchmarks(tuple(figures), tuple(roles), tuple(rows)) if rows else None


def _accuracy_figure(name: str, scores: Mapping[str, Json]) -> Figure:
    bars = [
        Bar(ROLE_NAMES[r], 100 * value, f"{100 * value:.1f}{NBSP}%", r, _percent(s.get("accuracy_norm_stderr")))
        for r, s in scores.items()
        if (value := as_number(s.get("accuracy_norm"))) is not None
    ]
    chance = next((_percent(s.get("chance")) for s in scores.values()), None)
    questions = next((said(s.get("num_questions")) for s in scores.values()), "–")
    return Figure(name, f"{questions} questions; dashed: chance", dot_chart(bars, label=name, guide=chance))


def _harness_rows(roles: Sequence[str], metrics: Json) -> list[Row]:
    found = {r: section(section(metrics.get(r)).get("lm_eval")) for r in roles}
    rows = []
    for task, key in dict.fromkeys((t, k) for r in roles for t in found[r] for k in section(found[r][t])):
        name = key.removesuffix(",none")
        if "stderr" in name or name == "sample_len":
            continue
        values = {r: as_number(section(found[r].get(task)).get(key)) for r in roles}
        rows.append(_score_row(task, name, values, {r: said(v) for r, v in values.items()}))
    return rows


def _score_row(name: str, title: str, values: Mapping[str, float | None], texts: Mapping[str, str]) -> Row:
    best = _best({r: v for r, v in values.items() if r != "teacher"}, "high")
    return Row(name, title, tuple(Cell(texts[r], r, r == best) for r in values))


def _percent(value: JsonValue) -> float | None:
    found = as_number(value)
    return None if found is None else 100 * found


def _with_error(score: Json, key: str) -> str:
    value, error = _percent(score.get(key)), _percent(score.get(f"{key}_stderr"))
    if value is None:
        return "–"
    return f"{value:.1f}{NBSP}%" if error is None else f"{value:.1f} ± {error:.1f}{NBSP}%"


def samples(content: Json) -> list[Sample]:
    """The continuations of samples.json."""
    found = []
    rows = content.get("samples")
    for row in map(section, rows if isinstance(rows, list) else []):
        outputs = section(row.get("outputs"))
        texts = tuple((ROLE_NAMES[r], r, str(outputs[r])) for r in ROLE_NAMES if r in outputs)
        reference = row.get("reference")
        found.append(Sample(str(row.get("prompt", "")), None if reference is None else str(reference), texts))
    return found


def stages(found: Json) -> Stages | None:
    """What each stage took, from its `seconds`, `gpu_seconds`, `gpu_at_most`, `price` and `unpriced`."""
    seconds, gpu, prices = (
        {name: as_number(section(facts).get(key)) for name, facts in found.items()}
        for key in ("seconds", "gpu_seconds", "price")
    )
    known = {name: value for name, value in seconds.items() if value is not None}
    if not known:
        return None
    bars = [Bar(name, value, duration(value), "c0") for name, value in known.items()]
    gpu_total = sum(v for v in gpu.values() if v)
    price_total = sum(v for v in prices.values() if v)
    most = {name: "at most " if section(facts).get("gpu_at_most") else "" for name, facts in found.items()}
    most_total = max(most.values())
    left_out = sorted({str(name) for facts in found.values() for name in _list(section(facts).get("unpriced"))})
    rows = [(name, duration(known[name]), *_cost(gpu[name], prices[name], most[name])) for name in known]
    rows.append(("all", duration(sum(known.values())), *_cost(gpu_total, price_total or None, most_total)))
    return Stages(
        bar_chart(bars, label="Time by stage"),
        duration(sum(known.values())),
        f"{most_total}{duration(gpu_total)}" if gpu_total else None,
        f"{most_total}{price_total:,.2f}" if price_total else None,
        without_price(left_out),
        tuple(rows) if gpu_total else (),
    )


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _cost(gpu_seconds: float | None, price: float | None, most: str) -> tuple[str, str]:
    """Time of GPUs and money in words; `most` says where they are an upper bound."""
    money = "–" if price is None else f"{most}{price:,.2f}"
    return (f"{most}{duration(gpu_seconds)}" if gpu_seconds else "–"), money


def resources(config: Json) -> list[tuple[str, str]]:
    """What the run asked of the machine or cluster, in words."""
    asked = section(config.get("resources"))
    teacher, train = section(asked.get("teacher")), section(asked.get("train"))
    facts = []
    actors = teacher.get("actors")
    if isinstance(actors, list) and len(actors) == 2:
        count = str(actors[0]) if actors[0] == actors[1] else f"{actors[0]} to {actors[1]}"
        facts.append(("Teacher actors", f"{count}, each {_machine(teacher)}"))
    workers = train.get("workers")
    if workers is not None:
        count = f"{workers[0]} to {workers[1]}" if isinstance(workers, list) else str(workers)
        where = "in the driver" if workers == 0 else f"{count}, each {_machine(train)}"
        facts.append(("Training workers", where))
    return facts


def _machine(asked: Json) -> str:
    cpus, gpus = as_number(asked.get("cpus")) or 0, as_number(asked.get("gpus")) or 0
    parts = [f"{number(cpus)} CPU{'s' if cpus != 1 else ''}"]
    if gpus:
        parts.append(f"{number(gpus)} {asked.get('accelerator') or 'GPU'}")
    return " and ".join(parts)


def settings(config: Json) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config))) if config else ""


def players(config: Json) -> tuple[Sequence[str], str]:
    """Sources of the teachers and of the student."""
    teachers = config.get("teachers")
    names = [_source(section(t)) for t in teachers] if isinstance(teachers, list) else []
    return names, _source(section(config.get("student")))


def _source(part: Json) -> str:
    """The last part of a model's address, without version and hash."""
    source = str(section(part.get("model")).get("source", ""))
    parts = source.split("#")[0].rstrip("/").split("/")
    if parts[-1] == "export" and len(parts) > 1:  # of another run, which is better known by its own folder
        parts.pop()
    return parts[-1] or source
