"""The inputs cache of a text: units of the source are tokenised on the pool, then dealt out to shards here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

from raydistill.cache.ledger import Ledger, changed_hashes, require_seen
from raydistill.cache.manifest import Manifest
from raydistill.cache.pool import map_over_actors
from raydistill.cache.shards import INPUT_FIELDS, field_records, publish_record, read_records, write_inputs
from raydistill.cache.staging import STAGING, Totals, deal, stage_unit, staged_rows, unit_name
from raydistill.config.schema import RunConfig
from raydistill.config.sources import TextSource
from raydistill.models.load import effective_vocab_size, load_tokenizer
from raydistill.progress import Progress
from raydistill.signals import JsonValue
from raydistill.sources.text import Unit, require_rows, rows, units
from raydistill.storage import Store

FIRST_WAVE = 16
"""Units read at first when `source.max_rows` is set; each further wave doubles."""


def build_text_inputs(config: RunConfig, ledger: Ledger) -> Manifest:
    """Build what the ledger's cache lacks and finish it.

    Raises `DataError` for sources that cannot be read or give no row.
    """
    source, store = config.text, ledger.store
    old = ledger.manifest
    staging = store / STAGING
    used, dropped = _stage(config, staging)
    totals = Totals()
    names: list[str] = []
    built: list[str] = []
    done = ledger.done()
    for name, split, shard in deal(
        staging, used, shard_rows=source.shard_rows, max_rows=source.max_rows, totals=totals
    ):
        names.append(name)
        if name not in done:
            publish_record(store, write_inputs(store, name, shard, split=split))
            built.append(name)
    require_rows(totals.rows["train"] + totals.rows["held_out"], dropped, source)
    ledger.report_changed(changed_hashes(old, read_records(store), built))
    manifest = ledger.finish(
        names,
        kind="inputs",
        parent=None,
        fields=field_records(INPUT_FIELDS),
        facts=_facts(config, ledger, totals, dropped),
        build={"units": len(used), "shards": [*built]},
    )
    store.delete_folder(STAGING)
    return manifest


def _stage(config: RunConfig, staging: Store) -> tuple[range, Counter[str]]:
    """Stage the units of the source, as many as `max_rows` wants. Returns their numbers and what was dropped."""
    source = config.text
    work = units(source)
    wave = len(work) if source.max_rows is None else FIRST_WAVE
    make = partial(_UnitWorker, work, source, config.evaluate.held_out, staging.uri)
    total_rows, stop, dropped = 0, 0, Counter[str]()
    with Progress("inputs", total=sum(unit.num_bytes for unit in work), unit="bytes") as progress:
        while stop < len(work) and (source.max_rows is None or total_rows < source.max_rows):
            start, stop, wave = stop, min(stop + wave, len(work)), 2 * wave
            there = set(staging.names())
            pending = [unit.index for unit in work[start:stop] if unit_name(unit.index) not in there]
            actors = (1, max(1, len(pending)))
            for outcome in map_over_actors(make, pending, cpus=config.resources.decode.cpus, actors=actors):
                total_rows += outcome["rows"]
                progress.advance(outcome["bytes"], note=f"{total_rows:,} rows")
            require_seen(staging, [unit_name(unit.index) for unit in work[:stop]])
            total_rows = 0
            dropped = Counter()
            for unit in work[:stop]:
                count, lost = staged_rows(staging, unit.index)
                total_rows += count
                dropped += lost
    return range(stop), dropped


class _UnitWorker:
    """Reads, tokenises and stages units of the source."""

    def __init__(self, work: Sequence[Unit], source: TextSource, held_out: float, staging: str):
        self._work = work
        self._source, self._held_out, self._staging = source, held_out, Store(staging)
        self._tokenizer = load_tokenizer(source.tokenizer)

    def __call__(self, index: int) -> dict[str, JsonValue]:
        unit = self._work[index]
        dropped: Counter[str] = Counter()
        found = rows(unit, self._source, self._tokenizer, self._held_out, dropped)
        return {"rows": stage_unit(self._staging, unit.index, found, dropped), "bytes": int(unit.num_bytes)}


def _facts(config: RunConfig, ledger: Ledger, totals: Totals, dropped: Counter[str]) -> dict[str, JsonValue]:
    tokenizer = load_tokenizer(config.text.tokenizer)
    return {
        "vocab_size": effective_vocab_size(tokenizer),
        "tokenizer": ledger.content["tokenizer"],
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "num_rows": dict(totals.rows),
        "num_tokens": dict(totals.tokens),
        "num_targets": dict(totals.targets),
        "text_bytes": dict(totals.text_bytes),
        "dropped": dict(sorted(dropped.items())),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow")},
    }
