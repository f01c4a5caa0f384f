"""From files and overrides to a validated `RunConfig`.

Files merge left to right, then come the overrides `key=value`. Problems are collected and reported together, each with
its dotted key, what was wanted, what was found, and the file and line where it stands.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import JsonValue, ValidationError
from pydantic_core import ErrorDetails

from raydistill.config.base import Config
from raydistill.config.merge import Node, Path, absolute, as_reference, assign, expand, merged, nearest, split_key, step
from raydistill.config.places import (
    DISCRIMINATORS,
    Annotation,
    child,
    default_tag,
    discriminator_of,
    is_free_map,
    keys_at,
    options,
    plain_default,
    section_at,
    sections,
    tags,
    wanted,
)
from raydistill.config.schema import RunConfig
from raydistill.config.yamlfile import described, parse_value, read_yaml
from raydistill.errors import ConfigError

OVERRIDE = re.compile(r"^[A-Za-z_][\w.\[\]-]*=")
"""What an override looks like on the command line."""

Origins = dict[Path, str]
"""Where the value at each path was set: a file and line, or the command line."""
S = TypeVar("S", bound=Config)


@dataclass(frozen=True)
class Draft:
    """A configuration that is read but not yet validated, so that values can still be set, any number of times."""

    tree: dict[str, Node]
    origins: Origins

    def config(self, settings: Mapping[str, JsonValue] | None = None, *, where: str = "settings") -> RunConfig:
        """The configuration with `{"a.0.b": value}` on top; `ConfigError` names every problem, with `where` as the
        place that set these values."""
        tree, origins = copy.deepcopy(self.tree), dict(self.origins)
        for key, value in (settings or {}).items():
            _set(tree, origins, key, value, where)
        return validated(tree, origins)


def load_config(
    files: Sequence[str | FilePath],
    overrides: Sequence[str] = (),
    settings: Mapping[str, JsonValue] | None = None,
) -> RunConfig:
    """The configuration in `files`, with the overrides (`"a.0.b=value"`) and then the settings (`{"a.0.b": value}`).

    `ConfigError` names every problem. Imports neither torch nor ray and reads no file but the given ones.
    """
    return read_draft(files, overrides).config(settings)


def read_draft(files: Sequence[str | FilePath], overrides: Sequence[str] = ()) -> Draft:
    """What stands in `files` and the overrides; `ConfigError` when it cannot be read or set."""
    origins: Origins = {}
    tree = _merge_files([FilePath(f) for f in files], origins)
    problems: list[str] = []
    for override in overrides:
        try:
            key, value = _parse_override(override)
            _set(tree, origins, key, value, "command line")
        except ConfigError as error:
            problems.append(str(error))
    _raise(problems)
    return Draft(tree, origins)


def read_section(file: str | FilePath, schema: type[S]) -> tuple[S, Origins]:
    """The section in a file of its own, whose dotted keys are names and not paths, and where its values stand."""
    data, lines = read_yaml(FilePath(file))
    origins = {path: f"{file}, line {line}" for path, line in lines.items() if path} | {(): str(file)}
    return _accepted(cast(dict[str, Node], data), schema, origins, {}), origins


def validated(tree: dict[str, Node], origins: Origins) -> RunConfig:
    """The tree with its interpolations resolved, as a `RunConfig`; `ConfigError` lists all problems."""
    _fill_interpolated_defaults(tree, RunConfig)
    copies = dict(_copies(tree, ()))
    return _accepted(_resolve(expand(tree, RunConfig), origins), RunConfig, origins, copies)


def _accepted(data: dict[str, Node], schema: type[S], origins: Origins, copies: Mapping[Path, Path]) -> S:
    """The data as a section of `schema`; `ConfigError` lists all problems."""
    problems = dict(_walk(data, schema, schema, (), origins))
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            for path, text in _explain(detail, data, schema, origins):
                problems.setdefault(path, text)
        shown = sorted(problems, key=lambda path: _order(path, schema))
        _raise([problems[path] for path in shown if not _is_copy(path, problems, copies)])
        raise
    _raise(list(problems.values()))
    return config


def _copies(node: Node, path: Path) -> Iterator[tuple[Path, Path]]:
    """The paths that are interpolations of whole nodes, and the paths they name."""
    if reference := as_reference(node):
        yield path, absolute(reference.target, path)
    for key, item in _items(node):
        yield from _copies(item, (*path, key))


def _is_copy(path: Path, problems: Mapping[Path, str], copies: Mapping[Path, Path]) -> bool:
    """Whether a problem is only the echo, through an interpolation, of another that is reported."""
    return any(
        path[: len(copy)] == copy and (*target, *path[len(copy) :]) in problems for copy, target in copies.items()
    )


def _merge_files(files: Sequence[FilePath], origins: Origins) -> dict[str, Node]:
    tree: Node = {}
    problems = []
    for file in files:
        try:
            data, lines = read_yaml(file)
            tree = merged(tree, data, RunConfig, str(file))
            origins.update({path: f"{file}, line {line}" for path, line in lines.items() if path})
        except ConfigError as error:
            problems.append(str(error))
    _raise(problems)
    assert isinstance(tree, dict)
    return tree


def _parse_override(text: str) -> tuple[str, JsonValue]:
    key, separator, value = text.partition("=")
    if not separator or not OVERRIDE.match(text):
        raise ConfigError(f"{text!r} (command line): wanted an override key=value, e.g. phases.0.batch.micro_size=8.")
    return key, parse_value(value, where=f"{key} (command line)")


def _set(tree: dict[str, Node], origins: Origins, key: str, value: JsonValue, where: str) -> None:
    path = split_key(key)
    assign(tree, path, value, RunConfig, where)
    for stale in [p for p in origins if p[: len(path)] == path]:
        del origins[stale]
    origins[path] = where


def _fill_interpolated_defaults(node: dict[str, Node], section: type[Config]) -> None:
    """Write defaults such as `runs/${name}` into the tree, so that they are interpolated like anything else."""
    for name, field in section.model_fields.items():
        default = field.default
        if isinstance(default, str) and "${" in default:
            node.setdefault(name, default)
        elif isinstance(default, Config) and "${" in str(plain_default(field)):
            below = node.setdefault(name, {})
            if isinstance(below, dict):
                _fill_interpolated_defaults(below, type(default))


def _resolve(tree: dict[str, Node], origins: Origins) -> dict[str, Node]:
    whole = OmegaConf.create(tree)
    try:
        data = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException:
        problems = [_interpolation_problem(text, path, tree, origins) for path, text in _interpolations(tree, ())]
        _raise([p for p in problems if p])
        raise
    assert isinstance(data, dict)
    return {str(k): v for k, v in data.items()}


def _interpolations(node: Node, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(node, str) and "${" in node:
        yield path, node
    for key, item in _items(node):
        yield from _interpolations(item, (*path, key))


def _interpolation_problem(text: str, path: Path, tree: dict[str, Node], origins: Origins) -> str | None:
    """What is wrong with one interpolated value; None when nothing is."""
    try:
        whole = OmegaConf.create(tree)
        found = OmegaConf.select(whole, ".".join(path), throw_on_missing=True)
        if OmegaConf.is_config(found):
            OmegaConf.to_container(found, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        near = ""
        if missing := re.search(r"key '([^']+)' not found", reason):
            if missing[1] not in text:
                return None  # the value that names it is reported
            node: Node = tree
            for key in split_key(missing[1]):
                below = step(node, key)
                if below is None:
                    near = nearest(key, node)
                    break
                node = below
            reason = f"there is no {missing[1]}"
        elif "Recursive" in reason:
            reason = "it leads to itself"
        return f"{_at(path, origins)}: cannot interpolate {text!r}: {reason}{near}."
    return None


def _walk(
    node: Node, annotation: Annotation, schema: type[Config], path: Path, origins: Origins
) -> Iterator[tuple[Path, str]]:
    """Problems that the schema's validation would word badly: unknown keys and sections, truth values as numbers.

    Writes the default discriminator into maps that leave it out.
    """
    if isinstance(node, dict) and sections(annotation):
        name, known = discriminator_of(annotation), tags(annotation)
        if name is not None and name not in node and len(known) > 1 and (tag := default_tag(annotation)):
            node[name] = tag
        section = section_at(annotation, node)
        if section is None and name is not None:
            found = node.get(name)
            near = difflib.get_close_matches(str(found), list(known), n=1)
            yield (
                (*path, name),
                f"{_at((*path, name), origins)}: wanted one of {', '.join(known)}, "
                f"{'found ' + described(found) if name in node else 'found nothing'}{_near(near)}.",
            )
            return
        for key in [k for k in node if section is not None and k not in section.model_fields]:
            yield (*path, key), _unknown_key(key, node, annotation, schema, path, origins)
    elif isinstance(node, bool):
        kinds = options(annotation)
        if bool not in kinds and (int in kinds or float in kinds) and not is_free_map(annotation):
            yield path, f"{_at(path, origins)}: wanted {wanted(annotation)}, found {described(node)}."
    for key, item in _items(node):
        yield from _walk(item, child(annotation, node, key)[0], schema, (*path, key), origins)


def _items(node: Node) -> Iterator[tuple[str, Node]]:
    """The elements of a map or list, with their keys in a path."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from ((str(index), item) for index, item in enumerate(node))


def _unknown_key(
    key: str, node: dict[str, Node], annotation: Annotation, schema: type[Config], path: Path, origins: Origins
) -> str:
    keys = keys_at(annotation, node)
    close, near = (difflib.get_close_matches(key, keys, n=1, cutoff=cutoff) for cutoff in (0.75, 0.5))
    owners = [tag for tag, section in tags(annotation).items() if key in section.model_fields]
    name = discriminator_of(annotation)
    elsewhere = None if close else _elsewhere(key, schema, ())
    if owners and name:
        hint = f"; it belongs to {name}: {' | '.join(owners)}, here {name} is {node.get(name, default_tag(annotation))}"
    elif elsewhere:
        hint = f"; there is {elsewhere}"
    elif near:
        hint = f"; nearest: {'.'.join((*path, near[0]))}"
    else:
        hint = f"; keys here: {', '.join(k for k in keys if k not in DISCRIMINATORS)}"
    return f"{_at((*path, key), origins)}: there is no such key{hint}."


def _elsewhere(key: str, annotation: Annotation, path: Path) -> str | None:
    """The first dotted key of the schema that ends in `key`."""
    for section in sections(annotation):
        for name, field in section.model_fields.items():
            if name == key:
                return ".".join((*path, name))
            inner: Annotation = field.annotation
            here = (*path, name)
            if not sections(inner):
                inner = child(inner, None, 0)[0]
                here = (*path, name, "<name>" if is_free_map(field.annotation) else "0")
            if found := _elsewhere(key, inner, here):
                return found
    return None


def _explain(detail: ErrorDetails, data: Node, schema: type[Config], origins: Origins) -> Iterator[tuple[Path, str]]:
    """One error of the schema's validation in our words: the path and the message."""
    path, annotation, value = _locate(detail["loc"], data, schema)
    kind = detail["type"]
    if kind in ("extra_forbidden", "union_tag_invalid", "union_tag_not_found"):
        return  # `_walk` has named these
    if kind == "too_short" and isinstance(value, list) and detail["ctx"]["actual_length"] < len(value):
        return  # an echo of the problems in its elements
    if kind == "missing":
        text = f"missing; wanted {wanted(annotation)}{_meaning(detail['loc'], data, schema)}"
        yield path, f"{_at(path, origins)}: {text}."
    elif kind == "value_error":
        for line in str(detail.get("ctx", {}).get("error", detail["msg"])).splitlines():
            key, separator, rest = line.partition(": ")
            inner = (*path, *split_key(key)) if separator and re.fullmatch(r"[\w.\[\]-]+", key) else path
            yield (*inner, line), f"{_at(inner, origins)}: {rest if inner != path else line}"
    else:
        near = difflib.get_close_matches(str(value), wanted(annotation).removeprefix("one of ").split(", "), n=1)
        yield path, f"{_at(path, origins)}: wanted {wanted(annotation)}, found {described(value)}{_near(near)}."


def _locate(location: tuple[int | str, ...], data: Node, schema: type[Config]) -> tuple[Path, Annotation, Node]:
    """Path, annotation and value at an error's location, without the labels that pydantic adds for unions."""
    path: Path = ()
    annotation: Annotation = schema
    node: Node = data
    for key in location:
        if isinstance(node, dict) and len(tags(annotation)) > 1 and str(key) in tags(annotation):
            annotation = tags(annotation)[str(key)]
            continue
        if annotation is None or (isinstance(key, str) and not isinstance(node, dict)):
            break
        below, _ = child(annotation, node, key)
        if below is None:
            break
        path, annotation = (*path, str(key)), below
        if isinstance(node, dict):
            node = node.get(str(key))
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
    return path, annotation, node


def _meaning(location: tuple[int | str, ...], data: Node, schema: type[Config]) -> str:
    """`: ` and the meaning of the field at a location, for a missing key."""
    _, parent, node = _locate(location[:-1], data, schema)
    section = section_at(parent, node) if isinstance(node, dict) else None
    field = section.model_fields.get(str(location[-1])) if section else None
    if field is None or not field.description:
        return ""
    return f" ({field.description.split('. ')[0].split('; ')[0].rstrip('.').replace(chr(10), ' ')})"


def _at(path: Path, origins: Origins) -> str:
    """The dotted key, and where it or the nearest place above it was set."""
    dotted = ".".join(path) or "the configuration"
    path = split_key(dotted)  # names in a free map may have dots
    for length in range(len(path), -1, -1):
        if origin := origins.get(path[:length]):
            return f"{dotted} ({origin})"
    return dotted


def _near(matches: list[str]) -> str:
    return f"; nearest: {matches[0]}" if matches else ""


def _order(path: Path, schema: type[Config]) -> tuple[tuple[int, str], ...]:
    """Schema order at the top, then text order with numbers by value."""
    fields = list(schema.model_fields)
    first = fields.index(path[0]) if path and path[0] in fields else len(fields)
    return ((first, ""), *((int(p), "") if p.isdigit() else (0, p) for p in path))


def _raise(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join((f"{len(problems)} problems in the configuration:", *problems)))
