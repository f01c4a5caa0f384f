"""Building caches with real Ray actors, and killing them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from conftest_cache import cache_bytes, map_in_process, toy_config
from slow_teacher import build_slow_teacher

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.manifest import Manifest
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local Ray of two CPUs whose processes can import the tests' modules."""
    folder = tmp_path_factory.mktemp("pids")
    os.environ["SLOW_TEACHER"] = str(folder)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield folder
    ray.shutdown()


def build(config: RunConfig, **arguments: object) -> tuple[Store, Store]:
    caches = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, caches)
    store, _ = build_signal(config, config.teachers[0], inputs, manifest, caches, **arguments)
    return inputs, store


@pytest.fixture(scope="module")
def wanted(toy_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The bytes of inputs and signal as they are built without Ray. Small batches, so that a shard takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        map_in_process(patch)
        inputs, store = build(small(toy_text, tmp_path_factory.mktemp("plain")))
    return cache_bytes(inputs), cache_bytes(store)


def small(text: Path, home: Path, **sections: object) -> RunConfig:
    return toy_config(text, home, teacher={"batch_tokens": 96}, **sections)


@pytest.mark.parametrize("actors", [1, 2])
def test_any_number_of_actors_writes_the_same_bytes(
    cluster: Path, toy_text: Path, tmp_path: Path, wanted: tuple[dict[str, bytes], dict[str, bytes]], actors: int
) -> None:
    inputs, store = build(small(toy_text, tmp_path, resources={"teacher": {"actors": (actors, actors)}}))
    assert (cache_bytes(inputs), cache_bytes(store)) == wanted


@pytest.mark.fault("a teacher's actor is killed (language model)", "replaced; same cache bytes")
def test_a_killed_actor_is_replaced_and_the_bytes_are_the_same(
    cluster: Path, toy_text: Path, tmp_path: Path, wanted: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    config = small(toy_text, tmp_path)
    before = {file.name for file in cluster.iterdir()}
    killed: list[str] = []

    def kill() -> None:
        while not list(Path(config.cache.dir).glob("t-*/records/*.json")):
            time.sleep(0.05)
        killed.extend({file.name for file in cluster.iterdir()} - before)
        for pid in killed:
            os.kill(int(pid), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    inputs, store = build(config, factory=build_slow_teacher)
    thread.join()
    assert killed
    assert len({file.name for file in cluster.iterdir()} - before) > len(killed)
    assert (cache_bytes(inputs), cache_bytes(store)) == wanted


@pytest.mark.fault("the driver of a language model's cache is killed", "continued; same cache bytes")
def test_a_killed_driver_is_resumed_to_the_same_bytes(
    cluster: Path, toy_text: Path, tmp_path: Path, wanted: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    config = small(toy_text, tmp_path)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = (
        "import ray, sys\nfrom pathlib import Path\nfrom test_build_ray import *\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "build(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()), factory=build_slow_teacher)\n"
    )
    with (tmp_path / "output.txt").open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "config.json"], stdout=output, stderr=output
        )
        while not list(Path(config.cache.dir).glob("t-*/records/*.json")):
            assert driver.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    done = len(list(Path(config.cache.dir).glob("t-*/records/*.json")))
    assert done < len(Manifest.model_validate_json(wanted[1]["manifest.json"]).shards)
    time.sleep(3)  # its actors notice that they are alone
    inputs, store = build(config)
    assert (cache_bytes(inputs), cache_bytes(store)) == wanted


def test_the_teachers_own_error_reaches_the_user(cluster: Path, make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^teacher t: top_k 500 wants more ids than the vocabulary has"):
        build(make_config(teacher={"top_k": 500}))


def test_more_cpus_than_the_cluster_has_is_refused_at_once(
    cluster: Path, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=r"wanted 4 actors with 2 CPU .* found room for 1 on 1 node of 2 CPU"):
        build(make_config(resources={"teacher": {"actors": (4, 4), "cpus": 2}}))
