"""Trajectories of a video teacher through real Ray actors: the same bytes from one and from three."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest_cache import cache_bytes
from video_run import video_config, write_parts

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cluster import session
from raydistill.storage import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[None]:
    import ray

    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    with session():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield


def test_one_and_three_actors_write_the_same_trajectories_and_previews(cluster: None, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    found = []
    for actors in (1, 3):
        config = video_config(
            parts,
            tmp_path / f"{actors}",
            resources={"teacher": {"actors": [actors, actors], "cpus": 1}},
        )
        inputs, manifest = build_inputs(config, Store(config.cache.dir))
        assert len(manifest.shards) >= 3, "each of three actors has something to do"
        store, _ = build_signal(config, config.teachers[0], inputs, manifest, Store(config.cache.dir))
        found.append(cache_bytes(store))
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
