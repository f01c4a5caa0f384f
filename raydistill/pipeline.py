"""The stages of a run, in order; each one is skipped when its result is there.

inputs → signals → verify → init → train → evaluate → checklist → export → report. Whatever a stage makes lies in the
run folder or in the caches, and the next stage reads it from there, so a run can stop anywhere and go on later.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, partial

from pydantic import JsonValue, RootModel

from raydistill.cache.average import average_content
from raydistill.cache.build import build_average, build_inputs, build_signal
from raydistill.cache.calibration import calibration_rows
from raydistill.cache.content import inputs_content, signal_content
from raydistill.cache.ledger import Build, read_builds, require_seen
from raydistill.cache.manifest import Manifest, fingerprint_of, parsed
from raydistill.cache.open import require_episodes
from raydistill.cache.read import open_manifest
from raydistill.cache.verify import require_sound, verify
from raydistill.claim import alone, claim, require_own
from raydistill.cluster import connect, on_teacher_hardware, on_train_hardware, session
from raydistill.config.load import load_config
from raydistill.config.models import ProjectionInit
from raydistill.config.paths import resolve_paths
from raydistill.config.schema import STAGES, RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.training import PhaseConfig
from raydistill.config.world import EpisodesSource
from raydistill.errors import ConfigError, RaydistillError, VerificationFailed
from raydistill.evaluate.comparison import ROLES
from raydistill.evaluate.stage import EvaluateJob, check_evaluation, evaluate_run
from raydistill.export import export_run
from raydistill.models.agreement import check_vocabularies
from raydistill.models.denoiser_agreement import check_denoisers
from raydistill.models.student import publish_student
from raydistill.models.world.agreement import check_worlds
from raydistill.plan.placement import place
from raydistill.report import write_report
from raydistill.signals import AVERAGE
from raydistill.sources.buckets import buckets_of
from raydistill.spending import builds_on_gpus, held, in_words, priced
from raydistill.storage import Store
from raydistill.train.launch import PhaseJob, train_phase
from raydistill.train.online_worlds import is_online

SUMMARY_METRICS = (
    "perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "ece", "mse_to_teacher", "mse_to_noise",
    "tokens_per_second", "samples_per_second", "parameters", "bytes",
)  # fmt: skip
"""Lines of the table that a run ends with."""


class _Stages(RootModel[dict[str, dict[str, JsonValue]]]):
    """stages.json: facts of each stage."""


class Run:
    """One run: its configuration, its folder and its caches."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.store = Store(config.run_dir)
        self.caches = Store(config.cache.dir)
        self.stages: dict[str, dict[str, JsonValue]] = {}
        if self.store.exists("stages.json"):
            remedy = "Remove this file: caches are then verified, models evaluated and exported once more."
            where = f"{self.store.uri}/stages.json"
            self.stages = parsed(_Stages, self.store.read("stages.json"), where=where, remedy=remedy).root

    def record(self, stage: str, **facts: JsonValue) -> None:
        """Remember facts of a stage in stages.json."""
        self.stages[stage] = {**self.stages.get(stage, {}), **facts}
        self.store.publish("stages.json", json.dumps(self.stages, indent=1))

    def spent(self, stage: str, seconds: float, *, stopped: bool = False) -> None:
        """Add to the time that `stage` took over all the commands of this run, and to that of its GPUs."""
        found = held(self.config, stage, seconds, None if stopped else self._built(stage, seconds))
        more = {"gpu_seconds": found.students + found.teachers, "teacher_gpu_seconds": found.teachers}
        facts: dict[str, JsonValue] = {"seconds": self._added(stage, "seconds", seconds)}
        facts |= {key: self._added(stage, key, value) for key, value in more.items() if round(value, 2) > 0}
        if "gpu_seconds" in facts and not found.exact:
            facts["gpu_at_most"] = True
        self.record(stage, **facts)

    def _added(self, stage: str, key: str, more: float) -> float:
        before = self.stages.get(stage, {}).get(key, 0.0)
        assert isinstance(before, float | int)
        return round(before + more, 2)

    def _built(self, stage: str, seconds: float) -> list[Build]:
        """What `stage`, which took `seconds` and has just ended, added to its caches."""
        if not builds_on_gpus(self.config, stage):
            return []
        caches = [self.inputs] if stage == "inputs" else self.signals.values()
        builds = [build for store, _ in caches for build in read_builds(store)]
        return [build for build in builds if build.started > time.time() - seconds - 1]

    def costs(self) -> dict[str, dict[str, JsonValue]]:
        """What is known of each stage that ran, with the price of its GPUs."""
        return {stage: priced(self.config, self.stages[stage]) for stage in STAGES if stage in self.stages}

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished on just this basis."""
        return self.stages.get(stage, {}).get("key") == key

    @cached_property
    def inputs(self) -> tuple[Store, Manifest]:
        """The finished cache of inputs; `ConfigError` when the stage `inputs` has not been run."""
        return self._finished("inputs", inputs_content(self.config), stage="inputs")

    @cached_property
    def signals(self) -> dict[str, tuple[Store, Manifest]]:
        """The finished signal caches by teacher, and their average where there is one.

        `ConfigError` when the stage `signals` has not been run.
        """
        signals = {
            teacher.name: self._finished(
                teacher.name, signal_content(self.config, teacher, self.inputs[1]), stage="signals"
            )
            for teacher in self.config.teachers
            if not is_online(teacher)
        }
        if self.has_average:
            weights = {teacher.name: teacher.weight for teacher in self.config.teachers}
            signals[AVERAGE] = self._finished(AVERAGE, average_content(signals, weights), stage="signals")
        return signals

    def _finished(self, name: str, content: Mapping[str, JsonValue], *, stage: str) -> tuple[Store, Manifest]:
        store = self.caches / f"{name}-{fingerprint_of(content)}"
        if not store.exists("manifest.json"):
            raise ConfigError(
                f"the cache {store.uri} is not there or not finished; run the stage `{stage}` first (--stages {stage})"
            )
        manifest = open_manifest(store)
        manifest.require(fingerprint=fingerprint_of(content), content=content, where=store.uri)
        return store, manifest

    @property
    def has_average(self) -> bool:
        """Whether the average of the teachers' predictions is kept besides."""
        return self.config.cache.store == "average" and any(t.weight > 0 for t in self.config.teachers)

    @property
    def has_baseline(self) -> bool:
        """Whether the same student is also trained without a teacher."""
        return self.config.evaluate.baseline and any(p.recipe.uses_teacher for p in self.config.phases)

    def phases(self, group: str) -> list[tuple[PhaseConfig, str]]:
        """The phases and their folders: of the student (`phases`) or of its like without a teacher (`baseline`)."""
        phases = self.config.phases
        if group == "baseline":
            phases = tuple(p.model_copy(update={"recipe": p.recipe.without_teacher()}) for p in phases)
        return [(phase, f"{group}/{phase.name}") for phase in phases]

    def handed_over(self, group: str, index: int = -1, *, kind: str = "weights") -> str:
        """URI of the weights that phase `index` hands to the next phase, to evaluation and to export."""
        phase, folder = self.phases(group)[index]
        if not self.store.exists(f"{folder}/final/phase.json"):
            raise ConfigError(
                f"phase {phase.name!r} is not trained yet ({self.store.uri}/{folder}); run --stages train"
            )
        if kind == "ema":
            return f"{self.store.uri}/{folder}/final/ema.safetensors"
        return f"{self.store.uri}/{folder}/{'best' if phase.checkpoint.best_metric else 'final'}"


def run(config: RunConfig, stages: tuple[str, ...] | None = None) -> Run:
    """Run `stages` (default: all), in order. Each stage that is done already is skipped.

    A model whose source is `run://other.yaml` is the export of that run, which is run first when it is missing.
    """
    with alone(config.run_dir), session():
        this = begin(config, STAGES if stages is None else stages)
        advance(this, STAGES if stages is None else stages, asked=stages is not None)
        if stages is None or "report" in stages:
            print(summary(this), flush=True)
        return this


def begin(config: RunConfig, stages: Collection[str]) -> Run:
    """The run in its folder, once it is clear that the folder is its own and that `stages` have what they need."""
    run = Run(with_exports(config))
    require_own(run.store, run.config, [folder for _, folder in run.phases("phases")])
    check_evaluation(run.config)
    if {"inputs", "signals", "init"} & {*stages}:
        _check_agreement(run.config)
    claim(run.store, run.config)
    return run


def advance(run: Run, stages: Collection[str], *, asked: bool = False) -> None:
    """Go through `stages`, in order; with `asked`, what can be repeated is done again."""
    for stage in STAGES:
        if stage in stages:
            start = time.monotonic()
            try:
                _STAGES[stage](run, asked)
            except BaseException:
                with suppress(RaydistillError, OSError):  # what stopped the stage is what the user must hear
                    run.spent(stage, time.monotonic() - start, stopped=True)
                raise
            run.spent(stage, time.monotonic() - start)


def _check_agreement(config: RunConfig) -> None:
    """Raise `ConfigError` or `DataError` unless teachers and student can be asked about the same inputs."""
    match config.source:
        case TextSource():
            check_vocabularies(config)
        case ImagesSource() | VideosSource():
            check_denoisers(config, buckets_of(config.source))
        case PromptsSource():
            check_denoisers(config, (config.source.size,))
        case EpisodesSource():
            check_worlds(config)


def _inputs(run: Run, asked: bool) -> None:
    run.inputs = build_inputs(run.config, run.caches, connect=partial(_connect, run, asked))


def _connect(run: Run, asked: bool) -> None:
    """`connect` for a stage that others may follow: what those can never have is an error before anything is done."""
    if not asked:
        place(run.config)
    connect(run.config)


def _signals(run: Run, asked: bool) -> None:
    inputs, manifest = run.inputs
    ray = partial(_connect, run, asked)
    signals = {
        teacher.name: build_signal(run.config, teacher, inputs, manifest, run.caches, connect=ray)
        for teacher in run.config.teachers
        if not is_online(teacher)
    }
    if run.has_average:
        signals[AVERAGE] = build_average(run.config, manifest, signals, run.caches, connect=ray)
    run.signals = signals


def _verify(run: Run, asked: bool) -> None:
    inputs, manifest = run.inputs
    key = _key(manifest.model_dump(mode="json"), *(m.model_dump(mode="json") for _, m in run.signals.values()))
    if run.is_done("verify", key) and not asked:
        return
    require_sound(on_teacher_hardware(run.config, verify, run.config, inputs, manifest, run.signals))
    run.record("verify", key=key)


def _init(run: Run, asked: bool) -> None:
    if run.store.exists("init/student.json"):
        return
    init = run.config.first_student.init
    inputs = run.inputs[0] if isinstance(init, ProjectionInit) and init.calibration_rows else None
    if run.config.resources.train.gpus:  # the driver may stand on a small head, too small for what a student is made of
        on_train_hardware(run.config, _publish_student, run.config, run.store, inputs)
        require_seen(run.store / "init", ["student.json"])
    else:
        _publish_student(run.config, run.store, inputs)


def _publish_student(config: RunConfig, store: Store, inputs: Store | None) -> None:
    def opened() -> Store:
        assert inputs is not None, "only a projection that is calibrated asks for rows"
        return inputs

    publish_student(config.first_student, seed=config.seed, run=store, rows=calibration_rows(config, opened))


def _train(run: Run, asked: bool) -> None:
    require_episodes(run.config, run.inputs[0])
    for group in ("phases", "baseline") if run.has_baseline else ("phases",):
        for index, (phase, folder) in enumerate(run.phases(group)):
            weights = run.handed_over(group, index - 1, kind=phase.start_from) if index else None
            result = train_phase(_phase_job(run, phase, folder, weights), connect=partial(connect, run.config))
            tokens = f"{result.tokens:,} tokens, " if result.tokens else ""
            print(f"{folder}: {result.steps:,} steps, {tokens}{result.seconds:,.0f} s", flush=True)


def _phase_job(run: Run, phase: PhaseConfig, folder: str, weights: str | None) -> PhaseJob:
    if not run.store.exists("init/student.json"):
        raise ConfigError(f"the student is not built yet ({run.store.uri}/init); run the stage `init` first")
    return PhaseJob(
        config=run.config,
        phase=phase,
        run=run.store.uri,
        folder=folder,
        inputs=run.inputs[0].uri,
        signals={name: store.uri for name, (store, _) in run.signals.items()},
        student=f"{run.store.uri}/init",
        weights=weights,
    )


def _evaluate(run: Run, asked: bool) -> None:
    weights = {"student": run.handed_over("phases")}
    if run.has_baseline:
        weights["student_ce"] = run.handed_over("baseline")
    if run.config.phases[-1].ema:
        weights["student_ema"] = run.handed_over("phases", kind="ema")
    key = _key(
        run.config.evaluate.model_dump(mode="json"),
        *(run.store.sha256(f"{folder}/final/phase.json") for _, folder in run.phases("phases")),
    )
    if run.is_done("evaluate", key) and run.store.exists("metrics.json") and not asked:
        return
    job = EvaluateJob(
        config=run.config,
        inputs=run.inputs[0].uri,
        signals={name: store.uri for name, (store, _) in run.signals.items()},
        student=f"{run.store.uri}/init",
        weights=weights,
    )
    found = on_train_hardware(run.config, evaluate_run, job)
    for name, content in found.files.items():
        run.store.publish(name, content)
    run.store.publish("samples.json", json.dumps(found.samples, indent=1))
    run.store.publish("cache_stats.json", json.dumps(found.cache_stats, indent=1))
    run.store.publish("metrics.json", json.dumps(found.metrics, indent=1))
    run.record("evaluate", key=key)


def with_exports(config: RunConfig) -> RunConfig:
    """`config` with the folder of the export in place of each `run://other.yaml`; runs the other run if need be."""
    exports: dict[str, str] = {}

    def folder(source: str) -> str:
        if source.startswith("run://") and source not in exports:
            other = resolve_paths(load_config([source.removeprefix("run://")], []))
            if not Store(other.run_dir).exists("export"):
                print(f"{config.name}: {source} is not there yet; running it first", flush=True)
                run(other)
            exports[source] = f"{other.run_dir}/export"
        return exports.get(source, source)

    def replaced(value: JsonValue) -> JsonValue:
        if isinstance(value, dict):
            return {name: replaced(child) for name, child in value.items()}
        if isinstance(value, list):
            return [replaced(child) for child in value]
        return folder(value) if isinstance(value, str) else value

    dumped = config.model_dump(mode="json")
    changed = replaced(dumped)
    return RunConfig.model_validate(changed) if exports else config


def summary(run: Run) -> str:
    """What came out, as a table for the terminal."""
    if not run.store.exists("metrics.json"):
        return f"report: {run.store.uri}/report.html"
    metrics = json.loads(run.store.read_text("metrics.json"))
    roles = [role for role in (*ROLES, "student_ema") if role in metrics]
    rows = [(name, [metrics[role].get(name) for role in roles]) for name in SUMMARY_METRICS]
    lines = [f"{'':24}" + "".join(f"{role:>16}" for role in roles)]
    for name, values in rows:
        if any(value is not None for value in values):
            lines.append(f"{name:24}" + "".join(f"{_short(value):>16}" for value in values))
    if spending := in_words([*run.costs().values()]):
        lines += ["", spending]
    return "\n".join(["", *lines, "", f"report: {run.store.uri}/report.html", f"model:  {run.store.uri}/export"])


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _key(*parts: JsonValue) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _checklist(run: Run, asked: bool) -> None:
    if isinstance(run.config.source, EpisodesSource):
        _check_world(run, asked)
    elif asked:
        print("checklist: this kind of model has none; its result is the comparison in metrics.json", flush=True)


def _check_world(run: Run, asked: bool) -> None:
    """Print the checklist of a distilled world model; `VerificationFailed` when a line of it fails and was asked for.

    In a whole run a failed line is told and the student exported all the same, so that it can be looked at.
    """
    from raydistill.evaluate.world_checklist import checklist, table  # it brings torch

    if not run.store.exists("metrics.json"):
        raise ConfigError(f"{run.store.uri}/metrics.json is not there; run the stage `evaluate` first")
    if not run.config.teachers:
        return
    checks = checklist(run.config, run.store, weights=run.handed_over("phases"))
    run.store.publish("checklist.json", json.dumps([asdict(check) for check in checks], indent=1))
    print(table(checks), flush=True)
    failed = [check.what for check in checks if check.state == "fail"]
    if failed and asked:
        raise VerificationFailed(f"checklist: {len(failed)} of {len(checks)} lines failed: {'; '.join(failed)}")


def _export(run: Run, asked: bool) -> None:
    weights = run.handed_over("phases", kind=run.config.export.weights)
    if not run.store.exists("metrics.json"):
        raise ConfigError(f"{run.store.uri}/metrics.json is not there; run the stage `evaluate` first")
    key = _key(run.stages.get("evaluate", {}).get("key"), weights)
    if run.is_done("export", key) and run.store.exists("export") and not asked:
        return
    export_run(run.config, run.store, weights=weights)
    run.record("export", key=key)


def _report(run: Run, asked: bool) -> None:
    if run.store.exists("metrics.json"):
        metrics = json.loads(run.store.read_text("metrics.json"))
        times = {stage: facts for stage, facts in run.costs().items() if "seconds" in facts}
        run.store.publish("metrics.json", json.dumps({**metrics, "stages": times}, indent=1))
    write_report(run.store)


_STAGES: dict[str, Callable[[Run, bool], None]] = {
    "inputs": _inputs,
    "signals": _signals,
    "verify": _verify,
    "init": _init,
    "train": _train,
    "evaluate": _evaluate,
    "checklist": _checklist,
    "export": _export,
    "report": _report,
}
"""Each is called with whether the user named it with `--stages`; then work that can be repeated is done again."""
