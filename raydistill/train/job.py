"""What a phase is asked to do and what came of it, as plain data that travels between processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, JsonValue

from raydistill.cache.manifest import parsed
from raydistill.config.paths import placeless
from raydistill.config.schema import RunConfig
from raydistill.config.training import PhaseConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store

FINAL = "final"
RECORD = "phase.json"
"""Written last into `final/`; where it is, the phase is done."""


@dataclass(frozen=True)
class PhaseJob:
    """One phase of a run. Holds only plain data, so that it can be sent to another machine."""

    config: RunConfig
    phase: PhaseConfig
    run: str
    """URI of the run folder."""
    folder: str
    """Folder of this phase inside it: `phases/<name>` or `baseline/<name>`."""
    inputs: str
    """URI of the inputs cache."""
    signals: Mapping[str, str] = field(default_factory=dict)
    """URI of each teacher's signal cache."""
    student: str = ""
    """URI of the `init/` folder of the run."""
    weights: str | None = None
    """URI of the folder with the weights to start from, or of one file; None: those of `student`."""

    @property
    def store(self) -> Store:
        """The folder of this phase."""
        return Store(self.run) / self.folder

    @property
    def metrics_store(self) -> Store:
        """Where metrics.jsonl and tensorboard/ of this phase are."""
        run = Store(self.run)
        return run / "baseline" if self.folder.startswith("baseline/") else run

    def absolute(self) -> PhaseJob:
        """The same job with absolute local paths: workers have working folders of their own."""
        return replace(
            self,
            run=_absolute(self.run),
            inputs=_absolute(self.inputs),
            signals={name: _absolute(uri) for name, uri in self.signals.items()},
            student=_absolute(self.student),
            weights=None if self.weights is None else _absolute(self.weights),
        )

    def settings(self) -> dict[str, JsonValue]:
        """What decides the result of the phase; not how fast or on how many workers it is computed."""
        phase = self.phase.model_dump(mode="json")
        for key in ("log_every", "explode_factor", "zero"):
            del phase[key]
        del phase["batch"]["micro_size"]
        phase["recipe"].pop("online", None)  # who answers for a teacher, not what it says
        phase["checkpoint"] = {k: v for k, v in phase["checkpoint"].items() if k.startswith("best")}
        return {
            **{f"phase.{key}": value for key, value in phase.items()},
            "seed": self.config.seed,
            "student": placeless(self.config.student.model_dump(mode="json", exclude={"gradient_checkpointing"})),
            "inputs": _last(self.inputs),
            "signals": {name: _last(uri) for name, uri in sorted(self.signals.items())},
        }


MAY_CHANGE = ("phase.optimizer", "phase.steps", "phase.epochs", "phase.start_from", "phase.checkpoint")
"""Settings that may differ between a checkpoint and the run that continues it."""


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase."""

    folder: str
    """URI of the phase's folder; `final/` in it holds the weights."""
    steps: int
    samples: int
    tokens: int
    seconds: float
    """Time spent training, over all attempts."""


class _Record(BaseModel):
    """What is read of `final/phase.json`."""

    settings: dict[str, JsonValue]
    steps: int
    samples: int
    tokens: int
    seconds: float


def finished(job: PhaseJob) -> PhaseResult | None:
    """The result of a phase that is done; `ConfigError` when it was done with other settings."""
    final = job.store / FINAL
    if not final.exists(RECORD):
        return None
    remedy = "Remove this file: the phase goes on from its last checkpoint and writes it again."
    record = parsed(_Record, final.read(RECORD), where=f"{final.uri}/{RECORD}", remedy=remedy)
    require_same_settings(record.settings, job, allowed=())
    return PhaseResult(job.store.uri, record.steps, record.samples, record.tokens, record.seconds)


def require_same_settings(found: Mapping[str, JsonValue], job: PhaseJob, *, allowed: tuple[str, ...]) -> list[str]:
    """The allowed differences, as lines to show; `ConfigError` when there are others."""
    wanted = json.loads(json.dumps(job.settings()))
    differing = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
    lines = {k: f"  {k}: wanted {json.dumps(wanted.get(k))}, found {json.dumps(found.get(k))}" for k in differing}
    refused = [lines[k] for k in differing if k not in allowed]
    if refused:
        raise ConfigError(
            f"{job.store.uri} holds phase {job.phase.name!r} as trained with other settings:\n"
            + "\n".join(refused)
            + "\n"
            "Give the run another name (or run_dir), or move that folder away to train the phase again."
        )
    return [lines[k] for k in differing]


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]
