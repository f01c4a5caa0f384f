"""The stage `evaluate` of language models: each on the same held-out rows, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.schema import RunConfig
from raydistill.config.teachers import TopKLogitsTeacher
from raydistill.evaluate.cached import cache_stats, capture_speed, teacher_line
from raydistill.evaluate.comparison import LANGUAGE, compare
from raydistill.evaluate.harness import require_harness, run_harness
from raydistill.evaluate.job import EvaluateJob, Evaluation, device, exported_role, student_in
from raydistill.evaluate.language import HeldOut, evaluate_language, measure_speed, model_size, open_held_out
from raydistill.evaluate.multiple_choice import Question, benchmark_name, read_questions, score_benchmark
from raydistill.evaluate.samples import Samples, choose_prompts
from raydistill.models.load import load_language_model, load_tokenizer, resolve_source
from raydistill.progress import say
from raydistill.signals import JsonValue
from raydistill.storage import Store


def check_text(config: RunConfig) -> None:
    """Raise what the stage would end with: missing packages and files."""
    if config.evaluate.lm_eval_tasks:
        require_harness(config.evaluate.lm_eval_tasks)
    _benchmarks(config)


def evaluate_text(job: EvaluateJob) -> Evaluation:
    """Measure teacher and students; one model is in memory at a time."""
    config = job.config
    rows = open_held_out(config, inputs=job.inputs, signals=job.signals)
    tokenizer = load_tokenizer(config.text.tokenizer)
    benchmarks = _benchmarks(config)
    samples = Samples(choose_prompts(config, rows.dataset, tokenizer), config.evaluate.sample_tokens)
    lines: dict[str, dict[str, JsonValue]] = {}
    for role, model in _models(job):
        say(f"evaluate: {role.replace('_', ' ')}")
        lines[role] = _line(job, role, model, rows)
        samples.add(role, model, tokenizer)
        lines[role] |= _benchmark_results(role, model, tokenizer, benchmarks, rows)
        if config.evaluate.lm_eval_tasks:
            lines[role]["lm_eval"] = run_harness(model, tokenizer, config.evaluate.lm_eval_tasks)
        del model
        gc.collect()
    stats = cache_stats(Store(job.inputs), {name: Store(uri) for name, uri in job.signals.items()})
    metrics: dict[str, JsonValue] = dict(lines)
    if len(rows.teachers) > 1:
        metrics["teachers"] = {t.name: dict(teacher_line(rows, t.name)) for t in rows.teachers}
    metrics["comparison"] = compare(lines, LANGUAGE, exported=exported_role(config))
    metrics["held_out"] = {
        "rows": rows.dataset.num_rows,
        "tokens": int(rows.dataset.num_tokens.sum()),
        "targets": int(rows.dataset.num_targets.sum()),
    }
    metrics["cache"] = _cache_sizes(stats)
    return Evaluation(metrics, samples.as_json(), stats)


def _models(job: EvaluateJob) -> Iterator[tuple[str, PreTrainedModel]]:
    """Role and model, loaded when its turn comes. Of several teachers, the one with the largest weight."""
    model = load_language_model(_first_teacher(job.config).model)
    torch.nn.Module.to(model, device())
    yield "teacher", model
    del model
    for role in job.students:
        yield role, cast(PreTrainedModel, student_in(job, role))


def _first_teacher(config: RunConfig) -> TopKLogitsTeacher:
    teacher = max(config.teachers, key=lambda t: t.weight)
    assert isinstance(teacher, TopKLogitsTeacher), "the configuration lets language models learn from these alone"
    return teacher


def _line(job: EvaluateJob, role: str, model: PreTrainedModel, rows: HeldOut) -> dict[str, JsonValue]:
    if role != "teacher":
        return dict(evaluate_language(model, rows))
    name = _first_teacher(job.config).name
    line: dict[str, JsonValue] = {**teacher_line(rows, name), **model_size(model)}
    line["tokens_per_second"] = measure_speed(model, rows)
    captured = capture_speed(Store(job.inputs), Store(job.signals[name]))
    return line if captured is None else {**line, "capture_tokens_per_second": captured}


def _benchmarks(config: RunConfig) -> dict[str, list[Question]]:
    paths = [resolve_source(source) for source in config.evaluate.benchmarks]
    return {benchmark_name(p): read_questions(p, most=config.evaluate.benchmark_questions) for p in paths}


def _benchmark_results(
    role: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Mapping[str, list[Question]],
    rows: HeldOut,
) -> dict[str, JsonValue]:
    results: dict[str, JsonValue] = {
        name: score_benchmark(
            model,
            tokenizer,
            questions,
            vocab_size=rows.vocab_size,
            batch_tokens=rows.batch_tokens,
            chunk_tokens=rows.chunk_tokens,
            label=f"{role.replace('_', ' ')}: {name}",
        )
        for name, questions in benchmarks.items()
    }
    return {"benchmarks": results} if results else {}


def _cache_sizes(stats: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    inputs, signals = stats["inputs"], stats["signals"]
    assert isinstance(inputs, dict)
    assert isinstance(signals, dict)
    sizes: dict[str, JsonValue] = {"inputs": inputs}
    for name, signal in signals.items():
        assert isinstance(signal, dict)
        sizes[name] = {key: signal[key] for key in ("rows", "targets", "bytes", "bytes_per_target")}
    return sizes
