"""Phases on toy images: a tiny UNet learns from two others, whose predictions are captured without Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from denoiser_toys import CHANNELS, POOLED, SIDE, TEXT, process_of, tiny_unet
from torch import Tensor

from raydistill.cache.average import VARIANCE, averaged
from raydistill.cache.dense import dense_name, read_dense, row_sha, write_dense
from raydistill.cache.dense_capture import capture_draws, signal_meta
from raydistill.cache.dense_signal import stored_fields
from raydistill.cache.ledger import Ledger
from raydistill.cache.manifest import FieldRecord, Manifest
from raydistill.cache.shards import field_records, publish_record
from raydistill.config.schema import RunConfig
from raydistill.config.sources import NoiseConfig
from raydistill.models.denoiser import predict
from raydistill.models.student import save_student
from raydistill.models.taps import Taps
from raydistill.signals import Batch, Field, JsonValue, Schema
from raydistill.storage import Store
from raydistill.train.launch import PhaseJob

BUCKETS = ((SIDE, SIDE), (SIDE, 2 * SIDE))
NOISE = NoiseConfig(draws_per_row=2, seed=3, caption_dropout=0.2, prediction_type="v_prediction")
WEIGHTS = {"red": 3.0, "blue": 1.0}
ROWS, HELD_OUT, SHARD_ROWS = 6, 2, 4
"""Training and held-out images in each bucket; an epoch of batches of 8 has 4 steps, two of them short."""
TAP = {"teacher": "red", "tap": "mid", "student": "mid_block", "weight": 0.5}
MODEL = {"library": "diffusers", "source": "x"}
SCHEMA: Schema = {
    "prediction": Field(torch.float32, ("channel", "height", "width"), "prediction"),
    "tap.mid": Field(torch.float32, ("mid_channel", "mid_height", "mid_width"), "features"),
}


class UNetTeacher:
    """A UNet that predicts noise, asked for the common kind, with its middle as a tap."""

    def __init__(self, seed: int):
        self.schema = SCHEMA
        self._unet, self._process = tiny_unet(seed=seed), process_of("epsilon")
        self._taps = Taps(self._unet, {"mid": "mid_block"}, where="test")
        self.facts: Mapping[str, JsonValue] = {
            "prediction_type": NOISE.prediction_type,
            "own_prediction_type": "epsilon",
            "process": self._process.to_json(),
            "noise": NOISE.model_dump(mode="json"),
            "guidance_scale": None,
            "taps": {"mid": {"module": "mid_block", "shape": [16, SIDE // 2, SIDE // 2]}},
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        t = batch["timestep"]
        x_t = self._process.noisy(batch["latents"], batch["noise"], t)
        with self._taps:
            own = predict(self._unet, x_t, t, batch)
        told = self._process.convert(own, x_t, t, source="epsilon", target=NOISE.prediction_type)
        return {"prediction": told, "tap.mid": self._taps.taken()["mid"]}


def write_caches(folder: Path) -> dict[str, str]:
    """Finished caches below `folder`: `inputs`, those of both teachers and their `average`; URIs by name."""
    inputs = Ledger.below(Store(folder), "inputs", {"toy": "images"})
    generator = torch.Generator().manual_seed(0)
    cuts = [
        (split, bucket, range(start, min(start + SHARD_ROWS, count)))
        for split, count in (("train", ROWS), ("held_out", HELD_OUT))
        for bucket in BUCKETS
        for start in range(0, count, SHARD_ROWS)
    ]
    names = [dense_name(k) for k in range(len(cuts))]
    table = torch.Generator().manual_seed(1)
    embeds, pooled = torch.randn(3, 4, TEXT, generator=table), torch.randn(3, POOLED, generator=table)
    for name, (split, bucket, numbers) in zip(names, cuts, strict=True):
        n = len(numbers)
        latents = torch.randn(n, CHANNELS, *bucket, generator=generator)
        captions = [f"picture {i % 2}" for i in numbers]
        tensors = {
            "latents": latents,
            "time_ids": torch.tensor([*bucket, 0, 0, *bucket], dtype=torch.float32).repeat(n, 1),
            "prompt_embeds": embeds,
            "pooled": pooled,
            "prompt_index": torch.tensor([i % 2 for i in numbers], dtype=torch.int32),
        }
        meta: dict[str, JsonValue] = {
            "kind": "inputs",
            "format": 1,
            "split": split,
            "bucket": [*bucket],
            "row_ids": [f"{split}/{bucket[1]}/{i}.png" for i in numbers],
            "row_sha": [row_sha(z, c) for z, c in zip(latents, captions, strict=True)],
            "captions": ["picture 0", "picture 1", ""],
        }
        publish_record(inputs.store, write_dense(inputs.store, name, tensors, meta=meta, split=split, rows=n))
    facts: dict[str, JsonValue] = {
        "latent_channels": CHANNELS,
        "vae_factor": 1,
        "scaling": "pixels",
        "text_width": TEXT,
        "pooled_width": POOLED,
        "text_tokens": 4,
        "buckets": [[*bucket] for bucket in BUCKETS],
        "num_rows": {"train": 2 * ROWS, "held_out": 2 * HELD_OUT},
    }
    fields = field_records({"latents": Field(torch.float32, ("channel", "height", "width"), "clean images")})
    parent = inputs.finish(names, kind="inputs", parent=None, fields=fields, facts=facts, build={})
    found = {"inputs": inputs.store.uri}
    for seed, name in enumerate(WEIGHTS, start=1):
        found[name] = _write_teacher(folder, name, UNetTeacher(seed), inputs.store, parent)
    found["average"] = _write_average(folder, found, parent)
    return found


def _write_teacher(folder: Path, name: str, teacher: UNetTeacher, inputs: Store, parent: Manifest) -> str:
    ledger = Ledger.below(Store(folder), name, {"toy": name})
    for record in parent.shards:
        shard = read_dense(inputs, record.name)
        tensors = capture_draws(teacher, shard, NOISE, batch_rows=4, dtype=torch.float32, where=name)
        meta = signal_meta(shard)
        publish_record(
            ledger.store,
            write_dense(ledger.store, record.name, tensors, meta=meta, split=record.split, rows=record.rows),
        )
    fields = stored_fields(teacher, torch.float32)
    _finish(ledger, parent, fields, teacher.facts)
    return ledger.store.uri


def _write_average(folder: Path, caches: Mapping[str, str], parent: Manifest) -> str:
    ledger = Ledger.below(Store(folder), "average", {"toy": "average"})
    for record in parent.shards:
        total = sum(WEIGHTS.values())
        shards = [(read_dense(Store(caches[name]), record.name), weight / total) for name, weight in WEIGHTS.items()]
        meta = signal_meta(shards[0][0])
        publish_record(
            ledger.store,
            write_dense(ledger.store, record.name, averaged(shards), meta=meta, split=record.split, rows=record.rows),
        )
    teacher = UNetTeacher(1)
    fields = {**stored_fields(teacher, torch.float32), **field_records(VARIANCE)}
    _finish(ledger, parent, fields, {**teacher.facts, "taps": {}})
    return ledger.store.uri


def _finish(
    ledger: Ledger, parent: Manifest, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]
) -> None:
    names = [record.name for record in parent.shards]
    ledger.finish(names, kind="signal", parent=parent.fingerprint, fields=dict(fields), facts=dict(facts), build={})


def denoiser_job(
    folder: Path,
    *,
    phase: Mapping[str, object] | None = None,
    name: str = "run",
    signals: tuple[str, ...] = tuple(WEIGHTS),
    student: Mapping[str, object] | None = None,
    **sections: Mapping[str, object],
) -> PhaseJob:
    """A phase of 6 steps in fp32 (an epoch has 4) in a run folder of its own; caches and student once per `folder`."""
    if not (folder / "init/student.json").exists():
        write_caches(folder / "cache")
        save_student(tiny_unet("epsilon", seed=9, width=4), folder / "init")
    caches = {p.name.split("-")[0]: str(p) for p in (folder / "cache").iterdir()}
    config = RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(folder / name),
            "source": {"kind": "images", "paths": ["x"], "vae": "none", "noise": NOISE.model_dump()},
            "teachers": [
                {"signal": "noise_prediction", "name": n, "model": MODEL, "weight": w, "taps": {"mid": "mid_block"}}
                for n, w in WEIGHTS.items()
            ],
            "student": {"model": MODEL, **(student or {})},
            "phases": [
                {
                    "name": "one",
                    "steps": 6,
                    "recipe": {"kind": "noise_prediction", "alpha": 0.8},
                    "batch": {"global_size": 8, "micro_size": 2},
                    "optimizer": {"student": {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-4}},
                    "precision": "fp32",
                    "log_every": 1,
                    "checkpoint": {"every_steps": 3},
                    **copy.deepcopy(dict(phase or {})),
                }
            ],
            **sections,
        }
    )
    return PhaseJob(
        config=config,
        phase=config.phases[0],
        run=str(folder / name),
        folder="phases/one",
        inputs=caches["inputs"],
        signals={teacher: caches[teacher] for teacher in signals},
        student=str(folder / "init"),
    )
