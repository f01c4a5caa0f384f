"""sweep.html: one self-contained page about a sweep, made from sweep.json alone.

Like report.html it needs no network and no script.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from omegaconf import OmegaConf

from raydistill.report.charts import WIDE, Bar, Series, bar_chart, line_chart, number, percent
from raydistill.report.curves import Figure
from raydistill.report.page import title_of
from raydistill.report.sweep_charts import (
    MOST_NAMES,
    Spot,
    finite,
    front_chart,
    heat_chart,
    is_number,
    parallel_chart,
    progress_chart,
    said_value,
    spots_chart,
    triangle_chart,
)
from raydistill.report.words import METRICS, duration, said
from raydistill.signals import JsonValue

Json = Mapping[str, Any]
STOPPED, FINISHED = "student_init", "c2"
"""Tones of trials; the best has that of the distilled student."""
FEW = 20
"""Trials below which the page warns of reading much into the importance of a key."""
MOST_CURVES = 60
SURE = 0.05
"""Share of random orders below which an importance is not put down to chance."""


def render_sweep(found: Json) -> str:
    """The page as text; `found` is the content of sweep.json. The same content gives the same text."""
    page = _Page(found)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = resources.files(__package__)
    template = environment.from_string(folder.joinpath("sweep.html.j2").read_text(encoding="utf-8"))
    style = [folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css")]
    return template.render(
        style="\n".join(style),
        name=found["name"],
        searcher=found["searcher"],
        scheduler=found["scheduler"],
        lede=page.lede(),
        tiles=page.tiles(),
        answer=[f for f in (page.progress(), *page.heats(), *page.triangles(), page.front()) if f],
        slices=page.slices(),
        parallel=page.parallel(),
        importance=page.importance(),
        warning=page.warning(),
        curves=page.curves(),
        head=[*(page.names[key] for key in found["keys"]), *(title_of(m["name"]) for m in found["metrics"])],
        rows=page.rows(),
        failures=[(t["id"], t["error"]) for t in found["trials"] if t["status"] == "failed"],
        accounting=page.accounting(),
        costs=page.costs(),
        space=OmegaConf.to_yaml(OmegaConf.create(found["space"])),
        best=found["best"],
    )


def lowered(title: str) -> str:
    """A title inside a sentence; an acronym at its beginning stays."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


class _Page:
    def __init__(self, found: Json):
        self.found = found
        self.trials: list[Json] = list(found["trials"])
        self.metrics: list[Json] = list(found["metrics"])
        self.keys: list[str] = list(found["keys"])
        self.metric: str = self.metrics[0]["name"]
        self.lower: bool = self.metrics[0]["lower_is_better"]
        self.format = _format(self.metric)
        self.names: dict[str, str] = dict(found["labels"])

    @property
    def best(self) -> Json | None:
        return next((t for t in self.trials if t["id"] == self.found["best"]), None)

    def score(self, trial: Json, name: str | None = None) -> float | None:
        return finite(trial["metrics"].get(name or self.metric))

    def shown(self) -> list[tuple[Json, float]]:
        """Trials that can be drawn, with the first metric."""
        pairs = [(t, self.score(t)) for t in self.trials if t["status"] in ("done", "stopped")]
        return [(t, score) for t, score in pairs if score is not None]

    def tone(self, trial: Json) -> str:
        if trial["id"] == self.found["best"]:
            return "student"
        return STOPPED if trial["status"] == "stopped" else FINISHED

    def title(self, trial: Json) -> str:
        values = "\n".join(f"{self.names.get(k, k)}: {said_value(v)}" for k, v in trial["values"].items())
        score = self.score(trial)
        told = "" if score is None else f"\n{title_of(self.metric)}: {self.format(score)}"
        return f"trial {trial['id']}{' (stopped early)' if trial['status'] == 'stopped' else ''}\n{values}{told}"

    def lede(self) -> list[str]:
        done = [t for t in self.trials if t["status"] == "done"]
        if self.best is None:
            return ["No trial has been trained to its end yet."]
        values = ", ".join(
            f"{self.names[k]} {said_value(v)}" for k, v in self.best["values"].items() if k in self.names
        )
        scores = sorted(score for t in done if (score := self.score(t)) is not None)
        score = self.score(self.best)
        assert score is not None, "the best trial has the metric that made it the best"
        worst = scores[-1] if self.lower else scores[0]
        sentence = f"Of {len(done)} trials trained to the end, trial {self.best['id']} is the best: {values}."
        second = f"Its {lowered(title_of(self.metric))} is {self.format(score)}"
        if len(scores) > 1:
            second += f"; the next best reached {self.format(scores[1] if self.lower else scores[-2])}"
        return [sentence, second + (f", the worst {self.format(worst)}." if len(scores) > 2 else ".")]

    def tiles(self) -> list[tuple[str, str, str]]:
        tiles = []
        if self.best is not None:
            for metric in self.metrics:
                value = self.score(self.best, metric["name"])
                if value is not None:
                    tiles.append((_format(metric["name"])(value), lowered(title_of(metric["name"])), "best trial"))
        count = {s: sum(t["status"] == s for t in self.trials) for s in ("done", "stopped", "failed", "open")}
        more = ", ".join(f"{n} {s}" for s, n in count.items() if n and s != "done")
        tiles.append((str(len(self.trials)), "trials", more or "all trained to the end"))
        accounting = self.found["accounting"]
        if (after := accounting.get("teacher_shards_after_first_trial")) is not None:
            tiles.append((str(after), "teacher calls", f"after the cache of {accounting['teacher_shards']} shards"))
        if saved := (accounting.get("flops") or {}).get("saved"):
            ratio, what = (saved, "less computing") if saved >= 1 else (1 / saved, "more computing")
            tiles.append((f"{number(ratio)}×", what, "than with teachers beside every student"))
        return tiles

    def progress(self) -> Figure | None:
        spots = [Spot(int(t["id"]), y, self.tone(t), self.title(t)) for t, y in self.shown()]
        title = title_of(self.metric)
        chart = progress_chart(spots, lower_is_better=self.lower, label=title, y_format=self.format)
        note = f"{'lower' if self.lower else 'higher'} is better; the line is the best so far"
        return Figure(title, note, chart, legend=self._legend()) if chart else None

    def _legend(self) -> tuple[tuple[str, str], ...]:
        tones = {self.tone(t) for t, _ in self.shown()}
        names = {"student": "best", FINISHED: "trained to the end", STOPPED: "stopped early"}
        return tuple((name, tone) for tone, name in names.items() if tone in tones)

    def heats(self) -> list[Figure]:
        """A table per metric where just two keys are varied, each with few values."""
        varied = [key for key in self.keys if len(self._values(key)) > 1]
        done = [t for t in self.trials if t["status"] == "done"]
        if len(varied) != 2 or any(len(self._values(key)) > MOST_NAMES for key in varied) or len(done) < 4:
            return []
        down, across = varied
        figures = []
        for metric in self.metrics:
            cells = {
                (said_value(t["values"][down]), said_value(t["values"][across])): score
                for t in done
                if down in t["values"] and across in t["values"]
                if (score := self.score(t, metric["name"])) is not None
            }
            if len(set(cells.values())) < 2:
                continue
            title = title_of(metric["name"])
            chart = heat_chart(
                cells, self._values(down), self._values(across), lower_is_better=metric["lower_is_better"], label=title,
                row_name=self.names[down], column_name=self.names[across], y_format=_format(metric["name"]),
            )  # fmt: skip
            figures.append(Figure(f"{title} by {self.names[down]} and {self.names[across]}", "darker is better", chart))
        return figures

    def triangles(self) -> list[Figure]:
        """Shares of three keys as places in a triangle, a figure per such dimension of the space."""
        figures = []
        for name, dimension in self.found["space"].items():
            keys = dimension.get("keys", [])
            if len(keys) != 3:
                continue
            spots = [
                ([float(t["values"][key]) for key in keys], y, self.title(t))
                for t, y in self.shown()
                if t["status"] == "done" and keys[0] in t["values"]
            ]
            corners = [self.names[key] for key in keys]
            title = f"{title_of(self.metric)} by {name.replace('_', ' ')}"
            chart = triangle_chart(spots, corners, lower_is_better=self.lower, label=title, y_format=self.format)
            if chart:
                figures.append(Figure(title, "a corner is that teacher alone; darker is better", chart))
        return figures

    def _values(self, key: str) -> list[str]:
        """The values of a key that trials have, in words, numbers by size."""
        values: list[JsonValue] = [t["values"][key] for t in self.trials if key in t["values"]]
        if all(map(is_number, values)):
            values = sorted(values, key=lambda v: float(str(v)))
        return list(dict.fromkeys(said_value(v) for v in values))

    def front(self) -> Figure | None:
        """Quality over the second metric, with the best compromises."""
        if len(self.metrics) < 2:
            return None
        other = self.metrics[1]["name"]
        chosen = set(self.found["compromises"])
        spots, front = [], []
        for trial, y in self.shown():
            x = self.score(trial, other)
            if x is None:
                continue
            spots.append(Spot(x, y, "student" if trial["id"] in chosen else self.tone(trial), self.title(trial)))
            front += [(x, y)] if trial["id"] in chosen else []
        if len({spot.x for spot in spots}) < 2:
            return None
        title = f"{title_of(self.metric)} against {lowered(title_of(other))}"
        chart = front_chart(spots, sorted(front), label=title, x_unit=lowered(title_of(other)), y_format=self.format)
        return Figure(title, "line: the best compromises, which no trial beats in both", chart) if chart else None

    def slices(self) -> list[Figure]:
        """The first metric over each key."""
        figures = []
        for key in self.keys:
            spots = [
                Spot(t["values"][key], y, self.tone(t), self.title(t)) for t, y in self.shown() if key in t["values"]
            ]
            if len({said_value(s.x) for s in spots}) > 1:
                name = self.names[key]
                chart = spots_chart(spots, label=name, x_unit=name, y_format=self.format)
                figures.append(Figure(name, key if name != key else "", chart))
        return figures

    def parallel(self) -> str:
        keys = [key for key in self.keys if len(self._values(key)) > 1]
        if len(keys) < 3:
            return ""
        trials = [([t["values"].get(k) for k in keys], y, self.tone(t), self.title(t)) for t, y in self.shown()]
        return parallel_chart(
            trials, [self.names[k] for k in keys], metric=title_of(self.metric), label="All keys", y_format=self.format
        )

    def importance(self) -> Figure | None:
        bars = []
        for item in self.found["importance"]:
            sure = item["chance"] < SURE
            text = percent(item["share"], 2) + ("" if sure else " (may be chance)")
            bars.append(
                Bar(self.names.get(item["key"], item["key"]), item["share"], text, FINISHED if sure else STOPPED)
            )
        if not bars:
            return None
        note = f"share of the differences in {lowered(title_of(self.metric))} that goes with each key alone"
        return Figure("Which keys mattered", note, bar_chart(bars, label="Importance of keys"))

    def warning(self) -> str:
        done = sum(t["status"] == "done" for t in self.trials)
        if not self.found["importance"]:
            return f"{done} finished trials are too few to say how much a key matters by itself."
        hint = " With so few trials this is a hint, not a finding." if done < FEW else ""
        return (
            f"Computed from {done} finished trials, by ranks, less what chance gives; keys that matter only together "
            f"do not show here.{hint}"
        )

    def curves(self) -> Figure | None:
        """Each trial's evaluations."""
        chosen = self.shown()[:MOST_CURVES]
        series = []
        for trial, _ in sorted(chosen, key=lambda pair: pair[0]["id"] == self.found["best"]):
            points = [(float(e["step"]), y) for e in trial["curve"] if (y := finite(e.get(self.metric))) is not None]
            if len(points) > 1:
                series.append(Series(trial["id"], points, self.tone(trial)))
        chart = line_chart(
            series, label="Curves", width=WIDE * 2, smooth=False, y_format=self.format,
            log=bool(series) and min(y for s in series for _, y in s.points) > 0,
        )  # fmt: skip
        return (
            Figure(title_of(self.metric), "at each evaluation, logarithmic axis", chart, legend=self._legend())
            if chart
            else None
        )

    def rows(self) -> list[dict[str, Any]]:
        """The table of trials, the best first; those without a value last."""
        worst = float("inf")

        def place(trial: Json) -> tuple[int, float]:
            score = self.score(trial)
            rank = {"done": 0, "stopped": 1}.get(trial["status"], 2)
            return rank, worst if score is None else score if self.lower else -score

        rows = []
        for trial in sorted(self.trials, key=place):
            values = [said_value(trial["values"][k]) if k in trial["values"] else "–" for k in self.keys]
            scores = [(m["name"], self.score(trial, m["name"])) for m in self.metrics]
            rows.append(
                {
                    "id": trial["id"],
                    "best": trial["id"] == self.found["best"],
                    "note": self._note(trial),
                    "cells": values + ["–" if s is None else _format(n)(s) for n, s in scores],
                    "steps": f"{trial['steps']:,}",
                    "time": duration(trial["seconds"] or trial["training_seconds"]),
                    "off": trial["status"] != "done",
                }
            )
        return rows

    def _note(self, trial: Json) -> str:
        if trial["id"] == self.found["best"]:
            return "best"
        if trial["status"] != "done":
            return {"stopped": "stopped early"}.get(trial["status"], str(trial["status"]))
        return "compromise" if len(self.metrics) > 1 and trial["id"] in self.found["compromises"] else ""

    def accounting(self) -> list[Figure]:
        """With one cache against teachers beside every student: by the cost model, and in time."""
        figures = []
        for key, title, note, words in (
            (
                "flops",
                "Computing, by the cost model",
                "with one cache, and with teachers beside every student",
                partial(_with_unit, unit="FLOP"),
            ),
            ("seconds", "Time, as measured", "online teachers at the rate of building the cache", duration),
        ):
            part = self.found["accounting"].get(key) or {}
            names = (("with_cache", "one cache", "student"), ("online", "online", "student_ce"))
            bars = [Bar(name, part[k], words(part[k]), tone) for k, name, tone in names if finite(part.get(k))]
            if len(bars) == 2:
                figures.append(Figure(title, note, bar_chart(bars, label=title)))
        return figures

    def costs(self) -> list[tuple[str, str]]:
        accounting = self.found["accounting"]
        flops, seconds = accounting.get("flops") or {}, accounting.get("seconds") or {}
        unit = accounting.get("unit", "token")
        facts: list[tuple[str, str]] = [
            ("Teacher shards computed", said(accounting.get("teacher_shards"))),
            ("After the first trial began", said(accounting.get("teacher_shards_after_first_trial"))),
        ]
        for label, value in (
            (f"{unit.capitalize()}s in the cache", accounting.get("cached_units")),
            (f"{unit.capitalize()}s trained on", accounting.get("trained_units")),
        ):
            if (found := finite(value)) is not None:
                facts.append((label, number(found)))
        for label, value in (("Teachers, once", flops.get("teachers")), ("Students", flops.get("students")),
                             ("Teachers, if online", flops.get("online_teachers"))):  # fmt: skip
            if (found := finite(value)) is not None:
                facts.append((label, _with_unit(found, unit="FLOP")))
        for label, value in (("Teachers, once", seconds.get("teachers")), ("Students", seconds.get("students")),
                             ("Teachers, if online", seconds.get("online_teachers"))):  # fmt: skip
            if (found := finite(value)) is not None:
                facts.append((label, duration(found)))
        return facts


def _format(name: str) -> Any:
    unit = next((m.unit for m in METRICS if m.name == name), "")
    return partial(said, unit=unit) if unit else number


def _with_unit(value: float, *, unit: str) -> str:
    for limit, prefix in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}"
