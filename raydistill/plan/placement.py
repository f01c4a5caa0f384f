"""On which nodes of a growing cluster the stages of a run will stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydistill.config.answering import actors_beside
from raydistill.config.nodes import NodeType, node_types, require_beside, require_places
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ENCODED
from raydistill.config.world import WorldTeacher
from raydistill.plan.words import block


@dataclass(frozen=True, slots=True)
class Placement:
    """What one stage asks for, and where it fits."""

    stage: str
    wanted: str
    """Actors and the size of each."""
    nodes: tuple[tuple[str, int, int], ...]
    """Node types that hold at least one actor, with the fewest and the most nodes of the type if it serves alone."""


def place(config: RunConfig) -> tuple[Placement, ...]:
    """The stages on the nodes of `resources.cluster`; nothing when no cluster is named.

    Raises `ConfigError` when a stage asks for what the cluster can never have.
    """
    resources = config.resources
    if resources.cluster is None:
        return ()
    types, teacher, train = node_types(resources.cluster), resources.teacher, resources.train
    found = [_stage(types, config, "decode", "inputs", (1, 1), resources.decode.cpus, 0, None)]
    size = (teacher.cpus, teacher.gpus, teacher.accelerator)
    if isinstance(config.source, ENCODED):
        found.append(_stage(types, config, "teacher", "inputs", teacher.actors, *size))
    if any(not isinstance(t, WorldTeacher) or t.online == "no" for t in config.teachers):
        found.append(_stage(types, config, "teacher", "signals", teacher.actors, *size))
    if train.workers != 0:
        workers = (train.workers, train.workers) if isinstance(train.workers, int) else train.workers
        found.append(_stage(types, config, "train", "train", workers, train.cpus, train.gpus, train.accelerator))
    if actors := actors_beside(config):
        found.append(_stage(types, config, "teacher", "beside train", (actors, actors), *size))
        require_beside(types, resources, actors)
    return tuple(found)


def placement_table(config: RunConfig) -> str:
    """`place` for a terminal; empty when no cluster is named."""
    lines = []
    for stage in place(config):
        nodes = [
            f"{name}: {fewest} node{'s' * (most > 1 or fewest > 1)}"
            if fewest == most
            else f"{name}: {fewest} to {most} nodes"
            for name, fewest, most in stage.nodes
        ]
        lines.append((stage.stage, f"{stage.wanted} on {' or '.join(nodes)}"))
    return block(f"Nodes ({config.resources.cluster})", lines) if lines else ""


def _stage(
    types: tuple[NodeType, ...],
    config: RunConfig,
    key: str,
    stage: str,
    actors: tuple[int, int],
    cpus: float,
    gpus: float,
    accelerator: str | None,
) -> Placement:
    fewest, most = actors
    file = config.resources.cluster
    require_places(types, f"resources.{key}", fewest, cpus, gpus, accelerator, file=file)
    nodes = []
    for kind in types:
        holds = kind.holds(cpus, gpus, accelerator)
        if holds:
            nodes.append((kind.name, math.ceil(fewest / holds), min(kind.most, math.ceil(most / holds))))
    count = str(fewest) if fewest == most else f"{fewest} to {most}"
    of_type = f" of type {accelerator}" if accelerator else ""
    return Placement(stage, f"{count} × ({cpus:g} CPU, {gpus:g} GPU{of_type})", tuple(nodes))
