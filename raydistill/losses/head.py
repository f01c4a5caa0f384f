"""The output head of a language model and its loss in one pass over chunks of tokens.

For N tokens with hidden states h, head weights W, labels y and teachers t the optimised sum is

    Σ_tokens (1-α) CE(q, y) + α T² Σ_t w_t D_t(r_t ‖ s_t),      q = softmax(z),  z = cap(scale · (h Wᵀ + b))

where r_t and s_t are teacher and student on the K+1 classes of `losses.targets`. Logits exist for one chunk at a
time; the gradients with respect to h, W and b are formed in the forward pass while the chunk is there, so nothing is
computed twice, and the backward pass only scales them. (Forming them later would save nothing: the loss is the last
thing before the backward pass, when every other activation exists too.) With G = ∂D/∂(class logits of s), which sums
to 0, and e = exp(z) in coarse, exp(z/T) in exact mode, the gradient is

    ∂/∂z_j = (1-α)(q_j - 1[j=y]) + α T Σ_t w_t {G_k if j is id k of t, else G_tail e_j / Σ_{i no id of t} e_i}

So all but the few ids of the teachers and the label is `e_j` times one number per token. Sources: Hinton et al. 2015,
arXiv 1503.02531 (T²); Hsu et al. 2024, arXiv 2410.10989 (gradients formed in the forward pass).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydistill.losses.divergence import Divergence, forward_kl
from raydistill.losses.targets import Mode, SparseTarget, Tail, class_log_probs, fold, sampled


@dataclass(frozen=True, slots=True)
class Head:
    """`logits = cap(scale · (h weightᵀ + bias))` of the first `vocab_size` rows; `cap(x) = c tanh(x / c)`.

    Rows beyond `vocab_size` are padding of the weight matrix: they belong to no token and take no part in any softmax.
    """

    weight: Float[Tensor, "rows hidden"]
    bias: Float[Tensor, " rows"] | None
    scale: float
    softcap: float | None
    vocab_size: int

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of real tokens in fp32 (fp64 for fp64 models); for no more tokens than fit."""
        weight, bias = _used_rows(self, hidden.dtype)
        z = _product(hidden, weight.t())
        return _capped(_shifted(z, bias, self.scale), self.softcap).to(_accumulator(hidden.dtype))


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised. `alpha` is the teachers' share."""

    alpha: float = 0.0
    temperature: float = 1.0
    mode: Mode = "coarse"
    tail: Tail = "bucket"
    """`sample` uses the drawn tail ids (forward KL only; T = 1 or psi given)."""
    top_k: int | None = None
    """Use this many ids of each teacher; None uses all."""
    divergence: Divergence = forward_kl

    @property
    def exact(self) -> bool:
        """Whether the vocabulary is tempered; at T = 1 both modes are the same."""
        return self.mode == "exact" and self.temperature != 1.0


class HeadSums(NamedTuple):
    """Sums over the tokens, in nats or counts."""

    total: Float[Tensor, ""]
    """The optimised sum; the only one with a gradient."""
    cross_entropy: Float[Tensor, ""]
    divergences: Float[Tensor, " teachers"]
    """T² D of each teacher, without its weight."""
    correct: Float[Tensor, ""]
    """Tokens whose most probable id is the label."""
    agreements: Float[Tensor, " teachers"]
    """Tokens whose most probable id is that teacher's; 0 for a teacher without head ids."""


def head_loss(
    head: Head,
    hidden: Float[Tensor, "tokens hidden"],
    labels: Int[Tensor, " tokens"],
    targets: Sequence[SparseTarget],
    objective: Objective,
    *,
    chunk_tokens: int = 1024,
) -> HeadSums:
    """The loss sums of the tokens; `total` carries the gradient to `hidden`, `head.weight` and `head.bias`.

    Nothing is normalised: divide by the number of tokens of the whole optimizer step. Zero tokens give zero sums.
    """
    if objective.top_k is not None:
        targets = [fold(t, objective.top_k, temperature=objective.temperature) for t in targets]
    differentiable = torch.is_grad_enabled()
    total, parts = _HeadLoss.apply(
        hidden, head.weight, head.bias, head, labels, tuple(targets), objective, chunk_tokens, differentiable
    )
    return HeadSums(total, parts[0], parts[2 : 2 + len(targets)], parts[1], parts[2 + len(targets) :])


def logits_in_chunks(
    head: Head, hidden: Float[Tensor, "tokens hidden"], *, chunk_tokens: int = 1024
) -> Iterator[tuple[slice, Float[Tensor, "chunk vocab"]]]:
    """(rows, their logits in fp32, without gradient) for one chunk after the other; each overwrites the one before."""
    hidden = hidden.detach()
    weight, bias = (None if x is None else x.detach() for x in _used_rows(head, hidden.dtype))
    assert weight is not None
    space = _Workspace(hidden, min(chunk_tokens, hidden.shape[0]), head.vocab_size)
    for rows in _chunks(hidden.shape[0], chunk_tokens):
        z = _shifted(space.product(hidden[rows], weight.t()), bias, head.scale)
        yield rows, _capped(space.widened(z), head.softcap)


_BLOCK_ROWS = 8192


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(i, min(i + chunk_tokens, num_tokens)) for i in range(0, num_tokens, chunk_tokens)]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Format of softmax, sums and the weight gradient."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _used_rows(head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = None if head.bias is None else head.bias[: head.vocab_size].to(dtype)
    return head.weight[: head.vocab_size].to(dtype), bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; of half-precision inputs in fp32 on CUDA, rounded to their format on a CPU."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _shifted(z: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Bias and scale, in place."""
    if bias is not None:
        z.add_(bias)
    return z if scale == 1.0 else z.mul_(scale)


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    """Source: Gemma Team 2024, arXiv 2408.00118, Sec. 2."""
    return z if softcap is None else (z.to(_accumulator(z.dtype)) / softcap).tanh_().mul_(softcap)


class _HeadLoss(torch.autograd.Function):
    """Forward: sums and, where asked for, the gradients of the total. Backward: those times the incoming number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        targets: tuple[SparseTarget, ...],
        objective: Objective,
        chunk_tokens: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = _accumulator(hidden.dtype)
        rows, used_bias = _used_rows(Head(weight, bias, head.scale, head.softcap, head.vocab_size), hidden.dtype)
        wants = [differentiable and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants[1] else None
        d_bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if bias is not None and wants[2] else None
        space = _Workspace(hidden, min(chunk_tokens, hidden.shape[0]), head.vocab_size)
        parts = torch.zeros(2 + 2 * len(targets), dtype=torch.float64, device=hidden.device)
        for chunk in _chunks(hidden.shape[0], chunk_tokens):
            x = hidden[chunk]
            short = [t.rows(chunk, dtype) for t in targets]
            z = _shifted(space.product(x, rows.t()), used_bias, head.scale)
            sums, g = _softmax_gradient(
                z, labels[chunk], short, objective, head, space, x.dtype if any(wants) else None
            )
            parts += sums
            if g is None:
                continue
            del z
            if d_hidden is not None:
                torch.mm(g, rows, out=d_hidden[chunk])
            if d_weight is not None:
                _accumulate(d_weight[: head.vocab_size], g.t(), x)
            if d_bias is not None:
                d_bias[: head.vocab_size] += g.sum(0, dtype=dtype)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        kd = parts[2 : 2 + len(targets)]
        shares = torch.tensor([t.weight for t in targets], dtype=torch.float64, device=parts.device)
        total = (1 - objective.alpha) * parts[0] + objective.alpha * (shares * kd).sum()
        ctx.mark_non_differentiable(parts := parts.to(dtype))
        return total.to(dtype), parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of a head loss can be taken once"
        scaled = [None if g is None else g.mul_(grad_total).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None, None, None


class _Workspace:
    """Memory for one chunk at a time. Reusing it spares a CPU the page faults of fresh memory, which cost as much as
    the arithmetic; so does converting before computing, since its mixed-precision kernels are slow."""

    def __init__(self, hidden: Tensor, tokens: int, vocab_size: int):
        self.dtype = _accumulator(hidden.dtype)
        self._own_product = not (hidden.is_cuda and hidden.dtype != self.dtype)
        self._narrow = hidden.new_empty((tokens, vocab_size) if self._own_product else (0,))
        wide = self._own_product and hidden.dtype != self.dtype
        self._wide = hidden.new_empty((tokens, vocab_size) if wide else (0,), dtype=self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`: half-precision inputs give fp32 on CUDA and their own format on a CPU."""
        return torch.mm(a, b, out=self._narrow[: len(a)]) if self._own_product else _product(a, b)

    def widened(self, z: Tensor) -> Tensor:
        """`z` in fp32: itself if it is, else a copy in the one place kept for it."""
        return z if z.dtype == self.dtype else self._wide[: len(z)].copy_(z)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` with `total` in fp32; on a CPU in blocks, whose conversion to fp32 then stays in its cache."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    block = len(total) if total.is_cuda else _BLOCK_ROWS
    for start in range(0, len(total), block):
        rows = slice(start, start + block)
        total[rows].add_(_product(a[rows], b).to(total.dtype))


def _softmax_gradient(
    z: Float[Tensor, "chunk vocab"],
    labels: Int[Tensor, " chunk"],
    targets: Sequence[SparseTarget],
    objective: Objective,
    head: Head,
    space: _Workspace,
    out_dtype: torch.dtype | None,
) -> tuple[Float[Tensor, " parts"], Float[Tensor, "chunk vocab"] | None]:
    """Sums [ce, correct, kd per teacher, agreement per teacher] and the gradient with respect to `h Wᵀ + b`
    in `out_dtype` (None: no gradient).

    `z` (before the soft cap) is overwritten, so that a chunk costs little more than its logits in fp32.
    """
    alpha, temperature = objective.alpha, objective.temperature
    dtype = space.dtype
    product, z = z, _capped(z, head.softcap)
    top, best = z.max(-1, keepdim=True)
    label = labels[:, None]
    top = top.to(dtype)
    z_label = z.gather(-1, label).to(dtype) - top
    spots = [_spots(t, objective) for t in targets]
    z_spots = [z.gather(-1, s).to(dtype) - top for s in spots]

    # e = exp(z) serves the cross-entropy and the coarse divergences; `base` is what the divergences weigh the tail by.
    slope = None if head.softcap is None or out_dtype is None else (z / head.softcap).square_().neg_().add_(1)
    hot = objective.exact and bool(targets)
    hot_e = z.to(dtype, copy=True).sub_(top).div_(temperature).exp_() if hot else None
    e = space.widened(z).sub_(top).exp_()
    base = e if hot_e is None else hot_e

    union = torch.cat([*spots, label], -1)
    on_union = base.gather(-1, union)
    masks = []
    for target, spot in zip(targets, spots, strict=True):
        masks.append(_Masked.of(base, spot, union) if _has_tail(target, objective, z.shape[-1]) else None)
    first = next((m for m in masks if m is not None), None)
    # The mass outside a teacher's ids is summed anyway; the whole is that plus the ids.
    base_sum = base.sum(-1, keepdim=True) if first is None else first.tail + first.inside
    e_sum = e.sum(-1, keepdim=True) if hot else base_sum

    sums = [(e_sum.log() - z_label).sum(), (best == label).sum()]
    per_row = torch.zeros_like(base_sum) if hot else (1 - alpha) / e_sum
    corrected = on_union * per_row
    spikes = []
    for target, spot, z_spot, mask in zip(targets, spots, z_spots, masks, strict=True):
        share = alpha * target.weight * temperature
        if objective.tail == "sample":
            value, spike, fill = _sampled_divergence(target, z_spot, base_sum, objective)
            fill = share * fill
            corrected = corrected + fill * on_union
        else:
            value, spike, fill = _class_divergence(target, z_spot, mask, objective)
            fill = share * fill
            if mask is not None:
                corrected = corrected + fill * mask.on_union
        per_row = per_row + fill
        spikes.append((spot, share * spike))
        sums.append(temperature**2 * value.sum())
    sums += [(best == t.ids[:, :1]).sum() if t.ids.shape[-1] else best.new_zeros(()) for t in targets]
    statistics = torch.stack([s.to(torch.float64) for s in sums])
    if out_dtype is None:
        return statistics, None

    # The few special ids are put together in fp32 inside `base` and written into the rounded gradient at the end.
    if hot:
        corrected = corrected + e.gather(-1, union) * ((1 - alpha) / e_sum)
    base.scatter_(-1, union, corrected)
    for spot, spike in spikes:
        base.scatter_add_(-1, spot, spike)
    base.scatter_add_(-1, label, torch.full_like(z_label, alpha - 1))
    final = base.gather(-1, union).mul_(head.scale)
    g = base.mul_(per_row * head.scale)
    if hot:
        g.addcmul_(e, (1 - alpha) * head.scale / e_sum)
    if slope is None and product.dtype == out_dtype:
        g = g if g.dtype == out_dtype else product.copy_(g)
        return statistics, g.scatter_(-1, union, final.to(out_dtype))
    g.scatter_(-1, union, final)
    return statistics, (g if slope is None else g.mul_(slope)).to(out_dtype)


class _Masked(NamedTuple):
    """The exponentials of a chunk seen with one teacher's ids taken out."""

    tail: Float[Tensor, "chunk 1"]
    inside: Float[Tensor, "chunk 1"]
    on_union: Float[Tensor, "chunk u"]
    """Those at the special ids: 0 where an id is the teacher's."""

    @staticmethod
    def of(e: Tensor, ids: Tensor, union: Tensor) -> _Masked:
        inside = e.gather(-1, ids)
        e.scatter_(-1, ids, 0.0)  # summing what is left keeps the digits that 1 - Σ inside would lose
        masked = _Masked(e.sum(-1, keepdim=True), inside.sum(-1, keepdim=True), e.gather(-1, union))
        e.scatter_(-1, ids, inside)
        return masked


def _has_tail(target: SparseTarget, objective: Objective, vocab_size: int) -> bool:
    return objective.tail == "bucket" and target.ids.shape[-1] < vocab_size


def _spots(target: SparseTarget, objective: Objective) -> Int[Tensor, "chunk u"]:
    """Ids at which the gradient of this teacher is special."""
    if objective.tail != "sample":
        return target.ids
    assert target.tail_ids is not None, "a sampled objective needs the drawn ids"
    return torch.cat([target.ids, target.tail_ids], -1)


def _class_divergence(
    target: SparseTarget, z_spot: Tensor, mask: _Masked | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(D [chunk], ∂D/∂class logits at the ids [chunk, K], that of the tail per unit of `e` [chunk, 1])."""
    temperature = objective.temperature
    log_r = class_log_probs(target, temperature=temperature, exact=objective.exact, tail=mask is not None)
    student = z_spot / temperature
    if mask is None:
        value, gradient = objective.divergence(log_r, student.log_softmax(-1))
        return value, gradient, torch.zeros_like(z_spot[:, :1])
    # Relative to the largest exponential, which is 1: less than this is no mass, and 1 / tail must stay finite.
    tail = mask.tail.clamp_min(1e-30 if z_spot.dtype == torch.float32 else 1e-280)
    log_tail = tail.log() if objective.exact else tail.log() / temperature
    value, gradient = objective.divergence(log_r, torch.cat([student, log_tail], -1).log_softmax(-1))
    return value, gradient[:, :-1], gradient[:, -1:] / tail


def _sampled_divergence(
    target: SparseTarget, z_spot: Tensor, base_sum: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ t log(r/s)` over head and drawn ids: (value [chunk], `-t` at the ids, `Σt / Σe` per unit of `e` anywhere)."""
    draw = sampled(target, temperature=objective.temperature)
    log_s = z_spot / objective.temperature - base_sum.log()
    value = torch.where(draw.weight == 0, 0.0, draw.weight * (draw.log_r - log_s)).sum(-1)
    return value, -draw.weight, draw.weight.sum(-1, keepdim=True) / base_sum
