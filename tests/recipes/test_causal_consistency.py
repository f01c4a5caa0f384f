"""Causal recipes on clips, with networks of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from video_toys import FAMILIES, causal_student, teacher, tiny_wan, video_batch

from raydistill.config.recipes import CausalConsistencyRecipe, TeacherForcingRecipe
from raydistill.errors import ConfigError
from raydistill.models.causal import CausalDenoiser
from raydistill.recipes.causal_consistency import CausalConsistency
from raydistill.recipes.teacher_forcing import TeacherForcing
from raydistill.signals import Draws


def consistency(make: Any = tiny_wan, **settings: Any) -> CausalConsistency:
    how = CausalConsistencyRecipe.model_validate({"kind": "causal_consistency", "grid": 8, **settings})
    chunk = 2 if how.teacher_attention == "autoregressive" else None
    online = teacher(make(1), guidance=how.guidance_scale, chunk_frames=chunk)
    return CausalConsistency(how, causal_student(make(0)), {}, online)


def forcing(make: Any = tiny_wan, **settings: Any) -> TeacherForcing:
    return TeacherForcing(TeacherForcingRecipe(kind="teacher_forcing", **settings), causal_student(make(0)), {})


def draws(*positions: int, step: int = 0) -> Draws:
    return Draws(seed=0, phase="p", step=step, positions=positions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [consistency, forcing])
def test_losses_are_sums_over_samples_however_these_are_split(build: Any, family: str) -> None:
    recipe, batch = build(FAMILIES[family]), video_batch(3, 5)
    whole = recipe.loss("student", batch, draws(0, 1, 2))
    pieces = [recipe.loss("student", {k: v[i : i + 1] for k, v in batch.items()}, draws(i)) for i in range(3)]
    (name,) = whole.parts
    assert whole.parts[name].sum.item() == pytest.approx(sum(p.parts[name].sum.item() for p in pieces), rel=1e-4)
    assert recipe.counts(batch) == {"samples": 2.0}


@pytest.mark.parametrize("attention", ["autoregressive", "bidirectional"])
def test_chunks_have_times_of_their_own_unless_the_teacher_sees_all(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen = consistency(teacher_attention=attention), []
    asked = CausalDenoiser.predict

    def watched(self: CausalDenoiser, x: Tensor, t: Tensor, text: Any, **context: Tensor) -> Tensor:
        if self.network is recipe.student:
            seen.append(t)
        return asked(self, x, t, text, **context)

    monkeypatch.setattr(CausalDenoiser, "predict", watched)
    recipe.loss("student", video_batch(8, 5), draws(*range(8)))
    t, s = seen
    assert (t > s).all()
    assert (s >= 0).all()
    assert torch.equal(t[:, 1], t[:, 2])
    assert torch.equal(t[:, 3], t[:, 4])
    assert bool((t == t[:, :1]).all()) == (attention == "bidirectional")


def test_the_first_time_before_noise_is_the_sample_itself() -> None:
    recipe = consistency(grid=2, shift=1.0)
    x, batch = video_batch(2)["latents"], video_batch(2)
    assert torch.equal(recipe._clean(x, torch.zeros(2, 4, dtype=torch.float64), batch, x), x)


def test_guidance_reaches_the_teachers_step() -> None:
    batch = video_batch(2)
    plain, guided = (consistency(guidance_scale=w).loss("student", batch, draws(0, 1)) for w in (1.0, 4.0))
    assert plain.parts["consistency"].sum.item() != guided.parts["consistency"].sum.item()


@pytest.mark.parametrize("build", [consistency, forcing])
def test_sources_without_clips_are_refused(build: Any) -> None:
    batch = video_batch(1)
    del batch["latents"]
    with pytest.raises(ConfigError, match="learns from clips"):
        build().loss("student", batch, draws(0))
    with pytest.raises(ConfigError, match=r"chunk of 1 to 1 latent frames"):
        build().loss("student", video_batch(1, 1), draws(0))
