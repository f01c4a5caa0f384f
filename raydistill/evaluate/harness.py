"""Tasks of lm-evaluation-harness, an optional package."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.errors import ConfigError
from raydistill.signals import JsonValue


def require_harness(tasks: Sequence[str]) -> None:
    """Raise `ConfigError` unless lm-evaluation-harness is installed and knows `tasks`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.lm_eval_tasks needs the package lm-evaluation-harness, which is not installed. Install it with "
            "`pip install 'raydistill[lm-eval]'`, or remove the key: evaluate.benchmarks needs no extra package."
        )
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for task in tasks:
        if task not in known:
            close = ", ".join(difflib.get_close_matches(task, known, n=3)) or "none like it"
            raise ConfigError(f"evaluate.lm_eval_tasks: lm-evaluation-harness has no task {task!r}; it has {close}")


def run_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, batch_size: int = 8
) -> dict[str, JsonValue]:
    """Results of each task as `{task: {metric: value}}`, with the metric names of the package."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks))
    return {
        task: {name: value for name, value in found.items() if isinstance(value, int | float)}
        for task, found in results["results"].items()
    }
