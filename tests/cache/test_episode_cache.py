"""Caches of episodes and of what world models say of them: same bytes every time, damage found, order and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world_toys import PHASE, build_inputs, build_signal, run_config, teacher_folder, teacher_section, write_episodes

from raydistill.cache.content import signal_content
from raydistill.cache.dense import read_dense, write_dense
from raydistill.cache.episode_read import EpisodeDataset
from raydistill.cache.open import open_dataset, require_episodes
from raydistill.cache.shards import publish_record
from raydistill.cache.verify import check_inputs, check_signal, verify
from raydistill.config.schema import RunConfig
from raydistill.errors import CacheMismatch, ConfigError, SignalMismatch
from raydistill.storage import Store


def toy(folder: Path, **changes: Any) -> RunConfig:
    write_episodes(folder / "episodes")
    teacher_folder(folder / "teacher")
    return run_config(folder, **changes)


def rewritten(store: Store, name: str, change: dict[str, torch.Tensor]) -> None:
    """Shard `name` with other tensors, and its record made to fit."""
    shard = read_dense(store, name)
    tensors = {key: tensor.clone() for key, tensor in shard.tensors().items()} | change
    meta, rows = dict(shard.meta), shard.rows
    record = write_dense(store, name, tensors, meta=meta, split=str(meta["split"]), rows=rows)
    publish_record(store, record)


def test_clips_come_back_as_they_were_with_what_the_teacher_said(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, _ = build_inputs(config)
    signal, manifest = build_signal(config)
    data = open_dataset(config, inputs, {"big": signal}, split="train", fields={"big": ("frames", "tap.space")})
    batch = data.batch([0, data.num_rows - 1])
    assert batch["frames"].shape == (2, 5, 3, 12, 12)
    assert batch["actions"].shape == batch["valid"].shape == (2, 4)
    assert batch["big/frames"].shape == (2, 4, 3, 12, 12)
    assert batch["big/tap.space"].shape == (2, 4, 9, 9)
    with np.load(tmp_path / "episodes" / data.row_ids([0])[0].partition("@")[0]) as episode:
        assert np.array_equal(batch["frames"][0].numpy().transpose(0, 2, 3, 1), episode["frames"][:5])
        assert batch["actions"][0].tolist() == episode["actions"][:4].tolist()
    assert not data.silenced(batch)["valid"].any()
    assert manifest.facts["num_codes"] == 8


def test_the_same_episodes_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = toy(tmp_path), run_config(tmp_path, cache={"dir": str(tmp_path / "again")})
    shas = [[record.sha256 for record in build_signal(config)[1].shards] for config in (first, second)]
    shas += [[record.sha256 for record in build_inputs(config)[1].shards] for config in (first, second)]
    assert shas[0] == shas[1]
    assert shas[2] == shas[3]


def test_whole_episodes_are_held_out(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, _ = build_inputs(config)
    names = [
        {row.partition("@")[0] for row in data.row_ids(range(data.num_rows))}
        for data in (EpisodeDataset(inputs, {}, split=split, fields={}) for split in ("train", "held_out"))
    ]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 6


def test_rich_clips_are_seen_more_often_as_often_on_average_as_asked(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, manifest = build_inputs(config)
    once = EpisodeDataset(inputs, {}, split="train", fields={})
    often = EpisodeDataset(inputs, {}, split="train", fields={}, action_rich=100.0)
    rich = [
        float(str(value))
        for record in manifest.split_shards("train")
        for value in read_dense(inputs, record.name).meta["richness"]  # type: ignore[union-attr]
    ]
    assert often.num_rows == pytest.approx(sum(1 + 100 * r for r in rich), abs=len(rich))
    assert set(often.row_ids(range(often.num_rows))) == set(once.row_ids(range(once.num_rows)))
    assert np.all(np.diff(often.shard_of) >= 0)
    assert sum(often.shard_rows) == often.num_rows
    again = EpisodeDataset(inputs, {}, split="train", fields={}, action_rich=100.0)
    assert again.row_ids(range(50)) == often.row_ids(range(50))


def test_sound_caches_verify_and_the_audit_runs_the_teacher_again(tmp_path: Path, capsys: Any) -> None:
    config = toy(tmp_path)
    inputs, manifest = build_inputs(config)
    assert verify(config, inputs, manifest, {"big": build_signal(config)}) == []
    assert "audit of 4 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: {"frames": t["frames"] ^ 1}, "not those of its row_sha"),
        (lambda t: {"actions": t["actions"] + 5}, "none of the 5 of the action space"),
        (lambda t: {"valid": t["valid"] * 0}, "has 0 to 0 real steps"),
    ],
)
def test_damaged_inputs_are_named(tmp_path: Path, change: Any, what: str) -> None:
    inputs, manifest = build_inputs(toy(tmp_path))
    name = manifest.shards[0].name
    rewritten(inputs, name, change(read_dense(inputs, name).tensors()))
    records = tuple(r.model_copy(update=_fresh(inputs, r.name)) for r in manifest.shards)
    found = check_inputs(inputs, manifest.model_copy(update={"shards": records}))
    assert [what in damage.what for damage in found] == [True]


def _fresh(store: Store, name: str) -> dict[str, object]:
    return {"sha256": store.sha256(name), "bytes": store.size(name)}


def test_a_value_that_is_no_number_is_found_in_a_signal(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, inputs_manifest = build_inputs(config)
    signal, manifest = build_signal(config)
    name = manifest.shards[0].name
    frames = read_dense(signal, name).tensor("frames").clone()
    frames[1, 0, 0, 0, 0] = float("nan")
    rewritten(signal, name, {"frames": frames})
    records = tuple(r.model_copy(update=_fresh(signal, r.name)) for r in manifest.shards)
    (damage,) = check_signal(signal, manifest.model_copy(update={"shards": records}), inputs, inputs_manifest)
    assert "'frames' has a value that is not finite" in damage.what


def test_signals_of_other_clips_are_refused(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, manifest = build_inputs(config)
    signal, _ = build_signal(config)
    other = run_config(tmp_path, source={**config.source.model_dump(mode="json"), "clip_frames": 4})
    others, _ = build_inputs(other)
    with pytest.raises(CacheMismatch, match="was made from the inputs"):
        open_dataset(config, others, {"big": signal}, split="train", fields={"big": ("frames",)})
    name = manifest.split_shards("train")[0].name
    shard = read_dense(signal, name)
    meta = {**shard.meta, "row_sha": ["0" * 16] * shard.rows}
    write_dense(
        signal, name, {k: t.clone() for k, t in shard.tensors().items()}, meta=meta, split="train", rows=shard.rows
    )
    data = EpisodeDataset(
        inputs, {"big": signal}, split="train", fields={"big": ("frames",)}, local_folder=tmp_path / "local"
    )
    with pytest.raises(SignalMismatch, match="row_sha of row 0"):
        data.batch([0])


def test_rollouts_begin_as_their_clips_and_depend_on_row_and_seed_alone(tmp_path: Path) -> None:
    rollout = {"signal": "rollout", "initial_frames": 2}
    found = {}
    for key, changes in (("one", {}), ("batch", {"batch_rows": 1}), ("seed", {"seed": 1})):
        config = toy(tmp_path / key)
        config = run_config(
            tmp_path / key,
            teachers=[teacher_section(tmp_path / key, **rollout, **changes)],
            phases=[
                {**config.phases[0].model_dump(mode="json"), "recipe": {"kind": "features", "learn_from": "rollouts"}}
            ],
        )
        inputs, manifest = build_inputs(config)
        signal, signal_manifest = build_signal(config)
        assert check_signal(signal, signal_manifest, inputs, manifest) == []
        name = manifest.shards[0].name
        shard, real = read_dense(signal, name), read_dense(inputs, name)
        assert torch.equal(shard.tensor("trajectory")[:, :2], real.tensor("frames")[:, :2])
        found[key] = (shard.tensor("trajectory").clone(), shard.tensor("actions").clone())
    assert torch.equal(found["one"][1], found["batch"][1])
    assert torch.equal(found["one"][0], found["batch"][0])
    assert not torch.equal(found["one"][1], found["seed"][1])


def test_a_seed_or_a_tap_makes_another_signal_and_the_weight_does_not(tmp_path: Path) -> None:
    config = toy(tmp_path)
    _, manifest = build_inputs(config)
    before = signal_content(config, config.teachers[0], manifest)

    def after(**changes: Any) -> object:
        other = run_config(tmp_path, teachers=[teacher_section(tmp_path, **changes)])
        return signal_content(other, other.teachers[0], manifest)

    assert after(weight=3.0) == before
    assert after(taps={"x": "encoder.latents"}) != before
    assert after(rank=2) != before


def test_a_phase_may_learn_from_some_episodes_alone(tmp_path: Path) -> None:
    config = toy(tmp_path)
    inputs, _ = build_inputs(config)
    whole = EpisodeDataset(inputs, {}, split="train", fields={})
    name = whole.row_ids([0])[0].partition("@")[0]
    some = open_dataset(config, inputs, {}, split="train", fields={}, only=f"^{name}$")
    assert 0 < some.num_rows < whole.num_rows
    assert {row.partition("@")[0] for row in some.row_ids(range(some.num_rows))} == {name}
    assert sum(some.shard_rows) == some.num_rows
    with pytest.raises(ConfigError, match=r"recipe\.episodes: 'platformers' is found in no name of"):
        open_dataset(config, inputs, {}, split="train", fields={}, only="platformers")


def test_each_phase_has_its_own_domain_and_a_phase_without_any_is_refused_before_the_first(tmp_path: Path) -> None:
    write_episodes(tmp_path / "platformers", number=4)
    domains = {"platformers": {"paths": [str(tmp_path / "platformers")]}}
    first = {**PHASE, "name": "first"}

    def configured(pattern: str) -> RunConfig:
        last = {**PHASE, "name": "last", "recipe": {"kind": "features", "episodes": pattern}}
        plain = toy(tmp_path).model_dump(mode="json")
        return RunConfig.model_validate(
            {**plain, "source": {**plain["source"], "domains": domains}, "phases": [first, last]}
        )

    config = configured("^platformers/")
    inputs, _ = build_inputs(config)
    require_episodes(config, inputs)
    some = open_dataset(config, inputs, {}, split="train", fields={}, only="^platformers/")
    names = some.row_ids(range(some.num_rows))
    assert names
    assert all(name.startswith("platformers/episode-") for name in names)
    with pytest.raises(ConfigError, match=r"recipe\.episodes: '\^platformer/' is found in no name of"):
        require_episodes(configured("^platformer/"), inputs)
