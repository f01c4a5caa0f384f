"""The base of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Config(BaseModel):
    """A frozen section of the configuration; unknown keys are errors and docstrings become the documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def tag_defaults_to(key: str, tag: str) -> BeforeValidator:
    """For a union of sections told apart by `key`: a map without that key is the section of `tag`."""
    return BeforeValidator(lambda value: {key: tag, **value} if isinstance(value, dict) else value)
