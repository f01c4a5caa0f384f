from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from raydistill.cache.manifest import Manifest, ShardRecord, fingerprint_of
from raydistill.config.load import load_config
from raydistill.config.schema import PlanConfig, RunConfig
from raydistill.config.teachers import TopKLogitsTeacher
from raydistill.config.training import PhaseConfig
from raydistill.errors import ConfigError
from raydistill.plan import inputs as plan_inputs
from raydistill.plan import plan, table
from raydistill.plan.accelerators import ACCELERATORS
from raydistill.plan.estimate import Plan, break_even, memory_of
from raydistill.plan.inputs import bytes_per_target
from raydistill.run import main

LLAMA: dict[str, JsonValue] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
PRODUCTS = 2 * BLOCK + 96 * 32
PARAMETERS = PRODUCTS + 96 * 32 + 5 * 32
ATTENTION = 2 * 2 * 8 * 64
"""FLOP per token of two layers of attention over 15 tokens: 8 keys on average, 64 multiply-adds each."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "a.txt").write_bytes(b"x" * 6000)
    return tmp_path


def load(folder: Path, settings: dict[str, JsonValue] | None = None) -> RunConfig:
    base: dict[str, JsonValue] = {
        "name": "toy",
        "run_dir": str(folder / "run"),
        "source": {"paths": [str(folder / "a.txt")], "tokenizer": str(folder / "model"), "seq_len": 15},
        "teachers": [{"name": "big", "top_k": 8, "model": {"source": str(folder / "model")}}],
        "student": {"model": {"source": str(folder / "model")}, "init": {"kind": "layers", "num_layers": 1}},
        "phases": [
            {
                "name": "one", "steps": 10, "batch": {"global_size": 4, "micro_size": 2},
                "optimizer": {"student": {"lr": 0.1}}, "zero": {"stage": 1},
            }
        ],
        "evaluate": {"held_out": 0.2},
        "resources": {"train": {"workers": 4}},
        "plan": {"accelerator": "H100", "utilisation": 0.5, "price_per_hour": 3.0},
    }  # fmt: skip
    return load_config([], (), {**base, **(settings or {})})


def test_flops_and_hours_of_a_tiny_run(folder: Path) -> None:
    found = plan(load(folder))
    assert found.missing == ()
    assert found.inputs is not None
    assert (found.inputs.rows, found.inputs.tokens, found.inputs.train_rows) == (100, 1500, 80)
    (teacher,) = found.teachers
    assert (teacher.parameters, teacher.weight_bytes) == (PARAMETERS, 2 * PARAMETERS)
    assert teacher.flops_per_token == 2 * PRODUCTS + ATTENTION
    assert teacher.flops == 1500 * (2 * PRODUCTS + ATTENTION)
    (phase,) = found.phases
    student = PRODUCTS - BLOCK
    assert found.student_parameters == PARAMETERS - BLOCK - 2 * 32
    assert found.student_forward_flops == 2 * student + ATTENTION / 2
    assert phase.flops_per_token == 6 * student + 3 * ATTENTION / 2
    assert phase.tokens == 10 * 4 * 15
    assert phase.flops == phase.tokens * phase.flops_per_token
    rate = 989e12 * 0.5
    assert phase.hours == pytest.approx(phase.flops / rate / 3600)
    assert found.baseline_hours == phase.hours
    assert found.hours == pytest.approx((teacher.flops + 2 * phase.flops) / rate / 3600)
    assert found.price == pytest.approx(3.0 * found.hours)
    assert phase.tokens_per_second == pytest.approx(4 * rate / phase.flops_per_token)
    assert teacher.cache is not None
    per_token = found.inputs.bytes_per_token + teacher.cache.bytes_per_token
    assert phase.bytes_per_second == pytest.approx(phase.tokens_per_second * per_token)


GPUS: dict[str, JsonValue] = {
    "resources": {
        "teacher": {"gpus": 1, "accelerator": "L40S"},
        "train": {"workers": 4, "gpus": 1, "accelerator": "H200"},
    }
}


def test_stages_are_counted_on_the_accelerators_that_they_ask_for(folder: Path) -> None:
    prices: dict[str, JsonValue] = {"L40S": 2.0, "H200": 5.0}
    found = plan(load(folder, {**GPUS, "plan.price_per_hour": prices}))
    (teacher,), (phase,) = found.teachers, found.phases
    rates = {name: ACCELERATORS[name].flops * 0.5 for name in ("L40S", "H200")}
    assert teacher.flops is not None
    assert phase.flops is not None
    hours = {"L40S": teacher.flops / rates["L40S"] / 3600, "H200": 2 * phase.flops / rates["H200"] / 3600}
    assert found.bill.hours == pytest.approx(hours)
    assert found.hours == pytest.approx(sum(hours.values()))
    assert found.price == pytest.approx(2.0 * hours["L40S"] + 5.0 * hours["H200"])
    assert phase.tokens_per_second == pytest.approx(4 * rates["H200"] / phase.flops_per_token)
    assert "teachers on  L40S, " in table(found)


def test_hours_without_a_price_are_left_out_and_named(folder: Path) -> None:
    found = plan(load(folder, {**GPUS, "plan.price_per_hour": {"L40S": 2.0}}))
    assert found.bill.hours["L40S"] is not None
    assert found.price == pytest.approx(2.0 * found.bill.hours["L40S"])
    assert found.bill.unpriced == ("H200",)
    assert ", without H200: no price given" in table(found)
    nothing = plan(load(folder, {**GPUS, "plan.price_per_hour": {"A100": 2.0}}))
    assert nothing.price is None
    assert "?, without L40S and H200: no price given" in table(nothing)


def test_hours_of_an_accelerator_whose_rate_nobody_knows_are_not_known(folder: Path) -> None:
    found = plan(load(folder, {**GPUS, "resources.teacher.accelerator": "T4", "plan.price_per_hour": None}))
    assert (found.teachers[0].hours, found.hours, found.price) == (None, None, None)
    assert found.phases[0].hours is not None
    assert any("hours of T4" in reason for reason in found.missing)


def test_epochs_rules_and_checkpointing_change_the_cost(folder: Path) -> None:
    settings: dict[str, JsonValue] = {
        "phases.0.steps": None,
        "phases.0.epochs": 1.5,
        "phases.0.trainable": [{"match": "mlp"}],
        "student.gradient_checkpointing": True,
        "evaluate.baseline": False,
    }
    found = plan(load(folder, settings))
    (phase,) = found.phases
    student, mlp = PRODUCTS - BLOCK, 3 * 32 * 48
    assert (phase.steps, phase.tokens) == (30, 1800)
    assert phase.trained_parameters == mlp
    assert phase.flops_per_token == 4 * student + 2 * mlp + 3 * ATTENTION / 2 + 2 * BLOCK + ATTENTION / 2
    assert found.baseline_hours == 0


def test_a_rule_that_matches_nothing_is_found_before_anything_runs(folder: Path) -> None:
    with pytest.raises(ConfigError, match="one: trainable"):
        plan(load(folder, {"phases.0.trainable": [{"match": "nothing_like_this"}]}))


def teacher(**settings: JsonValue) -> TopKLogitsTeacher:
    return TopKLogitsTeacher.model_validate(
        {"name": "t", "model": {"library": "transformers", "source": "x"}, **settings}
    )


def test_bytes_of_a_target_before_compression() -> None:
    scalars = 2 + 2 + 2  # log_tail, entropy, label_logp
    assert bytes_per_target(teacher(), 151_936)[0] == 64 * (3 + 2) + 2 * 2 + scalars
    assert bytes_per_target(teacher(), 49_152)[0] == 64 * (2 + 2) + 2 * 2 + scalars
    assert bytes_per_target(teacher(codec="u8", temperatures=[]), 49_152)[0] == 64 * (2 + 1) + scalars
    sampled = teacher(top_k=0, estimator={"kind": "head_tail_sample", "samples": 12}, temperatures=[2.0])
    assert bytes_per_target(sampled, 151_936)[0] == 12 * (3 + 4 + 2) + 2 + scalars


def test_bytes_to_expect_after_compression_shrink_with_the_codec_and_never_exceed_what_is_there() -> None:
    exact, small = bytes_per_target(teacher(), 49_152), bytes_per_target(teacher(codec="u8"), 49_152)
    assert small[1] < exact[1] < exact[0]
    assert small[1] < small[0]


PAIRS = [
    ("8B -> 1.7B", 8.0, 1.7, 2.57, (1.00, 1.69, 2.22)),
    ("32B -> 4B", 32.0, 4.0, 3.67, (1.00, 1.94, 2.89)),
    ("30B-A3B -> 1.7B", 3.3, 1.7, 1.65, (1.00, 1.35, 1.55)),
    ("70B -> 8B", 70.0, 8.0, 3.92, (1.00, 1.99, 3.03)),
]
"""Published saving of a cache at 1, 3 and 10 uses, for active parameters of teacher and student in billions."""


@pytest.mark.parametrize(("big", "small", "stage", "total"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_break_even_of_known_pairs(big: float, small: float, stage: float, total: tuple[float, ...]) -> None:
    found = break_even(teacher=2 * big, student=6 * small)
    assert found.student_stage == pytest.approx(stage, abs=0.006)
    assert [found.total[u] for u in (1, 3, 10)] == pytest.approx(total, abs=0.006)


def test_at_break_even_the_cache_costs_as_much_as_the_online_teacher() -> None:
    found = break_even(teacher=16.0, student=10.2, cached_per_trained=1.25)
    online, cached = found.uses * (16.0 + 10.2), 1.25 * 16.0 + found.uses * 10.2
    assert online == pytest.approx(cached)
    assert found.total[1] < 1 < found.total[3]


def test_uses_of_a_run_are_passes_over_the_training_tokens(folder: Path) -> None:
    found = plan(load(folder, {"phases.0.steps": 40})).break_even
    assert found is not None
    assert found.uses_of_this_run == pytest.approx(40 * 4 * 15 / 1200)
    assert found.uses == pytest.approx(1 / 0.8)


def phase(**settings: JsonValue) -> PhaseConfig:
    return PhaseConfig.model_validate(
        {"name": "p", "steps": 1, "batch": {"global_size": 1, "micro_size": 1}, "optimizer": {}, **settings}
    )


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("bf16", 0, 2 + 6 + (4 + 8) / 4),  # runs as stage 1
        ("bf16", 1, 2 + 6 + (4 + 8) / 4),
        ("bf16", 2, 2 + (6 + 4 + 8) / 4),
        ("bf16", 3, (2 + 6 + 4 + 8) / 4),
        ("fp32", 0, 4 + 4 + 8),
        ("fp32", 1, 4 + 4 + (4 + 8) / 4),
        ("fp32", 3, (4 + 4 + 4 + 8) / 4),
    ],
)
def test_memory_per_parameter_by_stage(precision: str, stage: int, expected: float) -> None:
    found = memory_of(100, 100, phase(precision=precision, zero={"stage": stage}), 4)
    assert found.device == pytest.approx(100 * expected)
    assert found.host == 0


def test_frozen_parameters_need_only_their_weights() -> None:
    found = memory_of(100, 40, phase(ema={}), 1)
    assert (found.weights, found.gradients, found.masters, found.moments, found.ema) == (200, 240, 160, 320, 160)


def test_offloading_moves_state_to_the_host() -> None:
    cpu: JsonValue = {"device": "cpu"}
    found = memory_of(100, 100, phase(zero={"stage": 3, "offload_optimizer": cpu, "offload_parameters": cpu}), 4)
    assert found.host == pytest.approx(100 * (4 + 8 + 2) / 4)
    assert found.device == pytest.approx(100 * 6 / 4)


def test_finished_caches_are_counted_and_cost_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(folder)
    monkeypatch.setattr(plan_inputs, "inputs_content", lambda config: {"a": 1})
    monkeypatch.setattr(plan_inputs, "signal_content", lambda config, teacher, manifest: {"b": 2})
    write_manifest(folder, "inputs", {"a": 1}, tokens=(900, 100), size=4000)
    write_manifest(folder, "big", {"b": 2}, tokens=(800, 90), size=89_000)
    found = plan(config)
    assert found.inputs is not None
    assert found.inputs.cached
    assert (found.inputs.tokens, found.inputs.train_tokens, found.inputs.targets) == (1000, 900, 890)
    assert found.inputs.bytes_per_token == 4.0
    (big,) = found.teachers
    assert big.cache is not None
    assert (big.cache.cached, big.cache.bytes_per_token, big.flops) == (True, 100.0, 0.0)
    assert found.phases[0].tokens == 10 * 4 * 900 / 9
    assert "is there" in table(found)


def write_manifest(
    folder: Path, name: str, content: dict[str, JsonValue], *, tokens: tuple[int, int], size: int
) -> None:
    fingerprint = fingerprint_of(content)
    shards = tuple(
        ShardRecord(name=f"{i:05d}.parquet", split=split, rows=rows, tokens=count, bytes=size // 2, sha256="0")
        for i, (split, rows, count) in enumerate((("train", 9, tokens[0]), ("held_out", 1, tokens[1])))
    )
    manifest = Manifest(
        kind="inputs", content=content, fingerprint=fingerprint, fields={}, shards=shards,
        facts={"num_targets": {"train": 800, "held_out": 90}},
    )  # fmt: skip
    place = folder / "run" / "cache" / f"{name}-{fingerprint}"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(manifest.model_dump_json())


def test_compressed_text_counts_as_its_uncompressed_size(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "a.txt.gz")
    found = plan(load(folder, {"source.paths": [str(folder / "a.txt.gz")]}))
    assert found.inputs is not None
    assert found.inputs.tokens == 6000 * 3 / 4
    assert "3 bytes of text per compressed byte" in found.inputs.basis


def test_a_parquet_file_counts_only_its_text(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"text": ["y" * 1000] * 100, "other": [f"{i}" * 5000 for i in range(100)]}
    pq.write_table(pa.table(columns), folder / "a.parquet", use_dictionary=False)
    found = plan(load(folder, {"source.paths": [str(folder / "a.parquet")]}))
    assert found.inputs is not None
    assert found.inputs.tokens == pytest.approx(100_000 / 4, rel=0.05)


def test_a_model_that_cannot_be_reached_leaves_its_numbers_open_and_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = plan(load(folder, {"teachers.0.model.source": "nobody/nothing-like-this"}))
    assert found.teachers[0].flops is None
    assert found.hours is None
    assert found.break_even is None
    assert found.phases[0].flops is not None
    assert len(found.missing) == 1
    assert "teacher big" in found.missing[0]
    assert "config.json is enough" in found.missing[0]
    assert "Not known" in table(found)


def test_plan_prints_a_table_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "toy.yaml").write_text(json.dumps(load(folder).model_dump(mode="json")))
    assert main([str(folder / "toy.yaml"), "--plan"]) == 0
    text = capsys.readouterr().out
    for part in ("Inputs", "Teacher big", "Student", "Phase one", "Total", "Cache against an online teacher"):
        assert part in text
    assert not (folder / "run").exists()


def test_a_projection_says_what_comes_from_the_teacher_and_the_memory_it_takes(folder: Path) -> None:
    (folder / "small").mkdir()
    narrow = {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "small" / "config.json").write_text(json.dumps(narrow))
    student: dict[str, JsonValue] = {"model": {"source": str(folder / "small")}, "init": {"kind": "projection"}}
    found = plan(load(folder, {"student": student}))
    assert isinstance(found, Plan)
    assert found.projection is not None
    assert (found.projection.coverage, found.projection.blocks) == (1.0, (1, 2))
    assert found.projection.student == 4 * (found.student_parameters or 0)
    assert found.projection.memory > found.projection.student + found.projection.reading
    assert "100.0% of its parameters, 1 of 2 blocks" in table(found)
    wide = {"model": {"source": str(folder / "model"), "overrides": {"num_hidden_layers": 3}}}
    refused = plan(load(folder, {"student": {**student, **wide}}))
    assert "at most 2 blocks" in " ".join(refused.missing)


def test_every_accelerator_of_the_configuration_is_known() -> None:
    choices = PlanConfig.model_json_schema()["properties"]["accelerator"]["enum"]
    assert sorted(choices) == sorted(ACCELERATORS)
