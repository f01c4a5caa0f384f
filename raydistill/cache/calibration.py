"""Training rows of the inputs cache on which a teacher is measured before it is projected into a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.read import Dataset
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, NoiseConfig, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource
from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.errors import ConfigError
from raydistill.signals import Batch
from raydistill.storage import Store

TOKENS = 8192
"""Tokens that go through the teacher at once, as far as one row has not more."""
PIXELS = 1 << 15
"""Pixels of latents that go through the teacher at once, as far as one image has not more."""


def calibration_rows(config: RunConfig, inputs: Callable[[], Store]) -> Callable[[int], Sequence[Batch]]:
    """Gives a number of training rows, evenly spread over the cache that `inputs` opens, as batches.

    Text: input_ids, position_ids and valid [rows, seq]. Images: what a denoiser is trained on, with the noise and the
    timestep that a draw of the row has, all draws in turn.
    """

    def rows(number: int) -> list[Batch]:
        match config.source:
            case TextSource():
                return list(_text(Dataset(inputs(), {}, split="train", fields={}, max_rows=number)))
            case ImagesSource(noise=noise) | VideosSource(noise=noise):
                dataset = DenseDataset(inputs(), {}, noise, split="train", fields={}, max_rows=number)
                return list(_images(dataset, noise))
            case PromptsSource():
                raise ConfigError(
                    "student.init.calibration_rows: a projection is calibrated on images or videos, found prompts "
                    "alone; set it to 0."
                )
            case EpisodesSource():
                raise ConfigError("student.init.kind: wanted random, pretrained or checkpoint of a world model.")

    return rows


def _text(dataset: Dataset) -> Iterator[Batch]:
    order = np.argsort(dataset.num_tokens, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and (end - start + 1) * int(dataset.num_tokens[order[end]]) > TOKENS
        if full or end == len(order):
            batch = dataset.batch(order[start:end])
            yield {name: batch[name] for name in ("input_ids", "position_ids", "valid")}
            start = end


def _images(dataset: DenseDataset, noise: NoiseConfig) -> Iterator[Batch]:
    draws = noise.draws_per_row
    samples = np.array([row * draws + row % draws for row in range(dataset.num_rows // draws)], np.int64)
    buckets = dataset.buckets[samples]
    for bucket in sorted(set(buckets.tolist())):
        members = samples[buckets == bucket]
        images = max(1, PIXELS // dataset.batch(members[:1])["latents"][0, 0].numel())
        for start in range(0, len(members), images):
            yield _noised(dataset, members[start : start + images], noise)


def _noised(dataset: DenseDataset, samples: np.ndarray, noise: NoiseConfig) -> dict[str, Tensor]:
    batch = dataset.batch(samples)
    ids = [name.rpartition("@") for name in dataset.row_ids(samples)]
    shape = batch["latents"].shape[1:]
    batch["noise"] = torch.stack([noise_of(row, int(draw), shape, noise.seed) for row, _, draw in ids])
    batch["timestep"] = torch.tensor([timestep_of(row, int(draw), noise) for row, _, draw in ids])
    return batch
