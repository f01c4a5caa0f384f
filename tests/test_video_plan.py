"""What the shipped video run costs: bytes and passes that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydistill.config.load import load_config
from raydistill.config.paths import resolve_paths
from raydistill.plan import plan, table
from raydistill.plan.accelerators import ACCELERATORS
from raydistill.plan.images import ImagePlan

CONFIGS = Path(__file__).parents[1] / "configs"
LATENT = 16 * 21 * 60 * 104


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImagePlan:
    return planned(tmp_path, monkeypatch)


def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> ImagePlan:
    monkeypatch.setenv("RAYDISTILL_HOME", str(CONFIGS.parent))
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(100)))
    files = [CONFIGS / "video_self_forcing.yaml", CONFIGS / "size/wan_1_3b_architecture.yaml"]
    settings = [f"source.paths=[{tmp_path}/prompts.txt]", f"run_dir={tmp_path}/run", *overrides]
    found = plan(resolve_paths(load_config([str(file) for file in files], settings)))
    assert isinstance(found, ImagePlan)
    return found


def test_the_latents_and_the_cache_of_wan_are_those_of_its_shape(costs: ImagePlan) -> None:
    assert costs.shape.prediction == LATENT
    assert costs.student_parameters == pytest.approx(1.42e9, rel=0.01)
    (teacher,) = costs.teachers
    assert teacher.cache is not None
    assert teacher.cache.bytes_per_draw == pytest.approx(5 * 2 * LATENT, rel=1e-5)  # four states and the sample, bf16
    assert teacher.passes == 2 * (35 + 4)  # with guidance; no time of the student is a node of UniPC's grid


def test_flops_are_those_of_attention_and_of_linear_layers(costs: ImagePlan) -> None:
    """2 FLOP per multiply-add: per token 2 · parameters of the blocks, per pair of tokens 4 · width in each block."""
    tokens, width, layers, ffn, text = 21 * 30 * 52, 1536, 30, 8960, 512
    linear = layers * tokens * 2 * (6 * width**2 + 2 * width * ffn) + layers * text * 2 * 2 * width**2
    attention = layers * (4 * tokens**2 * width + 4 * tokens * text * width)
    assert costs.student_forward_flops == pytest.approx(linear + attention, rel=0.02)


def test_a_phase_costs_what_its_players_do(costs: ImagePlan) -> None:
    kd, forcing = costs.phases
    forward = costs.student_forward_flops
    assert forward is not None
    assert kd.flops_per_draw == pytest.approx(2 * 4 * forward)  # clean chunks beside the noised ones; recomputed
    student, critic = (2.5 + 4 + 3) * forward, (3.5 + 3) * forward
    assert forcing.flops_per_draw == pytest.approx((student + 4 * critic) / 5)
    assert forcing.memory is not None
    assert kd.memory is not None
    assert forcing.memory[0].weights == 3 * kd.memory[0].weights  # student, critic and real score
    assert "Videos" in table(costs)


def test_a_score_that_actors_tell_is_counted_on_their_accelerator(
    costs: ImagePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = ["resources.teacher={gpus: 1, accelerator: L40S}", "resources.train={workers: 2, gpus: 1}"]
    kd, found = planned(tmp_path, monkeypatch, "phases.1.recipe.online=actors", *resources).phases
    forward, flops, draws = costs.student_forward_flops, found.flops_per_draw, found.draws
    assert forward is not None
    assert flops is not None
    assert draws is not None
    answered = 2 * forward / 5  # with guidance, in the student's turn alone
    assert flops == costs.phases[1].flops_per_draw
    assert found.actor_hours == pytest.approx(draws * answered / (0.4 * ACCELERATORS["L40S"].flops) / 3600)
    assert found.hours == pytest.approx(draws * (flops - answered) / (0.4 * ACCELERATORS["H100"].flops) / 3600)
    assert (kd.actor_hours, costs.phases[1].actor_hours) == (0, 0)
