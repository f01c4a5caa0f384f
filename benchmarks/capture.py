"""Tokens per second of a teacher captured through Ray, beside the bare teacher on the same batches.

    python benchmarks/capture.py [--model SOURCE] [--threads N] [--shards 4] [--shard-rows 64]

One run measures, with the same number of threads: the pipeline from the first shard's record to the last one's (steady
state), its start-up (everything before the first record, less that shard's own time), then in this process the teacher
on the same collated batches, and the bare model up to its logits. Ray is stopped before the bare measurements.
By default one core is left for what is not the teacher (Ray's own processes, writing shards); with `--threads` for
all cores these take their share of the teacher's time (results/capture_all_cores.json, on two cores).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import ray
import torch
from cache_codec import MODEL, processor, rounded

from raydistill.cache.batches import collate, cut_batches
from raydistill.cache.build import build_inputs, build_signal
from raydistill.cache.shards import RECORDS, read_inputs
from raydistill.config.schema import RunConfig
from raydistill.models.load import load_language_model
from raydistill.storage import Store
from raydistill.teachers.logits import TopKLogitsTeacher


def configuration(options: argparse.Namespace, folder: Path) -> RunConfig:
    """Rows of equal length of the language reference, in `shards` training shards."""
    rows = options.shards * options.shard_rows
    text = "\n\n".join(topics[key] for key in sorted(topics))
    (folder / "text.txt").write_text(text)
    model = {"library": "transformers", "source": options.model}
    batch = {"global_size": 1, "micro_size": 1}
    return RunConfig.model_validate(
        {
            "name": "capture",
            "run_dir": str(folder / "run"),
            "cache": {"dir": str(folder / "cache")},
            "source": {
                "paths": [str(folder / "text.txt")],
                "tokenizer": options.model,
                "seq_len": options.seq_len,
                "shard_rows": options.shard_rows,
                "max_rows": rows,
            },
            "teachers": [{"name": "teacher", "model": model, "batch_tokens": options.batch_tokens}],
            "student": {"model": model},
            "phases": [{"name": "none", "steps": 1, "batch": batch, "optimizer": {"student": {"lr": 1e-3}}}],
            "evaluate": {"held_out": 1e-9},
            "resources": {"teacher": {"actors": [1, 1], "cpus": options.threads, "gpus": options.gpus}},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "capture.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(configuration(options, Path(folder)), options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(options.output.read_text())


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, object]:
    """The pipeline, then the bare teacher on its batches."""
    caches = Store(config.cache.dir)
    ray.init(address="local", num_cpus=options.threads + 1, log_to_driver=False, include_dashboard=False)
    inputs, manifest = build_inputs(config, caches)
    start = time.time()
    store, _ = build_signal(config, config.teachers[0], inputs, manifest, caches)
    ray.shutdown()
    records = sorted(Path(store.path(RECORDS)).iterdir(), key=lambda path: path.stat().st_mtime)
    times = [path.stat().st_mtime for path in records]
    tokens = {record.name: record.tokens for record in manifest.shards}
    done = [tokens[path.name.removesuffix(".json")] for path in records]
    through_ray = sum(done[1:]) / (times[-1] - times[0])

    torch.set_num_threads(options.threads)
    model = load_language_model(config.teachers[0].model).to("cuda" if options.gpus else "cpu")
    teacher = TopKLogitsTeacher(config.teachers[0], model, int(str(manifest.facts["vocab_size"])))
    rows = [row for path in records[1:] for row in read_inputs(inputs, path.name.removesuffix(".json"))]
    cut = cut_batches([len(row.input_ids) for row in rows], options.batch_tokens)
    batches = [collate([rows[i] for i in batch]) for batch in cut]
    with torch.inference_mode():
        teacher(batches[0])
        begin = time.perf_counter()
        for batch in batches:
            teacher(batch)
        teacher_rate = sum(done[1:]) / (time.perf_counter() - begin)
        begin = time.perf_counter()
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            model(input_ids=ids, position_ids=batch["position_ids"].to(model.device), use_cache=False).logits[
                ..., -1
            ].cpu()
        model_rate = sum(done[1:]) / (time.perf_counter() - begin)
    return {
        "teacher": options.model,
        "tokens": sum(done[1:]),
        "shards": options.shards,
        "threads": options.threads,
        "batch_tokens": options.batch_tokens,
        "hardware": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if options.gpus else None,
            "load_average": os.getloadavg()[0],
        },
        "versions": {name: version(name) for name in ("raydistill", "ray", "torch", "transformers")},
        "tokens_per_second": {"through_ray": through_ray, "bare_teacher": teacher_rate, "bare_model": model_rate},
        "share_of_bare_teacher": through_ray / teacher_rate,
        "share_of_bare_model": through_ray / model_rate,
        "start_up_seconds": times[0] - start - done[0] / through_ray,
    }


if __name__ == "__main__":
    main()
