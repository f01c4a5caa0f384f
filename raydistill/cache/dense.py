"""Dense shards: tensors with one row per image in a safetensors file, beside a description of the rows.

A shard is `tensors` and one JSON document (safetensors metadata `raydistill`) that says which rows it holds. The same
tensors and description give the same bytes, on every machine. Files are mapped, so a row is read where it lies.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raydistill.cache.manifest import ShardRecord
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.storage import Store

META = "raydistill"
"""Key of the description in the file's metadata. Its only key: safetensors does not sort several."""


LATENT_SHAPE = "latent_shape"
"""Key of the description of an inputs shard without latents: the shape of those that are to be made."""


def dense_name(index: int) -> str:
    """File name of dense shard `index`; signals use the name of their inputs' shard."""
    return f"{index:05d}.safetensors"


def write_dense(
    store: Store, name: str, tensors: Mapping[str, Tensor], *, meta: Mapping[str, JsonValue], split: str, rows: int
) -> ShardRecord:
    """Publish tensors as a dense shard of `rows` rows and return its record (not yet published)."""
    ordered = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    described = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    store.publish(name, lambda path: save_file(ordered, path, metadata={META: described}))
    return ShardRecord.model_validate(
        {"name": name, "split": split, "rows": rows, "tokens": 0}
        | {"bytes": store.size(name), "sha256": store.sha256(name)}
    )


class DenseShard:
    """A dense shard, mapped from a local file.

    Raises `DataError` when the file is truncated or no dense shard, `FileNotFoundError` when there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.names: tuple[str, ...] = tuple(sorted(self._file.keys()))
            self.meta: dict[str, JsonValue] = json.loads((self._file.metadata() or {})[META])
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _unreadable(str(path), error) from error
        self._mapped: dict[str, Tensor] = {}

    @cached_property
    def row_ids(self) -> list[str]:
        """Ids of the rows, in order."""
        return self.texts("row_ids")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_ids)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of a row of an inputs shard: of those that it holds, or that are to be made."""
        if "latents" in self.names:
            return tuple(self.tensor("latents").shape[1:])
        found = self.meta.get(LATENT_SHAPE)
        if not isinstance(found, list):
            raise DataError(f"{self.path}: wanted latents or their shape, found neither. Run --stages verify.")
        return tuple(int(str(side)) for side in found)

    def texts(self, key: str) -> list[str]:
        """A list of strings of the description; `DataError` when there is none under `key`."""
        found = self.meta.get(key)
        if not isinstance(found, list):
            raise DataError(f"{self.path}: its description has no list {key!r}. Run --stages verify.")
        return [str(item) for item in found]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, mapped: reading a part of it reads that part of the file. Never written to."""
        if name not in self._mapped:
            if name not in self.names:
                raise DataError(f"{self.path}: wanted the tensor {name!r}, found {list(self.names)}")
            self._mapped[name] = self._file.get_tensor(name)
        return self._mapped[name]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors."""
        return {name: self.tensor(name) for name in self.names}


def read_dense(store: Store, name: str) -> DenseShard:
    """A dense shard of a cache, mapped; on an object store, fetched first. `DataError` when damaged or missing."""
    try:
        if store.is_local:
            return DenseShard(Path(store.path(name)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            store.fetch(name, path)
            return DenseShard(path)  # what is mapped outlives the file's name
    except FileNotFoundError as error:
        raise _unreadable(f"{store.uri}/{name}", error) from error


def read_description(store: Store, name: str) -> dict[str, JsonValue]:
    """The description of a dense shard, without its tensors; `DataError` when it cannot be read."""
    try:
        with store.filesystem.open_input_file(store.path(name)) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, file.size())))
        described: dict[str, JsonValue] = json.loads(header["__metadata__"][META])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(f"{store.uri}/{name}", error) from error
    return described


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read the shard {where}: {error}. Run --stages verify, which lists damaged shards; "
        "--stages inputs,signals then builds exactly those again."
    )


def row_sha(latents: Tensor, caption: str) -> str:
    """What identifies the content of a row, whatever its id: 16 digits of the sha256 of latents and caption."""
    digest = hashlib.sha256(latents.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(caption.encode())
    return digest.hexdigest()[:16]


def signed(digest: bytes) -> int:
    """Eight bytes of a hash as the int64 that a tensor keeps of them."""
    return int.from_bytes(digest, "little", signed=True)
