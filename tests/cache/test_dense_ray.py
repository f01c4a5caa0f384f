"""Signals of a real denoiser with real Ray actors, and killing them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest_cache import cache_bytes, map_in_process
from dense_toys import image_config, unet_folder, write_image_inputs
from slow_teacher import build_slow_teacher

from raydistill.cache.build import build_signal
from raydistill.cache.manifest import Manifest
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.storage import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local Ray of three CPUs whose processes can import the tests' modules."""
    folder = tmp_path_factory.mktemp("pids")
    os.environ["SLOW_TEACHER"] = str(folder)
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield folder
    ray.shutdown()


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL-shaped denoiser of the toy inputs, as a pipeline's folder."""
    return unet_folder(tmp_path_factory.mktemp("unet"))


def configured(home: Path, unet: Path, **sections: Any) -> RunConfig:
    model = {"library": "diffusers", "source": str(unet)}
    teacher = {"model": model, "batch_rows": 3, "guidance_scale": 2.0, "taps": {"mid": "mid_block"}}
    return image_config(home, teachers=(teacher,), **sections)


def build(config: RunConfig, **arguments: Any) -> Store:
    caches = Store(config.cache.dir)
    inputs, manifest = write_image_inputs(Path(caches.root))
    return build_signal(config, config.teachers[0], inputs, manifest, caches, **arguments)[0]


@pytest.fixture(scope="module")
def wanted(unet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the signal as it is built without Ray, in a process in which nothing else was computed before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(built_without_ray, tmp_path_factory.mktemp("plain"), unet).result()


def built_without_ray(folder: Path, unet: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        map_in_process(patch)
        return cache_bytes(build(configured(folder, unet)))


@pytest.mark.parametrize("actors", [1, 3])
def test_any_number_of_actors_writes_the_same_bytes(
    cluster: Path, unet: Path, tmp_path: Path, wanted: dict[str, bytes], actors: int
) -> None:
    config = configured(tmp_path, unet, resources={"teacher": {"actors": (actors, actors)}})
    assert cache_bytes(build(config)) == wanted


@pytest.mark.fault("a teacher's actor is killed (image model)", "replaced; same cache bytes")
def test_a_killed_actor_is_replaced_and_the_bytes_are_the_same(
    cluster: Path, unet: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    config = configured(tmp_path, unet)
    before = {file.name for file in cluster.iterdir()}
    killed: list[str] = []

    def kill() -> None:
        while not list(Path(config.cache.dir).glob("t0-*/records/*.json")):
            time.sleep(0.05)
        killed.extend({file.name for file in cluster.iterdir()} - before)
        for pid in killed:
            os.kill(int(pid), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    store = build(config, factory=build_slow_teacher)
    thread.join()
    assert killed
    assert len({file.name for file in cluster.iterdir()} - before) > len(killed)
    assert cache_bytes(store) == wanted


@pytest.mark.fault("the driver of an image model's cache is killed", "continued; same cache bytes")
def test_a_killed_driver_is_resumed_to_the_same_bytes(
    cluster: Path, unet: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    config = configured(tmp_path, unet)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = (
        "import ray, sys\nfrom pathlib import Path\nfrom test_dense_ray import *\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "build(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()), factory=build_slow_teacher)\n"
    )
    with (tmp_path / "output.txt").open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "config.json"], stdout=output, stderr=output
        )
        while not list(Path(config.cache.dir).glob("t0-*/records/*.json")):
            assert driver.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    done = len(list(Path(config.cache.dir).glob("t0-*/records/*.json")))
    assert done < len(Manifest.model_validate_json(wanted["manifest.json"]).shards)
    time.sleep(3)  # its actors notice that they are alone
    assert cache_bytes(build(config)) == wanted


def test_the_teachers_own_error_reaches_the_user(cluster: Path, unet: Path, tmp_path: Path) -> None:
    model = {"library": "diffusers", "source": str(unet)}
    config = image_config(tmp_path, teachers=({"model": model, "taps": {"mid": "nowhere"}},))
    with pytest.raises(ConfigError, match=r"nowhere"):
        build(config)
    assert not list(Path(config.cache.dir).glob("t0-*/manifest.json"))
