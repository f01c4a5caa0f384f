"""Memory of projecting a teacher that is larger than what is used for it: measured, and as `--plan` says it.

    python benchmarks/projection_memory.py [--width 1536] [--blocks 16]

Writes a random Llama of bf16 shards (1.2 GB by default) into a temporary folder, projects it into a student of a third
of its width and a quarter of its blocks in a process of its own, for each basis, and reads that process' peak of
resident memory, which includes the mapped pages of the teacher's files.

Writes benchmarks/results/projection_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import write
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.config.models import StudentConfig
from raydistill.models.projection.forecast import Row, forecast
from raydistill.models.student import build_student

TOKENS = 256
ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--inside", nargs=2, metavar=("FOLDER", "BASIS"))
    options = parser.parse_args()
    if options.inside:
        project(Path(options.inside[0]), options.inside[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make_teacher(Path(folder), options.width, options.blocks)
        runs = {}
        for basis in ("importance", "pca"):
            command = [sys.executable, __file__, "--inside", folder, basis]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[basis] = json.loads(done.stdout.splitlines()[-1])
    write("projection_memory", {"teacher_bytes": size, "rows": ROWS, "row_tokens": TOKENS, "runs": runs})


def make_teacher(folder: Path, width: int, blocks: int) -> int:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def project(folder: Path, basis: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    width = settings["hidden_size"] // 3
    overrides = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": settings["num_hidden_layers"] // 4,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
    }  # fmt: skip
    model = {"library": "transformers", "source": str(folder)}
    init = {"kind": "projection", "teacher": model, "basis": basis, "calibration_rows": ROWS}
    student = StudentConfig.model_validate({"model": {**model, "overrides": overrides}, "init": init})
    ids = torch.randint(0, 8192, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS).expand(ROWS, TOKENS),
        "valid": torch.ones(ROWS, TOKENS, dtype=torch.bool),
    }
    planned = forecast(student, Row(TOKENS)).peak
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    start = time.monotonic()
    build_student(student, seed=0, rows=lambda number: [batch])
    result = {
        "peak_bytes": resident("VmHWM") - before,
        "planned_bytes": planned,
        "seconds": round(time.monotonic() - start, 1),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def resident(field: str) -> int:
    """Resident memory of this process, bytes: now (`VmRSS`) or the most since it was reset (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
