"""Pools of Ray actors that hold frozen teachers while a phase trains.

The driver has the pool; a rank finds its actor by name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raydistill import errors
from raydistill.config.answering import pool_size
from raydistill.errors import RaydistillError
from raydistill.train.job import PhaseJob

Failure = tuple[str, str] | None
"""Class and message of the `RaydistillError` that kept a teacher from being loaded: of errors while an actor is made,
Ray tells no more than their text."""


class Holder(Protocol):
    """A teacher in a process of its own; it speaks in NumPy arrays, which Ray hands on without a copy."""

    def ready(self) -> Failure:
        """Returns once the teacher is loaded."""


@dataclass(frozen=True)
class Pool:
    """What the actors of a pool are made of; sent to their processes."""

    kind: type[Holder]
    arguments: tuple[object, ...]


def failure_of(load: Callable[[], object]) -> Failure:
    """Load a teacher; what is wrong with it, if that is something that a user can mend."""
    try:
        load()
    except RaydistillError as error:
        return type(error).__name__, str(error)
    return None


@contextmanager
def actor_pools(job: PhaseJob, pools: Mapping[str, Pool], connect: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The actors of all `pools`, by name, until this is left; `connect` brings Ray up where there are any.

    `ConfigError` when the cluster has no room for them; a teacher that cannot be loaded raises what it raised.
    """
    if not pools:
        yield
        return
    import ray

    from raydistill.cache.pool import require_both, require_teachers

    connect()
    share, size = job.config.resources.teacher, pool_size(job.config.resources)
    require_teachers(job.config.resources, size * len(pools))
    require_both(job.config.resources, size * len(pools))
    logging.getLogger("ray").setLevel(logging.WARNING)
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 3, "max_task_retries": 3}
    if share.accelerator:
        options["accelerator_type"] = share.accelerator
    actors: list[Any] = []
    for name, pool in pools.items():
        kind: Any = ray.remote(**options)(pool.kind)
        actors += [kind.options(name=_name(job, name, index)).remote(*pool.arguments) for index in range(size)]
    try:
        for failure in ray.get([actor.ready.remote() for actor in actors]):
            if failure is not None:
                kind_of_error, message = failure
                raise getattr(errors, kind_of_error)(message)
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def actor_of(job: PhaseJob, name: str, rank: int) -> Any:
    """The actor of the pool `name` that answers a rank; several ranks may share it."""
    import ray

    return ray.get_actor(_name(job, name, rank % pool_size(job.config.resources)))


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as Ray sends it; bfloat16, which NumPy does not have, as fp32."""
    plain = tensor.detach().cpu()
    found: np.ndarray = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return found


def tensor(values: np.ndarray) -> Tensor:
    """What Ray sent, in memory of its own: Ray's is read-only."""
    return torch.from_numpy(np.array(values))


def _name(job: PhaseJob, name: str, index: int) -> str:
    place = hashlib.sha256(f"{job.run}|{job.folder}".encode()).hexdigest()[:12]
    return f"raydistill-{name}-{place}-{index}"
