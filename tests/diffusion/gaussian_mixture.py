"""A mixture of normal distributions on the line, whose best denoiser is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    weights: Tensor
    means: Tensor
    deviations: Tensor

    @classmethod
    def two_humps(cls) -> GaussianMixture:
        values = ([0.3, 0.7], [-1.0, 0.8], [0.25, 0.4])
        return cls(*(torch.tensor(v, dtype=torch.float64) for v in values))

    def density(self, x: Tensor) -> Tensor:
        return self._terms(x, self.means, self.deviations).sum(-1)

    def best_epsilon(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """-sigma times the score of x_t, itself a mixture with means alpha mu and variances alpha² s² + sigma²."""
        means, deviations = alpha * self.means, ((alpha * self.deviations) ** 2 + sigma**2).sqrt()
        terms = self._terms(x_t, means, deviations)
        slopes = -(x_t[..., None] - means) / deviations**2
        return -sigma * (terms * slopes).sum(-1) / terms.sum(-1)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] by summing over a fine grid of x0: a second way, which knows nothing of scores."""
        grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
        log_likelihood = -((x_t[..., None] - alpha * grid) ** 2) / (2 * sigma**2)
        weights = self.density(grid) * (log_likelihood - log_likelihood.max(-1, keepdim=True).values).exp()
        return (weights * grid).sum(-1) / weights.sum(-1)

    def _terms(self, x: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
        return self.weights / deviations * (-((x[..., None] - means) ** 2) / (2 * deviations**2)).exp()
