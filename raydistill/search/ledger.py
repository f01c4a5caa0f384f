"""What a sweep knows of its trials, as files of the run folder: enough to go on after a kill at any moment.

    sweep/sweep.json                 the space and the run that it varies, which must not change
    sweep/trials/<id>/trial.json     one trial: its point, its caches, how it ended
    sweep/trials/<id>/…              its run folder: config.json, config.yaml, init/, phases/, metrics.jsonl

A trial is written down before it starts, and how it ended after it has ended. What it has measured stands in its
metrics.jsonl, so nothing is told twice, and trials that were running when everything was killed simply go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import yaml
from pydantic import BaseModel, Field, JsonValue

from raydistill.cache.manifest import parsed
from raydistill.claim import CONFIG, FREE, claim, flat
from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.config.sweep import SweepConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store

FOLDER = "sweep"
SWEEP = "sweep.json"
TRIAL = "trial.json"
FREE_SWEEP = ("trials", "concurrent", "allow_rebuild", "metrics", "scheduler")
"""Settings that may change between two commands of one sweep: the trials that are there keep their meaning."""
MEASURES = ("evaluate.max_rows", "evaluate.images.draws_per_row", "evaluate.images.timestep_bins")
"""Settings of the evaluation that trials must share to be comparable."""
Status = Literal["open", "done", "stopped", "failed"]


class TrialRecord(Config):
    """One trial."""

    number: int
    """Its place in the order of the sweep, from 0."""
    point: dict[str, JsonValue]
    """Its values by dimension of the space; those of now, where they have changed inside the run."""
    values: dict[str, JsonValue]
    """The same by key of the run."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """What Optuna suggested, from which the point was made."""
    inputs: str
    """URI of its inputs cache."""
    signals: dict[str, str]
    """URI of each teacher's signal cache."""
    init: str | None
    """URI of the folder with the untrained student that it shares with others; None: it makes its own."""
    costs: str = ""
    """URI of the folder in which trials with the same student share what it costs."""
    status: Status = "open"
    """`open`: waiting or running; `stopped`: ended early by the scheduler."""
    error: str | None = None
    """Why it failed."""
    again: bool = False
    """Whether the next command should try a failed trial again."""
    seconds: float = 0.0
    """Time that its process had it, over all attempts."""
    taken_from: tuple[tuple[int, int], ...] = ()
    """Trials (and their steps) whose weights it took over."""

    @property
    def id(self) -> str:
        """Name of its folder."""
        return f"{self.number:03}"


class _Begun(BaseModel):
    """sweep.json."""

    sweep: dict[str, JsonValue]
    run: dict[str, JsonValue]


class Ledger:
    """The trials of one sweep."""

    def __init__(self, run: Store):
        self.run = run
        self.store = run / FOLDER

    def begin(self, sweep: SweepConfig, base: RunConfig) -> None:
        """Write down what is searched; `ConfigError` when the folder holds trials of another space or run."""
        new = _Begun(sweep=_lasting(sweep.model_dump(mode="json")), run=_defining(base))
        if self.store.exists(SWEEP) and self.trials():  # a space that was refused before its first trial may be mended
            remedy = "Put back what was there, or set another name or run_dir."
            old = parsed(_Begun, self.store.read(SWEEP), where=f"{self.store.uri}/{SWEEP}", remedy=remedy)
            changed = [
                f"  {part}{key}: it has {was.get(key)}, this command {now.get(key)}"
                for part, was, now in (("", old.run, new.run), ("space file: ", old.sweep, new.sweep))
                for key in sorted({*was, *now})
                if was.get(key) != now.get(key)
            ]
            if changed:
                raise ConfigError(
                    f"{self.store.uri} holds a sweep that was made otherwise. These keys differ:\n"
                    + "\n".join(changed[:8])
                    + "\nSet another name or run_dir, or remove that folder."
                )
        self.store.publish(SWEEP, json.dumps(new.model_dump(), indent=1))

    def folder(self, number: int) -> Store:
        """The run folder of a trial."""
        return self.store / "trials" / f"{number:03}"

    def add(self, record: TrialRecord, config: RunConfig) -> None:
        """Write a new trial down, with the configuration under which it can be run alone."""
        folder = self.folder(record.number)
        write_config(folder, config)
        folder.publish(TRIAL, record.model_dump_json(indent=1))

    def write(self, record: TrialRecord) -> None:
        """Write down how a trial stands."""
        self.folder(record.number).publish(TRIAL, record.model_dump_json(indent=1))

    def trials(self) -> list[TrialRecord]:
        """The trials that are there, by number."""
        names = sorted(int(name) for name in (self.store / "trials").folders() if name.isdigit())
        return [read_trial(self.folder(number)) for number in names if self.folder(number).exists(TRIAL)]


def read_trial(folder: Store) -> TrialRecord:
    """The trial of a folder."""
    where, remedy = f"{folder.uri}/{TRIAL}", "Remove the folder of this trial to have it made again."
    return parsed(TrialRecord, folder.read(TRIAL), where=where, remedy=remedy)


class _Claimed(BaseModel):
    """config.json."""

    config: dict[str, JsonValue] = Field(default_factory=dict)


def read_config(folder: Store) -> RunConfig:
    """The configuration of a trial."""
    where, remedy = f"{folder.uri}/{CONFIG}", "Remove the folder of this trial to have it made again."
    return RunConfig.model_validate(parsed(_Claimed, folder.read(CONFIG), where=where, remedy=remedy).config)


def write_config(folder: Store, config: RunConfig) -> None:
    """The configuration of a trial as config.json, and as a file for the command line."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    head = "# One trial of a sweep. `python -m raydistill.run` with this file evaluates and exports it where it is,\n"
    folder.publish("config.yaml", f"{head}# and with another run_dir trains it anew.\n{text}")
    claim(folder, config)


def _lasting(sweep: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    kept = {key: value for key, value in sweep.items() if key not in FREE_SWEEP}
    return dict(flat("", kept))


def _defining(base: RunConfig) -> dict[str, JsonValue]:
    """What of a run decides its trials."""
    dumped = base.model_dump(mode="json", exclude={"name"})
    return {key: value for key, value in flat("", dumped) if key in MEASURES or not FREE.match(key)}
