"""Episodes and rollouts through Ray actors: the same bytes for one and for three."""

from __future__ import annotations

from pathlib import Path

import pytest
from world_toys import run_config, teacher_folder, teacher_section, write_episodes

from raydistill.cache.build import build_inputs, build_signal
from raydistill.cluster import session
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
            shas = [record.sha256 for record in manifest.shards]
            for teacher in config.teachers:
                _, signal = build_signal(config, teacher, inputs, manifest, Store(config.cache.dir))
                shas += [record.sha256 for record in signal.shards]
            found.append(shas)
    assert len(found[0]) >= 9
    assert found[0] == found[1]
