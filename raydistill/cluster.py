"""The Ray cluster of this process: joined or started when a stage first needs it, and left at the end of the run."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import ray

from raydistill import progress
from raydistill.cache.board import Watched, measured_by_ray, tell
from raydistill.cache.pool import require_cluster
from raydistill.config.paths import require_shared_folder
from raydistill.config.schema import RunConfig, TeacherResources, TrainResources

P = ParamSpec("P")
R = TypeVar("R")


def connect(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; a run joins none by accident."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # The driver shows the progress of every stage itself; what workers print goes to Ray's own logs.
    polite_kill = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, polite_kill)  # Ray puts a plain exit in its place
    measured_by_ray()
    require_shared_folder(config, num_nodes=sum(node["Alive"] for node in ray.nodes()))


@contextmanager
def session() -> Iterator[None]:
    """Leave (or stop) on exit the cluster that `connect` joined (or started) within."""
    before, watchers = ray.is_initialized(), progress.watchers[:]
    try:
        yield
    finally:
        progress.watchers[:] = watchers  # metrics of a cluster that is left have nowhere to go
        if not before and ray.is_initialized():
            ray.shutdown()


def on_train_hardware(config: RunConfig, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` where the student trains: here with `workers: 0`, else on one worker's share of the cluster."""
    share = config.resources.train
    if share.workers == 0:
        return function(*args, **kwargs)
    return _on_cluster(config, "resources.train", share, function, *args, **kwargs)


def on_teacher_hardware(config: RunConfig, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` where a teacher runs: here when teachers need no GPU, else on one actor's share of the cluster.

    The process ends with the call, and with it the teacher's hold on the GPU.
    """
    share = config.resources.teacher
    if share.gpus == 0:
        return function(*args, **kwargs)
    return _on_cluster(config, "resources.teacher", share, function, *args, **kwargs)


def _on_cluster(
    config: RunConfig,
    key: str,
    share: TrainResources | TeacherResources,
    function: Callable[P, R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    connect(config)
    require_cluster(key, 1, share.cpus, share.gpus, share.accelerator, file=config.resources.cluster)
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_calls": 1}
    options["scheduling_strategy"] = "SPREAD"  # the default would stay inside the share of a trial that asks
    if share.accelerator:
        options["accelerator_type"] = share.accelerator
    with Watched() as watched:
        found: R = ray.get(ray.remote(**options)(_told).remote(watched.board, function, *args, **kwargs))
    return found


def _told(board: Any, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in a worker whose progress and lines the driver shows."""
    end = tell(board)
    try:
        return function(*args, **kwargs)
    finally:
        end()
