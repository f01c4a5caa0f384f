"""Writes docs/configuration.md, docs/sweeps.md and docs/raydistill.schema.json: `python -m raydistill.config.docs`.

`--compare` writes nothing and exits with 1 when a file differs from what the schema says; CI runs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raydistill.config.base import Config
from raydistill.config.places import (
    DISCRIMINATORS,
    Annotation,
    child,
    default_tag,
    discriminator_of,
    field_wanted,
    is_free_map,
    plain_default,
    sections,
    tags,
)
from raydistill.config.schema import STAGES, RunConfig
from raydistill.config.sweep import SweepConfig

Members: TypeAlias = tuple[type[Config], ...]
"""The sections that may stand at a place."""

FOLDER = Path(__file__).parents[2] / "docs"
INTRODUCTION = f"""\
# Configuration

Every key of a run, its type, default and meaning. This page is written by `python -m raydistill.config.docs`.

```
python -m raydistill.run FILE [FILE ...] [key=value ...] [--stages NAMES | --tune FILE] [--check | --plan] [--debug]
```

* **Files merge left to right.** Maps merge, lists are replaced, and a map whose `kind`, `signal` or `library` changes
  is replaced, since its other keys belonged to something else.
* **Dotted keys reach inside**, in a file as on the command line; a number is a position in a list:
  `phases.0.batch.micro_size: 8` in a file, `phases.0.batch.micro_size=8` as an override. Overrides come last, and their
  values are YAML: `evaluate.every_steps=null`, `resources.train.workers=[4,8]`.
* **`${{a.0.b}}` stands for the value at another key**, a whole map included: `recipe: "${{phases.0.recipe}}"`. A change
  below such a map (`phases.1.recipe.alpha=0.5`) changes a copy: the map it came from stays as it is.
  `${{oc.env:NAME}}` reads an environment variable.
* **Relative paths** are taken against `$RAYDISTILL_HOME`, else against the working folder. Files to read are looked for
  in both. In a Ray job, whose working folder is temporary, runs go to `~/raydistill` unless `$RAYDISTILL_HOME` is set,
  which a cluster of several nodes requires.
* **`--check`** validates and does nothing else; **`--plan`** says what the run will cost; **`--stages`** runs just the
  named ones of {", ".join(f"`{s}`" for s in STAGES)}.
* **Editors** complete and check the keys with [raydistill.schema.json](raydistill.schema.json): begin a file with
  `# yaml-language-server: $schema=<path to it>`.

"""
SWEEPS = """\
# Sweeps

Every key of a search space, its type, default and meaning; [tune/README.md](../tune/README.md) says how they are used.
This page is written by `python -m raydistill.config.docs`.

```
python -m raydistill.run FILE [FILE ...] [key=value ...] --tune SPACE [--check]
```

What a trial costs beyond its training, on two cores with `resources.train.workers: 0`: the first 5.0 s, which starts
the process, each later one 0.22 s (median of 7); the same configuration as a command of its own 9.2 s (median of 3).
Measured by `python benchmarks/sweep_overhead.py FOLDER 8` ([result](../benchmarks/results/sweep_overhead.json)).

"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    return _page(INTRODUCTION, RunConfig)


def sweeps_markdown() -> str:
    """The text of docs/sweeps.md."""
    return _page(SWEEPS, SweepConfig)


def _page(introduction: str, schema: type[Config]) -> str:
    parts = [introduction.rstrip()]
    for title, text in _parts("", schema, 2, {}):
        parts.append(f"{title}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _parts(path: str, annotation: Annotation, level: int, seen: dict[Members, str]) -> Iterator[tuple[str, str]]:
    """Title and text of the sections at `path` and below; `seen` says where a section stood before."""
    members, name, known = sections(annotation), discriminator_of(annotation), tags(annotation)
    if members in seen:
        yield f"{'#' * level} `{path}`", f"The same keys as [`{seen[members]}`](#{_anchor(seen[members], annotation)})."
        return
    seen[members] = path
    if len(members) > 1:
        choices = ", ".join(f"`{tag}`" for tag in known)
        default = f" (default: `{default_tag(annotation)}`)" if default_tag(annotation) else ""
        yield f"{'#' * level} `{path}`", f"`{name}` is one of {choices}{default}."
        level += 1
    for section in members:
        tag = next((t for t, s in known.items() if s is section), None)
        yield f"{'#' * level} {_title(path, name, tag, section)}", _section(section)
        for key, field in section.model_fields.items():
            here = f"{path}.{key}" if path else key
            inner: Annotation = field.annotation
            if not sections(inner):
                here += ".<name>" if is_free_map(inner) else ".N"
                inner = child(inner, None, 0)[0]
            if sections(inner):
                yield from _parts(here, inner, level + 1 if path else level, seen)


def _title(path: str, name: str | None, tag: str | None, section: type[Config]) -> str:
    if not path:
        return "The sweep" if section is SweepConfig else "The run"
    return f"`{path}` with `{name}: {tag}`" if tag else f"`{path}`"


def _anchor(path: str, annotation: Annotation) -> str:
    """The anchor that renderers make of the first heading about `path`."""
    known = tags(annotation)
    only = f" with {discriminator_of(annotation)} {next(iter(known))}" if len(known) == 1 else ""
    return "".join(c for c in f"{path}{only}".lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _section(section: type[Config]) -> str:
    lines = [_paragraph(section.__doc__ or "")]
    rows = []
    for key, field in section.model_fields.items():
        if key in DISCRIMINATORS and plain_tag(field):
            continue
        cells = (f"`{key}`", _cell(_code(field_wanted(field))), _default(field), _cell(field.description or ""))
        rows.append("| " + " | ".join(cells) + " |")
    if rows:
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines)


def _code(words: str) -> str:
    """The words with a regular expression marked as code."""
    before, matching, pattern = words.partition("matching ")
    return f"{before}matching `{pattern}`" if matching else words


def plain_tag(field: FieldInfo) -> bool:
    """Whether a discriminator has only the one value that its section's title names."""
    return field_wanted(field).startswith("'")


def _paragraph(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, Config):
        tag = next((str(getattr(field.default, n)) for n in DISCRIMINATORS if hasattr(field.default, n)), None)
        return f"`{tag}`" if tag and len(sections(field.annotation)) > 1 else "as below"
    return f"`{json.dumps(plain_default(field), ensure_ascii=False)}`"


def json_schema() -> dict[str, JsonValue]:
    """The JSON Schema for editors.

    Wider than the schema itself: a file may hold a part of the keys (others merge in), dotted keys, and interpolations
    where another type is wanted. What is complete and consistent is for `--check` to say.
    """
    schema = _loosened(RunConfig.model_json_schema())
    assert isinstance(schema, dict)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _loosened(node: JsonValue) -> JsonValue:
    if isinstance(node, list):
        return [_loosened(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _loosened(value) for key, value in node.items() if key not in ("required", "discriminator", "title")}
    if "oneOf" in result:  # without required keys, several may fit
        result["anyOf"] = result.pop("oneOf")
    properties = node.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {key: _or_interpolation(_loosened(value)) for key, value in properties.items()}
        if node.get("additionalProperties") is False:
            result["patternProperties"] = {r"^[^.\[]+[.\[].*$": {"description": "a dotted key"}}
    return result


def _or_interpolation(node: JsonValue) -> JsonValue:
    if not isinstance(node, dict) or (node.get("type") == "string" and not {"enum", "const", "pattern"} & set(node)):
        return node
    result: dict[str, JsonValue] = {"anyOf": [node, {"type": "string", "pattern": r"\$\{.+\}"}]}
    for key in ("description", "default"):
        if key in node:
            result[key] = node.pop(key)
    return result


def files() -> dict[Path, str]:
    """What the files of docs/ should hold."""
    return {
        FOLDER / "configuration.md": markdown(),
        FOLDER / "sweeps.md": sweeps_markdown(),
        FOLDER / "raydistill.schema.json": json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n",
    }


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with `--compare` say which ones differ."""
    if list(arguments) not in ([], ["--compare"]):
        print("usage: python -m raydistill.config.docs [--compare]", file=sys.stderr)
        return 2
    status = 0
    for path, text in files().items():
        if not arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what the schema says; run python -m raydistill.config.docs", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
