"""Reading YAML so that every value knows its line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import yaml
from pydantic import JsonValue

from raydistill.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain YAML data, with `3e-4` a number and a date a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
               r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip

Lines = dict[tuple[str, ...], int]
"""Line (from 1) of the value at each path."""


def read_yaml(path: Path) -> tuple[dict[str, JsonValue], Lines]:
    """The map in a YAML file, and the line of each of its values; `ConfigError` when it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration file{_similar_file(path)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}).") from error
    lines: Lines = {}
    value = _parse(text, str(path), lines)
    if value is None:
        return {}, lines
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: wanted a map of keys at the top, found {described(value)}.")
    return value, lines


def parse_value(text: str, *, where: str) -> JsonValue:
    """The YAML value of one override."""
    return _parse(text, where, {})


def _parse(text: str, where: str, lines: Lines) -> JsonValue:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, (), lines, where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem}{context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}".replace("\n", " ")) from error
    except ValueError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}.") from error
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, path: tuple[str, ...], lines: Lines, where: str) -> JsonValue:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, str(i)), lines, where) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    written = [str(key.value) for key, _ in node.value if not key.tag.endswith(":merge")]
    for key, _ in node.value:
        if written.count(str(key.value)) > 1:
            raise ConfigError(f"{where}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice.")
    loader.flatten_mapping(node)
    result: dict[str, JsonValue] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}, line {key.start_mark.line + 1}: a key must be a name.")
        name = str(key.value)
        lines[(*path, *name.split("."))] = key.start_mark.line + 1
        result[name] = _value(loader, item, (*path, *name.split(".")), lines, where)
    return result


def described(value: object) -> str:
    """What a value is, in words for an error message."""
    if isinstance(value, dict):
        return f"a map with the keys {', '.join(map(str, value))}" if value else "an empty map"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _similar_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor the folder {folder})"
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; nearest: {folder / near[0]}" if near else ""
