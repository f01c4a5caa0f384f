"""Documents' tokens into rows of at most `seq_len`: cut, dropped, or put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int32: TypeAlias = NDArray[np.int32]
Int64: TypeAlias = NDArray[np.int64]
Bool: TypeAlias = NDArray[np.bool_]

OPEN_ROWS = 64
"""Rows that a packer keeps open; more fill better and take more memory."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that see each other. `target[t]` says whether the prediction made at t, of token t+1, counts."""

    name: str
    input_ids: Int32
    target: Bool
    text_bytes: int
    """UTF-8 bytes of the text of the targets."""


def pieces(
    name: str,
    ids: Int32,
    learn: Bool,
    num_bytes: Int64,
    *,
    seq_len: int,
    long_documents: Literal["split", "truncate", "drop"],
    min_tokens: int,
    dropped: Counter[str],
) -> Iterator[Tokens]:
    """Cut one document, [tokens], into pieces named `<name>.<k>`.

    `learn[t]` says whether token t is to be learnt, `num_bytes[t]` how much text it stands for. Neighbouring pieces
    share one token, the last of one being the first of the next: each token but the first is predicted exactly once.
    """
    if len(ids) > seq_len and long_documents == "drop":
        dropped["too_long"] += 1
        return
    last = min(len(ids), seq_len) if long_documents == "truncate" else len(ids)
    for number, start in enumerate(range(0, max(last - 1, 1), seq_len - 1)):
        stop = min(start + seq_len, last)
        target = np.append(learn[start + 1 : stop], False)
        if stop - start < min_tokens:
            dropped["too_short"] += 1
        elif not target.any():
            dropped["no_target"] += 1
        else:
            size = int(num_bytes[start + 1 : stop][target[:-1]].sum())
            yield Tokens(f"{name}.{number}", ids[start:stop], target, size)


@dataclass(slots=True)
class Packer:
    """Fills rows with pieces: each goes into the fullest open row that still has room for it (best fit).

    The result depends on the order of the pieces alone.
    """

    seq_len: int
    _rows: list[list[Tokens]] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def add(self, piece: Tokens) -> Iterator[list[Tokens]]:
        """Take a piece in; yields the rows that are finished by it."""
        room = [(size, -i) for i, size in enumerate(self._sizes) if size + len(piece.input_ids) <= self.seq_len]
        if room:
            index = -max(room)[1]
        else:
            if len(self._rows) == OPEN_ROWS:
                yield self._close(self._sizes.index(max(self._sizes)))
            self._rows.append([])
            self._sizes.append(0)
            index = len(self._rows) - 1
        self._rows[index].append(piece)
        self._sizes[index] += len(piece.input_ids)
        if self._sizes[index] == self.seq_len:
            yield self._close(index)

    def rest(self) -> Iterator[list[Tokens]]:
        """The rows that are still open, oldest first."""
        while self._rows:
            yield self._close(0)

    def _close(self, index: int) -> list[Tokens]:
        del self._sizes[index]
        return self._rows.pop(index)
