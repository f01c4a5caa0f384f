"""Each kind of damage is named, lands in damaged.json, and the next build repairs exactly that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from conftest_cache import Built, InProcess, build_all, cache_bytes, map_in_process, toy_config

from raydistill.cache.codecs import codec_for
from raydistill.cache.ledger import read_damaged
from raydistill.cache.manifest import Manifest, fingerprint_of
from raydistill.cache.shards import (
    SignalShard,
    publish_record,
    read_inputs,
    read_signal,
    write_inputs,
    write_signal,
)
from raydistill.cache.verify import Damage, require_sound, sample_rows, verify
from raydistill.config.schema import RunConfig
from raydistill.errors import DataError, VerificationFailed
from raydistill.storage import Store


def check(built: Built) -> list[Damage]:
    return verify(
        built.config,
        built.inputs,
        Manifest.model_validate_json(built.inputs.read("manifest.json")),
        {"t": (built.signal, Manifest.model_validate_json(built.signal.read("manifest.json")))},
    )


def rewrite(built: Built, name: str, change: Callable[[SignalShard], SignalShard]) -> None:
    """Replace a signal shard by one that was changed, with its record and manifest in keeping."""
    manifest = Manifest.model_validate_json(built.signal.read("manifest.json"))
    old = next(record for record in manifest.shards if record.name == name)
    vocab_size = int(str(manifest.facts["vocab_size"]))
    record = write_signal(
        built.signal, name, change(read_signal(built.signal, name)), codec_for("fp16", vocab_size=vocab_size),
        split=old.split, vocab_size=vocab_size,
    )  # fmt: skip
    publish_record(built.signal, record)
    shards = tuple(record if r.name == name else r for r in manifest.shards)
    built.signal.publish(
        "manifest.json", manifest.model_copy(update={"shards": shards}).model_dump_json(indent=1) + "\n"
    )


def with_field(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[SignalShard], SignalShard]:
    return lambda shard: replace(shard, fields=dict(shard.fields) | {name: change(shard.fields[name].copy())})


def reordered(shard: SignalShard) -> SignalShard:
    """The first two rows change places, with everything that belongs to them."""
    order = [1, 0, *range(2, len(shard.row_ids))]
    rows = [shard.row(i) for i in order]
    return SignalShard(
        [shard.row_ids[i] for i in order],
        [shard.tokens_sha[i] for i in order],
        shard.num_targets[order],
        {name: np.concatenate([row[name] for row in rows]) for name in shard.fields},
    )


def put(value: float, at: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return change


def narrowed(shard: SignalShard) -> SignalShard:
    return replace(shard, fields=dict(shard.fields) | {name: shard.fields[name][:, :5] for name in ("ids", "logp")})


def swapped(values: np.ndarray) -> np.ndarray:
    values[7, [0, 1]] = values[7, [1, 0]] - np.array([0, 1], values.dtype)
    return values


def test_sound_caches_have_no_damage(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(built) == []
    require_sound([])
    assert not built.signal.exists("damaged.json")
    assert "top-1 agreement 1.000" in capsys.readouterr().out


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[99] ^= 1
    file.write_bytes(whole)


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-30]), "truncated"),
    "flipped byte": (flip, "sha256"),
    "missing shard": (lambda f: f.unlink(), "shard is missing"),
    "truncated record": (lambda f: (f.parent / "records" / f"{f.name}.json").write_text('{"name"'), "json is damaged"),
    "missing record": (lambda f: (f.parent / "records" / f"{f.name}.json").unlink(), "record is missing"),
}


@pytest.mark.parametrize("cache", ["inputs", "signal"])
@pytest.mark.parametrize("kind", FILE_DAMAGES)
@pytest.mark.fault("files of a cache are cut, flipped or removed", "named by `verify`, rebuilt to the same bytes")
def test_damaged_files_are_named_and_repaired(built: Built, in_process: InProcess, kind: str, cache: str) -> None:
    damage, words = FILE_DAMAGES[kind]
    store: Store = getattr(built, cache)
    before, name = cache_bytes(store), built.signal_manifest.shards[1].name
    damage(Path(store.path(name)))
    found = check(built)
    assert [(d.cache, d.shard) for d in found] == [(store.uri, name)]
    assert words in found[0].what
    assert list(read_damaged(store)) == [name]
    again = build_all(built.config)
    assert cache_bytes(getattr(again, cache)) == before
    assert in_process.items == ([0] if cache == "inputs" else [name])
    assert check(again) == []


def test_a_damaged_manifest_that_is_removed_as_told_comes_back_with_the_shards_kept(
    built: Built, in_process: InProcess
) -> None:
    before = [cache_bytes(store) for store in (built.inputs, built.signal)]
    for store in (built.inputs, built.signal):
        file = Path(store.path("manifest.json"))
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(DataError, match=r"manifest\.json is damaged: .*Remove this file"):
            build_all(built.config)
        file.unlink()
        again = build_all(built.config)
    assert [cache_bytes(store) for store in (again.inputs, again.signal)] == before
    assert not {record.name for record in built.signal_manifest.shards} & set(in_process.items)


CONTENT_DAMAGES: dict[str, tuple[Callable[[SignalShard], SignalShard], str]] = {
    "NaN": (with_field("logp", put(np.nan, (5, 2))), "'logp' has a value that is not finite"),
    "infinity": (with_field("entropy", put(np.inf, (5,))), "'entropy' has a value that is not finite"),
    "wrong row order": (reordered, "another order"),
    "unsorted": (with_field("logp", swapped), "descending"),
    "twice the same id": (with_field("ids", lambda v: np.where(np.arange(6) == 3, v[:, :1], v)), "twice"),
    "foreign id": (with_field("ids", put(97, (0, 5))), "outside the vocabulary of 97"),
    "lost mass": (with_field("log_tail", lambda v: v - np.float16(1)), "sum to"),
    "another K": (narrowed, "axis 'k'"),
    "lost field": (lambda s: replace(s, fields={n: v for n, v in s.fields.items() if n != "psi"}), "fields"),
    "stale inputs": (lambda s: replace(s, tokens_sha=[s.tokens_sha[0], b"12345678", *s.tokens_sha[2:]]), "stale"),
    "foreign rows": (lambda s: replace(s, row_ids=[*s.row_ids[:-1], "x.txt#0.0"]), "row ids are not those"),
    "another answer": (with_field("ids", lambda v: (v + 1) % 97), "something else than its cache"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENT_DAMAGES)
def test_damaged_content_is_named_and_repaired(built: Built, in_process: InProcess, kind: str) -> None:
    change, words = CONTENT_DAMAGES[kind]
    config = built.config.model_copy(update={"cache": built.config.cache.model_copy(update={"audit_rows": 12})})
    built = replace(built, config=config)
    before, name = cache_bytes(built.signal), built.signal_manifest.shards[1].name
    rewrite(built, name, change)
    found = check(built)
    assert [(d.cache, d.shard) for d in found] == [(built.signal.uri, name)]
    assert words in found[0].what
    assert cache_bytes(build_all(built.config).signal) == before
    assert in_process.items == [name]


def test_a_cache_of_another_teacher_is_found_by_the_audit(built: Built, toy_text: Path, tmp_path: Path) -> None:
    toys.save_model(toys.tiny_llama(seed=5), tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        map_in_process(patch)
        model = {"library": "transformers", "source": str(tmp_path / "other"), "dtype": "float32"}
        other = build_all(toy_config(toy_text, tmp_path, "cache", teacher={"model": model}))
    for record in built.signal_manifest.shards:
        shard = read_signal(other.signal, record.name)
        rewrite(built, record.name, lambda _, shard=shard: shard)
    found = check(built)
    assert found
    assert all("something else than its cache" in damage.what for damage in found)


def test_a_foreign_manifest_is_named_and_replaced(built: Built, in_process: InProcess) -> None:
    before = cache_bytes(built.signal)
    content = built.signal_manifest.content | {"top_k": 5}
    foreign = built.signal_manifest.model_copy(update={"content": content, "fingerprint": fingerprint_of(content)})
    built.signal.publish("manifest.json", foreign.model_dump_json())
    found = check(built)
    assert [damage.shard for damage in found] == ["manifest.json"]
    assert "manifest of another cache" in found[0].what
    assert cache_bytes(build_all(built.config).signal) == before
    assert in_process.items == [""]  # the teacher is asked for its facts, no shard is built


def test_a_manifest_of_other_inputs_is_stale(built: Built) -> None:
    built.signal.publish(
        "manifest.json", built.signal_manifest.model_copy(update={"parent": "0" * 16}).model_dump_json()
    )
    assert "stale" in check(built)[0].what


def test_inputs_that_changed_under_their_record_are_named(built: Built) -> None:
    name = built.inputs_manifest.shards[0].name
    rows = read_inputs(built.inputs, name)
    rows[0] = replace(rows[0], input_ids=np.full_like(rows[0].input_ids, 120))
    record = write_inputs(built.inputs, name, rows, split=built.inputs_manifest.shards[0].split)
    publish_record(built.inputs, record)
    shards = [record, *built.inputs_manifest.shards[1:]]
    built.inputs.publish(
        "manifest.json", built.inputs_manifest.model_copy(update={"shards": tuple(shards)}).model_dump_json()
    )
    found = check(built)
    assert {(d.cache, d.shard) for d in found} == {(built.inputs.uri, name), (built.signal.uri, name)}
    assert "outside the vocabulary" in found[0].what
    assert "stale" in found[1].what


def test_the_error_names_every_damage() -> None:
    damages = [Damage("cache", f"0000{i}.parquet", "truncated") for i in range(3)]
    with pytest.raises(VerificationFailed) as error:
        require_sound(damages)
    assert all(str(damage) in str(error.value) for damage in damages)
    assert error.value.exit_status == 3


def test_verify_writes_nothing_but_the_list(built: Built) -> None:
    Path(built.signal.path(built.signal_manifest.shards[0].name)).write_bytes(b"gone")
    before = cache_bytes(built.signal)
    check(built)
    after = cache_bytes(built.signal)
    assert set(after) - set(before) == {"damaged.json"}
    assert {name: after[name] for name in before} == before
    assert json.loads(after["damaged.json"])["shards"]


def test_the_sample_is_spread_and_repeatable(built: Built) -> None:
    records = built.signal_manifest.shards
    sample = sample_rows(records, len(records), "00ff")
    assert sorted(sample) == sorted(record.name for record in records)
    assert sample == sample_rows(records, len(records), "00ff")
    assert sample_rows(records, 0, "00ff") == {}


@pytest.mark.parametrize(
    "teacher",
    [
        {"codec": "u8"},
        {"estimator": {"kind": "head_tail_sample", "samples": 4}},
        {"estimator": {"kind": "head_tail_sample", "samples": 4}, "top_k": 0, "codec": "u8"},
    ],
    ids=["u8", "sampled tail", "no head"],
)
def test_every_kind_of_signal_is_built_sound(
    make_config: Callable[..., RunConfig], in_process: InProcess, teacher: dict[str, object]
) -> None:
    assert check(build_all(make_config(teacher=teacher))) == []
