"""Prompts: text files with one prompt per line, as rows whose ids follow from their text alone.

So the noise of a prompt's samples does not change when other prompts come along or the file is sorted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from raydistill.config.sources import PromptsSource
from raydistill.errors import DataError
from raydistill.models.autoencoder import space_facts, space_identity
from raydistill.models.text_encoder import text_facts, text_identity
from raydistill.signals import JsonValue
from raydistill.sources.files import listed, open_uri
from raydistill.sources.image_content import require_fitting_frames, require_fitting_size
from raydistill.sources.splits import Split, split_of

PROMPTS_FORMAT = 1
"""Version of the layout of inputs shards of prompts, and of how lines become rows; a part of their fingerprint."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row: what is asked for."""

    row_id: str
    split: Split
    text: str


def read_prompts(source: PromptsSource, held_out: float) -> list[Prompt]:
    """The different prompts of the source in its order, `max_rows` at most; `held_out` is the share kept out of
    training.

    Raises `DataError` for files that are missing, no UTF-8 or without a prompt, and for empty lines, with their number.
    """
    texts: dict[str, None] = {}
    for uri in _files(source):
        with open_uri(uri) as stream:
            try:
                lines = stream.read().decode("utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{uri}: wanted prompts in UTF-8, found {error.reason} at byte {error.start}; save it as UTF-8."
                ) from error
        empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
        if empty:
            shown = ", ".join(map(str, empty[:5])) + (f" and {len(empty) - 5:,} more" if len(empty) > 5 else "")
            raise DataError(f"{uri}: wanted a prompt in every line, found empty lines ({shown}); take them out.")
        if not lines:
            raise DataError(f"{uri}: wanted one prompt per line, found an empty file; fill it or take it out.")
        texts |= dict.fromkeys(line.strip() for line in lines)
    prompts = []
    for text in list(texts)[: source.max_rows]:
        sha = hashlib.sha256(text.encode()).hexdigest()
        prompts.append(Prompt(f"prompt-{sha[:16]}", split_of(sha, held_out), text))
    return prompts


def _files(source: PromptsSource) -> list[str]:
    found: dict[str, None] = {}
    for path in source.paths:
        uris = sorted(listed(path, lambda inside: inside.suffix == ".txt" and not inside.name.startswith("."))[1])
        if not uris:
            raise DataError(f"source.paths: {path} gives no text file (.txt) with prompts; name one.")
        found |= dict.fromkeys(uris)
    return list(found)


def prompts_content(source: PromptsSource) -> dict[str, JsonValue]:
    """What defines the rows and their embeddings, for the fingerprint: the prompts, text encoders, and what kind of
    sample is to be made.

    Raises `ConfigError` for a size or a length that the autoencoder cannot have, and as `read_prompts`, `text_facts`.
    """
    clips = source.frames is not None
    facts = space_facts(source.vae, clips=clips)
    require_fitting_size(source.size, facts.factor, "source.size")
    if source.frames is not None:
        require_fitting_frames(source.frames, facts.frame_factor)
    text_facts(source.text_encoders)
    texts = [prompt.text for prompt in read_prompts(source, 0.0)]
    settings = source.model_dump(mode="json", exclude={"paths", "noise", "vae", "text_encoders", "max_rows"})
    return {
        **settings,
        "prompts": {"number": len(texts), "sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()},
        "vae": space_identity(source.vae),
        "text_encoders": [text_identity(encoder) for encoder in source.text_encoders],
    }
