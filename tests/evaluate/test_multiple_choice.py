from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from toys import tiny_llama, tiny_tokenizer

from raydistill.errors import DataError
from raydistill.evaluate.multiple_choice import Question, benchmark_name, encode, read_questions, score_benchmark

QUESTIONS = [
    Question(0, [("Question: one?\nAnswer:", " a first"), ("Question: one?\nAnswer:", " b")]),
    Question(2, [("Two ", "is x"), ("Two ", "is yy"), ("Two ", "is zzz zzz")]),
    Question(1, [("He went", " home."), ("She went", " home.")]),
]


def _requests(questions: Sequence[Question]) -> list[dict[str, object]]:
    return [
        {
            "request_type": "loglikelihood",
            "doc": {},
            "request": {"context": context, "continuation": continuation},
            "idx": i,
            "doc_id": doc_id,
            "label": q.label,
        }
        for doc_id, q in enumerate(questions)
        for i, (context, continuation) in enumerate(q.choices)
    ]


def _write(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_requests_become_questions_and_unconditional_ones_are_skipped(tmp_path: Path) -> None:
    rows = _requests(QUESTIONS)
    unconditional = [{**row, "doc_id": 1_000_000 + row["doc_id"]} for row in rows]
    path = _write(tmp_path / "sciq/rc_0shot/requests.jsonl.gz", [*rows, *unconditional])
    assert read_questions(path) == QUESTIONS
    assert benchmark_name(path) == "sciq/rc_0shot"
    assert benchmark_name("bench/mine.jsonl") == "mine"


def test_fewer_questions_are_spread_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "requests.jsonl.gz", _requests(QUESTIONS * 4))
    assert read_questions(path, most=4) == [QUESTIONS[0]] * 4
    assert len(read_questions(path, most=100)) == 12


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "requests.jsonl.gz", _requests(QUESTIONS))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read_questions(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["no object"], "line 1: wanted a JSON object"),
        ([{"doc_id": 0, "label": 0}], "line 1: wanted a JSON object"),
        ([{"doc_id": 0, "label": "A", "request": {"context": "c", "continuation": "d"}}], "Only multiple-choice"),
        (_requests(QUESTIONS)[:-1], r"question 2 has 1 continuation\(s\)"),
        ([{**r, "label": 7} for r in _requests(QUESTIONS)[:2]], "the label 7"),
        ([{**r, "label": i} for i, r in enumerate(_requests(QUESTIONS)[:2])], "has the labels 0 and 1"),
        ([], "found none"),
    ],
)
def test_other_layouts_are_errors_that_name_the_line_or_question(
    tmp_path: Path, rows: list[object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(_write(tmp_path / "requests.jsonl.gz", rows))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such benchmark file"):
        read_questions(tmp_path / "requests.jsonl.gz")


def test_trailing_spaces_of_the_context_belong_to_the_answer() -> None:
    choices = encode(tiny_tokenizer(), [QUESTIONS[1]], max_tokens=100)
    assert [c.num_scored for c in choices] == [5, 6, 11]  # one token per character, the space included


def test_a_long_context_loses_its_beginning() -> None:
    question = Question(0, [("x" * 50 + "yz", " ab"), ("x" * 50 + "yz", " cd")])
    choice = encode(tiny_tokenizer(), [question], max_tokens=6)[0]
    assert tiny_tokenizer().decode(choice.input_ids) == "xyz ab"
    assert choice.num_scored == 3


def test_scores_are_those_of_one_forward_pass_per_choice() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    found = score_benchmark(model, tokenizer, QUESTIONS, vocab_size=97, batch_tokens=50, chunk_tokens=3)
    right = right_norm = 0
    for question in QUESTIONS:
        sums, means = [], []
        for context, continuation in question.choices:
            ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
            start = len(tokenizer(context.rstrip())["input_ids"])
            with torch.no_grad():
                log_p = model.double()(ids).logits.log_softmax(-1)
            value = sum(float(log_p[0, t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            sums.append(value)
            means.append(value / len(continuation.strip()))
        right += max(range(len(sums)), key=sums.__getitem__) == question.label
        right_norm += max(range(len(means)), key=means.__getitem__) == question.label
    assert found["accuracy"] == pytest.approx(right / 3)
    assert found["accuracy_norm"] == pytest.approx(right_norm / 3)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(right / 3 * (1 - right / 3) / 2))


def test_a_model_that_knows_the_answers_has_accuracy_one() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    questions = [Question(i % 2, [("Q", " a"), ("Q", " b")]) for i in range(8)]
    with torch.no_grad():
        a, b = (
            float(model(tokenizer("Q" + c, return_tensors="pt")["input_ids"]).logits[0, 1].log_softmax(-1)[ids])
            for c, ids in ((" a", tokenizer("a")["input_ids"][0]), (" b", tokenizer("b")["input_ids"][0]))
        )
    always = 0 if a > b else 1
    found = score_benchmark(model, tokenizer, questions, vocab_size=97)
    assert found["accuracy"] == 0.5
    assert score_benchmark(model, tokenizer, [questions[always]] * 3, vocab_size=97)["accuracy"] == 1.0
