"""Runs the trials of a sweep on Ray Tune: as many at a time as there is room for, in processes that are used again.

Ray Tune chooses, starts, stops and retries; the ledger remembers. An earlier command's trials are not restored from Ray
Tune's own snapshots, which lag behind: its searcher and its scheduler are told of them, and the open ones go on.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.tune.trainable import wrap_function

from raydistill.config.schema import RunConfig
from raydistill.config.sweep import PopulationBased, SweepConfig
from raydistill.errors import ConfigError, RaydistillError, TrainingDiverged
from raydistill.search.ledger import Ledger, read_trial
from raydistill.storage import Store

FAILURE = "failure.json"
WHOSE = "trial"
"""The only file of what Ray Tune takes for a checkpoint: the number of the trial whose newest one is meant."""
COORDINATOR_BYTES = 500e6
"""Memory that is booked for the process of a trial whose training has workers of its own."""
UNWIND_SECONDS = 60
"""How long a process may take to leave a trial that was stopped before it is replaced."""
Report = Callable[[int], None]


@dataclass(frozen=True)
class Trials:
    """What is to be run."""

    ledger: Ledger
    sweep: SweepConfig
    base: RunConfig
    at_a_time: int
    """Most trials at a time."""
    scheduler: tune.schedulers.TrialScheduler
    source: Source
    ended: Report
    """Called with the number of a trial that has ended."""


class Source(Searcher):
    """Gives Ray Tune the trials to run, by number.

    `next` returns None when there is no more. `learn` is told how each trial has ended: its number, and its last report
    or None.
    """

    def __init__(self, next: Callable[[], int | None], learn: Callable[[int, Mapping[str, float] | None], None]):
        super().__init__()
        self._next, self._learn = next, learn
        self._numbers: dict[str, int] = {}
        self.common: dict[str, Any] = {}
        """What every trial is given besides its number."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number = self._next()
        if number is None:
            return Searcher.FINISHED  # type: ignore[return-value]
        self._numbers[trial_id] = number
        return {"of": {"trial": number, **self.common}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._learn(self._numbers[trial_id], None if error else result)

    def all(self) -> list[int]:
        """Every number that is still to be run, for a scheduler that takes no searcher."""
        return [*iter(self._next, None)]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""


class _Book(tune.Callback):
    """Writes down how trials end."""

    def __init__(self, trials: Trials, places: Sequence[int] | None):
        self._trials, self._places = trials, places
        self._started: dict[int, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._started.setdefault(self._number(trial), time.monotonic())

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = self._number(trial)
        complete = bool((trial.last_result or {}).get("complete"))
        self._end(number, status="done" if complete else "stopped", error=None, again=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = self._number(trial)
        folder = self._trials.ledger.folder(number)
        if folder.exists(FAILURE):
            found = json.loads(folder.read_text(FAILURE))
        else:
            found = {"error": "its process died (out of memory, or a node was lost)", "again": True}
        self._end(number, status="failed", **found)

    def _number(self, trial: Trial) -> int:
        """A population's trials get the whole configuration of those they take over; only their place stays."""
        if self._places is not None:
            return self._places[place_of(trial.trial_id)]
        return int(trial.config["of"]["trial"])

    def _end(self, number: int, **changes: Any) -> None:
        ledger = self._trials.ledger
        record = read_trial(ledger.folder(number))
        seconds = record.seconds + time.monotonic() - self._started.pop(number, time.monotonic())
        ledger.write(record.model_copy(update={**changes, "seconds": round(seconds, 3)}))
        self._trials.ended(number)


def place_of(trial_id: str) -> int:
    """Place of a trial in the list that Ray Tune was given, out of an id like `5f3a1_00003`."""
    return int(trial_id.rsplit("_", 1)[1])


def run_trials(trials: Trials) -> None:
    """Run until no trial is left. A trial that fails is tried once more; that it failed again is in the ledger."""
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the ledger has the errors of trials
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    common = {"run": trials.ledger.run.uri, "wanted": [metric.name for metric in trials.sweep.metrics]}
    places: list[int] | None = None
    search: dict[str, Any] = {"search_alg": trials.source, "num_samples": -1}
    search["max_concurrent_trials"] = trials.at_a_time
    space: dict[str, Any] | None = None
    trials.source.common = common
    if isinstance(trials.sweep.scheduler, PopulationBased):  # which takes no searcher
        places = trials.source.all()
        if not places:
            return
        records = [read_trial(trials.ledger.folder(number)) for number in places]
        members = [{"trial": r.number, "point": r.point, "values": r.values, "places": places} for r in records]
        space, search = {"of": tune.grid_search([{**member, **common} for member in members])}, {"num_samples": 1}
    tuner = tune.Tuner(
        tune.with_resources(_Process, _resources(trials.base)),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=trials.scheduler,
            # A process with workers of its own cannot be stopped without ending.
            reuse_actors=trials.base.resources.train.workers == 0,
            **search,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=(trials.ledger.store / "ray").uri,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_Book(trials, places)],
        ),
    )
    try:
        _fit(tuner)
    finally:
        trials.ledger.store.delete_folder("ray")


def _resources(base: RunConfig) -> tune.PlacementGroupFactory:
    """What the process of a trial books: what it trains with, or with workers of its own no processor at all, since
    the last trial that fits would otherwise wait for ever for its last worker."""
    train = base.resources.train
    return tune.PlacementGroupFactory(
        [{"CPU": train.cpus} if train.workers == 0 else {"memory": COORDINATOR_BYTES}], strategy="PACK"
    )


def _fit(tuner: tune.Tuner) -> None:
    """`tuner.fit()` in another thread: on the main one, Ray Tune takes Ctrl-C for itself and seems to be done."""
    outcome: Future[None] = Future()

    def fit() -> None:
        try:
            tuner.fit()
            outcome.set_result(None)
        except BaseException as error:  # raised again on the main thread
            outcome.set_exception(error)

    threading.Thread(target=fit, name="raydistill-tune", daemon=True).start()
    outcome.result()


def _trial(config: dict[str, Any]) -> None:
    """The process of a trial; `config["of"]` says which, and for one of a population also its values."""
    # Here, not at the top: a process is asked for a trial before it has loaded torch.
    from raydistill.search.trial import adopt, complete_adoption, train_trial

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(UNWIND_SECONDS)
    of = config["of"]
    ledger = Ledger(Store(of["run"]))
    number = of["places"][place_of(tune.get_context().get_trial_id())] if "places" in of else of["trial"]
    folder = ledger.folder(number)
    folder.delete(FAILURE)

    def tell(values: Mapping[str, float]) -> None:
        if "places" not in of:
            tune.report(dict(values))
            return
        with tempfile.TemporaryDirectory() as path:  # the weights are in the trial's own folder
            Path(path, WHOSE).write_text(str(number))
            tune.report(dict(values), checkpoint=tune.Checkpoint.from_directory(path))

    checkpoint = tune.get_checkpoint()
    _left.clear()
    try:
        complete_adoption(ledger, number)
        if "mark" in of and checkpoint is not None:
            with checkpoint.as_directory() as path:
                donor = int(Path(path, WHOSE).read_text())
            adopt(ledger, number, donor, of["point"], of["values"], of["mark"])
        train_trial(folder, tell, wanted=of["wanted"], told=checkpoint is not None)
    except Exception as error:
        again = not isinstance(error, TrainingDiverged | ConfigError)
        text = str(error) if isinstance(error, RaydistillError) else f"{type(error).__name__}: {error}"
        folder.publish(FAILURE, json.dumps({"error": text.strip(), "again": again}))
        raise
    finally:
        _left.set()


_left = threading.Event()
"""Set while this process is in no trial."""
_left.set()


class _Process(wrap_function(_trial)):  # type: ignore[misc]
    """The process of trials, which ends only when it has left the last one: it may have workers to send home."""

    def cleanup(self) -> None:
        super().cleanup()
        _left.wait(UNWIND_SECONDS)
