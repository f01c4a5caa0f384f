"""A pool of Ray actors around plain workers: room for it, work for it, its errors and its progress.

A worker is made once per actor and called once per item; only names and small records travel, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from raydistill import errors
from raydistill.config.nodes import NodeType, node_types, places, require_beside, require_places
from raydistill.config.schema import ResourcesConfig, TeacherResources
from raydistill.errors import RaydistillError
from raydistill.memory import keep_freed_memory
from raydistill.progress import Progress
from raydistill.signals import JsonValue

Worker = Callable[[Any], dict[str, JsonValue]]
"""Does one item of work and says what came of it."""


def require_cluster(
    key: str,
    count: int,
    cpus: float,
    gpus: float = 0,
    accelerator: str | None = None,
    *,
    file: str | None = None,
    what: str = "actor",
    remedy: str = "",
) -> None:
    """Raise `ConfigError` when the cluster can never hold `count` actors of this size, instead of waiting for ever.

    The places are counted node by node: those of the nodes that the cluster has, or, where it grows, of the node types
    in its `file` (`resources.cluster`). With RAYDISTILL_AUTOSCALING=1 and no file nothing is refused. `remedy` is what
    else the user may do.
    """
    types = _types(file)
    if types is not None:
        require_places(types, key, count, cpus, gpus, accelerator, file=file, what=what, remedy=remedy)


def require_both(resources: ResourcesConfig, actors: int) -> None:
    """`require_cluster` for the fewest training workers while `actors` teachers hold their share of the cluster."""
    types = _types(resources.cluster)
    if types is not None:
        require_beside(types, resources, actors)


def _types(file: str | None) -> tuple[NodeType, ...] | None:
    """What nodes there are, or can be; None when nobody can say."""
    if file is not None:
        return node_types(file)
    if os.environ.get("RAYDISTILL_AUTOSCALING") == "1":
        return None
    return tuple(NodeType("", node["Resources"], 1) for node in ray.nodes() if node["Alive"])


def require_teachers(resources: ResourcesConfig, count: int | None = None) -> None:
    """`require_cluster` for `count` actors of `resources.teacher`; by default the fewest that it names."""
    share = resources.teacher
    require_cluster(
        "resources.teacher", share.actors[0] if count is None else count, share.cpus, share.gpus, share.accelerator,
        file=resources.cluster,
    )  # fmt: skip


def room(cpus: float, gpus: float = 0, accelerator: str | None = None) -> int:
    """Actors of this size that the nodes hold which the cluster has now."""
    return sum(places(node["Resources"], cpus, gpus, accelerator) for node in ray.nodes() if node["Alive"])


def map_over_actors(
    make: Callable[[], Worker],
    items: Sequence[Any],
    *,
    cpus: float,
    actors: tuple[int, int],
    gpus: float = 0,
    accelerator: str | None = None,
    overlap: bool = False,
) -> Iterator[dict[str, Any]]:
    """`make()` once per actor, then its result called on every item; results in the order in which they are ready.

    `actors` are the fewest and the most; with `overlap`, an actor works on two items at a time, in two threads. A
    worker's `RaydistillError` is raised here as itself.
    """
    if items:
        yield from _outcomes(make, items, cpus=cpus, actors=actors, gpus=gpus, accelerator=accelerator, overlap=overlap)


def _outcomes(
    make: Callable[[], Worker],
    items: Sequence[Any],
    *,
    cpus: float,
    actors: tuple[int, int],
    gpus: float,
    accelerator: str | None,
    overlap: bool,
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = max(1, min(actors[1], len(items)))
    pool = ray.data.ActorPoolStrategy(
        min_size=min(max(1, actors[0]), most),
        max_size=most,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2 if overlap else 1,
        enable_true_multi_threading=overlap,
    )
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus or None}
    if accelerator:
        options["accelerator_type"] = accelerator
    data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    results = data.map_batches(
        Guarded, fn_constructor_args=(make,), batch_size=1, batch_format="numpy", compute=pool, **options
    )
    for row in results.iter_rows():
        outcome = json.loads(row["outcome"])
        if "error" in outcome:
            raise getattr(errors, outcome["error"])(outcome["message"])
        yield outcome["value"]


def map_shards(
    make: Callable[[Any], Callable[[], Worker]],
    pending: Sequence[str],
    costs: Mapping[str, int],
    share: TeacherResources,
    *,
    label: str,
    unit: str,
) -> Iterator[dict[str, Any]]:
    """`map_over_actors` over the shards `pending`, with a progress bar that moves inside shards too.

    `costs` are the units of work of every shard of the cache, done or not. `make(tally)` gives what makes a worker,
    which tells how far it is with `tally.set.remote(shard, units)` and whose result names its `shard`.
    """
    if not pending:
        return
    todo = {name: costs.get(name, 0) for name in pending}
    total = sum(costs.values())
    done = total - sum(todo.values())
    with Progress(label, total=total, unit=unit, done=done) as progress, Ticker(progress, todo) as ticker:
        for outcome in map_over_actors(
            make(ticker.tally), pending, cpus=share.cpus, gpus=share.gpus, accelerator=share.accelerator,
            actors=share.actors, overlap=True,
        ):  # fmt: skip
            ticker.finished(outcome["shard"])
            yield outcome


class Guarded:
    """An actor of Ray Data around a worker: an error meant for the user comes back as a value, message and all.

    As an exception it would reach the driver wrapped into Ray's own, and one in `__init__` would be retried for ever.
    """

    def __init__(self, make: Callable[[], Worker]):
        keep_freed_memory()  # work is done in threads, where it would cost most
        self._error: RaydistillError | None = None
        try:
            self._work = make()
        except RaydistillError as error:
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        try:
            if self._error is not None:
                raise self._error
            outcome: dict[str, JsonValue] = {"value": self._work(batch["item"][0])}
        except RaydistillError as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        return {"outcome": [json.dumps(outcome)]}


def beside_the_driver(kind: type) -> Any:
    """An actor of `kind` that takes no room, on the node of the driver, so that no other node takes it along."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(kind).remote()


class Tally:
    """Units of work done of each shard that is being worked on."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def set(self, shard: str, units: int) -> None:
        self._done[shard] = units

    def read(self) -> dict[str, int]:
        return self._done


class Ticker:
    """Moves the progress bar while shards are still being computed."""

    def __init__(self, progress: Progress, todo: Mapping[str, int], seconds: float = 2.0):
        self._progress, self._todo, self._seconds = progress, dict(todo), seconds
        self._finished: set[str] = set()
        self._shown = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.tally: Any = beside_the_driver(Tally)

    def __enter__(self) -> Ticker:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def finished(self, shard: str) -> None:
        """A record has arrived."""
        self._finished.add(shard)
        self._show({})

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._show(ray.get(self.tally.read.remote()))

    def _show(self, done: Mapping[str, int]) -> None:
        with self._lock:
            now = sum(n if name in self._finished else min(done.get(name, 0), n) for name, n in self._todo.items())
            if now > self._shown:
                self._progress.advance(now - self._shown, note=f"{len(self._finished)}/{len(self._todo)} shards")
                self._shown = now

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        ray.kill(self.tally)
