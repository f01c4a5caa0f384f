"""Checks that span sections of the configuration and need neither torch nor data.

Each problem is one line that starts with the dotted key it is about.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from pydantic import JsonValue

from raydistill.config.accelerators import misspelt_accelerators
from raydistill.config.base import Config
from raydistill.config.metrics import training_metrics
from raydistill.config.models import DiffusersModel, ProjectionInit, PythonModel, TransformersModel
from raydistill.config.recipes import (
    CausalConsistencyRecipe,
    LmLogitsRecipe,
    NoisePredictionRecipe,
    SelfForcingRecipe,
    TeacherForcingRecipe,
    TrajectoryRecipe,
)
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TopKLogitsTeacher
from raydistill.config.world import (
    AttentionRule,
    EpisodesSource,
    FeatureRule,
    FeaturesRecipe,
    RolloutTeacher,
    WorldModel,
    WorldTeacher,
)

if TYPE_CHECKING:
    from raydistill.config.schema import RunConfig

RESERVED_TEACHERS = ("inputs", "average", "student", "student_init", "student_ce", "comparison")
"""Names that caches and metrics.json use for other things than a teacher."""
RESERVED_PHASES = ("baseline",)
"""Names that the run folder uses for other things than a phase."""
PLAYERS: dict[type[Config], tuple[str, ...]] = {
    LmLogitsRecipe: ("student",),
    NoisePredictionRecipe: ("student",),
    TrajectoryRecipe: ("student",),
    SelfForcingRecipe: ("student", "critic"),
    CausalConsistencyRecipe: ("student",),
    TeacherForcingRecipe: ("student",),
    FeaturesRecipe: ("student",),
}
"""The networks that each recipe trains, each of which needs an optimizer."""
SIGNALS: dict[type[Config], type[Config]] = {
    LmLogitsRecipe: TopKLogitsTeacher,
    NoisePredictionRecipe: NoisePredictionTeacher,
    TrajectoryRecipe: OdeTrajectoryTeacher,
    FeaturesRecipe: WorldTeacher,
}
"""The signal that each recipe reads, if it reads any."""
RECIPES_OF: dict[type[Config], tuple[type[Config], ...]] = {
    TextSource: (LmLogitsRecipe,),
    ImagesSource: (NoisePredictionRecipe, TrajectoryRecipe),
    VideosSource: (
        NoisePredictionRecipe,
        TrajectoryRecipe,
        SelfForcingRecipe,
        CausalConsistencyRecipe,
        TeacherForcingRecipe,
    ),
    PromptsSource: (TrajectoryRecipe, SelfForcingRecipe),
    EpisodesSource: (FeaturesRecipe,),
}
"""The recipes that learn from each kind of source."""


LIBRARIES: dict[type[Config], tuple[type[Config], ...]] = {
    TextSource: (TransformersModel, PythonModel),
    EpisodesSource: (WorldModel,),
}
"""The models that learn from each kind of source; denoisers of diffusers from all others."""
CAUSAL = (SelfForcingRecipe, CausalConsistencyRecipe, TeacherForcingRecipe)
"""Recipes of students that make videos chunk by chunk."""
SAME_TIME = 1e-6
"""Times that differ by no more are one time."""


SECRET = re.compile(
    r"^\w+://[^/@\s]*:[^/@\s]+@|\bAKIA[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Credentials inside a URI, and what access keys look like."""


def problems(config: RunConfig) -> list[str]:
    """Everything that is wrong between the sections of `config`."""
    return [
        *_secrets(config.model_dump(mode="json")),
        *_folders(config),
        *_names(config),
        *_weights(config),
        *_kinds(config),
        *_generator(config),
        *_guidance(config),
        *_online(config),
        *_average(config),
        *_projection(config),
        *_clips(config),
        *(p for i in range(len(config.phases)) for p in _phase(config, i)),
        *(p for i in range(len(config.phases)) for p in _recipe(config, i)),
        *_resources(config),
        *misspelt_accelerators(config),
        *_outcome(config),
    ]


def _secrets(value: JsonValue, at: str = "") -> Iterator[str]:
    """Places of credentials. The message does not repeat them."""
    match value:
        case dict():
            for key, inner in value.items():
                yield from _secrets(inner, f"{at}.{key}" if at else str(key))
        case list():
            for index, inner in enumerate(value):
                yield from _secrets(inner, f"{at}.{index}")
        case str() if SECRET.search(value):
            yield (
                f"{at}: holds credentials, which would end up in config.json and in logs. Take them out, and give "
                "them by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN, …) or the cloud's roles."
            )


def _folders(config: RunConfig) -> Iterator[str]:
    """URIs that would be a folder named `s3:` on this machine, for want of a slash."""
    for key, uri in {"run_dir": config.run_dir, "cache.dir": config.cache.dir}.items():
        if re.match("[a-z0-9]+:/(?!/)", uri) and not (key == "cache.dir" and uri.startswith(config.run_dir)):
            nearest = uri.replace(":/", "://", 1)
            yield f"{key}: wanted a folder or a URI with two slashes, found {uri!r}; nearest: {nearest}"


def _names(config: RunConfig) -> Iterator[str]:
    groups = (
        ("teachers", [t.name for t in config.teachers], RESERVED_TEACHERS),
        ("phases", [p.name for p in config.phases], RESERVED_PHASES),
    )
    for section, names, reserved in groups:
        for index, name in enumerate(names):
            if name in names[:index]:
                yield f"{section}.{index}.name: wanted a name of its own, found {name!r} a second time."
            if name in reserved:
                yield f"{section}.{index}.name: {name!r} is reserved ({', '.join(reserved)}); choose another name."


def _weights(config: RunConfig) -> Iterator[str]:
    uses_teachers = any(p.recipe.uses_teacher for p in config.phases)
    if uses_teachers and not config.teachers:
        yield "teachers: a phase learns from teachers and there is none; add one, or set the recipe's alpha to 0."
    elif uses_teachers and sum(t.weight for t in config.teachers) == 0:
        yield "teachers.0.weight: every teacher has weight 0; wanted at least one above 0."
    else:
        for index, phase in enumerate(config.phases):
            signal = SIGNALS.get(type(phase.recipe))
            if signal and phase.recipe.uses_teacher and not any(isinstance(t, signal) for t in config.teachers):
                word = " or ".join(get_args(signal.model_fields["signal"].annotation))
                yield f"teachers: phases.{index}.recipe ({phase.recipe.kind}) learns from {word}, which no teacher has."


def _kinds(config: RunConfig) -> Iterator[str]:
    """Source, teachers, student and recipes of one kind of model."""
    kind = config.source.kind
    recipes = RECIPES_OF[type(config.source)]
    for index, phase in enumerate(config.phases):
        if not isinstance(phase.recipe, recipes):
            yield f"phases.{index}.recipe.kind: {phase.recipe.kind} does not learn from a source of kind {kind}."
    signals = tuple(SIGNALS[recipe] for recipe in recipes if recipe in SIGNALS)
    for index, teacher in enumerate(config.teachers):
        if not isinstance(teacher, signals):
            yield f"teachers.{index}.signal: source.kind {kind} does not feed {teacher.signal} teachers."
    library = LIBRARIES.get(type(config.source), (DiffusersModel,))
    if not isinstance(config.student.model, library):
        yield f"student.model.library: source.kind {kind} does not train models of {config.student.model.library}."


def _generator(config: RunConfig) -> Iterator[str]:
    """Recipes of students of few steps, their times and their teachers."""
    generator = config.student.generator
    for index, phase in enumerate(config.phases):
        recipe, at = phase.recipe, f"phases.{index}.recipe"
        if not isinstance(recipe, (TrajectoryRecipe, *CAUSAL)):
            continue
        if generator is None:
            yield f"student.generator: {at} ({recipe.kind}) trains a student of few steps; name its t_list."
            continue
        causal = not isinstance(recipe, TrajectoryRecipe) or recipe.causal
        if causal and generator.causal is None:
            yield f"student.generator.causal: {at} ({recipe.kind}) makes videos chunk by chunk; give it chunk_frames."
        if causal and isinstance(config.source, ImagesSource):
            yield f"{at}: source.kind images has no frames to make chunk by chunk; use a source of videos or prompts."
        if isinstance(recipe, TrajectoryRecipe):
            yield from _times(config, generator.t_list, at)
    if config.evaluate.baseline and any(p.recipe.uses_teacher for p in config.phases):
        for index, phase in enumerate(config.phases):
            if not phase.recipe.learns_alone:
                yield (
                    f"evaluate.baseline: phases.{index}.recipe ({phase.recipe.kind}) has no form without a teacher to "
                    "compare with; set evaluate.baseline: false."
                )


def _times(config: RunConfig, t_list: tuple[float, ...], at: str) -> Iterator[str]:
    """Times of the student at which a teacher keeps no state."""
    for place, teacher in enumerate(config.teachers):
        if not isinstance(teacher, OdeTrajectoryTeacher) or teacher.weight == 0 or teacher.imported is not None:
            continue
        missing = [t for t in t_list[:-1] if min(abs(t - kept) for kept in teacher.keep_t) > SAME_TIME]
        if missing:
            yield (
                f"student.generator.t_list: {at} wants the states at {missing}, which teachers.{place}.keep_t "
                f"({list(teacher.keep_t)}) does not keep; use times that are kept, or keep these."
            )


def _guidance(config: RunConfig) -> Iterator[str]:
    """Guidance needs something to lead away from."""
    if not isinstance(config.source, PromptsSource) or config.source.negative_prompt is not None:
        return
    scales = {
        f"teachers.{i}.guidance_scale": t.guidance_scale
        for i, t in enumerate(config.teachers)
        if isinstance(t, OdeTrajectoryTeacher)
    }
    scales |= {
        f"phases.{i}.recipe.guidance_scale": p.recipe.guidance_scale
        for i, p in enumerate(config.phases)
        if isinstance(p.recipe, SelfForcingRecipe | CausalConsistencyRecipe)
    }
    for key, scale in scales.items():
        if scale not in (None, 1.0):
            yield (
                f'{key}: guidance leads away from a negative prompt, and source.negative_prompt is null; set it ("" is '
                f"the empty prompt), or {key.rpartition('.')[2]}: 1."
            )


def _online(config: RunConfig) -> Iterator[str]:
    """Recipes that ask a teacher while they train."""
    for index, phase in enumerate(config.phases):
        recipe, at = phase.recipe, f"phases.{index}.recipe"
        match recipe:
            case SelfForcingRecipe(real_score=named):
                key = "real_score"
            case CausalConsistencyRecipe(teacher=named):
                key = "teacher"
            case _:
                continue
        first = config.teachers[0].model if config.teachers else None
        if named is None and not isinstance(first, DiffusersModel):
            yield f"{at}.{key}: there is no teacher of library diffusers to take the model of; name one here."
        if isinstance(recipe, SelfForcingRecipe) and recipe.gan and not isinstance(config.source, VideosSource):
            yield f"{at}.gan: source.kind {config.source.kind} has no clips to tell the student's from; use videos."


def _projection(config: RunConfig) -> Iterator[str]:
    init = config.student.init
    if isinstance(init, ProjectionInit) and init.teacher is None and not config.teachers:
        yield "student.init.teacher: there are no teachers, and the projection names none; name the model to project."


def _average(config: RunConfig) -> Iterator[str]:
    if config.cache.store == "each":
        return
    for index, phase in enumerate(config.phases):
        recipe = phase.recipe
        if not isinstance(recipe, NoisePredictionRecipe):
            yield "cache.store: average is for predictions of denoisers; set cache.store: each."
        elif recipe.uses_teacher and (recipe.loss != "mse" or recipe.taps):
            found = f"{recipe.loss} with taps" if recipe.taps else recipe.loss
            yield (
                f"phases.{index}.recipe: with cache.store: average, wanted loss mse without taps, whose gradient alone "
                f"is that to the average, found {found}; set cache.store: each."
            )


def _phase(config: RunConfig, index: int) -> Iterator[str]:
    phase, at = config.phases[index], f"phases.{index}"
    players = PLAYERS[type(phase.recipe)]
    for name in phase.optimizer:
        if name not in players:
            yield f"{at}.optimizer.{name}: recipe {phase.recipe.kind} trains {', '.join(players)}, found {name!r}."
    for name in players:
        if name not in phase.optimizer:
            yield f"{at}.optimizer: recipe {phase.recipe.kind} trains {name!r}: add {name}: {{lr: …}}."
    if phase.start_from == "ema" and (index == 0 or config.phases[index - 1].ema is None):
        before = "the first phase has none before it" if index == 0 else f"phases.{index - 1}.ema is null"
        yield f"{at}.start_from: ema needs a phase before that keeps an average; {before}."
    yield from _best_metric(config, phase.checkpoint.best_metric, f"{at}.checkpoint.best_metric")


def _best_metric(config: RunConfig, name: str | None, at: str) -> Iterator[str]:
    if name is None:
        return
    known = training_metrics(config)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        nearest = f"; nearest: {near[0]}" if near else ""
        yield f"{at}: wanted one of {', '.join(known)}; found {name!r}{nearest}."
    elif config.evaluate.every_steps is None:
        yield (
            f"{at}: {name!r} is measured during training only when evaluate.every_steps is set; set it, or "
            "best_metric: null."
        )


def _recipe(config: RunConfig, index: int) -> Iterator[str]:
    recipe, at = config.phases[index].recipe, f"phases.{index}.recipe"
    if isinstance(recipe, NoisePredictionRecipe):
        yield from _taps(config, recipe, at)
    if isinstance(recipe, FeaturesRecipe):
        yield from _features(config, recipe, at)
    if not isinstance(recipe, LmLogitsRecipe) or not recipe.uses_teacher:
        return
    used = [t for t in config.teachers if t.weight > 0 and isinstance(t, TopKLogitsTeacher)]
    kinds = sorted({t.estimator.kind for t in used})
    if len(kinds) > 1:
        yield f"{at}: the teachers of a phase need one estimator, found {' and '.join(kinds)}; set one estimator.kind."
    for teacher in used:
        yield from _signal(recipe, teacher, at)


def _taps(config: RunConfig, recipe: NoisePredictionRecipe, at: str) -> Iterator[str]:
    kept = {t.name: sorted(t.taps) for t in config.teachers if isinstance(t, NoisePredictionTeacher)}
    for index, rule in enumerate(recipe.taps):
        if rule.tap not in kept.get(rule.teacher, []):
            known = "; ".join(f"{name}: {', '.join(taps) or 'none'}" for name, taps in kept.items()) or "none"
            yield f"{at}.taps.{index}: teacher {rule.teacher!r} keeps no tap {rule.tap!r}; kept are {known}."


def _clips(config: RunConfig) -> Iterator[str]:
    """World models: teachers without weights, and beginnings of rollouts that leave no frame of a clip to make."""
    if not isinstance(config.source, EpisodesSource):
        return
    frames = config.source.clip_frames
    begun = {"evaluate.worlds.context": config.evaluate.worlds.context}
    for index, teacher in enumerate(config.teachers):
        if isinstance(teacher, RolloutTeacher):
            begun[f"teachers.{index}.initial_frames"] = teacher.initial_frames
        if isinstance(teacher.model, WorldModel) and not teacher.model.source:
            yield f"teachers.{index}.model: wanted a teacher with weights, found sizes alone; name its source."
    for key, number in begun.items():
        if number >= frames:
            yield f"{key}: wanted fewer than the {frames} frames of a clip (source.clip_frames), found {number}."


def _features(config: RunConfig, recipe: FeaturesRecipe, at: str) -> Iterator[str]:
    """Taps that a recipe of world models wants and no teacher keeps, and rollouts that nobody makes."""
    teachers = [t for t in config.teachers if isinstance(t, WorldTeacher) and t.weight > 0]
    kinds = {name: tap.kind for teacher in teachers for name, tap in teacher.taps.items()}
    groups: tuple[tuple[str, Sequence[FeatureRule | AttentionRule], tuple[str, ...]], ...] = (
        ("features", recipe.features, ("hidden",)),
        ("attention", recipe.attention, ("spatial", "temporal")),
    )
    for word, rules, wanted in groups:
        for index, rule in enumerate(rules):
            for name in rule.teacher:
                if kinds.get(name) not in wanted:
                    known = ", ".join(n for n, kind in kinds.items() if kind in wanted) or "none"
                    yield (
                        f"{at}.{word}.{index}.teacher: no teacher keeps a tap {name!r} of kind {' or '.join(wanted)}; "
                        f"kept are {known}."
                    )
    if recipe.learn_from == "rollouts" and not any(isinstance(t, RolloutTeacher) for t in teachers):
        yield f"{at}.learn_from: rollouts are made by teachers of signal rollout, and there is none; add one."
    if recipe.learn_from == "episodes" and recipe.uses_teacher and all(isinstance(t, RolloutTeacher) for t in teachers):
        yield f"{at}.learn_from: every teacher has made rollouts of its own; use learn_from: rollouts."


def _signal(recipe: LmLogitsRecipe, teacher: TopKLogitsTeacher, at: str) -> Iterator[str]:
    """What a recipe wants of a teacher's signal and the signal does not hold."""
    sampled = teacher.estimator.kind == "head_tail_sample"
    exact = recipe.temperature_mode == "exact" and recipe.temperature != 1.0
    who = f"teacher {teacher.name!r}"
    if recipe.top_k is not None and recipe.top_k > teacher.top_k:
        yield f"{at}.top_k: {who} keeps {teacher.top_k}, found {recipe.top_k}; lower it."
    if exact and (sampled or recipe.tail == "bucket") and recipe.temperature not in teacher.temperatures:
        grid = ", ".join(f"{t:g}" for t in sorted({1.0, *teacher.temperatures}))
        yield (
            f"{at}.temperature: with temperature_mode: exact, wanted one that {who} stores ({grid}), "
            f"found {recipe.temperature:g}; add it to the teacher's temperatures, or use temperature_mode: coarse."
        )
    if not sampled:
        return
    wishes = {
        "divergence": (recipe.divergence, "forward_kl"),
        "tail": (recipe.tail, "bucket"),
        "top_k": (recipe.top_k, None),
    }
    for key, (found, wanted) in wishes.items():
        if found != wanted:
            yield f"{at}.{key}: the sampled signal of {who} wants {wanted or 'null'}, found {found}."
    if recipe.temperature != 1.0 and not exact:
        yield f"{at}.temperature_mode: the sampled signal of {who} wants exact at T = {recipe.temperature:g}."


def _outcome(config: RunConfig) -> Iterator[str]:
    if config.export.weights == "ema" and config.phases[-1].ema is None:
        yield "export.weights: ema needs an average, and the last phase keeps none; give it ema: {decay: …}."
    if config.evaluate.prompts and isinstance(config.source, ImagesSource):
        yield "evaluate.prompts: image models show what they make of held-out captions; remove the key."


def _resources(config: RunConfig) -> Iterator[str]:
    train, teacher = config.resources.train, config.resources.teacher
    if train.accelerator is not None and train.gpus == 0:
        yield "resources.train.accelerator: asks for a kind of GPU, but resources.train.gpus is 0; set it to 1."
    if teacher.accelerator is not None and teacher.gpus == 0:
        yield "resources.teacher.accelerator: asks for a kind of GPU, but resources.teacher.gpus is 0."
    if train.workers == 0 and train.gpus > 0:
        yield "resources.train.gpus: workers: 0 trains in the driver, without a GPU; set resources.train.workers: 1."
    if config.evaluate.asynchronous and config.evaluate.every_steps is None:
        yield "evaluate.asynchronous: there is nothing to evaluate beside training; set evaluate.every_steps."
    if config.evaluate.asynchronous and train.workers == 0:
        yield "evaluate.asynchronous: needs training workers of their own; set resources.train.workers to at least 1."
