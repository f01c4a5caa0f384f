"""What a result was measured on, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor or GPU, threads and the versions that decide speed."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers")}},
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Print `result` and keep it in benchmarks/results/<name>.json."""
    text = json.dumps({"machine": machine(), **result}, indent=1, ensure_ascii=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")
