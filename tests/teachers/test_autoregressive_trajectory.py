"""Trajectories of a teacher that makes its videos chunk by chunk."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from video_toys import FAMILIES, FLOW, captions, clips, tiny_wan

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import OdeTrajectoryTeacher
from raydistill.diffusion.process import Process
from raydistill.models.causal import CausalDenoiser
from raydistill.teachers.ode_trajectory import OdeTrajectory

PROCESS = Process.from_scheduler(FLOW)
KEPT = (1.0, 0.9375, 0.625)


def teacher(network: Any, chunk: int | None, **settings: Any) -> OdeTrajectory:
    how = OdeTrajectoryTeacher.model_validate(
        {
            "signal": "ode_trajectory", "name": "t", "model": {"library": "diffusers", "source": "x"}, "steps": 4,
            "keep_t": KEPT, "chunk_frames": chunk,
            "teacher_attention": "bidirectional" if chunk is None else "autoregressive", **settings,
        }
    )  # fmt: skip
    return OdeTrajectory(how, network, PROCESS, FLOW, NoiseConfig(prediction_type="flow"))


def batch(frames: int, seed: int = 0) -> dict[str, Tensor]:
    empty = captions(1, seed=9)["prompt_embeds"].expand(2, -1, -1)
    return {"noise": clips(2, frames, seed=seed), **captions(2), "empty_embeds": empty}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_of_all_frames_is_the_teacher_that_sees_all(family: str) -> None:
    whole, chunked = (teacher(FAMILIES[family](), c, guidance_scale=2.0)(batch(4)) for c in (None, 4))
    for name, tensor in whole.items():
        assert chunked[name].shape == tensor.shape
        assert (chunked[name] - tensor).abs().max() < 1e-4 * tensor.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_of_earlier_chunks_do_not_depend_on_the_noise_of_later_ones(family: str) -> None:
    made, given = teacher(FAMILIES[family](), 2), batch(5)
    other = {**given, "noise": torch.cat([given["noise"][:, :, :3], clips(2, 5, seed=4)[:, :, 3:]], 2)}
    a, b = made(given), made(other)
    assert torch.equal(a["clean"][:, :, :3], b["clean"][:, :, :3])
    assert torch.equal(a["path"][:, :, :, :3], b["path"][:, :, :, :3])
    assert not torch.allclose(a["clean"][:, :, 3:], b["clean"][:, :, 3:])


def test_each_chunk_follows_the_ode_beside_the_clean_chunks_before_it() -> None:
    network, given = tiny_wan(), batch(5)
    made, causal = teacher(network, 2, guidance_scale=3.0), CausalDenoiser(network, 2)
    found, t = made(given), torch.tensor(made.facts["grid"], dtype=torch.float64).tolist()
    clean = torch.zeros_like(given["noise"])
    states: dict[float, Tensor] = {}
    for a, b in causal.spans(5):
        x = given["noise"].clone()
        for here, there in pairwise(t):
            if here in KEPT:
                states.setdefault(here, torch.zeros_like(x))[:, :, a:b] = x[:, :, a:b]
            told = torch.full((2, 5), 1000 * here)
            with torch.no_grad():
                cond, uncond = (
                    causal.predict(x, told, {"prompt_embeds": given[k]}, clean=clean, clean_t=torch.zeros(2, 5))
                    for k in ("prompt_embeds", "empty_embeds")
                )
            x = x + (there - here) * (uncond + 3 * (cond - uncond))
        clean[:, :, a:b] = x[:, :, a:b]
    assert (found["clean"] - clean).abs().max() < 1e-3 * clean.abs().max()
    for place, time in enumerate(made.facts["t"]):  # type: ignore[arg-type]
        key = min(states, key=lambda s: abs(s - float(str(time))))
        assert (found["path"][:, place] - states[key]).abs().max() < 1e-3 * clean.abs().max()


def test_chunks_go_with_autoregressive_teachers_alone() -> None:
    for settings in ({"teacher_attention": "autoregressive"}, {"chunk_frames": 2}):
        with pytest.raises(ValueError, match="goes with teacher_attention: autoregressive"):
            teacher(tiny_wan(), None, **settings)
