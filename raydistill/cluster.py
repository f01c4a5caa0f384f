"""The Ray cluster of this process: joined or started when a stage first needs it, and left at the end of the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import ray

from raydistill.config.paths import require_shared_folder
from raydistill.config.schema import RunConfig

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
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    require_shared_folder(config, num_nodes=sum(node["Alive"] for node in ray.nodes()))


@contextmanager
def session() -> Iterator[None]:
    """Leave (or stop) on exit the cluster that `connect` joined (or started) within."""
    before = ray.is_initialized()
    try:
        yield
    finally:
        if not before and ray.is_initialized():
            ray.shutdown()


def on_train_hardware(config: RunConfig, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` where the student trains: here with `workers: 0`, else on one worker's share of the cluster."""
    wanted = config.resources.train
    if wanted.workers == 0:
        return function(*args, **kwargs)
    connect(config)
    options: dict[str, Any] = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}
    if wanted.accelerator:
        options["accelerator_type"] = wanted.accelerator
    task = ray.remote(**options)(function)
    return ray.get(task.remote(*args, **kwargs))
