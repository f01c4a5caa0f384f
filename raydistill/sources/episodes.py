"""Episodes of frames and actions: finding them, reading one, and cutting it into clips."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from raydistill.config.world import EpisodesSource
from raydistill.errors import ConfigError, DataError
from raydistill.signals import JsonValue
from raydistill.sources.files import DataFile, content_hashes, listed, open_uri
from raydistill.sources.games import play

EPISODES_VERSION = 1
"""Raised when the same files, games and settings would give other clips."""
SUFFIXES = (".npz", ".parquet", ".mp4")


@dataclass(frozen=True, slots=True, order=True)
class EpisodeRef:
    """Where an episode is."""

    name: str
    """What row ids carry."""
    uri: str
    """Its file; empty for a game that is played."""
    number: int
    """Row of a Parquet file, or number of the game."""
    domain: str = ""
    """Domain of the source that it belongs to; empty for none."""


@dataclass(frozen=True, slots=True)
class Episode:
    """N frames [N, H, W, 3] uint8, and the N - 1 actions [N - 1] int64 between them."""

    name: str
    frames: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True, slots=True)
class Clip:
    """A part of an episode: T frames and T - 1 actions, of which the first `valid` steps are real."""

    row_id: str
    frames: np.ndarray
    actions: np.ndarray
    valid: int
    """Steps that the episode has; after them the last frame is repeated."""


def episode_files(source: EpisodesSource) -> list[DataFile]:
    """The files of `source.paths`, by name. `DataError` when a path gives none of a known kind."""
    found: dict[str, int] = {}
    for path in source.paths:
        matches = {u: s for u, s in listed(path, _is_episode)[1].items() if PurePosixPath(u).suffix in SUFFIXES}
        if not matches:
            raise DataError(f"source.paths: {path} gives no episode; wanted {', '.join(SUFFIXES)} there.")
        found |= matches
    names = [PurePosixPath(uri).name for uri in found]
    whole = len(set(names)) == len(names)
    return sorted(
        DataFile(PurePosixPath(uri).name if whole else uri, uri, size, "text", None) for uri, size in found.items()
    )


def _is_episode(path: PurePosixPath) -> bool:
    return path.suffix in SUFFIXES and not path.name.startswith(".")


def find_episodes(source: EpisodesSource) -> list[EpisodeRef]:
    """All episodes of a source, by name; of each domain at most `max_episodes`."""
    refs = []
    for domain, part in source.parts.items():
        prefix = f"{domain}/" if domain else ""
        refs += [replace(ref, name=prefix + ref.name, domain=domain) for ref in _episodes(part)]
    return sorted(refs)


def _episodes(source: EpisodesSource) -> list[EpisodeRef]:
    if (game := source.environment) is not None:
        refs = [EpisodeRef(f"{game.id}#{number:06d}", "", number) for number in range(game.episodes)]
        return refs[: source.max_episodes]
    refs = []
    for file in episode_files(source):
        if file.uri.endswith(".parquet"):
            refs += [EpisodeRef(f"{file.name}#{row:06d}", file.uri, row) for row in range(_num_rows(file))]
        else:
            refs.append(EpisodeRef(file.name, file.uri, 0))
    return sorted(refs)[: source.max_episodes]


def _num_rows(file: DataFile) -> int:
    try:
        with open_uri(file.uri) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"source.paths: {file.uri} cannot be read as Parquet: {error}.") from error


def episodes_content(source: EpisodesSource) -> dict[str, JsonValue]:
    """What defines the clips, for the fingerprint: the files' hashes or the games' settings, and how clips are cut."""
    parts = {domain: _content(part) for domain, part in source.parts.items()}
    alone = parts.pop("", {})
    return {**alone, "domains": {**parts}} if parts else alone


def _content(source: EpisodesSource) -> dict[str, JsonValue]:
    exclude = {"paths", "action_rich", "domains"} | (set() if source.paths else {"frames_key", "actions_key"})
    settings: dict[str, JsonValue] = {**source.model_dump(mode="json", exclude=exclude), "version": EPISODES_VERSION}
    if source.environment is not None:
        return settings
    files = episode_files(source)
    videos = [file for file in files if file.uri.endswith(".mp4")]
    beside = [DataFile(_actions_file(file.name), _actions_file(file.uri), 0, "json", None) for file in videos]
    return {**settings, "files": {**content_hashes([*files, *beside])}}


def read_episode(ref: EpisodeRef, source: EpisodesSource) -> Episode:
    """An episode with frames of `source.frame_size`.

    `DataError` names the episode whose file cannot be read, whose frames and actions do not fit together or whose
    actions are none of the action space.
    """
    source = source.parts[ref.domain]
    if source.environment is not None:
        frames, actions = play(source.environment, ref.number, source.num_actions)
    elif ref.uri.endswith(".npz"):
        frames, actions = _read_npz(ref, source)
    elif ref.uri.endswith(".parquet"):
        frames, actions = _read_parquet(ref, source)
    else:
        frames, actions = _read_mp4(ref, source)
    return checked(ref.name, frames, actions, source)


def checked(name: str, frames: np.ndarray, actions: np.ndarray, source: EpisodesSource) -> Episode:
    """The episode of raw frames and actions; `DataError` for what does not fit."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise DataError(
            f"episode {name}: wanted frames [frames, height, width, 3] of uint8, found {list(frames.shape)} of "
            f"{frames.dtype}."
        )
    if actions.ndim != 1 or actions.dtype.kind not in "iu":
        raise DataError(
            f"episode {name}: wanted actions [steps] of whole numbers, found {list(actions.shape)} of {actions.dtype}."
        )
    if len(actions) not in (len(frames) - 1, len(frames)):
        raise DataError(
            f"episode {name}: wanted {len(frames) - 1} actions between its {len(frames)} frames (or {len(frames)}, the "
            f"last of which leads beyond them), found {len(actions)}; action t leads from frame t to frame t + 1."
        )
    actions = actions[: len(frames) - 1].astype(np.int64)
    if len(actions) and not 0 <= int(actions.min()) <= int(actions.max()) < source.num_actions:
        odd = next(int(a) for a in actions if not 0 <= a < source.num_actions)
        raise DataError(
            f"episode {name}: wanted actions from 0 to {source.num_actions - 1} (source.num_actions), found {odd} at "
            f"step {int(np.flatnonzero(actions == odd)[0])}."
        )
    return Episode(name, resized(frames, source.frame_size), actions)


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames [N, H, W, 3] uint8 brought to `size` [height, width] by averaging over areas."""
    if frames.shape[1:3] == tuple(size):
        return np.ascontiguousarray(frames)
    height, width = size
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BOX)) for f in frames])


def clips_of(episode: Episode, source: EpisodesSource) -> Iterator[Clip]:
    """The clips of an episode, every `source.step` frames; the last may be padded with its last frame."""
    length = source.clip_frames
    for start in range(0, len(episode.actions), source.step):
        frames, actions = episode.frames[start : start + length], episode.actions[start : start + length - 1]
        valid = len(actions)
        if valid < length - 1:
            pad = length - len(frames)
            frames = np.concatenate([frames, np.repeat(frames[-1:], pad, 0)])
            actions = np.concatenate([actions, np.full(length - 1 - valid, source.noop, np.int64)])
        yield Clip(f"{episode.name}@{start:06d}", frames, actions, valid)


def richness(clip: Clip, noop: int) -> float:
    """Share of the real steps of a clip that have an action other than `noop` and change the frame."""
    if not clip.valid:
        return 0.0
    changed = (clip.frames[1:] != clip.frames[:-1]).any(axis=(1, 2, 3))[: clip.valid]
    acted = clip.actions[: clip.valid] != noop
    return float((changed & acted).mean())


def _read_npz(ref: EpisodeRef, source: EpisodesSource) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open_uri(ref.uri) as stream, np.load(io.BytesIO(stream.read()), allow_pickle=False) as data:
            return _named(data, data.files, source.frames_key, ref), _named(data, data.files, source.actions_key, ref)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"episode {ref.name} cannot be read as .npz: {error}.") from error


def _named(data: Any, names: Sequence[str], key: str, ref: EpisodeRef) -> np.ndarray:
    if key not in names:
        raise DataError(
            f"episode {ref.name}: wanted {key!r}, found {', '.join(names)}; set source.frames_key and actions_key."
        )
    return np.asarray(data[key])


def _read_parquet(ref: EpisodeRef, source: EpisodesSource) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open_uri(ref.uri) as stream:
            file = pq.ParquetFile(stream)
            for key in (source.frames_key, source.actions_key):
                if key not in file.schema_arrow.names:
                    raise DataError(
                        f"episode {ref.name}: wanted the column {key!r}, found {', '.join(file.schema_arrow.names)}; "
                        "set source.frames_key and actions_key."
                    )
            row, group = ref.number, 0
            while row >= file.metadata.row_group(group).num_rows:
                row -= file.metadata.row_group(group).num_rows
                group += 1
            table = file.read_row_group(group, columns=[source.frames_key, source.actions_key])
            images = table[source.frames_key][row].as_py()
            actions = np.array(table[source.actions_key][row].as_py(), np.int64)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"episode {ref.name} cannot be read as Parquet: {error}.") from error
    try:
        frames = [np.asarray(Image.open(io.BytesIO(_bytes(image))).convert("RGB")) for image in images]
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise DataError(
            f"episode {ref.name}: wanted a list of encoded images, found one that is none: {error}."
        ) from error
    sizes = {frame.shape for frame in frames}
    if len(sizes) != 1:
        raise DataError(f"episode {ref.name}: wanted frames of one size, found {sorted(sizes)}.")
    return np.stack(frames), actions


def _bytes(image: Any) -> bytes:
    found = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(found, bytes):
        raise TypeError(f"{type(found).__name__} instead of bytes")
    return found


def _actions_file(uri: str) -> str:
    return f"{uri.removesuffix('.mp4')}.actions.json"


def _read_mp4(ref: EpisodeRef, source: EpisodesSource) -> tuple[np.ndarray, np.ndarray]:
    try:
        import av  # an optional package
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"episode {ref.name}: .mp4 wants the package av, found that it is not installed; "
            'pip install "raydistill[games]".'
        ) from error
    try:
        with open_uri(ref.uri) as stream, av.open(io.BytesIO(stream.read()), "r") as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise DataError(f"episode {ref.name} cannot be read as a video: {error}.") from error
    beside = _actions_file(ref.uri)
    try:
        with open_uri(beside) as stream:
            found = json.loads(stream.read())
        actions = np.array(found[source.actions_key] if isinstance(found, dict) else found)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"episode {ref.name}: wanted its actions in {beside} (a list, or a map with {source.actions_key!r}), "
            f"found: {error}."
        ) from error
    if not frames:
        raise DataError(f"episode {ref.name}: wanted frames, found a video without any.")
    return np.stack(frames), actions
