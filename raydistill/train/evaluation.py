"""Evaluations during training: inside it, or beside it from weights that are written for the purpose.

Beside the training, the loop only writes the whole weights to `candidates/step-<n>/`; a Ray task that the driver starts
(`launch.py`) measures them and publishes `evaluations/step-<n>.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch

from raydistill.errors import ConfigError
from raydistill.storage import Store
from raydistill.train.final import BEST, BEST_RECORD, WEIGHTS, copy_file, write_weights
from raydistill.train.job import PhaseJob
from raydistill.train.metrics import Metrics
from raydistill.train.prepare import Prepared, make_validator, student_with

CANDIDATES = "candidates"
EVALUATIONS = "evaluations"
PREFIX = "evaluation/"
"""Of the names of an evaluation's metrics in a report."""
Report = Callable[[Mapping[str, float]], None]
"""Tells whoever runs the training about a step; called on every rank."""


class Evaluations:
    """When the loop evaluates, and what becomes of the numbers."""

    def __init__(self, prepared: Prepared, metrics: Metrics | None, report: Report, *, first_step: int):
        self._prepared, self._metrics, self._report = prepared, metrics, report
        self._store = prepared.job.store
        self._logged: set[int] = set()
        if prepared.rank == 0:
            self._logged = _forget_after(self._store, first_step)

    def due(self, step: int, *, last: bool) -> bool:
        """Whether the weights after `step` steps are to be evaluated."""
        every = self._prepared.job.config.evaluate.every_steps
        best = self._prepared.job.phase.checkpoint.best_metric is not None
        return (every is not None and (step % every == 0 or last)) or (best and last)

    def run(self, step: int) -> None:
        """Evaluate the present weights, or have them evaluated; all ranks together."""
        prepared = self._prepared
        if runs_beside(prepared.job):
            write_weights(prepared, self._store / CANDIDATES / _name(step))
            if prepared.rank == 0:
                (self._store / CANDIDATES).publish(f"{_name(step)}.json", json.dumps({"step": step}))
                log_evaluations(self._store, self._metrics, self._logged)
            return
        values = prepared.evaluate()
        if self._metrics is not None:
            self._metrics.write(step, {"evaluation": dict(values)})
        if is_better(prepared, values):
            write_weights(prepared, self._store / BEST)
            if prepared.rank == 0:
                record_best(prepared.job, step, values)
        self._report({"step": step, **{f"{PREFIX}{name}": value for name, value in values.items()}})


def is_evaluation(values: Mapping[str, float]) -> bool:
    """Whether a report is that of an evaluation, not of a logged step."""
    return any(name.startswith(PREFIX) for name in values)


def runs_beside(job: PhaseJob) -> bool:
    """Whether evaluations are Ray tasks; inside the driver (`workers: 0`) there is nothing to run them beside."""
    return job.config.evaluate.asynchronous and job.config.resources.train.workers != 0


def evaluate_candidate(job: PhaseJob, step: int) -> None:
    """Measure the weights in `candidates/step-<step>/` and publish the numbers."""
    store = job.store
    torch.set_num_threads(max(1, int(job.config.resources.train.cpus)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if job.phase.precision == "bf16" else torch.float32
    student = student_with(job, (store / CANDIDATES / _name(step)).uri, dtype=dtype).to(device)
    validator = make_validator(job)
    values = validator.metrics(validator.sums(student, rank=0, world_size=1))
    (store / EVALUATIONS).publish(f"{_name(step)}.json", json.dumps({"step": step, "evaluation": values}))


def settle_candidate(job: PhaseJob, step: int) -> None:
    """After `evaluate_candidate`: make the candidate the best or drop it."""
    store = job.store
    values = json.loads((store / EVALUATIONS).read_text(f"{_name(step)}.json"))["evaluation"]
    candidate = store / CANDIDATES / _name(step)
    if _beats(job, values):
        for name in WEIGHTS:
            if candidate.exists(name):
                copy_file(candidate, store / BEST, name)
        record_best(job, step, values)
    (store / CANDIDATES).delete(f"{_name(step)}.json")
    (store / CANDIDATES).delete_folder(_name(step))


def waiting_candidates(store: Store) -> list[int]:
    """Steps whose weights wait to be measured."""
    return [_step(name) for name in (store / CANDIDATES).names()]


def log_evaluations(store: Store, metrics: Metrics | None, logged: set[int]) -> None:
    """Write the evaluations that came in since the last call as lines of metrics."""
    for name in (store / EVALUATIONS).names():
        if _step(name) not in logged and metrics is not None:
            logged.add(_step(name))
            values = json.loads((store / EVALUATIONS).read_text(name))["evaluation"]
            metrics.write(_step(name), {"evaluation": values})


def is_better(prepared: Prepared, values: Mapping[str, float]) -> bool:
    """Whether these values beat the best so far. Rank 0 decides for all, as files may show up late elsewhere."""
    verdict = torch.tensor(float(prepared.rank == 0 and _beats(prepared.job, values)), device=prepared.device)
    torch.distributed.broadcast(verdict, 0)
    return bool(verdict)


def record_best(job: PhaseJob, step: int, values: Mapping[str, float]) -> None:
    """Say what the weights in `best/` are."""
    name = job.phase.checkpoint.best_metric
    assert name is not None
    (job.store / BEST).publish(BEST_RECORD, json.dumps({"step": step, "metric": name, "value": values[name]}))


def require_known_metric(name: str, values: Mapping[str, float]) -> None:
    """`ConfigError` when an evaluation has no metric of that name."""
    if name not in values:
        raise ConfigError(
            f"checkpoint.best_metric: wanted one of {', '.join(sorted(values))}; found {name}, which is not measured."
        )


def _beats(job: PhaseJob, values: Mapping[str, float]) -> bool:
    settings, store = job.phase.checkpoint, job.store / BEST
    if settings.best_metric is None:
        return False
    require_known_metric(settings.best_metric, values)
    if not store.exists(BEST_RECORD):
        return True
    value, best = values[settings.best_metric], float(json.loads(store.read_text(BEST_RECORD))["value"])
    return value < best if settings.best_mode == "min" else value > best


def _forget_after(store: Store, step: int) -> set[int]:
    """Drop candidates and evaluations of steps that will be done again; returns the steps that stay."""
    for part in (CANDIDATES, EVALUATIONS):
        for name in (store / part).names():
            if _step(name) > step:
                (store / part).delete(name)
    best = store / BEST
    if best.exists(BEST_RECORD) and int(json.loads(best.read_text(BEST_RECORD))["step"]) > step:
        best.delete(BEST_RECORD)  # those weights are of a branch that is done again, perhaps with another optimizer
    return {_step(name) for name in (store / EVALUATIONS).names()}


def _name(step: int) -> str:
    return f"step-{step:08}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-").removesuffix(".json"))
