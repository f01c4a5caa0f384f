"""Episodes and rollouts through Ray actors: the same bytes for one and for three."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest_cache import cache_bytes
from world_toys import run_config, teacher_folder, teacher_section, write_episodes

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.dense import read_dense
from raydistill.cache.joined import open_manifest
from raydistill.cluster import session
from raydistill.evaluate.world_pictures import strip
from raydistill.storage import Store


@pytest.mark.slow
def test_one_and_three_actors_write_the_same_bytes(tmp_path: Path) -> None:
    import ray

    write_episodes(tmp_path / "episodes", number=9)
    teacher_folder(tmp_path / "teacher")
    found = []
    with session():
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
        for actors in (1, 3):
            config = run_config(
                tmp_path,
                cache={"dir": str(tmp_path / f"caches-{actors}")},
                teachers=[
                    teacher_section(tmp_path),
                    teacher_section(tmp_path, name="dreams", signal="rollout", initial_frames=2),
                ],
                resources={"teacher": {"actors": [actors, actors], "cpus": 1}},
            )
            inputs, manifest = build_inputs(config, Store(config.cache.dir))
            assert len(manifest.shards) >= 3, "each of three actors has something to do"
            stores = [inputs, *(build_signal(config, teacher, inputs, manifest, Store(config.cache.dir))[0]
                                for teacher in config.teachers)]  # fmt: skip
            found.append([cache_bytes(store) for store in stores] + [film_strips(stores[-1])])
    assert len(found[0][-1]) >= 3
    for one, three in zip(*found, strict=True):
        assert one.keys() == three.keys()
        assert [name for name in one if one[name] != three[name]] == []


def film_strips(rollouts: Store) -> dict[str, bytes]:
    """A picture of each clip that the teacher made, by its name."""
    strips = {}
    for record in open_manifest(rollouts).shards:
        shard = read_dense(rollouts, record.name)
        clips = shard.tensor("trajectory").float() / 255
        strips |= {name: strip(clip) for name, clip in zip(shard.row_ids, clips, strict=True)}
    return strips
