"""Sweeps that nobody ran: trials with made-up curves whose best point is known, for results and reports."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from pydantic import JsonValue

from raydistill.config.schema import RunConfig
from raydistill.config.spaces import all_points, drawn_points, settings
from raydistill.config.sweep import SweepConfig
from raydistill.search.curve import Evaluated, Outcome
from raydistill.search.ledger import TrialRecord
from raydistill.search.results import Result

ALPHA, TEMPERATURE = "phases.0.recipe.alpha", "phases.0.recipe.temperature"
GRID = {
    "space": {
        ALPHA: {"kind": "grid", "values": [0.3, 0.5, 0.7, 0.9]},
        TEMPERATURE: {"kind": "grid", "values": [1.0, 1.5, 2.0, 3.0, 4.0]},
    },
    "metrics": ["perplexity", "kl_to_teacher"],
    "searcher": "grid",
}
"""The best point is alpha 0.7, temperature 1.5."""
MANY = {
    "space": {
        "phases.0.optimizer.student.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-2},
        "student.init.num_layers": {"kind": "integers", "low": 2, "high": 12},
        "phases.0.recipe.divergence": {"kind": "choice", "values": ["forward_kl", "reverse_kl", "jsd"]},
        "phases.0.recipe.beta": {
            "kind": "uniform", "low": 0.1, "high": 0.9, "when": {"phases.0.recipe.divergence": "jsd"},
        },
    },
    "metrics": ["perplexity", "parameters"],
    "searcher": "random",
    "scheduler": "asha",
    "trials": 30,
}  # fmt: skip
WEIGHTS = {
    "space": {
        "weights": {
            "kind": "simplex", "steps": 5,
            "keys": ["teachers.0.weight", "teachers.1.weight", "teachers.2.weight"],
        },
    },
    "metrics": ["perplexity"],
    "searcher": "grid",
}  # fmt: skip
"""The best point is 0.6, 0.4, 0."""
ACCOUNTING: dict[str, JsonValue] = {
    "unit": "token", "trials": 20, "teacher_builds": 1, "teacher_shards": 12, "teacher_shards_after_first_trial": 0,
    "cached_units": 98_304.0, "trained_units": 1_920_000.0,
    "flops": {"teachers": 2.6e13, "students": 2.4e14, "with_cache": 2.66e14, "online_teachers": 5.2e14,
              "online": 7.6e14, "saved": 2.86},
    "seconds": {"teachers": 81.0, "students": 1290.0, "with_cache": 1371.0, "online_teachers": 1580.0,
                "online": 2870.0, "saved": 2.09},
}  # fmt: skip


def fake_run(name: str = "toy") -> RunConfig:
    """The run that was varied: three teachers of text."""
    model = {"library": "transformers", "source": "org/model"}
    batch = {"global_size": 8, "micro_size": 8}
    phase = {"name": "one", "steps": 100, "batch": batch, "optimizer": {"student": {"lr": 0.1}}}
    return RunConfig.model_validate(
        {
            "name": name,
            "source": {"paths": ["a.txt"], "tokenizer": "gpt2", "seq_len": 16},
            "teachers": [{"name": teacher, "model": model} for teacher in ("red", "green", "blue")],
            "student": {"model": model},
            "phases": [phase],
        }
    )


def fake_results(sweep: SweepConfig, *, stop: bool = False, fail: tuple[int, ...] = ()) -> list[Result]:
    """A trial per point. With `stop`, every third one was stopped early; those of `fail` failed."""
    points = all_points(sweep) if sweep.searcher == "grid" else drawn_points(sweep, sweep.trials or 0)
    return [
        _result(sweep, number, point, stop and number % 3 == 2, number in fail) for number, point in enumerate(points)
    ]


def _result(sweep: SweepConfig, number: int, point: Mapping[str, JsonValue], stopped: bool, failed: bool) -> Result:
    values = settings(sweep, point)
    loss = _loss(values)
    rng = random.Random(number)
    steps = 40 if stopped else 100
    curve = tuple(
        Evaluated(0, step, step, {"perplexity": p, "kl_to_teacher": 0.1 + loss / 5})
        for step in range(20, steps + 1, 20)
        for p in [30 + 10 * loss + 300 * math.exp(-step / 20) + rng.random() * 0.2]
    )
    layers = values.get("student.init.num_layers", 4)
    metrics = {**curve[-1].values, "parameters": 1e6 * float(str(layers))}
    record = TrialRecord(
        number=number, point=dict(point), values=values, inputs="inputs", signals={"toy": "toy"}, init=None,
        status="failed" if failed else "stopped" if stopped else "done", seconds=60.0 + number,
        error="the loss of step 12 is not a number" if failed else None,
    )  # fmt: skip
    outcome = Outcome(curve, {} if failed else metrics, (steps,), steps * 8, steps * 800, 50.0, not (stopped or failed))
    return Result(record, outcome)


def _loss(values: Mapping[str, JsonValue]) -> float:
    """Least at alpha 0.7, temperature 1.5, learning rate 1e-3 and many layers."""
    loss = 0.0
    for key, value in values.items():
        if key == ALPHA:
            loss += 4 * (float(str(value)) - 0.7) ** 2
        elif key == TEMPERATURE:
            loss += 0.4 * (float(str(value)) - 1.5) ** 2
        elif key.startswith("teachers."):
            loss += (float(str(value)) - {"0": 0.6, "1": 0.4, "2": 0.0}[key.split(".")[1]]) ** 2
        elif key.endswith("lr"):
            loss += 0.5 * (math.log10(float(str(value))) + 3) ** 2
        elif key.endswith("num_layers"):
            loss += 2 / float(str(value))
    return loss
