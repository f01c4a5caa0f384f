"""Held-out draws in memory, with the predictions of tiny denoisers, for the tests of image evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from denoiser_toys import batch_of, tiny_unet, view
from torch import Tensor

from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import noise_of, timestep_of
from raydistill.evaluate.denoiser import HeldOutDraws, choose_samples, common_prediction


class MemoryDraws:
    """A data set as `DenseDataset` is one: `draws` samples of each of `rows` images, two buckets taking turns."""

    def __init__(self, rows: int, draws: int, *, cached: bool = True):
        self.noise = NoiseConfig(draws_per_row=draws)
        self.names = [(f"img/{r}@x.png", d) for r in range(rows) for d in range(draws)]
        self.images = batch_of(rows, seed=3)
        self.cached = cached
        self.predictions: dict[str, Tensor] = {}

    @property
    def num_rows(self) -> int:
        return len(self.names)

    @property
    def buckets(self) -> np.ndarray:
        return np.array([self._row(i) % 2 for i in range(self.num_rows)])

    def row_ids(self, indices: Sequence[int]) -> list[str]:
        return [f"{self.names[i][0]}@{self.names[i][1]}" for i in indices]

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [f"caption {self._row(i)}" for i in indices]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.tensor([self._row(i) for i in indices])
        batch = {name: tensor[rows] for name, tensor in self.images.items() if name not in ("noise", "timestep")}
        if self.cached:
            shape = batch["latents"].shape[1:]
            batch["noise"] = torch.stack([noise_of(*self.names[i], shape, self.noise.seed) for i in indices])
            batch["timestep"] = torch.tensor([timestep_of(*self.names[i], self.noise) for i in indices])
            batch |= {name: tensor[torch.tensor(list(indices))] for name, tensor in self.predictions.items()}
        return batch

    def _row(self, index: int) -> int:
        return index // self.noise.draws_per_row


def toy_draws(
    *, weights: dict[str, float] | None = None, rows: int = 5, draws: int = 4, most: int = 4, bins: int = 4,
    batch_rows: int = 3, averaged: bool = False,
) -> HeldOutDraws:  # fmt: skip
    """Draws with the fp32 predictions of one tiny UNet per teacher (seeds 0, 1, …), or with their mean alone."""
    weights = {"t": 1.0} if weights is None else weights
    dataset = MemoryDraws(rows, draws, cached=bool(weights))
    if weights:
        batch = dataset.batch(range(dataset.num_rows))
        with torch.no_grad():
            found = {n: common_prediction(tiny_unet(seed=i), batch, "epsilon")[0] for i, n in enumerate(weights)}
        dataset.predictions = {f"{name}/prediction": value for name, value in found.items()}
        mean = torch.stack([w * found[n].double() for n, w in weights.items()]).sum(0)
        spread = [w * (found[n].double() - mean).square().flatten(1).mean(1) for n, w in weights.items()]
        if averaged:
            dataset.predictions = {"average/prediction": mean, "average/variance": torch.stack(spread).sum(0)}
    return HeldOutDraws(
        dataset=dataset,
        samples=tuple(choose_samples(dataset.row_ids(range(dataset.num_rows)), most, cached=bool(weights))),
        teachers=() if averaged else tuple(view(name, weight) for name, weight in weights.items()),
        averaged=averaged,
        kind="epsilon",
        noise=dataset.noise if weights else dataset.noise.model_copy(update={"draws_per_row": most}),
        bins=bins,
        batch_rows=batch_rows,
    )
