"""Where the numbers of a training go: metrics.jsonl and TensorBoard always, W&B and MLflow when asked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from raydistill.config.schema import RunConfig, TrackingConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store, full_disk_explained

METRICS = "metrics.jsonl"


class Sink(Protocol):
    """Takes lines of metrics."""

    def write(self, line: Mapping[str, JsonValue]) -> None:
        """Take one line; it has `phase` and `step`."""

    def flush(self) -> None:
        """Make everything so far durable."""

    def close(self) -> None:
        """Flush and let go."""


def require_trackers(tracking: TrackingConfig) -> None:
    """`ConfigError` when a tracker is asked for whose package is not installed."""
    for key, value, package in (
        ("wandb_project", tracking.wandb_project, "wandb"),
        ("mlflow_experiment", tracking.mlflow_experiment, "mlflow"),
    ):
        if value is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.{key} wants the package {package}, which is not installed. "
                f"Install it (pip install 'raydistill[{package}]') or remove the key."
            )


class Metrics:
    """All sinks of one phase. Only rank 0 has one. A full disk is an `OutOfSpace`."""

    def __init__(self, store: Store, phase: str, step: int, config: RunConfig):
        """Lines of `phase` after `step` steps, left by an attempt that is being resumed, are cut away."""
        tracking, name = config.tracking, config.name
        require_trackers(tracking)
        self._phase, self._folder = phase, Path(store.uri)
        self._lines = JsonLines(store, phase, step)
        self._sinks: list[Sink] = [self._lines, TensorBoard(store, phase, step)]
        if tracking.wandb_project is not None:
            self._sinks.append(WandB(tracking.wandb_project, store, name, phase))
        if tracking.mlflow_experiment is not None:
            self._sinks.append(MlFlow(tracking.mlflow_experiment, name, phase))

    def write(self, step: int, values: Mapping[str, JsonValue]) -> None:
        """One line of metrics of optimizer step `step` (from 1: steps done)."""
        with full_disk_explained(self._folder):
            for sink in self._sinks:
                sink.write({"phase": self._phase, "step": step, **values})

    def evaluated(self) -> set[int]:
        """Steps of this phase that metrics.jsonl has an evaluation of."""
        entries = [json.loads(line) for line in self._lines.lines]
        return {e["step"] for e in entries if e["phase"] == self._phase and "evaluation" in e}

    def flush(self) -> None:
        """Make everything so far durable."""
        with full_disk_explained(self._folder):
            for sink in self._sinks:
                sink.flush()

    def close(self) -> None:
        """Flush and let go."""
        with full_disk_explained(self._folder):
            for sink in self._sinks:
                sink.close()


def flat(values: Mapping[str, JsonValue], prefix: str = "") -> dict[str, float]:
    """The numbers of nested metrics under names like `parts/kd`."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            numbers.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = float(value)
    return numbers


class JsonLines:
    """metrics.jsonl. Lines of this phase beyond the step that is resumed from are cut away first."""

    def __init__(self, store: Store, phase: str, step: int):
        self._store = store
        old = store.read_text(METRICS).splitlines(keepends=True) if store.exists(METRICS) else []
        # A last line without its end was being written when a process was killed.
        self.lines = [line.rstrip("\n") for line in old if line.endswith("\n") and _stays(line, phase, step)]
        store.publish(METRICS, "".join(f"{line}\n" for line in self.lines))

    def write(self, line: Mapping[str, JsonValue]) -> None:
        self.lines.append(json.dumps(line))
        if self._store.is_local:  # an object store has no appending: there, the file is put at each flush
            with open(self._store.path(METRICS), "a") as file:
                file.write(self.lines[-1] + "\n")

    def flush(self) -> None:
        if not self._store.is_local:
            self._store.publish(METRICS, "".join(f"{line}\n" for line in self.lines))

    def close(self) -> None:
        self.flush()


def _stays(line: str, phase: str, step: int) -> bool:
    entry = json.loads(line)
    return entry["phase"] != phase or entry["step"] <= step


class TensorBoard:
    """The same numbers as event files under tensorboard/."""

    def __init__(self, store: Store, phase: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._target = store / "tensorboard" / phase
        self._spool = None if store.is_local else tempfile.mkdtemp()
        folder = self._spool or self._target.path()
        self._writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=30)

    def write(self, line: Mapping[str, JsonValue]) -> None:
        step = int(str(line["step"]))
        for name, value in flat({k: v for k, v in line.items() if k != "step"}).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        if self._spool is not None:
            for path in Path(self._spool).iterdir():
                self._target.publish(path.name, path.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._spool is not None:
            shutil.rmtree(self._spool)


class WandB:
    """Weights & Biases; a resumed phase continues its run."""

    def __init__(self, project: str, store: Store, name: str, phase: str):
        import wandb

        key = hashlib.sha256(f"{store.uri}|{phase}".encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=f"{name}/{phase}", id=key, resume="allow")

    def write(self, line: Mapping[str, JsonValue]) -> None:
        self._run.log(flat(line), step=int(str(line["step"])))

    def flush(self) -> None:
        """W&B sends on its own."""

    def close(self) -> None:
        self._run.finish()


class MlFlow:
    """MLflow; the tracking server is the user's environment's business."""

    def __init__(self, experiment: str, name: str, phase: str):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=f"{name}/{phase}")

    def write(self, line: Mapping[str, JsonValue]) -> None:
        numbers = flat({k: v for k, v in line.items() if k != "step"})
        self._mlflow.log_metrics(numbers, step=int(str(line["step"])))

    def flush(self) -> None:
        """MLflow writes at once."""

    def close(self) -> None:
        self._mlflow.end_run()
