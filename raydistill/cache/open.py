"""Opens the samples of a run, whatever kind they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raydistill.cache.dense_read import DenseDataset
from raydistill.cache.episode_read import EpisodeDataset
from raydistill.cache.read import Dataset
from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource, FeaturesRecipe
from raydistill.storage import Store


def open_dataset(
    config: RunConfig,
    inputs: Store,
    signals: Mapping[str, Store],
    *,
    split: str,
    fields: Mapping[str, Sequence[str]],
    max_rows: int | None = None,
    only: str | None = None,
) -> Dataset | DenseDataset | EpisodeDataset:
    """The samples of one split with the `fields` of each teacher's signal; all classes are `Samples`."""
    match config.source:
        case TextSource():
            return Dataset(inputs, signals, split=split, fields=fields, max_rows=max_rows)
        case EpisodesSource(action_rich=action_rich):
            rich = action_rich if split == "train" else 0.0
            return EpisodeDataset(
                inputs, signals, split=split, fields=fields, action_rich=rich, only=only, max_rows=max_rows
            )
        case ImagesSource() | VideosSource() | PromptsSource():
            return DenseDataset(inputs, signals, config.source.noise, split=split, fields=fields, max_rows=max_rows)


def require_episodes(config: RunConfig, inputs: Store) -> None:
    """`ConfigError` when a later phase learns from episodes alone that the finished cache has not: better known before
    the first one trains."""
    for phase in config.phases:
        if isinstance(phase.recipe, FeaturesRecipe) and phase.recipe.episodes is not None:
            EpisodeDataset(inputs, {}, split="train", fields={}, only=phase.recipe.episodes)
