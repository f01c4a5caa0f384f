from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.config.load import load_config, read_draft
from raydistill.config.spaces import (
    all_points,
    changed,
    draw,
    drawn_points,
    flat_simplex,
    listed,
    probes,
    settings,
    size,
)
from raydistill.config.sweep import SPEEDS, MetricConfig, SweepConfig
from raydistill.config.tune import Space, costs, load_space
from raydistill.errors import ConfigError
from raydistill.run import main

ROOT = Path(__file__).parents[2]
ALPHA, TEMPERATURE, LR = "phases.0.recipe.alpha", "phases.0.recipe.temperature", "phases.0.optimizer.student.lr"
RUN = """\
name: toy
source: {paths: [a.txt], tokenizer: gpt2, seq_len: 16}
teachers: [{name: big, top_k: 16, model: {source: org/big}}, {name: other, top_k: 16, model: {source: org/other}}]
student: {model: {source: org/small}, init: {kind: layers, num_layers: 2}}
phases:
  - name: one
    steps: 40
    recipe: {alpha: 0.5}
    batch: {global_size: 8, micro_size: 4}
    optimizer: {student: {lr: 0.1}}
    checkpoint: {every_steps: 10}
  - {name: two, steps: 2, recipe: "${phases.0.recipe}", batch: "${phases.0.batch}", optimizer: "${phases.0.optimizer}"}
"""


def sweep(space: dict[str, object], **more: object) -> SweepConfig:
    return SweepConfig.model_validate({"space": space, "metrics": ["perplexity"], "searcher": "grid", **more})


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    (tmp_path / "run.yaml").write_text(RUN)
    return Loaded(tmp_path)


class Loaded:
    """Loads a space over the toy run."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, text: str, *overrides: str) -> Space:
        (self._folder / "space.yaml").write_text(text)
        draft = read_draft([self._folder / "run.yaml"], overrides)
        return load_space(self._folder / "space.yaml", draft)

    def refusal(self, text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            self(text, *overrides)
        return str(caught.value).replace(f"{self._folder}/", "")


def test_a_grid_has_every_combination_once_and_the_first_key_varies_slowest() -> None:
    odd = {"kind": "integers", "low": 1, "high": 5, "step": 2}
    space = sweep({ALPHA: {"kind": "grid", "values": [0.1, 0.9]}, TEMPERATURE: odd})
    points = all_points(space)
    assert [list(p.values()) for p in points] == [[a, t] for a in (0.1, 0.9) for t in (1, 3, 5)]
    assert size(space) == 6


def test_a_condition_leaves_a_key_out_and_adds_no_points() -> None:
    beta = {"kind": "grid", "values": [0.2, 0.8], "when": {"divergence": ["jsd", "skew"]}}
    space = sweep({"beta": beta, "divergence": {"kind": "choice", "values": ["jsd", "kl"]}})
    assert all_points(space) == [
        {"divergence": "jsd", "beta": 0.2},
        {"divergence": "jsd", "beta": 0.8},
        {"divergence": "kl"},
    ]


def test_conditions_on_conditions_hold_only_where_both_do() -> None:
    space = sweep(
        {
            "a": {"kind": "choice", "values": [True, False]},
            "b": {"kind": "grid", "values": [1, 2], "when": {"a": True}},
            "c": {"kind": "grid", "values": [5], "when": {"b": 2}},
        }
    )
    assert [p for p in all_points(space) if "c" in p] == [{"a": True, "b": 2, "c": 5}]
    assert {"a": False} in all_points(space)


def test_the_grid_of_a_simplex_is_every_composition() -> None:
    space = sweep({"weights": {"kind": "simplex", "keys": ["x", "y", "z"], "steps": 4}})
    shares = listed(space.space["weights"])
    assert len(shares) == 15 == size(space)
    assert all(sum(share) == 1 for share in shares)  # type: ignore[arg-type]
    assert len({tuple(share) for share in shares}) == 15  # type: ignore[arg-type]
    assert settings(space, {"weights": [0.25, 0.75, 0.0]}) == {"x": 0.25, "y": 0.75, "z": 0.0}


def test_drawn_shares_sum_to_one_and_have_the_mean_and_spread_of_their_dirichlet() -> None:
    """Dirichlet(c, c, c): mean 1/3 and variance 2 / (9 (3 c + 1))."""
    for concentration in (1.0, 10.0):
        weights = {"kind": "simplex", "keys": ["x", "y", "z"], "concentration": concentration}
        space = sweep({"w": weights}, searcher="random", trials=1)
        rng = random.Random(0)
        firsts = []
        for _ in range(4000):
            shares = draw(space, rng)["w"]
            assert sum(shares) == pytest.approx(1)  # type: ignore[arg-type]
            firsts.append(float(shares[0]))  # type: ignore[index,arg-type]
        mean = sum(firsts) / len(firsts)
        assert mean == pytest.approx(1 / 3, abs=0.015)
        variance = sum((x - mean) ** 2 for x in firsts) / len(firsts)
        assert variance == pytest.approx(2 / (9 * (3 * concentration + 1)), rel=0.08)


def test_a_broken_stick_is_uniform_on_the_simplex() -> None:
    """Moments of Dirichlet(1, 1, 1): mean 1/3, E[x²] = 1/6, E[x y] = 1/12, for each piece alike."""
    rng = random.Random(0)
    shares = [flat_simplex([rng.random(), rng.random()]) for _ in range(20_000)]
    for i in range(3):
        assert sum(s[i] for s in shares) / len(shares) == pytest.approx(1 / 3, abs=0.005)
        assert sum(s[i] ** 2 for s in shares) / len(shares) == pytest.approx(1 / 6, abs=0.004)
        assert sum(s[i] * s[i - 1] for s in shares) / len(shares) == pytest.approx(1 / 12, abs=0.003)


def test_more_trials_begin_with_the_same_ones() -> None:
    lists = {ALPHA: {"kind": "grid", "values": [0.1, 0.5, 0.9]}, TEMPERATURE: {"kind": "grid", "values": [1, 2, 4]}}
    ranges = {ALPHA: {"kind": "uniform", "low": 0, "high": 1}, LR: {"kind": "log_uniform", "low": 1e-5, "high": 1e-2}}
    for keys in (lists, ranges):
        few, many = (drawn_points(sweep(keys, searcher="random", trials=n), n) for n in (4, 8))
        assert many[:4] == few
        assert drawn_points(sweep(keys, searcher="random", trials=4, seed=1), 4) != few


def test_a_small_space_is_drawn_from_without_repeating_a_point() -> None:
    space = sweep({ALPHA: {"kind": "grid", "values": [0.1, 0.5, 0.9]}}, searcher="random", trials=10)
    points = drawn_points(space, 10)
    assert sorted(p[ALPHA] for p in points) == [0.1, 0.5, 0.9]  # type: ignore[type-var]


def test_log_uniform_draws_every_order_of_magnitude_alike() -> None:
    space = sweep({LR: {"kind": "log_uniform", "low": 1e-4, "high": 1.0}}, searcher="random", trials=1)
    rng = random.Random(0)
    values = [float(str(draw(space, rng)[LR])) for _ in range(4000)]
    for low in (1e-4, 1e-3, 1e-2, 1e-1):
        assert sum(low <= v < 10 * low for v in values) / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_member_of_a_population_moves_by_one_place_or_one_factor_and_stays_inside() -> None:
    space = sweep(
        {
            ALPHA: {"kind": "uniform", "low": 0.5, "high": 1.0},
            TEMPERATURE: {"kind": "grid", "values": [1.0, 2.0, 4.0]},
        },
        searcher="random", trials=4, scheduler="pbt",
    )  # fmt: skip
    rng = random.Random(0)
    seen = {tuple(changed(space, {ALPHA: 0.9, TEMPERATURE: 2.0}, rng, resample=0).values()) for _ in range(50)}
    assert {t for _, t in seen} == {1.0, 4.0}
    assert sorted({a for a, _ in seen}) == [pytest.approx(0.72), 1.0]
    ends = {changed(space, {ALPHA: 0.5, TEMPERATURE: 1.0}, rng, resample=0)[TEMPERATURE] for _ in range(50)}
    assert ends == {1.0, 2.0}
    drawn = {changed(space, {ALPHA: 0.5, TEMPERATURE: 1.0}, rng, resample=1)[ALPHA] for _ in range(20)}
    assert len(drawn) == 20


def test_probes_hold_the_ends_of_each_key_where_it_is_active() -> None:
    space = sweep(
        {
            "divergence": {"kind": "choice", "values": ["kl", "jsd"]},
            "beta": {"kind": "uniform", "low": 0.1, "high": 0.9, "when": {"divergence": "jsd"}},
        },
        searcher="random", trials=2,
    )  # fmt: skip
    low, high, between = [p for name, p in probes(space) if name == "beta"]
    assert (low, high) == ({"divergence": "jsd", "beta": 0.1}, {"divergence": "jsd", "beta": 0.9})
    assert between["divergence"] == "jsd"
    assert 0.1 < float(str(between["beta"])) < 0.9


def test_more_is_better_of_speeds_accuracies_and_agreements() -> None:
    large = ("top1_accuracy", "top1_agreement", "true_change_cosine", *SPEEDS)
    small = ("perplexity", "kl_to_teacher", "mse_to_noise", "mse_to_truth", "ece", "parameters", "bytes")
    assert not any(MetricConfig(name=name).lower_is_better for name in large)
    assert all(MetricConfig(name=name).lower_is_better for name in small)
    assert not MetricConfig(name="perplexity", mode="max").lower_is_better


@pytest.mark.parametrize("name", ["lm_topk", "sdxl_vae", "world_model"])
def test_the_speed_of_every_kind_of_student_is_known_as_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    speeds = [cost for cost in costs(load_config([f"configs/tiny/{name}.yaml"])) if "second" in cost]
    assert len(speeds) == 1
    assert speeds[0] in SPEEDS


def test_values_reach_through_interpolations_like_overrides(loaded: Loaded) -> None:
    space = loaded(f"metrics: [perplexity]\nsearcher: grid\nspace:\n  {ALPHA}: {{kind: grid, values: [0.2, 0.8]}}\n")
    config = space.config({ALPHA: 0.8})
    assert [phase.recipe.alpha for phase in config.phases] == [0.8, 0.8]
    assert space.base.phases[0].recipe.alpha == 0.5, "a trial's values must not stay in the run"


SPACES = {
    "an empty space": ("metrics: [perplexity]\nspace: {}", "wanted a map from names to maps with at least 1 element"),
    "a file without a space": (
        "metrics: [perplexity]",
        "space (space.yaml): missing; wanted a map from names to maps with at least 1 element",
    ),
    "no metric": ("metrics: []\nspace: {a: {kind: grid, values: [1]}}", "metrics (space.yaml, line 1): wanted"),
    "a key that does not exist": (
        "metrics: [perplexity]\ntrials: 2\nspace:\n  phases.0.recipe.alhpa: {kind: uniform, low: 0, high: 1}",
        "phases.0.recipe.alhpa (space.yaml, line 4): there is no such key; nearest: phases.0.recipe.alpha.",
    ),
    "a phase that does not exist": (
        "metrics: [perplexity]\ntrials: 2\nspace:\n  phases.7.recipe.alpha: {kind: uniform, low: 0, high: 1}",
        "phases.7 (space.yaml, line 4): phases is a list of 2",
    ),
    "an end that the schema refuses": (
        f"metrics: [perplexity]\ntrials: 2\nspace:\n  {ALPHA}: {{kind: uniform, low: 0.5, high: 1.5}}",
        f"{ALPHA} (space.yaml, line 4): wanted a number ≥ 0 and ≤ 1, found 1.5.",
    ),
    "a listed value that another section refuses": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n  phases.0.recipe.top_k: {kind: grid, values: [8, 64]}",
        "phases.0.recipe.top_k (space.yaml, line 4): teacher 'big' keeps 16, found 64; lower it.",
    ),
    "values that do not go together": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n"
        "  phases.0.batch.global_size: {kind: grid, values: [8, 12]}\n"
        "  phases.0.batch.micro_size: {kind: grid, values: [4, 8]}",
        "phases.0.batch.global_size=12, phases.0.batch.micro_size=8",
    ),
    "a metric that nobody measures": (
        f"metrics: [kl_to_techer]\nsearcher: grid\nspace:\n  {ALPHA}: {{kind: grid, values: [0.5]}}",
        "found 'kl_to_techer'; nearest: kl_to_teacher.",
    ),
    "a cost as what is optimised first": (
        f"metrics: [parameters]\nsearcher: grid\nspace:\n  {ALPHA}: {{kind: grid, values: [0.5]}}",
        "wanted a measure of quality first, found parameters, a cost",
    ),
    "a metric that moves with the weights": (
        "metrics: [kl_to_teacher]\nsearcher: grid\nspace:\n"
        "  w: {kind: simplex, keys: [teachers.0.weight, teachers.1.weight], steps: 4}",
        "kl_to_teacher is a mean over the teachers with their weights",
    ),
    "a section that is not a trial's": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n  evaluate.max_rows: {kind: grid, values: [4, 8]}",
        "evaluate.max_rows is not a trial's to vary: all trials are measured alike",
    ),
    "a grid over a range": (
        f"metrics: [perplexity]\nsearcher: grid\nspace:\n  {ALPHA}: {{kind: uniform, low: 0, high: 1}}",
        "searcher grid wants values that can be listed, found uniform; use kind grid with values",
    ),
    "no number of trials": (
        f"metrics: [perplexity]\nspace:\n  {ALPHA}: {{kind: uniform, low: 0, high: 1}}",
        "trials (space.yaml): wanted the number of trials with searcher random, found null",
    ),
    "a grid with another number of trials": (
        f"metrics: [perplexity]\nsearcher: grid\ntrials: 3\nspace:\n  {ALPHA}: {{kind: grid, values: [0.1, 0.5]}}",
        "searcher grid takes all 2 combinations, found 3",
    ),
    "a key inside another": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n  phases.0.recipe: {kind: choice, values: [{alpha: 1}]}\n"
        f"  {ALPHA}: {{kind: grid, values: [0.1]}}",
        f"{ALPHA} and phases.0.recipe set the same place",
    ),
    "a condition that never holds": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n"
        "  phases.0.recipe.divergence: {kind: choice, values: [jsd, forward_kl]}\n"
        "  phases.0.recipe.beta: {kind: grid, values: [0.5], when: {phases.0.recipe.divergence: reverse_kl}}",
        "phases.0.recipe.divergence is never 'reverse_kl'",
    ),
    "a condition on nothing": (
        f"metrics: [perplexity]\nsearcher: grid\nspace:\n  {ALPHA}: {{kind: grid, values: [0.5], when: {{seed: 1}}}}",
        "wanted another key of this space",
    ),
    "conditions in a circle": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n"
        f"  {ALPHA}: {{kind: grid, values: [0.5], when: {{{TEMPERATURE}: 1}}}}\n"
        f"  {TEMPERATURE}: {{kind: grid, values: [1], when: {{{ALPHA}: 0.5}}}}",
        "the conditions lead back to itself",
    ),
    "early stopping without evaluations": (
        f"metrics: [perplexity]\nscheduler: asha\ntrials: 2\nspace:\n  {ALPHA}: {{kind: uniform, low: 0, high: 1}}",
        "asha needs evaluations during training; set evaluate.every_steps",
    ),
    "a population that changes the student": (
        "metrics: [perplexity]\nscheduler: pbt\ntrials: 4\nspace:\n"
        "  student.init.num_layers: {kind: integers, low: 1, high: 3}",
        "student.init.num_layers cannot change inside a run",
    ),
    "fractions where the schema wants whole numbers": (
        "metrics: [perplexity]\nsearcher: optuna\ntrials: 4\nspace:\n"
        "  phases.0.recipe.top_k: {kind: uniform, low: 1, high: 16}",
        "phases.0.recipe.top_k (space.yaml, line 5): wanted a whole number",
    ),
    "a condition without values": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n"
        f"  {ALPHA}: {{kind: grid, values: [0.5]}}\n"
        f"  {TEMPERATURE}: {{kind: grid, values: [1], when: {{{ALPHA}: []}}}}",
        f"{TEMPERATURE}.when.{ALPHA}: wanted a value or a list of them, found an empty list.",
    ),
    "a simplex of one key": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n  w: {kind: simplex, keys: [teachers.0.weight], steps: 4}",
        "space.w.keys (space.yaml, line 4): wanted a list of texts with at least 2 elements, found a list of 1.",
    ),
    "more mixtures than anybody tries": (
        "metrics: [perplexity]\nsearcher: grid\nspace:\n"
        "  w: {kind: simplex, keys: [teachers.0.weight, teachers.1.weight], steps: 100000}",
        "space.w.steps (space.yaml, line 4): wanted at most 20,000 mixtures, found 100,001",
    ),
    "an unknown kind": (
        f"metrics: [perplexity]\ntrials: 2\nspace:\n  {ALPHA}: {{kind: unifrm, low: 0, high: 1}}",
        "wanted one of grid, choice, uniform, log_uniform, integers, simplex, found 'unifrm'; nearest: uniform",
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_it_is_refused_before_anything_runs(name: str, loaded: Loaded) -> None:
    text, message = SPACES[name]
    assert message in loaded.refusal(text)


def test_a_population_wants_checkpoints_as_often_as_it_changes(loaded: Loaded) -> None:
    text = f"metrics: [perplexity]\nscheduler: pbt\ntrials: 4\nspace:\n  {ALPHA}: {{kind: uniform, low: 0, high: 1}}"
    one = ("evaluate.every_steps=5", "phases=[{name: a, steps: 8, batch: {global_size: 4, micro_size: 4}, "
           "optimizer: {student: {lr: 0.1}}, checkpoint: {every_steps: 10}}]")  # fmt: skip
    message = "pbt takes over checkpoints every 5 steps, found phases.0.checkpoint.every_steps: 10"
    assert message in loaded.refusal(text, *one)
    assert "pbt wants a run of one phase, found 2" in loaded.refusal(text, "evaluate.every_steps=10")
    assert loaded(text, *one, "phases.0.checkpoint.every_steps=5").sweep.trials == 4


def test_check_says_how_many_trials_there_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    space = f"metrics: [perplexity]\nsearcher: grid\nspace: {{{ALPHA}: {{kind: grid, values: [0, 1]}}}}"
    (tmp_path / "space.yaml").write_text(space)
    assert main(["run.yaml", "--check", "--tune", "space.yaml"]) == 0
    assert capsys.readouterr().out == f"toy: the configuration is valid (2 teachers, 2 phases; 2 trials over {ALPHA})\n"
    assert main(["run.yaml", "--check", "--tune", "missing.yaml"]) == 2
    assert "missing.yaml: there is no such configuration file" in capsys.readouterr().err
    assert main(["run.yaml", "--plan", "--tune", "space.yaml"]) == 2
    assert "--plan: wanted a run alone, found --tune too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run.yaml", "--tune", "space.yaml", "--stages", "train"])


SHIPPED = {
    "alpha_temperature": ("configs/tiny/lm_topk.yaml", (), 20),
    "top_k": ("configs/tiny/lm_topk.yaml", (), 8),
    "teacher_weights": ("configs/tiny/sdxl_three_teachers.yaml", (), 21),
    "learning_rate_phases": ("configs/tiny/lm_moe_two_stage.yaml", ("evaluate.every_steps=5",), None),
    "student_size_projection": ("configs/tiny/lm_topk.yaml", (), 12),
    "population": (
        "configs/tiny/lm_topk.yaml", ("evaluate.every_steps=5", "phases.0.checkpoint.every_steps=5"), 8
    ),
}  # fmt: skip


def test_every_space_that_is_shipped_is_tested() -> None:
    assert {path.stem for path in (ROOT / "tune").glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_space_that_is_shipped_fits_the_run_that_its_head_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run, overrides, trials = SHIPPED[name]
    space = load_space(f"tune/{name}.yaml", read_draft([run], overrides))
    points = space.points()
    assert (None if points is None else len(points)) == trials
    head = (ROOT / f"tune/{name}.yaml").read_text()
    assert f"--tune tune/{name}.yaml" in head
    assert run in head


def test_the_weights_of_the_three_large_teachers_can_be_searched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space = load_space("tune/teacher_weights.yaml", read_draft(["configs/sdxl_multi_teacher.yaml"]))
    assert len(space.points() or []) == 21


def test_the_configuration_stays_free_of_torch_and_numpy() -> None:
    code = "import sys, raydistill.config.tune; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
