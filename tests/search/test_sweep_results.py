"""What comes out of a sweep: the best trial, what mattered, what it cost, and the page that says so."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_sweep import ACCOUNTING, ALPHA, GRID, MANY, TEMPERATURE, WEIGHTS, fake_results, fake_run

from raydistill.config.schema import RunConfig
from raydistill.config.sweep import SweepConfig
from raydistill.report.sweep import render_sweep
from raydistill.search import accounting
from raydistill.search.accounting import Work, account
from raydistill.search.curve import Outcome
from raydistill.search.ledger import TrialRecord
from raydistill.search.results import Result, as_csv, as_json, best_of, compromises, explained, importances, labels
from raydistill.storage import Store

# Results ------------------------------------------------------------------------------------------------------------


def test_the_best_trial_is_a_finished_one() -> None:
    sweep = SweepConfig.model_validate(GRID)
    best = best_of(fake_results(sweep), sweep)
    assert best is not None
    assert best.record.values == {ALPHA: 0.7, TEMPERATURE: 1.5}
    others = best_of(fake_results(sweep, fail=(best.record.number,)), sweep)
    assert others is not None
    assert others.record.number != best.record.number
    assert best_of([], sweep) is None


def test_the_front_is_what_nobody_beats_in_everything() -> None:
    sweep = SweepConfig.model_validate(MANY)
    results = fake_results(sweep, stop=True, fail=(4,))
    front = {r.record.number for r in compromises(results, sweep)}
    done = [r for r in results if r.record.status == "done"]
    for r in done:
        beaten = any(
            o.outcome.metrics["perplexity"] <= r.outcome.metrics["perplexity"]
            and o.outcome.metrics["parameters"] <= r.outcome.metrics["parameters"]
            and o is not r
            for o in done
        )
        assert (r.record.number in front) == (not beaten)


def test_explained_variance_is_one_for_a_function_of_the_group_and_zero_by_chance() -> None:
    groups = [i % 4 for i in range(40)]
    assert explained(groups, [float(g) for g in groups]) == 1
    assert explained(groups, [5.0] * 40) == 0
    rng = random.Random(0)
    chance = [explained(groups, [rng.random() for _ in groups]) for _ in range(400)]
    assert sum(chance) / len(chance) == pytest.approx(0, abs=0.01)
    assert min(chance) < 0, "the correction takes away what chance gives"


def test_a_key_that_does_everything_is_told_from_one_that_does_nothing() -> None:
    sweep = SweepConfig.model_validate(GRID)
    results = fake_results(sweep)
    found = {i.key: i for i in importances(results, sweep)}
    assert found[TEMPERATURE].share > 0.6
    assert found[TEMPERATURE].chance < 0.01
    assert found[ALPHA].share < 0.2
    assert found[ALPHA].trials == 20
    assert importances(results[:5], sweep) == [], "five trials say nothing"


def test_the_table_has_a_row_per_trial_and_survives_commas() -> None:
    sweep = SweepConfig.model_validate(MANY)
    rows = [*csv.DictReader(io.StringIO(as_csv(fake_results(sweep, stop=True, fail=(4,)), sweep)))]
    assert len(rows) == 30
    assert rows[4]["status"] == "failed"
    assert rows[4]["error"] == "the loss of step 12 is not a number"
    assert float(rows[0]["perplexity"]) > 0
    assert {row["phases.0.recipe.divergence"] for row in rows} == {"forward_kl", "reverse_kl", "jsd"}


# Costs --------------------------------------------------------------------------------------------------------------


def test_the_accounting_adds_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two trials of 40 steps of 100 tokens; teachers of 30 FLOP per token and a cache of 500, students of 6."""
    monkeypatch.setattr(accounting, "work_of", lambda config: Work(30.0, 500.0, (6.0,), (100.0,)))
    signal = Store(tmp_path)
    builds = [
        {"started": started, "seconds": 5.0, "host": "a", "actors": [1, 1], "shards": shards}
        for started, shards in ((100.0, ["a", "b"]), (300.0, ["b"]))
    ]
    signal.publish("build.json", json.dumps(builds))
    run: Any = SimpleNamespace(config=config_of(0.5), signals={"big": (signal, None)})
    results = [result_of(number, 40) for number in range(2)]
    configs = {0: config_of(0.5), 1: config_of(0.0)}  # the second learns from the data alone
    found: Any = account([run], results, configs, began=200.0)
    assert found["teacher_shards"] == 3
    assert found["teacher_shards_after_first_trial"] == 1, "a shard was built after the first trial began"
    assert found["trained_units"] == 4000
    assert found["flops"] == {
        "teachers": 15_000, "students": 48_000, "with_cache": 63_000, "online_teachers": 120_000, "online": 168_000,
        "saved": pytest.approx(168 / 63),
    }  # fmt: skip
    assert found["seconds"]["online_teachers"] == pytest.approx(4000 * 10 / 500)
    assert found["seconds"]["with_cache"] == 10 + 2 * 7
    other: Any = SimpleNamespace(config=config_of(0.5), signals={"big": (Store(tmp_path / "other"), None)})
    more: Any = account([run, other], results, configs, began=200.0)
    assert more["flops"]["teachers"] == 30_000, "a second cache was built"
    assert more["teacher_builds"] == 2, "by nobody knows whom"


def result_of(number: int, steps: int) -> Result:
    trial = TrialRecord(number=number, point={}, values={}, inputs="i", signals={}, init=None, status="done")
    return Result(trial, Outcome(phase_steps=(steps,), seconds=7.0))


def config_of(alpha: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "toy",
            "source": {"paths": ["a.txt"], "tokenizer": "gpt2", "seq_len": 16},
            "teachers": [{"name": "big", "model": {"library": "transformers", "source": "org/big"}}],
            "student": {"model": {"library": "transformers", "source": "org/small"}},
            "phases": [
                {
                    "name": "one",
                    "steps": 40,
                    "recipe": {"alpha": alpha},
                    "batch": {"global_size": 8, "micro_size": 4},
                    "optimizer": {"student": {"lr": 0.1}},
                }
            ],
        }
    )


def test_a_key_is_called_by_what_tells_it_apart() -> None:
    space = {
        key: {"kind": "grid", "values": [1]}
        for key in (
            "teachers.1.weight",
            "phases.0.recipe.alpha",
            "phases.0.optimizer.student.lr",
            "phases.1.optimizer.student.lr",
        )
    }
    sweep = SweepConfig.model_validate({"space": space, "metrics": ["perplexity"], "searcher": "grid"})
    assert [*labels(sweep, fake_run()).values()] == [
        "green",
        "alpha",
        "phases.0.optimizer.student.lr",
        "phases.1.optimizer.student.lr",
    ]


# The page -----------------------------------------------------------------------------------------------------------


def page(conf: dict[str, Any], **kinds: Any) -> str:
    sweep = SweepConfig.model_validate(conf)
    run = fake_run().model_copy(update={"name": "toy <sweep>"})
    return render_sweep(as_json(fake_results(sweep, **kinds), sweep, run, ACCOUNTING))


def test_the_page_answers_a_grid_of_two_keys_with_a_table() -> None:
    text = page(GRID)
    assert text.count('<rect class="heat') == 2 * 20
    assert text.count('<rect class="heat best"') == 2
    assert "trial 011 is the best: alpha 0.7, temperature 1.5. Its perplexity is 32.1;" in text
    assert "the next best reached 33, the worst 63.4." in text
    assert "toy &lt;sweep&gt;" in text


def test_the_page_shows_three_weights_in_a_triangle_with_the_teachers_names() -> None:
    text = page(WEIGHTS)
    assert text.count('<circle class="heat') == 21
    assert text.count('<circle class="heat best"') == 1
    assert "is the best: red 0.6, green 0.4, blue 0." in text
    for name in ("red", "green", "blue"):
        assert f">{name}</text>" in text


def test_the_page_needs_no_network_and_no_script() -> None:
    text = page(MANY, stop=True, fail=(4,))
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert text == page(MANY, stop=True, fail=(4,)), "the same content gives the same page"


def test_the_page_shows_many_keys_the_front_and_what_went_wrong() -> None:
    text = page(MANY, stop=True, fail=(4,))
    assert text.count("line thread") == 29
    assert "the best compromises" in text
    assert "<b>Trial 004</b> failed: the loss of step 12 is not a number" in text
    assert "stopped early" in text
    assert "(may be chance)" in text
    assert "hint, not a finding" in text


def test_a_cache_that_has_not_paid_for_itself_is_not_called_a_saving() -> None:
    sweep = SweepConfig.model_validate(GRID)
    text = render_sweep(as_json(fake_results(sweep), sweep, fake_run(), ACCOUNTING | {"flops": {"saved": 0.5}}))
    assert "<b>2×</b><span>more computing</span>" in text


def test_a_page_without_a_finished_trial_says_so() -> None:
    sweep = SweepConfig.model_validate(GRID)
    text = render_sweep(as_json([], sweep, fake_run(), {}))
    assert "No trial has been trained to its end yet." in text
