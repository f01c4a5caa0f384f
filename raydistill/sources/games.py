"""Games that are stepped without a screen: a random player records what it sees and does.

Everything is drawn from the episode's seed, so an episode is the same on whichever machine and actor it is played.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from raydistill.config.world import Environment
from raydistill.errors import ConfigError, DataError
from raydistill.models.world.actions import repeated_actions
from raydistill.signals import sample_seed

ENGINES = {"crafter": ("crafter",), "ALE/": ("gymnasium", "ale_py")}
"""Packages that kinds of games need, by the beginning of their id; others need gymnasium."""


class Game(Protocol):
    """What is asked of an environment."""

    def reset(self) -> np.ndarray:
        """The first frame [H, W, 3] uint8."""

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        """The frame after an action, and whether the game is over."""


class CrafterGame:
    """Crafter. Its seed is an argument of its constructor."""

    def __init__(self, environment: Environment, seed: int):
        arguments: dict[str, Any] = dict(environment.arguments)
        self._game: Any = _imported("crafter", environment.id).Env(seed=seed % 2**31, **arguments)
        self.num_actions = int(self._game.action_space.n)

    def reset(self) -> np.ndarray:
        return np.asarray(self._game.reset())

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        frame, _, done, _ = self._game.step(action)
        return np.asarray(frame), bool(done)


class GymnasiumGame:
    """An environment with Gymnasium's interface: one that is registered, or what a user's function returns."""

    def __init__(self, environment: Environment, seed: int):
        arguments: dict[str, Any] = dict(environment.arguments)
        self._seed = seed % 2**31
        if ":" in environment.id:
            module, _, name = environment.id.partition(":")
            function = getattr(_imported(module, environment.id), name, None)
            if function is None:
                raise ConfigError(f"source.environment.id: wanted {environment.id}, found no {name!r} in {module}.")
            self._game: Any = function(**arguments)
        else:
            self._game = _registered(environment, arguments)
        self.num_actions = int(getattr(self._game.action_space, "n", 0))
        if not self.num_actions:
            raise ConfigError(
                f"source.environment.id: wanted a game whose actions are whole numbers, found {environment.id} with "
                f"{self._game.action_space}."
            )

    def reset(self) -> np.ndarray:
        frame, _ = self._game.reset(seed=self._seed)
        return self._checked(frame)

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        frame, _, ended, cut, _ = self._game.step(action)
        return self._checked(frame), bool(ended or cut)

    def _checked(self, frame: Any) -> np.ndarray:
        array = np.asarray(frame)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise DataError(
                f"source.environment: wanted observations [height, width, 3] of uint8, found {array.shape} of "
                f"{array.dtype}; choose an environment (or a wrapper) that shows frames."
            )
        return array


def _registered(environment: Environment, arguments: dict[str, Any]) -> Any:
    gymnasium = _imported("gymnasium", environment.id)
    if environment.id.startswith("ALE/"):
        gymnasium.register_envs(_imported("ale_py", environment.id))
    try:
        return gymnasium.make(environment.id, **arguments)
    except (gymnasium.error.Error, TypeError, ModuleNotFoundError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"source.environment.id: wanted a game of Gymnasium, found that {environment.id} cannot be made: {line}. "
            "Install the package that registers it, or correct its id or arguments."
        ) from error


def _imported(module: str, game: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"source.environment.id: {game} wants the package {error.name}, found that it is not installed; "
            'pip install "raydistill[games]" (or the package itself).'
        ) from error


def make_game(environment: Environment, seed: int) -> CrafterGame | GymnasiumGame:
    """The game of an episode. `ConfigError` when its package is not installed or it cannot be made."""
    return CrafterGame(environment, seed) if environment.id == "crafter" else GymnasiumGame(environment, seed)


def require_game(environment: Environment, num_actions: int) -> None:
    """`ConfigError` unless the game can be made and knows the actions below `num_actions`."""
    found = make_game(environment, 0).num_actions
    if found < num_actions:
        raise ConfigError(
            f"source.num_actions: wanted at most the {found} actions of {environment.id}, found {num_actions}."
        )


def episode_seed(environment: Environment, number: int) -> int:
    """The seed of the game of episode `number`."""
    return sample_seed(f"{environment.id}#{number}", 0, "game", environment.seed)


def play(environment: Environment, number: int, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode `number`: frames [N, H, W, 3] uint8 and the N - 1 actions between them, of a player who draws at random.

    An action is kept for a while, which moves farther than a new one at each step.
    """
    seed = episode_seed(environment, number)
    draws = np.random.Generator(np.random.Philox(sample_seed(f"{environment.id}#{number}", 0, "player", seed)))
    actions = repeated_actions(draws, environment.steps, num_actions, environment.repeat)
    game = make_game(environment, seed)
    frames, done = [game.reset().copy()], False
    for action in actions:
        if done:
            break
        frame, done = game.step(int(action))
        frames.append(frame.copy())
    return np.stack(frames), actions[: len(frames) - 1]
