"""Models that cannot make videos by chunks, or be asked while a student trains, are refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, FlowMatchEulerDiscreteScheduler
from tiny_denoisers import save_pipeline
from tiny_encoders import WIDTH
from video_run import SIDE, video_config, write_parts
from video_toys import tiny_wan

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError
from raydistill.models.denoiser_agreement import check_denoisers


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan that fits, one of another text width, and a CogVideoX of the same latents."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    save_pipeline(tiny_wan(), folder / "wide", FlowMatchEulerDiscreteScheduler(shift=3.0), inside="transformer")
    cog = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=1, sample_width=SIDE, sample_height=SIDE, max_text_seq_length=12,
        use_rotary_positional_embeddings=True, sample_frames=5,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    save_pipeline(cog, folder / "cog", scheduler, inside="transformer")
    return folder


def model(parts: Path, name: str) -> dict[str, Any]:
    return {"library": "diffusers", "source": str(parts / name), "dtype": "float32"}


def forcing(parts: Path, **recipe: Any) -> RunConfig:
    phase = {
        "name": "sf", "steps": 4, "recipe": {"kind": "self_forcing", "guidance_scale": 1.0, **recipe},
        "batch": {"global_size": 2, "micro_size": 2}, "optimizer": {p: {"lr": 1e-3} for p in ("student", "critic")},
    }  # fmt: skip
    return video_config(parts, parts / "home", phases=[phase])


def test_models_that_fit_are_let_through(parts: Path) -> None:
    check_denoisers(forcing(parts, real_score=model(parts, "teacher")), [(SIDE, SIDE)])
    check_denoisers(forcing(parts, teacher_attention="autoregressive"), [(SIDE, SIDE)])


def test_a_score_of_another_text_width_is_refused_by_its_key(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\.0\.recipe\.real_score"):
        check_denoisers(forcing(parts, real_score=model(parts, "wide")), [(SIDE, SIDE)])


def test_a_causal_cogvideox_is_refused_before_its_teacher_makes_anything(parts: Path) -> None:
    cog = model(parts, "cog")
    teachers = [{"name": "ode", "signal": "ode_trajectory", "model": cog, "keep_t": [0.9, 0.5], "steps": 4}]
    student = {"model": cog, "generator": {"t_list": [0.9, 0.5, 0.0], "causal": {"chunk_frames": 2}}}
    config = video_config(parts, parts / "home", student=student, teachers=teachers)
    with pytest.raises(ConfigError, match=r"^student\.model: .*found\s+CogVideoXTransformer3DModel") as refused:
        check_denoisers(config, [(SIDE, SIDE)])
    words = " ".join(str(refused.value).split())
    assert "WanTransformer3DModel or CosmosTransformer3DModel" in words
    assert "text and video attend to one another, so that later frames reach earlier ones" in words
    assert "Use it as a bidirectional teacher or student." in words


def test_an_autoregressive_cogvideox_is_refused_as_a_teacher(parts: Path) -> None:
    cog = model(parts, "cog")
    teachers = [
        {
            "name": "ode", "signal": "ode_trajectory", "model": cog, "keep_t": [0.9, 0.5], "steps": 4,
            "teacher_attention": "autoregressive", "chunk_frames": 2,
        }
    ]  # fmt: skip
    student = {"model": cog, "generator": {"t_list": [0.9, 0.5, 0.0]}}
    phase = {
        "name": "kd", "steps": 1, "recipe": {"kind": "trajectory"}, "batch": {"global_size": 2, "micro_size": 2},
        "optimizer": {"student": {"lr": 1e-3}},
    }  # fmt: skip
    config = video_config(parts, parts / "home", student=student, teachers=teachers, phases=[phase])
    with pytest.raises(ConfigError, match=r"^teachers\.ode: .*found\s+CogVideoXTransformer3DModel"):
        check_denoisers(config, [(SIDE, SIDE)])
