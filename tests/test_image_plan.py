from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import JsonValue
from tiny_denoisers import conditioning, save_pipeline, tiny_sdxl

from raydistill.cache.dense import read_dense, write_dense
from raydistill.config.load import load_config
from raydistill.config.schema import RunConfig
from raydistill.models.denoiser_counts import count_denoiser
from raydistill.plan import image_inputs, plan, table
from raydistill.plan.estimate import memory_of
from raydistill.plan.images import ImagePlan
from raydistill.run import main
from raydistill.storage import Store

TEXT = {"text_tokens": 5, "text_width": 16, "pooled_width": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tiny_sdxl(), tmp_path_factory.mktemp("plan") / "teacher")


@pytest.fixture
def folder(tmp_path: Path, teacher: Path) -> Path:
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.new("RGB", (40, 40)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("a square")
    return tmp_path


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder of 4 channels at an 8th of each side, and captions of five tokens."""
    space = image_inputs.SpaceFacts(channels=4, factor=8, scaling={})
    monkeypatch.setattr(image_inputs, "space_facts", lambda vae: space)
    monkeypatch.setattr(image_inputs, "text_facts", lambda encoders: image_inputs.TextFacts(16, 8, 5))


def load(folder: Path, settings: dict[str, JsonValue] | None = None) -> RunConfig:
    model = {"library": "diffusers", "source": str(folder / "teacher")}
    base: dict[str, JsonValue] = {
        "name": "toy",
        "run_dir": str(folder / "run"),
        "source": {
            "kind": "images", "paths": [str(folder / "images")], "resolution": 64, "vae": {"source": "x"},
            "text_encoders": [{"source": "y"}], "noise": {"draws_per_row": 3},
        },
        "teachers": [
            {"name": "a", "signal": "noise_prediction", "model": model},
            {
                "name": "b", "signal": "noise_prediction", "model": model, "guidance_scale": 4.0,
                "store_dtype": "float32", "taps": {"mid": "mid_block"},
            },
        ],
        "student": {"model": model, "init": {"kind": "pretrained"}},
        "phases": [
            {
                "name": "one", "steps": 20, "recipe": {"kind": "noise_prediction"},
                "batch": {"global_size": 4, "micro_size": 2}, "optimizer": {"student": {"lr": 0.1}}, "ema": {},
                "zero": {"stage": 2},
            }
        ],
        "evaluate": {"held_out": 0.2},
        "resources": {"train": {"workers": 4}},
        "plan": {"accelerator": "H100", "utilisation": 0.5, "price_per_hour": 3.0},
    }  # fmt: skip
    return load_config([], (), {**base, **(settings or {})})


def planned(folder: Path, settings: dict[str, JsonValue] | None = None) -> ImagePlan:
    found = plan(load(folder, settings))
    assert isinstance(found, ImagePlan)
    return found


def test_rows_draws_flops_and_hours_of_a_tiny_run(folder: Path) -> None:
    found = planned(folder)
    assert found.missing == ()
    assert found.inputs is not None
    assert (found.inputs.rows, found.inputs.train_rows, found.shape.latents) == (10, 8, (4, 8, 8))
    network = tiny_sdxl()
    parameters = sum(p.numel() for p in network.parameters())
    forward = count_denoiser(network.to("meta"), latents=(8, 8), tokens=5).forward
    a, b = found.teachers
    assert (a.parameters, a.weight_bytes, a.flops_per_draw) == (parameters, 2 * parameters, forward)
    assert (b.passes, b.flops_per_draw) == (2, 2 * forward)
    assert a.flops == 10 * 3 * forward
    (phase,) = found.phases
    assert (phase.steps, phase.draws, phase.trained_parameters) == (20, 80, parameters)
    assert phase.flops == 80 * 3 * forward
    rate = 989e12 * 0.5
    assert found.baseline_hours == phase.hours == pytest.approx(phase.flops / rate / 3600)
    assert found.hours == pytest.approx((30 * 3 * forward + 2 * phase.flops) / rate / 3600)
    assert found.price == pytest.approx(3 * found.hours)
    assert found.break_even is not None
    assert found.break_even.uses == pytest.approx(10 / 8)
    assert found.break_even.uses_of_this_run == pytest.approx(80 / (8 * 3))
    assert found.break_even.student_stage == pytest.approx((3 + 3) / 3)
    assert json.loads(found.model_dump_json())["inputs"]["rows"] == 10
    assert not (folder / "run").exists(), "a plan writes nothing"


def test_bytes_per_draw_are_those_of_the_tensors_that_a_shard_holds(folder: Path) -> None:
    a, b = planned(folder).teachers
    assert a.cache is not None
    assert b.cache is not None
    network = tiny_sdxl()
    kept: list[torch.Tensor] = []
    network.mid_block.register_forward_hook(lambda module, args, output: kept.append(output))
    given = conditioning(1)
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    with torch.no_grad():
        network(torch.zeros(1, 4, 8, 8), 1, given["prompt_embeds"], added_cond_kwargs=added)
    small = {"timestep": torch.zeros(10, 3, dtype=torch.int32), "noise_sha": torch.zeros(10, 3, dtype=torch.int64)}
    for cache, tensors in (
        (a.cache, {"prediction": torch.zeros(10, 3, 4, 8, 8, dtype=torch.float16)}),
        (b.cache, {"prediction": torch.zeros(10, 3, 4, 8, 8), "tap.mid": torch.zeros(10, 3, *kept[0].shape[1:])}),
    ):
        write_dense(Store(folder), "x.safetensors", {**tensors, **small}, meta={}, split="train", rows=10)
        shard = read_dense(Store(folder), "x.safetensors")
        total = sum(shard.tensor(name).nbytes for name in shard.names)
        assert cache.total_bytes == total
        assert cache.bytes_per_draw == total / 30


def test_a_full_size_prediction_takes_131_kilobytes(folder: Path) -> None:
    found = planned(folder, {"source.resolution": 1024})
    assert found.shape.latents == (4, 128, 128)
    assert found.teachers[0].cache is not None
    assert found.teachers[0].cache.bytes_per_draw == 131_072 + 12


def test_memory_of_every_stage_is_that_of_a_run_at_that_stage(folder: Path) -> None:
    config, found = load(folder), planned(folder)
    (phase,), parameters = found.phases, found.student_parameters
    assert phase.memory is not None
    assert list(phase.memory) == [0, 1, 2, 3]
    for stage, memory in phase.memory.items():
        zero = config.phases[0].zero.model_copy(update={"stage": stage})
        assert memory == memory_of(parameters, parameters, config.phases[0].model_copy(update={"zero": zero}), 4)
    assert phase.memory[3].device < phase.memory[2].device < phase.memory[1].device
    text = table(found)
    assert "*ZeRO 2" in text
    assert " ZeRO 3" in text


def test_a_stage_that_cannot_offload_keeps_its_state_on_the_accelerator(folder: Path) -> None:
    zero: JsonValue = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_parameters": {"device": "cpu"}}
    (phase,) = planned(folder, {"phases.0.zero": zero}).phases
    assert phase.memory is not None
    assert phase.memory[0].host == 0
    assert phase.memory[1].host == phase.memory[1].masters + phase.memory[1].moments
    assert phase.memory[3].host == phase.memory[3].masters + phase.memory[3].moments + phase.memory[3].weights


def test_an_average_is_read_in_place_of_the_teachers(folder: Path) -> None:
    one = planned(folder, {"cache.store": "average"})
    assert one.average is not None
    assert one.average.bytes_per_draw == 4 * 4 * 8 * 8 + 12 + 4
    assert one.average.total_bytes == 30 * one.average.bytes_per_draw
    speed = one.phases[0].draws_per_second
    inputs = one.inputs
    wanted = inputs.bytes_per_image + inputs.bytes_per_caption + one.average.bytes_per_draw
    assert one.phases[0].bytes_per_second == pytest.approx(speed * wanted)
    assert "Average of the teachers" in table(one)


def test_epochs_rules_and_checkpointing_change_the_cost(folder: Path) -> None:
    settings: dict[str, JsonValue] = {
        "phases.0.steps": None,
        "phases.0.epochs": 2,
        "phases.0.trainable": [{"match": "mid_block"}],
        "student.gradient_checkpointing": True,
    }
    found = planned(folder, settings)
    (phase,) = found.phases
    assert (phase.steps, phase.draws) == (12, 48)
    assert phase.trained_parameters == sum(p.numel() for p in tiny_sdxl().mid_block.parameters())
    assert phase.flops_per_draw == pytest.approx(4 * found.student_forward_flops)


def test_images_in_parquet_and_tars_are_counted_without_reading_them(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * 7, "caption": ["x"] * 7}), folder / "images/a.parquet")
    for name in ("b.tar", "c.tar"):
        with tarfile.open(folder / f"images/{name}", "w") as tar:
            for i in range(4):
                for suffix, content in ((".png", buffer.getvalue()), (".txt", b"x")):
                    member = tarfile.TarInfo(f"{i}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    found = planned(folder).inputs
    assert found is not None
    assert found.rows == 10 + 7 + 8
    assert "1 Parquet file" in found.basis
    assert "scaled by size" in found.basis


def test_what_cannot_be_read_is_named_and_the_rest_planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the autoencoder and the encoder that are not there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings: dict[str, JsonValue] = {"source.paths": [str(folder / "nothing")], "teachers.0.model.source": "no/such"}
    found = planned(folder, settings)
    assert found.inputs is None
    assert found.teachers[0].parameters is None
    assert found.teachers[1].parameters == found.student_parameters
    assert (found.shape.latents, found.shape.text_width, found.shape.text_tokens) == ((4, 8, 8), 16, 77)
    assert len(found.missing) == 4
    assert found.hours is None
    text = table(found)
    assert "Not known" in text
    assert "teacher a" in text
    found = planned(folder, {**settings, "source.max_rows": 500})
    assert found.inputs is not None
    assert found.inputs.rows == 500


def test_a_run_without_teachers_has_no_cache_to_pay_for(folder: Path) -> None:
    found = planned(folder, {"teachers": [], "phases.0.recipe.alpha": 0})
    assert found.break_even is None
    assert found.baseline_hours == 0
    assert found.phases[0].bytes_per_second is None
    assert "online teachers" not in table(found)


def test_tapped_modules_that_are_not_there_are_named(folder: Path) -> None:
    found = planned(folder, {"teachers.1.taps": {"mid": "middle"}})
    assert any("taps.mid" in reason and "middle" in reason for reason in found.missing)


def test_the_shipped_sdxl_configuration_plans_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(root)
    assert main(["configs/sdxl_multi_teacher.yaml", "configs/size/sdxl_architecture.yaml", "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.count("parameters  2.57 B") == 4
    assert "131 kB per draw" in said
    assert re.search(r"ZeRO 3 +642 MB", said), "bf16 weights of 2.567 G parameters over eight workers"
