"""What the process of a trial does: make the student, train its phases, and tell of every evaluation.

A trial is an ordinary run folder that enters at `init`; the caches are given to it. Whatever it finished before a kill
is read from there, so that calling `train_trial` again goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from pydantic import BaseModel, JsonValue

from raydistill.cache.calibration import calibration_rows
from raydistill.cluster import on_train_hardware
from raydistill.config.load import Draft
from raydistill.config.schema import RunConfig
from raydistill.config.sweep import SPEEDS
from raydistill.errors import DataError
from raydistill.evaluate.costs import student_costs
from raydistill.evaluate.job import EvaluateJob
from raydistill.models.student import publish_student
from raydistill.search.curve import COSTS, read_costs, read_outcome, saved
from raydistill.search.ledger import Ledger, TrialRecord, read_config, read_trial, write_config
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.evaluation import PREFIX, is_evaluation
from raydistill.train.final import BEST, BEST_RECORD
from raydistill.train.job import PhaseJob, PhaseResult
from raydistill.train.launch import train_phase
from raydistill.train.metrics import METRICS

Tell = Callable[[Mapping[str, float]], None]
"""Takes `step` (over all phases) and metrics; may not return, when the trial is to stop."""
ADOPTING, ADOPTED = "adopting.json", "adopted.json"
COMPLETE = "complete"
"""In the report of a trial that was trained to its end."""


def train_trial(folder: Store, tell: Tell, *, wanted: Sequence[str], told: bool = False) -> None:
    """Train the trial in `folder` to its end from wherever it stands, telling of what it measured before (unless that
    is `told`) and measures now; `wanted` are the metrics that it is judged by."""
    record, config = read_trial(folder), read_config(folder)
    make_init(folder, config, record.init, record.inputs)
    costs = _costs(folder, config, record, wanted)
    for evaluated in () if told else saved(folder, config):
        tell({"step": evaluated.total_step, **evaluated.values, **costs})
    before, weights = 0, None
    for index, phase in enumerate(config.phases):
        job = PhaseJob(
            config=config, phase=phase, run=folder.uri, folder=f"phases/{phase.name}",
            inputs=record.inputs, signals=record.signals, student=f"{folder.uri}/init",
            weights=weights if phase.start_from == "weights" or not index else _average_of(folder, config, index - 1),
        )  # fmt: skip
        result = _train(job, partial(_tell, tell, before, costs))
        before += result.steps
        weights = f"{job.store.uri}/{'best' if phase.checkpoint.best_metric else 'final'}"
    for phase in config.phases:
        folder.delete_folder(f"phases/{phase.name}/checkpoints")  # of use only while the phase is not finished
    tell({"step": before, **read_outcome(folder, config).metrics, COMPLETE: 1.0})


def _average_of(folder: Store, config: RunConfig, index: int) -> str:
    return f"{folder.uri}/phases/{config.phases[index].name}/final/ema.safetensors"


def _tell(tell: Tell, before: int, costs: Mapping[str, float], values: Mapping[str, float]) -> None:
    if is_evaluation(values):
        metrics = {name.removeprefix(PREFIX): value for name, value in values.items() if name != "step"}
        tell({"step": before + values["step"], **metrics, **costs})


def make_init(folder: Store, config: RunConfig, shared: str | None, inputs: str) -> None:
    """The untrained student in `init/`: linked or copied from where it is, else built."""
    if folder.exists("init/student.json"):
        return
    if shared is not None:
        source = Store(shared)
        for name in sorted(source.names(), key=_record_last):
            link_file(source, folder / "init", name)
        return
    rows = calibration_rows(config, lambda: Store(inputs))
    publish_student(config.first_student, seed=config.seed, run=folder, rows=rows)


def _record_last(name: str) -> bool:
    """student.json is what says that the folder is whole."""
    return name == "student.json"


def link_file(source: Store, target: Store, name: str) -> None:
    """Publish file `name` of `source` in `target`, without a second copy where both lie on one disk. Published files
    are replaced and never written to, so that both may be the same."""

    def link(part: Path) -> None:
        try:
            os.link(source.path(name), part)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source.path(name), part)

    target.publish(name, link if source.is_local and target.is_local else source.read(name))


def _costs(folder: Store, config: RunConfig, record: TrialRecord, wanted: Sequence[str]) -> dict[str, float]:
    """Size and, where it is asked for, speed of the student: measured once for all trials that have it, untrained."""
    speed = any(name in SPEEDS for name in wanted)
    shared = Store(record.costs) if record.costs else folder
    if not _has_costs(shared, speed):
        job = EvaluateJob(
            config=config, inputs=record.inputs, signals=record.signals, student=f"{folder.uri}/init", weights={}
        )
        costs = on_train_hardware(config, student_costs, job, speed=True) if speed else student_costs(job, speed=False)
        if not _has_costs(shared, speed):  # else another trial was faster, and all are to say the same
            shared.publish(COSTS, json.dumps(costs))
    if shared.uri != folder.uri:
        folder.publish(COSTS, shared.read(COSTS))
    return read_costs(folder)


def _has_costs(store: Store, speed: bool) -> bool:
    return store.exists(COSTS) and (not speed or bool(set(SPEEDS) & set(read_costs(store))))


def _train(job: PhaseJob, tell: Tell) -> PhaseResult:
    """`train_phase`; with workers of its own, their reports come through a queue to this thread, which alone may tell
    Ray Tune, and is stopped in telling."""
    if job.config.resources.train.workers == 0:
        return train_phase(job, report=tell)
    from ray.util.queue import Empty, Queue

    from raydistill.search.forward import CONTROLLER, Forward, abort

    queue = Queue(actor_options={"num_cpus": 0})  # without a limit, since its writer must not wait for its reader
    outcome: Future[PhaseResult] = Future()

    def train() -> None:
        try:
            outcome.set_result(train_phase(job, callbacks=[Forward(queue)]))
        except BaseException as error:  # raised again in the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=train, name="raydistill-trial", daemon=True).start()
    controller = None
    try:
        while not (outcome.done() and queue.empty()):
            try:
                values = queue.get(timeout=1.0)
            except Empty:
                continue
            if CONTROLLER in values:
                controller = values[CONTROLLER]
            else:
                tell(values)
    except BaseException:
        if controller is not None:
            abort(controller)
        raise
    queue.shutdown()
    return outcome.result()


class _Adoption(BaseModel):
    """adopting.json: what a member of a population takes over."""

    donor: int
    """Number of the trial whose weights it takes."""
    point: dict[str, JsonValue]
    """Its values from then on, by dimension of the space."""
    values: dict[str, JsonValue]
    """The same by key of the run: of its only phase."""
    mark: str
    """Tells one adoption from another."""


def adopt(
    ledger: Ledger, number: int, donor: int, point: Mapping[str, JsonValue], values: Mapping[str, JsonValue], mark: str
) -> None:
    """Go on as trial `number` from the newest checkpoint of trial `donor`, with other values; once per `mark`."""
    folder = ledger.folder(number)
    if donor == number or (folder.exists(ADOPTED) and json.loads(folder.read_text(ADOPTED)) == mark):
        return
    wanted = _Adoption(donor=donor, point=dict(point), values=dict(values), mark=mark)
    folder.publish(ADOPTING, wanted.model_dump_json())
    complete_adoption(ledger, number)


def complete_adoption(ledger: Ledger, number: int) -> None:
    """Do what adopting.json says, as far as a kill has left it undone."""
    folder = ledger.folder(number)
    if not folder.exists(ADOPTING):
        return
    wanted = _Adoption.model_validate_json(folder.read(ADOPTING))
    source, record = ledger.folder(wanted.donor), read_trial(folder)
    config = Draft(read_config(folder).model_dump(mode="json"), {}).config(wanted.values)
    phase = f"phases/{config.phases[0].name}"
    step = _take_over(source / phase, folder / phase, _settings(folder, config, record))
    if step is not None:
        if source.exists(METRICS):
            folder.publish(METRICS, source.read(METRICS))  # a copy: it is appended to
        write_config(folder, config)
        taken = (*record.taken_from, (wanted.donor, step))
        changes = {"point": wanted.point, "values": wanted.values, "taken_from": taken}
        ledger.write(record.model_copy(update=changes))
    folder.publish(ADOPTED, json.dumps(wanted.mark))
    folder.delete(ADOPTING)


def _settings(folder: Store, config: RunConfig, record: TrialRecord) -> dict[str, JsonValue]:
    phase = config.phases[0]
    job = PhaseJob(config, phase, folder.uri, f"phases/{phase.name}", record.inputs, record.signals)
    return job.absolute().settings()


def _take_over(source: Store, target: Store, settings: dict[str, JsonValue]) -> int | None:
    """Put the newest checkpoint (and best weights) of the phase `source` in the place of those of `target`, as if made
    with `settings`; its step, or None when there is none."""
    for last in (False, False, True):
        latest = Checkpoints(source / "checkpoints", 1).latest()
        if latest is None:
            return None
        try:
            _link_checkpoint(source, target, latest)
            break
        except (DataError, FileNotFoundError):  # the donor has dropped it for a newer one
            if last:
                raise
    assert latest is not None, "the loop ends with a checkpoint or not here"
    (target / BEST).delete(BEST_RECORD)
    if (source / BEST).exists(BEST_RECORD):
        for file in sorted((source / BEST).names(), key=lambda file: file == BEST_RECORD):
            link_file(source / BEST, target / BEST, file)
    progressed = latest.model_copy(update={"settings": settings})
    (target / "checkpoints").publish(f"{_step(latest)}.json", progressed.model_dump_json(indent=1))
    return latest.step


def _link_checkpoint(source: Store, target: Store, latest: Progressed) -> None:
    """The files of a checkpoint, all but its record, in the place of everything that the target has."""
    folder = source / "checkpoints" / _step(latest)
    files = folder.names()
    if len(files) != latest.num_ranks:
        raise DataError(f"{folder.uri}: wanted the files of {latest.num_ranks} ranks, found {len(files)}")
    for part in ("checkpoints", "candidates", "evaluations"):
        target.delete_folder(part)
    for file in files:
        link_file(folder, target / "checkpoints" / _step(latest), file)


def _step(progressed: Progressed) -> str:
    return f"step-{progressed.step:08}"
