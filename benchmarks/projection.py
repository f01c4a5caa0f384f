"""What beginning with the teacher's weights saves: steps and time to the loss that a random student ends with.

    python benchmarks/projection.py FOLDER --name lm --config configs/quickstart.yaml --metric kl_to_teacher \
        --student '{num_hidden_layers: 10, hidden_size: 384, intermediate_size: 1024, num_attention_heads: 6}' \
        --steps 400 --every 20
    python benchmarks/projection.py FOLDER --name images --config configs/tiny/sdxl_multi_teacher.yaml \
        --metric mse_to_mean --student '{block_out_channels: [16, 16, 24]}' --steps 1500 --every 50

One student architecture is trained from random weights and from each basis and depth rule, all from one cache, in one
order, for as many steps. Evaluations on held-out rows every `--every` steps say when each first is as good as the
random one at its end; time is that of training alone. FOLDER keeps the runs, and the same command goes on after a stop.

Writes benchmarks/results/projection_<name>.json with the curves, and the table as text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import write

ROOT = Path(__file__).parent.parent
RANDOM = "random"
STAGES = "inputs,signals,init,train"
UNTIED = "student.model.overrides.tie_word_embeddings=false"


@dataclass(frozen=True)
class Start:
    """How a student begins."""

    name: str
    init: str
    overrides: tuple[str, ...] = ()


def starts(bases: list[str], depths: list[str], rows: int) -> list[Start]:
    """The random student, each basis with blocks evenly spread, and each other depth rule with the first basis."""
    pairs = [(basis, depths[0]) for basis in bases] + [(bases[0], depth) for depth in depths[1:]]
    found = [Start(RANDOM, "{kind: random}")]
    for basis, depth in pairs:
        init = f"{{kind: projection, basis: {basis}, depth: {depth}, calibration_rows: {rows}}}"
        found.append(Start(f"{basis}, {depth}", init, (UNTIED,) if basis != "importance" else ()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--student", required=True, help="overrides of the student's architecture, as YAML")
    parser.add_argument("--metric", required=True, help="a metric of evaluations, the lower the better")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--bases", nargs="+", default=["importance", "pca", "weights"])
    parser.add_argument("--depths", nargs="+", default=["uniform", "importance", "first", "last"])
    parser.add_argument("--set", nargs="+", default=[], help="further overrides of the configuration, key=value")
    options = parser.parse_args()
    runs = {}
    for start in starts(options.bases, options.depths, options.rows):
        run = options.folder.absolute() / start.name.replace(", ", "-")
        train(start, run, options)
        runs[start.name] = measured(run, options.metric)
    goal = runs[RANDOM]["curve"][-1][2]
    for found in runs.values():
        found["steps_to_goal"], found["seconds_to_goal"] = reached(found["curve"], goal)
    write(
        f"projection_{options.name}",
        {
            "command": " ".join(["python benchmarks/projection.py FOLDER", *sys.argv[2:]]),
            "metric": options.metric,
            "goal": goal,
            "table": table(runs),
            "runs": runs,
        },
    )
    print("\n".join(table(runs)))


def train(start: Start, run: Path, options: argparse.Namespace) -> None:
    """Train a student that begins so, unless it is trained already."""
    if (run / "phases").is_dir() and any(run.glob("phases/*/final/phase.json")):
        return
    command = [
        sys.executable, "-m", "raydistill.run", options.config, f"run_dir={run}",
        f"cache.dir={options.folder.absolute()}/cache", f"student.init={start.init}",
        f"student.model.overrides={options.student}", *start.overrides, f"phases.0.steps={options.steps}",
        "phases.0.epochs=null", f"evaluate.every_steps={options.every}", "evaluate.baseline=false", *options.set,
        "--stages", STAGES,
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)


def measured(run: Path, metric: str) -> dict[str, Any]:
    """The curve [step, seconds of training, metric], and what the projection said of itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds: dict[int, float] = {}
    curve = []
    for line in lines:
        if "seconds" in line:
            seconds[line["step"]] = line["seconds"]
        found = line.get("evaluation", {}).get(metric)
        if found is not None:
            curve.append([line["step"], seconds.get(line["step"], max(seconds.values(), default=0.0)), found])
    report = run / "init" / "projection.json"
    told = json.loads(report.read_text()) if report.exists() else {}
    return {
        "curve": curve,
        "coverage": told.get("coverage"),
        "output_error": told.get("output_error"),
        "blocks": [block["teacher"] for block in told.get("blocks", [])],
    }


def reached(curve: list[list[float]], goal: float) -> tuple[float | None, float | None]:
    """Step and seconds of the first evaluation that is as good as `goal`."""
    return next(((step, seconds) for step, seconds, value in curve if value <= goal), (None, None))


def table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Rows: how the student began, its last value, and the steps and seconds to the random one's last value."""
    last = runs[RANDOM]["curve"][-1]
    rows = ["begins as | at the end | steps to the random student's end | of its steps | seconds"]
    for name, found in runs.items():
        step, seconds = found["steps_to_goal"], found["seconds_to_goal"]
        when = ("not reached", "", "") if step is None else (f"{step}", f"{step / last[0]:.0%}", f"{seconds:.0f}")
        rows.append(" | ".join([name, f"{found['curve'][-1][2]:.4g}", *when]))
    return rows


if __name__ == "__main__":
    main()
