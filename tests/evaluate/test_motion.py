"""Numbers of how videos move, on videos that are made to show them."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn

from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.convergence import converged
from raydistill.evaluate.motion import drift, motion
from raydistill.evaluate.video_features import VideoExtractor, video_distance
from raydistill.sources.films import mp4, webp


def noise(videos: int, frames: int, seed: int = 0) -> Tensor:
    return torch.rand(videos, 3, frames, 6, 8, generator=torch.Generator().manual_seed(seed))


def test_a_still_video_is_similar_to_itself_and_does_not_change() -> None:
    still = noise(2, 1).expand(-1, -1, 7, -1, -1)
    found = motion(still, seams=(3,))
    assert found["frame_similarity"] == pytest.approx(1)
    assert found["frame_change"] == 0
    assert found["seam_change"] is None
    assert motion(torch.ones(1, 3, 4, 6, 8))["frame_similarity"] == 1


def test_frames_of_noise_are_not_similar_and_opposite_frames_are_less() -> None:
    independent = torch.rand(8, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    assert motion(independent)["frame_similarity"] == pytest.approx(0, abs=0.02)
    assert motion(independent)["frame_change"] == pytest.approx(1 / 3, abs=0.01)
    frame = noise(1, 1)
    assert motion(torch.cat([frame, 1 - frame], 2))["frame_similarity"] == pytest.approx(-1)


def test_a_jump_between_chunks_shows_as_a_multiple_of_the_change_inside_them() -> None:
    level = torch.tensor([0.0, 0.01, 0.02, 0.07, 0.08, 0.09]).view(1, 1, 6, 1, 1).expand(1, 3, 6, 4, 4)
    assert motion(level, seams=(3,))["seam_change"] == pytest.approx(5)
    assert motion(level[:, :, :3], seams=(1,))["seam_change"] == pytest.approx(1)


def test_drift_is_the_change_of_brightness_and_contrast_since_the_first_frames() -> None:
    frame = noise(1, 1) / 4
    away = torch.tensor([0.0, 0.0, 0.1, 0.2, 0.4, 0.4]).view(1, 1, 6, 1, 1)
    found = drift(frame + away, window=2)
    wanted = [v / 2**0.5 for v in (0.0, 0.0, 0.1, 0.2, 0.4, 0.4)]  # of mean and deviation only the mean moves
    assert found["by_frame"] == pytest.approx(wanted, abs=1e-6)
    assert found["drift"] == pytest.approx(0.4 / 2**0.5)
    assert drift(frame.expand(-1, -1, 6, -1, -1), window=2)["drift"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("errors", "step"),
    [
        ([8, 4, 2, 1, 0.5, 0.25], None),
        ([8, 4, 2, 1.000, 0.999, 0.999, 0.998], 70),
        ([8, 1, 1, 1, 1, 1], 50),
        ([5, 1, 3, 1, 2, 1], 50),
        ([1, 1, 1], None),
        ([0, 0, 0, 0], 40),
    ],
)
def test_a_training_has_converged_where_its_least_error_stops_falling(errors: list[float], step: int | None) -> None:
    assert converged([10 * (i + 1) for i in range(len(errors))], errors)["step"] == step


def test_a_late_improvement_takes_convergence_back() -> None:
    assert converged(range(8), [1, 1, 1, 1, 1, 1, 1, 0.5])["step"] is None
    assert converged(range(8), [1, 1, 1, 1, 1, 1, 1, 0.5])["gain"] == pytest.approx(0.5)


def pictures(video: Tensor) -> np.ndarray:
    return (255 * video).round().byte().permute(1, 2, 3, 0).numpy()


def test_an_mp4_has_the_frames_and_their_rate() -> None:
    ramp = torch.linspace(0.1, 0.9, 5).view(1, 5, 1, 1).expand(3, 5, 33, 48)
    with av.open(io.BytesIO(mp4(ramp, fps=12))) as file:
        stream = file.streams.video[0]
        rate, frames = float(stream.average_rate or 0), [f.to_ndarray(format="rgb24") for f in file.decode(stream)]
    assert rate == pytest.approx(12)
    assert len(frames) == 5
    assert frames[0].shape == (34, 48, 3), "odd sides are made even"
    assert np.abs(np.stack(frames)[:, :33].astype(float) - pictures(ramp)).mean() < 4


def test_an_animation_has_the_very_pixels() -> None:
    video = noise(1, 4)[0]
    with Image.open(io.BytesIO(webp(video, fps=8))) as image:
        found = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
        assert image.info["loop"] == 0
        assert image.info["duration"] == 125
    assert np.array_equal(found, pictures(video))


class Means(nn.Module):
    """Mean of each colour and its change over time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3, 4)), (x[:, :, 1:] - x[:, :, :-1]).mean((2, 3, 4))], 1)


def test_the_distance_of_videos_is_named_after_the_extractor_and_told_with_their_number(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    extractor = VideoExtractor(str(tmp_path / "means.pt"), 4, torch.device("cpu"))
    a, b = noise(16, 3).unbind(0), noise(16, 3, seed=1).unbind(0)
    seen, dark = extractor(a), extractor(v / 2 for v in b)
    same, apart = (video_distance(extractor.name, seen, other, remedy="make more") for other in (seen, dark))
    assert same["extractor"] == "means"
    assert (same["generated"], same["held_out"], same["dimensions"], same["reliable"]) == (16, 16, 6, True)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert float(str(apart["frechet_distance"])) > 0.1
    with pytest.raises(ConfigError, match=r"evaluate\.videos\.feature_extractor: wanted a TorchScript file"):
        VideoExtractor(str(tmp_path), 4, torch.device("cpu"))
    with pytest.raises(DataError, match=r"at least 2 generated and 2 held-out videos.*found 1 and 16; make more"):
        video_distance(extractor.name, seen[:1], seen, remedy="make more")
