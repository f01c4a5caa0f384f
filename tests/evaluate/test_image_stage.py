from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from denoiser_toys import DDPM, tiny_unet
from PIL import Image
from torch import nn
from train.denoiser_phases import HELD_OUT, NOISE, WEIGHTS, write_caches

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.evaluate import gallery
from raydistill.evaluate.gallery import Subject, open_gallery, spread
from raydistill.evaluate.job import EvaluateJob, Evaluation
from raydistill.evaluate.stage import check_evaluation, evaluate_run
from raydistill.models.student import save_student
from raydistill.report import render_report
from raydistill.storage import Store

ROLES = ["teacher", "student_init", "student_ce", "student", "student_ema"]


class Means(nn.Module):
    """Mean and spread of each channel: six features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


def config_of(folder: Path, **images: object) -> RunConfig:
    """A run whose teachers are the UNets that `write_caches` asked."""
    for seed, name in enumerate(WEIGHTS, start=1):
        tiny_unet(seed=seed).save_pretrained(folder / name)
        schedule = {**DDPM, "prediction_type": "epsilon"}
        (folder / name / "scheduler_config.json").write_text(json.dumps(schedule))
    model = {"library": "diffusers", "dtype": "float32"}
    return RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(folder / "run"),
            "source": {"kind": "images", "paths": ["x"], "vae": "none", "noise": NOISE.model_dump()},
            "teachers": [
                {"signal": "noise_prediction", "name": n, "weight": w, "model": {**model, "source": str(folder / n)}}
                for n, w in WEIGHTS.items()
            ],
            "student": {"model": {**model, "source": "x"}},
            "phases": [
                {
                    "name": "one", "steps": 6, "recipe": {"kind": "noise_prediction"}, "ema": {},
                    "batch": {"global_size": 6, "micro_size": 3}, "optimizer": {"student": {"lr": 1e-3}},
                }
            ],
            "evaluate": {"images": {"samples": 3, "sample_steps": 2, "timestep_bins": 2, **images}},
        }
    )  # fmt: skip


def job_of(folder: Path, config: RunConfig, signals: tuple[str, ...] = tuple(WEIGHTS)) -> EvaluateJob:
    caches = write_caches(folder / "cache")
    weights = {"student": 1, "student_ce": 5, "student_ema": 1}  # the distilled student is the teacher `red`
    save_student(tiny_unet(seed=9), folder / "init")
    for role, seed in weights.items():
        save_student(tiny_unet(seed=seed), folder / role)
    return EvaluateJob(
        config=config,
        inputs=caches["inputs"],
        signals={name: caches[name] for name in signals},
        student=str(folder / "init"),
        weights={role: str(folder / role) for role in weights},
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Evaluation]:
    folder = tmp_path_factory.mktemp("images")
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    config = config_of(
        folder, feature_extractor=str(folder / "means.pt"), feature_size=8, feature_images=6, guidance_scale=2.0
    )
    return config, evaluate_run(job_of(folder, config))


def test_every_model_is_measured_on_the_same_draws_and_the_floor_is_the_goal(
    found: tuple[RunConfig, Evaluation],
) -> None:
    metrics = found[1].metrics
    assert [role for role in metrics if role.startswith(("teacher", "student"))] == [*ROLES, "teachers"]
    comparison = metrics["comparison"]
    assert comparison["quality_metric"] == "mse_to_teacher"
    floor = metrics["teacher"]["mse_to_teacher"]
    each = metrics["teachers"]
    # The distilled student *is* the teacher `red`; of two teachers the floor is w1 w2 |p1 - p2|².
    assert metrics["student"]["mse_to/red"] < 1e-10
    assert metrics["student"]["mse_to_teacher"] == pytest.approx(each["red"]["mse_to_teacher"], rel=1e-4)
    assert floor == pytest.approx(0.75 * each["red"]["mse_to_teacher"], rel=1e-4)
    assert metrics["student"]["mse_to_mean"] == pytest.approx(metrics["student"]["mse_to_teacher"] - floor, rel=1e-4)
    assert metrics["student_ema"]["mse_to_teacher"] == metrics["student"]["mse_to_teacher"]
    assert 0 < comparison["gap_closed"] < 1
    assert comparison["parameters_ratio"] == 1
    assert metrics["held_out"]["rows"] == 2 * HELD_OUT
    assert metrics["held_out"]["draws"] == 2 * HELD_OUT * NOISE.draws_per_row
    for line in (*(metrics[role] for role in ROLES), *each.values()):
        assert line["samples_per_second"] > 0
        assert line["peak_memory_bytes"] > 4 * 2 * 3 * 8 * 8
        assert len(line["by_timestep"]["mse_to_teacher"]) == 2


def test_models_that_are_equal_make_equal_images_and_files_hold_them(found: tuple[RunConfig, Evaluation]) -> None:
    samples, files = found[1].samples, found[1].files
    assert samples["kind"] == "images"
    assert [set(s["outputs"]) for s in samples["samples"]] == [
        {"teacher/red", "teacher/blue", "student_ce", "student", "student_ema"}
    ] * 3  # fmt: skip
    named = [n for s in samples["samples"] for n in (s["reference"], *s["outputs"].values())]
    assert sorted(named) == sorted(files)
    for sample in samples["samples"]:
        outputs = {who: files[name] for who, name in sample["outputs"].items()}
        assert outputs["student"] == outputs["student_ema"] == outputs["teacher/red"]
        assert len({*outputs.values(), files[sample["reference"]]}) == 4
        assert sample["prompt"].startswith("picture ")
        assert {Image.open(io.BytesIO(content)).size for content in outputs.values()} <= {(8, 8), (16, 8)}


def test_distances_of_features_come_with_n_and_a_mark(found: tuple[RunConfig, Evaluation]) -> None:
    metrics = found[1].metrics
    features = metrics["student"]["features"]
    assert (features["extractor"], features["dimensions"]) == ("means", 6)
    assert (features["generated"], features["held_out"]) == (6, 2 * HELD_OUT)
    assert features["reliable"] is False
    assert features == metrics["teachers"]["red"]["features"] == metrics["teacher"]["features"]
    assert features["frechet_distance"] != metrics["student_ce"]["features"]["frechet_distance"]
    assert "features" not in metrics["student_init"]


def test_sizes_of_caches_are_told_per_draw(found: tuple[RunConfig, Evaluation]) -> None:
    evaluation = found[1]
    red = evaluation.cache_stats["signals"]["red"]
    assert red["draws"] == red["rows"] * NOISE.draws_per_row
    assert red["bytes_per_draw"] == red["bytes"] / red["draws"]
    assert (red["prediction_type"], red["own_prediction_type"]) == ("v_prediction", "epsilon")
    assert evaluation.metrics["cache"]["red"]["bytes"] == red["bytes"]


def test_the_report_reads_what_the_stage_wrote(found: tuple[RunConfig, Evaluation], tmp_path: Path) -> None:
    config, evaluation = found
    run = Store(tmp_path)
    for name, content in evaluation.files.items():
        run.publish(name, content)
    parts = {"metrics": evaluation.metrics, "samples": evaluation.samples, "cache_stats": evaluation.cache_stats}
    for name, part in {**parts, "config": {"config": config.model_dump(mode="json"), "versions": {}}}.items():
        run.publish(f"{name}.json", json.dumps(part))
    page = render_report(run)
    assert page.count("<img ") == len(evaluation.files)
    assert "Kernel distance · means" in page
    assert "Error to red" in page


def test_with_the_average_alone_the_teachers_have_no_error_of_their_own_but_students_are_ranked(
    tmp_path: Path, found: tuple[RunConfig, Evaluation]
) -> None:
    job = job_of(tmp_path, config_of(tmp_path), signals=("average",))
    weights = {"student": job.weights["student"]}
    metrics = evaluate_run(replace(job, weights=weights)).metrics
    for name in ("mse_to_teacher", "mse_to_mean", "mse_to_noise"):
        assert metrics["student"][name] == pytest.approx(found[1].metrics["student"][name], rel=1e-4)
    assert metrics["teacher"]["mse_to_teacher"] == pytest.approx(
        found[1].metrics["teacher"]["mse_to_teacher"], rel=1e-4
    )


def test_a_run_without_teachers_is_ranked_by_the_error_to_the_noise(tmp_path: Path) -> None:
    config = config_of(tmp_path, draws_per_row=3)
    phase = config.phases[0].model_copy(update={"recipe": config.phases[0].recipe.without_teacher()})
    job = job_of(tmp_path, config.model_copy(update={"teachers": (), "phases": (phase,)}), signals=())
    metrics = evaluate_run(replace(job, weights={"student": job.weights["student"]})).metrics
    assert metrics["comparison"]["quality_metric"] == "mse_to_noise"
    assert metrics["comparison"]["teacher_quality"] is None
    assert metrics["held_out"]["draws"] == 2 * HELD_OUT * 3
    assert "teacher" not in metrics


def test_a_teacher_that_was_guided_is_sampled_as_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, guidance_scale=1.5)
    guided = config.teachers[0].model_copy(update={"guidance_scale": 4.0})
    job = job_of(tmp_path, config.model_copy(update={"teachers": (guided, config.teachers[1])}))
    scales: list[float] = []
    real = gallery.sample
    monkeypatch.setattr(gallery, "sample", lambda *a: (scales.append(a[4].guidance_scale), real(*a))[1])
    evaluate_run(replace(job, weights={"student": job.weights["student"]}))
    assert list(dict.fromkeys(scales)) == [4.0, 1.5]


def test_a_missing_extractor_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"means\.pt"):
        check_evaluation(config_of(tmp_path, feature_extractor=str(tmp_path / "means.pt")))
    with pytest.raises(ConfigError, match="feature_extractor"):
        check_evaluation(config_of(tmp_path, feature_extractor="some/hub-id"))
    with pytest.raises(DataError, match="clip"):
        check_evaluation(config_of(tmp_path, clip_model=str(tmp_path / "clip")))


def test_pictures_do_not_depend_on_the_size_of_batches(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    job = job_of(tmp_path, config)
    network = tiny_unet(seed=1)
    files = []
    for size in (1, 3):
        batch = config.phases[0].batch.model_copy(update={"micro_size": size})
        changed = config.model_copy(update={"phases": (config.phases[0].model_copy(update={"batch": batch}),)})
        shown = open_gallery(changed, inputs=job.inputs, device=torch.device("cpu"))
        shown.add("student", network, network.process)
        files.append({name: Image.open(io.BytesIO(content)) for name, content in shown.files.items()})
    for name, image in files[0].items():
        apart = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(files[1][name].tobytes())).int()
        assert int(apart.abs().max()) <= 1


def test_subjects_are_spread_and_captions_differ_as_long_as_there_are_others() -> None:
    subjects = [Subject(i, f"r{i}", f"caption {i % 4}") for i in range(20)]
    assert len({s.caption for s in spread(subjects, 4)}) == 4
    assert [s.index for s in spread(subjects, 10)] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [s.index for s in spread(subjects[:2], 8)] == [0, 1]


def test_half_precision_is_measured_in_fp32_on_a_cpu_but_counts_with_its_own_bytes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model = config.student.model.model_copy(update={"dtype": "float16"})
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": model})})
    job = job_of(tmp_path, config)
    metrics = evaluate_run(replace(job, weights={"student": job.weights["student"]})).metrics
    if not torch.cuda.is_available():
        assert metrics["comparison"]["bytes_ratio"] == 0.5
    assert 0 < metrics["student"]["mse_to/red"] < 1e-5  # the weights are rounded
