"""report.html: one self-contained page about a run, made from the files of the run folder alone.

Read, where they are there: config.json (`{"config", "versions"}`), metrics.jsonl, baseline/metrics.jsonl, metrics.json,
samples.json with the images it names, cache_stats.json and, where metrics.json has no `stages`, stages.json
(`{stage: {"seconds", "gpu_seconds", "teacher_gpu_seconds", "gpu_at_most", "price", "unpriced"}}`).
The page needs no network and no script; charts are inline SVG and the colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import json
from importlib import resources

from jinja2 import Environment, StrictUndefined

from raydistill.report import caches, page
from raydistill.report.curves import (
    convergence_words,
    held_out_figures,
    in_thirds,
    loss_figures,
    machine_figures,
    read_log,
)
from raydistill.report.images import gallery, timestep_figures
from raydistill.report.words import IMAGE_PARTS, PARTS, ROLE_NAMES, lede, role_names
from raydistill.signals import JsonValue
from raydistill.storage import Store


def write_report(run: Store) -> None:
    """Write report.html into the run folder."""
    run.publish("report.html", render_report(run))


def render_report(run: Store) -> str:
    """The page as text. The same files give the same text."""
    stored = page.section(_json(run, "config.json"))
    config, metrics = page.section(stored.get("config")), page.section(_json(run, "metrics.json"))
    stats = page.section(_json(run, "cache_stats.json"))
    log, baseline = read_log(run, "metrics.jsonl"), read_log(run, "baseline/metrics.jsonl")
    teachers, student = page.players(config)
    names = role_names(metrics) if metrics else ROLE_NAMES
    exported = page.exported_role(config, metrics)
    samples = page.section(_json(run, "samples.json"))
    of_images = page.section(config.get("source")).get("kind") in ("images", "videos", "prompts")
    teacher_names, teacher_rows = page.teacher_rows(metrics) if of_images else ([], [])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = resources.files(__package__)
    template = environment.from_string(folder.joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        name=str(config.get("name", "run")),
        teachers=teachers,
        student=student,
        lede=lede(metrics),
        tiles=page.tiles(metrics, exported),
        roles=[(role, names[role]) for role in page.measured(metrics)],
        role_names=names,
        exported=exported,
        taught=bool(page.section(metrics.get("teacher"))) or not of_images,
        standing=[f for f in (page.quality_figure(metrics), page.closeness_figure(metrics)) if f],
        rows=page.comparison_rows(metrics),
        held_out=page.held_out_words(metrics),
        teacher_names=teacher_names,
        teacher_rows=teacher_rows,
        by_timestep=timestep_figures(metrics, exported),
        in_thirds=in_thirds,
        losses=loss_figures(log, baseline, IMAGE_PARTS if of_images else PARTS),
        evaluations=held_out_figures(log, baseline),
        convergence=convergence_words(log),
        machine=machine_figures(log),
        benchmarks=page.benchmarks(metrics),
        gallery=gallery(run, samples, names),
        samples=[] if samples.get("kind") in ("images", "videos") else page.samples(samples),
        of_images=of_images,
        inputs=caches.cache_facts(stats),
        signals=caches.signals(stats),
        stages=page.stages(page.section(metrics.get("stages") or _json(run, "stages.json"))),
        resources=page.resources(config),
        settings=page.settings(config),
        versions=page.section(stored.get("versions")),
    )


def _json(run: Store, name: str) -> JsonValue:
    found: JsonValue = json.loads(run.read_text(name)) if run.exists(name) else None
    return found
