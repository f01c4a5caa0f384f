"""Causal recipes on a video whose every conditional is known: what they learn is what is true."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ar1 import (
    FRAMES,
    RHO,
    TIMES,
    Ar1Causal,
    Ar1Student,
    Known,
    autoregressive,
    bidirectional,
    clean_given_all,
    covariance_of,
    end_of_path,
    videos,
)
from torch import Tensor

from raydistill.config.recipes import (
    CausalConsistencyRecipe,
    SelfForcingRecipe,
    TeacherForcingRecipe,
    TrajectoryRecipe,
)
from raydistill.models.rollout import Rollout
from raydistill.recipes import causal_consistency, self_forcing, teacher_forcing, trajectory
from raydistill.recipes.base import Recipe, TeacherView
from raydistill.recipes.causal_consistency import towards
from raydistill.recipes.online import Online
from raydistill.signals import Draws

SPREAD = math.sqrt(1 - RHO**2)
ROWS = 256


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (causal_consistency, self_forcing, teacher_forcing, trajectory):
        monkeypatch.setattr(module, "CausalDenoiser", Ar1Causal)


def batch_of(step: int, rows: int = ROWS) -> dict[str, Tensor]:
    return {
        "latents": videos(rows, seed=step),
        "latent_shape": torch.tensor([[1, FRAMES, 1, 1]]).repeat(rows, 1),
        "prompt_embeds": torch.zeros(rows, 1, 1),
        "weight": torch.ones(rows),
    }


class QuickDraws(Draws):
    """One generator for all rows of a step, since hundreds of them take longer than the toy."""

    def rows(self, stream: str) -> list[np.random.Generator]:
        return [self._generator(stream)] * len(self.positions)


def draws(step: int, rows: int = ROWS) -> Draws:
    return QuickDraws(seed=0, phase="p", step=step, positions=tuple(range(rows)))


def loss_of(recipe: Recipe[Any], player: str, step: int) -> Tensor:
    parts = recipe.loss(player, batch_of(step), draws(step)).parts
    return torch.stack([p.weight * p.sum for p in parts.values()]).sum() / ROWS


def trained(recipe: Recipe[Any], steps: int, lr: float) -> Ar1Student:
    """Adam with a rate that falls to 0."""
    student: Any = recipe.student
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(recipe, "student", step).backward()
        optimizer.step()
    return student


def path_batch(step: int, end: Tensor, rho: float | None) -> dict[str, Tensor]:
    """Paths to samples `end` z of noise z [rows, frames]: chunk by chunk with this ρ, else of all frames together."""
    z = torch.randn(ROWS, FRAMES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    clean = z @ end.T
    if rho is None:
        values, vectors = torch.linalg.eigh(covariance_of(RHO, SPREAD))
        states = [z @ (vectors * ((1 - t) ** 2 * values + t**2).sqrt()) @ vectors.T for t in TIMES[:-1]]
    else:
        mean = rho * torch.cat([torch.zeros(ROWS, 1), clean[:, :-1]], 1)
        spread = torch.tensor([1.0, *[SPREAD] * (FRAMES - 1)])
        states = [(1 - t) * mean + ((1 - t) ** 2 * spread**2 + t**2).sqrt() * z for t in TIMES[:-1]]
    wide = (slice(None), None, slice(None), None, None)
    return {
        "ode/clean": clean[wide].float(),
        "ode/path": torch.stack([s[wide].float() for s in states], 1),
        "weight": torch.ones(ROWS),
    }


def causal_kd(student: Ar1Student) -> trajectory.Trajectory:
    facts: dict[str, Any] = {
        "t": list(TIMES[:-1]), "sigmas": list(TIMES[:-1]), "alphas": [1 - t for t in TIMES[:-1]],
        "process": student.process.to_json(),
    }  # fmt: skip
    how = TrajectoryRecipe(kind="trajectory", causal=True, context="clean")
    return trajectory.Trajectory(how, student, {"ode": TeacherView("ode", 1.0, facts)})


def follow(student: Ar1Student, batches: Callable[[int], dict[str, Tensor]], steps: int) -> float:
    """CausalKD for some steps; the mean loss over twenty fresh batches afterwards."""
    recipe, optimizer = causal_kd(student), torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        (recipe.loss("student", batches(step), draws(step)).parts["trajectory"].sum / ROWS).backward()
        optimizer.step()
    fresh = range(1000, 1020)
    found = [recipe.loss("student", batches(i), draws(i)).parts["trajectory"].sum.item() / ROWS for i in fresh]
    return sum(found) / len(found)


def test_causal_kd_recovers_the_path_of_an_autoregressive_teacher_without_an_error_left() -> None:
    mixing = torch.linalg.cholesky(covariance_of(RHO, SPREAD))
    student = Ar1Student(0.2, 1.0, "end")
    left = follow(student, lambda step: path_batch(step, mixing, RHO), 200)
    assert student.rho.item() == pytest.approx(RHO, abs=0.01)
    assert student.spread.item() == pytest.approx(SPREAD, abs=0.01)
    assert left < 1e-4


def test_causal_kd_on_a_teacher_that_sees_the_future_keeps_the_error_of_what_the_future_decides() -> None:
    values, vectors = torch.linalg.eigh(covariance_of(RHO, SPREAD))
    root = vectors * values.sqrt() @ vectors.T
    floor = 0.0
    for t in TIMES[:-1]:
        state = vectors * ((1 - t) ** 2 * values + t**2).sqrt() @ vectors.T
        for k in range(FRAMES):  # the variance of x0_k that is left when x_t of the frame and all clean ones are known
            known = torch.cat([state[[k]], root[:k]])
            explained = root[k] @ known.T @ torch.linalg.solve(known @ known.T, known @ root[k])
            floor += 0.5 * float(root[k] @ root[k] - explained) / FRAMES / len(TIMES[:-1])
    left = follow(Ar1Student(0.2, 1.0, "end"), lambda step: path_batch(step, root, None), 200)
    assert floor > 0.01
    assert left > 0.98 * floor


def consistency(student: Ar1Student, teacher: Known, **settings: Any) -> causal_consistency.CausalConsistency:
    how = CausalConsistencyRecipe.model_validate({"kind": "causal_consistency", "shift": 1.0, **settings})
    return causal_consistency.CausalConsistency(how, student, {}, Online(teacher, student.process))


def test_a_step_of_the_teacher_on_a_fine_grid_stays_on_the_known_path() -> None:
    process, x0 = Ar1Student(RHO, SPREAD, "end").process, videos(64)
    past = torch.cat([torch.zeros_like(x0[:, :, :1]), x0[:, :, :-1]], 2)
    x, grid = videos(64, rho=0.0, seed=1), torch.linspace(1, 0, 4001, dtype=torch.float64)
    start, teacher = x.clone(), autoregressive()
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        at, to = torch.full((64, FRAMES), t).double(), torch.full((64, FRAMES), s).double()
        x = towards(process, x, teacher.start(x, at, {}, x0)(), at, to)
    ends = end_of_path(start, torch.tensor(1.0), past, RHO, SPREAD)
    assert (x - ends)[:, :, 1:].abs().max() < 2e-3
    assert (x - start)[:, :, 0].abs().max() < 2e-3, "the first frame is N(0, 1), and so is its noise"


def test_teacher_forcing_finds_the_conditional_and_its_exact_loss() -> None:
    recipe = teacher_forcing.TeacherForcing(
        TeacherForcingRecipe(kind="teacher_forcing", shift=1.0), Ar1Student(0.0, 1.0, "mean"), {}
    )
    student = trained(recipe, 150, 0.05)
    assert student.rho.item() == pytest.approx(RHO, abs=0.02)
    assert student.spread.item() == pytest.approx(SPREAD, abs=0.02)
    exact = teacher_forcing.TeacherForcing(recipe.config, Ar1Student(RHO, SPREAD, "mean"), {})
    found = sum(loss_of(exact, "student", 1000 + i).item() for i in range(20)) / 20
    # The variance of eps - x0 given x_t = (1-t) x0 + t eps is v / ((1-t)² v + t²) for x0 of variance v;
    # its mean over t is π√v / 2.
    wanted = sum(math.pi / 2 * s for s in (1.0, *[SPREAD] * (FRAMES - 1))) / FRAMES
    assert found == pytest.approx(wanted, rel=0.02)


def test_the_end_of_the_path_is_a_fixed_point_under_an_autoregressive_teacher() -> None:
    errors = [
        loss_of(consistency(Ar1Student(RHO, SPREAD, "end"), autoregressive(), grid=grid), "student", 0).item()
        for grid in (16, 64, 256)
    ]
    assert errors[-1] < 1e-6
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_causal_consistency_finds_the_end_of_the_path() -> None:
    student = trained(consistency(Ar1Student(0.0, 1.0, "end"), autoregressive(), grid=24), 300, 0.05)
    assert student.rho.item() == pytest.approx(RHO, abs=0.03)
    assert student.spread.item() == pytest.approx(SPREAD, abs=0.06)


def test_under_a_teacher_that_sees_the_future_no_causal_student_is_consistent() -> None:
    seen = {"grid": 256, "teacher_attention": "bidirectional"}
    student = trained(consistency(Ar1Student(RHO, SPREAD, "end"), bidirectional(), **seen), 100, 0.02)
    best = loss_of(consistency(student, bidirectional(), **seen), "student", 1000).item()
    known = loss_of(consistency(Ar1Student(RHO, SPREAD, "end"), autoregressive(), grid=256), "student", 1000).item()
    assert best > 100 * known


class KnownCritic:
    """The score of the student's own videos, which a critic would have to learn."""

    def __init__(self, student: Ar1Student):
        self.student = student

    def clean(self, x_t: Tensor, t: Tensor, batch: Any, context: Tensor | None = None) -> Tensor:
        return clean_given_all(x_t, t, covariance_of(float(self.student.rho), float(self.student.spread)))


def test_self_forcing_draws_the_students_videos_to_the_teachers() -> None:
    # With the single time 1 the student makes x_k = ρ x_(k-1) + spread · noise exactly.
    student = Ar1Student(0.2, 1.0, "end")
    student.generator = student.generator.model_copy(update={"t_list": (1.0, 0.0)})
    how = SelfForcingRecipe(kind="self_forcing", guidance_scale=1.0, shift=1.0)
    online = Online(bidirectional(), student.process, critic=Ar1Student(0.0, 1.0, "mean"))
    recipe = self_forcing.SelfForcing(how, student, {}, online)
    recipe._critic = KnownCritic(student)  # type: ignore[assignment]
    trained(recipe, 200, 0.05)
    assert student.rho.item() == pytest.approx(RHO, abs=0.03)
    assert student.spread.item() == pytest.approx(SPREAD, abs=0.03)


def test_the_exact_student_makes_the_exact_distribution_in_one_step_and_in_two() -> None:
    student = Ar1Student(RHO, SPREAD, "end")
    for times in ((1.0, 0.0), (1.0, 0.6, 0.0)):
        generator = student.generator.model_copy(update={"t_list": times})
        rollout = Rollout(Ar1Causal(student, 1), student.process, generator)  # type: ignore[arg-type]
        seeds = {"start": 1, "step 1": 2, "context": 3}
        with torch.no_grad():
            made = rollout(lambda use, s=seeds: videos(40000, rho=0.0, seed=s[use]), {}).flatten(1).double()
        found = made.T @ made / len(made)
        assert (found - covariance_of(RHO, SPREAD)).abs().max() < 0.03
