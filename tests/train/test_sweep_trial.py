"""Trials in this process, without Ray: told twice, stopped anywhere, taken over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from phases import phase_job
from safetensors.torch import load_file

from raydistill.config.load import Draft
from raydistill.config.schema import RunConfig
from raydistill.search.curve import read_outcome
from raydistill.search.ledger import Ledger, TrialRecord, read_config, read_trial
from raydistill.search.trial import COMPLETE, adopt, complete_adoption, link_file, train_trial
from raydistill.storage import Store
from raydistill.train.checkpoint import Checkpoints

ALPHA = "phases.0.recipe.alpha"


class Stopped(BaseException):
    """As Ray Tune stops a trial: where it tells."""


class Listener:
    """Takes what a trial tells; stops it after `most` reports."""

    def __init__(self, most: int = 99):
        self.told: list[dict[str, float]] = []
        self._most = most

    def __call__(self, values: Mapping[str, float]) -> None:
        self.told.append(dict(values))
        if len(self.told) == self._most:
            raise Stopped

    @property
    def steps(self) -> list[float]:
        return [values["step"] for values in self.told]


class Toy:
    """Trials over toy caches: 8 steps, evaluated every second and saved every third."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.ledger = Ledger(Store(folder / "run"))

    def add(self, number: int, **changes: Any) -> Store:
        job = phase_job(self._folder, evaluate={"every_steps": 2})
        folder = self.ledger.folder(number)
        own = {"run_dir": folder.uri, "name": f"toy-{number}", **changes}
        config: RunConfig = Draft(job.config.model_dump(mode="json"), {}).config(own)
        record = TrialRecord(
            number=number, point=changes, values=changes, inputs=job.inputs, signals=dict(job.signals), init=job.student
        )
        self.ledger.add(record, config)
        return folder


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def weights(folder: Store) -> dict[str, list[Any]]:
    return {n: t.tolist() for n, t in load_file(folder.path("phases/one/final/model.safetensors")).items()}


def test_a_stopped_trial_tells_what_it_had_saved_and_ends_like_an_undisturbed_one(toy: Toy) -> None:
    calm, rough = toy.add(0), toy.add(1)
    listener = Listener()
    train_trial(calm, listener, wanted=["perplexity"])
    assert listener.steps == [2, 4, 6, 8, 8]
    assert listener.told[-1][COMPLETE] == 1
    assert listener.told[-1]["parameters"] > 0
    with pytest.raises(Stopped):
        train_trial(rough, Listener(3), wanted=["perplexity"])  # after step 6; the last checkpoint is that of step 3
    again = Listener()
    train_trial(rough, again, wanted=["perplexity"])
    assert again.steps == [2, 4, 6, 8, 8]
    assert again.told[:-1] == listener.told[:-1], "evaluations are told as they were or made again the same"
    assert weights(rough) == weights(calm)
    outcome = read_outcome(rough, read_config(rough))
    assert outcome.complete
    assert outcome.metrics == {k: v for k, v in again.told[-1].items() if k not in ("step", COMPLETE)}
    assert not rough.exists("phases/one/checkpoints"), "of no use once the phase is finished"
    third = Listener()
    train_trial(rough, third, wanted=["perplexity"])
    assert third.told == again.told, "a finished trial only tells"


def test_the_untrained_student_is_shared_and_not_copied(toy: Toy, tmp_path: Path) -> None:
    folder = toy.add(0)
    with pytest.raises(Stopped):
        train_trial(folder, Listener(1), wanted=[])
    shared, own = tmp_path / "init/model.safetensors", Path(folder.path("init/model.safetensors"))
    assert own.stat().st_ino == shared.stat().st_ino
    assert json.loads(folder.read_text("costs.json"))["parameters"] > 0


def test_speed_is_measured_only_where_it_is_asked_for(toy: Toy) -> None:
    slow, fast = toy.add(0), toy.add(1)
    for folder, wanted in ((slow, ["perplexity"]), (fast, ["perplexity", "tokens_per_second"])):
        with pytest.raises(Stopped):
            train_trial(folder, Listener(1), wanted=wanted)
    assert "tokens_per_second" not in json.loads(slow.read_text("costs.json"))
    assert json.loads(fast.read_text("costs.json"))["tokens_per_second"] > 0


def test_trials_with_one_student_say_one_thing_of_what_it_costs(toy: Toy) -> None:
    shared = toy.ledger.store / "costs/student"
    for number in range(2):
        folder = toy.add(number)
        toy.ledger.write(read_trial(folder).model_copy(update={"costs": shared.uri}))
        with pytest.raises(Stopped):
            train_trial(folder, Listener(1), wanted=["tokens_per_second"])
        shared.publish("costs.json", shared.read_text("costs.json").replace("}", ', "seen": 1}'))
    assert json.loads(toy.ledger.folder(1).read_text("costs.json"))["seen"] == 1


def test_a_trial_takes_over_weights_and_goes_on_with_other_values(toy: Toy) -> None:
    donor, folder = toy.add(0, **{ALPHA: 0.9}), toy.add(1, **{ALPHA: 0.1})
    for store, reports in ((donor, 4), (folder, 2)):
        with pytest.raises(Stopped):
            train_trial(store, Listener(reports), wanted=[])
    values = {ALPHA: 0.72}
    adopt(toy.ledger, 1, 0, values, values, "mark")
    latest = Checkpoints(folder / "phases/one/checkpoints", 1).latest()
    assert latest is not None
    assert latest.step == 6
    assert read_config(folder).phases[0].recipe.alpha == 0.72
    assert read_trial(folder).taken_from == ((0, 6),)
    assert read_trial(folder).values == values
    adopt(toy.ledger, 1, 0, {ALPHA: 0.5}, {ALPHA: 0.5}, "mark")
    assert read_trial(folder).values == values, "once per mark"
    listener = Listener()
    train_trial(folder, listener, wanted=[], told=True)
    assert listener.steps == [8, 8], "it went on from the donor's checkpoint"
    assert [e.step for e in read_outcome(folder, read_config(folder)).curve] == [2, 4, 6, 8]


def test_a_takeover_that_was_killed_half_way_is_completed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    import raydistill.search.trial as module

    donor, folder = toy.add(0, **{ALPHA: 0.9}), toy.add(1, **{ALPHA: 0.1})
    for store in (donor, folder):
        with pytest.raises(Stopped):
            train_trial(store, Listener(4), wanted=[])

    def killed(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_config", killed)
        with pytest.raises(Stopped):
            adopt(toy.ledger, 1, 0, {ALPHA: 0.5}, {ALPHA: 0.5}, "mark")
    assert read_config(folder).phases[0].recipe.alpha == 0.1, "the kill came in between"
    complete_adoption(toy.ledger, 1)
    listener = Listener()
    train_trial(folder, listener, wanted=[], told=True)
    assert listener.steps == [8, 8]
    assert read_config(folder).phases[0].recipe.alpha == 0.5


def test_nothing_is_taken_over_where_there_is_nothing(toy: Toy) -> None:
    toy.add(0)
    folder = toy.add(1, **{ALPHA: 0.1})
    adopt(toy.ledger, 1, 0, {ALPHA: 0.5}, {ALPHA: 0.5}, "mark")
    assert read_config(folder).phases[0].recipe.alpha == 0.1
    assert read_trial(folder).taken_from == ()


def test_a_linked_file_is_one_file_and_replacing_one_leaves_the_other(tmp_path: Path) -> None:
    source, target = Store(tmp_path / "a"), Store(tmp_path / "b")
    source.publish("x", "first")
    link_file(source, target, "x")
    assert (tmp_path / "a/x").stat().st_ino == (tmp_path / "b/x").stat().st_ino
    source.publish("x", "second")
    assert target.read_text("x") == "first"
