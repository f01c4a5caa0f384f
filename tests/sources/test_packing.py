"""Cutting documents and filling rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raydistill.sources.packing import Packer, Tokens, pieces


def cut(
    num_tokens: int, *, seq_len: int = 8, long: str = "split", learn: list[bool] | None = None, least: int = 2
) -> tuple[list[Tokens], Counter[str]]:
    dropped: Counter[str] = Counter()
    ids = np.arange(num_tokens, dtype=np.int32)
    mask = np.ones(num_tokens, dtype=np.bool_) if learn is None else np.array(learn)
    found = pieces(
        "f#0", ids, mask, 10 + np.arange(num_tokens), seq_len=seq_len, long_documents=long, min_tokens=least,  # type: ignore[arg-type]
        dropped=dropped,
    )  # fmt: skip
    return list(found), dropped


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 15, 16, 100])
def test_split_predicts_every_token_but_the_first_exactly_once(num_tokens: int) -> None:
    found, dropped = cut(num_tokens)
    predicted = np.concatenate([piece.input_ids[1:][piece.target[:-1]] for piece in found])
    assert predicted.tolist() == list(range(1, num_tokens))
    assert not any(piece.target[-1] for piece in found)
    assert max(len(piece.input_ids) for piece in found) <= 8
    assert sum(piece.text_bytes for piece in found) == sum(10 + t for t in range(1, num_tokens))
    assert [piece.name for piece in found] == [f"f#0.{k}" for k in range(len(found))]
    assert not dropped


def test_truncate_keeps_the_beginning_and_drop_keeps_nothing() -> None:
    found, dropped = cut(20, long="truncate")
    assert [piece.input_ids.tolist() for piece in found] == [list(range(8))]
    assert cut(5, long="truncate")[0][0].input_ids.tolist() == list(range(5))
    assert not dropped
    assert cut(9, long="drop") == ([], Counter(too_long=1))
    assert len(cut(8, long="drop")[0]) == 1


def test_short_pieces_and_pieces_without_targets_are_dropped_and_counted() -> None:
    assert cut(0) == ([], Counter(too_short=1))
    assert cut(1) == ([], Counter(too_short=1))
    found, dropped = cut(17, least=4)  # 8 + 8 + 3, neighbours sharing a token
    assert [len(piece.input_ids) for piece in found] == [8, 8]
    assert dropped == Counter(too_short=1)
    found, dropped = cut(15, learn=[False] * 8 + [True] * 7)
    assert [piece.name for piece in found] == ["f#0.1"]
    assert dropped == Counter(no_target=1)


def test_bytes_count_only_the_text_of_targets() -> None:
    (piece,), _ = cut(4, learn=[True, False, True, False])
    assert piece.target.tolist() == [False, True, False, False]
    assert piece.text_bytes == 12


def piece_of(length: int, name: str) -> Tokens:
    return Tokens(name, np.full(length, length, dtype=np.int32), np.ones(length, dtype=np.bool_), length)


def test_a_packer_puts_each_piece_into_the_fullest_row_with_room() -> None:
    packer = Packer(10)
    full = [row for length in (6, 5, 4, 3, 2) for row in packer.add(piece_of(length, str(length)))]
    full += list(packer.rest())
    assert [[piece.name for piece in row] for row in full] == [["6", "4"], ["5", "3", "2"]]


def test_a_packer_neither_loses_nor_doubles_nor_overfills() -> None:
    lengths = np.random.default_rng(0).integers(2, 33, size=3000)
    packer = Packer(32)
    rows = [row for i, n in enumerate(lengths) for row in packer.add(piece_of(int(n), str(i)))] + list(packer.rest())
    assert sorted(int(piece.name) for row in rows for piece in row) == list(range(3000))
    sizes = [sum(len(piece.input_ids) for piece in row) for row in rows]
    assert max(sizes) <= 32
    assert lengths.sum() / (32 * len(rows)) > 0.97
