"""What can be wrong with a dense shard, found without a teacher: every function returns words for it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raydistill.cache.dense import DenseShard, read_dense, row_sha, signed
from raydistill.cache.dense_batch import STORED_NOISE, draws_of
from raydistill.cache.manifest import FieldRecord, ShardRecord
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.draws import noise_sha
from raydistill.errors import DataError
from raydistill.signals import JsonValue
from raydistill.storage import Store

PROMPTS = ("prompt_embeds", "pooled")
"""Tensors with one row per caption of the shard; the others of an inputs shard have one per image."""


def dense_inputs_fault(store: Store, record: ShardRecord, facts: Mapping[str, JsonValue]) -> str | None:
    """Levels 2 and 3 of an inputs shard of images."""
    try:
        shard = read_dense(store, record.name)
        return _inputs_rows_fault(shard, record, facts) or _prompts_fault(shard) or finiteness_fault(shard)
    except DataError as error:
        return str(error)


def _inputs_rows_fault(shard: DenseShard, record: ShardRecord, facts: Mapping[str, JsonValue]) -> str | None:
    ids, shas = shard.row_ids, shard.texts("row_sha")
    if len(ids) != record.rows or len(set(ids)) != len(ids):
        return f"{len(set(ids)):,} different row ids instead of {record.rows:,}"
    if shard.meta.get("split") != record.split:
        return f"its rows are of the split {shard.meta.get('split')!r}, its record says {record.split!r}"
    latents = shard.tensor("latents") if "latents" in shard.names else torch.zeros(record.rows, 0)
    shape = (len(latents), *shard.latent_shape)
    factor, bucket = int(str(facts["vae_factor"])), shard.meta.get("bucket")
    sides = [int(str(side)) // factor for side in bucket] if isinstance(bucket, list) else []
    wanted = (record.rows, int(str(facts["latent_channels"])), *shape[2:-2], *sides)
    if shape != wanted:
        return f"its latents have the shape {shape}, those of its bucket {bucket} are {wanted}"
    for name in shard.names:
        if name not in PROMPTS and len(shard.tensor(name)) != record.rows:
            return f"{name} has {len(shard.tensor(name)):,} rows instead of {record.rows:,}"
    captions = _captions(shard)
    for row, sha in enumerate(shas):
        if row_sha(latents[row], captions[row]) != sha:
            return f"the latents or the caption of row {ids[row]} are not those of its row_sha"
    return None


def _prompts_fault(shard: DenseShard) -> str | None:
    if "prompt_index" not in shard.names:
        return None
    captions, index = shard.texts("captions"), shard.tensor("prompt_index")
    for name in PROMPTS:
        if name in shard.names and len(shard.tensor(name)) != len(captions):
            return f"{name} has {len(shard.tensor(name)):,} rows for {len(captions):,} captions"
    if not captions or captions[-1] != shard.meta.get("negative_prompt", ""):
        return "its last caption is not the empty one"
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < len(captions)):
        return "a row points to a caption that is not there"
    return None


def _captions(shard: DenseShard) -> list[str]:
    """Caption of each row; empty where the shard has no text."""
    if "prompt_index" not in shard.names:
        return [""] * shard.rows
    captions = shard.texts("captions")
    places = shard.tensor("prompt_index").tolist()
    return [captions[place] if 0 <= place < len(captions) else "" for place in places]


def dense_signal_fault(
    store: Store, record: ShardRecord, inputs: Store, fields: Mapping[str, FieldRecord], facts: Mapping[str, JsonValue]
) -> str | None:
    """Levels 2 and 3 of a signal shard of denoisers."""
    try:
        shard = read_dense(store, record.name)
        beside = inputs_of(inputs, record.name)
        return (
            (rows_fault(shard, beside, record, changed="image or caption have") if beside else None)
            or _schema_fault(shard, beside, record, fields, facts)
            or finiteness_fault(shard)
            or (noise_fault(shard, beside, facts) if beside else None)
        )
    except DataError as error:
        return str(error)


def inputs_of(inputs: Store, name: str) -> DenseShard | None:
    """The inputs of a signal shard; None when they are damaged, which is not the signal's fault."""
    try:
        return read_dense(inputs, name)
    except DataError:
        return None  # the damage is the inputs'


def rows_fault(shard: DenseShard, inputs: DenseShard, record: ShardRecord, *, changed: str) -> str | None:
    """Rows that are not those of the inputs; `changed` says what the row_sha are of."""
    if shard.row_ids != inputs.row_ids:
        if sorted(shard.row_ids) == sorted(inputs.row_ids):
            return "the rows are in another order than the inputs"
        return f"its {shard.rows:,} row ids are not those of the inputs ({inputs.rows:,} rows)"
    wanted, found = inputs.texts("row_sha"), shard.texts("row_sha")
    if wanted != found:
        row = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), 0)
        return f"{changed} changed since the teacher saw them (row {shard.row_ids[row]}): the signal is stale"
    if shard.rows != record.rows:
        return "the number of rows differs from its record"
    return None


def _schema_fault(
    shard: DenseShard,
    inputs: DenseShard | None,
    record: ShardRecord,
    fields: Mapping[str, FieldRecord],
    facts: Mapping[str, JsonValue],
) -> str | None:
    if set(shard.names) != set(fields):
        return f"its fields are {sorted(shard.names)}, the manifest has {sorted(fields)}"
    draws = noise_of_facts(facts).draws_per_row
    for name, field in fields.items():
        values = shard.tensor(name)
        dtype = str(values.dtype).removeprefix("torch.")
        if dtype != field.dtype or values.ndim != 1 + len(field.dims):
            return f"field {name!r} is {dtype} with {values.ndim - 1} axes, the manifest has {field}"
        if tuple(values.shape[:2]) != (record.rows, draws):
            return f"field {name!r} has {tuple(values.shape[:2])} rows and draws instead of {(record.rows, draws)}"
    if inputs is not None:
        # In front of the axes of latents stand those of row and draw, and of states the step.
        for name, words, before in (("prediction", "predictions", 2), ("clean", "samples", 2), ("path", "states", 3)):
            if name in shard.names and tuple(shard.tensor(name).shape[before:]) != inputs.latent_shape:
                found = tuple(shard.tensor(name).shape[before:])
                return f"its {words} have the shape {found}, the latents {inputs.latent_shape}"
    return None


def finiteness_fault(shard: DenseShard) -> str | None:
    """A value that is not finite, and its row."""
    for name in shard.names:
        values = shard.tensor(name)
        if values.is_floating_point() and not values.isfinite().all():
            place = int((~values.isfinite()).flatten(1).any(1).nonzero()[0]) if values.ndim > 1 else 0
            which = "caption" if name in PROMPTS else "row"
            label = shard.texts("captions")[place] if name in PROMPTS else shard.row_ids[place]
            return f"{name!r} has a value that is not finite ({which} {label!r})"
    return None


def noise_fault(shard: DenseShard, inputs: DenseShard, facts: Mapping[str, JsonValue]) -> str | None:
    """A row whose noise or timestep is not what its seed gives; all rows are looked at.

    Imported trajectories begin with noise of their own.
    """
    if facts.get("imported") is True and "path" in shard.names:
        return None
    noise = noise_of_facts(facts)
    source = "what came with the row" if STORED_NOISE in inputs.names else "its seed"
    shas = shard.tensor("noise_sha")
    timesteps = shard.tensor("timestep") if "timestep" in shard.names else None
    for draw in draws_of(inputs, noise.draws_per_row):
        where = f"row {draw.row_id}, draw {draw.draw}"
        if timesteps is not None and int(timesteps[draw.row, draw.draw]) != draw.timestep(noise):
            return (
                f"a row whose timestep does not match {source}: {where} has {int(timesteps[draw.row, draw.draw])} "
                f"instead of {draw.timestep(noise)}"
            )
        sha = signed(noise_sha(draw.noise(noise)))
        if int(shas[draw.row, draw.draw]) != sha:
            return f"a row whose noise does not match {source}: {where}"
    return None


def noise_of_facts(facts: Mapping[str, JsonValue]) -> NoiseConfig:
    """The noise that a signal was made with."""
    return NoiseConfig.model_validate(facts["noise"])
