"""I3D, the video classifier behind FVD: Inception with its filters inflated over time, trained on Kinetics-400.

The architecture is that of the first release, with TensorFlow's padding; its weights are read from the NumPy arrays of
a published checkpoint (`i3d-kinetics-400.ckpt`). Source: Carreira and Zisserman 2017, arXiv 1705.07750, Fig. 3.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from numpy._core.multiarray import _reconstruct
from torch import Tensor, nn
from torch.nn import functional as F

from raydistill.errors import DataError

SIZE = 224
"""Height and width of the frames that the network was trained on."""
CLASSES = 400
LEAST_FRAMES = 9
"""Frames below which nothing is left for the last pooling over time."""
EPSILON = 1e-3
"""Of batch normalisation."""
MIXED: Mapping[str, tuple[int, int, int, int, int, int, int]] = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels of the Inception modules: in; of the first branch; between and out of the second and third; of the last."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and after an axis so that ceil(size / stride) places come out; the odd one goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def padded(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int], value: float) -> Tensor:
    """x [b, c, t, h, w] with the padding of a convolution or pooling."""
    sides = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.pad(x, [side for pair in reversed(sides) for side in pair], value=value)


class Unit(nn.Conv3d):
    """Convolution, batch normalisation (folded into its numbers) and ReLU."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1):
        super().__init__(width, out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        return super().forward(padded(x, (k, k, k), (s, s, s), 0.0)).relu()


class Pool(nn.Module):
    """Largest value of each window."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(padded(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception module: four branches side by side."""

    def __init__(self, width: int, a: int, b: int, b_out: int, c: int, c_out: int, d: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(Unit(width, a)),
                nn.Sequential(Unit(width, b), Unit(b, b_out, 3)),
                nn.Sequential(Unit(width, c), Unit(c, c_out, 3)),
                nn.Sequential(Pool((3, 3, 3), (1, 1, 1)), Unit(width, d)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class I3D(nn.Module):
    """Logits of the 400 classes of Kinetics, averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        halves = Pool((1, 3, 3), (1, 2, 2))
        mixed = {name: Mixed(*channels) for name, channels in MIXED.items()}
        self.body = nn.Sequential(
            Unit(3, 64, 7, 2), halves, Unit(64, 64), Unit(64, 192, 3), halves,
            mixed["Mixed_3b"], mixed["Mixed_3c"], Pool((3, 3, 3), (2, 2, 2)),
            *(mixed[f"Mixed_4{letter}"] for letter in "bcdef"), Pool((2, 2, 2), (2, 2, 2)),
            mixed["Mixed_5b"], mixed["Mixed_5c"],
        )  # fmt: skip
        self.head = nn.Conv3d(1024, CLASSES, 1)

    def forward(self, x: Float[Tensor, "b 3 t 224 224"]) -> Float[Tensor, "b 400"]:
        """Of videos with values in [-1, 1] and at least `LEAST_FRAMES` frames."""
        return self.head(F.avg_pool3d(self.body(x), (2, 7, 7), stride=1)).mean((2, 3, 4))


def load_i3d(path: Path) -> I3D:
    """The network with the weights of a published checkpoint; `DataError` when the file is none."""
    with path.open("rb") as file:
        arrays = _arrays(file, path)
    with torch.device("meta"):
        network = I3D()
    units = [module for module in network.modules() if isinstance(module, Unit)]
    state = {}
    names = {module: name for name, module in network.named_modules()}
    for place, unit in zip(_places(), units, strict=True):
        kernel = _array(arrays, ("params", *place, "Conv_0", "kernel"), path)
        shift = _array(arrays, ("params", *place, "BatchNorm_0", "bias"), path)
        mean, variance = (_array(arrays, ("batch_stats", *place, "BatchNorm_0", of), path) for of in ("mean", "var"))
        scale = (variance + EPSILON).rsqrt()
        state[f"{names[unit]}.weight"] = (kernel * scale).permute(4, 3, 0, 1, 2)
        state[f"{names[unit]}.bias"] = (shift - mean * scale).flatten()
    last = ("params", "Logits/Conv3d_0c_1x1", "Conv_0")
    state["head.weight"] = _array(arrays, (*last, "kernel"), path).permute(4, 3, 0, 1, 2)
    state["head.bias"] = _array(arrays, (*last, "bias"), path)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise DataError(
            f"{path}: wanted the weights of I3D, found others: {str(error).splitlines()[-1].strip()}"
        ) from error
    return network.float().eval().requires_grad_(False)


def _places() -> list[tuple[str, ...]]:
    """Where the file has each `Unit` of the network, in the network's order."""
    branches = ("0/Conv3d_0a_1x1", "1/Conv3d_0a_1x1", "1/Conv3d_0b_3x3", "2/Conv3d_0a_1x1", "2/Conv3d_0b_3x3",
                "3/Conv3d_0b_1x1")  # fmt: skip
    mixed = [(name, f"Branch_{branch}") for name in MIXED for branch in branches]
    return [("Conv3d_1a_7x7",), ("Conv3d_2b_1x1",), ("Conv3d_2c_3x3",), *mixed]


class _OnlyArrays(pickle.Unpickler):
    """Reads pickles of NumPy arrays in plain containers, and calls nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> object:
        match module.replace("numpy.core.", "numpy._core."), name:
            case "numpy._core.multiarray", "_reconstruct":
                return _reconstruct
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


def _arrays(file: IO[bytes], path: Path) -> object:
    try:
        return _OnlyArrays(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise DataError(
            f"{path}: wanted a checkpoint of I3D, a pickle of NumPy arrays alone, found another file: {error}. "
            "docs/video.md says where the published one is had."
        ) from error


def _array(tree: object, place: tuple[str, ...], path: Path) -> Tensor:
    for name in place:
        if not isinstance(tree, Mapping) or name not in tree:
            raise DataError(f"{path}: wanted the weights of I3D, found no {'/'.join(place)} in it.")
        tree = tree[name]
    if not isinstance(tree, np.ndarray) or tree.dtype != np.float32:
        raise DataError(f"{path}: {'/'.join(place)}: wanted an array of float32, found {type(tree).__name__}.")
    return torch.from_numpy(tree.copy())
