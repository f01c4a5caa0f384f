"""Students on kept trajectories: exact toys, the times they are drawn at, and caches that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from video_toys import FLOW, TEXT, TOKENS, tiny_wan

from raydistill.config.models import GeneratorConfig
from raydistill.config.recipes import TrajectoryRecipe
from raydistill.diffusion.process import Process
from raydistill.errors import CacheMismatch, ConfigError
from raydistill.models.denoiser import process_of_scheduler
from raydistill.models.sampler import Sampler
from raydistill.recipes.base import Loss, TeacherView
from raydistill.recipes.trajectory import Trajectory
from raydistill.signals import Draws

MEAN, STD = 0.7, 0.4
TIMES = [1.0, 0.9375, 0.8333333, 0.625]
BETAS = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "timestep_spacing": "trailing",
}  # fmt: skip


class Affine(UNet2DModel):
    """A denoiser that says `scale x + shift`, with a scale and a shift for each time that it is told."""

    def __init__(self, times: list[float]):
        nn.Module.__init__(self)
        self.times = torch.tensor(times)
        self.scale, self.shift = nn.Parameter(torch.zeros(len(times))), nn.Parameter(torch.zeros(len(times)))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:  # type: ignore[override]
        place = (self.times[None] - t[:, None] / 1000).abs().argmin(1)
        return (self.scale[place].view(-1, 1, 1, 1) * x + self.shift[place].view(-1, 1, 1, 1),)


def view(process: Process, keep_t: list[float], sampler: Sampler | None = None, **changes: Any) -> TeacherView:
    times = torch.tensor(keep_t, dtype=torch.float64)
    alphas, sigmas = process.at_time(times)
    facts = {"t": keep_t, "alphas": alphas.tolist(), "sigmas": sigmas.tolist(), "process": process.to_json()}
    return TeacherView("ode", 1.0, {**facts, **changes})


def carrying(student: nn.Module, scheduler: dict, t_list: list[float], **causal: Any) -> nn.Module:
    student.process = process_of_scheduler(scheduler)  # type: ignore[assignment]
    student.generator = GeneratorConfig.model_validate(  # type: ignore[assignment]
        {"t_list": t_list, "causal": causal or None}
    )
    return student


def recipe_of(student: nn.Module, teacher: TeacherView, **settings: Any) -> Trajectory:
    return Trajectory(TrajectoryRecipe.model_validate({"kind": "trajectory", **settings}), student, {"ode": teacher})


def rng(step: int, samples: int) -> Draws:
    return Draws(seed=0, phase="p", step=step, positions=tuple(range(samples)))


def total(loss: Loss) -> Tensor:
    return torch.stack([part.weight * part.sum for part in loss.parts.values()]).sum()


def perfect(process: Process, sampler: Sampler):
    """A denoiser of data N(m, s²), in the type of `process`."""
    nodes = {round(node.told, 3): node for node in sampler.nodes[:-1]}

    def predict(x_t: Tensor, told: Tensor) -> Tensor:
        node = nodes[round(float(told[0]), 3)]
        x0 = MEAN + node.alpha * STD**2 / (node.alpha**2 * STD**2 + node.sigma**2) * (x_t - node.alpha * MEAN)
        eps = (x_t - node.alpha * x0) / node.sigma
        return eps - x0 if process.prediction_type == "flow" else eps

    return predict


# --- exact toys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduler", "times"), [(FLOW, TIMES), (FLOW, [1.0]), (BETAS, [0.999, 0.6, 0.3])])
def test_the_student_recovers_the_known_map_of_a_gaussian(scheduler: dict, times: list[float]) -> None:
    """On data N(m, s²) the path is x_t = alpha m + sqrt(alpha² s² + sigma²) z, so x0 is affine in x_t, exactly."""
    process = process_of_scheduler(scheduler)
    sampler = Sampler(scheduler, process, steps=400, keep_t=times, insert=True, where="t")
    clean, path = sampler(
        torch.randn(512, 1, 2, 2, generator=torch.Generator().manual_seed(0)), perfect(process, sampler)
    )
    teacher = view(process, times)
    student = carrying(Affine(times), scheduler, [*times, 0.0])
    recipe = recipe_of(student, teacher)
    batch = {"ode/clean": clean, "ode/path": path, "weight": torch.ones(512)}
    assert recipe.reads == {"ode": ("clean", "path")}
    optimizer = torch.optim.LBFGS(student.parameters(), lr=1, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(recipe.loss("student", batch, rng(0, 512)))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    alphas, sigmas = process.at_time(torch.tensor(times, dtype=torch.float64))
    for place, (alpha, sigma) in enumerate(zip(alphas.tolist(), sigmas.tolist(), strict=True)):
        x = torch.tensor([[-1.0], [0.0], [1.0]]).view(3, 1, 1, 1)
        own = student(x, torch.full((3,), 1000 * times[place]))[0]
        found = process.clean_of(own, x, torch.full((3,), times[place])).flatten()
        spread = (alpha**2 * STD**2 + sigma**2) ** 0.5
        wanted = MEAN + STD / spread * (x.flatten() - alpha * MEAN)
        torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=2e-2)


# --- chunk by chunk ---------------------------------------------------------------------------------------------


def video_batch(samples: int = 3, frames: int = 8, states: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "ode/clean": torch.randn(samples, 3, frames, 4, 4, generator=generator),
        "ode/path": torch.randn(samples, states, 3, frames, 4, 4, generator=generator).bfloat16(),
        "prompt_embeds": torch.randn(samples, TOKENS, TEXT, generator=generator),
        "weight": torch.ones(samples),
    }


def test_with_one_chunk_the_causal_loss_is_that_of_all_frames_together() -> None:
    process, batch = process_of_scheduler(FLOW), video_batch()
    student = carrying(tiny_wan(), FLOW, [1.0, 0.0], chunk_frames=8)
    plain = recipe_of(student, view(process, TIMES)).loss("student", batch, rng(0, 3))
    for context in ("clean", "drawn"):
        causal = recipe_of(student, view(process, TIMES), causal=True, context=context)
        torch.testing.assert_close(total(causal.loss("student", batch, rng(0, 3))), total(plain), rtol=1e-5, atol=0)


def test_clean_chunks_do_not_count_and_all_frames_of_a_chunk_have_one_time() -> None:
    process, batch = process_of_scheduler(FLOW), video_batch(samples=64)
    student = carrying(tiny_wan(), FLOW, [*TIMES, 0.0], chunk_frames=3)
    recipe = recipe_of(student, view(process, TIMES), causal=True)
    told: list[Tensor] = []
    inner = recipe._causal.predict  # type: ignore[union-attr]

    def watched(x_t: Tensor, t: Tensor, given: Any, **more: Any) -> Tensor:
        told.append(t)
        return inner(x_t, t, given, **more)

    recipe._causal.predict = watched  # type: ignore[union-attr, method-assign]
    batch["ode/clean"].requires_grad_(True)
    total(recipe.loss("student", batch, rng(0, 64))).backward()
    (t,) = told
    for a, b in ((0, 2), (2, 5), (5, 8)):
        assert (t[:, a:b] == t[:, a : a + 1]).all()
    assert (t == 0).any()
    assert (t > 0).any(1).all()  # no sample is clean as a whole
    assert {*t.unique().tolist()} == {
        0.0,
        *(round(1000 * k, 4) for k in (625.0e-3, 1.0)),
        937.5,
        *t[(t > 833) & (t < 834)].tolist(),
    }
    # The last chunk is context to none, so where it is clean nothing depends on it.
    gradient = batch["ode/clean"].grad
    assert gradient is not None
    clean = t[:, 7] == 0
    assert clean.any()
    assert not gradient[clean][:, :, 5:].any()
    assert gradient[~clean][:, :, 5:].any()


def test_later_states_do_not_reach_earlier_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    process = process_of_scheduler(FLOW)
    student = carrying(tiny_wan(), FLOW, [*TIMES, 0.0], chunk_frames=3)
    for context in ("drawn", "clean"):
        recipe = recipe_of(student, view(process, TIMES), causal=True, context=context)
        batch = video_batch()
        path = batch["ode/path"].float().requires_grad_(True)
        grid = recipe._grids["ode"]
        error = recipe._error(recipe.teachers["ode"], {**batch, "ode/path": path}, rng(0, 3))
        assert torch.autograd.grad(error.sum(), path, retain_graph=True)[0].any()
        own: list[Tensor] = []
        monkeypatch.setattr(grid, "clean_of", lambda said, x_t, steps, own=own: own.append(said) or said)
        recipe._error(recipe.teachers["ode"], {**batch, "ode/path": path}, rng(0, 3))
        (reached,) = torch.autograd.grad(own[0][:, :, :2].sum(), path)
        assert reached[:, :, :, :2].any()
        assert not reached[:, :, :, 2:].any()


def test_context_noise_reaches_clean_context_and_no_other() -> None:
    process, batch = process_of_scheduler(FLOW), video_batch()
    losses = {}
    for context in ("drawn", "clean"):
        for noise in (0.0, 0.1):
            student = carrying(tiny_wan(), FLOW, [*TIMES, 0.0], chunk_frames=3, context_noise=noise)
            recipe = recipe_of(student, view(process, TIMES), causal=True, context=context)
            losses[context, noise] = total(recipe.loss("student", batch, rng(0, 3))).item()
    assert losses["drawn", 0.0] == losses["drawn", 0.1]
    assert losses["clean", 0.0] != losses["clean", 0.1]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    process, batch = process_of_scheduler(FLOW), video_batch(samples=4)
    student = carrying(tiny_wan(), FLOW, [*TIMES, 0.0], chunk_frames=3)
    recipe = recipe_of(student, view(process, TIMES), causal=True)
    whole = total(recipe.loss("student", batch, rng(0, 4)))
    parts = [
        total(
            recipe.loss(
                "student",
                {name: tensor[i : i + 2] for name, tensor in batch.items()},
                Draws(seed=0, phase="p", step=0, positions=(i, i + 1)),
            )
        )
        for i in (0, 2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=0)


# --- what does not fit ------------------------------------------------------------------------------------------


def test_times_that_the_cache_lacks_are_named_with_those_it_has() -> None:
    process = process_of_scheduler(FLOW)
    student = carrying(Affine(TIMES), FLOW, [1.0, 0.9, 0.0])
    with pytest.raises(CacheMismatch, match=r"keeps, at t 1 \(sigma 1\), 0.9375 .*found 0.9"):
        recipe_of(student, view(process, TIMES))


def test_another_shift_of_a_flow_is_the_same_path_but_another_noise_schedule_is_none() -> None:
    student = carrying(Affine(TIMES), {**FLOW, "shift": 2.0}, [1.0, 0.0])
    recipe_of(student, view(process_of_scheduler(FLOW), TIMES))
    with pytest.raises(ConfigError, match="variance_preserving"):
        recipe_of(student, view(process_of_scheduler(BETAS), [0.999, 0.5]))


def test_a_student_without_a_list_of_times_is_refused() -> None:
    plain = Affine(TIMES)
    plain.process = process_of_scheduler(FLOW)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"student\.generator"):
        recipe_of(plain, view(process_of_scheduler(FLOW), TIMES))


def test_a_chunk_beyond_the_clip_is_refused() -> None:
    student = carrying(tiny_wan(), FLOW, [1.0, 0.0], chunk_frames=9)
    recipe = recipe_of(student, view(process_of_scheduler(FLOW), TIMES), causal=True)
    with pytest.raises(ConfigError, match="chunk_frames"):
        recipe.loss("student", video_batch(), rng(0, 3))
