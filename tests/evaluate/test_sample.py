"""Films of a finished student for prompts of one's own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from video_run import FRAMES, SIDE, T_LIST, video_config, write_parts

from raydistill.config.models import CausalConfig, DiffusersModel, GeneratorConfig
from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.sample import main, sample
from raydistill.models.denoiser import load_denoiser, process_of, scheduler_config
from raydistill.models.student import export_student


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an exported causal student."""
    parts = write_parts(tmp_path_factory.mktemp("parts"))
    config = video_config(parts, parts / "home")
    source = DiffusersModel(library="diffusers", source=str(parts / "teacher"), dtype="float32")
    student: Any = load_denoiser(source)
    student.process, student.scheduler_config, student.kept = process_of(source), scheduler_config(source), None
    student.generator = GeneratorConfig(t_list=tuple(T_LIST), causal=CausalConfig(chunk_frames=2, context_noise=0.1))
    export_student(student, parts / "run/export", dtype=torch.float32)
    written = {"config": json.loads(config.model_dump_json()), "versions": {}}
    (parts / "run/config.json").write_text(json.dumps(written))
    return parts / "run"


def frames_of(film: bytes) -> list[Any]:
    with av.open(io.BytesIO(film)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def test_each_prompt_gives_a_film_of_the_trained_length_the_same_every_time(run: Path) -> None:
    made, again = (sample(run, ["red cat", "blue dog"]) for _ in range(2))
    assert list(made) == ["00.mp4", "01.mp4"]
    assert made == again
    assert made["00.mp4"] != made["01.mp4"]
    assert sample(run, ["red cat"], seed=1)["00.mp4"] != made["00.mp4"]
    frames = frames_of(made["00.mp4"])
    assert len(frames) == FRAMES
    assert frames[0].shape == (SIDE, SIDE, 3)


def test_a_causal_student_makes_films_of_any_length(run: Path) -> None:
    assert len(frames_of(sample(run, ["red cat"], frames=12)["00.mp4"])) == 12


def test_the_command_line_writes_files_and_explains_itself(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "red cat", "--out", str(tmp_path / "out"), "--frames", "3"]) == 0
    assert len(frames_of((tmp_path / "out/00.mp4").read_bytes())) == 3
    assert main([str(tmp_path), "red cat"]) == 2
    assert "found no config.json" in capsys.readouterr().err


def test_bad_input_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="finished run of a student of few steps"):
        sample(tmp_path, ["red cat"])
    with pytest.raises(ConfigError, match="at most 32 latent frames"):
        sample(run, ["red cat"], frames=33)
    with pytest.raises(ConfigError, match="chunk of 1 to 1 latent frames"):
        sample(run, ["red cat"], frames=1)
