"""Data sets of the Hub and of `datasets` folders."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from toys import tiny_tokenizer

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.sources import hub_data, text
from raydistill.sources.text import rows, text_content, units


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    hub_data.load.cache_clear()


def source(dataset_id: str, **dataset: str) -> TextSource:
    return TextSource.model_validate(
        {
            "dataset": {"id": dataset_id, **dataset},
            "tokenizer": "none",
            "seq_len": 32,
            "add_bos": False,
            "add_eos": False,
        }
    )


def saved(folder: Path, *, splits: bool) -> Path:
    data = datasets.Dataset.from_dict({"id": list(range(50)), "text": [f"document {i}" for i in range(50)]})
    (datasets.DatasetDict({"train": data, "test": data.select(range(5))}) if splits else data).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("splits", [True, False])
def test_a_saved_folder_is_read_in_ranges_that_do_not_change_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: bool
) -> None:
    config = source(str(saved(tmp_path / "books", splits=splits)))
    tokenizer = tiny_tokenizer()

    def ids() -> list[tuple[str, str]]:
        found = [row for unit in units(config) for row in rows(unit, config, tokenizer, 0.0)]
        return [(row.row_id, tokenizer.decode(row.input_ids)) for row in found]

    whole = ids()
    assert whole == [(f"books/train#{i}.0", f"document {i}") for i in range(50)]
    monkeypatch.setattr(text, "UNIT_BYTES", 200)
    assert len(units(config)) > 3
    assert ids() == whole


def test_another_split_is_other_content(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "books", splits=True))
    tokenizer = tiny_tokenizer()
    train, test = source(folder), source(folder, split="test")
    assert text_content(train, tokenizer) != text_content(test, tokenizer)
    assert sum(1 for unit in units(test) for _ in rows(unit, test, tokenizer, 0.0, Counter())) == 5
    with pytest.raises(DataError, match=r"has the splits train, test; wanted source\.dataset\.split 'dev'"):
        units(source(folder, split="dev"))


def test_a_folder_of_data_files_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = source(str(tmp_path / "data"))
    found = [row.row_id for unit in units(config) for row in rows(unit, config, tiny_tokenizer(), 0.0)]
    assert found == ["data/train#0.0", "data/train#1.0"]


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_data, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_data.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"the Hub cannot be reached \(no route to host\).*HF_HUB_OFFLINE=1"):
        units(source("nobody/nothing"))


def test_a_hub_that_is_switched_off_has_only_what_was_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "HF_HUB_OFFLINE", True)
    assert "datasets" in sys.modules
    with pytest.raises(DataError, match="cannot load nobody/nothing/train"):
        units(source("nobody/nothing"))
