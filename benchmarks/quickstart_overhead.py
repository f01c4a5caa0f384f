"""Time of the quickstart by stage, what of it is not teacher or student compute, and the time of `--check`.

    python benchmarks/quickstart_overhead.py FOLDER

FOLDER must not hold a run yet; weights should have been fetched before. Compute of the stage `signals` is the number of
tokens over the teacher's rate between the first shard's record and the last one's; that of `train` is the time of the
optimizer steps. The other stages count as overhead whole, except `evaluate`, which is models at work. The share of
steps spent waiting for data comes from metrics.jsonl, without the first logged step, which waits for the first batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import write

from raydistill.cache.manifest import Manifest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "raydistill.run", "configs/quickstart.yaml"]


def main(folder: str) -> None:
    run, load = Path(folder).absolute(), os.getloadavg()[0]
    checks = [seconds([*COMMAND, "--check"]) for _ in range(5)]
    wall = seconds([*COMMAND, f"run_dir={run}"])
    stages = {name: facts["seconds"] for name, facts in json.loads((run / "stages.json").read_text()).items()}
    compute = {
        "signals": teacher_seconds(next((run / "cache").glob("smollm2-*"))),
        "train": sum(json.loads(p.read_text())["seconds"] for p in run.glob("*/*/final/phase.json")),
        "evaluate": stages["evaluate"],
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "data_wait_seconds" in line][1:]
    spent = steps[-1]["seconds"] - next(line["seconds"] for line in lines if "data_wait_seconds" in line)
    write(
        "quickstart_overhead",
        {
            "command": "python benchmarks/quickstart_overhead.py FOLDER",
            "load_average_before": load,
            "wall_seconds": wall,
            "stages": stages,
            "compute_seconds": compute,
            "overhead_seconds": {name: value - compute.get(name, 0.0) for name, value in stages.items()}
            | {"outside_stages": wall - sum(stages.values())},
            "share_of_steps_waiting_for_data": sum(line["data_wait_seconds"] for line in steps) / spent,
            "check_seconds": {"median": statistics.median(checks), "least": min(checks), "wanted": "under 1"},
        },
    )


def seconds(command: list[str]) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def teacher_seconds(cache: Path) -> float:
    """Tokens over the steady rate of the teacher that wrote `cache`."""
    tokens = {r.name: r.tokens for r in Manifest.model_validate_json((cache / "manifest.json").read_bytes()).shards}
    records = sorted((cache / "records").iterdir(), key=lambda path: path.stat().st_mtime)
    first, last = records[0].stat().st_mtime, records[-1].stat().st_mtime
    rest = sum(tokens[path.name.removesuffix(".json")] for path in records[1:])
    return sum(tokens.values()) * (last - first) / rest


if __name__ == "__main__":
    main(*sys.argv[1:])
