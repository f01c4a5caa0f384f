"""The export of a language model: weights and configuration of transformers, tokenizer, card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from raydistill.config.recipes import LmLogitsRecipe, RecipeConfig
from raydistill.config.schema import RunConfig
from raydistill.config.teachers import TeacherConfig, TopKLogitsTeacher
from raydistill.evaluate.comparison import Line
from raydistill.export.card import columns, lines_of, markdown, phase_line, rendered, shown, table, versions
from raydistill.models.load import load_tokenizer
from raydistill.models.student import COMPACT, export_student
from raydistill.signals import JsonValue

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


def write_text(config: RunConfig, student: nn.Module, folder: Path) -> None:
    """Write the model and its tokenizer into `folder`."""
    export_student(cast(PreTrainedModel, student), folder, dtype=getattr(torch, config.student.model.dtype))
    load_tokenizer(config.text.tokenizer).save_pretrained(folder)


def text_card(config: RunConfig, metrics: Mapping[str, JsonValue], *, has_compact: bool = False) -> str:
    """README.md of the export: teacher, data, settings, measured numbers, versions."""
    roles = columns(config)
    lines = lines_of(metrics, roles)
    return rendered(
        CARD,
        name=config.name,
        teachers=[
            {
                "name": t.name,
                "source": f"`{shown(t.model.source)}`",
                "signal": _signal(t),
                "weight": f"{t.weight:g}",
            }
            for t in config.teachers
        ],
        compact=COMPACT if has_compact else "",
        data=_data(config),
        student=f"`{shown(config.student.model.source)}`, init {config.student.init.kind}",
        phases=[phase_line(p, _recipe(p.recipe), "rows") for p in config.phases],
        seed=config.seed,
        held_out=_held_out(metrics),
        table=table("", LINES, lines, roles) if lines else "Nothing was measured.",
        benchmarks=_benchmarks(lines, roles),
        versions=versions(PACKAGES),
    )


def _signal(teacher: TeacherConfig) -> str:
    assert isinstance(teacher, TopKLogitsTeacher), "the configuration lets language models learn from these alone"
    return f"{teacher.signal} of the top {teacher.top_k} ({teacher.estimator.kind}, {teacher.codec})"


def _data(config: RunConfig) -> str:
    source = config.text
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
        what = ", ".join(f"`{shown(path)}`" for path in source.paths)
    packed = "packed rows" if source.packing else "rows"
    return (
        f"{what}: {packed} of at most {source.seq_len:,} tokens, tokenizer `{shown(source.tokenizer)}`; "
        f"{100 * config.evaluate.held_out:g} % of the documents were held out."
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


def _benchmarks(lines: Mapping[str, Line], roles: Mapping[str, str]) -> str:
    results = {role: found for role, line in lines.items() if isinstance(found := line.get("benchmarks"), dict)}
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    rows = [[name, *(_score(found.get(name)) for found in results.values())] for name in names]
    return markdown(["accuracy ± standard error", *(roles[role] for role in results)], rows) if rows else ""


def _score(result: JsonValue) -> str:
    if not isinstance(result, dict):
        return "–"
    value, error = result["accuracy_norm"], result["accuracy_norm_stderr"]
    return f"{value:.3f} ± {error:.3f}" if isinstance(error, float) else f"{value:.3f}"
