"""Peak memory of the activations of head and loss at a vocabulary of 151,936: chunked against dense in fp32.

Both compute the same loss (cross-entropy and forward KL on 64 ids and a bucket) and its gradients from the same hidden
states in a fresh process. Counted is what is needed beyond inputs, weights and the weights' gradient: peak resident
memory on a CPU, peak allocated memory on a GPU.

    python benchmarks/loss_memory.py [tokens]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from machine import write
from torch import Tensor

from raydistill.losses.head import Head, Objective, head_loss
from raydistill.losses.targets import SparseTarget

VOCAB, HIDDEN, TOP_K = 151_936, 1024, 64
OBJECTIVE = Objective(alpha=0.7)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, target: SparseTarget) -> Tensor:
    """The plain way: all logits at once in fp32, differentiated by autograd."""
    log_q = (hidden @ weight.t()).float().log_softmax(-1)
    ids = target.ids.long()
    inside = log_q.gather(-1, ids)
    tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_s = torch.cat([inside, tail], -1)
    assert target.log_tail is not None
    log_r = torch.cat([target.logp.float(), target.log_tail.float()[:, None]], -1).log_softmax(-1)
    kd = F.kl_div(log_s, log_r, log_target=True, reduction="sum")
    return (1 - OBJECTIVE.alpha) * F.nll_loss(log_q, labels, reduction="sum") + OBJECTIVE.alpha * kd


def peak() -> int:
    """Bytes at the highest point so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, tokens: int, chunk_tokens: int) -> None:
    """In a process of its own: print the bytes and seconds of one loss with gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16).requires_grad_(True)
    weight = torch.empty(VOCAB, HIDDEN, device=device, dtype=torch.bfloat16).normal_(0, 0.05).requires_grad_(True)
    labels = torch.randint(0, VOCAB, (tokens,), device=device)
    ids = torch.randint(0, VOCAB // TOP_K, (tokens, TOP_K), device=device) + torch.arange(TOP_K, device=device) * (
        VOCAB // TOP_K
    )
    log_p = torch.randn(tokens, TOP_K + 1, device=device).mul(2).log_softmax(-1)
    target = SparseTarget(ids=ids.int(), logp=log_p[:, :-1].half(), log_tail=log_p[:, -1].half())
    # The weight's gradient is needed either way, in fp32 and in the weight's own format while it is handed over.
    gradient = torch.ones(VOCAB, HIDDEN, device=device), torch.ones(VOCAB, HIDDEN, device=device, dtype=torch.bfloat16)
    before = peak()
    del gradient
    start = time.perf_counter()
    if way == "dense":
        total = dense(hidden, weight, labels, target)
    else:
        head = Head(weight, None, 1.0, None, VOCAB)
        total = head_loss(head, hidden, labels, [target], OBJECTIVE, chunk_tokens=chunk_tokens).total
    total.backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None
    found = {"bytes": peak() - before, "seconds": seconds, "loss": total.item(), "norm": hidden.grad.norm().item()}
    sys.stdout.write(json.dumps(found) + "\n")


def main(tokens: int | None = None) -> None:
    tokens = tokens or (8192 if torch.cuda.is_available() else 2048)
    found = {}
    for way, chunk in (("dense", 0), ("chunked_1024", 1024), ("chunked_256", 256)):
        command = [sys.executable, __file__, "--measure", way, str(tokens), str(chunk)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[way] = json.loads(line.splitlines()[-1])
    ratios = {way: found["dense"]["bytes"] / found[way]["bytes"] for way in found if way != "dense"}
    write(
        "loss_memory",
        {
            "vocab_size": VOCAB, "hidden_size": HIDDEN, "tokens": tokens, "top_k": TOP_K, "found": found,
            "times_less_than_dense": ratios, "wanted": "at least 5 times less",
        },
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*map(int, sys.argv[1:]))
