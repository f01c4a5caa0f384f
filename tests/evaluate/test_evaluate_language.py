from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_run import toy_config, toy_held_out
from toys import Bigram, bigram_model, tiny_llama, write_toy_caches

from raydistill.errors import DataError
from raydistill.evaluate import language
from raydistill.evaluate.language import (
    LanguageValidator,
    calibration_sums,
    divergence,
    evaluate_language,
    language_metrics,
    make_validator,
    model_size,
    open_held_out,
)


def _exact_loss(bigram: Bigram, rows: list) -> float:
    return -float(np.concatenate([bigram.label_logp(row) for row in rows]).mean())


def test_the_teacher_itself_has_no_divergence_from_its_cache_and_its_exact_perplexity(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path)
    teacher = caches.teachers["toy"]
    found = evaluate_language(bigram_model(teacher), rows)
    assert found["loss"] == pytest.approx(_exact_loss(teacher, caches.rows["held_out"]), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert 0 <= found["kl_to_teacher"] < 1e-5  # fp16 rounding
    assert found["top1_agreement"] == 1.0
    assert found["tokens_per_second"] > 0


def test_kl_on_all_ids_is_the_exact_kl(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path, top_k=64)
    other = Bigram.random(seed=5)
    exact = np.concatenate([caches.teachers["toy"].kl(other, row) for row in caches.rows["held_out"]]).mean()
    assert evaluate_language(bigram_model(other), rows)["kl_to_teacher"] == pytest.approx(exact, rel=2e-3)


def test_kl_on_k_plus_one_classes_is_that_of_a_second_implementation_and_below_the_exact_kl(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path, top_k=8)
    teacher, other = caches.teachers["toy"], Bigram.random(seed=5)
    values, exact = [], []
    for row in caches.rows["held_out"]:
        at = row.input_ids[np.flatnonzero(row.target)]
        for log_p, log_q in zip(teacher.log_p[at], other.log_p[at], strict=True):
            top = np.argsort(-log_p)[:8]
            p, q = np.exp(log_p[top]), np.exp(log_q[top])
            p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
            values.append((p * np.log(p / q)).sum())
        exact.append(teacher.kl(other, row))
    found = evaluate_language(bigram_model(other), rows)["kl_to_teacher"]
    assert found == pytest.approx(np.mean(values), rel=2e-3)
    assert found < np.concatenate(exact).mean()


def test_the_sums_of_any_number_of_ranks_add_up_and_every_rank_makes_as_many_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = toy_held_out(tmp_path)
    student = bigram_model(Bigram.random(seed=5))
    calls: list[int] = []
    real = language.hidden_states
    monkeypatch.setattr(language, "hidden_states", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    validator = LanguageValidator(replace(rows, batch_tokens=20))
    whole = validator.sums(student)
    assert len(calls) % 3, "the rows should not divide evenly over three ranks"
    counts, total = [], dict.fromkeys(whole, 0.0)
    for rank in range(3):
        calls.clear()
        for name, value in validator.sums(student, rank=rank, world_size=3).items():
            total[name] += value
        counts.append(len(calls))
    assert len(set(counts)) == 1
    assert total == pytest.approx(whole, rel=1e-9)


def test_chunks_of_tokens_and_batches_do_not_change_the_sums(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path)
    student = bigram_model(Bigram.random(seed=5))
    whole = LanguageValidator(rows).sums(student)
    assert LanguageValidator(replace(rows, chunk_tokens=3, batch_tokens=1)).sums(student) == pytest.approx(
        whole, rel=1e-6
    )


def test_the_student_is_left_in_the_mode_it_was_in(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path)
    student = bigram_model(Bigram.random(seed=5)).train()
    LanguageValidator(rows).sums(student)
    assert student.training


def test_padding_rows_of_the_head_take_no_part(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path)
    student = tiny_llama(64, tied=False)
    before = LanguageValidator(rows).sums(student)
    student.resize_token_embeddings(80)
    with torch.no_grad():
        student.lm_head.weight[64:] = 50.0
    assert LanguageValidator(rows).sums(student) == pytest.approx(before, rel=1e-6)


def test_the_kl_of_several_teachers_is_weighted_like_the_loss(tmp_path: Path) -> None:
    teachers = {"a": Bigram.random(seed=0), "b": Bigram.random(seed=1)}
    caches, rows = toy_held_out(tmp_path, teachers=teachers, top_k=64)
    student = Bigram.random(seed=5)
    kl = [np.concatenate([t.kl(student, row) for row in caches.rows["held_out"]]).mean() for t in teachers.values()]
    found = evaluate_language(bigram_model(student), rows)
    assert found["kl_to_teacher"] == pytest.approx((kl[0] + 2 * kl[1]) / 3, rel=2e-3)


def test_bits_per_byte_divides_the_bits_by_the_bytes_of_the_targets(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path)
    found = evaluate_language(bigram_model(caches.teachers["toy"]), rows)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) / 4)  # toy rows count 4 bytes per target


def test_a_sampled_tail_with_counts_in_proportion_to_the_probabilities_gives_the_exact_kl() -> None:
    p = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]])
    q = torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.2]])
    signal = {
        "ids": torch.tensor([[0]]),
        "logp": p[:, :1].log(),
        "log_tail": torch.tensor([0.6]).log(),
        "entropy": -(p * p.log()).sum(-1),
        "tail_ids": torch.tensor([[1, 2, 3, 4, 0]]),
        "tail_counts": torch.tensor([[2, 2, 1, 1, 0]]),
    }
    exact = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(q.log(), signal), exact)


def test_a_tail_of_nothing_gives_a_finite_kl() -> None:
    log_q = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0]]), -1)
    signal = {"ids": torch.tensor([[2, 1, 0]]), "logp": log_q[:, [2, 1, 0]], "log_tail": torch.tensor([-60.0])}
    torch.testing.assert_close(divergence(log_q, signal), torch.zeros(1), atol=1e-6, rtol=0)


def test_ece_is_that_of_a_second_implementation() -> None:
    rng = np.random.default_rng(0)
    confidence = np.append(rng.random(500), [1.0, 1 / 15, 1 / 3])
    correct = np.append(rng.random(500) < 0.6, [True, False, True])
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15 + 1e-12)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    sums = calibration_sums(torch.from_numpy(confidence), torch.from_numpy(correct)).tolist()
    names = [f"{kind}/{b:02}" for kind in ("bin_tokens", "bin_confidence", "bin_correct") for b in range(15)]
    totals = {"tokens": 503.0, "nll": 0.0, "correct": 0.0, **dict(zip(names, sums, strict=True))}
    assert language_metrics(totals, [])["ece"] == pytest.approx(expected, abs=1e-9)


def test_a_model_that_draws_its_own_text_is_calibrated(tmp_path: Path) -> None:
    caches = write_toy_caches(tmp_path, num_rows=4, num_held_out=400)
    config = toy_config(tmp_path)
    validator = make_validator(config, inputs=caches.inputs.uri, signals={})
    found = validator.metrics(validator.sums(bigram_model(caches.teachers["toy"])))
    assert found["ece"] < 0.03
    assert "kl_to_teacher" not in found


def test_tied_parameters_count_once() -> None:
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    assert model_size(untied)["parameters"] - model_size(tied)["parameters"] == 97 * 32
    assert model_size(tied.bfloat16())["bytes"] == 2 * model_size(tied)["parameters"]


def test_inputs_without_held_out_rows_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    caches = write_toy_caches(tmp_path, num_held_out=0)
    with pytest.raises(DataError, match=r"evaluate\.held_out"):
        open_held_out(toy_config(tmp_path), inputs=caches.inputs.uri, signals={})
