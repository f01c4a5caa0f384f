"""Memory of projecting a teacher that is larger than what is used for it: measured, and as `--plan` says it.

    python benchmarks/projection_memory.py llama [--width 1536] [--blocks 16]
    python benchmarks/projection_memory.py wan [--blocks 40] [--noisy 4] [--rows 2] [--side 16] [--tokens 64]

`llama` writes a random Llama of bf16 shards (1.2 GB by default) into a temporary folder and projects it into a student
of a third of its width and a quarter of its blocks, for each basis. `wan` does so with a transformer of the sizes of
configs/models/wan_a14b (28 GB in bf16, one file per block) and the student of configs/wan_lite_projection.yaml, from
the weights alone and calibrated on `--rows` images of `--side`² latents with captions of `--tokens` places. Its files
are sparse: noise in what stands outside the blocks and in `--noisy` blocks, evenly spread, holes that read as zeros in
the others, which then pass on what they get. So it takes little disk, and all 28 GB are read and run.

Each projection runs in a process of its own. Its peak is resident memory beyond what the process had before, with the
pages of the teacher's files that are mapped into it at the time; the anonymous part of it, which cannot be given back
under pressure, is sampled beside it.

Writes benchmarks/results/projection_memory.json and projection_memory_wan.json (where runs of other options stay).
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import RESULTS, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.config.models import StudentConfig
from raydistill.models.denoiser import blank_network
from raydistill.models.projection.forecast import PIXELS, Row, forecast
from raydistill.models.student import build_student

TOKENS = 256
ROWS = 8
WAN = Path(__file__).parents[1] / "configs/models/wan_a14b"
WAN_LITE = {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["llama", "wan"])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--noisy", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", help="for the large files; by default the system's temporary folder")
    parser.add_argument("--inside", nargs=2, metavar=("FOLDER", "BASIS_OR_ROWS"))
    options = parser.parse_args()
    if options.inside:
        folder, how = Path(options.inside[0]), options.inside[1]
        if options.teacher == "llama":
            project_llama(folder, how)
        else:
            project_wan(folder, int(how), options.side, options.tokens)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.teacher == "llama":
            size = make_llama(Path(folder), options.width, options.blocks or 16)
            runs = {basis: run(folder, basis, []) for basis in ("importance", "pca")}
            write("projection_memory", {"teacher_bytes": size, "rows": ROWS, "row_tokens": TOKENS, "runs": runs})
            return
        blocks = options.blocks or 40
        size = make_wan(Path(folder), blocks, options.noisy)
        file = RESULTS / "projection_memory_wan.json"
        runs = json.loads(file.read_text())["runs"] if file.exists() else {}
        told = [f"--side={options.side}", f"--tokens={options.tokens}"]
        about = {"teacher_bytes": size, "noisy_blocks": options.noisy}
        for rows in (0, options.rows):
            seen = (
                f"{rows} images of {options.side}² latents, captions of {options.tokens}" if rows else "weights alone"
            )
            runs[f"{blocks} blocks, {seen}"] = {**about, **run(folder, str(rows), told)}
        write("projection_memory_wan", {"runs": runs})


def run(folder: str, how: str, told: list[str]) -> dict[str, float]:
    """The measures of one projection, made in a process of its own."""
    command = [sys.executable, __file__, sys.argv[1], "--inside", folder, how, *told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_llama(folder: Path, width: int, blocks: int) -> int:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def project_llama(folder: Path, basis: str) -> None:
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
    measure(student, Row(TOKENS), [batch])


def make_wan(folder: Path, blocks: int, noisy: int) -> int:
    """Write a sparse Wan transformer, a file per block; its size."""
    settings = {**json.loads((WAN / "transformer_2/config.json").read_text()), "num_layers": blocks}
    network = blank_network(settings, source=str(WAN))
    (folder / "config.json").write_text(json.dumps(settings))
    filled = {f"blocks.{round(i * (blocks - 1) / max(noisy - 1, 1))}" for i in range(noisy)}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in network.state_dict().items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "outer"
        files.setdefault(part, {})[name] = tuple(tensor.shape)
    generator = torch.Generator().manual_seed(0)
    places = {}
    for part, shapes in files.items():
        file = folder / f"diffusion_pytorch_model-{part}.safetensors"
        write_sparse(file, shapes, generator if part == "outer" or part in filled else None)
        places |= dict.fromkeys(shapes, file.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], noise: torch.Generator | None) -> None:
    """A safetensors file of bf16 tensors: gains of one and noise, or, without `noise`, a hole in place of numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if noise is None:
            out.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            gain = len(shape) == 1 and name.endswith(".weight")
            tensor = torch.ones(shape) if gain else torch.randn(shape, generator=noise).mul_(0.02)
            tensor.bfloat16().view(torch.int16).numpy().tofile(out)


def project_wan(folder: Path, rows: int, side: int, tokens: int) -> None:
    model = {
        "library": "diffusers", "source": str(folder), "scheduler": str(WAN / "scheduler"), "dtype": "bfloat16"
    }  # fmt: skip
    init = {"kind": "projection", "teacher": model, "calibration_rows": rows, "min_coverage": 0.99}
    blocks = json.loads((folder / "config.json").read_text())["num_layers"]
    overrides = {**WAN_LITE, "num_layers": min(WAN_LITE["num_layers"], blocks)}
    student = StudentConfig.model_validate({"model": {**model, "overrides": overrides}, "init": init})
    generator = torch.Generator().manual_seed(0)
    at_once = max(1, PIXELS // side**2)
    batches = []
    for start in range(0, rows, at_once):
        shape = (min(at_once, rows - start), 16, side, side)
        batches.append(
            {
                "latents": torch.randn(shape, generator=generator),
                "noise": torch.randn(shape, generator=generator),
                "timestep": torch.randint(0, 699, shape[:1], generator=generator),
                "prompt_embeds": torch.randn(shape[0], tokens, 4096, generator=generator),
            }
        )
    measure(student, Row(tokens, (side, side)), batches)


def measure(student: StudentConfig, row: Row, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Project, and print the peak beside the planned one."""
    planned = forecast(student, row).peak
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, anonymous = resident("VmRSS"), resident("RssAnon")
    start = time.monotonic()
    with sampled("RssAnon") as most:
        build_student(student, seed=0, rows=lambda number: list(batches))
    result = {
        "peak_bytes": resident("VmHWM") - before,
        "peak_anonymous_bytes": max(most) - anonymous,
        "planned_bytes": planned,
        "seconds": round(time.monotonic() - start, 1),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


@contextmanager
def sampled(field: str) -> Iterator[list[int]]:
    """A list to which a thread adds a field of this process' memory 50 times a second."""
    found, done = [resident(field)], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            found.append(resident(field))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def resident(field: str) -> int:
    """Resident memory of this process, bytes: now (`VmRSS`), what of it is no file's (`RssAnon`), or the most since it
    was reset (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
