"""Building caches of episodes and rollouts: killed, resumed, in another order, mended; always the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_cache import InProcess, Killed, cache_bytes
from world_toys import run_config, teacher_folder, teacher_section, write_episodes

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.verify import verify
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.storage import Store


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    """A run with a teacher that is asked and one that plays, and a cache folder of its own."""
    rollout = teacher_section(folder, name="dreams", signal="rollout", initial_frames=2)
    caches = {"dir": str(folder / name)}
    return run_config(folder, cache=caches, teachers=[teacher_section(folder), rollout], **changes)


def build(config: RunConfig) -> dict[str, dict[str, bytes]]:
    """Files of all caches by their names."""
    caches = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, caches)
    stores = [inputs, *(build_signal(config, t, inputs, manifest, caches)[0] for t in config.teachers)]
    return {store.uri.rpartition("/")[2]: cache_bytes(store) for store in stores}


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    write_episodes(tmp_path / "episodes", number=9)
    teacher_folder(tmp_path / "teacher")
    return tmp_path


def test_killed_and_resumed_builds_have_the_bytes_of_one_that_went_through(toys: Path, in_process: InProcess) -> None:
    whole = build(config_of(toys, "whole"))
    assert len(whole) == 3
    pieces, kills = config_of(toys, "pieces"), 0
    while True:
        in_process.items.clear()
        in_process.stop_after = 2
        try:
            found = build(pieces)
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert found == whole
    in_process.stop_after, in_process.order = None, lambda items: list(items)[::-1]
    assert build(config_of(toys, "backwards")) == whole


def test_a_damaged_shard_is_found_and_built_again(toys: Path, in_process: InProcess) -> None:
    config = config_of(toys, "caches")
    before = build(config)
    caches = Store(config.cache.dir)
    inputs, manifest = build_inputs(config, caches)
    signals = {t.name: build_signal(config, t, inputs, manifest, caches) for t in config.teachers}
    store, signal = signals["dreams"]
    store.publish(signal.shards[0].name, store.read(signal.shards[0].name)[:-7])
    damages = verify(config, inputs, manifest, signals)
    assert [damage.shard for damage in damages] == [signal.shards[0].name]
    assert "truncated" in damages[0].what
    assert build(config) == before


def test_an_episode_that_does_not_fit_stops_the_build(toys: Path, in_process: InProcess) -> None:
    with np.load(toys / "episodes/episode-03.npz") as episode:
        np.savez(toys / "episodes/episode-03.npz", frames=episode["frames"], actions=episode["actions"] + 5)
    with pytest.raises(DataError, match=r"episode-03\.npz: wanted actions from 0 to 4"):
        build(config_of(toys, "caches"))


def test_a_game_that_is_not_there_stops_before_anything_is_written(toys: Path, in_process: InProcess) -> None:
    source = {
        "kind": "episodes", "environment": {"id": "no_such_game:Game", "episodes": 2}, "frame_size": [12, 12],
        "num_actions": 5, "clip_frames": 5,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no_such_game, found that it is not installed"):
        build(config_of(toys, "caches", source=source))
    assert in_process.items == []


def test_episodes_are_read_on_the_nodes_of_decode(toys: Path, in_process: InProcess) -> None:
    cluster = str(Path(__file__).parents[2] / "cluster/aws.yaml")
    too_large = {"cluster": cluster, "decode": {"cpus": 300}}
    with pytest.raises(ConfigError, match=r"resources\.decode: wanted 1 actor with 300 CPU"):
        build(config_of(toys, "caches", resources=too_large))
    assert in_process.items == []
