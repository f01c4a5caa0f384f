"""The recipe of world models: what it is at equality, how parts are weighed and counted, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from world_toys import TEACHER, small_world, teacher_folder, teacher_section

from raydistill.config.world import FeaturesRecipe, FeaturesTeacher, RolloutTeacher, WorldModel
from raydistill.errors import ConfigError
from raydistill.models.world import random_world
from raydistill.models.world.files import load_world_teacher
from raydistill.recipes.base import TeacherView
from raydistill.recipes.features import Features
from raydistill.signals import Draws
from raydistill.teachers.world import Features as Asked
from raydistill.train.online_worlds import LocalTeacher

CLIPS, STEPS = 4, 4
RULES: dict[str, Any] = {
    "features": [
        {"student": "dynamics.blocks.0", "teacher": ["block"], "weight": 0.5},
        {"student": "encoder.latents", "teacher": ["latents"]},
    ],
    "attention": [
        {"student": "dynamics.blocks.0.spatial.map", "teacher": ["space"]},
        {"student": "dynamics.blocks.0.temporal.map", "teacher": ["time"]},
    ],
}


def recipe_config(**settings: Any) -> FeaturesRecipe:
    return FeaturesRecipe.model_validate({"kind": "features", **settings})


def asked(seed: int = 1, **changes: Any) -> Asked:
    """The toy teacher, untrained."""
    section = FeaturesTeacher.model_validate(teacher_section(Path("/nowhere"), **changes))
    return Asked(section, random_world(TEACHER, seed=seed), STEPS + 1)


def clips(seed: int = 0, *, tail: int = 0) -> dict[str, Tensor]:
    """A batch; the last clip has `tail` padded steps."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(CLIPS, STEPS, dtype=torch.bool)
    if tail:
        valid[-1, STEPS - tail :] = False
    return {
        "frames": torch.randint(0, 256, (CLIPS, STEPS + 1, 3, 12, 12), generator=generator, dtype=torch.uint8),
        "actions": torch.randint(0, 5, (CLIPS, STEPS), generator=generator),
        "valid": valid,
        "row_key": torch.arange(CLIPS),
    }


def with_signals(batch: dict[str, Tensor], teachers: dict[str, Asked]) -> dict[str, Tensor]:
    said = {f"{name}/{key}": values for name, t in teachers.items() for key, values in t(batch).items()}
    return {**batch, **said}


def views(teachers: dict[str, Asked], **weights: float) -> dict[str, TeacherView]:
    return {name: TeacherView(name, weights.get(name, 1 / len(teachers)), t.facts) for name, t in teachers.items()}


def draws() -> Draws:
    return Draws(seed=0, phase="p", step=0, positions=tuple(range(CLIPS)))


def total(recipe: Features, batch: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    loss, counts = recipe.loss("student", batch, draws()), recipe.counts(batch)
    parts = {n: float(p.sum.detach()) / (counts[p.count] if p.count else 1) for n, p in loss.parts.items()}
    return sum(loss.parts[n].weight * value for n, value in parts.items()), parts


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = {"big": asked(seed=1)}
    student = random_world(TEACHER, seed=1)
    recipe = Features(recipe_config(alpha=1.0, **RULES | {"features": RULES["features"][1:]}), student, views(teacher))
    value, parts = total(recipe, with_signals(clips(), teacher))
    assert value == pytest.approx(0, abs=1e-6)
    assert {"output/big", "kl/big", "feature/big.latents", "attention/big.space", "attention/big.time"} <= set(parts)


def test_the_total_is_the_blend_of_its_parts() -> None:
    teacher = {"big": asked()}
    settings = {"alpha": 0.7, "output": 2.0, "kl": 0.5, "prediction": 3.0, **RULES}
    recipe = Features(recipe_config(**settings), small_world(), views(teacher))
    value, p = total(recipe, with_signals(clips(), teacher))
    distilled = (
        2.0 * p["output/big"] + 0.5 * p["kl/big"] + 0.5 * p["feature/big.block"] + 0.1 * p["feature/big.latents"]
    )
    distilled += p["attention/big.space"] + p["attention/big.time"]
    assert value == pytest.approx(0.3 * 3.0 * p["prediction"] + 0.7 * distilled, rel=1e-5)


def test_two_teachers_are_their_weighted_sum() -> None:
    teachers = {"one": asked(seed=1), "two": asked(seed=2)}
    batch = with_signals(clips(), teachers)
    student, config = small_world(), recipe_config(alpha=1.0)
    both, _ = total(Features(config, student, views(teachers, one=0.25, two=0.75)), batch)
    alone = [total(Features(config, student, views({n: t}, **{n: 1.0})), batch)[0] for n, t in teachers.items()]
    assert both == pytest.approx(0.25 * alone[0] + 0.75 * alone[1], rel=1e-5)


def test_one_layer_answers_for_two_of_the_teacher_at_half_the_weight_each() -> None:
    teacher = {"big": asked(taps={"a": "dynamics.blocks.0", "b": "dynamics.blocks.1"})}
    rule = [{"student": "dynamics.blocks.1", "teacher": ["a", "b"], "weight": 0.4}]
    recipe = Features(recipe_config(features=rule), small_world(), views(teacher))
    loss = recipe.loss("student", with_signals(clips(), teacher), draws())
    assert [loss.parts[f"feature/big.{tap}"].weight for tap in "ab"] == pytest.approx([0.7 * 0.4 / 2] * 2)
    trained = [n for n, _ in recipe.players()["student"].named_parameters() if n.startswith("taps.maps")]
    assert len(trained) == 4  # a weight and a bias for each of the two


def test_padding_changes_neither_value_nor_gradient() -> None:
    """Whatever stands behind the end of an episode."""
    teacher = {"big": asked()}
    settings = {
        "reconstruction": 1.0, "next_codes": 0.3, "smoothness": 0.2, "action": 0.1, **RULES,
    }  # fmt: skip
    found = []
    for noise in (0, 200):
        batch = clips(tail=2)
        batch["frames"][-1, 3:] = noise
        student = small_world()
        recipe = Features(recipe_config(**settings), student, views(teacher))
        filled = with_signals(batch, teacher)
        loss, counts = recipe.loss("student", filled, draws()), recipe.counts(filled)
        # The usage of codes is a statistic of the whole batch, padding included.
        value = sum(p.weight * p.sum / counts[p.count] for p in loss.parts.values() if p.count and p.weight)
        assert isinstance(value, Tensor)
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        found.append((float(value), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_two_micro_batches_add_up_to_one_batch() -> None:
    teacher = {"big": asked()}
    batch = with_signals(clips(tail=1), teacher)
    recipe = Features(recipe_config(smoothness=0.2, **RULES), small_world(), views(teacher))
    whole = recipe.loss("student", batch, draws()).parts
    halves = [{n: v[i : i + 2] for n, v in batch.items()} for i in (0, 2)]
    parts = [recipe.loss("student", half, draws()).parts for half in halves]
    for name, part in whole.items():
        assert float(sum(p[name].sum for p in parts)) == pytest.approx(float(part.sum), rel=1e-4, abs=1e-7), name
    counts = [recipe.counts(half) for half in halves]
    assert {n: counts[0][n] + counts[1][n] for n in counts[0]} == recipe.counts(batch)


def test_silent_clips_add_nothing() -> None:
    teacher = {"big": asked()}
    batch = with_signals(clips(), teacher)
    batch["valid"] = torch.zeros_like(batch["valid"])
    recipe = Features(recipe_config(**RULES), small_world(), views(teacher))
    assert set(recipe.counts(batch).values()) == {0.0}
    assert all(float(p.sum) == 0 for p in recipe.loss("student", batch, draws()).parts.values())


def test_the_baseline_reads_no_teacher_and_learns_codes_of_its_own() -> None:
    alone = recipe_config(codes=1.0, prediction=0.0, kl=0.0, output=0.0, **RULES).without_teacher()
    assert (alone.alpha, alone.features, alone.reconstruction) == (0.0, (), 1.0)
    recipe = Features(alone, small_world(), {})
    assert recipe.reads == {}
    value, parts = total(recipe, clips())
    assert value > 0
    assert {"reconstruction", "codebook", "commitment", "usage"} <= set(parts)


def test_the_probe_reads_true_frames_and_passes_no_gradient_of_predictions_on_to_itself() -> None:
    recipe = Features(recipe_config(alpha=0.0, prediction=0.0, action=1.0), small_world(), {})
    loss = recipe.loss("student", clips(), draws())
    player = recipe.players()["student"]
    probe = [p for n, p in player.named_parameters() if "probe" in n]
    loss.parts["action"].sum.backward(retain_graph=True)
    assert all(p.grad is None for p in probe)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in recipe.student.parameters())
    loss.parts["action/probe"].sum.backward()
    assert all(p.grad is not None for p in probe)


def test_a_cached_teacher_and_an_online_one_give_the_same_loss() -> None:
    teacher = asked()
    cached = views({"big": teacher})
    online = {"big": TeacherView("big", 1.0, teacher.facts, LocalTeacher(teacher))}
    batch = clips()
    student, config = small_world(), recipe_config(**RULES)
    recipes = [Features(config, student, found) for found in (cached, online)]
    assert recipes[0].reads == {"big": ("frames", "logits", "tap.block", "tap.latents", "tap.space", "tap.time")}
    assert recipes[1].reads == {}
    values = [total(recipes[0], with_signals(batch, {"big": teacher}))[0], total(recipes[1], batch)[0]]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_rollouts_are_clips_of_the_teacher(tmp_path: Path) -> None:
    section = RolloutTeacher.model_validate(teacher_section(tmp_path, signal="rollout", initial_frames=2))
    teacher = {"big": Asked(section, random_world(TEACHER, seed=1), STEPS + 1)}
    batch = with_signals(clips(tail=2), teacher)
    recipe = Features(recipe_config(alpha=1.0, learn_from="rollouts"), random_world(TEACHER, seed=1), views(teacher))
    assert recipe.counts(batch)["steps"] == CLIPS * STEPS  # a rollout has no padding
    value, _ = total(recipe, batch)
    assert value == pytest.approx(0, abs=1e-6)  # the student is the teacher
    with pytest.raises(ConfigError, match="learn_from: episodes wants a teacher of signal features"):
        Features(recipe_config(), small_world(), views(teacher))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": [{"student": "dynamics.blok.0", "teacher": ["block"]}]}, r"come near: dynamics\.blocks"),
        ({"features": [{"student": "dynamics.blocks.0", "teacher": ["blok"]}]}, "wants tap 'blok' of a teacher"),
    ],
)
def test_taps_that_are_none_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Features(recipe_config(**settings), small_world(), views({"big": asked()}))


def test_another_codebook_is_refused_where_codes_are_compared() -> None:
    facts = {**asked().facts, "num_codes": 64}
    teacher = {"big": TeacherView("big", 1.0, facts)}
    with pytest.raises(ConfigError, match=r"the student has 8\), found 64"):
        Features(recipe_config(), small_world(), teacher)
    Features(recipe_config(kl=0.0), small_world(), teacher)


def test_teacher_folders_are_read_as_they_were_written(tmp_path: Path) -> None:
    source = WorldModel(library="world", source=str(teacher_folder(tmp_path / "t", seed=5)))
    wanted = random_world(TEACHER, seed=5).state_dict()
    found = load_world_teacher(source).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ConfigError, match="wanted the sizes of"):
        load_world_teacher(source.model_copy(update={"sizes": TEACHER.model_copy(update={"layers": 3})}))
