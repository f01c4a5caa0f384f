"""Runs a phase: on Ray Train's workers, or in the driver without Ray for `workers: 0`."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from raydistill.config.schema import TrainResources
from raydistill.errors import ConfigError, RaydistillError
from raydistill.memory import free_circles, keep_freed_memory
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.evaluation import (
    Report,
    evaluate_candidate,
    is_evaluation,
    log_evaluations,
    runs_beside,
    settle_candidate,
    waiting_candidates,
)
from raydistill.train.final import publish_final, write_weights
from raydistill.train.job import FINAL, PhaseJob, PhaseResult, finished
from raydistill.train.loop import train
from raydistill.train.metrics import Metrics, require_trackers
from raydistill.train.notices import Notices
from raydistill.train.online import score_pool
from raydistill.train.online_worlds import world_pools
from raydistill.train.prepare import prepare

if TYPE_CHECKING:
    from ray.train import Result, UserCallback
    from ray.train.torch import TorchTrainer

__all__ = ["PhaseJob", "PhaseResult", "train_phase"]
POLL_SECONDS = 1.0
SILENT_WORKER_SECONDS = 1800


def train_phase(
    job: PhaseJob,
    *,
    connect: Callable[[], None] = lambda: None,
    report: Report | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> PhaseResult:
    """Train one phase, from wherever an earlier attempt stopped; returns at once when it is done.

    Leaves `final/model.safetensors` (fp32; with averages also `final/ema.safetensors`) and, last, `final/phase.json` in
    the phase's folder. With workers, `connect` brings Ray up, when there is something to train, and `callbacks` go to
    Ray Train. Without, `report` gets the numbers of each logged step and evaluation.

    Raises what workers raise, as long as it is a `RaydistillError`; `ConfigError` when the cluster is too small.
    """
    job = job.absolute()
    require_trackers(job.config.tracking)
    done = finished(job)
    if done is not None:
        return done
    resources = job.config.resources.train
    with score_pool(job, connect), world_pools(job, connect):
        if resources.workers == 0:
            progressed = run_worker(job, report or _nobody)
        else:
            connect()
            require_room(resources, job.config.resources.cluster)
            progressed = _with_workers(job, callbacks)
    publish_final(job, progressed)
    result = finished(job)
    assert result is not None, "the record was just written"
    return result


def run_worker(job: PhaseJob, report: Report, leaving: Callable[[], bool] = lambda: False) -> Progressed:
    """What one rank does, from building the student to writing the last weights; `leaving` as in `loop.train`."""
    keep_freed_memory()
    free_circles()  # of a trial that was stopped in its midst, before this one in this process
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(job.config.resources.train.cpus)))
    progressed = _trained(job, report, leaving)
    torch.set_num_threads(threads)
    free_circles()
    return progressed


def _trained(job: PhaseJob, report: Report, leaving: Callable[[], bool]) -> Progressed:
    resources = job.config.resources.train
    device = torch.device("cuda", _local_gpu()) if resources.gpus > 0 else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepared = prepare(job, device)
    progressed = train(prepared, report, leaving)
    write_weights(prepared, job.store / FINAL)
    for engine in prepared.engines.values():
        engine.close()
    return progressed


def require_room(resources: TrainResources, cluster: str | None = None) -> None:
    """`ConfigError` when the cluster cannot hold the fewest workers; `cluster` is the file of one that grows."""
    from raydistill.cache.pool import require_cluster  # it brings Ray, which training in the driver does without

    fewest = resources.workers if isinstance(resources.workers, int) else resources.workers[0]
    remedy = " (resources.train.workers: 0 trains in the driver)"
    require_cluster(
        "resources.train", fewest, resources.cpus, resources.gpus, resources.accelerator,
        file=cluster, what="worker", remedy=remedy,
    )  # fmt: skip


def _with_workers(job: PhaseJob, callbacks: Sequence[UserCallback]) -> Progressed:
    """Train on Ray workers. When one is lost, all are replaced and go on from the last checkpoint.

    Ray Train would also retry an error that the user has to mend, so failures are counted here and not by Ray Train.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from raydistill.cache.board import Watched

    # Ray Train's patch of `print` shows every line twice. It passes this variable on to the workers.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    resources = job.config.resources.train
    workers = resources.workers
    failures, reached = 0, _saved(job)
    with _Beside(job) as beside, Watched() as watched:
        while True:
            trainer = TorchTrainer(
                _ray_worker,  # type: ignore[arg-type]
                train_loop_config={"job": job, "board": watched.board},
                torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo", timeout_s=SILENT_WORKER_SECONDS),
                scaling_config=ScalingConfig(
                    num_workers=workers,  # type: ignore[arg-type]
                    use_gpu=resources.gpus > 0,
                    resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
                    accelerator_type=resources.accelerator,
                    elastic_resize_monitor_interval_s=resources.grow_seconds,  # type: ignore[call-arg]
                ),
                run_config=RunConfig(
                    # Ray Train would take up an older run of the same name; checkpoints are ours.
                    name=f"{job.phase.name}-{uuid.uuid4().hex[:8]}",
                    storage_path=f"{job.store.uri}/ray_train",
                    failure_config=FailureConfig(max_failures=0),
                    callbacks=list(callbacks),  # type: ignore[arg-type]
                ),
            )
            try:
                progressed = _fit(trainer).return_value  # type: ignore[attr-defined]
                break
            except WorkerGroupError as error:
                _raise_own(error)
                before, reached = reached, _saved(job)
                failures = 1 if reached > before else failures + 1
                if 0 <= resources.max_failures < failures:
                    raise
                print(
                    f"phase {job.phase.name}: a worker was lost ({_first_lines(error)}); starting again from the last "
                    f"checkpoint ({failures} of {resources.max_failures} failures since a new one)",
                    flush=True,
                )
                require_room(resources, job.config.resources.cluster)  # the node of the lost worker may be lost too
        beside.drain()
    assert isinstance(progressed, Progressed)
    return progressed


def _saved(job: PhaseJob) -> int:
    """The step of the last checkpoint; 0 before the first."""
    latest = Checkpoints(job.store / "checkpoints", job.phase.checkpoint.keep).latest()
    return latest.step if latest is not None else 0


def _fit(trainer: TorchTrainer) -> Result:
    """`trainer.fit()`, in which Ctrl-C raises KeyboardInterrupt as everywhere else.

    On the main thread Ray Train would take SIGINT for itself and exit with status 0. (Fitting in another thread is no
    way out: it would still be waiting in Ray when Ray is shut down, which now and then crashes the process.)
    """
    trainer._register_sigint_handler = lambda controller: None  # type: ignore[attr-defined]
    return trainer.fit()


def _ray_worker(config: dict[str, Any]) -> Progressed:
    import ray.train

    from raydistill.cache import board

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # or it tells of every report
    job: PhaseJob = config["job"]

    def tell(values: Mapping[str, float]) -> None:
        # Ray Train takes one report in two seconds and makes the workers wait for it, so it is not told of every line.
        if is_evaluation(values) or values["step"] % job.phase.checkpoint.every_steps == 0:
            ray.train.report(dict(values))

    end = board.tell(config["board"])
    try:
        return run_worker(job, tell, Notices(job))
    finally:
        end()


def _raise_own(error: object) -> None:
    """Raise the `RaydistillError` of a worker, if one failed with that, as itself."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, RaydistillError):
                raise cause
            cause = getattr(cause, "cause", None) or cause.__cause__


class _Beside:
    """While workers train: starts a Ray task for every set of weights that waits to be evaluated."""

    def __init__(self, job: PhaseJob):
        self._job = job
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._watch, name="raydistill-evaluations", daemon=True)

    def __enter__(self) -> _Beside:
        if runs_beside(self._job):
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def drain(self) -> None:
        """Wait until all weights are evaluated; raises what an evaluation raised."""
        self._stop.set()
        if runs_beside(self._job):
            self._thread.join()
            if self._failures:
                raise self._failures[0]
            metrics = Metrics(self._job.metrics_store, self._job.phase.name, 1 << 62, self._job.config)
            log_evaluations(self._job.store, metrics, metrics.evaluated())
            metrics.close()

    def _watch(self) -> None:
        import ray

        resources = self._job.config.resources.train
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 3}
        if resources.accelerator:
            options["accelerator_type"] = resources.accelerator
        task = ray.remote(**options)(evaluate_candidate)
        running: dict[int, ray.ObjectRef] = {}
        while True:
            stopping = self._stop.is_set()
            for step in waiting_candidates(self._job.store):
                if step not in running:
                    running[step] = task.remote(self._job, step)
            for step, ref in list(running.items()):
                ready, _ = ray.wait([ref], timeout=0)
                if ready:
                    try:
                        ray.get(ref)
                        settle_candidate(self._job, step)
                    except BaseException as error:  # raised again by `drain`: a thread has nobody to tell
                        self._failures.append(getattr(error, "cause", None) or error)
                        return
                    del running[step]
            if stopping and not running:
                return
            self._stop.wait(POLL_SECONDS) if not stopping else threading.Event().wait(POLL_SECONDS)


def _local_gpu() -> int:
    if not torch.cuda.is_available():
        raise ConfigError(
            "resources.train.gpus: wanted a GPU, found none that torch can use. Set it to 0 to train on CPUs."
        )
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0


def _first_lines(error: BaseException) -> str:
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return "; ".join(f"rank {rank}: {str(f).strip().splitlines()[0][:80]}" for rank, f in failures.items() if str(f))


def _nobody(values: Mapping[str, float]) -> None:
    """Nobody listens."""
