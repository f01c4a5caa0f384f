"""Data sets of the Hub and of local `datasets` folders, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from raydistill.config.sources import HubDataset, TextSource
from raydistill.errors import DataError
from raydistill.models.hashes import file_hashes
from raydistill.models.hub import HUB_SECONDS, first_line
from raydistill.signals import JsonValue
from raydistill.sources.records import Document, document_of

if TYPE_CHECKING:
    from datasets import Dataset

MOST_RANGE_ROWS = 100_000


def name_of(dataset: HubDataset) -> str:
    """What row ids carry: the id (of a folder its name), the configuration and the split."""
    name = Path(dataset.id).name if Path(dataset.id).expanduser().exists() else dataset.id
    return "/".join(part for part in (name, dataset.config, dataset.split) if part)


def ranges(dataset: HubDataset, unit_bytes: int) -> list[tuple[tuple[int, int], int]]:
    """Ranges of records of about `unit_bytes` each, with their sizes in bytes."""
    data = load(dataset)
    total = max(int(data.data.nbytes), 1)
    count = min(max(len(data) * unit_bytes // total, 1), MOST_RANGE_ROWS)
    starts = range(0, len(data), count)
    return [((s, min(s + count, len(data))), total * (min(s + count, len(data)) - s) // len(data)) for s in starts]


def documents(dataset: HubDataset, records: tuple[int, int], source: TextSource) -> Iterator[Document]:
    """The documents of a range of records."""
    data = load(dataset)
    keys = [key for key in (source.text_key, source.messages_key) if key in data.column_names]
    data = data.select_columns(keys or data.column_names)
    for index in range(*records):
        yield document_of(data[index], index, source, f"{name_of(dataset)}, record {index}")


def identity(dataset: HubDataset) -> dict[str, JsonValue]:
    """What decides the content: hashes of a folder's files, or the commit of a Hub repository."""
    chosen: dict[str, JsonValue] = {"config": dataset.config, "split": dataset.split}
    folder = Path(dataset.id).expanduser()
    if folder.is_dir():
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "cache-")))
        return chosen | {"files": {p.relative_to(folder).as_posix(): h for p, h in file_hashes(files).items()}}
    if not HF_HUB_OFFLINE:
        return chosen | {"hub": dataset.id, "commit": _commit(dataset)}
    # `datasets` keeps what it downloaded in a folder named by the commit.
    return chosen | {"hub": dataset.id, "commit": Path(load(dataset).cache_files[0]["filename"]).parent.name}


@lru_cache(maxsize=4)
def load(dataset: HubDataset) -> Dataset:
    """The chosen split, memory-mapped. Raises `DataError` for anything missing."""
    import datasets

    folder = Path(dataset.id).expanduser()
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.Dataset):
                return saved
            if dataset.split not in saved:
                raise DataError(
                    f"{dataset.id} has the splits {', '.join(saved)}; wanted source.dataset.split {dataset.split!r}"
                )
            return saved[dataset.split]
        if folder.is_dir():
            return datasets.load_dataset(str(folder), dataset.config, split=dataset.split)
        return datasets.load_dataset(dataset.id, dataset.config, split=dataset.split, revision=_commit(dataset))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"source.dataset: cannot load {name_of(dataset)}: {first_line(error)}") from error


def _commit(dataset: HubDataset) -> str | None:
    """Commit of the revision, or None when the Hub is switched off and the downloaded copy is to be used."""
    if HF_HUB_OFFLINE:
        return dataset.revision
    try:
        return HfApi().dataset_info(dataset.id, revision=dataset.revision, timeout=HUB_SECONDS).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(f"source.dataset: {dataset.id} is no folder and not on the Hub: {first_line(error)}") from error
    except Exception as error:  # the errors of the client's network library have no base class that stays the same
        raise DataError(
            f"source.dataset: {dataset.id} is no folder here ({Path(dataset.id).absolute()}) and the Hub cannot be "
            f"reached ({first_line(error)}). Give a folder, or set HF_HUB_OFFLINE=1 to use what was downloaded before."
        ) from error
