"""A language model on held-out rows: against the data, and against the distributions its teachers left in the cache.

Everything is a sum over target positions, so that micro-batches and ranks add up; `language_metrics` divides.
The output head works on chunks of tokens: the logits of all tokens never exist at once.

Notation: p teacher, q student, K the teacher's stored ids, y the true next token, V the vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from raydistill.cache.read import Dataset, open_manifest, without_targets
from raydistill.config.schema import RunConfig
from raydistill.errors import DataError
from raydistill.models.language import head_of, hidden_states
from raydistill.recipes.base import TeacherView
from raydistill.signals import Batch, JsonValue
from raydistill.storage import Store

NUM_BINS = 15
SPEED_SECONDS = 4.0
"""Longest time spent on measuring the speed of one model."""

Signal = Mapping[str, Tensor]
"""Fields of one teacher's signal at n target positions, by name: [n, ...]."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows with the signals of the teachers, cut into micro-batches."""

    dataset: Dataset
    teachers: tuple[TeacherView, ...]
    vocab_size: int
    """Ids that exist; rows of the output head beyond them are padding."""
    batch_tokens: int
    """Most tokens, padding included, in a forward pass."""
    chunk_tokens: int
    """Tokens whose logits exist at one time."""

    def batches(self) -> list[list[int]]:
        """Row indices of each micro-batch: rows of similar length together, longest first; the same on every rank."""
        lengths = [int(n) for n in self.dataset.num_tokens]
        batches: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches


def open_held_out(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> HeldOut:
    """The held-out rows of a run; `inputs` and `signals` are URIs of finished caches.

    Raises `DataError` when there is no held-out row.
    """
    facts = {name: open_manifest(Store(uri)).facts for name, uri in signals.items()}
    total = sum(t.weight for t in config.teachers if t.name in facts) or 1.0
    teachers = tuple(TeacherView(t.name, t.weight / total, facts[t.name]) for t in config.teachers if t.name in facts)
    dataset = Dataset(
        Store(inputs),
        {name: Store(uri) for name, uri in signals.items()},
        split="held_out",
        fields={t.name: fields_read(t.facts) for t in teachers},
        max_rows=max_rows or config.evaluate.max_rows,
    )
    if not dataset.num_targets.sum():
        raise DataError(
            f"{inputs}: wanted held-out rows to measure on, found none; raise evaluate.held_out "
            f"({config.evaluate.held_out}) or add documents to the source"
        )
    vocab_size = dataset.inputs_manifest.facts["vocab_size"]
    assert isinstance(vocab_size, int)
    batch, recipes = config.phases[-1].batch, [p.recipe for p in config.phases]
    return HeldOut(
        dataset,
        teachers,
        vocab_size,
        batch_tokens=batch.micro_size * config.text.seq_len,
        chunk_tokens=min(r.chunk_tokens for r in recipes if hasattr(r, "chunk_tokens")),
    )


def fields_read(facts: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """The fields of a `top_k_logits` signal that the measurements need."""
    fields = ("ids", "logp", "log_tail", "entropy", "label_logp")
    return (*fields, "tail_ids", "tail_counts") if facts["estimator"] == "head_tail_sample" else fields


def sum_names(teachers: Sequence[TeacherView]) -> list[str]:
    """Names of the sums that `score_tokens` returns, in its order."""
    return [
        "tokens", "nll", "correct",
        *(f"{sum}/{teacher.name}" for teacher in teachers for sum in ("kl", "agree")),
        *(f"{sum}/{b:02}" for sum in ("bin_tokens", "bin_confidence", "bin_correct") for b in range(NUM_BINS)),
    ]  # fmt: skip


def score_tokens(
    logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"], signals: Sequence[Signal]
) -> Float[Tensor, " sums"]:
    """Sums over n target positions, fp64, in the order of `sum_names`; `signals` has one entry per teacher."""
    log_q = torch.log_softmax(logits.float(), dim=-1)
    best, argmax = log_q.max(dim=-1)
    correct = argmax == labels
    nll = -log_q.gather(-1, labels[:, None]).sum(dtype=torch.float64)
    sums = [torch.tensor(len(labels), dtype=torch.float64, device=logits.device), nll, correct.sum(dtype=torch.float64)]
    for signal in signals:
        agree = argmax == signal["ids"][:, 0] if signal["ids"].shape[1] else torch.zeros_like(correct)
        sums += [divergence(log_q, signal).sum(dtype=torch.float64), agree.sum(dtype=torch.float64)]
    return torch.cat([torch.stack(sums), calibration_sums(best.exp(), correct)])


def divergence(log_q: Float[Tensor, "n V"], signal: Signal) -> Float[Tensor, " n"]:
    """KL(p ‖ q) at temperature 1, in nats, from what the cache holds of p.

    From K ids and the mass outside them it is taken on K+1 classes, which bounds the KL over the whole vocabulary from
    below (data processing inequality). Where the signal holds samples of the tail, with counts c of M draws, the whole
    KL is estimated without bias from the stored entropy H:
        KL = -H - Σ_{i∈K} p_i log q_i - (1-P) Σ_j (c_j / M) log q_j
    """
    ids, log_p, log_tail = signal["ids"].long(), signal["logp"].float(), signal["log_tail"].float()
    log_q_head = log_q.gather(-1, ids)
    if "tail_ids" in signal:
        counts = signal["tail_counts"].float()
        drawn = (counts * log_q.gather(-1, signal["tail_ids"].long())).sum(-1) / counts.sum(-1).clamp(min=1)
        return -signal["entropy"].float() - (log_p.exp() * log_q_head).sum(-1) - log_tail.exp() * drawn
    outside = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp(min=-1e4)  # -inf when K is the whole vocabulary
    # Stored values are rounded to fp16, so the K+1 masses are normalised again.
    log_r = torch.log_softmax(torch.cat([log_p, log_tail[:, None]], dim=-1), dim=-1)
    return (log_r.exp() * (log_r - torch.cat([log_q_head, outside[:, None]], dim=-1))).sum(-1)


def calibration_sums(
    confidence: Float[Tensor, " n"], correct: Float[Tensor, " n"]
) -> Float[Tensor, " three_times_bins"]:
    """Tokens, summed confidence and correct answers in each of 15 equal-width bins of confidence, ((b-1)/15, b/15]."""
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    values = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence.dtype)]).double()
    return torch.zeros(3, NUM_BINS, dtype=torch.float64, device=confidence.device).index_add_(1, bins, values).flatten()


def language_metrics(totals: Mapping[str, float], teachers: Sequence[TeacherView]) -> dict[str, float]:
    """Means over the held-out targets, from sums over all rows and ranks.

    `loss` is in nats per token, `kl_to_teacher` in nats; with several teachers it and `top1_agreement` are means
    weighted like the loss. `ece` is the expected calibration error of the most probable token against the true one:
    Σ_b (n_b / n) |accuracy_b - confidence_b|. Source: Guo et al. 2017, arXiv 1706.04599, Eq. 3.
    """
    tokens = totals["tokens"]
    loss = totals["nll"] / tokens
    gaps = (abs(totals[f"bin_correct/{b:02}"] - totals[f"bin_confidence/{b:02}"]) for b in range(NUM_BINS))
    metrics = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "top1_accuracy": totals["correct"] / tokens,
        "ece": sum(gaps) / tokens,
    }
    if totals.get("bytes"):
        metrics["bits_per_byte"] = totals["nll"] / math.log(2) / totals["bytes"]
    if teachers:
        metrics["kl_to_teacher"] = sum(t.weight * totals[f"kl/{t.name}"] for t in teachers) / tokens
    with_ids = [t for t in teachers if t.facts["top_k"]]
    if with_ids:
        weight = sum(t.weight for t in with_ids)
        metrics["top1_agreement"] = sum(t.weight * totals[f"agree/{t.name}"] for t in with_ids) / weight / tokens
    return metrics


class LanguageValidator:
    """The validator that the training loop calls: sums on each rank, metrics from their total."""

    def __init__(self, rows: HeldOut):
        self.rows = rows

    @torch.no_grad()
    def sums(self, student: nn.Module, *, rank: int = 0, world_size: int = 1) -> dict[str, float]:
        """The sums of this rank's share; every rank makes the same number of forward passes (ZeRO-3 needs that)."""
        assert isinstance(student, PreTrainedModel), "language models are those of transformers"
        batches = self.rows.batches()
        device = next(student.parameters()).device
        names = sum_names(self.rows.teachers)
        total = torch.zeros(len(names), dtype=torch.float64, device=device)
        num_bytes, was_training = 0, student.training
        student.eval()
        for first in range(0, len(batches), world_size):
            mine = first + rank
            indices = batches[mine if mine < len(batches) else 0]
            batch = self.rows.dataset.batch(indices)
            if mine < len(batches):
                num_bytes += int(self.rows.dataset.text_bytes[indices].sum())
            else:
                batch = without_targets(batch)
            total += self._batch_sums(student, {name: tensor.to(device) for name, tensor in batch.items()})
        student.train(was_training)
        return {**dict(zip(names, total.tolist(), strict=True)), "bytes": float(num_bytes)}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the summed `sums` of all ranks."""
        return language_metrics(totals, self.rows.teachers)

    def _batch_sums(self, student: PreTrainedModel, batch: Batch) -> Float[Tensor, " sums"]:
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
        head = head_of(student, self.rows.vocab_size)
        where = batch["target"]
        states, labels = hidden.states[where], batch["labels"][where]
        prefixes = [f"{t.name}/" for t in self.rows.teachers]
        signals = [{k.removeprefix(p): v[where] for k, v in batch.items() if k.startswith(p)} for p in prefixes]
        total = torch.zeros(len(sum_names(self.rows.teachers)), dtype=torch.float64, device=states.device)
        for start in range(0, len(labels), self.rows.chunk_tokens):
            chunk = slice(start, start + self.rows.chunk_tokens)
            logits = head.logits(states[chunk])
            total += score_tokens(logits, labels[chunk], [{k: v[chunk] for k, v in s.items()} for s in signals])
        return total


def make_validator(
    config: RunConfig, *, inputs: str, signals: Mapping[str, str], max_rows: int | None = None
) -> LanguageValidator:
    """The validator of a run; `inputs` and `signals` (by teacher, possibly none) are URIs of finished caches."""
    return LanguageValidator(open_held_out(config, inputs=inputs, signals=signals, max_rows=max_rows))


def evaluate_language(model: PreTrainedModel, rows: HeldOut) -> dict[str, float]:
    """What metrics.json says of one language model: quality, calibration, closeness to the teachers, size and speed."""
    validator = LanguageValidator(rows)
    metrics = validator.metrics(validator.sums(model))
    return {**metrics, **model_size(model), "tokens_per_second": measure_speed(model, rows)}


def model_size(model: nn.Module) -> dict[str, float]:
    """Parameters (tied ones once) and the bytes that they take."""
    parameters = {id(p): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


@torch.no_grad()
def measure_speed(model: PreTrainedModel, rows: HeldOut, *, seconds: float = SPEED_SECONDS) -> float:
    """Tokens per second of forward pass and output head on held-out rows; the first batch only warms up."""
    device = next(model.parameters()).device
    batches = rows.batches()
    tokens, spent = 0, 0.0
    for turn, indices in enumerate([batches[0], *batches]):
        batch = {name: tensor.to(device) for name, tensor in rows.dataset.batch(indices).items()}
        start = time.perf_counter()
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
        head, states = head_of(model, rows.vocab_size), hidden.states[batch["valid"]]
        best = [head.logits(chunk).argmax(-1) for chunk in states.split(rows.chunk_tokens)]
        torch.cat(best).tolist()  # waits for the device
        if turn:
            tokens, spent = tokens + len(states), spent + time.perf_counter() - start
        if spent > seconds:
            break
    return tokens / spent
