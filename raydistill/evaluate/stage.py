"""The stage `evaluate`: every model of a run on the same held-out rows, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.schema import RunConfig
from raydistill.evaluate.cached import cache_stats, capture_speed, teacher_line
from raydistill.evaluate.comparison import LANGUAGE, compare
from raydistill.evaluate.harness import require_harness, run_harness
from raydistill.evaluate.language import HeldOut, evaluate_language, measure_speed, model_size, open_held_out
from raydistill.evaluate.multiple_choice import Question, benchmark_name, read_questions, score_benchmark
from raydistill.evaluate.samples import Samples, choose_prompts
from raydistill.models.load import load_language_model, load_tokenizer, resolve_source
from raydistill.models.student import load_student
from raydistill.signals import JsonValue
from raydistill.storage import Store, local_folder

STUDENTS = ("student_init", "student_ce", "student", "student_ema")
"""Students in the order in which they are measured; `student_ema` is the average of the last phase's weights."""


@dataclass(frozen=True)
class EvaluateJob:
    """What there is to measure. Holds only text, so that it can be sent to another machine."""

    config: RunConfig
    inputs: str
    """URI of the inputs cache."""
    signals: Mapping[str, str]
    """URI of each teacher's cache."""
    student: str
    """URI of the run's `init/` folder."""
    weights: Mapping[str, str]
    """URI of the folder with the trained weights: of `student`, of `student_ce` where there is a baseline, and of
    `student_ema` where the last phase keeps an average."""


@dataclass
class Evaluation:
    """What the stage found, as the content of three files of the run folder."""

    metrics: dict[str, JsonValue] = field(default_factory=dict)
    """metrics.json, all but `stages`."""
    samples: dict[str, JsonValue] = field(default_factory=dict)
    """samples.json."""
    cache_stats: dict[str, JsonValue] = field(default_factory=dict)
    """cache_stats.json."""


def check_evaluation(config: RunConfig) -> None:
    """Raise the errors that this stage would end with, before anything is trained: missing packages and files."""
    if config.evaluate.lm_eval_tasks:
        require_harness(config.evaluate.lm_eval_tasks)
    _benchmarks(config)


def evaluate_run(job: EvaluateJob) -> Evaluation:
    """Measure teacher and students; one model is in memory at a time."""
    config = job.config
    rows = open_held_out(config, inputs=job.inputs, signals=job.signals)
    tokenizer = load_tokenizer(config.source.tokenizer)
    benchmarks = _benchmarks(config)
    samples = Samples(choose_prompts(config, rows.dataset, tokenizer), config.evaluate.sample_tokens)
    lines: dict[str, dict[str, JsonValue]] = {}
    for role, model in _models(job):
        print(f"evaluate: {role.replace('_', ' ')}", flush=True)
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
    metrics["comparison"] = compare(lines, LANGUAGE)
    metrics["held_out"] = {
        "rows": rows.dataset.num_rows,
        "tokens": int(rows.dataset.num_tokens.sum()),
        "targets": int(rows.dataset.num_targets.sum()),
    }
    metrics["cache"] = _cache_sizes(stats)
    return Evaluation(metrics, samples.as_json(), stats)


def _models(job: EvaluateJob) -> Iterator[tuple[str, PreTrainedModel]]:
    """Role and model, loaded when its turn comes. Of several teachers, the one with the largest weight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = max(job.config.teachers, key=lambda t: t.weight)
    yield "teacher", _on(device, load_language_model(teacher.model))
    dtype = getattr(torch, job.config.student.model.dtype)
    for role in STUDENTS:
        if role == "student_init" or role in job.weights:
            yield role, _on(device, student_of(job.student, job.weights.get(role), dtype=dtype))


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model


def student_of(student: str, weights: str | None, *, dtype: torch.dtype) -> PreTrainedModel:
    """The student of an `init/` folder with its own weights or with those of a folder; both are URIs."""
    with local_folder(student) as folder, ExitStack() as stack:
        path = None if weights is None else stack.enter_context(local_folder(weights))
        return load_student(folder, weights=path, dtype=dtype)


def _line(job: EvaluateJob, role: str, model: PreTrainedModel, rows: HeldOut) -> dict[str, JsonValue]:
    if role != "teacher":
        return dict(evaluate_language(model, rows))
    name = max(job.config.teachers, key=lambda t: t.weight).name
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
