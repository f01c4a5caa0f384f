from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_run import toy_held_out
from toys import bigram_model

from raydistill.evaluate.cached import cache_stats, capture_speed, teacher_line
from raydistill.evaluate.language import evaluate_language


def test_the_line_from_the_cache_is_the_line_of_the_running_teacher(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path)
    line, running = teacher_line(rows, "toy"), evaluate_language(bigram_model(caches.teachers["toy"]), rows)
    for name in ("loss", "perplexity", "bits_per_byte", "top1_accuracy", "ece"):
        assert line[name] == pytest.approx(running[name], rel=2e-3, abs=2e-4), name


def test_entropy_of_the_line_is_the_teachers_exact_entropy(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path)
    entropy = caches.teachers["toy"].entropy()
    at = np.concatenate([row.input_ids[np.flatnonzero(row.target)] for row in caches.rows["held_out"]])
    assert teacher_line(rows, "toy")["entropy"] == pytest.approx(entropy[at].mean(), rel=1e-3)


def test_a_cache_without_ids_gives_perplexity_but_neither_accuracy_nor_calibration(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path, top_k=0)
    line = teacher_line(rows, "toy")
    assert line["perplexity"] > 1
    assert "ece" not in line
    assert "top1_accuracy" not in line


def test_histograms_hold_every_target_and_means_are_exact(tmp_path: Path) -> None:
    caches, _ = toy_held_out(tmp_path)
    stats = cache_stats(caches.inputs, caches.signals)
    signal = stats["signals"]["toy"]
    teacher, rows = caches.teachers["toy"], caches.rows["train"]
    at = np.concatenate([row.input_ids[np.flatnonzero(row.target)] for row in rows])
    assert signal["sampled_targets"] == len(at)
    for name in ("mass_in_k", "entropy", "confidence"):
        assert sum(signal[name]["shares"]) == pytest.approx(1)
    p = -np.sort(-np.exp(teacher.log_p[at]), axis=1)
    assert signal["mass_in_k"]["mean"] == pytest.approx(p[:, :8].sum(1).mean(), rel=1e-3)
    assert signal["confidence"]["mean"] == pytest.approx(p[:, 0].mean(), rel=1e-3)
    held_out = sum(int(row.target.sum()) for row in caches.rows["held_out"])
    assert signal["targets"] == len(at) + held_out
    sizes = sum(caches.signals["toy"].size(f.name) for f in Path(caches.signals["toy"].path()).glob("*.parquet"))
    assert signal["bytes"] == sizes
    assert stats["inputs"]["rows"] == {"train": 50, "held_out": 11}
    json.dumps(stats)


def test_only_so_many_rows_are_decoded(tmp_path: Path) -> None:
    caches, _ = toy_held_out(tmp_path)
    signal = cache_stats(caches.inputs, caches.signals, most_rows=3)["signals"]["toy"]
    assert 3 <= signal["sampled_targets"] <= 3 * 11


def test_capture_speed_counts_the_tokens_of_all_builds(tmp_path: Path) -> None:
    caches, _ = toy_held_out(tmp_path)
    signal = caches.signals["toy"]
    assert capture_speed(caches.inputs, signal) is None
    names = [f.name for f in sorted(Path(signal.path()).glob("*.parquet"))]
    builds = [{"seconds": 2.0, "shards": names[:1]}, {"seconds": 3.0, "shards": names[1:]}]
    signal.publish("build.json", json.dumps(builds))
    tokens = sum(len(row.input_ids) for split in caches.rows.values() for row in split)
    assert capture_speed(caches.inputs, signal) == tokens / 5
