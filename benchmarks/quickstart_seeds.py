"""The quickstart over several seeds: is the distilled student better than untrained, and than without a teacher?

    python benchmarks/quickstart_seeds.py FOLDER [--seeds 0 1 2]

FOLDER keeps the runs (about two minutes of teacher once, then about five minutes a seed on two cores); the same command
goes on after a stop. Writes benchmarks/results/quickstart_seeds.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import write

ROLES = ("teacher", "student_init", "student_ce", "student")
METRICS = ("perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "ece", "tokens_per_second", "parameters")
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    folder = options.folder.absolute()
    runs = {}
    for seed in options.seeds:
        run = folder / f"seed-{seed}"
        overrides = [f"seed={seed}", f"run_dir={run}", f"cache.dir={folder}/cache"]
        command = [sys.executable, "-m", "raydistill.run", "configs/quickstart.yaml", *overrides]
        subprocess.run(command, check=True, cwd=ROOT)
        metrics = json.loads((run / "metrics.json").read_text())
        runs[str(seed)] = {
            **{role: {name: metrics[role].get(name) for name in METRICS} for role in ROLES},
            "gap_closed": metrics["comparison"]["gap_closed"],
            "baseline_gap_closed": metrics["comparison"]["baseline_gap_closed"],
            "seconds": {stage: facts["seconds"] for stage, facts in metrics["stages"].items()},
        }
    summary = {}
    for role in ROLES:
        values = [run[role]["perplexity"] for run in runs.values()]
        summary[role] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
    won = sum(run["student"]["perplexity"] < run["student_ce"]["perplexity"] for run in runs.values())
    result = {
        "command": "python benchmarks/quickstart_seeds.py FOLDER",
        "held_out_perplexity": summary,
        "seeds_where_distilled_beats_plain": f"{won} of {len(runs)}",
        "runs": runs,
    }
    write("quickstart_seeds", result)


if __name__ == "__main__":
    main()
