"""The losses of both players against the algorithm written out, and what must not depend on what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from video_toys import FAMILIES, causal_student, teacher, tiny_cosmos, tiny_wan, video_batch

from raydistill.config.recipes import GanConfig, SelfForcingRecipe
from raydistill.errors import ConfigError, SignalMismatch
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import predict
from raydistill.models.rollout import Rollout
from raydistill.recipes.base import Loss
from raydistill.recipes.self_forcing import SelfForcing
from raydistill.signals import Draws

GAN = GanConfig(weight=0.1, features=("blocks.0", "blocks.1"), r1_weight=10.0)


def config(**settings: object) -> SelfForcingRecipe:
    return SelfForcingRecipe.model_validate({"kind": "self_forcing", "guidance_scale": 3.0, **settings})


def recipe_of(network: Any = None, *, seed: int = 0, **settings: Any) -> SelfForcing:
    make = network or tiny_wan
    how = config(**settings)
    chunk = 2 if how.teacher_attention == "autoregressive" else None
    online = teacher(make(seed + 1), guidance=how.guidance_scale, chunk_frames=chunk)
    return SelfForcing(how, causal_student(make(seed)), {}, online)


def draws(*positions: int, step: int = 3) -> Draws:
    return Draws(seed=0, phase="p", step=step, positions=positions)


def total(loss: Loss) -> Tensor:
    return torch.stack([part.weight * part.sum for part in loss.parts.values()]).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_gradient_is_that_of_the_scores_at_the_noised_rollout(family: str) -> None:
    recipe, batch, rng = recipe_of(FAMILIES[family]), video_batch(2), draws(0, 1)
    total(recipe.loss("student", batch, rng)).backward()
    ours = gradients(recipe.student)

    made = recipe.made(batch, rng)
    u = 0.02 + 0.96 * torch.tensor([g.random() for g in rng.rows("score time")], dtype=torch.float64)
    t = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)
    wide = t.view(-1, 1, 1, 1, 1)
    x_t = ((1 - wide) * made + wide * rng.normal("score noise", made.shape[1:])).float().detach()

    def clean(network: nn.Module, text: Tensor) -> Tensor:
        with torch.no_grad():
            return x_t - wide * predict(network, x_t, (1000 * t).float(), {"prompt_embeds": text})

    teacher_network = recipe._teacher.score.network  # type: ignore[attr-defined]
    with_text, without = (clean(teacher_network, batch[k]) for k in ("prompt_embeds", "empty_embeds"))
    real = without + 3.0 * (with_text - without)
    fake = clean(recipe.players()["critic"], batch["prompt_embeds"])
    scale = (made.detach() - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    numbers = made[0].numel()
    made.backward(batch["weight"].view(-1, 1, 1, 1, 1) * (fake - real) / scale / numbers)
    written_out = gradients(recipe.student)
    assert ours.keys() == written_out.keys()
    for name, gradient in ours.items():
        assert (gradient - written_out[name]).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_the_critic_learns_to_denoise_the_students_videos() -> None:
    recipe, batch, rng = recipe_of(), video_batch(2), draws(0, 1)
    loss = recipe.loss("critic", batch, rng)
    total(loss).backward()
    made = recipe.made(batch, rng).detach()
    u = 0.02 + 0.96 * torch.tensor([g.random() for g in rng.rows("score time")], dtype=torch.float64)
    t = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)
    wide, eps = t.view(-1, 1, 1, 1, 1), rng.normal("score noise", made.shape[1:])
    x_t = ((1 - wide) * made + wide * eps).float()
    flow = predict(recipe.players()["critic"], x_t, (1000 * t).float(), batch)
    error = ((flow - (eps - made)).square().flatten(1).mean(1) * batch["weight"]).sum()
    assert loss.parts["denoising"].sum.item() == pytest.approx(error.item(), rel=1e-5)
    assert gradients(recipe.players()["critic"])
    assert not gradients(recipe.student), "a critic's step leaves the student alone"


def test_a_critic_that_knows_what_the_teacher_knows_moves_nothing() -> None:
    recipe, batch = recipe_of(guidance_scale=1.0), video_batch(2)
    loss = recipe.loss("student", batch, draws(0, 1))
    total(loss).backward()
    assert loss.parts["dmd"].sum.item() == 0.0
    assert max(float(g.abs().max()) for g in gradients(recipe.student).values()) == 0.0


@pytest.mark.parametrize("player", ["student", "critic"])
@pytest.mark.parametrize("settings", [{}, {"gan": GAN}, {"teacher_attention": "autoregressive"}])
def test_losses_are_sums_over_samples_however_these_are_split(player: str, settings: dict[str, Any]) -> None:
    recipe, batch = recipe_of(**settings), video_batch(3)
    whole = recipe.loss(player, batch, draws(0, 1, 2))
    pieces = [recipe.loss(player, {k: v[i : i + 1] for k, v in batch.items()}, draws(i)) for i in range(3)]
    for name, part in whole.parts.items():
        assert part.sum.item() == pytest.approx(sum(p.parts[name].sum.item() for p in pieces), rel=1e-4), name


def test_the_exit_step_changes_from_step_to_step_and_is_the_same_for_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, seen = recipe_of(), {}

    def rollout(self: Rollout, noise: Any, conditioning: Any, *, exit_step: int) -> Tensor:
        seen.setdefault(step, set()).add(exit_step)
        return noise("start")

    monkeypatch.setattr(Rollout, "__call__", rollout)
    for step in range(12):
        for position in (0, 5):
            recipe.made(video_batch(1), draws(position, step=step))
    assert all(len(exits) == 1 for exits in seen.values())
    assert set.union(*seen.values()) == {0, 1, 2}


def test_the_critic_has_its_turns_before_each_of_the_students() -> None:
    turns = [recipe_of(critic_updates=3).turn(step) for step in range(8)]
    assert turns == ["critic", "critic", "critic", "student"] * 2


def test_heads_push_the_student_through_the_frozen_teacher() -> None:
    recipe, batch = recipe_of(gan=GAN), video_batch(2)
    loss = recipe.loss("student", batch, draws(0, 1))
    (loss.parts["fooling"].weight * loss.parts["fooling"].sum).backward()
    assert any(g.abs().max() > 0 for g in gradients(recipe.student).values())
    network = recipe._teacher.score.network  # type: ignore[attr-defined]
    assert not gradients(network)
    assert loss.parts["fooling"].weight == GAN.weight
    told = recipe.loss("critic", batch, draws(0, 1))
    assert set(told.parts) == {"denoising", "telling", "r1"}
    total(told).backward()
    found = gradients(recipe.players()["critic"])
    assert {name.partition(".")[0] for name in found} == {"denoiser", "heads"}
    assert not gradients(network)


def test_heads_learn_to_tell_clips_from_rollouts() -> None:
    recipe = recipe_of(gan=GAN.model_copy(update={"r1_weight": 0.0}), t_range=(0.02, 0.2), shift=1.0)
    batch = video_batch(4)
    batch["latents"] = batch["latents"] + 2
    heads = recipe.players()["critic"].heads
    optimizer, losses = torch.optim.Adam(heads.parameters(), lr=1e-2), []
    for step in range(30):
        loss = recipe.loss("critic", batch, draws(0, 1, 2, 3, step=step)).parts["telling"].sum / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.0
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_an_autoregressive_score_sees_no_later_chunk_of_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[Tensor] = []
    recipe, batch = recipe_of(teacher_attention="autoregressive"), video_batch(1)
    asked = CausalDenoiser.predict

    def watched(self: CausalDenoiser, x: Tensor, t: Tensor, text: Any, **context: Tensor) -> Tensor:
        contexts.append(context["clean"])
        return asked(self, x, t, text, **context)

    monkeypatch.setattr(CausalDenoiser, "predict", watched)
    recipe.loss("student", batch, draws(0))
    made = recipe.made(batch, draws(0))
    assert len(contexts) == 3, "the teacher with and without its text, and the critic"
    assert all(torch.equal(c, made) for c in contexts)


def test_a_rollout_may_be_longer_than_the_clips() -> None:
    batch = video_batch(1)
    del batch["latents"]
    assert recipe_of(frames=7).made(batch, draws(0)).shape[2] == 7
    assert recipe_of().made(batch, draws(0)).shape[2] == 4


def test_bad_input_is_named() -> None:
    batch = video_batch(1)
    with pytest.raises(ConfigError, match="chunk of 1 to 1 latent frames"):
        recipe_of(frames=1).loss("student", batch, draws(0))
    with pytest.raises(SignalMismatch, match="negative prompt"):
        recipe_of().loss("student", {k: v for k, v in batch.items() if k != "empty_embeds"}, draws(0))
    with pytest.raises(ConfigError, match=r"found latents of shape \[3, 4, 4\]"):
        recipe_of().loss("student", {**batch, "latents": batch["latents"][:, :, 0]}, draws(0))
    with pytest.raises(ConfigError, match="learns from clips"):
        recipe_of(gan=GAN).loss("critic", {k: v for k, v in batch.items() if k != "latents"}, draws(0))
    plain = causal_student(tiny_wan())
    plain.generator = None
    with pytest.raises(ConfigError, match=r"WanTransformer3DModel without student\.generator\.causal"):
        SelfForcing(config(), plain, {}, teacher(tiny_wan(1)))
    with pytest.raises(ConfigError, match=r"module of WanTransformer3DModel"):
        recipe_of(gan=GAN.model_copy(update={"features": ("blocks.9",)}))
    with pytest.raises(ValueError, match="online: local"):
        config(gan=GAN, online="actors")
    with pytest.raises(ValueError, match="t_range"):
        config(t_range=(0.5, 0.5))


def test_students_and_teachers_of_different_families_are_matched_in_one_latent_space() -> None:
    online = teacher(tiny_cosmos(1))
    recipe = SelfForcing(config(), causal_student(tiny_wan()), {}, online)
    total(recipe.loss("student", video_batch(2), draws(0, 1))).backward()
    assert gradients(recipe.student)


def test_a_score_of_another_noise_schedule_is_refused() -> None:
    from denoiser_toys import process_of

    online = teacher(tiny_wan(1))
    other = copy.copy(online)
    object.__setattr__(other, "process", process_of("epsilon"))
    with pytest.raises(ConfigError, match="flow and variance_preserving"):
        SelfForcing(config(), causal_student(tiny_wan()), {}, other)
