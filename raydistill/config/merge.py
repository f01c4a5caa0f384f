"""Merging configuration maps, and setting single values by dotted key.

Maps merge, lists are replaced, and a map whose discriminator changes is replaced. A dotted key reaches into maps and
lists. A change below an interpolation (`recipe: "${phases.0.recipe}"`) is a change of a copy: the node becomes a
`Reference`, which is expanded once everything is merged, so that the order of the changes does not matter.
"""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import JsonValue

from raydistill.config.places import Annotation, child, default_tag, discriminator_of, is_list
from raydistill.config.yamlfile import described
from raydistill.errors import ConfigError

Path: TypeAlias = tuple[str, ...]

_WHOLE = re.compile(r"^\$\{(\.*[^${}:.][^${}:]*)\}$")
"""A text that is one interpolation of a node, not of a resolver such as `${oc.env:HOME}`."""


@dataclass
class Reference:
    """An interpolation of a whole node, with changes on top."""

    target: str
    """What stands between the braces."""
    changes: list[tuple[Path, JsonValue, str]] = field(default_factory=list)
    """Path below the node, new value, and who set it."""


Node: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | Reference | None"


def split_key(key: str) -> Path:
    """The path of a dotted key; `phases[0].steps` is read like `phases.0.steps`."""
    return tuple(re.sub(r"\[(\d+)\]", r".\1", key).split("."))


def as_reference(node: Node) -> Reference | None:
    """The node as a reference, where it is one or is the text of one."""
    if isinstance(node, Reference):
        return node
    match = _WHOLE.match(node) if isinstance(node, str) else None
    return Reference(match[1]) if match else None


def merged(base: Node, new: JsonValue, annotation: Annotation, where: str, at: Path = ()) -> Node:
    """`new` on top of `base`; dotted keys inside `new` are followed after its plain keys."""
    if not isinstance(new, dict):
        return [merged(None, item, child(annotation, new, i)[0], where, (*at, str(i))) for i, item in enumerate(new)] \
            if isinstance(new, list) else new  # fmt: skip
    if reference := as_reference(base):
        reference.changes.append(((), new, where))
        return reference
    result: dict[str, Node] = dict(base) if isinstance(base, dict) and not _replaces(base, new, annotation) else {}
    hint: dict[str, object] = {**result, **new}
    for name in sorted(new, key=lambda name: "." in name or "[" in name):
        path = split_key(name)
        below = child(annotation, hint, path[0])
        result[path[0]] = _assigned(result.get(path[0]), path[1:], new[name], below, where, (*at, path[0]))
    return result


def assign(root: dict[str, Node], path: Path, value: JsonValue, annotation: Annotation, where: str) -> None:
    """Set the value at `path`, in place; `ConfigError` when the path cannot be followed."""
    below = child(annotation, root, path[0])
    root[path[0]] = _assigned(root.get(path[0]), path[1:], value, below, where, path[:1])


def _assigned(node: Node, path: Path, value: JsonValue, place: tuple[Annotation, object], where: str, at: Path) -> Node:
    annotation, default = place
    if not path:
        return merged(node, value, annotation, where, at)
    if reference := as_reference(node):
        reference.changes.append((path, value, where))
        return reference
    key = path[0]
    if node is None and is_list(annotation):
        node = [*default] if isinstance(default, list) else []
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            choices = f"0 to {len(node) - 1}" if len(node) > 1 else "only 0" if node else "no element"
            raise ConfigError(
                f"{'.'.join((*at, key))} ({where}): {'.'.join(at)} is a list of {len(node)}; "
                f"wanted an index that it has ({choices}), found {key!r}."
            )
        below = child(annotation, node, int(key))
        items = list(node)
        items[int(key)] = _assigned(items[int(key)], path[1:], value, below, where, (*at, key))
        return items
    if node is None or isinstance(node, dict):
        result: dict[str, Node] = dict(node or {})
        below = child(annotation, result, key)
        result[key] = _assigned(result.get(key), path[1:], value, below, where, (*at, key))
        return result
    raise ConfigError(
        f"{'.'.join((*at, key))} ({where}): {'.'.join(at)} is {described(node)}, nothing can be set below it."
    )


def _replaces(base: dict[str, Node], new: dict[str, JsonValue], annotation: Annotation) -> bool:
    name = discriminator_of(annotation)
    if name is None or name not in new:
        return False
    return bool(base) and base.get(name, default_tag(annotation)) != new[name]


def expand(root: dict[str, Node], annotation: Annotation) -> dict[str, Node]:
    """Replace every `Reference` by a copy of its target with the changes on top."""
    expanding: list[Path] = []

    def visit(node: Node, path: Path) -> Node:
        if isinstance(node, Reference):
            return expanded(node, path)
        if isinstance(node, dict):
            for key in node:
                node[key] = visit(node[key], (*path, key))
        elif isinstance(node, list):
            for index, item in enumerate(node):
                node[index] = visit(item, (*path, str(index)))
        return node

    def expanded(reference: Reference, path: Path) -> Node:
        where = reference.changes[-1][2]
        if path in expanding:
            raise ConfigError(f"{'.'.join(path)} ({where}): the interpolation ${{{reference.target}}} leads to itself.")
        expanding.append(path)
        node = copy.deepcopy(fetch(absolute(reference.target, path), path, where))
        place = annotation_at(path)
        for below, value, who in reference.changes:
            node = _assigned(node, below, value, (place, None), who, path)
        node = visit(node, path)
        expanding.pop()
        return node

    def annotation_at(path: Path) -> Annotation:
        place: Annotation = annotation
        node: Node = root
        for key in path:
            place = child(place, node, key)[0]
            node = step(node, key)
        return place

    def fetch(target: Path, path: Path, where: str) -> Node:
        node: Node = root
        for index, key in enumerate(target):
            parent, node = node, step(node, key)
            if node is None:
                near = nearest(key, parent)
                raise ConfigError(
                    f"{'.'.join(path)} ({where}): the interpolation ${{{'.'.join(target)}}} names nothing: there is no "
                    f"{'.'.join(target[: index + 1])}{near}."
                )
            if isinstance(node, Reference):
                node = expanded(node, target[: index + 1])
            elif plain := as_reference(node):
                node = fetch(absolute(plain.target, target[: index + 1]), path, where)
        return node

    result = visit(root, ())
    assert isinstance(result, dict)
    return result


def absolute(target: str, path: Path) -> Path:
    """The path that an interpolation at `path` names; each leading dot of a relative one goes up a level."""
    name = target.lstrip(".")
    dots = len(target) - len(name)
    return (*path[: len(path) - dots], *split_key(name)) if dots else split_key(name)


def step(node: Node, key: str) -> Node:
    """What lies at `key` below `node`; None where nothing does."""
    if isinstance(node, dict):
        return node.get(key)
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    return None


def nearest(key: str, node: Node) -> str:
    """`; nearest: …` with the closest key of a node, or the indices of a list."""
    if isinstance(node, list):
        return f" (the list has {len(node)})"
    near = difflib.get_close_matches(key, list(node), n=1, cutoff=0.5) if isinstance(node, dict) else []
    return f"; nearest: {near[0]}" if near else ""
