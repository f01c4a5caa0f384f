"""From prompts to a measured, exported student of few steps, without Ray: the stages one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_cache import InProcess
from diffusers import EulerDiscreteScheduler
from PIL import Image
from tiny_denoisers import SCHEDULE, save_pipeline, tiny_sdxl
from tiny_encoders import sdxl_text_encoders
from torch import Tensor, nn
from video_run import FRAMES, SIDE, T_LIST, video_config, write_parts

from raydistill.cache.build import build_inputs, build_signal
from raydistill.config.metrics import training_metrics
from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.evaluate.job import EvaluateJob, Evaluation
from raydistill.evaluate.stage import check_evaluation, evaluate_run
from raydistill.export import export_run
from raydistill.models.student import publish_student
from raydistill.report import write_report
from raydistill.storage import Store
from raydistill.train.job import PhaseJob
from raydistill.train.launch import train_phase


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def trained(config: RunConfig) -> tuple[EvaluateJob, Evaluation, Store]:
    """Everything up to the stage `evaluate`."""
    caches, run = Store(config.cache.dir), Store(config.run_dir)
    inputs, manifest = build_inputs(config, caches)
    signals = {t.name: build_signal(config, t, inputs, manifest, caches)[0].uri for t in config.teachers}
    publish_student(config.first_student, seed=0, run=run, rows=lambda number: [])
    weights = None
    for phase in config.phases:
        folder = f"phases/{phase.name}"
        job = PhaseJob(
            config=config, phase=phase, run=run.uri, folder=folder, inputs=inputs.uri, signals=signals,
            student=f"{run.uri}/init", weights=weights,
        )  # fmt: skip
        train_phase(job)
        weights = f"{run.uri}/{folder}/final"
    assert weights is not None
    evaluation = EvaluateJob(
        config=config, inputs=inputs.uri, signals=signals, student=f"{run.uri}/init", weights={"student": weights}
    )
    return evaluation, evaluate_run(evaluation), run


class Means(nn.Module):
    """Mean colours of a video."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


def test_video_distances_that_could_not_be_measured_are_refused_before_the_run(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "i3d.ckpt").write_bytes(b"")
    videos = {"feature_extractor": str(tmp_path / "i3d.ckpt")}
    config = video_config(parts, tmp_path, evaluate={"videos": videos})
    with pytest.raises(ConfigError, match=r"evaluate\.videos\.feature_extractor: I3D .* at least 9 frames, found 5"):
        check_evaluation(config)
    plain = config.model_dump(mode="json")
    plain["teachers"] = []
    plain["phases"][0]["recipe"] = {
        "kind": "self_forcing",
        "real_score": plain["student"]["model"],
        "guidance_scale": 2,
    }
    plain["phases"][0]["optimizer"]["critic"] = {"lr": 1e-3}
    with pytest.raises(ConfigError, match="found no such pair; remove it"):
        check_evaluation(RunConfig.model_validate(plain))


def test_causal_kd_then_self_forcing_are_phases_of_one_run(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    videos = {"samples": 2, "rollout_frames": 8, "feature_extractor": str(tmp_path / "means.pt"), "feature_size": 8}
    config = video_config(parts, tmp_path, evaluate={"held_out": 0.4, "baseline": False, "every_steps": 2,
                                                     "videos": videos})  # fmt: skip
    plain = config.model_dump(mode="json")
    plain["phases"].append(
        plain["phases"][0]
        | {
            "name": "sf",
            "steps": 4,
            "recipe": {"kind": "self_forcing", "critic_updates": 1, "guidance_scale": 2.0},
            "optimizer": {"student": {"lr": 1e-4}, "critic": {"lr": 1e-4}},
        }
    )
    config = RunConfig.model_validate(plain)
    _, found, run = trained(config)
    metrics = found.metrics
    assert {"teacher", "student_init", "student", "comparison", "held_out", "cache"} <= {*metrics}
    line: Any = metrics["student"]
    assert {*training_metrics(config)} <= {*line}
    assert line["mse_to_teacher"] == line[f"mse_after/{len(T_LIST) - 1}"]
    assert line["frames_per_second"] == pytest.approx(FRAMES * line["samples_per_second"])
    assert line["rollout_frames"] == 8
    distance = line["video_features_to_teacher"]
    assert (distance["extractor"], distance["things"]) == ("means", "videos")
    assert distance["generated"] == distance["held_out"] == metrics["held_out"]["draws"]  # type: ignore
    assert metrics["teacher"]["mse_to_teacher"] == 0.0  # type: ignore[index, call-overload]
    for name, content in found.files.items():
        run.publish(name, content)
    shown: Any = found.samples
    assert shown["kind"] == "videos"
    first = shown["samples"][0]
    assert {*first["outputs"]} == {"teacher/ode", "student"} == {*first["players"]}
    with Image.open(Path(run.path(first["outputs"]["student"]))) as animation:
        assert (animation.size, animation.n_frames) == ((SIDE, SIDE), FRAMES)  # type: ignore[attr-defined]
    lines = [json.loads(text) for text in run.read_text("metrics.jsonl").splitlines()]
    assert [line["evaluation"].keys() for line in lines if "evaluation" in line]
    run.publish("metrics.json", json.dumps(metrics))
    run.publish("samples.json", json.dumps(found.samples))
    run.publish("cache_stats.json", json.dumps(found.cache_stats))
    run.publish("config.json", json.dumps({"config": config.model_dump(mode="json"), "versions": {}}))
    write_report(run)
    page = run.read_text("report.html")
    assert page.count("data:image/webp;base64,") == 4  # two prompts, teacher and student
    export_run(config, run, weights=run.path("phases/sf/final"))
    written = json.loads((Path(run.path("export")) / "generator.json").read_text())
    card = run.read_text("export/README.md")
    assert "text-to-video" in card
    assert "2 sample(s) of 8 × 8 × 5 frames per prompt" in card
    assert written["t_list"] == T_LIST
    assert written["causal"]["chunk_frames"] == 2


def test_a_student_that_is_the_teacher_and_takes_its_steps_makes_its_samples(
    in_process: InProcess, parts: Path, tmp_path: Path
) -> None:
    """At the times of the sampler's steps, with the noise that a prediction implies, few steps are Euler's steps."""
    config = video_config(parts, tmp_path)
    plain = config.model_dump(mode="json")
    times = [1.0, 0.7, 0.4]
    plain["teachers"][0] |= {"steps": 1, "keep_t": times, "guidance_scale": None, "store_dtype": "float32"}
    plain["student"]["generator"] = {"t_list": [*times, 0.0], "renoise": "same"}
    plain["phases"][0]["recipe"]["causal"] = False
    plain["phases"][0]["optimizer"]["student"]["lr"] = 1e-30
    _, found, _ = trained(RunConfig.model_validate(plain))
    line: Any = found.metrics["student"]
    assert line["mse_to_teacher"] < 1e-9
    assert line["mse_after/1"] > 1e-4


def test_a_teacher_is_trained_on_clips_and_shown_in_motion(in_process: InProcess, parts: Path, tmp_path: Path) -> None:
    plain = video_config(parts, tmp_path).model_dump(mode="json")
    plain["source"] = {
        "kind": "videos", "paths": [str(parts / "clips")], "frames": FRAMES, "buckets": [[SIDE, SIDE]], "vae": "none",
        "text_encoders": plain["source"]["text_encoders"], "shard_rows": 2,
        "noise": {"prediction_type": "flow", "caption_dropout": 0.2},
    }  # fmt: skip
    plain["teachers"], plain["student"]["generator"] = [], None
    plain["phases"][0]["recipe"] = {"kind": "noise_prediction", "alpha": 0.0}
    plain["evaluate"] |= {"images": {"samples": 2, "sample_steps": 2, "guidance_scale": 2.0}}
    _, found, run = trained(RunConfig.model_validate(plain))
    assert found.metrics["student"]["mse_to_noise"] > 0  # type: ignore[index, call-overload, operator]
    first: Any = found.samples["samples"][0]  # type: ignore[index]
    for name in (first["reference"], first["outputs"]["student"]):
        run.publish(name, found.files[name])
        with Image.open(Path(run.path(name))) as animation:
            assert (animation.size, animation.n_frames) == ((SIDE, SIDE), FRAMES)  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [1, 2])
def test_an_sdxl_shaped_unet_becomes_a_student_of_few_steps(
    in_process: InProcess, parts: Path, tmp_path: Path, steps: int
) -> None:
    network = tiny_sdxl(in_channels=3, out_channels=3)
    save_pipeline(network, tmp_path / "sdxl", EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"))
    plain = video_config(parts, tmp_path, source={"frames": None}).model_dump(mode="json")
    plain["source"]["text_encoders"] = sdxl_text_encoders(parts / "encoders")
    times = [0.999, 0.5][:steps]
    for model in (plain["teachers"][0]["model"], plain["student"]["model"]):
        model["source"] = str(tmp_path / "sdxl")
    plain["teachers"][0]["keep_t"] = times
    plain["student"]["generator"] = {"t_list": [*times, 0.0]}
    plain["phases"][0]["recipe"]["causal"] = False
    _, found, run = trained(RunConfig.model_validate(plain))
    line: Any = found.metrics["student"]
    assert {f"mse_after/{k}" for k in range(1, steps + 1)} <= {*line}
    assert line["frames_per_second"] == line["samples_per_second"]
    shown: Any = found.samples
    assert shown["kind"] == "images"
    name = shown["samples"][0]["outputs"]["student"]
    run.publish(name, found.files[name])
    with Image.open(Path(run.path(name))) as image:
        assert (image.format, image.size) == ("PNG", (SIDE, SIDE))
    losses = [json.loads(text)["loss"] for text in run.read_text("metrics.jsonl").splitlines() if '"loss"' in text]
    assert all(0 < loss < 100 for loss in losses)
