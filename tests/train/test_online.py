"""A teacher that is asked during training says the same from the worker and from actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_denoisers import save_pipeline
from torch import Tensor
from video_toys import causal_student, clips, tiny_wan, video_batch

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.recipes.self_forcing import SelfForcing
from raydistill.signals import Draws
from raydistill.train.job import PhaseJob
from raydistill.train.online import ActorScore, ScoreActor, asked_by, online_teacher, score_pool

FAMILY = {"library": "diffusers", "dtype": "float32"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return save_pipeline(tiny_wan(1), folder, FlowMatchEulerDiscreteScheduler(shift=5.0), inside="transformer")


def job_of(pipeline: Path, *, actors: int = 1, **recipe: object) -> PhaseJob:
    model = {**FAMILY, "source": str(pipeline)}
    config = RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(pipeline / "run"),
            "source": {"kind": "prompts", "paths": ["x"], "size": [8, 8], "frames": 4, "vae": "none",
                       "negative_prompt": "", "text_encoders": [{"source": "x"}]},
            "student": {"model": model, "generator": {"t_list": [1.0, 0.5, 0.0], "causal": {"chunk_frames": 2}}},
            "phases": [
                {
                    "name": "p",
                    "steps": 3,
                    "recipe": {"kind": "self_forcing", "real_score": model, "guidance_scale": 3.0, **recipe},
                    "batch": {"global_size": 2, "micro_size": 2},
                    "optimizer": {"student": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
                    "precision": "fp32",
                }
            ],
            "resources": {"teacher": {"actors": [actors, actors]}, "train": {"workers": 0}},
        }
    )  # fmt: skip
    return PhaseJob(config, config.phases[0], run=str(pipeline / "run"), folder="phases/p", inputs="x")


def question() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return clips(2, 4, seed=7), torch.tensor([0.3, 0.9], dtype=torch.float64), video_batch(2)


@pytest.mark.parametrize("attention", ["bidirectional", "autoregressive"])
def test_an_actor_gives_the_bits_of_the_worker(pipeline: Path, attention: str) -> None:
    job = job_of(pipeline, teacher_attention=attention)
    x, t, batch = question()
    context = clips(2, 4, seed=9)
    local = online_teacher(job, rank=0)
    asked = asked_by(job.config, job.phase)
    assert local is not None
    assert asked is not None
    told = {name: batch[name].numpy() for name in ("prompt_embeds", "empty_embeds")}
    actor = ScoreActor(asked, job.config.resources.teacher)
    there = actor.clean(x.numpy(), t.numpy(), told, context.numpy())
    assert np.array_equal(there, local.teacher.start(x, t, batch, context)().numpy())
    assert local.critic is not None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in local.critic.parameters())


def test_an_actor_says_what_keeps_its_teacher_from_being_loaded(pipeline: Path) -> None:
    job = job_of(pipeline, real_score={**FAMILY, "source": str(pipeline / "nowhere")})
    asked = asked_by(job.config, job.phase)
    assert asked is not None
    failure = ScoreActor(asked, job.config.resources.teacher).ready()
    assert failure is not None
    assert failure[0] == "DataError"
    assert "nowhere" in failure[1]
    known = asked_by(job_of(pipeline).config, job_of(pipeline).phase)
    assert known is not None
    assert ScoreActor(known, job.config.resources.teacher).ready() is None


def test_a_phase_may_go_on_with_its_teacher_somewhere_else(pipeline: Path) -> None:
    assert job_of(pipeline, online="actors").settings() == job_of(pipeline).settings()
    assert job_of(pipeline, guidance_scale=2.0).settings() != job_of(pipeline).settings()


def test_phases_that_ask_nobody_get_nobody(pipeline: Path) -> None:
    job = job_of(pipeline)
    other = job.config.phases[0].model_copy(update={"recipe": None})
    assert asked_by(job.config, other) is None
    with score_pool(job):
        pass  # online: local starts no Ray


def test_the_model_of_the_first_teacher_is_asked_where_none_is_named(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="real_score: there is no teacher of library diffusers"):
        job_of(pipeline, real_score=None)


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def losses(job: PhaseJob) -> list[float]:
    online = online_teacher(job, rank=0)
    assert online is not None
    recipe = SelfForcing(job.phase.recipe, causal_student(tiny_wan(0)), {}, online)  # type: ignore[arg-type]
    draws = [Draws(seed=0, phase="p", step=step, positions=(0, 1)) for step in range(3)]
    return [recipe.loss("student", video_batch(2, seed=i), d).parts["dmd"].sum.item() for i, d in enumerate(draws)]


@pytest.mark.slow
def test_a_pool_gives_the_losses_of_the_worker_and_is_gone_afterwards(pipeline: Path, cluster: Any) -> None:
    alone = losses(job_of(pipeline))
    job = job_of(pipeline, actors=2, online="actors")
    with score_pool(job):
        assert losses(job) == alone
        x, t, batch = question()
        scores = [ActorScore(job, rank) for rank in range(4)]
        answers = [score.start(x, t, batch) for score in scores]
        assert all(torch.equal(answer(), answers[0]()) for answer in answers)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ActorScore(job, 0)


@pytest.mark.slow
def test_a_pool_without_room_or_weights_is_refused(pipeline: Path, cluster: Any) -> None:
    with (
        pytest.raises(ConfigError, match=r"resources\.teacher"),
        score_pool(job_of(pipeline, actors=9, online="actors")),
    ):
        pass
    missing = {**FAMILY, "source": str(pipeline / "nowhere")}
    with pytest.raises((ConfigError, DataError), match="nowhere"):  # noqa: SIM117
        with score_pool(job_of(pipeline, online="actors", real_score=missing)):
            pass
