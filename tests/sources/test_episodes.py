"""Episodes out of files and games: what is read, how clips are cut, and what is refused with which words."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from world_toys import SIDE, block_game

from raydistill.config.world import Environment, EpisodesSource
from raydistill.errors import ConfigError, DataError
from raydistill.sources.episodes import (
    Episode,
    clips_of,
    episodes_content,
    find_episodes,
    read_episode,
    richness,
)
from raydistill.sources.games import episode_seed, make_game, play, require_game


def source(folder: Path, pattern: str = "", **changes: Any) -> EpisodesSource:
    path = str(folder / pattern) if pattern else str(folder)
    settings = {"kind": "episodes", "paths": [path], "frame_size": [SIDE, SIDE], "num_actions": 5, "clip_frames": 5}
    return EpisodesSource.model_validate({**settings, **changes})


def encoded(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


class BlockGame:
    """The toy game with Gymnasium's interface; a user's own environment."""

    class _Space:
        n = 5

    action_space = _Space()

    def __init__(self, length: int = 50):
        self._length = length

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, object]]:
        self._frames, _ = block_game(self._length, seed)
        self._at = 0
        return self._frames[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self._at += 1
        return self._frames[self._at], 0.0, self._at == self._length, False, {}


def test_npz_parquet_and_mp4_hold_the_same_episode(tmp_path: Path) -> None:
    frames, actions = block_game(9, seed=0)
    np.savez(tmp_path / "a.npz", frames=frames, actions=actions)
    table = pa.table({"frames": [[encoded(f) for f in frames]] * 2, "actions": [actions.tolist()] * 2})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    found = [read_episode(ref, source(tmp_path)) for ref in find_episodes(source(tmp_path))]
    assert [episode.name for episode in found] == ["a.npz", "b.parquet#000000", "b.parquet#000001"]
    for episode in found:
        assert np.array_equal(episode.frames, frames)
        assert np.array_equal(episode.actions, actions)


def test_a_video_beside_its_actions(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames, actions = block_game(9, seed=0)
    big = np.kron(frames, np.ones((1, 8, 8, 1), np.uint8))
    with av.open(str(tmp_path / "x.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width = stream.height = big.shape[1]
        stream.bit_rate = 4_000_000
        for image in big:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode())
    with pytest.raises(DataError, match=r"x\.actions\.json"):
        read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))
    (tmp_path / "x.actions.json").write_text(json.dumps({"actions": actions.tolist()}))
    episode = read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))
    assert np.array_equal(episode.actions, actions)
    assert np.abs(episode.frames.astype(int) - frames).mean() < 12  # the codec loses some


def test_clips_share_one_frame_and_no_step_and_the_last_is_padded() -> None:
    frames, actions = block_game(9, seed=1)
    whole = EpisodesSource.model_validate(source(Path("/x")).model_dump())
    clips = list(clips_of(Episode("e", frames, actions), whole))
    assert [clip.row_id for clip in clips] == ["e@000000", "e@000004", "e@000008"]
    assert [clip.valid for clip in clips] == [4, 4, 1]
    assert np.array_equal(np.concatenate([c.actions[: c.valid] for c in clips]), actions)
    for clip in clips:
        assert clip.frames.shape == (5, SIDE, SIDE, 3)
        assert len(clip.actions) == 4
    assert np.array_equal(clips[1].frames[0], clips[0].frames[-1])
    assert (clips[2].frames[1:] == clips[2].frames[1]).all()


def test_richness_counts_steps_that_act_and_change_something() -> None:
    frames = np.zeros((5, 2, 2, 3), np.uint8)
    frames[2:] = 1  # only the second step changes something
    (clip,) = clips_of(Episode("e", frames, np.array([1, 1, 0, 0])), source(Path("/x")))
    assert richness(clip, noop=0) == pytest.approx(1 / 4)
    assert richness(clip, noop=1) == 0


def test_frames_are_averaged_over_areas(tmp_path: Path) -> None:
    frames, actions = block_game(4, seed=0)
    np.savez(tmp_path / "a.npz", frames=np.kron(frames, np.ones((1, 2, 2, 1), np.uint8)), actions=actions)
    episode = read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))
    assert np.array_equal(episode.frames, frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros(7, np.int64)}, r"a\.npz: wanted 9 actions between its 10 frames.*found 7"),
        (
            {"actions": np.array([0] * 8 + [5])},
            r"wanted actions from 0 to 4 \(source\.num_actions\), found 5 at step 8",
        ),
        ({"actions": np.zeros(9)}, r"wanted actions \[steps\] of whole numbers, found \[9\] of float64"),
        ({"frames": np.zeros((10, 12, 12), np.uint8)}, r"wanted frames \[frames, height, width, 3\] of uint8"),
        ({"frames": np.zeros((10, 12, 12, 3))}, "found .* of float64"),
    ],
)
def test_what_does_not_fit_is_named_with_its_episode(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    frames, actions = block_game(9, seed=0)
    np.savez(tmp_path / "a.npz", **{"frames": frames, "actions": actions, **change})
    with pytest.raises(DataError, match=message):
        read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"episode a\.npz cannot be read as \.npz"):
        read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))
    np.savez(tmp_path / "a.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match=r"wanted .frames., found pictures; set source\.frames_key"):
        read_episode(find_episodes(source(tmp_path))[0], source(tmp_path))
    with pytest.raises(DataError, match="gives no episode"):
        find_episodes(source(tmp_path, "*.zip"))


def test_changed_files_are_another_source_and_weights_are_not(tmp_path: Path) -> None:
    frames, actions = block_game(9, seed=0)
    np.savez(tmp_path / "a.npz", frames=frames, actions=actions)
    before = episodes_content(source(tmp_path))
    assert episodes_content(source(tmp_path, action_rich=3.0)) == before
    np.savez(tmp_path / "a.npz", frames=frames, actions=(actions + 1) % 5)
    assert episodes_content(source(tmp_path)) != before


def test_a_game_is_the_same_from_its_seed_and_others_from_others() -> None:
    game = Environment(id="test_episodes:BlockGame", episodes=3, steps=12)
    one, again, other = play(game, 0, 5), play(game, 0, 5), play(game, 1, 5)
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])
    assert not np.array_equal(one[1], other[1])
    assert len(one[0]) == len(one[1]) + 1 == 13
    assert episode_seed(game, 0) != episode_seed(game.model_copy(update={"seed": 1}), 0)


def test_an_episode_ends_where_the_game_does() -> None:
    game = Environment(id="test_episodes:BlockGame", arguments={"length": 4}, episodes=1, steps=12)
    frames, actions = play(game, 0, 5)
    assert (len(frames), len(actions)) == (5, 4)


def test_games_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no_such_package, found that it is not installed"):
        make_game(Environment(id="no_such_package:Game", episodes=1), 0)
    with pytest.raises(ConfigError, match="found no 'Nobody' in test_episodes"):
        make_game(Environment(id="test_episodes:Nobody", episodes=1), 0)
    with pytest.raises(ConfigError, match=r"wanted at most the 5 actions of test_episodes:BlockGame, found 6"):
        require_game(Environment(id="test_episodes:BlockGame", episodes=1), 6)
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ConfigError, match=r"crafter wants the package crafter.*raydistill\[games\]"):
        make_game(Environment(id="crafter", episodes=1), 0)


def test_crafter_and_atari_are_played_headless() -> None:
    pytest.importorskip("crafter")
    pytest.importorskip("ale_py")
    arguments = {"area": [16, 16], "view": [5, 5], "size": [20, 20]}
    crafter = Environment.model_validate({"id": "crafter", "arguments": arguments, "episodes": 1, "steps": 3})
    frames, actions = play(crafter, 0, 6)
    assert frames.shape == (4, 20, 20, 3)
    again, _ = play(crafter, 0, 6)
    assert np.array_equal(frames, again)
    boxing = Environment(id="ALE/Boxing-v5", episodes=1, steps=3)
    frames, actions = play(boxing, 0, 18)
    assert frames.shape == (4, 210, 160, 3)
    assert len(actions) == 3
    with pytest.raises(ConfigError, match="ALE/NoSuchGame-v5 cannot be made"):
        make_game(Environment(id="ALE/NoSuchGame-v5", episodes=1), 0)


def two_domains(folder: Path, **changes: Any) -> EpisodesSource:
    """Files of one folder, of another with the same names, and a game with fewer actions."""
    for domain in ("games", "platformers"):
        (folder / domain).mkdir(exist_ok=True)
        for i in range(3):
            frames, actions = block_game(6, seed=i + 10 * len(domain))
            np.savez(folder / domain / f"{i}.npz", frames=frames, actions=actions)
    game = {"id": "test_episodes:BlockGame", "episodes": 4, "steps": 7}
    domains = {
        "platformers": {"paths": [str(folder / "platformers")]},
        "blocks": {"environment": game, "num_actions": 3},
    }
    return source(folder / "games", **{"domains": domains, **changes})


def test_domains_are_files_and_games_of_their_own_whose_episodes_begin_with_their_names(tmp_path: Path) -> None:
    whole = two_domains(tmp_path)
    refs = find_episodes(whole)
    names = [ref.name for ref in refs]
    assert names == sorted(names)
    assert [n for n in names if n.startswith("platformers/")] == [f"platformers/{i}.npz" for i in range(3)]
    assert [n for n in names if n.startswith("blocks/")] == [
        f"blocks/test_episodes:BlockGame#{i:06d}" for i in range(4)
    ]
    assert [n for n in names if "/" not in n] == ["0.npz", "1.npz", "2.npz"]
    read = {ref.name: read_episode(ref, whole) for ref in refs}
    frames, actions = block_game(6, seed=1 + 10 * len("platformers"))
    assert np.array_equal(read["platformers/1.npz"].frames, frames)
    assert np.array_equal(read["platformers/1.npz"].actions, actions)
    played = [e.actions for name, e in read.items() if name.startswith("blocks/")]
    assert int(np.concatenate(played).max()) == 2  # of three actions
    assert len(find_episodes(two_domains(tmp_path, max_episodes=2))) == 6


def test_domains_are_part_of_what_a_cache_is_and_a_source_without_them_is_what_it_was(tmp_path: Path) -> None:
    whole = two_domains(tmp_path)
    alone = source(tmp_path / "games")
    assert "domains" not in episodes_content(alone)
    content: Any = episodes_content(whole)
    assert {k: v for k, v in content.items() if k != "domains"} == episodes_content(alone)
    assert {*content["domains"]} == {"platformers", "blocks"}
    assert content["domains"]["blocks"]["environment"]["episodes"] == 4
    only = source(tmp_path / "games", paths=[], domains={"platformers": {"paths": [str(tmp_path / "platformers")]}})
    assert {ref.domain for ref in find_episodes(only)} == {"platformers"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": []}, "wanted exactly one of paths and environment, or domains"),
        ({"domains": {"a": {}}}, "wanted exactly one of paths and environment"),
        (
            {"domains": {"a": {"paths": ["x"], "num_actions": 9}}},
            r"domains\.a\.num_actions: wanted at most num_actions",
        ),
        ({"domains": {"a/b": {"paths": ["x"]}}}, "should match pattern"),
    ],
)
def test_domains_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **changes)
