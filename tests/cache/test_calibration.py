"""Rows that a teacher is measured on before it is projected: which, how many at once, and with which noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_toys import image_config, write_image_inputs
from toys import write_toy_caches

from raydistill.cache import calibration
from raydistill.cache.calibration import calibration_rows
from raydistill.cache.read import Dataset
from raydistill.config.load import load_config
from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.storage import Store


def text_config(folder: Path):
    return load_config(
        [],
        (),
        {
            "name": "toy",
            "run_dir": str(folder),
            "source": {"paths": ["x.txt"], "tokenizer": "toy", "seq_len": 32},
            "teachers": [{"name": "toy", "model": {"source": "toy"}}],
            "student": {"model": {"source": "toy"}, "init": {"kind": "projection"}},
            "phases": [
                {"name": "one", "steps": 1, "batch": {"global_size": 1, "micro_size": 1},
                 "optimizer": {"student": {"lr": 0.1}}}
            ],
        },
    )  # fmt: skip


def test_text_comes_in_batches_of_few_tokens_with_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = write_toy_caches(tmp_path)
    monkeypatch.setattr(calibration, "TOKENS", 60)
    batches = calibration_rows(text_config(tmp_path), lambda: caches.inputs)(7)
    dataset = Dataset(caches.inputs, {}, split="train", fields={}, max_rows=7)
    assert all(batch["valid"].numel() <= 60 for batch in batches)
    assert len(batches) > 1
    found = sorted(row[valid].tolist() for b in batches for row, valid in zip(b["input_ids"], b["valid"], strict=True))
    wanted = sorted(dataset.batch([i])["input_ids"][0].tolist() for i in range(7))
    assert found == wanted
    assert set(batches[0]) == {"input_ids", "position_ids", "valid"}


def test_one_row_longer_than_the_limit_goes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = write_toy_caches(tmp_path)
    monkeypatch.setattr(calibration, "TOKENS", 1)
    batches = calibration_rows(text_config(tmp_path), lambda: caches.inputs)(3)
    assert [len(batch["input_ids"]) for batch in batches] == [1, 1, 1]


def test_images_have_the_noise_of_their_draws_and_batches_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = image_config(tmp_path)
    inputs, _ = write_image_inputs(tmp_path / "cache")
    noise = config.images.noise
    monkeypatch.setattr(calibration, "PIXELS", 3 * 8 * 8)
    dataset = calibration.DenseDataset(inputs, {}, noise, split="train", fields={}, max_rows=5)
    rows = dataset.num_rows // noise.draws_per_row
    batches = calibration_rows(config, lambda: Store(inputs.uri))(5)
    assert sum(len(batch["latents"]) for batch in batches) == rows
    by_latents = {}
    for row in range(rows):
        sample = row * noise.draws_per_row + row % noise.draws_per_row
        name, _, draw = dataset.row_ids([sample])[0].rpartition("@")
        by_latents[dataset.batch([sample])["latents"][0].numpy().tobytes()] = (name, int(draw))
    timesteps = []
    for batch in batches:
        assert batch["latents"][0, 0].numel() * len(batch["latents"]) <= max(3 * 64, batch["latents"][0, 0].numel())
        for latents, added, timestep in zip(batch["latents"], batch["noise"], batch["timestep"], strict=True):
            name, draw = by_latents[latents.numpy().tobytes()]
            assert torch.equal(added, noise_of(name, draw, latents.shape, noise.seed))
            assert int(timestep) == timestep_of(name, draw, noise)
            timesteps.append(int(timestep))
    assert np.ptp(timesteps) > 0
