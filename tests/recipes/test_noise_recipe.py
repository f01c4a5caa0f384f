"""Identities of the denoisers' recipe: teachers and their mean, prediction types, weights, taps; and wrong teachers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from denoiser_toys import (
    DDPM,
    FLOW,
    KINDS,
    batch_of,
    gradients,
    tiny_unet,
    view,
)
from torch import Tensor, nn

from raydistill.config.recipes import NoisePredictionRecipe
from raydistill.config.sources import ImagesSource, NoiseConfig
from raydistill.diffusion.process import PredictionType
from raydistill.errors import ConfigError
from raydistill.models.denoiser import predict
from raydistill.recipes import RECIPES, make_recipe
from raydistill.recipes.base import Loss, TeacherView
from raydistill.recipes.noise_prediction import NoisePrediction, variance
from raydistill.signals import Draws

ROWS = 4
RNG = Draws(seed=0, phase="p", step=0, positions=tuple(range(ROWS)))
SHARES = {"red": 0.3, "blue": 0.7}
MID = {"teacher": "red", "tap": "mid", "student": "mid_block"}


def recipe_of(
    student: nn.Module, teachers: Mapping[str, TeacherView], noise: NoiseConfig | None = None, **settings: object
) -> NoisePrediction:
    config = NoisePredictionRecipe.model_validate({"kind": "noise_prediction", **settings})
    return NoisePrediction(config, student, teachers, noise)


def views(kind: PredictionType = "epsilon", **shares: float) -> dict[str, TeacherView]:
    return {name: view(name, share, kind=kind) for name, share in (shares or SHARES).items()}


def taught(rows: int = ROWS, *, dtype: torch.dtype = torch.float32, **names: int) -> dict[str, Tensor]:
    """A batch with random predictions of the teachers, by name with a seed each."""
    batch = batch_of(rows, dtype=dtype)
    for name, seed in (names or {"red": 1, "blue": 2}).items():
        batch[f"{name}/prediction"] = batch_of(rows, seed=100 + seed, dtype=dtype)["noise"]
    return batch


def mean_of(batch: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([share * batch[f"{name}/prediction"] for name, share in SHARES.items()]).sum(0)


def optimised(loss: Loss) -> Tensor:
    return torch.stack([p.weight * p.sum for p in loss.parts.values() if p.weight]).sum()


def value(loss: Loss, part: str) -> float:
    return float(loss.parts[part].sum.detach())


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference of two gradients, over the largest entry of the second."""
    assert a.keys() == b.keys()
    assert a
    scale = max(float(t.abs().max()) for t in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / scale


# --- several teachers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", ["constant", "min_snr"])
def test_the_gradient_of_two_teachers_is_the_gradient_to_their_mean(dtype: torch.dtype, weighting: str) -> None:
    student = tiny_unet().to(dtype)
    batch = taught(dtype=dtype)
    two = recipe_of(student, views(), timestep_weighting=weighting).loss("student", batch, RNG)
    optimised(two).backward()
    found = gradients(student)
    alone = {"mean": view("mean", 1.0)}
    one = recipe_of(student, alone, timestep_weighting=weighting).loss(
        "student", {**batch, "mean/prediction": mean_of(batch)}, RNG
    )
    optimised(one).backward()
    assert worst(found, gradients(student)) < 1e-6
    assert value(two, "kd") == pytest.approx(value(one, "kd") + value(two, "floor"), rel=1e-5)
    assert value(two, "floor") > 0.1


def test_the_average_has_the_gradient_and_the_loss_of_its_teachers() -> None:
    student, batch = tiny_unet("v_prediction"), taught()
    each = recipe_of(student, views(), alpha=0.6, timestep_weighting="snr").loss("student", batch, RNG)
    optimised(each).backward()
    found = gradients(student)
    spread = variance([batch["red/prediction"], batch["blue/prediction"]], list(SHARES.values()))
    recipe = recipe_of(student, {"average": view("average", 1.0)}, alpha=0.6, timestep_weighting="snr")
    assert recipe.reads == {"average": ("prediction", "variance")}
    stored = {**batch, "average/prediction": mean_of(batch), "average/variance": spread}
    average = recipe.loss("student", {n: t for n, t in stored.items() if n[:4] not in ("red/", "blue")}, RNG)
    optimised(average).backward()
    assert worst(found, gradients(student)) < 1e-6
    for part in ("blend", "kd", "task", "floor"):
        assert value(average, part) == pytest.approx(value(each, part), rel=1e-5), part


def test_the_floor_is_the_weighted_variance_and_what_a_perfect_student_is_left_with() -> None:
    red, blue = (torch.full((1, 1, 1, 2), v) for v in (1.0, 3.0))
    # Mean 0.3 · 1 + 0.7 · 3 = 2.4; variance 0.3 · 1.4² + 0.7 · 0.6² = 0.84.
    assert variance([red, blue], [0.3, 0.7]).tolist() == pytest.approx([0.84])
    student, batch = tiny_unet(), taught()
    kd = [
        value(recipe_of(student, views(), loss="mse").loss("student", b, RNG), "kd")
        for b in (batch, {**batch, **{f"{n}/prediction": said(student, batch) + s for n, s in shifts(batch).items()}})
    ]
    floor = value(recipe_of(student, views()).loss("student", batch, RNG), "floor")
    assert kd[1] == pytest.approx(floor, rel=1e-5)
    assert kd[0] > 1.5 * floor


def shifts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far each teacher is from the mean of both."""
    return {name: batch[f"{name}/prediction"] - mean_of(batch) for name in SHARES}


def said(student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the student predicts itself."""
    process = student.process
    x_t = process.noisy(batch["latents"], batch["noise"], batch["timestep"])
    with torch.no_grad():
        return predict(student, x_t, process.times(batch["timestep"]), batch)


@pytest.mark.parametrize("kind", ["mse", "huber", "smooth_l1"])
def test_the_losses_of_the_teachers_add_up_by_their_weights(kind: str) -> None:
    student, batch = tiny_unet(), taught()
    loss = recipe_of(student, views(), loss=kind, delta=0.5, alpha=0.25).loss("student", batch, RNG)
    alone = {
        name: value(recipe_of(student, views(**{name: 1.0}), loss=kind, delta=0.5).loss("student", batch, RNG), "kd")
        for name in SHARES
    }
    for name in SHARES:
        assert value(loss, f"kd/{name}") == pytest.approx(alone[name], rel=1e-6)
    kd = 0.3 * alone["red"] + 0.7 * alone["blue"]
    assert value(loss, "kd") == pytest.approx(kd, rel=1e-6)
    assert value(loss, "blend") == pytest.approx(0.75 * value(loss, "task") + 0.25 * kd, rel=1e-6)
    assert [name for name, part in loss.parts.items() if part.weight] == ["blend"]
    assert ("floor" in loss.parts) == (kind == "mse")


def test_a_teacher_of_weight_0_is_not_read() -> None:
    recipe = recipe_of(tiny_unet(), views(red=1.0, blue=0.0))
    assert recipe.reads == {"red": ("prediction",)}
    loss = recipe.loss("student", taught(red=1), RNG)
    assert "kd/blue" not in loss.parts


# --- what is predicted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("common", KINDS)
@pytest.mark.parametrize("own", KINDS)
def test_a_student_that_says_what_its_teacher_says_has_no_loss(own: PredictionType, common: PredictionType) -> None:
    """The teacher speaks the common kind, the student its own; timesteps at which neither is all noise."""
    for scheduler in (DDPM, FLOW):
        student = tiny_unet(own, scheduler=scheduler)
        batch = batch_of(ROWS)
        batch["timestep"] = torch.tensor([50, 300, 500, 700])
        x_t = student.process.noisy(batch["latents"], batch["noise"], batch["timestep"])
        mine = said(student, batch)
        told = student.process.convert(mine, x_t, batch["timestep"], source=own, target=common)
        noise = NoiseConfig(timesteps=(0, 900), prediction_type=common)
        teachers = {"red": view("red", 1.0, kind=common, scheduler=scheduler, noise=noise)}
        loss = recipe_of(student, teachers).loss("student", {**batch, "red/prediction": told}, RNG)
        assert value(loss, "kd") < 1e-9
        other = recipe_of(student, teachers).loss("student", {**batch, "red/prediction": told + 0.1}, RNG)
        assert value(other, "kd") == pytest.approx(ROWS * 0.01, rel=1e-3)


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
@pytest.mark.parametrize("own", ["epsilon", "v_prediction"])
def test_a_weighted_loss_is_the_same_in_every_common_kind(weighting: str, own: PredictionType) -> None:
    student, batch = tiny_unet(own), batch_of(ROWS)
    batch["timestep"] = torch.tensor([100, 300, 500, 700])
    x_t = student.process.noisy(batch["latents"], batch["noise"], batch["timestep"])
    clean = batch_of(ROWS, seed=7)["latents"]
    found = {}
    for common in KINDS:
        told = student.process.convert(clean, x_t, batch["timestep"], source="sample", target=common)
        loss = recipe_of(student, views(common, red=1.0), alpha=0.5, timestep_weighting=weighting, snr_gamma=2.0).loss(
            "student", {**batch, "red/prediction": told}, RNG
        )
        optimised(loss).backward()
        found[common] = (value(loss, "kd"), value(loss, "task"), gradients(student))
    kd, task, gradient = found["sample"]
    for common in KINDS:
        assert found[common][:2] == pytest.approx((kd, task), rel=1e-4)
        assert worst(found[common][2], gradient) < 1e-4


def test_the_task_is_the_error_of_the_noise_and_is_optimised_at_alpha_below_1() -> None:
    student, batch = tiny_unet(), taught()
    loss = recipe_of(student, views(), alpha=0.0, noise=NoiseConfig())
    assert loss.reads == {}
    blended = recipe_of(student, views(), alpha=0.5).loss("student", batch, RNG)
    expected = (said(student, batch) - batch["noise"]).square().mean((1, 2, 3)).sum()
    assert value(blended, "task") == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_at_alpha_1_does_not_hear_of_the_truth() -> None:
    student, batch = tiny_unet(), taught()
    loss = recipe_of(student, views(), alpha=1.0).loss("student", batch, RNG)
    assert value(loss, "blend") == pytest.approx(value(loss, "kd"), rel=1e-7)
    assert not loss.parts["task"].sum.requires_grad


# --- without teachers -------------------------------------------------------------------------------------------


def plain(**noise: object) -> tuple[NoisePrediction, dict[str, Tensor]]:
    """The recipe of plain diffusion training, and a batch as it comes from a reader of inputs alone."""
    recipe = recipe_of(tiny_unet(), {}, NoiseConfig.model_validate(noise), alpha=0.0)
    batch = {n: t for n, t in batch_of(ROWS).items() if n not in ("noise", "timestep")}
    return recipe, batch


def test_noise_is_drawn_anew_in_every_step_and_does_not_hang_on_the_micro_batch() -> None:
    recipe, batch = plain(caption_dropout=0.3)

    def blend(step: int, rows: range) -> float:
        rng = Draws(seed=3, phase="p", step=step, positions=tuple(rows))
        part = {n: t[rows.start : rows.stop] for n, t in batch.items()}
        return value(recipe.loss("student", part, rng), "blend")

    whole = blend(0, range(ROWS))
    assert blend(0, range(2)) + blend(0, range(2, 4)) == pytest.approx(whole, rel=1e-5)
    drawn = [recipe._drawn(batch, Draws(seed=3, phase="p", step=s, positions=tuple(range(ROWS)))) for s in (0, 1)]
    assert float((drawn[0]["noise"] - drawn[1]["noise"]).abs().min(dim=0).values.mean()) > 0.1
    assert not torch.equal(drawn[0]["timestep"], drawn[1]["timestep"])


def test_timesteps_and_dropped_captions_are_those_that_were_asked_for() -> None:
    recipe, batch = plain(timesteps=(200, 210), caption_dropout=0.25)
    steps, dropped = [], 0
    for step in range(100):
        rng = Draws(seed=0, phase="p", step=step, positions=tuple(range(ROWS)))
        drawn = recipe._drawn(batch, rng)
        steps += drawn["timestep"].tolist()
        gone = [torch.equal(a, b) for a, b in zip(drawn["prompt_embeds"], batch["empty_embeds"], strict=True)]
        assert gone == [torch.equal(a, b) for a, b in zip(drawn["pooled"], batch["empty_pooled"], strict=True)]
        kept = [torch.equal(a, b) for a, b in zip(drawn["prompt_embeds"], batch["prompt_embeds"], strict=True)]
        assert [not g for g in gone] == kept
        dropped += sum(gone)
    assert set(steps) == set(range(200, 210))
    assert dropped / 400 == pytest.approx(0.25, abs=0.08)
    assert abs(float(drawn["noise"].mean())) < 0.2
    assert float(drawn["noise"].std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("common", KINDS)
def test_plain_training_states_its_loss_in_the_common_kind(common: PredictionType) -> None:
    """So that a student trained without teachers can be held against one trained with them."""
    student = tiny_unet()
    recipe = recipe_of(student, {}, NoiseConfig(prediction_type=common, timesteps=(100, 900)), alpha=0.0)
    batch = {n: t for n, t in batch_of(ROWS).items() if n not in ("noise", "timestep")}
    drawn = recipe._drawn(batch, RNG)
    scale = student.process.error_scale(drawn["timestep"], source="epsilon", target=common) ** 2
    errors = (said(student, drawn) - drawn["noise"]).square().mean((1, 2, 3))
    assert value(recipe.loss("student", batch, RNG), "blend") == pytest.approx(float((scale * errors).sum()), rel=1e-3)


def test_without_teachers_the_noise_must_be_described() -> None:
    with pytest.raises(ConfigError, match=r"source\.noise"):
        recipe_of(tiny_unet(), {}, alpha=0.0)


# --- counting ---------------------------------------------------------------------------------------------------


def test_samples_of_weight_0_add_to_nothing() -> None:
    student, batch = tiny_unet(), taught()
    recipe = recipe_of(student, views(), alpha=0.5)
    half = {**batch, "weight": torch.tensor([1.0, 1, 0, 0])}
    first = {n: t[:2] for n, t in batch.items()}
    loss, other = recipe.loss("student", half, RNG), recipe.loss("student", first, RNG)
    assert recipe.counts(half) == {"samples": 2.0}
    for name, part in loss.parts.items():
        assert value(loss, name) == pytest.approx(value(other, name), rel=1e-5), name
        assert part.count == "samples"
    silent = recipe.loss("student", {**batch, "weight": torch.zeros(ROWS)}, RNG)
    optimised(silent).backward()
    assert all((g == 0).all() for g in gradients(student).values())


def test_a_bf16_student_is_compared_in_fp32() -> None:
    batch = taught()
    exact = recipe_of(tiny_unet(), views()).loss("student", batch, RNG)
    rounded = recipe_of(tiny_unet().to(torch.bfloat16), views()).loss("student", batch, RNG)
    assert rounded.parts["blend"].sum.dtype == torch.float32
    assert value(rounded, "kd") == pytest.approx(value(exact, "kd"), rel=0.02)


# --- taps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 12])
def test_a_tap_adds_the_squared_difference_of_features_through_an_adapter_where_widths_differ(width: int) -> None:
    student = tiny_unet(width=width)
    teachers = {"red": view("red", 1.0, taps={"mid": (16, 4, 4)})}
    recipe = recipe_of(student, teachers, taps=[{**MID, "weight": 0.5}])
    assert recipe.reads == {"red": ("prediction", "tap.mid")}
    batch = taught(red=1)
    batch["red/tap.mid"] = torch.randn(ROWS, 16, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    seen: list[Tensor] = []
    handle = student.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss = recipe.loss("student", batch, RNG)
    handle.remove()
    player = recipe.players()["student"]
    adapters = [n for n, _ in player.named_parameters() if n.startswith("taps.")]
    if width == 8:
        assert player is student
        mapped = seen[0]
    else:
        assert adapters == ["taps.red/mid.weight", "taps.red/mid.bias"]
        mapped = player.taps["red/mid"](seen[0]).detach()
    expected = (mapped - batch["red/tap.mid"].float()).square().mean((1, 2, 3)).sum()
    assert value(loss, "tap/red.mid") == pytest.approx(float(expected), rel=1e-5)
    assert optimised(loss).item() == pytest.approx(value(loss, "kd") + 0.5 * float(expected), rel=1e-5)
    optimised(loss).backward()
    moved = gradients(player)
    assert all(float(moved[name].abs().max()) > 0 for name in adapters)
    assert all(float(g.abs().max()) > 0 for n, g in moved.items() if n.endswith("mid_block.resnets.0.conv1.weight"))


def test_tokens_are_mapped_by_a_linear_layer() -> None:
    teachers = {"red": view("red", 1.0, taps={"tokens": (16, 24)})}
    rule = {"teacher": "red", "tap": "tokens", "student": "mid_block.attentions.0.proj_out"}
    recipe = recipe_of(tiny_unet(), teachers, taps=[rule])
    batch = {**taught(red=1), "red/tap.tokens": torch.zeros(ROWS, 16, 24)}
    assert isinstance(recipe.players()["student"].taps["red/tokens"], nn.Linear)
    assert value(recipe.loss("student", batch, RNG), "tap/red.tokens") > 0


def test_a_teacher_of_weight_0_may_be_there_for_its_taps_alone() -> None:
    teachers = {"red": view("red", 0.0, taps={"mid": (16, 4, 4)}), "blue": view("blue", 1.0)}
    recipe = recipe_of(tiny_unet(), teachers, taps=[MID])
    assert recipe.reads == {"blue": ("prediction",), "red": ("tap.mid",)}


def test_a_tap_of_another_resolution_is_explained() -> None:
    teachers = {"red": view("red", 1.0, taps={"mid": (16, 8, 8)})}
    recipe = recipe_of(tiny_unet(), teachers, taps=[MID])
    batch = {**taught(red=1), "red/tap.mid": torch.zeros(ROWS, 16, 8, 8)}
    with pytest.raises(ConfigError, match=r"wanted features \[16, 8, 8\].*found \[16, 4, 4\].*mid_block"):
        recipe.loss("student", batch, RNG)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({**MID, "teacher": "green"}, r"tap 'mid' of teacher green, found red: mid"),
        ({**MID, "tap": "up"}, r"tap 'up' of teacher red, found red: mid"),
        ({**MID, "student": "nowhere"}, r"found no 'nowhere'"),
    ],
)
def test_a_tap_that_is_not_there_is_named(rule: dict, message: str) -> None:
    teachers = {"red": view("red", 1.0, taps={"mid": (16, 4, 4)})}
    with pytest.raises(ConfigError, match=message):
        recipe_of(tiny_unet(), teachers, taps=[rule])


def test_a_tap_of_a_teacher_is_matched_once() -> None:
    teachers = {"red": view("red", 1.0, taps={"mid": (16, 4, 4)})}
    with pytest.raises(ConfigError, match=r"one rule for each tap.*red\.mid"):
        recipe_of(tiny_unet(), teachers, taps=[MID, {**MID, "student": "down_blocks.1"}])


# --- wrong teachers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"red": view("red", 0.5), "blue": view("blue", 0.5, kind="sample")}, "one prediction type, found epsilon"),
        ({"red": view("red", 0.5), "blue": view("blue", 0.5, scheduler=FLOW)}, "one noise schedule.*red and blue"),
        (
            {"red": view("red", 0.5), "blue": view("blue", 0.5, scheduler={**DDPM, "beta_end": 0.02})},
            r"one noise schedule, found from timestep \d+ on",
        ),
        (
            {"red": view("red", 0.5), "blue": view("blue", 0.5, noise=NoiseConfig(seed=1))},
            "one noise and timesteps",
        ),
        (
            {"red": view("red", 1.0, scheduler=FLOW)},
            "noise schedule of teacher red, found variance_preserving and flow",
        ),
        ({"red": view("red", 0.0), "blue": view("blue", 0.0)}, "teacher of weight > 0, found red of weight 0, blue"),
        ({}, "teacher of weight > 0, found none"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers: dict[str, TeacherView], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(tiny_unet(), teachers)


def test_the_average_stands_for_mse_alone() -> None:
    with pytest.raises(ConfigError, match=r"loss mse without taps.*found huber; set cache\.store: each"):
        recipe_of(tiny_unet(), {"average": view("average", 1.0)}, loss="huber")


def test_a_network_without_a_noise_schedule_is_no_student() -> None:
    student = tiny_unet()
    del student.process
    with pytest.raises(ConfigError, match="without one; use a student of library diffusers"):
        recipe_of(student, views())


def test_a_student_whose_own_kind_says_nothing_at_some_timestep_is_refused_before_training() -> None:
    zero = {**DDPM, "rescale_betas_zero_snr": True}
    for own, common, fits in (("epsilon", "v_prediction", False), ("v_prediction", "v_prediction", True)):
        student = tiny_unet(own, scheduler=zero)
        teachers = {"red": view("red", 1.0, kind=common, scheduler=zero)}
        if fits:
            recipe_of(student, teachers)
            continue
        with pytest.raises(ConfigError, match=r"the student predicts epsilon.*epsilon says nothing.*timestep 999"):
            recipe_of(student, teachers)


def test_the_recipe_is_listed_under_its_configuration() -> None:
    assert RECIPES[NoisePredictionRecipe] is NoisePrediction
    source = ImagesSource(kind="images", paths=("x",), vae="none", noise=NoiseConfig(timesteps=(3, 4)))
    config = NoisePredictionRecipe(kind="noise_prediction", alpha=0.0)
    recipe = make_recipe(config, tiny_unet(), {}, source)
    assert isinstance(recipe, NoisePrediction)
    assert recipe._drawn(batch_of(ROWS), RNG)["timestep"].tolist() == [3] * ROWS
