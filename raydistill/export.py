"""The export of a run: a folder that plain transformers loads, with a model card that says what was measured.

It holds the student's weights and configuration, the tokenizer and README.md; a student with shared cores also has
them in `compact/`. The folder appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from pyarrow import fs

from raydistill.config.recipes import LmLogitsRecipe, RecipeConfig
from raydistill.config.schema import RunConfig
from raydistill.config.training import PhaseConfig
from raydistill.evaluate.comparison import Line
from raydistill.evaluate.stage import student_of
from raydistill.models.load import load_tokenizer
from raydistill.models.student import COMPACT, export_student
from raydistill.signals import JsonValue
from raydistill.storage import Store, full_disk_explained, readable_by_others

FOLDER = "export"
COLUMNS = {
    "teacher": "teacher",
    "student_init": "untrained student",
    "student_ce": "student without a teacher",
    "student": "**this model**",
}
LINES = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl_to_teacher": "KL to the teacher, nats",
    "top1_agreement": "top-1 agreement with the teacher",
    "top1_accuracy": "next-token accuracy",
    "ece": "expected calibration error (15 bins)",
    "parameters": "parameters",
    "tokens_per_second": "tokens per second (forward)",
}
PACKAGES = ("raydistill", "torch", "transformers", "deepspeed", "ray")

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
- raydistill
---

# {{ name }}

A language model distilled from {{ teachers | map(attribute="source") | join(" and ") }} with raydistill.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{% if compact %}

`{{ compact }}/` holds the same model with one shared core and low-rank wrappers per layer instead of plain experts.
{% endif %}

## Teacher

{% for teacher in teachers %}
* `{{ teacher.name }}`: {{ teacher.source }}, {{ teacher.signal }}, weight {{ teacher.weight }}
{% endfor %}

## Data

{{ data }}

## Settings

* student: {{ student }}
{% for phase in phases %}
* phase {{ phase }}
{% endfor %}
* seed {{ seed }}

## Measured{% if held_out %} on {{ held_out }}{% endif %}


{{ table }}
{% if benchmarks %}

{{ benchmarks }}
{% endif %}

The untrained student and the student without a teacher (same order, same steps, cross-entropy alone) are there to
compare with. Speeds are of one machine and tell how the models relate.

## Limits

The model learnt from the data above alone and inherits the faults of its teacher. The licence of the teacher's weights
and of the data apply.

## Versions

{{ versions }}
"""


def export_run(config: RunConfig, run: Store, *, weights: str) -> None:
    """Write `export/` into the run folder from the weights at URI `weights`, replacing an older export.

    The measured numbers come from metrics.json. Raises `OutOfSpace` through the storage, `DataError` when a part of
    the student is missing.
    """
    # Object stores have no renaming: there the folder is made on the local disk and copied, its card last.
    parent = Path(run.path()) if run.is_local else Path(tempfile.mkdtemp())
    parent.mkdir(parents=True, exist_ok=True)
    part = parent / f".tmp-{FOLDER}-{uuid.uuid4().hex[:8]}"
    try:
        with full_disk_explained(part):
            _write(config, run, weights, part)
        if run.is_local:
            _replace(part, parent / FOLDER)
        else:
            _upload(part, run / FOLDER)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not run.is_local:
            shutil.rmtree(parent)


def _write(config: RunConfig, run: Store, weights: str, folder: Path) -> None:
    folder.mkdir()
    model = student_of(f"{run.uri}/init", weights, dtype=torch.float32)
    export_student(model, folder, dtype=getattr(torch, config.student.model.dtype))
    load_tokenizer(config.source.tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, _metrics(run), has_compact=(folder / COMPACT).exists()))
    for path in folder.rglob("*"):
        if path.is_file():
            readable_by_others(path)


def _replace(part: Path, final: Path) -> None:
    """Put `part` where `final` is; between the two renames there is no `final`, but never half of one."""
    old = part.with_name(f"{part.name}-old")
    if final.exists():
        final.rename(old)
    part.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _upload(part: Path, final: Store) -> None:
    card = part / "README.md"
    text = card.read_text()
    card.unlink()
    fs.copy_files(str(part), final.path(), destination_filesystem=final.filesystem)
    final.publish("README.md", text)


def _metrics(run: Store) -> Mapping[str, JsonValue]:
    found: Mapping[str, JsonValue] = json.loads(run.read_text("metrics.json")) if run.exists("metrics.json") else {}
    return found


def model_card(config: RunConfig, metrics: Mapping[str, JsonValue], *, has_compact: bool = False) -> str:
    """README.md of an export: teacher, data, settings, measured numbers, versions."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    lines = {role: line for role in COLUMNS if isinstance(line := metrics.get(role), dict)}
    return environment.from_string(CARD).render(
        name=config.name,
        teachers=[
            {
                "name": t.name,
                "source": f"`{_shown(t.model.source)}`",
                "signal": f"{t.signal} of the top {t.top_k} ({t.estimator.kind}, {t.codec})",
                "weight": f"{t.weight:g}",
            }
            for t in config.teachers
        ],
        compact=COMPACT if has_compact else "",
        data=_data(config),
        student=f"`{_shown(config.student.model.source)}`, init {config.student.init.kind}",
        phases=[_phase(p) for p in config.phases],
        seed=config.seed,
        held_out=_held_out(metrics),
        table=_table("", LINES, lines) if lines else "Nothing was measured.",
        benchmarks=_benchmarks(lines),
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )


def _shown(source: str) -> str:
    """A source as others can use it: of a path on this machine only the name."""
    return Path(source).name if Path(source).is_absolute() else source


def _data(config: RunConfig) -> str:
    source = config.source
    if source.dataset is not None:
        hub = source.dataset
        named = [
            f"`{hub.id}`",
            hub.config or "",
            f"split {hub.split}",
            f"revision {hub.revision}" if hub.revision else "",
        ]
        what = ", ".join(part for part in named if part)
    else:
        what = ", ".join(f"`{_shown(path)}`" for path in source.paths)
    packed = "packed rows" if source.packing else "rows"
    return (
        f"{what}: {packed} of at most {source.seq_len:,} tokens, tokenizer `{_shown(source.tokenizer)}`; "
        f"{100 * config.evaluate.held_out:g} % of the documents were held out."
    )


def _phase(phase: PhaseConfig) -> str:
    optimizer = phase.optimizer["student"]
    length = f"{phase.steps:,} steps" if phase.steps is not None else f"{phase.epochs:g} epochs"
    return (
        f"`{phase.name}`: {length} of {phase.batch.global_size} rows, {_recipe(phase.recipe)}; "
        f"AdamW with learning rate {optimizer.lr:g} ({optimizer.schedule}), weight decay {optimizer.weight_decay:g}, "
        f"{phase.precision}, ZeRO {phase.zero.stage}"
    )


def _recipe(recipe: RecipeConfig) -> str:
    if not isinstance(recipe, LmLogitsRecipe):
        return recipe.kind
    return (
        f"{recipe.kind} with alpha {recipe.alpha:g}, temperature {recipe.temperature:g} ({recipe.temperature_mode}), "
        f"{recipe.divergence}, tail {recipe.tail}"
    )


def _held_out(metrics: Mapping[str, JsonValue]) -> str:
    found = metrics.get("held_out")
    if not isinstance(found, dict):
        return ""
    return f"{found['rows']:,} held-out rows ({found['targets']:,} predicted tokens)"


def _table(corner: str, names: Mapping[str, str], lines: Mapping[str, Line]) -> str:
    rows = [
        [title, *(_said(name, line.get(name)) for line in lines.values())]
        for name, title in names.items()
        if any(line.get(name) is not None for line in lines.values())
    ]
    return _markdown([corner, *(COLUMNS[role] for role in lines)], rows)


def _benchmarks(lines: Mapping[str, Line]) -> str:
    results = {role: found for role, line in lines.items() if isinstance(found := line.get("benchmarks"), dict)}
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    rows = [[name, *(_score(found.get(name)) for found in results.values())] for name in names]
    return _markdown(["accuracy ± standard error", *(COLUMNS[role] for role in results)], rows) if rows else ""


def _score(result: JsonValue) -> str:
    if not isinstance(result, dict):
        return "–"
    value, error = result["accuracy_norm"], result["accuracy_norm_stderr"]
    return f"{value:.3f} ± {error:.3f}" if isinstance(error, float) else f"{value:.3f}"


def _said(name: str, value: JsonValue) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if name in ("parameters", "tokens_per_second") or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
