"""Finding and hashing the files of a source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raydistill.errors import DataError
from raydistill.sources.files import content_hashes, find_files, glob_regex


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_a_folder_gives_its_data_files_in_name_order_and_nothing_else(tmp_path: Path) -> None:
    tree(tmp_path / "data", "b.jsonl", "a/c.txt.zst", "README.md", ".hidden.txt", "_SUCCESS.txt", "d.parquet", "e.gz")
    assert [f.name for f in find_files([str(tmp_path / "data")])] == ["a/c.txt.zst", "b.jsonl", "d.parquet"]


def test_names_do_not_depend_on_where_the_folder_lies_or_in_what_order_paths_are_given(tmp_path: Path) -> None:
    for root in ("x", "deep/er"):
        folder = tree(tmp_path / root, "one/train.jsonl", "two/train.jsonl")
        paths = [str(folder / "two"), str(folder / "one" / "train.jsonl"), str(folder / "one")]
        assert [f.name for f in find_files(paths)] == ["one/train.jsonl", "two/train.jsonl"]
    assert [f.name for f in find_files([str(tmp_path / "x/one/train.jsonl")])] == ["train.jsonl"]


def test_format_and_compression_follow_the_suffixes(tmp_path: Path) -> None:
    folder = tree(tmp_path / "data", "a.jsonl.gz", "b.md", "c.txt.xz", "d.ndjson.bz2", "e.json", "f.zst")
    kinds = {f.name: (f.format, f.compression) for f in find_files([f"{folder}/*"])}
    assert kinds == {
        "a.jsonl.gz": ("json_lines", "gzip"),
        "b.md": ("text", None),
        "c.txt.xz": ("text", "xz"),
        "d.ndjson.bz2": ("json_lines", "bz2"),
        "e.json": ("json", None),
        "f.zst": ("text", "zstd"),
    }


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.txt", ["a.txt"], ["b/a.txt", "a.txt.gz"]),
        ("**/*.txt", ["a.txt", "b/c/a.txt"], ["a.md"]),
        ("b/**", ["b/a.txt", "b/c/d"], ["a/b"]),
        ("part-[0-9]?.gz", ["part-07.gz"], ["part-x7.gz", "part-7.gz"]),
        ("[!a].txt", ["b.txt"], ["a.txt"]),
    ],
)
def test_a_star_stays_in_its_folder_and_two_stars_do_not(pattern: str, matches: list[str], others: list[str]) -> None:
    assert all(re.fullmatch(glob_regex(pattern), name) for name in matches)
    assert not any(re.fullmatch(glob_regex(pattern), name) for name in others)


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    tree(tmp_path, "a[1].txt")
    assert [f.name for f in find_files([str(tmp_path / "a[1].txt")])] == ["a[1].txt"]


def test_an_uri_is_read_through_its_file_system(tmp_path: Path) -> None:
    tree(tmp_path / "data", "a.txt", "b.txt")
    files = find_files([f"file://{tmp_path}/data/*.txt"])
    assert [f.name for f in files] == ["a.txt", "b.txt"]
    with files[0].open() as stream:
        assert stream.read() == b"a.txt"
    local = content_hashes(find_files([str(tmp_path / "data")]))
    assert content_hashes(files) == local


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    tree(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsnl, found nothing there; .* holds train\.jsonl"):
        find_files([str(tmp_path / "train.jsnl")])


def test_a_glob_without_a_match_and_a_folder_without_data_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "data", "notes.md")
    for path in (f"{tmp_path}/data/*.parquet", f"{tmp_path}/data", f"{tmp_path}/no/such/*.txt"):
        with pytest.raises(DataError, match="gives no file; wanted Parquet"):
            find_files([path])


def test_empty_files_alone_are_empty_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="all 1 files are empty"):
        find_files([str(tmp_path / "a.txt")])


def test_a_folder_saved_by_datasets_is_recognised(tmp_path: Path) -> None:
    tree(tmp_path / "data", "data-00000-of-00001.arrow", "README.md")
    with pytest.raises(DataError, match=r"source\.dataset\.id instead"):
        find_files([str(tmp_path / "data")])
