"""Inputs of images, a denoiser that is a formula, and configurations for caches of its predictions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from raydistill.cache.build import build_signal
from raydistill.cache.dense import dense_name, read_dense, row_sha, write_dense
from raydistill.cache.ledger import MANIFEST, Ledger
from raydistill.cache.manifest import Manifest
from raydistill.cache.shards import field_records, publish_record
from raydistill.cache.signal_job import TeacherFactory
from raydistill.config.schema import RunConfig
from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher, TeacherConfig
from raydistill.signals import Batch, Field, JsonValue, Schema
from raydistill.storage import Store

CHANNELS, TOKENS, WIDTH, POOLED = 2, 3, 4, 2
BUCKETS = ((4, 4), (4, 8))
FIELDS: Schema = {
    "latents": Field(torch.float16, ("channel", "height", "width"), "clean latents"),
    "time_ids": Field(torch.float32, ("size",), "original size, crop corner, target size"),
}


def write_image_inputs(
    folder: Path, *, rows: int = 7, held_out: int = 2, shard_rows: int = 3, text: bool = True, seed: int = 0
) -> tuple[Store, Manifest]:
    """A finished inputs cache: `rows` training and `held_out` other images in each of `BUCKETS`; latents are fp16."""
    content: dict[str, JsonValue] = {"toy": "images", "rows": [rows, held_out, shard_rows], "text": text, "seed": seed}
    ledger = Ledger.below(Store(folder), "inputs", content)
    generator = torch.Generator().manual_seed(seed)
    cuts = [
        (split, bucket, range(start, min(start + shard_rows, count)))
        for split, count in (("train", rows), ("held_out", held_out))
        for bucket in BUCKETS
        for start in range(0, count, shard_rows)
    ]
    names = [dense_name(k) for k in range(len(cuts))]
    for name, (split, bucket, numbers) in zip(names, cuts, strict=True):
        n = len(numbers)
        latents = torch.randn(n, CHANNELS, *bucket, generator=generator).half()
        ids = [f"{split}/{bucket[0]}x{bucket[1]}/{i:03}.png" for i in numbers]
        captions = [f"picture {i % 2}" for i in numbers] if text else [""] * n
        size = torch.tensor([*bucket, 0, 0, *bucket], dtype=torch.float32)
        tensors = {"latents": latents, "time_ids": size.repeat(n, 1)}
        meta: dict[str, JsonValue] = {
            "kind": "inputs", "format": 1, "split": split, "bucket": list(bucket), "row_ids": [*ids],
            "row_sha": [row_sha(z, c) for z, c in zip(latents, captions, strict=True)],
        }  # fmt: skip
        if text:
            prompts = [*sorted(set(captions)), ""]
            tensors["prompt_embeds"] = torch.stack([embedding(prompt, TOKENS * WIDTH) for prompt in prompts]).half()
            tensors["prompt_embeds"] = tensors["prompt_embeds"].reshape(len(prompts), TOKENS, WIDTH)
            tensors["pooled"] = torch.stack([embedding(prompt, POOLED) for prompt in prompts]).half()
            tensors["prompt_index"] = torch.tensor([prompts.index(c) for c in captions], dtype=torch.int32)
            meta["captions"] = [*prompts]
        publish_record(ledger.store, write_dense(ledger.store, name, tensors, meta=meta, split=split, rows=n))
    facts: dict[str, JsonValue] = {
        "latent_channels": CHANNELS, "vae_factor": 1, "scaling": "pixels",
        "text_width": WIDTH if text else 0, "pooled_width": POOLED if text else 0, "text_tokens": TOKENS if text else 0,
        "buckets": [[*bucket] for bucket in BUCKETS],
        "num_rows": {"train": 2 * rows, "held_out": 2 * held_out},
    }  # fmt: skip
    manifest = ledger.finish(names, kind="inputs", parent=None, fields=field_records(FIELDS), facts=facts, build={})
    return ledger.store, manifest


def embedding(prompt: str, size: int) -> Tensor:
    """Numbers that depend on the prompt."""
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(prompt.encode())))


SCHEMA: Schema = {
    "prediction": Field(torch.float32, ("channel", "height", "width"), "a formula"),
    "tap.mean": Field(torch.float32, ("channel",), "its mean"),
}


SCHEDULE: dict[str, JsonValue] = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
}  # fmt: skip


class ToyDenoiser:
    """Says gain · (latents + noise · t / 1000) + the mean of the text embeddings; as a tap, its mean by channel."""

    def __init__(self, gain: float = 1.0):
        self.gain = gain
        self.schema = SCHEMA
        self.facts: Mapping[str, JsonValue] = {
            "prediction_type": "epsilon", "own_prediction_type": "epsilon",
            "process": {"kind": "variance_preserving", "prediction_type": "epsilon", "schedule": SCHEDULE},
            "guidance_scale": None, "taps": {"mean": {"module": "none", "shape": [CHANNELS]}},
        }  # fmt: skip
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.batches.append(dict(batch))
        x_t = batch["latents"] + batch["noise"] * batch["timestep"][:, None, None, None] / 1000
        said = self.gain * x_t
        if "prompt_embeds" in batch:
            said = said + batch["prompt_embeds"].mean((1, 2))[:, None, None, None]
        return {"prediction": said, "tap.mean": said.mean((2, 3))}


def toy_denoiser(config: TeacherConfig, noise: int | NoiseConfig) -> ToyDenoiser:
    """A teacher factory; the gain is the guidance scale, which is a part of the cache's identity."""
    assert isinstance(config, NoisePredictionTeacher)
    return ToyDenoiser(config.guidance_scale or 1.0)


@dataclass(frozen=True)
class BuiltImages:
    """Finished caches of images."""

    config: RunConfig
    inputs: Store
    inputs_manifest: Manifest
    signals: dict[str, tuple[Store, Manifest]]

    @property
    def signal(self) -> Store:
        """That of the first teacher."""
        return self.signals["t0"][0]


def build_images(config: RunConfig, *, factory: TeacherFactory | None = None, **inputs: Any) -> BuiltImages:
    """The inputs as `write_image_inputs` makes them, and the signal of every teacher."""
    caches = Store(config.cache.dir)
    store, manifest = write_image_inputs(Path(caches.root), **inputs)
    make = factory or toy_denoiser
    signals = {t.name: build_signal(config, t, store, manifest, caches, factory=make) for t in config.teachers}
    return BuiltImages(config, store, manifest, signals)


def replace_shard(
    store: Store, name: str, change: Callable[[dict[str, Tensor], dict[str, JsonValue]], object]
) -> Manifest:
    """Another shard in the place of one, with a record and a manifest that agree with it."""
    shard = read_dense(store, name)
    tensors, meta = {k: v.clone() for k, v in shard.tensors().items()}, copy.deepcopy(shard.meta)
    rows = shard.rows
    change(tensors, meta)
    record = write_dense(store, name, tensors, meta=meta, split=str(meta["split"]), rows=rows)
    publish_record(store, record)
    manifest = Manifest.model_validate_json(store.read(MANIFEST))
    shards = tuple(record if r.name == name else r for r in manifest.shards)
    manifest = manifest.model_copy(update={"shards": shards})
    store.publish(MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def model_folder(folder: Path) -> Path:
    """A folder that looks like a denoiser to whoever asks what it is; its weights are one number."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    save_file({"gain": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    schedule = {"_class_name": "DDPMScheduler", **SCHEDULE, "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


def unet_folder(folder: Path) -> Path:
    """A random SDXL-shaped denoiser of the toy inputs, saved as a pipeline's folder; it predicts velocities."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        in_channels=CHANNELS, out_channels=CHANNELS, sample_size=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), norm_num_groups=4, cross_attention_dim=WIDTH, transformer_layers_per_block=1,
        addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True,
        projection_class_embeddings_input_dim=POOLED + 6 * 4,
    )  # fmt: skip
    network.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    schedule = {"_class_name": "DDPMScheduler", **SCHEDULE, "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


def image_config(
    home: Path, folder: str = "cache", *, teachers: tuple[dict[str, Any], ...] = ({},), **sections: Any
) -> RunConfig:
    """A run on images with toy teachers `t0`, `t1`, …; `sections` and `teachers` are overrides."""
    model = {"library": "diffusers", "source": str(model_folder(home / "model"))}
    plain: dict[str, Any] = {
        "name": "toy",
        "run_dir": str(home / "run"),
        "cache": {"dir": str(home / folder)},
        "source": {"kind": "images", "paths": [str(home)], "vae": "none", "buckets": [list(b) for b in BUCKETS],
                   "noise": {"draws_per_row": 2, "seed": 5}},
        "teachers": [
            {"signal": "noise_prediction", "name": f"t{i}", "model": model, "batch_rows": 4} | t
            for i, t in enumerate(teachers)
        ],
        "student": {"model": model},
        "phases": [{
            "name": "p", "steps": 2, "batch": {"global_size": 4, "micro_size": 2},
            "recipe": {"kind": "noise_prediction"}, "optimizer": {"student": {"lr": 1e-3}},
        }],
    }  # fmt: skip
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section}
    return RunConfig.model_validate(plain)
