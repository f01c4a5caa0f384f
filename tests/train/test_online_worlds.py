"""World models that are asked during training say the same from the worker, from actors and out of a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from world_toys import PHASE, build_inputs, build_signal, run_config, teacher_folder, teacher_section, write_episodes

from raydistill.cache.episode_read import EpisodeDataset
from raydistill.cluster import session
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.pipeline import Run, advance
from raydistill.recipes.features import Features
from raydistill.signals import Draws
from raydistill.storage import Store
from raydistill.train.job import PhaseJob
from raydistill.train.online_worlds import ActorTeacher, WorldActor, online_views, world_pools

RULES = {
    "features": [{"student": "dynamics.blocks.0", "teacher": ["block"]}],
    "attention": [{"student": "dynamics.blocks.0.temporal.map", "teacher": ["time"]}],
}
FIELDS = ("frames", "logits", "codes", "tap.block", "tap.time")


def configured(folder: Path, online: str, *, actors: int = 1, weight: float = 1.0, **sections: Any) -> RunConfig:
    if not (folder / "episodes").exists():
        write_episodes(folder / "episodes", number=8)
        teacher_folder(folder / "teacher")
        teacher_folder(folder / "other/teacher", seed=5)
    teachers = [
        teacher_section(folder, online=online, weight=weight),
        teacher_section(folder / "other", name="other", online=online),
    ]
    phase = {**PHASE, "recipe": {"kind": "features", "kl": 0.5, **RULES}}
    resources = {"teacher": {"actors": [actors, actors], "cpus": 1}, "train": {"workers": 0}}
    changes = {"teachers": teachers, "phases": [phase], "resources": resources, "name": online,
               "run_dir": str(folder / online), "evaluate": {"baseline": False, "held_out": 0.2}}  # fmt: skip
    return run_config(folder, **{**changes, **sections})


def job_of(config: RunConfig) -> PhaseJob:
    inputs, _ = build_inputs(config)
    return PhaseJob(config, config.phases[0], run=config.run_dir, folder="phases/all", inputs=inputs.uri)


def batch_of(job: PhaseJob) -> dict[str, torch.Tensor]:
    dataset = EpisodeDataset(Store(job.inputs), {}, split="train", fields={})
    found = dataset.batch(range(4))
    return {name: found[name] for name in ("frames", "actions", "valid")}


def test_an_actor_gives_the_bits_of_the_worker_and_only_what_is_wanted(tmp_path: Path) -> None:
    job = job_of(configured(tmp_path, "local"))
    batch = batch_of(job)
    local = online_views(job, 2.0, rank=0)["big"]
    section = job.config.teachers[0]
    actor = WorldActor(section, 5, job.config.resources.teacher)  # type: ignore[arg-type]
    assert actor.ready() is None
    assert actor.facts() == local.facts
    assert local.online is not None
    here = local.online.start(batch, FIELDS)()
    there = actor.said({name: values.numpy() for name, values in batch.items()}, FIELDS)
    assert tuple(there) == tuple(here) == FIELDS
    assert all(torch.equal(torch.from_numpy(there[name]), here[name]) for name in FIELDS)
    assert tuple(local.online.start(batch, ("codes",))()) == ("codes",)


def test_an_actor_says_what_keeps_its_teacher_from_being_loaded(tmp_path: Path) -> None:
    config = configured(tmp_path, "actors")
    section = config.teachers[0].model_copy(update={"taps": {"x": {"module": "dynamics.blok"}}})
    section = type(section).model_validate(section.model_dump())
    failure = WorldActor(section, 5, config.resources.teacher).ready()  # type: ignore[arg-type]
    assert failure is not None
    assert failure[0] == "ConfigError"
    assert "dynamics.block" in failure[1]


def test_phases_that_ask_nobody_start_no_ray(tmp_path: Path) -> None:
    alone = {**PHASE, "recipe": {"kind": "features", "alpha": 0.0}}
    for config in (configured(tmp_path, "local"), configured(tmp_path, "actors", phases=[alone])):
        job = job_of(config)
        with world_pools(job, connect=lambda: pytest.fail("Ray was wanted")):
            pass
    assert online_views(job, 2.0, rank=0) == {}


def test_a_phase_may_go_on_with_its_teachers_somewhere_else(tmp_path: Path) -> None:
    assert job_of(configured(tmp_path, "actors")).settings() == job_of(configured(tmp_path, "local")).settings()


def trained(config: RunConfig, **signals: Any) -> list[dict[str, float]]:
    """Loss and parts of the steps of a run."""
    run = Run(config)
    run.inputs = build_inputs(config)
    run.signals = dict(signals)
    advance(run, ("init", "train"))
    lines = [json.loads(line) for line in run.store.read_text("metrics.jsonl").splitlines()]
    return [{"loss": line["loss"], **line["parts"]} for line in lines if "parts" in line]


def test_cached_and_online_teachers_train_the_same_student(tmp_path: Path) -> None:
    config = configured(tmp_path, "no")
    signals = {teacher.name: build_signal(config, i) for i, teacher in enumerate(config.teachers)}
    cached, online = trained(config, **signals), trained(configured(tmp_path, "local"))
    assert len(cached) == 3
    assert any("feature/other" in name for name in cached[0]), sorted(cached[0])
    for one, other in zip(cached, online, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_a_pool_for_each_teacher_trains_the_student_of_the_worker_and_is_gone_afterwards(tmp_path: Path) -> None:
    import ray

    local = trained(configured(tmp_path, "local"))
    with session():
        ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        config = configured(tmp_path, "actors", actors=2)
        assert trained(config) == local
        job = job_of(config)
        with pytest.raises(ValueError, match="Failed to look up actor"):
            online_views(job, 2.0, rank=0)
        with world_pools(job):
            views = [online_views(job, 2.0, rank=rank) for rank in range(3)]
            assert isinstance(views[0]["other"].online, ActorTeacher)
            batch, rng = batch_of(job), Draws(seed=0, phase="p", step=0, positions=(0, 1, 2, 3))
            here = online_views(job_of(configured(tmp_path, "local")), 2.0, rank=0)
            found = [
                Features(job.phase.recipe, student(config), view).loss("student", batch, rng).parts  # type: ignore
                for view in (here, *views)
            ]
            for parts in found[1:]:
                assert {n: p.sum.item() for n, p in parts.items()} == {n: p.sum.item() for n, p in found[0].items()}


def student(config: RunConfig) -> torch.nn.Module:
    from world_toys import small_world

    return small_world()


@pytest.mark.slow
def test_pools_without_room_or_weights_are_refused(tmp_path: Path) -> None:
    import ray

    with session():
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        with (
            pytest.raises(ConfigError, match=r"resources\.teacher.*4"),
            world_pools(job_of(configured(tmp_path, "actors", actors=2))),
        ):
            pass
        nowhere = [teacher_section(tmp_path / "nowhere", online="actors")]
        job = job_of(configured(tmp_path, "actors", teachers=nowhere))
        with pytest.raises(DataError, match="nowhere"), world_pools(job):
            pass
