"""Play a world model: `python -m raydistill.evaluate.play MODEL --start FILE --actions 1112333 --out play.gif`.

MODEL is the folder of an export (or of a run's init). The first frame comes from an image, from the first frame of an
`.npz` episode, or from a game (`--game crafter`, with the `--arguments` that the model's episodes were played with, so
that it sees what it knows). Actions are digits, or numbers with commas; where the model knows at
most 10, one digit is one step. `--strip` writes a film strip beside the animation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, UnidentifiedImageError

from raydistill.config.world import Environment
from raydistill.errors import ConfigError, DataError, RaydistillError
from raydistill.evaluate.world_pictures import animation, strip
from raydistill.models.sources import resolve_source
from raydistill.models.world.files import load_world_folder
from raydistill.models.world.model import WorldNetwork
from raydistill.sources.episodes import resized
from raydistill.sources.games import make_game


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the animation; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        folder = resolve_source(options.model)
        if not isinstance(folder, Path):
            raise DataError(f"wanted the folder of a world model, found nothing at {options.model}.")
        network = load_world_folder(folder, dtype=torch.float32)
        frames = rolled_out(network, first_frame(options, network), read_actions(options.actions, network.num_actions))
        out = Path(options.out)
        out.write_bytes(animation(frames, fps=options.fps, scale=options.scale))
        if options.strip:
            out.with_suffix(".png").write_bytes(strip(frames))
    except RaydistillError as error:
        print(f"play: error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{out}: {len(frames)} frames")
    return 0


def rolled_out(network: WorldNetwork, first: torch.Tensor, actions: list[int]) -> torch.Tensor:
    """Frames [1 + steps, C, H, W]: the first, and what the model makes of the actions."""
    made = network.rollout(first[None, None], torch.tensor([actions]))[0]
    return torch.cat([first[None], made.float()])


def read_actions(text: str, num_actions: int) -> list[int]:
    """Actions from digits or from numbers with commas; `ConfigError` for one that the model does not know."""
    parts = [part for part in text.split(",") if part.strip()] if "," in text else list(text.replace(" ", ""))
    if not parts or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--actions: wanted digits such as 11223, or numbers with commas, found {text!r}.")
    actions = [int(part) for part in parts]
    if max(actions) >= num_actions:
        raise ConfigError(f"--actions: wanted actions from 0 to {num_actions - 1}, found {max(actions)}.")
    return actions


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a game, a map in YAML."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"wanted a map such as {{area: [32, 32]}}, found {text!r}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"wanted a map such as {{area: [32, 32]}}, found {text!r}")
    return found


def first_frame(options: argparse.Namespace, network: WorldNetwork) -> torch.Tensor:
    """The frame that the model begins with, [C, H, W] in [0, 1]."""
    if (options.start is None) == (options.game is None):
        raise ConfigError("wanted exactly one of --start FILE and --game ID to begin with.")
    if options.game is not None:
        game = make_game(Environment(id=options.game, episodes=1, arguments=options.arguments), options.seed)
        frame = game.reset()
    else:
        frame = _read(Path(options.start))
    small = resized(frame[None], network.sizes.frame_size)[0]
    return torch.from_numpy(small.transpose(2, 0, 1).copy()).float() / 255


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as data:
                return np.asarray(data["frames"][0])
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, KeyError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"--start: wanted an image or an .npz episode in {path}, found: {error}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m raydistill.evaluate.play", description="Play a world model.")
    parser.add_argument("model", help="folder of an export")
    parser.add_argument("--start", help="image or .npz episode to begin with")
    parser.add_argument("--game", help="game to take the first frame from, e.g. crafter or ALE/Boxing-v5")
    parser.add_argument(
        "--arguments", type=read_arguments, default={}, help="of the game, as YAML, e.g. '{area: [32, 32]}'"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the game")
    parser.add_argument("--actions", required=True, help="actions, e.g. 111222 or 3,3,14")
    parser.add_argument("--out", default="play.gif", help="file to write")
    parser.add_argument("--fps", type=float, default=5.0, help="frames per second of the animation")
    parser.add_argument("--scale", type=int, default=4, help="times that pixels are enlarged")
    parser.add_argument("--strip", action="store_true", help="also write a film strip (.png)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
