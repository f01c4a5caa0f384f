"""A whole run on toy prompts or clips without Ray: tiny encoders, a tiny Wan teacher and a student of few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tiny_denoisers import save_pipeline
from tiny_encoders import WIDTH, save_sdxl_encoders, sdxl_text_encoders

from raydistill.config.schema import RunConfig

SIDE, FRAMES = 8, 5
T_LIST = [1.0, 0.9, 0.5, 0.0]


def write_parts(folder: Path) -> Path:
    """`encoders`, `teacher` (a Wan of three channels), `prompts.txt` and `clips` below `folder`."""
    save_sdxl_encoders(folder / "encoders")
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    save_pipeline(network, folder / "teacher", FlowMatchEulerDiscreteScheduler(shift=3.0), inside="transformer")
    prompts = [f"a {colour} {animal}" for colour in ("red", "blue") for animal in ("cat", "dog", "bird")]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    write_clips(folder / "clips", 6)
    return folder


def encoders(folder: Path) -> list[dict[str, Any]]:
    return [dict(sdxl_text_encoders(folder / "encoders")[0])]


def write_film(path: Path, frames: np.ndarray, *, fps: int = 8, codec: str = "libx264") -> None:
    """Frames [n, height, width, 3] of 8 bits as a file whose suffix says the container."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def film(seed: int, frames: int = 9, side: int = 16) -> np.ndarray:
    """A field of one colour that gets lighter from frame to frame."""
    base = np.array([(40 * seed) % 120, (70 * seed) % 120, 60], np.uint8)
    return np.stack([np.broadcast_to(base + 12 * i, (side, side, 3)) for i in range(frames)]).astype(np.uint8)


def write_clips(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    for i in range(number):
        write_film(folder / f"{i}.mp4", film(i))
        (folder / f"{i}.txt").write_text(f"clip {i}")


def video_config(parts: Path, home: Path, **sections: Any) -> RunConfig:
    """Trajectories of the teacher from prompts, and a causal student of three steps; `sections` are overrides."""
    model = {"library": "diffusers", "source": str(parts / "teacher"), "dtype": "float32"}
    plain: dict[str, Any] = {
        "name": "video",
        "run_dir": str(home / "run"),
        "cache": {"dir": str(home / "cache")},
        "source": {
            "kind": "prompts", "paths": [str(parts / "prompts.txt")], "negative_prompt": "", "size": [SIDE, SIDE],
            "frames": FRAMES, "vae": "none", "text_encoders": encoders(parts), "shard_rows": 2,
            "noise": {"draws_per_row": 2, "prediction_type": "flow"},
        },
        "teachers": [
            {
                "name": "ode", "signal": "ode_trajectory", "model": model, "steps": 6, "guidance_scale": 2.0,
                "keep_t": T_LIST[:-1], "batch_rows": 2,
            }
        ],
        "student": {"model": model, "generator": {"t_list": T_LIST, "causal": {"chunk_frames": 2}}},
        "phases": [
            {
                "name": "ode", "steps": 4, "recipe": {"kind": "trajectory", "causal": True}, "precision": "fp32",
                "batch": {"global_size": 2, "micro_size": 2}, "optimizer": {"student": {"lr": 1e-3}},
            }
        ],
        "evaluate": {"held_out": 0.4, "baseline": False, "videos": {"samples": 2, "fps": 8, "rollout_frames": 8}},
    }  # fmt: skip
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(plain)
