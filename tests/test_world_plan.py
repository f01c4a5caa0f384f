"""Plans of world models: counts without numbers, bytes of signals, and what is asked online."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from world_toys import (
    SIZES,
    TEACHER,
    build_signal,
    run_config,
    small_world,
    teacher_folder,
    teacher_section,
    write_episodes,
)

from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.plan import plan, table
from raydistill.plan.worlds import WorldPlan, count_world, signal_bytes
from raydistill.search.accounting import work_of

ROOT = Path(__file__).parents[1]


def test_counts_are_those_of_a_real_network() -> None:
    network, counts = small_world(), count_world(SIZES, 5)
    assert counts.parameters == sum(p.numel() for p in network.parameters())
    frames, actions = network_input()
    with FlopCounterMode(display=False) as counted:
        network(frames, actions)
    assert counts.clip_flops == counted.get_total_flops()


def network_input():  # type: ignore[no-untyped-def]
    import torch

    return torch.zeros(1, 5, 3, 12, 12), torch.zeros(1, 4, dtype=torch.long)


def test_bytes_of_a_signal_are_those_that_are_written(tmp_path: Path) -> None:
    write_episodes(tmp_path / "episodes")
    teacher_folder(tmp_path / "teacher")
    config = run_config(tmp_path)
    store, manifest = build_signal(config)
    teacher = config.teachers[0]
    from raydistill.cache.dense import read_dense
    from raydistill.config.world import WorldTeacher

    assert isinstance(teacher, WorldTeacher)
    shard = read_dense(store, manifest.shards[0].name)
    written = sum(t.numel() * t.element_size() for t in shard.tensors().values())
    assert written == signal_bytes(teacher, TEACHER, 5) * shard.rows


@pytest.mark.slow
def test_the_shipped_student_is_a_thirty_seventh_of_its_teacher() -> None:
    shipped = resolve_paths(load_config([str(ROOT / "configs/gamecraft_world_model.yaml")], []))
    found = plan(shipped)
    assert isinstance(found, WorldPlan)
    assert found.student is not None
    (teacher,) = found.teachers
    assert teacher.counts is not None
    assert 330e6 < found.student.parameters < 370e6
    assert teacher.counts.parameters / found.student.parameters == pytest.approx(37, rel=0.05)
    assert teacher.counts.frame_flops / found.student.frame_flops > 15
    assert teacher.total_bytes is None  # how many clips there are is not known yet
    text = table(found)
    assert "asked online" in text
    assert "fewer FLOP per frame" in text


def test_the_plan_has_what_chooses_between_keeping_keeping_less_and_asking(tmp_path: Path) -> None:
    teacher_folder(tmp_path / "teacher")
    game = {"id": "crafter", "episodes": 10, "steps": 8}
    source = {"kind": "episodes", "environment": game, "frame_size": [12, 12], "num_actions": 5, "clip_frames": 5}
    plans = {}
    for online in ("no", "local", "actors"):
        section = teacher_section(tmp_path, online=online)
        found = plan(run_config(tmp_path, source=source, teachers=[section]))
        assert isinstance(found, WorldPlan)
        plans[online] = found
    kept, local = plans["no"].teachers[0], plans["local"].teachers[0]
    assert (kept.clip_bytes, kept.total_bytes) == (local.clip_bytes, 20 * (kept.clip_bytes or 0))
    assert local.total_bytes == 0
    (change,) = kept.smaller  # its widths are below any rank worth trying
    assert change == "store_dtype: float16"
    assert kept.smaller[change] < (kept.clip_bytes or 0)
    assert kept.sent_bytes == kept.clip_bytes  # which is in fp32 already
    assert (local.hours, local.other_hours) == (kept.other_hours, kept.hours)
    memory = [plans[online].phases[0].memory for online in ("no", "local", "actors")]
    assert memory[0] is not None
    assert memory[1] is not None
    assert memory[1].device - memory[0].device == local.weight_bytes
    assert memory[2] == memory[0]
    alone = plan(run_config(tmp_path, source=source, teachers=[section], evaluate={"baseline": False}))
    assert isinstance(alone, WorldPlan)
    assert (alone.baseline_hours, local.flops_per_clip) == (0, kept.flops_per_clip)
    assert (plans["actors"].hours or 0) - (alone.hours or 0) == pytest.approx(alone.phases[0].hours)
    text = table(plans["actors"])
    for words in ("per clip with store_dtype: float16", "local:", "in each of 1 workers", "at most", "asked online"):
        assert words in text


def test_a_sweep_counts_clips(tmp_path: Path) -> None:
    teacher_folder(tmp_path / "teacher")
    game = {"id": "crafter", "episodes": 10, "steps": 8}
    source = {"kind": "episodes", "environment": game, "frame_size": [12, 12], "num_actions": 5, "clip_frames": 5}
    config = run_config(tmp_path, source=source)
    found = work_of(config)
    teacher, student = (count_world(sizes, 5).clip_flops for sizes in (TEACHER, SIZES))
    assert (found.teachers, found.cached) == (teacher, 20)
    assert found.students == (3 * student,)
    assert found.units == (config.phases[0].batch.global_size,)
