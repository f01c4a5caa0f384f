"""The inputs cache of images: units are indexed on the pool, planned into shards here, and encoded on the pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from raydistill.cache.image_encode import EncodeWorker
from raydistill.cache.image_index import IndexWorker, plan_shards, publish_plan, publish_tasks, staged_unit, unit_file
from raydistill.cache.ledger import Ledger, changed_hashes, is_described, read_description
from raydistill.cache.manifest import Manifest
from raydistill.cache.pool import map_over_actors, map_shards, require_teachers
from raydistill.cache.shards import read_records
from raydistill.cache.staging import STAGING
from raydistill.config.schema import RunConfig
from raydistill.progress import Progress
from raydistill.signals import JsonValue
from raydistill.sources.buckets import buckets_of
from raydistill.sources.images import Lost, require_enough, units
from raydistill.storage import Store

FIRST_WAVE = 16
"""Units read at first when `source.max_rows` is set; each further wave doubles."""
MOST_NAMED = 20
"""Unusable images that a manifest names."""


def build_image_inputs(config: RunConfig, ledger: Ledger) -> Manifest:
    """Build what the ledger's cache lacks and finish it.

    Encoding runs on `resources.teacher`. Raises `DataError` for sources that cannot be read, give no row or hold too
    many unusable images, `ConfigError` for what cannot be encoded.
    """
    source, store, share = config.images, ledger.store, config.resources.teacher
    require_teachers(config.resources)
    old = ledger.manifest
    staging = store / STAGING
    tables, lost = _indexed(config, staging)
    num_rows = sum(table.num_rows for table in tables)
    require_enough(num_rows, lost, source)
    _tell(lost, num_rows)
    plan = plan_shards(tables, source, buckets_of(source))
    names = [shard.name for shard in plan.shards]
    pending = ledger.pending(names)
    wanted = set(pending)
    for shard in plan.shards:
        if shard.name in wanted:
            publish_plan(staging, shard)
    described = old is not None or is_described(store)
    costs = {shard.name: shard.rows.num_rows for shard in plan.shards}
    threads = max(1, int(share.cpus))
    for _ in map_shards(
        lambda tally: partial(EncodeWorker, source, staging.uri, store.uri, threads, tally),
        pending or ([] if described else [""]),  # the empty name: only the description is missing
        costs,
        share,
        label="encode images",
        unit="rows",
    ):
        pass
    fields, facts = (old.fields, old.facts) if old else read_description(store)
    counted: dict[str, JsonValue] = {
        "num_rows": dict(plan.num_rows),
        "buckets": [list(bucket) for bucket in plan.bucket_rows],
        "bucket_rows": list(plan.bucket_rows.values()),
        "enlarged": plan.enlarged,
        "dropped": dict(sorted(Counter(reason for _, reason, _ in lost.images).items())),
        "unreadable": [f"{name}: {details}" for name, _, details in lost.images[:MOST_NAMED]],
    }
    ledger.report_changed(changed_hashes(old, read_records(store), pending))
    manifest = ledger.finish(
        names,
        kind="inputs",
        parent=None,
        fields=fields,
        facts={**facts, **counted},
        build={"units": len(tables), "actors": list(share.actors), "shards": list(pending)},
    )
    store.delete_folder(STAGING)
    return manifest


def _indexed(config: RunConfig, staging: Store) -> tuple[list[pa.Table], Lost]:
    """Index the units of the source, as many as `max_rows` wants: the table of each, and the images without a row."""
    source = config.images
    work = units(source)
    publish_tasks(staging, work)
    wave = len(work) if source.max_rows is None else FIRST_WAVE
    make = partial(IndexWorker, source, config.evaluate.held_out, staging.uri)
    tables: list[pa.Table] = []
    lost = Lost()
    done = 0
    with Progress("index images", total=sum(unit.num_bytes for unit in work), unit="bytes") as progress:
        while len(tables) < len(work) and (source.max_rows is None or done < source.max_rows):
            there = set(staging.names())
            some, wave = work[len(tables) : len(tables) + wave], 2 * wave
            pending = [unit.index for unit in some if unit_file(unit.index) not in there]
            actors = (1, max(1, len(pending)))
            shown = done
            for outcome in map_over_actors(make, pending, cpus=config.resources.decode.cpus, actors=actors):
                shown += outcome["rows"]
                progress.advance(work[outcome["unit"]].num_bytes, note=f"{shown:,} images")
            for unit in some:
                table, missing = staged_unit(staging, unit.index)
                tables.append(table)
                lost.images += missing.images
                done += table.num_rows
    return tables, lost


def _tell(lost: Lost, num_rows: int) -> None:
    """Name the images that are left out."""
    if lost.images:
        first = _listed([f"{name} ({details})" for name, _, details in lost.images])
        print(f"inputs: {len(lost.images):,} of {num_rows + len(lost.images):,} images left out: {first}", flush=True)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
