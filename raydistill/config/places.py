"""Walking the schema: which keys a place of the configuration has, what they default to and what is wanted there.

A place is a type annotation of the schema together with the value that stands there, since the value's discriminator
decides which section of a union is meant.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias, Union, get_args, get_origin

import annotated_types
from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raydistill.config.base import Config

Annotation: TypeAlias = object
"""A type annotation; Python has no common type for these."""

DISCRIMINATORS = ("kind", "signal", "library")
"""Keys that say which section of a union a map is."""


def sections(annotation: Annotation) -> tuple[type[Config], ...]:
    """The configuration sections that may stand where `annotation` is asked for; empty where none may."""
    found = (option for option in options(annotation))
    return tuple(o for o in found if isinstance(o, type) and issubclass(o, Config))


def options(annotation: Annotation) -> tuple[Annotation, ...]:
    """The alternatives of an annotation: the members of a union without None, else the annotation itself."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(o for member in get_args(annotation) if member is not types.NoneType for o in options(member))
    return (annotation,)


def discriminator_of(annotation: Annotation) -> str | None:
    """The key that tells the sections of a union (or a section that will be in one) apart; None where there is none."""
    members = sections(annotation)
    for name in DISCRIMINATORS:
        if members and all(get_origin(_bare(m, name)) is Literal for m in members):
            return name
    return None


def _bare(section: type[Config], name: str) -> Annotation:
    field = section.model_fields.get(name)
    return None if field is None else field.annotation


def tags(annotation: Annotation) -> dict[str, type[Config]]:
    """The sections of a union by the value of its discriminator."""
    name = discriminator_of(annotation)
    if name is None:
        return {}
    return {str(tag): m for m in sections(annotation) for tag in get_args(m.model_fields[name].annotation)}


def default_tag(annotation: Annotation) -> str | None:
    """The discriminator's value where the map does not give it; None when it must be given."""
    name = discriminator_of(annotation)
    defaults = [m.model_fields[name].default for m in sections(annotation)] if name else []
    return next((str(d) for d in defaults if d is not PydanticUndefined), None)


def section_at(annotation: Annotation, value: object) -> type[Config] | None:
    """The section that the map `value` is meant to be; None when it cannot be told or no section stands there."""
    members = sections(annotation)
    if len(members) == 1:
        return members[0]
    name = discriminator_of(annotation)
    if name is None or not isinstance(value, Mapping):
        return None
    return tags(annotation).get(str(value.get(name, default_tag(annotation))))


def child(annotation: Annotation, value: object, key: str | int) -> tuple[Annotation, object]:
    """Annotation and default of what lies at `key` below a place; (None, None) where the schema has nothing."""
    section = section_at(annotation, value)
    if section is not None:
        field = section.model_fields.get(str(key))
        return (None, None) if field is None else (_with_metadata(field), plain_default(field))
    for option in options(annotation):
        arguments = get_args(option)
        if get_origin(option) is tuple and str(key).isdigit():
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return arguments[0], None
            if int(key) < len(arguments):
                return arguments[int(key)], None
        if get_origin(option) is dict:
            return arguments[1], None
    return None, None


def _with_metadata(field: FieldInfo) -> Annotation:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def plain_default(field: FieldInfo) -> JsonValue:
    """A field's default as plain JSON data; None where there is none."""
    if field.default is PydanticUndefined:
        return None
    default = field.default
    if isinstance(default, Config):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def keys_at(annotation: Annotation, value: object) -> tuple[str, ...]:
    """The keys that a map may have at a place; empty where any key is allowed or no map belongs."""
    section = section_at(annotation, value)
    return tuple(section.model_fields) if section is not None else ()


def is_list(annotation: Annotation) -> bool:
    """Whether only a list may stand at a place."""
    return all(get_origin(o) is tuple for o in options(annotation))


def is_free_map(annotation: Annotation) -> bool:
    """Whether a map with keys of the user's choice may stand at a place."""
    return any(get_origin(o) is dict for o in options(annotation))


_BOUNDS = ((annotated_types.Ge, "ge", "≥"), (annotated_types.Gt, "gt", ">"),
           (annotated_types.Le, "le", "≤"), (annotated_types.Lt, "lt", "<"))  # fmt: skip


def wanted(annotation: Annotation) -> str:
    """What is wanted at a place, in words: `a whole number ≥ 1`, `one of bf16, fp32`, `a list of texts`."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        words, null, _ = wanted(inner).partition(" or null")
        return words + _bounds(metadata) + null
    if get_origin(annotation) in (Union, types.UnionType):
        members = get_args(annotation)
        if len(sections(annotation)) == len([m for m in members if m is not types.NoneType]):
            choices = [_section_words(annotation)]
        else:
            choices = [wanted(m) for m in members if m is not types.NoneType]
        return " or ".join([*choices, *(["null"] if types.NoneType in members else [])])
    return _single(annotation)


def _single(annotation: Annotation) -> str:
    names: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        values = [str(a).lower() if isinstance(a, bool) else str(a) for a in arguments]
        return (
            (values[0] if isinstance(arguments[0], bool) else repr(values[0]))
            if len(values) == 1
            else f"one of {', '.join(values)}"
        )
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list [{', '.join(wanted(a) for a in arguments)}]"
    if origin is dict:
        return f"a map from names to {_plural(arguments[1])}"
    return _section_words(annotation) if sections(annotation) else "any value"


def _plural(annotation: Annotation) -> str:
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    names: dict[object, str] = {int: "whole numbers", float: "numbers", str: "texts"}
    try:
        known = names.get(bare)
    except TypeError:
        known = None
    return known or ("maps" if sections(annotation) else "values")


def _section_words(annotation: Annotation) -> str:
    known = tags(annotation)
    if len(known) > 1:
        return f"a map with {discriminator_of(annotation)}: {' | '.join(known)}"
    return "a map"


def _bounds(metadata: Sequence[object]) -> str:
    parts = []
    for item in [m for outer in metadata for m in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]:
        parts += [f"{sign} {getattr(item, key):g}" for kind, key, sign in _BOUNDS if isinstance(item, kind)]
        pattern = getattr(item, "pattern", None)
        if isinstance(pattern, str):
            parts.append(f"matching {pattern}")
        if isinstance(item, annotated_types.MinLen):
            parts.append(f"with at least {item.min_length} element{'s' if item.min_length != 1 else ''}")
    return " " + " and ".join(parts) if parts else ""


def field_wanted(field: FieldInfo) -> str:
    """What is wanted of a field, in words."""
    return wanted(_with_metadata(field))
