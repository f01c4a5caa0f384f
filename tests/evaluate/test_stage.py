from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_run import toy_config
from toys import Bigram, bigram_model, save_model, write_toy_caches

from raydistill.errors import ConfigError, DataError
from raydistill.evaluate import harness
from raydistill.evaluate.stage import EvaluateJob, check_evaluation, evaluate_run
from raydistill.models.student import build_student, save_student


def _weights(folder: Path, bigram: Bigram) -> str:
    save_student(bigram_model(bigram), folder)
    return str(folder)


def test_every_model_is_measured_on_the_same_rows_and_the_teacher_wins(tmp_path: Path) -> None:
    caches = write_toy_caches(tmp_path, num_held_out=300, shard_rows=100)
    save_model(bigram_model(caches.teachers["toy"]), tmp_path / "tokenizer")  # the folder of the tokenizer
    bench = tmp_path / "bench.jsonl"
    rows = [
        {"doc_id": i // 2, "label": 0, "request": {"context": "A", "continuation": c}} for i, c in enumerate("BCDEFG")
    ]
    bench.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = toy_config(tmp_path, benchmarks=[str(bench)], sample_tokens=3)
    save_student(build_student(config.student, seed=0), tmp_path / "init")
    teacher, init = caches.teachers["toy"], Bigram.random(seed=1)
    better = Bigram(torch.log_softmax(torch.from_numpy(0.9 * teacher.log_p + 0.1 * init.log_p), -1).numpy())
    worse = Bigram(torch.log_softmax(torch.from_numpy(0.5 * teacher.log_p + 0.5 * init.log_p), -1).numpy())
    job = EvaluateJob(
        config=config,
        inputs=caches.inputs.uri,
        signals={name: store.uri for name, store in caches.signals.items()},
        student=str(tmp_path / "init"),
        weights={"student": _weights(tmp_path / "s", better), "student_ce": _weights(tmp_path / "c", worse)},
    )
    found = evaluate_run(job)
    metrics, comparison = found.metrics, found.metrics["comparison"]
    measured = [role for role in metrics if role.startswith(("teacher", "student"))]
    assert measured == ["teacher", "student_init", "student_ce", "student"]
    order = [comparison[f"{role}_quality"] for role in ("teacher", "student", "student_ce", "student_init")]
    assert order == sorted(order)
    assert 0 < comparison["baseline_gap_closed"] < comparison["gap_closed"] < 1
    assert comparison["parameters_ratio"] == 1
    assert metrics["held_out"]["targets"] == sum(int(r.target.sum()) for r in caches.rows["held_out"])
    assert metrics["student"]["benchmarks"]["bench"]["num_questions"] == 3
    assert set(found.samples["samples"][0]["outputs"]) == {"teacher", "student_init", "student_ce", "student"}
    assert found.cache_stats["signals"]["toy"]["bytes"] == metrics["cache"]["toy"]["bytes"]
    json.dumps([metrics, found.samples, found.cache_stats])


def test_a_missing_benchmark_or_package_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="requests"):
        check_evaluation(toy_config(tmp_path, benchmarks=[str(tmp_path / "requests.jsonl.gz")]))
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm_eval_tasks"):
        check_evaluation(toy_config(tmp_path, lm_eval_tasks=["piqa"]))
