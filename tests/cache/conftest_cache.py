"""A tiny text, a tiny teacher, and building caches from them with or without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toys

from raydistill.cache import build, pool
from raydistill.cache.manifest import Manifest
from raydistill.config.schema import RunConfig
from raydistill.storage import Store


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two text files of one document per line, and the folder `model` of a tiny teacher."""
    folder = tmp_path_factory.mktemp("toy")
    toys.save_model(toys.tiny_llama(), folder / "model")
    for name in ("one.txt", "two.txt"):
        lines = [f"{name} says {'many ' * (i % 7)}things, {i} of them." for i in range(60)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_config(toy_text: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`toy_config` of the toy text and this test's own folder."""
    return partial(toy_config, toy_text, tmp_path)


def toy_config(
    text: Path, home: Path, folder: str = "cache", *, source: Any = None, teacher: Any = None, **sections: Any
) -> RunConfig:
    """A configuration whose caches lie in `home/<folder>`; `source`, `teacher` and further sections are overrides."""
    model = {"library": "transformers", "source": str(text / "model"), "dtype": "float32"}
    steps = {"global_size": 4, "micro_size": 2}
    plain = {
        "name": "toy",
        "run_dir": str(home / "run"),
        "cache": {"dir": str(home / folder)},
        "source": {
            "paths": [str(text / "*.txt")], "tokenizer": str(text / "model"), "seq_len": 48,
            "shard_rows": 30, "format": "lines",
        } | (source or {}),
        "teachers": [{"name": "t", "model": model, "top_k": 6, "batch_tokens": 256} | (teacher or {})],
        "student": {"model": model},
        "phases": [{"name": "p", "steps": 2, "batch": steps, "optimizer": {"student": {"lr": 1e-3}}}],
        "evaluate": {"held_out": 0.2},
    }  # fmt: skip
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section}
    return RunConfig.model_validate(plain)


@dataclass
class InProcess:
    """What `build` did instead of asking Ray: the items it mapped, in order."""

    items: list[Any] = field(default_factory=list)
    order: Callable[[Sequence[Any]], Sequence[Any]] = list
    """The order in which items are worked on."""
    stop_after: int | None = None
    """Items after which the process is as if killed."""


class Killed(BaseException):
    """Stands for kill -9 between two items."""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Map in this process, without Ray; everything else is the real thing."""
    return map_in_process(monkeypatch)


def map_in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Put an ordinary loop in the place of Ray Data."""
    log = InProcess()

    class NoTally:
        class set:
            remote = staticmethod(lambda shard, tokens: None)

    class NoTicker:
        tally = NoTally

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> NoTicker:
            return self

        def __exit__(self, *_: object) -> None: ...
        def finished(self, shard: str) -> None: ...

    def fake_map(make: Callable[[], Any], items: Sequence[Any], **_: object) -> Iterator[dict[str, Any]]:
        worker = make()
        for item in log.order(items):
            if log.stop_after is not None and len(log.items) >= log.stop_after:
                raise Killed
            log.items.append(item)
            yield worker(item)

    monkeypatch.setattr(pool, "_outcomes", fake_map)
    monkeypatch.setattr(pool, "Ticker", NoTicker)
    monkeypatch.setenv("RAYDISTILL_AUTOSCALING", "1")  # there is no cluster to be asked for room
    return log


@dataclass(frozen=True)
class Built:
    """Finished caches of the toy text."""

    config: RunConfig
    inputs: Store
    inputs_manifest: Manifest
    signal: Store
    signal_manifest: Manifest


def build_all(config: RunConfig) -> Built:
    """Build inputs and the first teacher's signal."""
    caches = Store(config.cache.dir)
    inputs, inputs_manifest = build.build_inputs(config, caches)
    signal, manifest = build.build_signal(config, config.teachers[0], inputs, inputs_manifest, caches)
    return Built(config, inputs, inputs_manifest, signal, manifest)


def cache_bytes(store: Store) -> dict[str, bytes]:
    """Every file of a cache but build.json, which holds times, and what killed writers did not finish."""
    root = Path(store.root)
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and f.name != "build.json" and f.name[:5] != ".tmp-"]
    return {str(f.relative_to(root)): f.read_bytes() for f in files}


@pytest.fixture(scope="session")
def built_once(toy_text: Path) -> Path:
    """The folder of caches that were built in this process, once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        map_in_process(patch)
        build_all(toy_config(toy_text, toy_text, "cache"))
    return toy_text / "cache"


@pytest.fixture
def built(built_once: Path, in_process: InProcess, make_config: Callable[..., RunConfig]) -> Built:
    """A test's own copy of the caches of the toy text."""
    config = make_config()
    shutil.copytree(built_once, config.cache.dir)
    result = build_all(config)
    assert in_process.items == []
    return result
