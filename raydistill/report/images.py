"""What the page shows of image models: grids of samples, errors by timestep, distances of features."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from raydistill.report.charts import WIDE, Series, line_chart, needs_log, number
from raydistill.report.curves import Figure
from raydistill.report.words import ROLE_NAMES, Metric, as_number, role_names, said, size
from raydistill.signals import JsonValue
from raydistill.storage import Store

MOST_PIXELS = 320
"""Longest side of an image on the page; larger ones are made smaller."""
TONES = 6
"""Colours that stand for numbers."""

Json = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """One caption, with the image of every model (a data URI, or None where it is missing)."""

    caption: str
    images: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Samples side by side."""

    heads: tuple[tuple[str, str], ...]
    """(who, tone) of each column."""
    rows: tuple[GalleryRow, ...]
    note: str
    pixelated: bool
    """Whether the images are so small that their pixels should stay visible."""


def gallery(run: Store, content: Json, names: Mapping[str, str] = ROLE_NAMES) -> Gallery | None:
    """The grid of samples.json, with the files it names inlined; None where there are no images.

    `names` are those of the roles.
    """
    rows = content.get("samples")
    if content.get("kind") not in ("images", "videos") or not isinstance(rows, list):
        return None
    samples = [row for row in rows if isinstance(row, Mapping)]
    outputs = [found if isinstance(found := row.get("outputs"), Mapping) else {} for row in samples]
    order = [f"teacher/{name}" for name in _teachers(outputs)] + [role for role in ROLE_NAMES if role != "teacher"]
    columns = [who for who in order if any(who in found for found in outputs)]
    referred = any(row.get("reference") is not None for row in samples)
    shown, side = [], 0
    for row, found in zip(samples, outputs, strict=True):
        files = [*([row.get("reference")] if referred else []), *(found.get(who) for who in columns)]
        images = [_inlined(run, name) for name in files]
        side = max([side, *(longest for _, longest in images)])
        shown.append(GalleryRow(str(row.get("prompt", "")), tuple(uri for uri, _ in images)))
    heads = [*([("Held-out image", "held_out")] if referred else []), *(_head(who, names) for who in columns)]
    return Gallery(tuple(heads), tuple(shown), _how(content), pixelated=side <= 96) if shown else None


def _teachers(outputs: Sequence[Json]) -> list[str]:
    names = (who.removeprefix("teacher/") for found in outputs for who in found if who.startswith("teacher/"))
    return list(dict.fromkeys(names))


def _head(who: str, names: Mapping[str, str]) -> tuple[str, str]:
    return (who.removeprefix("teacher/"), "teacher") if who.startswith("teacher/") else (names[who], who)


def _how(content: Json) -> str:
    if isinstance(content.get("note"), str):
        return str(content["note"])
    if "guidance_scale" not in content:
        return (
            "Each row begins with the same noise for every model and has the prompt of a held-out row; the students "
            f"take {said(content.get('steps'))} steps. MP4 files of the same name lie in the folder samples."
        )
    steps, scale = said(content.get("steps")), as_number(content.get("guidance_scale")) or 1.0
    guided = f", guidance {number(scale)}" if scale != 1 else ""
    return (
        "Each row begins with the same noise for every model and has the caption of a held-out image "
        f"({steps} steps{guided})."
    )


def _inlined(run: Store, name: JsonValue) -> tuple[str | None, int]:
    """An image of the run folder as a data URI, and its longest side."""
    if not isinstance(name, str) or not run.exists(name):
        return None, 0
    content = run.read(name)
    image = Image.open(io.BytesIO(content))
    longest = max(image.size)
    if image.format == "WEBP":  # an animation, written in the size of a page
        return "data:image/webp;base64," + base64.b64encode(content).decode(), longest
    if longest > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        content = buffer.getvalue()
    kind = "gif" if name.endswith(".gif") and longest <= MOST_PIXELS else "png"
    return f"data:image/{kind};base64," + base64.b64encode(content).decode(), longest


def timestep_figures(metrics: Json, exported: str = "student") -> list[Figure]:
    """Errors over the timestep: of every model to the teachers and to the truth, of the `exported` student to each
    teacher."""
    held_out = metrics.get("held_out")
    edges = held_out.get("timestep_edges") if isinstance(held_out, Mapping) else None
    if not isinstance(edges, list):
        return []
    middles = [(a + b) / 2 for a, b in pairwise(v for v in map(as_number, edges) if v is not None)]
    lines = {role: _bins(metrics.get(role)) for role in ROLE_NAMES}
    names = role_names(metrics)
    goal = "Teachers among themselves" if isinstance(metrics.get("teachers"), Mapping) else "Teacher"
    single = [(name, values) for name, values in lines[exported].items() if name.startswith("mse_to/")]
    figures = [
        _over_time(
            "Error to the teachers by timestep", "no student gets below the line of the teachers",
            [_series({**names, "teacher": goal}[r], r, middles, bins.get("mse_to_teacher"))
             for r, bins in lines.items()],
        ),
        _over_time(
            "Error to each teacher by timestep", f"of the exported student ({names[exported].lower()})",
            [_series(name.removeprefix("mse_to/"), f"c{i % TONES}", middles, values)
             for i, (name, values) in enumerate(single)],
        ),
        _over_time(
            "Error to the truth by timestep", "against the noise that was really mixed in",
            [_series(names[r], r, middles, bins.get("mse_to_noise")) for r, bins in lines.items()],
        ),
    ]  # fmt: skip
    return [f for f in figures if f is not None]


def _bins(line: JsonValue) -> Json:
    bins = line.get("by_timestep") if isinstance(line, Mapping) else None
    return bins if isinstance(bins, Mapping) else {}


def _series(name: str, tone: str, middles: Sequence[float], values: JsonValue) -> Series:
    known = [(x, as_number(y)) for x, y in zip(middles, values if isinstance(values, list) else [], strict=False)]
    return Series(name, [(x, y) for x, y in known if y is not None], tone, dashed=tone == "student_ce")


def _over_time(title: str, note: str, series: Sequence[Series]) -> Figure | None:
    """A line for each model; zero errors (of an only teacher) are left out, as no axis shows them well."""
    drawn = [s for s in series if any(y > 0 for _, y in s.points)]
    if not drawn:
        return None
    chart, log_chart = (
        line_chart(drawn, label=title, width=WIDE, log=log, zero=not log, smooth=False, x_unit="timestep")
        for log in (False, True)
    )
    if needs_log(drawn):
        chart, log_chart = log_chart, chart
        note += ", logarithmic axis"
    return Figure(title, note, chart, log_chart, tuple((s.name, s.tone) for s in drawn))


DISTANCES = {
    "features": "held-out ones", "video_features": "held-out ones", "video_features_to_teacher": "of the teacher's",
}  # fmt: skip
"""Entries of a model's line that are distances of features, and what is compared with."""


def feature_metrics(lines: Sequence[Json]) -> list[Metric]:
    """Rows of the comparison for distances of features, which are named after their extractor and never without n."""
    metrics = []
    for group, others in DISTANCES.items():
        found = next((f for line in lines if isinstance(f := line.get(group), Mapping)), None)
        if found is None:
            continue
        name, count = found.get("extractor"), said(found.get("generated"))
        things = found.get("things") or "images"
        about = f"{count} generated {things} and {said(found.get('held_out'))} {others}"
        doubt = "" if found.get("reliable") else f"; too few for {said(found.get('dimensions'))} features"
        metrics += [
            Metric(f"{group}/frechet_distance", f"Fréchet distance · {name}", about + doubt, better="low"),
            Metric(f"{group}/kernel_distance", f"Kernel distance · {name}", f"{about}, without bias", better="low"),
        ]
    return metrics


def flattened(line: Json) -> Json:
    """A model's line with its distances of features as values of their own."""
    flat = dict(line)
    for group in DISTANCES:
        if isinstance(features := line.get(group), Mapping):
            flat |= {f"{group}/{key}": features.get(key) for key in ("frechet_distance", "kernel_distance")}
    return flat


def space_facts(inputs: Json) -> list[tuple[str, str]]:
    """Where the images lie, and in which sizes."""
    facts = []
    if (channels := as_number(inputs.get("latent_channels"))) is not None:
        factor = as_number(inputs.get("vae_factor")) or 1
        facts.append(("Space", "pixels" if factor == 1 else f"{channels:.0f} channels, 1 ∕ {factor:.0f} of each side"))
    buckets = inputs.get("buckets")
    if isinstance(buckets, list) and buckets:
        sides = [" × ".join(said(side) for side in b) for b in buckets if isinstance(b, list)]
        facts.append(("Sizes", ", ".join(sides[:4]) + (f" and {len(sides) - 4} more" if len(sides) > 4 else "")))
    return facts


def signal_facts(stats: Json) -> list[tuple[str, str]]:
    """What a teacher's cache of predictions holds."""
    facts = [("Images", said(stats.get("rows"))), ("Draws of noise", said(stats.get("draws")))]
    facts.append(("Size", said(stats.get("bytes"), "bytes")))
    if (each := as_number(stats.get("bytes_per_draw"))) is not None:
        facts.append(("Per draw", size(each)))
    own, common = stats.get("own_prediction_type"), stats.get("prediction_type")
    if common is not None:
        text = str(common).replace("_", " ")
        facts.append(("Prediction", text if own in (None, common) else f"{text}, from {str(own).replace('_', ' ')}"))
    if scale := as_number(stats.get("guidance_scale")):
        facts.append(("Guidance", number(scale)))
    if speed := as_number(stats.get("samples_per_second")):
        facts.append(("Captured", f"{number(speed)} draws/s"))
    return facts
