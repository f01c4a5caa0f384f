"""Relative error of the gradient of the short forms against the full KL divergence, on real teacher output.

Teacher: SmolLM2-135M. Students: the same model without some of its blocks, as cut, and the smallest also after a short
distillation on other text (full KL in bf16), which is where a student spends its training; and, if given, one that a
run exported. Compared is the gradient with respect to the head's weight and to the hidden states, per form:
‖g - g_full‖ / ‖g_full‖, in fp32, T = 1.

    python benchmarks/gradient_error.py MODEL_FOLDER [tokens] [training steps] [STUDENT_FOLDER]
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import sys

import torch
from machine import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raydistill.losses.head import Head, Objective, head_loss
from raydistill.losses.targets import SparseTarget
from raydistill.models.language import head_of, hidden_states
from raydistill.teachers.logits import draw_tail

ROW = 256


def text_ids(folder: str, tokens: int) -> Tensor:
    """Rows [tokens / 256, 256] of the English reference text that every Python carries."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * tokens]).input_ids[:tokens]
    return torch.tensor(ids).view(-1, ROW)


def first_blocks(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """The model without its middle blocks: the first `keep - 1` and the last one."""
    student = copy.deepcopy(model)
    blocks = student.model.layers
    student.model.layers = nn.ModuleList([*blocks[: keep - 1], blocks[-1]])
    student.config.num_hidden_layers = keep
    return student


def train(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, steps: int) -> PreTrainedModel:
    """`student` after AdamW steps of one row each on the full KL divergence; works on bf16 copies of both."""
    student, teacher = copy.deepcopy(student).bfloat16(), copy.deepcopy(teacher).bfloat16()
    masters = [p.detach().float() for p in student.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-4, betas=(0.9, 0.95))
    positions = torch.arange(ROW)[None]
    for step in range(steps):
        row = ids[step % len(ids)][None]
        with torch.no_grad():
            states = hidden_states(teacher, row, positions).states[0]
            log_p = head_of(teacher).logits(states).log_softmax(-1)
        target = SparseTarget(ids=torch.arange(log_p.shape[-1]).expand(ROW, -1), logp=log_p)
        hidden = hidden_states(student, row, positions).states[0]
        sums = head_loss(head_of(student), hidden, row[0] * 0, [target], Objective(alpha=1.0), chunk_tokens=128)
        gradients = torch.autograd.grad(sums.total / ROW, list(student.parameters()))
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(student.parameters(), masters, strict=True):
                parameter.copy_(master)
    return student.float()


def short_target(log_p: Tensor, top_k: int, samples: int = 0) -> SparseTarget:
    """What the cache holds of `log_p` [tokens, vocab], in fp16."""
    top = log_p.topk(top_k)
    tail = log_p.exp().scatter(-1, top.indices, 0.0)
    target = {"ids": top.indices.int(), "logp": top.values.half(), "log_tail": tail.sum(-1).log().half()}
    if samples:
        generator = torch.Generator().manual_seed(0)
        drawn, counts = draw_tail(tail, torch.rand(len(log_p), samples, generator=generator, dtype=torch.float64))
        target |= {"tail_ids": drawn.int(), "tail_counts": counts.int(), "tail_logp": log_p.gather(-1, drawn).half()}
    return SparseTarget(**target)


def gradients(head: Head, hidden: Tensor, target: SparseTarget, tail: str) -> list[Tensor]:
    """[with respect to the head's weight, to the hidden states]."""
    hidden = hidden.detach().requires_grad_(True)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    total = head_loss(head, hidden, labels, [target], Objective(alpha=1.0, tail=tail), chunk_tokens=256).total
    return list(torch.autograd.grad(total, [head.weight, hidden]))


def compare(student: PreTrainedModel, ids: Tensor, log_p: Tensor, forms: dict[str, tuple[SparseTarget, str]]) -> dict:
    """KL to the teacher and the relative gradient error of every form."""
    tokens, vocab = log_p.shape
    full = SparseTarget(ids=torch.arange(vocab).expand(tokens, -1), logp=log_p)
    with torch.no_grad():
        hidden = hidden_states(student, ids, torch.arange(ROW).expand_as(ids)).states.flatten(0, 1)
        log_q = head_of(student).logits(hidden).log_softmax(-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        del log_q
    head = head_of(student)
    exact = gradients(head, hidden, full, "bucket")
    errors = {}
    for name, (target, tail) in forms.items():
        ours = gradients(head, hidden, target, tail)
        weight, states = (float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
        errors[name] = {"head_weight": weight, "hidden_states": states}
    return {"kl_to_teacher": divergence, "relative_error": errors}


def main(folder: str, tokens: int = 1024, steps: int = 40, exported: str | None = None) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    every = text_ids(folder, 4 * tokens)
    ids, other = every[: tokens // ROW], every[tokens // ROW :]
    with torch.no_grad():
        states = hidden_states(teacher, ids, torch.arange(ROW).expand_as(ids)).states.flatten(0, 1)
        log_p = head_of(teacher).logits(states).log_softmax(-1)
    vocab = log_p.shape[-1]
    forms = {
        "bucket_16": (short_target(log_p, 16), "bucket"),
        "bucket_64": (short_target(log_p, 64), "bucket"),
        "renormalise_64": (short_target(log_p, 64), "renormalise"),
        "head_32_sample_32": (short_target(log_p, 32, samples=32), "sample"),
    }
    found = {}
    for keep, trains in ((28, False), (8, True)):
        student = first_blocks(teacher, keep)
        found[f"{keep}_of_30_blocks"] = compare(student, ids, log_p, forms)
        if trains:
            trained = train(student, teacher, other, steps)
            found[f"{keep}_of_30_blocks_trained"] = compare(trained, ids, log_p, forms)
    if exported is not None:
        student = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
        found["exported"] = compare(student, ids, log_p, forms)
    mass = float(forms["bucket_64"][0].logp.float().exp().sum(-1).mean())
    write(
        "gradient_error",
        {
            "teacher": "SmolLM2-135M-Instruct", "text": "pydoc_data.topics", "tokens": tokens, "vocab_size": vocab,
            "teacher_entropy_nats": float(-(log_p.exp() * log_p).sum(-1).mean()), "mass_in_64": mass,
            "training_steps": steps, "students": found,
            "wanted": "bucket_64 at most 0.05",
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
