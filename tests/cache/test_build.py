"""Building caches: the same bytes whoever built them, however often it was interrupted. With Ray: test_build_ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest_cache import Built, InProcess, Killed, build_all, cache_bytes

from raydistill.cache import build, ledger, pool, signal_job, text_inputs, top_k_signal
from raydistill.cache.build import build_signal
from raydistill.cache.ledger import DAMAGED, Ledger, read_damaged, write_damaged
from raydistill.cache.manifest import fingerprint_of
from raydistill.cache.shards import read_inputs, read_records, read_signal
from raydistill.config.schema import RunConfig
from raydistill.errors import CacheMismatch, ConfigError, DataError, VerificationFailed
from raydistill.models.load import load_language_model, load_tokenizer
from raydistill.signals import Teacher
from raydistill.storage import Store

Config = Callable[..., RunConfig]


def test_inputs_hold_every_row_once_in_split_pure_sorted_shards(built: Built) -> None:
    seen: list[str] = []
    for record in built.inputs_manifest.shards:
        rows = read_inputs(built.inputs, record.name)
        lengths = [(len(row.input_ids), row.row_id) for row in rows]
        assert lengths == sorted(lengths)
        assert len(rows) <= 30
        seen += [row.row_id for row in rows]
    assert len(seen) == len(set(seen))
    documents = {row_id.rpartition(".")[0] for row_id in seen}
    assert documents == {f"{name}#{i}" for name in ("one.txt", "two.txt") for i in range(60)}
    facts = built.inputs_manifest.facts
    assert facts["num_rows"] == {
        split: sum(r.rows for r in built.inputs_manifest.split_shards(split)) for split in ("train", "held_out")
    }
    assert sum(r.tokens for r in built.inputs_manifest.shards) == sum(facts["num_tokens"].values())
    full = [r.rows for r in built.inputs_manifest.split_shards("train")]
    assert full[:-1] == [30] * (len(full) - 1)


def test_rows_are_the_tokenised_lines(built: Built, toy_text: Path) -> None:
    tokenizer = load_tokenizer(str(toy_text / "model"))
    texts = {
        tokenizer.decode(row.input_ids, skip_special_tokens=True)
        for record in built.inputs_manifest.shards
        for row in read_inputs(built.inputs, record.name)
    }
    lines = [line for name in ("one.txt", "two.txt") for line in (toy_text / name).read_text().splitlines()]
    assert {line for line in lines if len(line) < 40} <= texts


def test_the_signal_is_what_the_model_says(built: Built) -> None:
    model = load_language_model(built.config.teachers[0].model)
    import torch

    for record in built.signal_manifest.shards:
        rows, shard = read_inputs(built.inputs, record.name), read_signal(built.signal, record.name)
        assert shard.row_ids == [row.row_id for row in rows]
        for i in (0, len(rows) - 1):
            with torch.no_grad():
                logits = model(torch.from_numpy(rows[i].input_ids.astype(np.int64))[None]).logits[0]
            wanted = logits.double().log_softmax(-1)[torch.from_numpy(rows[i].target)]
            found = shard.row(i)
            ids = torch.from_numpy(found["ids"]).long()
            np.testing.assert_allclose(found["logp"], wanted.gather(1, ids), atol=5e-3)
            np.testing.assert_allclose(found["logp"], wanted.topk(6).values, atol=5e-3)


def test_a_complete_cache_is_returned_without_any_work(built: Built, in_process: InProcess) -> None:
    before = cache_bytes(built.signal) | cache_bytes(built.inputs)
    again = build_all(built.config)
    assert in_process.items == []
    assert again.signal_manifest == built.signal_manifest
    assert cache_bytes(again.signal) | cache_bytes(again.inputs) == before


def test_ray_is_brought_up_only_when_there_is_something_to_build(
    built: Built, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, caches, calls = built.config, Store(built.config.cache.dir), []
    for name in ("inputs_content", "signal_content"):
        content = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *a, content=content, **k: (calls.append(content), content(*a, **k))[1])

    def both(connect: Callable[[], None]) -> None:
        inputs, manifest = build.build_inputs(config, caches, connect=connect)
        build.build_signal(config, config.teachers[0], inputs, manifest, caches, connect=connect)

    both(lambda: pytest.fail("everything is there"))
    assert len(calls) == 2, "what defines a cache takes reading all the data, so it is asked once"
    calls.clear()
    write_damaged(built.signal, {built.signal_manifest.shards[0].name: "flipped"})
    connected = []
    both(lambda: connected.append(list(in_process.items)))
    assert connected == [[]]
    assert len(in_process.items) == 1


@pytest.mark.parametrize("stop_after", range(7))
def test_an_interrupted_build_ends_in_the_same_bytes(
    built: Built, in_process: InProcess, make_config: Config, stop_after: int
) -> None:
    config = make_config("other")
    in_process.stop_after = stop_after
    in_process.order = lambda items: list(reversed(items))
    with pytest.raises(Killed):
        build_all(config)
    in_process.stop_after = None
    in_process.order = list
    for folder in Path(config.cache.dir).iterdir():
        if not (folder / "manifest.json").exists():
            for name, age in ((".tmp-0badcafe-00000.parquet", 2 * 86400), (".tmp-1badcafe-00000.parquet", 0)):
                (folder / name).write_bytes(b"half a shard")  # of a writer that was killed, and of one at work
                os.utime(folder / name, (time.time() - age,) * 2)
    again = build_all(config)
    # a unit or shard is never done twice
    assert len(in_process.items) == 1 + len(built.signal_manifest.shards)
    half = {part.name for part in Path(config.cache.dir).rglob(".tmp-*")}
    assert half == {".tmp-1badcafe-00000.parquet"}
    for part in Path(config.cache.dir).rglob(".tmp-*"):
        part.unlink()
    assert cache_bytes(again.inputs) == cache_bytes(built.inputs)
    assert cache_bytes(again.signal) == cache_bytes(built.signal)


def test_a_kill_between_a_shard_and_its_record_costs_only_that_shard(
    built: Built, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, make_config: Config
) -> None:
    publish, calls = top_k_signal.publish_record, []

    def killed(store: Store, record: object) -> None:
        calls.append(record)
        if len(calls) == len(built.inputs_manifest.shards) + 2:  # the second shard of the signal
            raise Killed
        publish(store, record)

    for module in (text_inputs, top_k_signal):
        monkeypatch.setattr(module, "publish_record", killed)
    config = make_config("other")
    with pytest.raises(Killed):
        build_all(config)
    again = build_all(config)
    assert cache_bytes(again.signal) == cache_bytes(built.signal)
    assert len(in_process.items) == 1 + len(built.signal_manifest.shards) + 1


def test_a_kill_before_the_manifest_needs_no_teacher_to_finish(
    built: Built, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, make_config: Config
) -> None:
    config = make_config("other")
    finish = Ledger.finish

    def killed(self: Ledger, *args: object, **kwargs: object) -> None:
        if kwargs["kind"] == "signal":
            raise Killed
        return finish(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "finish", killed)
    with pytest.raises(Killed):
        build_all(config)
    monkeypatch.undo()
    in_process.items.clear()
    monkeypatch.setenv("RAYDISTILL_AUTOSCALING", "1")
    monkeypatch.setattr(pool, "_outcomes", lambda *_, **__: pytest.fail("nothing is left to map"))
    assert cache_bytes(build_all(config).signal) == cache_bytes(built.signal)


@pytest.mark.parametrize("length", [0, 17])
def test_truncated_files_of_the_ledger_are_named_and_their_remedies_work(
    built: Built, in_process: InProcess, length: int
) -> None:
    before = cache_bytes(built.signal)
    name = built.signal_manifest.shards[0].name
    described = {key: getattr(built.signal_manifest, key) for key in ("fields", "facts")}
    ledger.write_description(built.signal, described["fields"], described["facts"])
    assert cache_bytes(built.signal) == before, "an actor that comes late leaves a finished cache alone"
    built.signal.delete("manifest.json")
    ledger.write_description(built.signal, described["fields"], described["facts"])
    built.signal.publish("content.json", json.dumps(built.signal_manifest.content, indent=1))
    built.signal.delete(name)
    write_damaged(built.signal, {name: "truncated"})
    for file, remedy in (
        ("damaged.json", "Run --stages verify"),
        ("content.json", "shards that are built are kept"),
        ("teacher.json", "a teacher then writes it anew"),
        ("build.json", "only tells of times"),
    ):
        path = Path(built.signal.path(file))
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(DataError, match=rf"/{file} is damaged: wanted whole JSON, .*{remedy}"):
            build_all(built.config)
        path.unlink()
    again = build_all(built.config)
    assert cache_bytes(again.signal) == before
    assert in_process.items == [name, ""]


def test_only_damaged_and_absent_shards_are_rebuilt_and_the_list_goes_away(built: Built, in_process: InProcess) -> None:
    before = cache_bytes(built.signal)
    names = [record.name for record in built.signal_manifest.shards]
    path = Path(built.signal.path(names[0]))
    path.write_bytes(path.read_bytes()[:-1])
    Path(built.signal.path(names[2])).unlink()
    write_damaged(built.signal, {names[0]: "truncated"})
    again = build_all(built.config)
    assert in_process.items == [names[0], names[2]]
    assert read_damaged(again.signal) == {}
    assert cache_bytes(again.signal) == before


def test_damaged_inputs_are_rebuilt_to_the_same_bytes(built: Built, in_process: InProcess) -> None:
    before = cache_bytes(built.inputs)
    name = built.inputs_manifest.shards[1].name
    Path(built.inputs.path(name)).write_bytes(b"nothing")
    write_damaged(built.inputs, {name: "truncated"})
    stamps = {f: f.stat().st_mtime_ns for f in Path(built.inputs.root).glob("*.parquet")}
    again = build_all(built.config)
    assert cache_bytes(again.inputs) == before
    changed = [f.name for f in Path(built.inputs.root).glob("*.parquet") if f.stat().st_mtime_ns != stamps[f]]
    assert changed == [name]
    assert in_process.items == [0]  # the one unit of the source; no shard of the signal


def test_a_rebuilt_shard_with_another_hash_is_audited_accepted_and_reported(
    built: Built, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = built.signal_manifest.shards[0].name
    write_damaged(built.signal, {name: "flipped"})
    capture = top_k_signal.capture

    def rounded_otherwise(teacher: object, rows: object, **kwargs: object) -> object:
        shard = capture(teacher, rows, **kwargs)
        shard.fields["entropy"][:] = np.nextafter(shard.fields["entropy"], np.float16(9))
        return shard

    monkeypatch.setattr(top_k_signal, "capture", rounded_otherwise)
    again = build_all(built.config)
    assert again.signal_manifest.shards[0].sha256 != built.signal_manifest.shards[0].sha256
    assert again.signal_manifest.shards[0].sha256 == again.signal.sha256(name)
    assert again.signal_manifest.shards[1:] == built.signal_manifest.shards[1:]
    assert name in capsys.readouterr().out
    assert list(json.loads(again.signal.read("build.json"))[-1]["changed"]) == [name]


def test_a_rebuilt_shard_that_fails_the_audit_is_refused(
    built: Built, monkeypatch: pytest.MonkeyPatch, in_process: InProcess
) -> None:
    name = built.signal_manifest.shards[0].name
    write_damaged(built.signal, {name: "flipped"})
    capture = top_k_signal.capture

    def wrong(teacher: object, rows: object, **kwargs: object) -> object:
        shard = capture(teacher, rows, **kwargs)
        shard.fields["logp"][:] -= np.float16(0.3)
        return shard

    monkeypatch.setattr(top_k_signal, "capture", wrong)
    with pytest.raises(VerificationFailed, match="audit"):
        build_all(built.config)
    assert name in read_damaged(built.signal)


@pytest.mark.parametrize("kind", ["inputs", "signal"])
def test_a_folder_that_nodes_do_not_share_is_named(
    built: Built, in_process: InProcess, make_config: Config, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = make_config("other")
    root = str(config.cache.dir)

    def on_another_node(stage_or_publish: Callable[..., object]) -> Callable[..., object]:
        def call(store: Store, *arguments: object) -> object:
            return stage_or_publish(Store(store.uri.replace(root, f"{root}-of-another-node")), *arguments)

        return call

    module, name = (text_inputs, "stage_unit") if kind == "inputs" else (top_k_signal, "publish_record")
    monkeypatch.setattr(module, name, on_another_node(getattr(module, name)))
    monkeypatch.setattr(ledger, "LISTING_SECONDS", 0)
    with pytest.raises(ConfigError, match=r"cache.dir: wanted folders that all nodes .* found (\d) of \1 files"):
        build_all(config)


def test_a_teacher_that_does_not_see_what_the_driver_has_begun_is_not_loaded(
    built: Built, in_process: InProcess, make_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("elsewhere")
    caches = Store(config.cache.dir)
    monkeypatch.setattr(signal_job, "Store", lambda uri: Store(uri.replace(caches.uri, f"{caches.uri}-elsewhere")))
    monkeypatch.setattr(ledger, "LISTING_SECONDS", 0)

    def load(*_: object) -> Teacher:
        pytest.fail("loaded a teacher")

    with pytest.raises(ConfigError, match=r"cache.dir: wanted folders that all nodes .* found none of the driver's"):
        build_signal(config, config.teachers[0], built.inputs, built.inputs_manifest, caches, factory=load)


def test_max_rows_takes_the_first_rows_of_the_source(
    built: Built, make_config: Config, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = build_all(make_config(source={"max_rows": 50}))
    ids = [row.row_id for r in some.inputs_manifest.shards for row in read_inputs(some.inputs, r.name)]
    every = [row.row_id for r in built.inputs_manifest.shards for row in read_inputs(built.inputs, r.name)]
    assert sorted(ids, key=_place) == sorted(every, key=_place)[:50]


def _place(row_id: str) -> tuple[str, int, int]:
    """Where a row stands in the source."""
    name, _, rest = row_id.partition("#")
    record, _, piece = rest.partition(".")
    return name, int(record), int(piece)


def test_units_are_read_only_as_far_as_max_rows_needs(
    make_config: Config, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_inputs, "FIRST_WAVE", 1)
    monkeypatch.setattr("raydistill.sources.text.UNIT_BYTES", 1)  # every file is a unit
    build_all(make_config(source={"max_rows": 10}))
    assert in_process.items[0] == 0
    assert 1 not in in_process.items


def test_fingerprints_follow_content_and_nothing_else(built: Built, make_config: Config) -> None:
    def prints(**changes: object) -> tuple[str, str]:
        config = make_config(**changes)
        inputs = build.inputs_content(config)
        return fingerprint_of(inputs), fingerprint_of(
            build.signal_content(config, config.teachers[0], built.inputs_manifest)
        )

    inputs, signal = prints()
    assert (inputs, signal) == (built.inputs_manifest.fingerprint, built.signal_manifest.fingerprint)
    same = prints(teacher={"name": "other", "weight": 0.3}, resources={"teacher": {"actors": (3, 9), "cpus": 2}})
    assert same == (inputs, signal)
    for change in ({"top_k": 5}, {"temperatures": (3.0,)}, {"codec": "u8"}, {"batch_tokens": 128}):
        assert prints(teacher=change)[1] != signal
    assert prints(source={"seq_len": 40})[0] != inputs
    assert prints(evaluate={"held_out": 0.3})[0] != inputs


def test_a_finished_cache_of_another_configuration_is_refused(built: Built) -> None:
    manifest = json.loads(built.signal.read("manifest.json"))
    manifest["content"]["top_k"] = 5
    manifest["fingerprint"] = fingerprint_of(manifest["content"])
    built.signal.publish("manifest.json", json.dumps(manifest))
    before = cache_bytes(built.signal)
    with pytest.raises(CacheMismatch, match="top_k: wanted 6, found 5"):
        build_all(built.config)
    assert cache_bytes(built.signal) == before


def test_an_unfinished_cache_of_another_configuration_is_refused(built: Built) -> None:
    built.signal.delete("manifest.json")
    built.signal.publish("content.json", json.dumps({"top_k": 5}))
    with pytest.raises(CacheMismatch, match="unfinished cache of another configuration"):
        build_all(built.config)


def test_more_ids_than_the_vocabulary_is_the_teachers_own_error(make_config: Config, in_process: InProcess) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        build_all(make_config(teacher={"top_k": 500}))


def test_a_source_without_a_usable_row_is_a_data_error(
    make_config: Config, in_process: InProcess, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no usable row"):
        build_all(make_config(source={"paths": [str(tmp_path / "empty.txt")]}))


def test_the_manifest_says_nothing_of_time_place_or_actors(
    built: Built, make_config: Config, in_process: InProcess
) -> None:
    other = build_all(make_config("elsewhere", resources={"teacher": {"actors": (1, 2)}}))
    assert other.signal.read("manifest.json") == built.signal.read("manifest.json")
    assert other.inputs.read("manifest.json") == built.inputs.read("manifest.json")
    assert not other.inputs.exists("staging")
    assert set(read_records(other.signal)) == {record.name for record in other.signal_manifest.shards}
    assert not other.signal.exists(DAMAGED)


def test_errors_for_the_user_travel_as_values() -> None:
    def broken() -> Callable[[object], dict[str, str]]:
        raise ConfigError("too large; set it lower")

    def fails(item: object) -> dict[str, str]:
        raise DataError(f"{item} is not readable")

    batch = {"item": np.array(["a.txt"])}
    for make, kind, words in (
        (broken, "ConfigError", "too large; set it lower"),
        (lambda: fails, "DataError", "a.txt is not readable"),
    ):
        (outcome,) = pool.Guarded(make)(batch)["outcome"]
        assert json.loads(outcome) == {"error": kind, "message": words}
