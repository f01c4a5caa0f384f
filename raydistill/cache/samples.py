"""What loaders, orders and recipes may ask of cached samples, whatever they are samples of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from raydistill.cache.manifest import Manifest
from raydistill.signals import Batch, JsonValue

Indices = Sequence[int] | np.ndarray
"""Numbers of samples."""


class Samples(Protocol):
    """The samples of one split, numbered 0 … `num_rows` - 1 in cache order.

    A sample is what an optimizer step counts: a row of tokens, or one draw of noise for an image.
    """

    inputs_manifest: Manifest
    signal_manifests: dict[str, Manifest]
    """By teacher."""

    @property
    def num_rows(self) -> int:
        """Samples of the split."""

    @property
    def shard_of(self) -> np.ndarray:
        """Shard of each sample, counted from 0 within the split; ascending."""

    @property
    def shard_rows(self) -> list[int]:
        """Samples of each shard: the shape that `Order` wants."""

    @property
    def costs(self) -> np.ndarray:
        """What computing each sample costs, in any unit: a step begins with its dearest samples."""

    @property
    def buckets(self) -> np.ndarray | None:
        """A number per sample; only samples of one number make a batch. None: any samples do."""

    def row_ids(self, indices: Indices) -> list[str]:
        """Ids of samples."""

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Samples as one batch."""

    def silenced(self, batch: Batch) -> dict[str, Tensor]:
        """The same batch with nothing to learn from: it adds to no sum and no count of a loss."""

    def unpack(self, shard: int) -> None:
        """Have a shard on the local disk by the time its samples are asked for."""

    def facts(self, teacher: str) -> Mapping[str, JsonValue]:
        """Facts of a teacher's signal, from its manifest."""
