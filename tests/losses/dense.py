"""A dense second implementation of the language-model loss, written for clarity, differentiated by autograd."""

import torch

from raydistill.losses.targets import SparseTarget


def dense_target(log_p, top_k, temperature, *, weight=1.0):
    """What a perfect cache would hold of full log-probabilities `log_p` [tokens, vocab]."""
    top = log_p.topk(top_k)
    rest = log_p.scatter(-1, top.indices, -torch.inf)
    floor = torch.tensor(-60.0, dtype=log_p.dtype)
    return SparseTarget(
        ids=top.indices.int(),
        logp=top.values,
        log_tail=rest.logsumexp(-1).maximum(floor),
        psi=(rest / temperature).logsumexp(-1).maximum(floor),
        weight=weight,
    )


def _classes(log_probs, ids, temperature, mode, tail):
    """[tokens, K (+1)] tempered class probabilities, as logarithms."""
    outside = log_probs.scatter(-1, ids, -torch.inf)
    has_tail = tail == "bucket" and ids.shape[-1] < log_probs.shape[-1]
    if not has_tail:
        return (log_probs.gather(-1, ids) / temperature).log_softmax(-1)
    if mode == "exact":
        tempered = (log_probs / temperature).log_softmax(-1)
        rest = tempered.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([tempered.gather(-1, ids), rest], -1)
    rest = outside.logsumexp(-1, keepdim=True)
    return (torch.cat([log_probs.gather(-1, ids), rest], -1) / temperature).log_softmax(-1)


def dense_loss(head, hidden, labels, teachers, objective):
    """`teachers` are (full log-probabilities [tokens, vocab], K, weight)."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits[:, : head.vocab_size] * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_q = logits.log_softmax(-1)
    total = (1 - objective.alpha) * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    for log_p, top_k, weight in teachers:
        ids = log_p.topk(top_k).indices
        r = _classes(log_p, ids, objective.temperature, objective.mode, objective.tail)
        s = _classes(log_q, ids, objective.temperature, objective.mode, objective.tail)
        value, _ = objective.divergence(r, s)
        total = total + objective.alpha * weight * objective.temperature**2 * value.sum()
    return total
