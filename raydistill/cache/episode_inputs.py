"""The inputs cache of episodes: each shard's episodes are read, or played, by one actor and cut into clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from raydistill.cache.dense import dense_name, row_sha, write_dense
from raydistill.cache.episode_batch import EPISODES_FORMAT
from raydistill.cache.ledger import Ledger, changed_hashes, is_described, read_description, write_description
from raydistill.cache.manifest import Manifest
from raydistill.cache.pool import map_shards, require_cluster
from raydistill.cache.shards import field_records, publish_record, read_records
from raydistill.config.schema import RunConfig, TeacherResources
from raydistill.config.world import EpisodesSource
from raydistill.errors import DataError
from raydistill.signals import Field, JsonValue, Schema
from raydistill.sources.episodes import Clip, EpisodeRef, clips_of, find_episodes, read_episode, richness
from raydistill.sources.games import require_game
from raydistill.sources.splits import split_of
from raydistill.storage import Store

FIELDS: Schema = {
    "frames": Field(torch.uint8, ("frame", "channel", "height", "width"), "RGB frames"),
    "actions": Field(torch.int32, ("step",), "action t leads from frame t to frame t + 1"),
    "valid": Field(torch.int32, (), "steps that the episode has; after them the last frame is repeated"),
}
Shards = Mapping[str, tuple[Literal["train", "held_out"], Sequence[EpisodeRef]]]
"""Split and episodes of each shard."""


def plan_episodes(source: EpisodesSource, held_out: float) -> Shards:
    """All shards of a cache: episodes of one split each, in the order of their names.

    A whole episode is held out or trained on, by a hash of its name, so that its clips are never on both sides.
    """
    refs = find_episodes(source)
    shards: dict[str, tuple[Literal["train", "held_out"], Sequence[EpisodeRef]]] = {}
    splits: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")
    for split in splits:
        own = [ref for ref in refs if split_of(ref.name, held_out) == split]
        for first in range(0, len(own), source.shard_episodes):
            shards[dense_name(len(shards))] = (split, own[first : first + source.shard_episodes])
    return shards


def build_episode_inputs(config: RunConfig, ledger: Ledger) -> Manifest:
    """Build what the ledger's cache lacks and finish it, on the actors of `resources.decode`.

    Raises `DataError` for episodes that cannot be read or do not fit, `ConfigError` for games that cannot be made.
    """
    source, store = config.episodes, ledger.store
    games = [(part.environment, part.num_actions) for part in source.parts.values() if part.environment is not None]
    for game, num_actions in games:
        require_game(game, num_actions)
    cpus = config.resources.decode.cpus
    require_cluster("resources.decode", 1, cpus, file=config.resources.cluster)
    shards = plan_episodes(source, config.evaluate.held_out)
    old = ledger.manifest
    pending = ledger.pending([*shards])
    costs = {name: len(refs) for name, (_, refs) in shards.items()}
    share = TeacherResources(actors=(1, max(1, len(pending))), cpus=cpus)
    for _ in map_shards(
        lambda tally: partial(EpisodeWorker, source, shards, store.uri, tally),
        pending or ([] if old is not None or is_described(store) else [""]),
        costs,
        share,
        label="play episodes" if games else "read episodes",
        unit="episodes",
    ):
        pass
    ledger.require_published([*shards])
    fields, facts = (old.fields, old.facts) if old else read_description(store)
    records = read_records(store)
    splits = ("train", "held_out")
    rows = {split: sum(r.rows for r in records.values() if r.split == split) for split in splits}
    if not rows["train"]:
        raise DataError(
            f"source: wanted clips to train on, found none in {sum(costs.values())} episodes; add episodes, or lower "
            "evaluate.held_out."
        )
    episodes = {split: sum(costs[n] for n, (s, _) in shards.items() if s == split) for split in splits}
    ledger.report_changed(changed_hashes(old, records, pending))
    return ledger.finish(
        [*shards],
        kind="inputs",
        parent=None,
        fields=fields,
        facts={**facts, "num_rows": dict(rows), "episodes": dict(episodes)},
        build={"shards": list(pending)},
    )


class EpisodeWorker:
    """Writes shards of clips."""

    def __init__(self, source: EpisodesSource, shards: Shards, store: str, tally: Any):
        self._source, self._shards, self._store, self._tally = source, shards, Store(store), tally
        games = (
            ("crafter", "ale-py", "gymnasium")
            if any(part.environment is not None for part in source.parts.values())
            else ()
        )
        facts: dict[str, JsonValue] = {
            "num_actions": source.num_actions,
            "frame_shape": [3, *source.frame_size],
            "clip_frames": source.clip_frames,
            "noop": source.noop,
            "versions": {name: version(name) for name in ("numpy", "pillow", *_installed(games))},
        }
        write_description(self._store, field_records(FIELDS), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description."""
        if not name:
            return {"shard": name}
        split, refs = self._shards[name]
        clips: list[Clip] = []
        for done, ref in enumerate(refs):
            clips += clips_of(read_episode(ref, self._source), self._source)
            self._tally.set.remote(name, done + 1)
        length, (height, width) = self._source.clip_frames, self._source.frame_size
        frames = np.zeros((len(clips), length, 3, height, width), np.uint8)
        actions = np.zeros((len(clips), length - 1), np.int32)
        for place, clip in enumerate(clips):
            frames[place], actions[place] = clip.frames.transpose(0, 3, 1, 2), clip.actions
        tensors = {
            "frames": torch.from_numpy(frames),
            "actions": torch.from_numpy(actions),
            "valid": torch.tensor([clip.valid for clip in clips], dtype=torch.int32),
        }
        meta: dict[str, JsonValue] = {
            "kind": "inputs", "format": EPISODES_FORMAT, "split": split, "row_ids": [clip.row_id for clip in clips],
            "row_sha": [clip_sha(*pair) for pair in zip(tensors["frames"], tensors["actions"], strict=True)],
            "richness": [round(richness(clip, self._source.noop), 6) for clip in clips],
        }  # fmt: skip
        record = write_dense(self._store, name, tensors, meta=meta, split=split, rows=len(clips))
        publish_record(self._store, record)
        return {"shard": name}


def clip_sha(frames: torch.Tensor, actions: torch.Tensor) -> str:
    """What identifies the content of a clip, whatever its id."""
    return row_sha(frames, json.dumps(actions.tolist()))


def _installed(packages: Sequence[str]) -> list[str]:
    from importlib.metadata import packages_distributions

    there = {name for names in packages_distributions().values() for name in names}
    return [name for name in packages if name in there]
