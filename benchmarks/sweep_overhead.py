"""What a trial of a sweep costs beyond its training: the start of its process, the student, evaluations, Ray Tune.

    python benchmarks/sweep_overhead.py FOLDER [trials] [more overrides, e.g. resources.train.workers=1]

A toy language model whose training takes seconds, one trial at a time. The first trial pays for the process; with
`workers: 0` the next ones use it again. Compared with the same configurations run one after the other, each by its own
command (`alone`), which pays for Python, Ray and the imports every time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from machine import write
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards hum old songs by the quiet river"
WORDS = TEXT.split()
STEPS, ALONE = 60, 3


def main(folder: str, trials: str = "12", *overrides: str) -> None:
    base = Path(folder).absolute()
    config = write_problem(base)
    alphas = [round(0.1 + 0.8 * i / max(int(trials) - 1, 1), 4) for i in range(int(trials))]
    space = {
        "searcher": "grid",
        "concurrent": 1,
        "metrics": ["perplexity"],
        "space": {"phases.0.recipe.alpha": {"kind": "grid", "values": alphas}},
    }
    (base / "space.yaml").write_text(yaml.safe_dump(space))
    run(config, "--stages", "inputs,signals,verify,init", *overrides)
    wall = run(config, "--tune", str(base / "space.yaml"), *overrides)
    found = json.loads((base / "run/sweep.json").read_text())["trials"]
    beyond = [trial["seconds"] - trial["training_seconds"] for trial in found]
    alone = [
        run(
            base / f"run/sweep/trials/{i:03}/config.yaml",
            f"run_dir={base}/alone-{i}",
            "--stages",
            "init,train",
            *overrides,
        )
        for i in range(1, 1 + ALONE)
    ]
    alone_beyond = [
        seconds - json.loads((base / f"alone-{i}/phases/distil/final/phase.json").read_text())["seconds"]
        for i, seconds in enumerate(alone, start=1)
    ]
    write(
        "sweep_overhead",
        {
            "command": "python benchmarks/sweep_overhead.py FOLDER " + " ".join([trials, *overrides]),
            "trials": len(found),
            "steps": STEPS,
            "training_seconds_median": statistics.median(trial["training_seconds"] for trial in found),
            "beyond_training_seconds": {
                "first": beyond[0],
                "later_median": statistics.median(beyond[1:]),
                "later_least": min(beyond[1:]),
                "later_most": max(beyond[1:]),
            },
            "alone_beyond_training_seconds_median": statistics.median(alone_beyond),
            "sweep_wall_seconds": wall,
            "sweep_seconds_outside_trials": wall - sum(trial["seconds"] for trial in found),
        },
    )


def run(config: Path, *arguments: str) -> float:
    """Seconds of one command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "raydistill.run", str(config), *arguments]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def write_problem(base: Path) -> Path:
    """Teacher, text and configuration of a run; the configuration's file."""
    base.mkdir(parents=True, exist_ok=True)
    characters = sorted({c for word in WORDS for c in word} | {" "})
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(base / "teacher")
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(base / "teacher")
    lines = [" ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(300)]
    (base / "text.txt").write_text("\n".join(lines))
    model = {"library": "transformers", "source": str(base / "teacher"), "dtype": "float32"}
    config = {
        "name": "overhead",
        "run_dir": str(base / "run"),
        "cache": {"dir": str(base / "cache")},
        "source": {
            "kind": "text",
            "paths": [str(base / "text.txt")],
            "format": "lines",
            "seq_len": 32,
            "shard_rows": 64,
        }
        | {"tokenizer": str(base / "teacher")},
        "teachers": [{"name": "toy", "model": model, "top_k": 8, "batch_tokens": 1024, "temperatures": [2.0]}],
        "student": {"model": model, "init": {"kind": "layers", "num_layers": 2}},
        "phases": [
            {
                "name": "distil",
                "steps": STEPS,
                "recipe": {"kind": "lm_logits", "alpha": 0.9},
                "batch": {"global_size": 8, "micro_size": 8},
                "optimizer": {"student": {"lr": 3e-3}},
                "precision": "fp32",
            }
        ],
        "evaluate": {"held_out": 0.1, "baseline": False, "sample_tokens": 2, "every_steps": 20},
    }
    path = base / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
