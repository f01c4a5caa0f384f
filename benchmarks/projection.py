r"""What beginning with the teacher's weights saves: steps and time to the loss that a random student ends with.

    python benchmarks/projection.py FOLDER --name lm --config configs/quickstart.yaml --metric kl_to_teacher \
        --student '{num_hidden_layers: 10, hidden_size: 384, intermediate_size: 1024, num_attention_heads: 6,
                    num_key_value_heads: 2, head_dim: 64}' \
        --steps 150 --every 5 --set source.seq_len=128 source.max_rows=1000 evaluate.max_rows=16 \
        'phases.0.batch={global_size: 4, micro_size: 4}' phases.0.optimizer.student.lr=1.0e-3 \
        phases.0.optimizer.student.warmup_steps=20
    python benchmarks/projection.py FOLDER --name images --config configs/tiny/wan_lite_projection.yaml \
        --metric mse_to_teacher --bases importance --features-of configs/tiny/teachers/vae \
        --student '{num_layers: 4, num_attention_heads: 3, attention_head_dim: 16, ffn_dim: 128}' --steps 300 \
        --every 20 --rows 64
    python benchmarks/projection.py FOLDER --name quickstart --config configs/quickstart.yaml --metric perplexity \
        --bases importance --depths '[0,1,2,3,4,5,22,23,24,25,26,27,28,29]' uniform first last importance \
        --against 'importance, [0,1,2,3,4,5,22,23,24,25,26,27,28,29]' --student '{num_hidden_layers: 14}' \
        --steps 39 --every 13

(and that of the UNet, which stands in benchmarks/results/projection_unet.json).

One student architecture is trained from random weights and from each basis and depth rule, all from one cache, in
one order, for as many steps and at one learning rate. Evaluations on held-out rows every `--every` steps say when each
first is as good as the random one (or the one that `--against` names) at its end. Time is the projection itself
(reading and measuring the teacher) plus steps times the run's median time of a step, so that what else a machine does
in between counts less. FOLDER keeps the runs, and the same command goes on after a stop; what is finished is written
as it comes. Students that the result has at their last step already are not trained again, wherever FOLDER is; of
the settings only `--every`, `--bases` and `--depths` may differ then.

`--features-of VAE` also samples images from each student and compares them with held-out ones by FID and KID, with the
encoder of that autoencoder (mean and deviation of its last channels over the image) as the extractor. A TorchScript
file or its URI in place of a folder is an extractor as it is.

Writes benchmarks/results/projection_<name>.json with the curves, docs/projection_<name>.svg, and the table as text.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from machine import RESULTS, write
from torch import Tensor, nn

from raydistill.report.charts import Series, line_chart

ROOT = Path(__file__).parent.parent
RANDOM = "random"
STAGES = "inputs,signals,init,train"
UNTIED = "student.model.overrides.tie_word_embeddings=false"
COLOURS = ("#888888", "#1f6fb4", "#d1632a", "#2f8f4e", "#8a4fb3", "#b8860b", "#c23b6b")


@dataclass(frozen=True)
class Start:
    """How a student begins."""

    name: str
    init: str
    overrides: tuple[str, ...] = ()


def starts(bases: list[str], depths: list[str], rows: int, against: str) -> list[Start]:
    """The one that the others are compared with, each basis with the first depth rule, and each other rule with the
    first basis."""
    pairs = [(basis, depths[0]) for basis in bases] + [(bases[0], depth) for depth in depths[1:]]
    found = [Start(RANDOM, "{kind: random}")] if against == RANDOM else []
    for basis, depth in pairs:
        init = f"{{kind: projection, basis: {basis}, depth: {depth}, calibration_rows: {rows}}}"
        found.append(Start(f"{basis}, {depth}", init, (UNTIED,) if basis != "importance" else ()))
    return sorted(found, key=lambda start: start.name != against)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
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
    parser.add_argument("--against", default=RANDOM, help="how the student begins that the others are compared with")
    parser.add_argument("--features-of", help="folder of an autoencoder whose encoder sees images, or an extractor")
    parser.add_argument("--images", type=int, default=64, help="images that are compared by their features")
    parser.add_argument(
        "--read", action="store_true", help="train nothing; write what FOLDER holds, also unfinished runs"
    )
    return parser


def main() -> None:
    options = arguments().parse_args()
    typed = [argument for argument in sys.argv[2:] if argument != "--read"]
    runs = had(options)
    for start in starts(options.bases, options.depths, options.rows, options.against):
        run = options.folder.absolute() / re.sub(r"\W+", "-", start.name).strip("-")
        if not is_whole(runs.get(start.name), options.steps):
            if not options.read:
                train(start, run, options)
            elif not (run / "metrics.jsonl").exists():
                continue
            runs[start.name] = measured(run, options.metric)
        goal = runs[options.against]["curve"][-1][1]
        for found in runs.values():
            found["steps_to_goal"], found["seconds_to_goal"] = reached(found, goal)
        write(
            f"projection_{options.name}",
            {
                "command": f"python benchmarks/projection.py FOLDER {shlex.join(typed)}",
                "metric": options.metric,
                "goal": goal,
                "table": table(runs, options.against),
                "runs": runs,
            },
        )
        (ROOT / f"docs/projection_{options.name}.svg").write_text(plot(runs, options.metric) + "\n")
    print("\n".join(table(runs, options.against)))


def had(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs of an earlier result of this name, which must be of the same settings."""
    file = RESULTS / f"projection_{options.name}.json"
    if not file.exists():
        return {}
    result = json.loads(file.read_text())
    earlier = arguments().parse_args(shlex.split(result["command"])[2:])
    free = {"folder", "every", "bases", "depths", "read"}
    differing = sorted(key for key in vars(options).keys() - free if not same(options, earlier, key))
    if differing:
        sys.exit(f"{file} is of other settings ({', '.join(differing)}); choose another --name or remove it.")
    return dict(result["runs"])


def same(one: argparse.Namespace, other: argparse.Namespace, key: str) -> bool:
    """Whether two command lines say the same, apart from line breaks."""
    a, b = getattr(one, key), getattr(other, key)
    return bool(str(a).split() == str(b).split())


def is_whole(run: dict[str, Any] | None, steps: int) -> bool:
    """Whether a run was measured at its last step."""
    return run is not None and run["curve"][-1][0] == steps


class Features(nn.Module):
    """Mean and deviation over the image of the last channels of an autoencoder's encoder: [n, 3, h, w] to [n, 2 c]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        encoder = vae.encoder
        self.layers = nn.Sequential(encoder.conv_in, *encoder.down_blocks, encoder.mid_block)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.layers(images)
        return torch.cat([found.mean((2, 3)), found.std((2, 3))], 1)


def features(extractor: str, images: int, file: Path) -> tuple[str, ...]:
    """Settings that compare `images` by an extractor; that of an autoencoder's folder is written into `file`."""
    number = f"evaluate.images.feature_images={images}"
    if not Path(extractor).is_dir():
        return (f"evaluate.images.feature_extractor={extractor}", number)
    network = AutoencoderKL.from_pretrained(extractor)
    size = int(network.config.sample_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        traced = torch.jit.trace(Features(network).eval(), torch.zeros(2, 3, size, size))
    traced.save(str(file))
    return (
        f"evaluate.images.feature_extractor={file}",
        f"evaluate.images.feature_size={size}",
        number,
    )


def train(start: Start, run: Path, options: argparse.Namespace) -> None:
    """Train a student that begins so, unless it is trained already."""
    last = "metrics.json" if options.features_of else "phases/*/final/phase.json"
    if any(run.glob(last)):
        return
    extra, stages = options.set, STAGES
    if options.features_of:
        file = options.folder.absolute() / "encoder.pt"
        extra = [*extra, *features(options.features_of, options.images, file)]
        stages += ",evaluate"
    command = [
        sys.executable, "-m", "raydistill.run", options.config, f"run_dir={run}",
        f"cache.dir={options.folder.absolute()}/cache", f"student.init={start.init}",
        f"student.model.overrides={options.student}", *start.overrides, f"phases.0.steps={options.steps}",
        "phases.0.epochs=null", f"evaluate.every_steps={options.every}", "evaluate.baseline=false", *extra,
        "--stages", stages,
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)


def measured(run: Path, metric: str) -> dict[str, Any]:
    """The curve [step, metric], times, what the projection said of itself, and distances of features."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["seconds"]) for line in lines if "seconds" in line]
    paces = [(t - s) / (j - i) for (i, s), (j, t) in pairwise(logged) if j > i]
    curve = [[line["step"], line["evaluation"][metric]] for line in lines if metric in line.get("evaluation", {})]
    report = run / "init" / "projection.json"
    told = json.loads(report.read_text()) if report.exists() else {}
    metrics = run / "metrics.json"
    student = json.loads(metrics.read_text())["student"] if metrics.exists() else {}
    return {
        "curve": curve,
        "seconds_per_step": statistics.median(paces),
        "init_seconds": json.loads((run / "stages.json").read_text())["init"]["seconds"],
        "coverage": told.get("coverage"),
        "output_error": told.get("output_error"),
        "blocks": [block["teacher"] for block in told.get("blocks", [])],
        "features": student.get("features"),
    }


def reached(found: dict[str, Any], goal: float) -> tuple[int | None, float | None]:
    """Step and seconds of the first evaluation that is as good as `goal`; the time of the projection is in them."""
    step = next((step for step, value in found["curve"] if value <= goal), None)
    return step, None if step is None else found["init_seconds"] + step * found["seconds_per_step"]


def plot(runs: dict[str, dict[str, Any]], metric: str) -> str:
    """The curves as an SVG that stands alone."""
    series = [Series(name, [tuple(p) for p in run["curve"]], f"c{i}") for i, (name, run) in enumerate(runs.items())]
    chart = line_chart(series, label=f"{metric} on held-out rows", width=640.0, log=True, smooth=False)
    style = "text{font:11px sans-serif;fill:#888}.line{fill:none;stroke-width:1.6}line{stroke:#888;stroke-width:.4}"
    style += "rect{fill:transparent}.unit{font-style:italic}"
    style += "".join(f".line.c{i}{{stroke:{c}}}.dot.c{i},.key.c{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    keys = "".join(
        f'<text class="key c{i}" x="{430}" y="{34 + 14 * i}">{escape(name)}</text>' for i, name in enumerate(runs)
    )
    head, body = chart.split(">", 1)
    title = f'<text class="unit" x="52" y="12">{escape(metric)}</text>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{title}{keys}{body}'


def table(runs: dict[str, dict[str, Any]], against: str) -> list[str]:
    """Rows: how the student began, its last value, and the steps and seconds to the last value of `against`."""
    steps = runs[against]["curve"][-1][0]
    sees = any(found["features"] for found in runs.values())
    end = "steps to the random student's end" if against == RANDOM else f"steps to the end of [{against}]"
    header = ["begins as", "at the end", end, "of its steps", "seconds"]
    rows = [" | ".join([*header, *(["FID", "KID"] if sees else [])])]
    for name, found in runs.items():
        step, seconds = found["steps_to_goal"], found["seconds_to_goal"]
        when = ("not reached", "", "") if step is None else (f"{step}", f"{step / steps:.0%}", f"{seconds:.0f}")
        at, value = found["curve"][-1]
        cells = [name, f"{value:.4g}" + (f" (step {at})" if at < steps else ""), *when]
        if sees:
            told = found["features"]
            cells += [f"{told['frechet_distance']:.3g}", f"{told['kernel_distance']:.3g}"] if told else ["", ""]
        rows.append(" | ".join(cells))
    return rows


if __name__ == "__main__":
    main()
