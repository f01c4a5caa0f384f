"""The nodes that a growing cluster can have, read from the file that it was made with.

Such a cluster begins with its head alone, so what it has now says nothing about what it can have; and Ray's autoscaler
does not tell its drivers.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import JsonValue

from raydistill.config.yamlfile import read_yaml
from raydistill.errors import ConfigError

if TYPE_CHECKING:
    from raydistill.config.schema import ResourcesConfig

GPU = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class NodeType:
    """Nodes of one kind."""

    name: str
    resources: Mapping[str, float]
    """What one node has, by Ray's names: CPU, GPU, `accelerator_type:…`."""
    most: int
    """Most nodes of this type at a time."""

    def holds(self, cpus: float, gpus: float, accelerator: str | None) -> int:
        """Actors of this size that one node holds."""
        return places(self.resources, cpus, gpus, accelerator)


def places(node: Mapping[str, float], cpus: float, gpus: float, accelerator: str | None) -> int:
    """Actors of this size that an empty node holds. Shares of a GPU are of one GPU: two of 0.4 fit, not five on two."""
    if accelerator and not node.get(f"accelerator_type:{accelerator}"):
        return 0
    most = [int(node.get("CPU", 0) / cpus + 1e-6)] if cpus else []
    if gpus:
        has = node.get("GPU", 0)
        most.append(int(has) * int(1 / gpus + 1e-6) if gpus < 1 else int(has / gpus))
    return min(most, default=sys.maxsize)


Size: TypeAlias = tuple[float, float, str | None]
"""CPUs, GPUs and accelerator type of an actor."""


def left_beside(types: Sequence[NodeType], count: int, size: Size, spare: Size) -> tuple[NodeType, ...]:
    """The nodes, one by one, less `count` actors of `size`, each where it takes the place of the fewest of `spare`."""
    cpus, gpus, _ = size
    nodes = [kind.resources for kind in types for _ in range(kind.most)]
    stand = [0] * len(nodes)

    def left(index: int, actors: int) -> dict[str, float]:
        node = nodes[index]
        held = math.ceil(actors / int(1 / gpus + 1e-6)) if 0 < gpus < 1 else actors * gpus
        return {**node, "CPU": node.get("CPU", 0) - actors * cpus, "GPU": node.get("GPU", 0) - held}

    def lost(index: int) -> int:
        return places(left(index, stand[index]), *spare) - places(left(index, stand[index] + 1), *spare)

    for _ in range(count):
        free = [index for index, node in enumerate(nodes) if stand[index] < places(node, *size)]
        if free:  # what has no room at all is told elsewhere
            stand[min(free, key=lost)] += 1
    return tuple(NodeType("", left(index, actors), 1) for index, actors in enumerate(stand))


def require_places(
    types: Sequence[NodeType],
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
    """Raise `ConfigError` unless nodes of these types hold `count` actors of this size, each on one node.

    `file` is where the types are from, when they are those of a cluster that grows.
    """
    here = sum(kind.most * kind.holds(cpus, gpus, accelerator) for kind in types)
    if here >= count:
        return
    kinds: Counter[str] = Counter()
    for kind in types:
        kinds[_described(kind.resources)] += kind.most
    of_type = f" of type {accelerator}" if accelerator else ""
    wanted = f"{count} {what}{'s' * (count > 1)} with {cpus:g} CPU and {gpus:g} GPU each{of_type}"
    found = "; ".join(f"{n} node{'s' * (n > 1)} of {described}" for described, n in kinds.items()) or "no node"
    most = f" at most ({file})" if file else ""
    grows = "" if file else " (of one that grows by itself, name the file: resources.cluster)"
    raise ConfigError(
        f"{key}: wanted {wanted}, found room for {here} on {found}{most}. "
        f"Ask for less{remedy} or use a larger cluster{grows}."
    )


def require_beside(types: Sequence[NodeType], resources: ResourcesConfig, actors: int) -> None:
    """`require_places` for the fewest training workers while `actors` of `resources.teacher` hold their share."""
    teacher, train = resources.teacher, resources.train
    fewest = train.workers if isinstance(train.workers, int) else train.workers[0]
    if fewest:
        worker = (train.cpus, train.gpus, train.accelerator)
        left = left_beside(types, actors, (teacher.cpus, teacher.gpus, teacher.accelerator), worker)
        key = f"resources.train, beside {actors} actor{'s' * (actors > 1)} of resources.teacher"
        require_places(left, key, fewest, *worker, file=resources.cluster, what="worker")


def _described(node: Mapping[str, float]) -> str:
    kinds = sorted(name.removeprefix("accelerator_type:") for name in node if name.startswith("accelerator_type:"))
    return f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" + (f" ({', '.join(kinds)})" if kinds else "")


def node_types(file: str) -> tuple[NodeType, ...]:
    """The node types of a cluster-launcher file (`ray up`), or the groups of a KubeRay `RayCluster` or `RayJob`.

    Raises `ConfigError` when `file` is neither.
    """
    try:
        content, _ = read_yaml(Path(file))
    except ConfigError as error:
        raise ConfigError(f"resources.cluster: {error}") from error
    try:
        if isinstance(content.get("available_node_types"), dict):
            return _launcher(content)
        if content.get("kind") in ("RayCluster", "RayJob"):
            spec = _map(content["spec"])
            return _kuberay(_map(spec.get("rayClusterSpec", spec)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"resources.cluster: {file}: {type(error).__name__}: {error}") from error
    raise ConfigError(
        f"resources.cluster: {file}: wanted a file for `ray up` (with available_node_types) or a KubeRay manifest of "
        "kind RayCluster or RayJob."
    )


def _launcher(content: Mapping[str, JsonValue]) -> tuple[NodeType, ...]:
    found = []
    in_all = int(str(content.get("max_workers", 2)))  # Ray's default
    for name, node in _map(content["available_node_types"]).items():
        settings = _map(node)
        resources = {key: float(str(value)) for key, value in _map(settings.get("resources", {})).items()}
        head = name == content.get("head_node_type")
        most = 1 if head else min(in_all, int(str(settings.get("max_workers", in_all))))
        found.append(NodeType(name, resources, most))
    return tuple(found)


def _kuberay(spec: Mapping[str, JsonValue]) -> tuple[NodeType, ...]:
    found = [NodeType("head", _pod(_map(spec["headGroupSpec"])), 1)]
    groups = spec.get("workerGroupSpecs", [])
    assert isinstance(groups, list)
    for group in map(_map, groups):
        found.append(NodeType(str(group["groupName"]), _pod(group), int(str(group["maxReplicas"]))))
    return tuple(found)


def _pod(group: Mapping[str, JsonValue]) -> dict[str, float]:
    """Resources of a pod: its Ray container's limits (else requests), and over them what `rayStartParams` says."""
    containers = _map(_map(group["template"])["spec"])["containers"]
    assert isinstance(containers, list)
    asked = _map(_map(containers[0]).get("resources", {}))
    limits = {**_map(asked.get("requests", {})), **_map(asked.get("limits", {}))}
    resources = {"CPU": _quantity(limits.get("cpu", "0")), "GPU": _quantity(limits.get(GPU, "0"))}
    params = _map(group.get("rayStartParams", {}))
    for key, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        if key in params:
            resources[name] = float(str(params[key]))
    if "resources" in params:
        text = str(params["resources"]).strip("'\"").replace('\\"', '"')
        resources |= {key: float(value) for key, value in json.loads(text).items()}
    return resources


def _quantity(value: JsonValue) -> float:
    """A Kubernetes quantity of processors or devices: `2`, `"1.5"`, `"500m"`."""
    text = str(value)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _map(value: JsonValue | Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    if not isinstance(value, dict):
        raise TypeError(f"wanted a map, found {value!r}")
    return value
