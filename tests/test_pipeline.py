"""The whole pipeline on a tiny model: every stage, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from toys import save_model, tiny_llama

from raydistill import pipeline
from raydistill.config.recipes import CausalConsistencyRecipe
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource
from raydistill.errors import ConfigError, DataError, VerificationFailed
from raydistill.storage import Store

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards hum old songs by the quiet river"
WORDS = TEXT.split()


def tiny_config(folder: Path, **changes: object) -> RunConfig:
    """A run of a few seconds: a random character-level teacher of two blocks, a student of one of them."""
    model = {"library": "transformers", "source": str(folder / "teacher"), "dtype": "float32"}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "run_dir": str(folder / "run"),
            "cache": {"dir": str(folder / "cache")},
            "source": {
                "kind": "text",
                "paths": [str(folder / "text.txt")],
                "format": "lines",
                "tokenizer": str(folder / "teacher"),
                "seq_len": 32,
                "shard_rows": 16,
            },
            "teachers": [{"name": "toy", "model": model, "top_k": 8, "batch_tokens": 256, "temperatures": [2.0]}],
            "student": {"model": model, "init": {"kind": "layers", "num_layers": 1}},
            "phases": [
                {
                    "name": "distil",
                    "steps": 12,
                    "recipe": {"kind": "lm_logits", "alpha": 0.9},
                    "batch": {"global_size": 8, "micro_size": 4},
                    "optimizer": {"student": {"lr": 3e-3, "warmup_steps": 2}},
                    "precision": "fp32",
                    "log_every": 2,
                }
            ],
            "evaluate": {"held_out": 0.2, "sample_tokens": 4},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray for the module: starting it costs more than everything that runs on it."""
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def finished(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_model(tiny_llama(), folder / "teacher")
    lines = [" ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(120)]
    (folder / "text.txt").write_text("\n".join(lines))
    config = tiny_config(folder)
    pipeline.run(config)
    return folder, config


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_run_leaves_the_files_that_the_readme_names(finished: tuple[Path, RunConfig]) -> None:
    folder, _ = finished
    run = folder / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    roles = ("teacher", "student_init", "student_ce", "student")
    assert all(math.isfinite(metrics[role]["perplexity"]) for role in roles)
    assert metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert metrics["student"]["kl_to_teacher"] < metrics["student_init"]["kl_to_teacher"]
    assert set(metrics["stages"]) >= {"inputs", "signals", "train", "evaluate", "export"}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 4, 6, 8, 10, 12]
    assert "<svg" in (run / "report.html").read_text()


def test_export_loads_without_raydistill(finished: tuple[Path, RunConfig]) -> None:
    folder, _ = finished
    code = (
        "import sys; sys.modules['raydistill'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder / 'run/export')!r})\n"
        f"t = AutoTokenizer.from_pretrained({str(folder / 'run/export')!r})\n"
        "print(m.config.num_hidden_layers, m.generate(**t('the ', return_tensors='pt'), max_new_tokens=3).shape[1] > 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_same_command_again_does_nothing_but_the_report(
    finished: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = finished
    before = files(folder)
    for name in ("inputs_content", "signal_content"):  # the stages have asked already, which takes reading all the data
        monkeypatch.setattr(pipeline, name, lambda *_: pytest.fail("asked a second time what defines a cache"))
    pipeline.run(config)
    changed = {name for name, time in files(folder).items() if before.get(name) != time}
    assert changed <= {"run/config.json", "run/stages.json", "run/metrics.json", "run/report.html", "run/.lock"}


def test_time_of_gpus_is_that_of_all_the_gpus_a_stage_asked_for(tmp_path: Path) -> None:
    resources = {"train": {"workers": 4, "gpus": 1}, "teacher": {"actors": [1, 8], "gpus": 0.5}}
    this = pipeline.Run(tiny_config(tmp_path, resources=resources))
    old, new = (
        {"started": time.time() - age, "seconds": 6.0, "actors": [1, 8], "shards": ["a"] * 3} for age in (99, 7)
    )
    (tmp_path / "build.json").write_text(json.dumps([old, new]))
    this.signals = {"toy": (Store(tmp_path), None)}  # type: ignore[dict-item]
    for stage in ("inputs", "signals", "verify", "init", "train", "train", "evaluate"):
        this.spent(stage, 10.0)
    found = {stage: facts.get("gpu_seconds") for stage, facts in this.stages.items()}
    assert found == {"inputs": None, "signals": 9.0, "verify": 5.0, "init": 10.0, "train": 80.0, "evaluate": 10.0}
    assert {stage for stage, facts in this.stages.items() if "gpu_at_most" in facts} == {"signals"}, "its pool may grow"
    assert {stage for stage, facts in this.stages.items() if "teacher_gpu_seconds" in facts} == {"signals", "verify"}


def test_inputs_that_models_encode_cost_the_time_of_their_gpus(tmp_path: Path) -> None:
    vae = {"kind": "images", "paths": ["x"], "vae": {"source": "y"}}
    config = tiny_config(tmp_path, resources={"teacher": {"actors": [2, 4], "gpus": 1}})
    this = pipeline.Run(config.model_copy(update={"source": ImagesSource.model_validate(vae)}))
    build = {"started": time.time() - 7, "seconds": 6.0, "actors": [2, 4], "shards": ["a"] * 9}
    (tmp_path / "build.json").write_text(json.dumps([build]))
    this.inputs = (Store(tmp_path), None)  # type: ignore[assignment]
    this.spent("inputs", 10.0)
    assert this.stages["inputs"]["gpu_seconds"] == 24.0
    assert this.stages["inputs"]["gpu_at_most"], "the build's time is also that of reading the source"


def test_teachers_that_answer_a_training_cost_too_and_at_their_own_price(tmp_path: Path) -> None:
    resources = {
        "train": {"workers": 2, "gpus": 1, "accelerator": "H100"},
        "teacher": {"actors": [1, 8], "gpus": 1, "accelerator": "L40S"},
    }
    config = tiny_config(tmp_path, resources=resources, plan={"price_per_hour": {"H100": 4.0, "L40S": 1.0}})
    recipe = CausalConsistencyRecipe(kind="causal_consistency", online="actors")
    phase = config.phases[0].model_copy(update={"recipe": recipe})
    this = pipeline.Run(config.model_copy(update={"phases": (phase,)}))
    this.spent("train", 3600.0)
    assert this.costs()["train"] == {
        "seconds": 3600.0, "gpu_seconds": 4 * 3600.0, "teacher_gpu_seconds": 2 * 3600.0, "price": 2 * 4.0 + 2 * 1.0,
    }  # fmt: skip


def test_a_stage_that_is_stopped_has_cost_what_it_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"train": {"workers": [2, 4], "gpus": 1}, "teacher": {"actors": [1, 2], "gpus": 1}}
    config = tiny_config(tmp_path, resources=resources, plan={"accelerator": "H100", "price_per_hour": {"L40S": 1.0}})

    def stopped(run: pipeline.Run, asked: bool) -> None:
        time.sleep(0.05)
        raise KeyboardInterrupt

    for stage in ("signals", "train"):
        monkeypatch.setitem(pipeline._STAGES, stage, stopped)
        this = pipeline.Run(config)
        with pytest.raises(KeyboardInterrupt):
            pipeline.advance(this, [stage])
    for stage, most in (("signals", 2), ("train", 4)):
        cost = pipeline.Run(config).costs()[stage]
        seconds = cost.pop("seconds")
        assert isinstance(seconds, float)
        assert seconds >= 0.05
        used = cost.pop("gpu_seconds")
        assert isinstance(used, float)
        assert used == pytest.approx(most * seconds, abs=0.03)
        assert cost.pop("teacher_gpu_seconds", None) == (used if stage == "signals" else None)
        assert cost == {"gpu_at_most": True, "unpriced": ["H100"]}
    this.store.publish("metrics.json", "{}")
    assert "GPU time: at most 0.00 h, without H100: no price given" in pipeline.summary(this)


@pytest.mark.parametrize("text", ["", '{"verify": {"key"'])
def test_a_truncated_stages_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stages.json").write_text(text)
    with pytest.raises(DataError, match=r"run/stages\.json is damaged: wanted whole JSON, .*Remove this file"):
        pipeline.Run(tiny_config(tmp_path))


def test_stage_without_its_prerequisite_is_refused(finished: tuple[Path, RunConfig], tmp_path: Path) -> None:
    _, config = finished
    elsewhere = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="run the stage `init` first"):
        pipeline.run(elsewhere, ("train",))
    other = elsewhere.model_copy(update={"cache": config.cache.model_copy(update={"dir": str(tmp_path / "cache")})})
    with pytest.raises(ConfigError, match="--stages inputs"):
        pipeline.run(other, ("signals",))


def test_run_folder_of_another_configuration_is_refused(finished: tuple[Path, RunConfig]) -> None:
    folder, config = finished
    phase = config.phases[0]
    other = phase.model_copy(update={"recipe": phase.recipe.model_copy(update={"alpha": 0.5})})
    with pytest.raises(ConfigError, match=r"phases\.0\.recipe\.alpha: it has 0\.9, this configuration 0\.5"):
        pipeline.run(config.model_copy(update={"phases": (other,)}))
    assert json.loads((folder / "run/config.json").read_text())["config"]["phases"][0]["recipe"]["alpha"] == 0.9


def test_damage_is_named_and_only_the_damaged_shard_is_built_again(finished: tuple[Path, RunConfig]) -> None:
    folder, config = finished
    shard = sorted((folder / "cache").glob("toy-*/00001.parquet"))[0]
    content = shard.read_bytes()
    before = files(folder / "cache")
    shard.write_bytes(content[:-20])
    with pytest.raises(VerificationFailed, match=r"00001\.parquet"):
        pipeline.run(config, ("verify",))
    pipeline.run(config, ("signals",))
    assert shard.read_bytes() == content
    after = files(folder / "cache")
    rebuilt = {name for name in after if name.endswith(".parquet") and after[name] != before[name]}
    assert rebuilt == {str(shard.relative_to(folder / "cache"))}
    pipeline.run(config, ("verify",))
