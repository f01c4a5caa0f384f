"""Draws: streams apart from each other, strata filled evenly, and the same numbers wherever they are drawn."""

import numpy as np
import pytest
import torch

from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import caption_dropped, noise_of, noise_sha, timestep_of

ROWS = [f"row{i}" for i in range(4000)]


def test_noise_and_timestep_of_a_row_never_change():
    noise = noise_of("cat.png", 3, (2, 2), seed=7)
    assert noise.dtype == torch.float32
    assert noise_sha(noise).hex() == "44ebc4e8102f47b9"
    assert timestep_of("cat.png", 3, NoiseConfig(draws_per_row=4, seed=7)) == 814


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_depends_on_neither_threads_nor_default_dtype(threads, default):
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    wanted = noise_sha(noise_of("a", 0, (4, 16, 16), seed=0))
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)
    try:
        noise = noise_of("a", 0, (4, 16, 16), seed=0)
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)
    assert noise_sha(noise) == wanted


def test_noise_is_standard_normal():
    values = torch.cat([noise_of(row, 0, (64,), seed=0) for row in ROWS[:1000]]).double()
    assert abs(values.mean()) < 5 / len(values) ** 0.5
    assert abs(values.var() - 1) < 5 * (2 / len(values)) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / len(values)) ** 0.5


@pytest.mark.parametrize("draw", range(4))
def test_each_draw_fills_its_own_stratum_evenly(draw):
    noise = NoiseConfig(draws_per_row=4, timesteps=(100, 900))
    found = np.array([timestep_of(row, draw, noise) for row in ROWS])
    low, high = 100 + 200 * draw, 300 + 200 * draw
    assert low <= found.min()
    assert found.max() < high
    counts = np.histogram(found, bins=10, range=(low, high))[0]
    expected = len(ROWS) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 35  # chi², 9 degrees of freedom: passed by all but 1 in 10⁴


def test_strata_that_do_not_divide_the_range_still_cover_it_evenly():
    noise = NoiseConfig(draws_per_row=3, timesteps=(0, 10))
    counts = np.bincount([timestep_of(row, d, noise) for row in ROWS for d in range(3)], minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 1200).max() < 5 * 1200**0.5


def test_one_timestep_is_always_that_one():
    assert {timestep_of(row, 0, NoiseConfig(timesteps=(999, 1000))) for row in ROWS[:50]} == {999}


def test_noise_says_nothing_about_timestep_or_dropped_captions():
    config = NoiseConfig(caption_dropout=0.5)
    noise = np.array([float(noise_of(row, 0, (1,), config.seed)) for row in ROWS])
    times = np.array([timestep_of(row, 0, config) for row in ROWS])
    dropped = np.array([caption_dropped(row, 0, config) for row in ROWS])
    correlations = np.corrcoef(np.stack([noise, noise**2, times, dropped]))[np.triu_indices(4, 1)]
    correlations = np.delete(correlations, 0)  # that of the noise with its own square
    assert np.abs(correlations).max() < 5 / len(ROWS) ** 0.5


@pytest.mark.parametrize(
    ("one", "other"), [(("a", 0, 0), ("b", 0, 0)), (("a", 0, 0), ("a", 1, 0)), (("a", 0, 0), ("a", 0, 1))]
)
def test_another_row_draw_or_seed_has_other_noise(one, other):
    (row, draw, seed), (row2, draw2, seed2) = one, other
    assert noise_sha(noise_of(row, draw, (4,), seed)) != noise_sha(noise_of(row2, draw2, (4,), seed2))


def test_captions_are_dropped_at_the_given_rate():
    rate = np.mean([caption_dropped(row, 0, NoiseConfig(caption_dropout=0.1)) for row in ROWS])
    assert abs(rate - 0.1) < 5 * (0.09 / len(ROWS)) ** 0.5
    assert not any(caption_dropped(row, 0, NoiseConfig()) for row in ROWS)


def test_hash_is_of_the_values_not_of_their_place_in_memory():
    noise = noise_of("a", 0, (4, 6), seed=0)
    assert noise_sha(noise.T.contiguous().T) == noise_sha(noise)
    assert noise_sha(noise + 1e-6) != noise_sha(noise)
