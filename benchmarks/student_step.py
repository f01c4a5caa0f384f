"""Time of a cached distillation step against a cross-entropy step of the same student through the same chunked head.

Forward pass, loss and backward pass of a student of SmolLM2-135M's shape with random weights; the optimizer, equal on
both sides, is left out. The two kinds of step alternate, so that a change of the machine's speed meets both.

    python benchmarks/student_step.py [tokens] [repeats]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from machine import write
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.config.recipes import LmLogitsRecipe
from raydistill.recipes.base import TeacherView
from raydistill.recipes.lm_logits import LmLogits
from raydistill.signals import Batch, Draws

VOCAB, TOP_K, ROW = 49_152, 64, 512


def student(device: str) -> LlamaForCausalLM:
    """SmolLM2-135M: 134.5 M parameters, tied."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).train()


def cached_batch(tokens: int, device: str) -> Batch:
    """Random tokens and random top-64 signals in the stored formats."""
    rows = max(1, tokens // ROW)
    ids = torch.randint(0, VOCAB, (rows, ROW))
    target = torch.ones(rows, ROW, dtype=torch.bool)
    target[:, -1] = False
    top = torch.rand(rows, ROW, VOCAB // 8).topk(TOP_K).indices * 8
    log_p = torch.randn(rows, ROW, TOP_K + 1).mul(2).log_softmax(-1).half()
    batch = {
        "input_ids": ids, "labels": ids.roll(-1, 1), "target": target, "valid": torch.ones_like(target),
        "position_ids": torch.arange(ROW).expand(rows, -1),
        "t/ids": top.int(), "t/logp": log_p[..., :-1].sort(descending=True).values, "t/log_tail": log_p[..., -1],
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in batch.items()}


def step(recipe: LmLogits, batch: Batch) -> tuple[float, float]:
    """Seconds of one forward and backward pass: by the clock, and of processor time."""
    cuda = torch.cuda.is_available()
    recipe.student.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time()
    loss = recipe.loss("student", batch, Draws(seed=0, phase="p", step=0, positions=(0,)))
    (loss.parts["blend"].sum / recipe.counts(batch)["tokens"]).backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main(tokens: int = 1024, repeats: int = 5) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = student(device), cached_batch(tokens, device)
    facts = {"vocab_size": VOCAB, "top_k": TOP_K, "temperatures": [], "estimator": "top_k", "tokenizer": "t"}
    view = {"t": TeacherView("t", 1.0, facts)}
    recipes = {
        "cross_entropy": LmLogits(LmLogitsRecipe(alpha=0.0), model, view),
        "cached_kd": LmLogits(LmLogitsRecipe(alpha=0.7, temperature=2.0), model, view),
    }
    times: dict[str, list[float]] = {name: [] for name in recipes}
    busy: dict[str, list[float]] = {name: [] for name in recipes}
    for turn in range(repeats + 1):
        for name in sorted(recipes, reverse=bool(turn % 2)):
            seconds, processor = step(recipes[name], batch)
            if turn:
                times[name].append(seconds)
                busy[name].append(processor)
    ratios = [a / b for a, b in zip(times["cached_kd"], times["cross_entropy"], strict=True)]
    write(
        "student_step",
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": batch["target"].numel(),
            "top_k": TOP_K,
            "seconds": {name: {"median": statistics.median(s), "least": min(s)} for name, s in times.items()},
            "ratio": {
                "of_least": min(times["cached_kd"]) / min(times["cross_entropy"]),
                "median": statistics.median(ratios),
                "of_least_processor_time": min(busy["cached_kd"]) / min(busy["cross_entropy"]),
            },
            "wanted": "ratio at most 1.10",
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
