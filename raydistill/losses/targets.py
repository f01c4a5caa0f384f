"""What a teacher says about N tokens in short form, and the classes on which a student is compared with it.

The classes are the K ids of the cache and, with `tail: bucket`, one more for the mass of every other id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_FLOOR = -60.0
"""Least log-probability that is stored: e^-60 is far below what fp32 sums resolve, and stays finite in fp16."""

Mode: TypeAlias = Literal["coarse", "exact"]
Tail: TypeAlias = Literal["bucket", "renormalise", "sample"]


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """One teacher's distributions of N tokens. Log-probabilities are natural, at T = 1, in any float dtype."""

    ids: Int[Tensor, "tokens k"]
    """The most probable ids, in descending order; without repetition."""
    logp: Float[Tensor, "tokens k"]
    """Their log-probabilities."""
    log_tail: Float[Tensor, " tokens"] | None = None
    """Log of the mass outside `ids`; for `bucket` in coarse mode and for `sample`."""
    psi: Float[Tensor, " tokens"] | None = None
    """`log Σ_{i outside ids} p_i^{1/T}` at the temperature of the loss; for `exact` mode."""
    tail_ids: Int[Tensor, "tokens m"] | None = None
    """Ids drawn from the tail, for `sample`."""
    tail_counts: Int[Tensor, "tokens m"] | None = None
    """How often each was drawn; 0 marks an unused slot."""
    tail_logp: Float[Tensor, "tokens m"] | None = None
    """Log-probabilities of the drawn ids."""
    weight: float = 1.0
    """Share of this teacher in the divergence."""

    def rows(self, part: slice, dtype: torch.dtype) -> SparseTarget:
        """The tokens in `part`, ids as int64 and the rest in `dtype`."""

        def numbers(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part].to(dtype)

        return SparseTarget(
            ids=self.ids[part].long(),
            logp=self.logp[part].to(dtype),
            log_tail=numbers(self.log_tail),
            psi=numbers(self.psi),
            tail_ids=None if self.tail_ids is None else self.tail_ids[part].long(),
            tail_counts=numbers(self.tail_counts),
            tail_logp=numbers(self.tail_logp),
            weight=self.weight,
        )


def fold(target: SparseTarget, top_k: int, *, temperature: float) -> SparseTarget:
    """Keep the first `top_k` ids; the others join the tail, exactly: their masses (and powers for psi) are added."""
    if top_k >= target.ids.shape[-1]:
        return target
    dropped = target.logp[:, top_k:].float()

    def join(tail: Tensor | None, power: float) -> Tensor | None:
        return None if tail is None else torch.logaddexp(tail.float(), (dropped * power).logsumexp(-1))

    return SparseTarget(
        ids=target.ids[:, :top_k],
        logp=target.logp[:, :top_k],
        log_tail=join(target.log_tail, 1.0),
        psi=join(target.psi, 1.0 / temperature),
        weight=target.weight,
    )


def class_log_probs(
    target: SparseTarget, *, temperature: float, exact: bool, tail: bool
) -> Float[Tensor, "tokens classes"]:
    """The teacher's tempered log-probabilities over its K ids and, where `tail`, the bucket of all others.

    Coarse mode tempers the K+1 classes: softmax([ℓ_K, ℓ_tail] / T). Exact mode tempers the vocabulary and sums the tail
    afterwards: [ℓ_K / T, ψ_T] normalised. Both are the same thing at T = 1 and without a tail.
    """
    classes = target.logp / temperature
    if tail:
        rest = target.psi if exact else target.log_tail
        assert rest is not None, "the tail needs psi (exact mode) or log_tail (coarse mode)"
        classes = torch.cat([classes, (rest if exact else rest / temperature)[:, None]], -1)
    return classes.log_softmax(-1)


@dataclass(frozen=True, slots=True)
class SampledTarget:
    """An unbiased sparse estimate of the tempered distribution: `E[Σ weight · 1(id)] = p_T`."""

    ids: Int[Tensor, "tokens u"]
    weight: Float[Tensor, "tokens u"]
    log_r: Float[Tensor, "tokens u"]
    """Tempered log-probability of each id."""


def sampled(target: SparseTarget, *, temperature: float) -> SampledTarget:
    """Head ids at their probability, drawn ids at their importance-weighted share of the tail.

    At T = 1 a drawn id weighs `(1-P) c_i / M`, so the weights sum to 1 exactly; else that times `p_i^{1/T-1} / Z_T`,
    where `Z_T = Σ_head p^{1/T} + exp ψ_T`. Source: Anshumann et al. 2025, arXiv 2503.16870 (no head, T = 1).
    """
    counts, drawn, ids = target.tail_counts, target.tail_logp, target.tail_ids
    assert counts is not None
    assert drawn is not None
    assert ids is not None
    assert target.log_tail is not None
    head = target.logp / temperature
    if temperature == 1.0:
        rest = target.log_tail[:, None]
    else:
        assert target.psi is not None, "sampled targets at T != 1 need psi"
        rest = target.psi[:, None]
    log_z = torch.cat([head, rest], -1).logsumexp(-1, keepdim=True)
    draws = counts.sum(-1, keepdim=True).clamp_min(1)
    importance = torch.exp(target.log_tail[:, None] + drawn * (1 / temperature - 1) - log_z)
    return SampledTarget(
        ids=torch.cat([target.ids, ids], -1),
        weight=torch.cat([(head - log_z).exp(), counts / draws * importance], -1),
        log_r=torch.cat([head, drawn / temperature], -1) - log_z,
    )
