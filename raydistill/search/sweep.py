"""A sweep from its space to its report: the caches once, then the trials, then the best of them like an ordinary run.

Leaves in the run folder sweep.json, sweep.csv and sweep.html, the best trial's export/, metrics.json and report.html,
and under sweep/trials/ a run folder per trial.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pyarrow import fs
from pydantic import JsonValue

from raydistill.cache.pool import require_cluster, room
from raydistill.claim import alone
from raydistill.cluster import connect, session
from raydistill.config.load import Draft
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import RunConfig
from raydistill.config.spaces import Point, settings
from raydistill.config.sweep import PopulationBased, SweepConfig
from raydistill.config.tune import Space, load_space
from raydistill.errors import ConfigError, RaydistillError
from raydistill.pipeline import Run, advance, begin, with_exports
from raydistill.report.sweep import render_sweep
from raydistill.search.accounting import account
from raydistill.search.caches import Caches, refuse_rebuilds
from raydistill.search.curve import read_outcome
from raydistill.search.feed import Learning, Listed
from raydistill.search.ledger import Ledger, TrialRecord, read_config, read_trial, write_config
from raydistill.search.results import Result, as_csv, as_json, best_of, labels, read_results
from raydistill.search.schedulers import make_scheduler, remember
from raydistill.search.trial import link_file
from raydistill.search.tuner import Source, Trials, run_trials
from raydistill.storage import Store
from raydistill.train.launch import require_room

BEGAN = "began.json"
"""When the first trial was made; the caches were finished by then."""
NEVER = 10**9
"""Steps between evaluations of a trial that is to be evaluated only at its end."""
POPULATION_KEEPS = 4
"""Checkpoints that members of a population keep, so that one is not gone before another has taken it over."""
AS_ORDINARY = ("init", "train", "evaluate", "checklist", "export", "report")
"""Stages of the best trial, in its own folder."""
SHOWN = ("metrics.json", "samples.json", "cache_stats.json", "report.html")
"""What the run folder then has of it, besides the export."""


def run_sweep(draft: Draft, file: str) -> None:
    """Search the space in `file` over the run `draft`, from wherever an earlier command stopped."""
    space = load_space(file, draft)
    if space.sweep.searcher == "optuna":
        from raydistill.search.optuna import require_optuna

        require_optuna()
    base = resolve_paths(space.base)
    with alone(base.run_dir), session():
        run = begin(base, ("inputs", "signals", "init"))
        ledger = Ledger(run.store)
        ledger.begin(space.sweep, run.config)
        sweep = _Sweep(space, run, ledger)
        sweep.build()
        sweep.search()
        sweep.conclude()


class _Sweep:
    """One command of a sweep."""

    def __init__(self, space: Space, run: Run, ledger: Ledger):
        self.space, self.run, self.ledger = space, run, ledger
        self.sweep: SweepConfig = space.sweep
        self.caches = Caches(run)
        self.results: dict[int, Result] = {}

    def configured(self, point: Point, number: int = 0) -> RunConfig:
        """The configuration of a trial."""
        base = self.run.config
        every = base.evaluate.every_steps or max((p.steps or NEVER for p in base.phases), default=NEVER)
        changes: dict[str, JsonValue] = {
            "name": f"{base.name}-{number:03}",
            "run_dir": self.ledger.folder(number).uri,
            "cache.dir": base.cache.dir,
            "evaluate.baseline": False,
            "evaluate.asynchronous": False,
            "evaluate.every_steps": every,
        }
        if isinstance(self.sweep.scheduler, PopulationBased):
            keep = max(base.phases[0].checkpoint.keep, POPULATION_KEEPS)
            changes["phases.0.checkpoint.keep"] = keep
        return with_exports(resolve_paths(self.space.config(point, changes)))

    def build(self) -> None:
        """The stages that all trials share. A value that would need other caches is refused as early as it is known, a
        trial for which the cluster has no room before the teachers run.
        """
        refuse_rebuilds(self.space, self.caches, self.configured)
        if not self.ledger.store.exists(BEGAN):
            connect(self.run.config)
            self.at_a_time()
        advance(self.run, ("inputs",))
        self.caches.built = "inputs"
        refuse_rebuilds(self.space, self.caches, self.configured)
        advance(self.run, ("signals",))
        self.caches.built = "signals"
        refuse_rebuilds(self.space, self.caches, self.configured)
        advance(self.run, ("verify",))
        if self.sweep.allow_rebuild:
            for number, point in enumerate(self.space.points() or []):
                self.caches.of(self.configured(point, number))
        if self.shared_init:
            advance(self.run, ("init",))
        if not self.ledger.store.exists(BEGAN):
            self.ledger.store.publish(BEGAN, json.dumps(time.time()))

    @cached_property
    def shared_init(self) -> str | None:
        """URI of the untrained student, where all trials begin with the same."""
        varied = any(key == "seed" or key.split(".")[0] == "student" for key in self.sweep.keys)
        return None if varied else f"{self.run.store.uri}/init"

    def add(self, number: int, point: Point, parameters: Mapping[str, JsonValue]) -> None:
        """Write a new trial down; `ConfigError` when the schema refuses its values together."""
        config = self.configured(point, number)
        reads = self.caches.of(config)
        record = TrialRecord(
            number=number,
            point=point,
            values=settings(self.sweep, point),
            parameters=dict(parameters),
            inputs=reads.inputs[0].uri,
            signals={name: store.uri for name, (store, _) in reads.signals.items()},
            init=self.shared_init,
            costs=(self.ledger.store / "costs" / _student_key(config)).uri,
        )
        self.ledger.add(record, config)

    def search(self) -> None:
        """Run the trials that are open, and make those that are not there yet."""
        records = self.ledger.trials()
        waiting = [r.number for r in records if r.status == "open" or (r.status == "failed" and r.again)]
        for record in records:
            if record.number in waiting:
                self.ledger.write(record.model_copy(update={"status": "open", "error": None, "again": False}))
        scheduler = make_scheduler(self.sweep, first_evaluation=self.run.config.evaluate.every_steps or NEVER)
        past = read_results(self.ledger)
        self.results = {r.record.number: r for r in past if r.record.number not in waiting}
        remember(scheduler, [(number, result.outcome) for number, result in self.results.items()])
        feed = Listed(self, waiting) if self.sweep.searcher != "optuna" else Learning(self, waiting, past)
        total, left = feed.total(), feed.left()
        if not left:
            return
        connect(self.run.config)
        most = self.at_a_time()
        print(f"sweep: {total} trials, {total - left} of them ended, {most} at a time", flush=True)
        source = Source(feed.next, feed.learn)
        run_trials(Trials(self.ledger, self.sweep, self.run.config, most, scheduler, source, self._say))

    def at_a_time(self) -> int:
        """Most trials at a time: what the cluster has room for, at least one, and no more than was asked for.

        `ConfigError` when it has no room for a single one.
        """
        train, cluster = self.run.config.resources.train, self.run.config.resources.cluster
        if train.workers == 0:
            require_cluster("resources.train", 1, train.cpus, file=cluster, what="trial")
            most = room(train.cpus)
        else:
            require_room(train, cluster)
            fewest = train.workers if isinstance(train.workers, int) else train.workers[0]
            most = room(train.cpus, train.gpus, train.accelerator) // fewest
            if isinstance(self.sweep.scheduler, PopulationBased) and most < (self.sweep.trials or 0):
                raise ConfigError(
                    f"scheduler: pbt trains all {self.sweep.trials} trials at a time, found room for {most} with "
                    f"{fewest} workers each; use a larger cluster, fewer trials or workers, or workers: 0."
                )
        if cluster or os.environ.get("RAYDISTILL_AUTOSCALING") == "1":
            return self.sweep.concurrent or max(most, 1)
        return max(1, min(most, self.sweep.concurrent or most))

    def _say(self, number: int) -> None:
        """One line about a trial that has ended."""
        folder, metric = self.ledger.folder(number), self.sweep.metrics[0]
        result = self.results[number] = Result(read_trial(folder), read_outcome(folder, read_config(folder)))
        names = labels(self.sweep, self.run.config)
        values = ", ".join(f"{names[key]} {_short(v)}" for key, v in result.record.values.items())
        if result.record.status == "failed":
            told = f"failed: {(result.record.error or 'no message').splitlines()[0]}"
        else:
            value = result.value(metric)
            told = f"{metric.name} {_short(value)} after {result.outcome.steps:,} steps"
            told += " (stopped early)" if result.record.status == "stopped" else ""
        best = best_of(list(self.results.values()), self.sweep)
        leader = f"; best so far {_short(best.value(metric))} of trial {best.record.id}" if best else ""
        print(f"trial {result.record.id} ({values}): {told}{leader}", flush=True)

    def conclude(self) -> None:
        """Finish the best trial like an ordinary run, and write the results."""
        results = read_results(self.ledger)
        best = best_of(results, self.sweep)
        self._write(results)
        if best is None:
            errors = sorted({r.record.error or "" for r in results if r.record.status == "failed"})
            raise RaydistillError(
                f"no trial of the sweep was trained to its end ({self.run.store.uri}/sweep.html)"
                + ("; " + "; ".join(errors[:3]) if errors else "")
            )
        self._publish_best(best)
        print(self._summary(results, best), flush=True)

    def _write(self, results: list[Result]) -> None:
        configs = {r.record.number: read_config(self.ledger.folder(r.record.number)) for r in results}
        began = float(json.loads(self.ledger.store.read_text(BEGAN)))
        accounting = account(self.caches.runs, results, configs, began=began)
        found = as_json(results, self.sweep, self.run.config, accounting)
        self.run.store.publish("sweep.json", json.dumps(found, indent=1))
        self.run.store.publish("sweep.csv", as_csv(results, self.sweep))
        self.run.store.publish("sweep.html", render_sweep(found))

    def _publish_best(self, best: Result) -> None:
        folder = self.ledger.folder(best.record.number)
        own = read_config(folder)
        config = own.model_copy(update={"evaluate": self.run.config.evaluate})
        run = begin(config, AS_ORDINARY)
        if "train" not in run.stages:  # the trial was trained by Ray Tune, and not as a stage
            run.spent("train", best.outcome.seconds)
        advance(run, AS_ORDINARY)
        write_config(folder, own)
        _copy_folder(folder / "export", self.run.store / "export")
        for name in SHOWN:
            if folder.exists(name):
                link_file(folder, self.run.store, name)

    def _summary(self, results: list[Result], best: Result) -> str:
        store = self.run.store
        lines = ["", f"best trial: {best.record.id}"]
        lines += [f"  {key}: {_short(value)}" for key, value in best.record.values.items()]
        lines += [f"  {m.name}: {_short(best.value(m))}" for m in self.sweep.metrics]
        failed = [r.record.id for r in results if r.record.status == "failed"]
        lines += [f"failed: {', '.join(failed)} (sweep.json says why)"] if failed else []
        return "\n".join([*lines, "", f"report: {store.uri}/sweep.html", f"model:  {store.uri}/export"])


def _student_key(config: RunConfig) -> str:
    """The same for trials whose students cost the same."""
    shape = config.student.model_dump_json(exclude={"gradient_checkpointing"})
    return hashlib.sha256(shape.encode()).hexdigest()[:16]


def _copy_folder(source: Store, target: Store) -> None:
    """Put the files of `source` in the place of folder `target`, which is never seen half there on a file system."""
    files = [
        info.path
        for info in source.filesystem.get_file_info(fs.FileSelector(source.root, recursive=True))
        if info.is_file
    ]
    names = [path.removeprefix(source.root).lstrip("/") for path in files]
    part = target
    if target.is_local:
        part = Store(f"{Path(target.path()).parent}/.tmp-{uuid.uuid4().hex[:8]}")
    else:
        target.filesystem.delete_dir_contents(target.path(), missing_dir_ok=True)
    for name in sorted(names, key=lambda name: name == "README.md"):
        link_file(source, part, name)
    if target.is_local:
        if target.exists():
            target.filesystem.delete_dir(target.path())
        Path(part.path()).rename(target.path())


def _short(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
