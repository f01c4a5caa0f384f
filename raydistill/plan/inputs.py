"""How many rows and tokens there will be, and how many bytes the caches take.

Counted where the caches are there, estimated from file sizes otherwise; every number says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from raydistill.cache.codecs import codec_for
from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.manifest import Manifest, fingerprint_of
from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.config.sources import TextSource
from raydistill.config.teachers import HeadTailSample, TopKLogitsTeacher
from raydistill.errors import RaydistillError
from raydistill.signals import JsonValue
from raydistill.sources.files import DataFile, find_files
from raydistill.sources.records import open_parquet
from raydistill.storage import Store

INPUT_BYTES = 4 + 1 / 8
"""Bytes per token of an inputs cache before compression: an int32 id and one bit of the target mask."""
ROW_BYTES = 64
"""Bytes per row of either cache for the row's id, hash and counts; an estimate."""
INPUT_COMPRESSION = 0.45
"""Stored bytes per byte of an inputs cache before compression, measured on English books with 49,152 ids."""
PLANE_COMPRESSION = {
    "ids.0": 1.0,
    "ids.1": 0.68,
    "ids.2": 0.2,
    "logp.1": 0.06,
    "counts.1": 0.0,
    "counts.2": 0.0,
    "counts.3": 0.0,
}
"""Stored bytes per byte of a signal's planes: measured on SmolLM2-135M, K = 64, English books, but for the third byte
of ids beyond 65,536, which is an assumption; counts are below 256."""
LOGP_COMPRESSION = {"fp16": 0.44, "u8": 0.32}
"""The same of the plane `logp.0`, by codec."""
OTHER_COMPRESSION = 0.75
"""The same of all other planes."""


class InputsPlan(Config):
    """Rows and tokens of the inputs."""

    rows: int
    """Rows, training and held out."""
    tokens: int
    """Tokens in them."""
    targets: int
    """Tokens that are predicted; an upper bound where it is an estimate."""
    train_rows: int
    """Rows that are trained on."""
    train_tokens: int
    """Tokens in them."""
    cached: bool
    """Whether the inputs cache is there, so that the numbers are exact."""
    basis: str
    """How the numbers came about."""
    bytes_per_token: float
    """Bytes of the inputs cache per token."""
    total_bytes: int
    """Bytes of the inputs cache."""


class CachePlan(Config):
    """Size of a signal cache."""

    raw_bytes_per_token: float
    """Bytes per target before compression: the codec's planes, exactly."""
    bytes_per_token: float
    """Bytes per target on disk."""
    total_bytes: int
    """Bytes on disk."""
    cached: bool
    """Whether the cache is there, so that the size is exact and the teacher need not run."""


def plan_inputs(config: RunConfig, missing: list[str]) -> tuple[InputsPlan | None, Manifest | None]:
    """Rows and tokens; reasons why a number cannot be had are added to `missing`."""
    manifest = None
    if has_inputs(config):  # otherwise the files need not be hashed, which can take long
        try:
            manifest = finished_manifest(config, "inputs", inputs_content(config))
        except RaydistillError as error:
            missing.append(f"whether the inputs cache is there: {error}")
    if manifest is not None:
        return _counted(manifest), manifest
    try:
        return _estimated(config, missing), None
    except RaydistillError as error:
        missing.append(f"rows and tokens: {error}")
        return None, None


def has_inputs(config: RunConfig) -> bool:
    """Whether the cache folder holds any inputs."""
    return any(name.startswith("inputs-") for name in Store(config.cache.dir).folders())


def finished_manifest(config: RunConfig, name: str, content: Mapping[str, JsonValue]) -> Manifest | None:
    """The manifest of cache `name` with this content, None when it is not there."""
    store = Store(config.cache.dir) / f"{name}-{fingerprint_of(content)}"
    return Manifest.model_validate_json(store.read("manifest.json")) if store.exists("manifest.json") else None


def _counted(manifest: Manifest) -> InputsPlan:
    train = manifest.split_shards("train")
    tokens, total = sum(s.tokens for s in manifest.shards), sum(s.bytes for s in manifest.shards)
    targets = manifest.facts.get("num_targets")
    return InputsPlan(
        rows=sum(s.rows for s in manifest.shards),
        tokens=tokens,
        targets=sum(int(str(n)) for n in targets.values()) if isinstance(targets, dict) else tokens,
        train_rows=sum(s.rows for s in train),
        train_tokens=sum(s.tokens for s in train),
        cached=True,
        basis="counted in the inputs cache",
        bytes_per_token=total / max(tokens, 1),
        total_bytes=total,
    )


def _estimated(config: RunConfig, missing: list[str]) -> InputsPlan | None:
    source = config.text
    if source.dataset is None:
        tokens, basis = _tokens_in_files(config)
    elif source.max_rows is not None:
        tokens, basis = source.max_rows * source.seq_len, f"if {source.dataset.id} fills source.max_rows rows"
    else:
        missing.append(f"rows and tokens: the size of the data set {source.dataset.id} is known once it is read")
        return None
    rows = math.ceil(tokens / source.seq_len)
    if source.max_rows is not None and rows > source.max_rows:
        rows, tokens, basis = source.max_rows, source.max_rows * source.seq_len, "the source has more than max_rows"
    kept = 1 - config.evaluate.held_out
    per_token = INPUT_BYTES * INPUT_COMPRESSION + ROW_BYTES / source.seq_len
    return InputsPlan(
        rows=rows,
        tokens=tokens,
        targets=tokens,
        train_rows=round(rows * kept),
        train_tokens=round(tokens * kept),
        cached=False,
        basis=f"estimated: {basis}; rows are taken to be full",
        bytes_per_token=per_token,
        total_bytes=round(tokens * per_token),
    )


def _tokens_in_files(config: RunConfig) -> tuple[int, str]:
    """Tokens in the files of the source by their size, and how they were estimated."""
    source, plan = config.text, config.plan
    files = find_files(source.paths)
    text = sum(_text_bytes(file, source, plan.compression) for file in files)
    basis = f"{len(files)} file{'s' if len(files) > 1 else ''}, {plan.bytes_per_token:g} bytes of text per token"
    if any(file.compression for file in files):
        basis += f", {plan.compression:g} bytes of text per compressed byte"
    return round(text / plan.bytes_per_token), basis


def _text_bytes(file: DataFile, source: TextSource, compression: float) -> float:
    """Bytes of text in a file; keys and quotes of JSON count as text."""
    if file.format == "parquet":
        metadata = open_parquet(file).metadata
        keys = (source.text_key, source.messages_key)
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        columns = (g.column(i) for g in groups for i in range(g.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in keys)
    return file.size * (compression if file.compression else 1.0)


def plan_cache(
    config: RunConfig, teacher: TopKLogitsTeacher, inputs: InputsPlan | None, manifest: Manifest | None, vocab_size: int
) -> CachePlan:
    """Size of a teacher's signal cache, for ids below `vocab_size`."""
    raw, stored = bytes_per_target(teacher, vocab_size)
    if manifest is not None:
        try:
            signal = finished_manifest(config, teacher.name, signal_content(config, teacher, manifest))
        except RaydistillError:
            signal = None  # the teacher's own plan says why its weights cannot be read
        if signal is not None:
            total, targets = sum(s.bytes for s in signal.shards), sum(s.tokens for s in signal.shards)
            return CachePlan(
                raw_bytes_per_token=raw, bytes_per_token=total / max(targets, 1), total_bytes=total, cached=True
            )
    if inputs is not None:
        stored += ROW_BYTES * inputs.rows / max(inputs.targets, 1)
    total = round(stored * inputs.targets) if inputs is not None else 0
    return CachePlan(raw_bytes_per_token=raw, bytes_per_token=stored, total_bytes=total, cached=False)


def bytes_per_target(teacher: TopKLogitsTeacher, vocab_size: int) -> tuple[int, float]:
    """Bytes of one target before compression, by encoding one with the codec itself, and what to expect after it."""
    fields: dict[str, np.ndarray] = {
        "ids": np.zeros((1, teacher.top_k), np.int32),
        "logp": np.zeros((1, teacher.top_k), np.float16),
        "psi": np.zeros((1, len(teacher.temperatures)), np.float16),
        **{name: np.zeros((1,), np.float16) for name in ("log_tail", "entropy", "label_logp")},
    }
    if isinstance(teacher.estimator, HeadTailSample):
        drawn = (1, teacher.estimator.samples)
        fields |= {"tail_ids": np.zeros(drawn, np.int32), "tail_counts": np.zeros(drawn, np.int32)}
        fields["tail_logp"] = np.zeros(drawn, np.float16)
    planes = codec_for(teacher.codec, vocab_size=vocab_size).encode(fields)
    ratios = {**PLANE_COMPRESSION, "logp.0": LOGP_COMPRESSION[teacher.codec]}
    stored = sum(
        plane.nbytes * ratios.get(name.removeprefix("tail_"), OTHER_COMPRESSION) for name, plane in planes.items()
    )
    return sum(plane.nbytes for plane in planes.values()), stored
