from __future__ import annotations

import math

import pytest

from raydistill.evaluate.comparison import LANGUAGE, Quality, compare

LINES = {
    "teacher": {"perplexity": 10.0, "parameters": 100, "bytes": 200, "tokens_per_second": 50.0},
    "student_init": {"perplexity": 1000.0},
    "student_ce": {"perplexity": 100.0},
    "student": {"perplexity": 31.6227766, "parameters": 25, "bytes": 50, "tokens_per_second": 150.0},
}


def test_the_gap_of_perplexities_is_measured_in_nats() -> None:
    found = compare(LINES, LANGUAGE)
    assert found["gap_closed"] == pytest.approx(0.75)
    assert found["baseline_gap_closed"] == pytest.approx(0.5)
    assert found["parameters_ratio"] == 0.25
    assert found["bytes_ratio"] == 0.25
    assert found["speed_ratio"] == 3.0
    assert found["better_than_init"] is True
    assert found["better_than_baseline"] is True


def test_the_average_stands_for_the_student_where_it_is_what_is_exported() -> None:
    lines = {**LINES, "student_ema": {**LINES["student"], "perplexity": 10.0}}
    assert compare(lines, LANGUAGE)["gap_closed"] == pytest.approx(0.75)
    assert compare(lines, LANGUAGE, exported="student_ema")["gap_closed"] == pytest.approx(1.0)


def test_an_error_of_an_image_model_has_the_same_keys_and_a_linear_gap() -> None:
    lines = {"teacher": {"mse": 1.0}, "student_init": {"mse": 5.0}, "student": {"mse": 2.0}}
    found = compare(lines, Quality("mse"))
    assert set(found) == set(compare(LINES, LANGUAGE))
    assert found["gap_closed"] == 0.75
    assert found["better_than_baseline"] is None
    assert found["parameters_ratio"] is None


def test_where_more_is_better_the_larger_value_wins() -> None:
    lines = {"student_init": {"accuracy": 0.5}, "student_ce": {"accuracy": 0.8}, "student": {"accuracy": 0.7}}
    found = compare(lines, Quality("accuracy", lower_is_better=False))
    assert found["better_than_init"] is True
    assert found["better_than_baseline"] is False


def test_a_value_that_is_no_number_counts_as_not_measured() -> None:
    found = compare({**LINES, "student": {"perplexity": math.nan}}, LANGUAGE)
    assert found["student_quality"] is None
    assert found["gap_closed"] is None
    assert found["better_than_init"] is None
