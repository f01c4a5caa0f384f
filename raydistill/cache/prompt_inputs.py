"""The inputs cache of prompts: embeddings of each prompt, once, and the shape of the samples that are to be made."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch

from raydistill.cache.dense import LATENT_SHAPE, dense_name, row_sha, write_dense
from raydistill.cache.image_encode import encoded_text, require_finite, text_fields
from raydistill.cache.image_index import SPLITS, ShardPlan, publish_plan, read_plan
from raydistill.cache.ledger import (
    Ledger,
    changed_hashes,
    is_described,
    read_description,
    require_begun,
    write_description,
)
from raydistill.cache.manifest import Manifest
from raydistill.cache.pool import map_shards, require_teachers
from raydistill.cache.shards import field_records, publish_record, read_records
from raydistill.cache.staging import STAGING
from raydistill.config.schema import RunConfig
from raydistill.config.sources import PromptsSource
from raydistill.models.autoencoder import space_facts
from raydistill.models.text_encoder import TextEncoders, TextFacts
from raydistill.signals import Field, JsonValue, Schema
from raydistill.sources.pixels import time_ids
from raydistill.sources.prompts import PROMPTS_FORMAT, Prompt, read_prompts
from raydistill.storage import Store

VERSIONS = ("torch", "transformers", "safetensors")


def prompt_fields(source: PromptsSource, text: TextFacts) -> Schema:
    """What a row of prompts holds."""
    return {
        "time_ids": Field(
            torch.float32, ("number",), "original height, width, top, left, target height, width; pixels"
        ),
        **text_fields(getattr(torch, source.store_dtype), text),
    }


class PromptWorker:
    """Holds the text encoders."""

    def __init__(self, source: PromptsSource, staging: str, store: str, threads: int, tally: Any):
        self._source, self._threads, self._tally = source, threads, tally
        self._staging, self._store = Store(staging), Store(store)
        require_begun(self._store)
        torch.set_num_threads(threads)  # Ray's OMP_NUM_THREADS does not bind a model that sets its own
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._texts = TextEncoders(source.text_encoders, device)
        space = space_facts(source.vae, clips=source.frames is not None)
        self._shape = space.latent_shape(source.size, source.frames)
        facts: dict[str, JsonValue] = {
            **space.to_json(),
            **self._texts.facts.to_json(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": {name: version(name) for name in VERSIONS},
        }
        write_description(self._store, field_records(prompt_fields(source, self._texts.facts)), facts)

    def __call__(self, name: str) -> dict[str, JsonValue]:
        """Write shard `name` and its record; the empty name asks only for the description."""
        if not name:
            return {"shard": name}
        torch.set_num_threads(self._threads)  # a setting of the calling thread
        source, plan = self._source, read_plan(self._staging, name)
        captions = plan.rows["caption"].to_pylist()
        row_ids = plan.rows["row_id"].to_pylist()
        dtype = getattr(torch, source.store_dtype)
        empty = source.negative_prompt or ""
        tensors, prompts = encoded_text(self._texts, captions, empty=empty, batch=source.encode_rows, dtype=dtype)
        sizes = [time_ids(source.size, (0, 0), source.size)] * len(captions)
        tensors["time_ids"] = torch.tensor(sizes, dtype=torch.float32)
        require_finite(tensors, name, source.store_dtype)
        nothing = torch.zeros(0)
        meta: dict[str, JsonValue] = {
            "kind": "inputs", "format": PROMPTS_FORMAT, "split": plan.split, "bucket": list(plan.bucket),
            "row_ids": row_ids, "row_sha": [row_sha(nothing, caption) for caption in captions],
            "captions": list(prompts), "negative_prompt": empty, LATENT_SHAPE: list(self._shape),
        }  # fmt: skip
        record = write_dense(self._store, name, tensors, meta=meta, split=plan.split, rows=len(row_ids))
        self._tally.set.remote(name, len(row_ids))
        publish_record(self._store, record)
        return {"shard": name}


def build_prompt_inputs(config: RunConfig, ledger: Ledger) -> Manifest:
    """Build what the ledger's cache lacks and finish it. Raises as `read_prompts` and `TextEncoders`."""
    assert isinstance(config.source, PromptsSource), "the caller dispatches by the kind of the source"
    source, store, share = config.source, ledger.store, config.resources.teacher
    require_teachers(config.resources)
    old, staging = ledger.manifest, store / STAGING
    prompts = read_prompts(source, config.evaluate.held_out)
    plan = _plan(prompts, source)
    names = [shard.name for shard in plan]
    pending = ledger.pending(names)
    for shard in plan:
        if shard.name in set(pending):
            publish_plan(staging, shard)
    described = old is not None or is_described(store)
    threads = max(1, int(share.cpus))
    for _ in map_shards(
        lambda tally: partial(PromptWorker, source, staging.uri, store.uri, threads, tally),
        pending or ([] if described else [""]),  # the empty name: only the description is missing
        {shard.name: shard.rows.num_rows for shard in plan},
        share,
        label="encode prompts",
        unit="rows",
    ):
        pass
    fields, facts = (old.fields, old.facts) if old else read_description(store)
    splits: Counter[str] = Counter(prompt.split for prompt in prompts)
    counted: dict[str, JsonValue] = {
        "num_rows": {split: splits[split] for split in SPLITS if splits[split]},
        "buckets": [list(source.size)],
        "bucket_rows": [len(prompts)],
        "dropped": {},
    }
    ledger.report_changed(changed_hashes(old, read_records(store), pending))
    manifest = ledger.finish(
        names,
        kind="inputs",
        parent=None,
        fields=fields,
        facts={**facts, **json.loads(json.dumps(counted))},
        build={"actors": list(share.actors), "shards": list(pending)},
    )
    store.delete_folder(STAGING)
    return manifest


def _plan(prompts: list[Prompt], source: PromptsSource) -> list[ShardPlan]:
    """Rows sorted by (split, id) and cut into shards of one split."""
    shards: list[ShardPlan] = []
    for split in SPLITS:
        rows = sorted((p for p in prompts if p.split == split), key=lambda p: p.row_id)
        for first in range(0, len(rows), source.shard_rows):
            part = rows[first : first + source.shard_rows]
            table = pa.table({"row_id": [p.row_id for p in part], "caption": [p.text for p in part]})
            shards.append(ShardPlan(dense_name(len(shards)), split, source.size, table))
    return shards
