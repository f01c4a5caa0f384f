"""The signal `top_k_logits`: next-token distributions of a causal language model in short form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.teachers import HeadTailSample
from raydistill.config.teachers import TopKLogitsTeacher as TeacherSection
from raydistill.errors import ConfigError
from raydistill.losses.head import logits_in_chunks
from raydistill.losses.targets import LOG_FLOOR
from raydistill.models.language import (
    head_of,
    head_rows,
    hidden_states,
    is_packed,
    isolates_documents,
    require_own_logits,
)
from raydistill.signals import Batch, Field, JsonValue, Schema

_BLOCK_BYTES = 1 << 23
"""Rows of logits that are summarised together on a CPU: few enough to stay in its cache over a dozen passes."""
_CPU_CHUNK = 256
"""Most tokens per chunk on a CPU: enough to read the head's weight seldom, few enough to reuse warm memory."""
_GROUP = 32
"""Neighbouring ids whose maximum decides whether they can be among the top k."""

Rows: TypeAlias = Float[Tensor, "rows vocab"]


class TopKLogitsTeacher:
    """Keeps, per target position, the K most probable ids and exact summaries of everything else.

    Batch: `input_ids`, `position_ids`, `labels` [B, S] int64, `target` [B, S] bool and, for `head_tail_sample`,
    `row_key` [B] int64: the first 8 bytes of sha256(row id), little endian, which with the position and the
    configuration's seed decides the draws. The result has the axes [B, S, ...] and zeros where `target` is false.
    """

    def __init__(self, config: TeacherSection, model: PreTrainedModel, vocab_size: int):
        """`vocab_size` counts the real ids (largest id + 1); the head may have more rows."""
        self._config = config
        self._model = model.eval().requires_grad_(False)
        self._vocab_size = vocab_size
        self._draws = config.estimator if isinstance(config.estimator, HeadTailSample) else None
        _check(config, vocab_size)
        head_of(model, vocab_size)
        require_own_logits(model, vocab_size)
        self._isolates = isolates_documents(model)
        self.schema: Schema = _schema(self._draws is not None)
        self.facts: Mapping[str, JsonValue] = {
            "vocab_size": vocab_size,
            "head_rows": head_rows(model),
            "top_k": config.top_k,
            "temperatures": list(config.temperatures),
            "estimator": config.estimator.kind,
            "samples": self._draws.samples if self._draws else 0,
            "sample_seed": self._draws.seed if self._draws else 0,
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        target, device = batch["target"], next(self._model.parameters()).device
        if not self._isolates and is_packed(batch["position_ids"]):
            raise ConfigError(
                f"teacher {self._config.name} ({type(self._model).__name__}) lets packed documents see each other; "
                "set source.packing: false"
            )
        at = target.flatten().nonzero().squeeze(-1)
        hidden = hidden_states(self._model, batch["input_ids"].to(device), batch["position_ids"].to(device))
        states = hidden.states.flatten(0, 1).index_select(0, at.to(device))
        labels = batch["labels"].flatten()[at].to(device)
        uniforms = None if self._draws is None else self._uniforms(batch)[at].to(device)
        found = self._summaries(states, labels, uniforms)
        result = {}
        for name, field in self.schema.items():
            rows = found[name]
            full = torch.zeros((target.numel(), *rows.shape[1:]), dtype=field.dtype, device=target.device)
            full[at] = rows.to(target.device)
            result[name] = full.unflatten(0, target.shape)
        return result

    def _summaries(self, states: Tensor, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """The fields of all targets, [targets, ...]."""
        head = head_of(self._model, self._vocab_size)
        pieces: list[dict[str, Tensor]] = [_empty(self._config, states.device)]
        chunk_tokens = self._config.chunk_tokens if states.is_cuda else min(self._config.chunk_tokens, _CPU_CHUNK)
        for chunk, logits in logits_in_chunks(head, states, chunk_tokens=chunk_tokens):
            block = len(logits) if logits.is_cuda else max(1, _BLOCK_BYTES // (4 * self._vocab_size))
            for start in range(0, len(logits), block):
                rows = slice(chunk.start + start, min(chunk.start + start + block, chunk.stop))
                some = None if uniforms is None else uniforms[rows]
                pieces.append(_summary(self._config, logits[start : start + block], labels[rows], some))
        return {name: torch.cat([p[name] for p in pieces]) for name in self.schema}

    def _uniforms(self, batch: Batch) -> Float[Tensor, "positions samples"]:
        """Numbers in [0, 1) for every position, keyed by row and seed, whatever the padding."""
        assert self._draws is not None
        batch_size, length = batch["target"].shape
        keys = batch["row_key"].cpu().numpy().view(np.uint64)
        seed = np.uint64(self._draws.seed % 2**64)
        streams = [np.random.Generator(np.random.Philox(key=np.array([key, seed]))) for key in keys]
        numbers = np.stack([s.random((length, self._draws.samples)) for s in streams])
        return torch.from_numpy(numbers.reshape(batch_size * length, -1))


def _check(config: TeacherSection, vocab_size: int) -> None:
    if config.top_k > vocab_size:
        raise ConfigError(
            f"teacher {config.name}: top_k {config.top_k} wants more ids than the vocabulary has ({vocab_size}); "
            f"set top_k to at most {vocab_size}"
        )


def _schema(sampled: bool) -> dict[str, Field]:
    i32, f16 = torch.int32, torch.float16
    schema = {
        "ids": Field(i32, ("target", "k"), "most probable token ids, in descending order"),
        "logp": Field(f16, ("target", "k"), "their log-probabilities at T = 1, nats, at least -60"),
        "log_tail": Field(f16, ("target",), "log of the probability mass outside ids, nats, at least -60"),
        "entropy": Field(f16, ("target",), "entropy of the whole distribution, nats"),
        "psi": Field(f16, ("target", "grid"), "log of the sum of p^(1/T) outside ids, for each T of temperatures"),
        "label_logp": Field(f16, ("target",), "log-probability of the true next token, nats, at least -60"),
    }
    if sampled:
        schema |= {
            "tail_ids": Field(i32, ("target", "m"), "ids drawn from the tail, ascending, without repetition"),
            "tail_counts": Field(i32, ("target", "m"), "how often each was drawn; 0 marks an unused slot"),
            "tail_logp": Field(f16, ("target", "m"), "their log-probabilities at T = 1, nats, at least -60"),
        }
    return schema


def _empty(config: TeacherSection, device: torch.device) -> dict[str, Tensor]:
    """Fields of no targets, so that a batch without any has the right shapes too."""
    sizes = {"k": config.top_k, "grid": len(config.temperatures)}
    if isinstance(config.estimator, HeadTailSample):
        sizes["m"] = config.estimator.samples
    fields = _schema("m" in sizes)
    return {
        n: torch.empty((0, *(sizes[d] for d in f.dims[1:])), dtype=f.dtype, device=device) for n, f in fields.items()
    }


def _summary(
    config: TeacherSection, z: Rows, labels: Int[Tensor, " rows"], uniforms: Tensor | None
) -> dict[str, Tensor]:
    """The fields of some rows. `z` (fp32 logits) is overwritten."""
    top, ids = top_k_of_rows(z, max(config.top_k, 1))
    ids = ids[:, : config.top_k]
    z.sub_(top[:, :1]).clamp_min_(-1e4)  # relative to the largest; -inf would make 0 · inf in the entropy
    inside = z.gather(-1, ids)
    fields, tails = {"ids": ids}, {}
    powers, previous = torch.empty_like(z), None
    # Exponentials are most of the work: halving T is a square. The ids stay 0 once they are taken out.
    for temperature in sorted({1.0, *config.temperatures}, reverse=True):
        if previous == 2 * temperature:
            powers.square_()
        else:
            torch.div(z, temperature, out=powers).exp_().scatter_(-1, ids, 0.0)
        previous = temperature
        tails[temperature] = powers.sum(-1)
        if temperature == 1.0:
            total = tails[1.0] + inside.exp().sum(-1)
            energy = torch.linalg.vecdot(powers, z) + torch.linalg.vecdot(inside.exp(), inside)
            log_total = total.log()
            fields["entropy"] = log_total - energy / total
            if uniforms is not None:
                drawn, fields["tail_counts"] = draw_tail(powers, uniforms)
                fields["tail_ids"] = drawn
                fields["tail_logp"] = z.gather(-1, drawn) - log_total[:, None]
    fields["logp"] = inside - log_total[:, None]
    fields["log_tail"] = tails[1.0].log() - log_total
    fields["label_logp"] = z.gather(-1, labels[:, None])[:, 0] - log_total
    psi = [tails[t].log() - log_total / t for t in config.temperatures]
    fields["psi"] = torch.stack(psi, -1) if psi else z.new_empty((len(z), 0))
    for name in {"logp", "log_tail", "label_logp", "psi", "tail_logp"} & fields.keys():
        fields[name] = fields[name].clamp_min(LOG_FLOOR)
    return {name: fields[name].to(field.dtype) for name, field in _schema(uniforms is not None).items()}


def top_k_of_rows(z: Rows, k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """`torch.topk` over long rows in two steps: only the k groups of ids with the largest maxima can hold the top k."""
    rows, width = z.shape
    groups = width // _GROUP
    if groups <= k:
        top = z.topk(k)
        return top.values, top.indices
    rest = torch.arange(groups * _GROUP, width, device=z.device).expand(rows, -1)
    best = z[:, : groups * _GROUP].unflatten(-1, (groups, _GROUP)).amax(-1).topk(k).indices
    inside = (best[..., None] * _GROUP + torch.arange(_GROUP, device=z.device)).flatten(1)
    candidates = torch.cat([inside, rest], -1)
    top = z.gather(-1, candidates).topk(k)
    return top.values, candidates.gather(-1, top.indices)


def draw_tail(
    e: Rows, uniforms: Float[Tensor, "rows samples"]
) -> tuple[Int[Tensor, "rows samples"], Int[Tensor, "rows samples"]]:
    """Draw ids in proportion to `e` and count repetitions: (ids ascending, counts), 0 counts at the end.

    Draw i inverts the cumulative distribution at `(i + u_i) / samples`: one draw per stratum, so the expected counts
    are those of independent draws with less variance. Rows without any mass get counts of 0.
    """
    samples = uniforms.shape[-1]
    cumulative = e.to(torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    strata = (torch.arange(samples, device=e.device) + uniforms) / samples
    # Less than the total, so that the id found has mass of its own.
    points = torch.minimum(strata * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, points, right=True).clamp_max(e.shape[-1] - 1)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slots = is_first.long().cumsum(-1) - 1
    unique = torch.zeros_like(ids).scatter_(-1, slots, ids)
    counts = torch.zeros_like(ids).scatter_add_(-1, slots, torch.ones_like(ids))
    has_mass = total > 0
    return unique * has_mass, counts * has_mass


def decode_dense(signal: Mapping[str, Tensor], vocab_size: int) -> Float[Tensor, "... vocab"]:
    """The full distribution back, fp32 probabilities [..., vocab_size], from the fields of a `top_k_logits` signal.

    Kept ids get their probability. With drawn tail ids the tail mass goes to them in proportion to their counts (an
    unbiased estimate), else evenly to all other ids. Meaningless where a padded signal has no target.
    """
    ids, head, tail = signal["ids"].long(), signal["logp"].float().exp(), signal["log_tail"].float().exp()[..., None]
    outside = vocab_size - ids.shape[-1]
    shape = (*ids.shape[:-1], vocab_size)
    if "tail_counts" not in signal:
        dense = (tail / max(outside, 1)).expand(shape).contiguous()
        return dense.scatter_(-1, ids, head)
    counts = signal["tail_counts"].float()
    shares = tail * counts / counts.sum(-1, keepdim=True).clamp_min(1)
    dense = torch.zeros(shape, dtype=torch.float32, device=ids.device).scatter_(-1, ids, head)
    return dense.scatter_add_(-1, signal["tail_ids"].long(), shares)
