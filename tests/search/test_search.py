"""What a sweep decides without a cluster: trials, caches, early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fake_sweep import ALPHA, GRID, MANY, TEMPERATURE
from ray.tune.schedulers import TrialScheduler

from raydistill.cache.average import average_content
from raydistill.cache.manifest import Manifest, fingerprint_of
from raydistill.config.load import Draft, read_draft
from raydistill.config.schema import RunConfig
from raydistill.config.sweep import SweepConfig
from raydistill.config.tune import Space, load_space
from raydistill.errors import ConfigError
from raydistill.search import caches, optuna
from raydistill.search import sweep as module
from raydistill.search.caches import Caches, refuse_rebuilds
from raydistill.search.curve import Evaluated, Outcome, read_outcome
from raydistill.search.feed import Learning, Listed
from raydistill.search.ledger import Ledger, TrialRecord, read_config, read_trial
from raydistill.search.results import Result
from raydistill.search.schedulers import Past, explorer, make_scheduler, remember
from raydistill.search.sweep import _Sweep
from raydistill.search.tuner import FAILURE, Source, _Book, place_of
from raydistill.storage import Store

RUN = """\
name: toy
source: {paths: [a.txt], tokenizer: gpt2, seq_len: 16}
teachers: [{name: big, top_k: 16, model: {source: org/big}}, {name: other, top_k: 16, model: {source: org/other}}]
student: {model: {source: org/small}}
phases:
  - {name: one, steps: 40, recipe: {alpha: 0.5}, batch: {global_size: 8, micro_size: 4}, optimizer: {student: {lr: 1}}}
evaluate: {every_steps: 10}
"""


def space_of(folder: Path, text: str, *overrides: str) -> Space:
    (folder / "run.yaml").write_text(RUN)
    (folder / "space.yaml").write_text(text)
    draft = read_draft([folder / "run.yaml"], [f"run_dir={folder}/run", *overrides])
    return load_space(folder / "space.yaml", draft)


def grid_of(key: str, values: str) -> str:
    return f"metrics: [perplexity]\nsearcher: grid\nspace: {{{key}: {{kind: grid, values: {values}}}}}\n"


def record(number: int = 0, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {"number": number, "point": {}, "values": {}, "inputs": "i", "signals": {}, "init": None}
    return TrialRecord(**(fields | changes))


def config_of(**changes: Any) -> RunConfig:
    return Draft(yaml.safe_load(RUN), {}).config(changes)


# The ledger ---------------------------------------------------------------------------------------------------------


def test_the_ledger_gives_back_what_was_written(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    for number in (10, 2):
        ledger.add(record(number, values={ALPHA: 0.5}), config_of(run_dir=f"x{number}"))
    assert [r.number for r in ledger.trials()] == [2, 10]
    assert read_config(ledger.folder(10)).run_dir == "x10"
    ledger.write(read_trial(ledger.folder(2)).model_copy(update={"status": "done"}))
    assert [r.status for r in ledger.trials()] == ["done", "open"]


def test_a_trials_configuration_can_be_read_by_the_command_line(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    config = config_of(**{ALPHA: 0.25, "phases.0.optimizer.student.lr": 1e-5})
    ledger.add(record(), config)
    assert read_draft([tmp_path / "sweep/trials/000/config.yaml"]).config() == config


def test_a_sweep_of_another_space_or_run_is_refused_and_more_trials_are_not(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    random8 = MANY | {"trials": 8}
    ledger.begin(SweepConfig.model_validate(random8 | {"seed": 7}), config_of())
    ledger.begin(SweepConfig.model_validate(random8), config_of())  # no trial was made of the other
    ledger.add(record(), config_of())
    more = SweepConfig.model_validate(random8 | {"trials": 12, "concurrent": 1})
    ledger.begin(more, config_of(**{"phases.0.log_every": 1}))
    with pytest.raises(ConfigError, match=r"phases\.0\.steps: it has 40, this command 50"):
        ledger.begin(SweepConfig.model_validate(random8), config_of(**{"phases.0.steps": 50}))
    with pytest.raises(ConfigError, match=r"evaluate\.max_rows"):
        ledger.begin(SweepConfig.model_validate(random8), config_of(**{"evaluate.max_rows": 5}))
    with pytest.raises(ConfigError, match=r"space file: seed: it has 0, this command 1"):
        ledger.begin(SweepConfig.model_validate(random8 | {"seed": 1}), config_of())


# Caches -------------------------------------------------------------------------------------------------------------


class FakeRun:
    """A run whose caches are built, made of what decides them."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.inputs = (Store("/none"), _manifest(_inputs(config)))
        self.signals = {
            t.name: (Store("/none"), _manifest(_signal(config, t, self.inputs[1]), parent=self.inputs[1].fingerprint))
            for t in config.teachers
        }


def _manifest(content: dict[str, Any], parent: str | None = None) -> Manifest:
    kind = "signal" if parent else "inputs"
    fingerprint = fingerprint_of(content)
    return Manifest(kind=kind, content=content, fingerprint=fingerprint, parent=parent, fields={}, shards=())


def _inputs(config: RunConfig) -> dict[str, Any]:
    return {"source": config.source.model_dump(mode="json"), "held_out": config.evaluate.held_out}


def _signal(config: RunConfig, teacher: Any, manifest: Manifest) -> dict[str, Any]:
    return {"teacher": teacher.model_dump(mode="json", exclude={"name", "weight"}), "inputs": manifest.fingerprint}


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "inputs_content", _inputs)
    monkeypatch.setattr(caches, "signal_content", _signal)


def refused(folder: Path, key: str, values: str, *, built: Any = "signals", more: str = "") -> str:
    space = space_of(folder, more + grid_of(key, values))
    found = Caches(FakeRun(space.base), built)  # type: ignore[arg-type]
    try:
        refuse_rebuilds(space, found, space.config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("contents")
def test_a_value_that_changes_a_cache_is_refused_with_its_name(tmp_path: Path) -> None:
    inputs = fingerprint_of(_inputs(space_of(tmp_path, grid_of(ALPHA, "[1]")).base))
    message = refused(tmp_path, "source.seq_len", "[16, 32]")
    assert f"source.seq_len=32 would need another cache than inputs-{inputs}, big-" in message
    assert "allow_rebuild: true" in message
    assert refused(tmp_path, "evaluate.held_out", "[0.02, 0.1]", built="nothing").count("inputs-") == 1
    signal = refused(tmp_path, "teachers.1.top_k", "[8, 16]")
    assert "teachers.1.top_k=8 would need another cache than other-" in signal
    assert "big-" not in signal
    assert "inputs-" not in signal


@pytest.mark.usefixtures("contents")
@pytest.mark.parametrize(
    ("key", "values"),
    [
        (ALPHA, "[0.1, 1.0]"),
        (TEMPERATURE, "[1.0, 4.0]"),
        ("phases.0.recipe.top_k", "[1, 8]"),
        ("phases.0.recipe.divergence", "[jsd, reverse_kl]"),
        ("teachers.0.weight", "[0.5, 3]"),
        ("student.init", "[{kind: layers, num_layers: 2}, {kind: random}]"),
        ("seed", "[1, 2]"),
        ("source.seq_len", "[16]"),
    ],
)
def test_a_value_that_changes_no_cache_is_not_refused(key: str, values: str, tmp_path: Path) -> None:
    assert refused(tmp_path, key, values) == ""


@pytest.mark.usefixtures("contents")
def test_rebuilding_may_be_allowed(tmp_path: Path) -> None:
    assert refused(tmp_path, "source.seq_len", "[16, 32]", more="allow_rebuild: true\n") == ""


@pytest.mark.usefixtures("contents")
def test_weights_of_averaged_teachers_change_the_average(tmp_path: Path) -> None:
    base = config_of()
    config = base.model_copy(update={"cache": base.cache.model_copy(update={"store": "average"})})
    run: Any = FakeRun(config)
    found = Caches(run, "signals")
    heavier = config.model_copy(
        update={"teachers": (config.teachers[0].model_copy(update={"weight": 3.0}), config.teachers[1])}
    )
    own = fingerprint_of(average_content(run.signals, {"big": 1.0, "other": 1.0}))
    assert found.changed(heavier) == [f"average-{own}"]
    doubled = tuple(teacher.model_copy(update={"weight": 2.0}) for teacher in config.teachers)
    assert found.changed(config.model_copy(update={"teachers": doubled})) == [], "the weights are normalised"
    each: Any = FakeRun(base)
    assert Caches(each, "signals").changed(base.model_copy(update={"teachers": heavier.teachers})) == []


# Curves -------------------------------------------------------------------------------------------------------------


def lines(folder: Path, *entries: dict[str, Any], cut: str = "") -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + cut)
    return Store(folder)


def test_an_outcome_counts_steps_over_phases_and_takes_the_last_evaluation(tmp_path: Path) -> None:
    phases = [{**config_of().phases[0].model_dump(mode="json"), "name": name} for name in ("one", "two")]
    config = config_of(phases=phases)
    folder = lines(
        tmp_path,
        {"phase": "one", "step": 10, "evaluation": {"perplexity": 9.0}},
        {"phase": "one", "step": 40, "loss": 2.0, "samples": 320, "tokens": 900, "seconds": 4.0},
        {"phase": "two", "step": 5, "loss": 1.0, "samples": 40, "tokens": 100, "seconds": 1.5},
        {"phase": "two", "step": 5, "evaluation": {"perplexity": 7.0}},
        cut='{"phase": "two", "step": 6, "evalua',
    )
    folder.publish("costs.json", json.dumps({"parameters": 12}))
    outcome = read_outcome(folder, config)
    assert [(e.phase, e.step, e.total_step) for e in outcome.curve] == [(0, 10, 10), (1, 5, 45)]
    assert outcome.metrics == {"perplexity": 7.0, "parameters": 12.0}
    assert (outcome.phase_steps, outcome.samples, outcome.tokens, outcome.seconds) == ((40, 5), 360, 1000, 5.5)
    assert not outcome.complete


def test_an_outcome_is_that_of_the_weights_that_are_handed_over(tmp_path: Path) -> None:
    config = config_of(**{"phases.0.checkpoint.best_metric": "perplexity"})
    values = {10: 8.0, 20: 6.0, 30: 7.0}
    folder = lines(tmp_path, *({"phase": "one", "step": s, "evaluation": {"perplexity": v}} for s, v in values.items()))
    (folder / "phases/one/best").publish("best.json", json.dumps({"step": 20, "metric": "perplexity", "value": 6.0}))
    assert read_outcome(folder, config).metrics["perplexity"] == 6.0


# Which trial comes next ---------------------------------------------------------------------------------------------


class FakeSweep:
    """Writes trials down without configuring them; refuses what `refuses` says."""

    def __init__(self, space: Space, folder: Path, refuses: Any = lambda point: False):
        self.space, self.sweep, self.ledger = space, space.sweep, Ledger(Store(folder))
        self._refuses = refuses

    def add(self, number: int, point: Any, parameters: Any) -> None:
        if self._refuses(point):
            raise ConfigError("these do not go together")
        self.ledger.add(record(number, point=point, parameters=dict(parameters)), config_of())


def drained(feed: Any) -> list[int]:
    return [*iter(feed.next, None)]


def test_open_trials_come_first_and_every_point_once(tmp_path: Path) -> None:
    space = space_of(tmp_path, grid_of(ALPHA, "[0.1, 0.2, 0.3, 0.4]"))
    sweep = FakeSweep(space, tmp_path)
    first = Listed(sweep, [])
    assert (first.total(), first.left(), first.next(), first.next()) == (4, 4, 0, 1)
    again = Listed(sweep, [1])  # 0 has ended, 1 was running when everything was killed
    assert (again.total(), again.left()) == (4, 3)
    assert drained(again) == [1, 2, 3]
    assert [r.point[ALPHA] for r in sweep.ledger.trials()] == [0.1, 0.2, 0.3, 0.4]
    assert drained(Listed(sweep, [])) == []


OPTUNA = f"""\
metrics: [perplexity, parameters]
searcher: optuna
trials: 6
space: {{{ALPHA}: {{kind: uniform, low: 0, high: 1}}}}
"""


def test_optuna_goes_on_with_what_was_learned_and_the_open_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = FakeSweep(space_of(tmp_path, OPTUNA), tmp_path)
    first = Learning(sweep, [], [])
    numbers = [first.next() for _ in range(3)]
    assert numbers == [0, 1, 2]
    first.learn(0, {"perplexity": 3.0, "parameters": 1.0})
    points = {r.number: r.point for r in sweep.ledger.trials()}
    sweep.ledger.write(read_trial(sweep.ledger.folder(0)).model_copy(update={"status": "done"}))
    sweep.ledger.write(read_trial(sweep.ledger.folder(1)).model_copy(update={"status": "failed"}))
    measured = Outcome(metrics={"perplexity": 3.0, "parameters": 1.0})
    past = [Result(r, measured) for r in sweep.ledger.trials()]
    again = Learning(sweep, [2], past)
    assert (again.total(), again.left()) == (6, 4)
    assert drained(again) == [2, 3, 4, 5]
    after = {r.number: r.point for r in sweep.ledger.trials()}
    assert {n: after[n] for n in points} == points, "the open trial keeps its values"
    assert len({json.dumps(point) for point in after.values()}) == 6, "no point is drawn twice"
    again.learn(2, {"perplexity": 2.0, "parameters": 1.0})
    again.learn(3, None)


def test_values_that_do_not_go_together_cost_optuna_a_number_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    refusing = FakeSweep(space_of(tmp_path, OPTUNA), tmp_path, refuses=lambda point: point[ALPHA] > 0.5)
    numbers = drained(Learning(refusing, [], []))
    assert 0 < len(numbers) < 6
    assert [r.number for r in refusing.ledger.trials()] == numbers
    assert "these do not go together" in capsys.readouterr().out


def test_optuna_finds_the_better_half_of_a_line(tmp_path: Path) -> None:
    """TPE on (alpha - 0.8)²: after 10 random trials, its trials lie nearer to 0.8 than uniform ones (mean 0.34)."""
    pytest.importorskip("optuna")
    text = OPTUNA.replace("trials: 6", "trials: 22").replace("[perplexity, parameters]", "[perplexity]")
    sweep = FakeSweep(space_of(tmp_path, text), tmp_path)
    feed = Learning(sweep, [], [])
    while (number := feed.next()) is not None:
        alpha = float(str(read_trial(sweep.ledger.folder(number)).point[ALPHA]))
        feed.learn(number, {"perplexity": (alpha - 0.8) ** 2})
    late = [abs(float(str(r.point[ALPHA])) - 0.8) for r in sweep.ledger.trials()[10:]]
    assert sum(late) / len(late) < 0.2


def test_without_optuna_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'raydistill\[tune\]'"):
        optuna.require_optuna()


# Early stopping -----------------------------------------------------------------------------------------------------


def stopping(kind: object) -> SweepConfig:
    return SweepConfig.model_validate(GRID | {"scheduler": kind})


def past(number: int, *values: float) -> tuple[int, Outcome]:
    steps = range(10, 10 * len(values) + 1, 10)
    return number, Outcome(tuple(Evaluated(0, s, s, {"perplexity": v}) for s, v in zip(steps, values, strict=True)))


def decides(scheduler: Any, *values: float) -> list[str]:
    """The decisions on a new trial."""
    trial: Any = Past(99)
    scheduler.on_trial_add(None, trial)
    steps = range(10, 10 * len(values) + 1, 10)
    reports = [{"step": s, "perplexity": v} for s, v in zip(steps, values, strict=True)]
    return [scheduler.on_trial_result(None, trial, report) for report in reports]


def test_successive_halving_remembers_the_trials_of_an_earlier_command() -> None:
    sweep = stopping({"kind": "asha", "reduction_factor": 2})
    forgetful, remembering = (make_scheduler(sweep, first_evaluation=10) for _ in range(2))
    remember(remembering, [past(0, 5.0, 4.0), past(1, 6.0, 5.0)])
    assert decides(forgetful, 9.0) == [TrialScheduler.CONTINUE]
    assert decides(remembering, 9.0) == [TrialScheduler.STOP]
    assert decides(make_scheduler(sweep, first_evaluation=10), 5.0, 1.0) == [TrialScheduler.CONTINUE] * 2


def test_the_median_rule_remembers_and_never_pauses() -> None:
    sweep = stopping({"kind": "median", "min_trials": 2})
    scheduler = make_scheduler(sweep, first_evaluation=10)
    remember(scheduler, [past(0, 5.0, 4.0), past(1, 6.0, 5.0)])
    assert decides(scheduler, 9.0) == [TrialScheduler.STOP]
    assert decides(make_scheduler(sweep, first_evaluation=10), 9.0, 8.0) == [TrialScheduler.CONTINUE] * 2


def test_a_metric_of_which_more_is_better_is_judged_so() -> None:
    halving = {"kind": "asha", "reduction_factor": 2}
    sweep = SweepConfig.model_validate(
        GRID | {"scheduler": halving, "metrics": [{"name": "perplexity", "mode": "max"}]}
    )
    scheduler = make_scheduler(sweep, first_evaluation=10)
    remember(scheduler, [past(0, 5.0), past(1, 6.0)])
    assert decides(scheduler, 9.0) == [TrialScheduler.CONTINUE]
    scheduler = make_scheduler(sweep, first_evaluation=10)
    remember(scheduler, [past(0, 5.0), past(1, 6.0)])
    assert decides(scheduler, 2.0) == [TrialScheduler.STOP]


def test_a_population_changes_values_inside_the_space() -> None:
    space = {ALPHA: {"kind": "uniform", "low": 0.5, "high": 1.0}}
    sweep = SweepConfig.model_validate({"space": space, "metrics": ["perplexity"], "trials": 4, "scheduler": "pbt"})
    explore, donor = explorer(sweep), {"of": {"trial": 3, "point": {ALPHA: 0.9}, "values": {ALPHA: 0.9}, "run": "r"}}
    made = [explore(donor)["of"] for _ in range(40)]
    assert all(0.5 <= m["values"][ALPHA] <= 1.0 and m["values"][ALPHA] == m["point"][ALPHA] for m in made)
    assert len({m["mark"] for m in made}) == 40
    assert donor["of"]["point"] == {ALPHA: 0.9}


# What Ray Tune is told, and what is written down --------------------------------------------------------------------


def test_the_source_gives_out_numbers_and_learns_by_them() -> None:
    waiting, learned = [7, 8], []
    source = Source(lambda: waiting.pop(0) if waiting else None, lambda *ended: learned.append(ended))
    source.common = {"run": "uri"}
    assert source.suggest("a") == {"of": {"trial": 7, "run": "uri"}}
    assert source.suggest("b") == {"of": {"trial": 8, "run": "uri"}}
    assert source.suggest("c") == Source.FINISHED
    source.on_trial_complete("b", {"perplexity": 2.0})
    source.on_trial_complete("a", None, error=True)
    assert learned == [(8, {"perplexity": 2.0}), (7, None)]
    assert place_of("5f3a1_00003") == 3


def test_the_book_says_how_each_trial_ended(tmp_path: Path) -> None:
    ledger, ended = Ledger(Store(tmp_path)), []
    for number in range(4):
        ledger.add(record(number), config_of())
    trials: Any = SimpleNamespace(ledger=ledger, ended=ended.append)
    book = _Book(trials, None)

    def trial(number: int, **last: float) -> Any:
        return SimpleNamespace(config={"of": {"trial": number}}, last_result=last, trial_id="x")

    book.on_trial_start(0, [], trial(0))
    book.on_trial_complete(0, [], trial(0, complete=1.0))
    book.on_trial_complete(0, [], trial(1, step=10))
    ledger.folder(2).publish(FAILURE, json.dumps({"error": "the loss is not a number", "again": False}))
    book.on_trial_error(0, [], trial(2))
    book.on_trial_error(0, [], trial(3))
    found = ledger.trials()
    assert [r.status for r in found] == ["done", "stopped", "failed", "failed"]
    assert [(r.error, r.again) for r in found[2:]] == [
        ("the loss is not a number", False),
        ("its process died (out of memory, or a node was lost)", True),
    ]
    assert ended == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("train", "asked", "room", "expected"),
    [
        ({"workers": 0, "cpus": 2}, None, 4, 4),
        ({"workers": 0, "cpus": 2}, 3, 4, 3),
        ({"workers": 4, "cpus": 1}, None, 11, 2),
        ({"workers": [4, 8], "cpus": 1}, 9, 11, 2),
        ({"workers": 8, "cpus": 1}, None, 8, 1),
    ],
)
def test_no_more_trials_at_a_time_than_there_is_room_for(
    train: dict[str, Any], asked: int | None, room: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "room", lambda *size: room)
    monkeypatch.setattr(module, "require_cluster", lambda *wanted, **words: None)
    monkeypatch.setattr(module, "require_room", lambda resources, cluster: None)
    sweep = SweepConfig.model_validate(MANY | {"concurrent": asked, "scheduler": "none"})
    config = config_of(**{"resources.train": train})
    this = SimpleNamespace(run=SimpleNamespace(config=config), sweep=sweep)
    assert _Sweep.at_a_time(this) == expected  # type: ignore[arg-type]


def test_a_trial_without_room_is_refused_before_a_teacher_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(module, "connect", lambda config: done.append("connect"))
    monkeypatch.setattr(module, "refuse_rebuilds", lambda *parts: done.append("compare"))
    monkeypatch.setattr(module, "advance", lambda run, stages: done.append(stages[0]))

    def no_room() -> int:
        raise ConfigError("resources.train: wanted 1 trial with 64 CPU")

    run: Any = SimpleNamespace(store=Store(tmp_path), config=config_of(**{"resources.train.cpus": 64}))
    sweep = _Sweep(space_of(tmp_path, grid_of(ALPHA, "[1]")), run, Ledger(run.store))
    monkeypatch.setattr(sweep, "at_a_time", no_room)
    with pytest.raises(ConfigError, match="64 CPU"):
        sweep.build()
    assert done == ["compare", "connect"]
