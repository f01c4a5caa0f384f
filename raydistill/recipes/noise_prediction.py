"""Denoisers against cached predictions: `(1-α) plain diffusion loss + α Σ_t w_t distance to teacher t`.

Every prediction is compared as one of the common kind (`source.noise.prediction_type`), whatever teachers and student
predict themselves. Notation: x_t = alpha(t) x0 + sigma(t) eps, p_i what teacher i predicts at x_t, w_i its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.config.recipes import NoisePredictionRecipe, TapRule
from raydistill.config.sources import NoiseConfig
from raydistill.diffusion.process import PredictionType, Process
from raydistill.errors import ConfigError
from raydistill.losses.regression import distance, timestep_weight
from raydistill.models.denoiser import predict, with_one_sample
from raydistill.models.denoiser_agreement import require_convertible
from raydistill.models.taps import Taps, adapter, feature_shapes
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.signals import AVERAGE, Batch, Draws, JsonValue

CONDITIONS = ("prompt_embeds", "pooled", "time_ids")
"""What a denoiser is told beside x_t and the timestep; the text is absent without text encoders."""
EMPTY = {"prompt_embeds": "empty_embeds", "pooled": "empty_pooled"}
"""Where a batch has the empty caption."""


class NoisePrediction(Recipe[NoisePredictionRecipe]):
    """A denoiser learns from the `noise_prediction` signals of teachers of one noise schedule, and from true noise.

    Batch: `latents`, `noise` [B, C, h, w] fp32, `timestep` [B] int64, `weight` [B] fp32 (0: does not count), the
    conditions, and `<teacher>/prediction` [B, C, h, w], `<teacher>/tap.<name>` [B, …]. A recipe that reads no signal
    draws noise, timesteps and dropped captions anew (`noise` says how), and needs `empty_embeds` and `empty_pooled`.

    Parts, all per sample: `blend` is what is optimised; `kd` (weighted), `kd/<teacher>` and `task` (distance to the
    truth) are logged, and with mse `floor`, the weighted variance of the teachers Σ w_i |p_i - Σ w_j p_j|²: no student
    gets below it. `tap/<teacher>.<tap>` is the squared difference of features. The teacher `average` stands for all:
    its gradient is that of the weighted mse, and its stored variance makes the logged loss the same too.
    """

    def __init__(
        self,
        config: NoisePredictionRecipe,
        student: nn.Module,
        teachers: Mapping[str, TeacherView],
        noise: NoiseConfig | None = None,
    ):
        """`noise` is what `source.noise` says; by default that of the teachers."""
        super().__init__(config, student, teachers)
        self._process = _process_of(student)
        self._used = [t for t in teachers.values() if t.weight > 0] if config.alpha > 0 else []
        if config.alpha > 0 and not self._used:
            raise ConfigError(
                f"recipe noise_prediction with alpha {config.alpha:g} wants a teacher of weight > 0, found "
                f"{', '.join(f'{t.name} of weight {t.weight:g}' for t in teachers.values()) or 'none'}; raise a "
                "teachers.*.weight, or set the recipe's alpha to 0"
            )
        tapped = [_teacher(teachers, rule) for rule in config.taps]
        read = {t.name: t for t in (*self._used, *tapped)}
        check_teachers(config, self._process, list(read.values()))
        self._noise = _noise(list(read.values()), noise)
        self._common: PredictionType = self._noise.prediction_type
        require_convertible(self._process, self._noise, where="recipe noise_prediction: the student")
        self._weight = timestep_weight(
            config.timestep_weighting,
            self._process.alphas,
            self._process.sigmas,
            predicted=self._common,
            gamma=config.snr_gamma,
        ).float()
        self._taps = Taps(student, {_label(r): r.student for r in config.taps}, where="recipe.taps")
        self._adapters = _adapters(student, config.taps, tapped)
        trained = any(True for _ in self._adapters.parameters())
        self._player: nn.Module = WithAdapters(student, self._adapters) if trained else student

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        fields: dict[str, tuple[str, ...]] = {
            t.name: ("prediction", "variance") if t.name == AVERAGE else ("prediction",) for t in self._used
        }
        for rule in self.config.taps:
            fields[rule.teacher] = (*fields.get(rule.teacher, ()), f"tap.{rule.tap}")
        return fields

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"samples": float(batch["weight"].sum())}

    def players(self) -> dict[str, nn.Module]:
        return {"student": self._player}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        config, process = self.config, self._process
        batch = batch if self.reads else self._drawn(batch, rng)
        latents, noise, t = batch["latents"], batch["noise"], batch["timestep"]
        x_t = process.noisy(latents, noise, t)
        with self._taps:
            told = {name: batch[name] for name in CONDITIONS if name in batch}
            own = predict(self.student, x_t, process.times(t), told)
        prediction = process.convert(own, x_t, t, source=process.prediction_type, target=self._common)
        self._weight = self._weight.to(t.device)
        weight = batch["weight"] * self._weight[t]

        def total(target: Tensor) -> Tensor:
            return (weight * distance(config.loss, prediction, target, delta=config.delta)).sum()

        task = total(process.target(latents, noise, t, self._common))
        parts = {"task": Part(task.detach(), 0.0, "samples")}
        blend = task
        if self._used:
            kd, logged = self._distillation(batch, weight, total)
            parts |= {"kd": Part(kd.detach(), 0.0, "samples"), **logged}
            blend = kd if config.alpha == 1 else (1 - config.alpha) * task + config.alpha * kd
        parts["blend"] = Part(blend, 1.0, "samples")
        return Loss({**parts, **self._tapped(batch)})

    def _distillation(
        self, batch: Batch, weight: Tensor, total: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Part]]:
        """The weighted distance to the teachers, and what is logged of it."""
        targets = [t.field(batch, "prediction") for t in self._used]
        if self._used[0].name == AVERAGE:
            floor = (weight * self._used[0].field(batch, "variance")).sum()
            return total(targets[0]) + floor, {"floor": Part(floor, 0.0, "samples")}
        shares = [t.weight for t in self._used]
        values = [total(target) for target in targets]
        kd = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()
        parts = {f"kd/{t.name}": Part(v.detach(), 0.0, "samples") for t, v in zip(self._used, values, strict=True)}
        if self.config.loss == "mse" and len(targets) > 1:
            parts["floor"] = Part((weight * variance(targets, shares)).sum(), 0.0, "samples")
        return kd, parts

    def _tapped(self, batch: Batch) -> dict[str, Part]:
        parts = {}
        for rule, feature in zip(self.config.taps, self._taps.taken().values(), strict=True):
            target = self.teachers[rule.teacher].field(batch, f"tap.{rule.tap}")
            mapped = self._adapters[_key(rule)](feature)
            if mapped.shape != target.shape:
                raise ConfigError(
                    f"recipe.taps: wanted features {list(target.shape[1:])} of a sample for tap {rule.tap!r} of "
                    f"teacher {rule.teacher}, found {list(mapped.shape[1:])} at the student's {rule.student}; name a "
                    "module of that resolution"
                )
            error = (batch["weight"] * distance("mse", mapped, target)).sum()
            parts[f"tap/{_label(rule)}"] = Part(error, rule.weight, "samples")
        return parts

    def _drawn(self, batch: Batch, rng: Draws) -> dict[str, Tensor]:
        """The batch with noise and timesteps of this step, and with captions dropped."""
        latents, (first, end) = batch["latents"], self._noise.timesteps
        steps = [min(first + int(g.random() * (end - first)), end - 1) for g in rng.rows("timestep")]
        drawn = {
            **batch,
            "noise": rng.normal("noise", tuple(latents.shape[1:])).to(latents.device),
            "timestep": torch.tensor(steps, device=latents.device),
        }
        if self._noise.caption_dropout:
            dropped = torch.tensor([g.random() < self._noise.caption_dropout for g in rng.rows("caption")])
            for name, empty in EMPTY.items():
                if name in batch:
                    where = dropped.to(latents.device).view(-1, *(1,) * (batch[name].ndim - 1))
                    drawn[name] = torch.where(where, batch[empty], batch[name])
        return drawn


class WithAdapters(nn.Module):
    """A student and the linear maps that are trained beside it; the recipe calls both."""

    def __init__(self, student: nn.Module, adapters: nn.ModuleDict):
        super().__init__()
        self.student = student
        self.taps = adapters


def variance(
    predictions: Sequence[Float[Tensor, "samples ..."]], weights: Sequence[float]
) -> Float[Tensor, " samples"]:
    """Σ w_i mean((p_i - Σ w_j p_j)²) per sample, in fp32: the least weighted mse to all predictions."""
    stacked = torch.stack([p.float() for p in predictions])
    shares = stacked.new_tensor(weights).view(-1, *(1,) * (stacked.ndim - 1))
    errors = (stacked - (shares * stacked).sum(0)).square()
    return (shares * errors).sum(0).flatten(1).mean(1)


def check_teachers(config: NoisePredictionRecipe, process: Process, teachers: Sequence[TeacherView]) -> None:
    """Raise `ConfigError` unless a student of this process can learn from these signals together."""
    for first, other in pairwise(teachers):
        for key, word in (("prediction_type", "prediction type"), ("noise", "noise and timesteps")):
            if first.facts[key] != other.facts[key]:
                raise ConfigError(
                    f"the teachers of one phase want one {word}, found {first.facts[key]} ({first.name}) and "
                    f"{other.facts[key]} ({other.name}); run --stages signals with this configuration"
                )
        apart = _process(first).differs(_process(other))
        if apart is not None:
            raise ConfigError(
                f"the teachers of one phase want one noise schedule, found {apart} ({first.name} and {other.name}); "
                "use teachers of one schedule, or name the right one with teachers.*.model.scheduler"
            )
    for teacher in teachers:
        apart = process.differs(_process(teacher))
        if apart is not None:
            raise ConfigError(
                f"the student wants the noise schedule of teacher {teacher.name}, found {apart} (student and teacher); "
                "name the teacher's with student.model.scheduler"
            )
        if teacher.name == AVERAGE and (config.loss != "mse" or config.taps or len(teachers) > 1):
            raise ConfigError(
                "the average of the teachers wants loss mse without taps, whose gradient alone is that to the average, "
                f"found {config.loss}{' with taps' if config.taps else ''}; set cache.store: each"
            )


def _process(teacher: TeacherView) -> Process:
    facts = teacher.facts["process"]
    assert isinstance(facts, dict), "a signal's facts hold what Process.to_json wrote"
    return Process.from_json(facts)


def _process_of(student: nn.Module) -> Process:
    process = getattr(student, "process", None)
    if not isinstance(process, Process):
        raise ConfigError(
            f"recipe noise_prediction wants a denoiser with a noise schedule, found {type(student).__name__} without "
            "one; use a student of library diffusers"
        )
    return process


def _noise(teachers: Sequence[TeacherView], given: NoiseConfig | None) -> NoiseConfig:
    if not teachers:
        if given is None:
            raise ConfigError(
                "recipe noise_prediction without teachers wants to be told how noise is drawn (source.noise)"
            )
        return given
    found = NoiseConfig.model_validate(teachers[0].facts["noise"])
    kind = teachers[0].facts["prediction_type"]
    assert kind in get_args(PredictionType), f"prediction type {kind}"
    return NoiseConfig.model_validate({**found.model_dump(), "prediction_type": kind})


def _teacher(teachers: Mapping[str, TeacherView], rule: TapRule) -> TeacherView:
    kept: JsonValue = teachers[rule.teacher].facts.get("taps", {}) if rule.teacher in teachers else {}
    if rule.teacher not in teachers or not isinstance(kept, dict) or rule.tap not in kept:
        known = {t.name: t.facts.get("taps") for t in teachers.values()}
        shown = "; ".join(f"{n}: {', '.join(k) if isinstance(k, dict) and k else 'none'}" for n, k in known.items())
        raise ConfigError(
            f"recipe.taps wants tap {rule.tap!r} of teacher {rule.teacher}, found {shown or 'no teacher'}; add it to "
            "the teacher's taps and run --stages signals"
        )
    return teachers[rule.teacher]


def _label(rule: TapRule) -> str:
    return f"{rule.teacher}.{rule.tap}"


def _key(rule: TapRule) -> str:
    """The name of a rule's adapter, in which a module's name must have no dot."""
    return f"{rule.teacher}/{rule.tap}".replace(".", ":")


def _adapters(student: nn.Module, rules: Sequence[TapRule], teachers: Sequence[TeacherView]) -> nn.ModuleDict:
    """Maps from the student's features to those of the teachers, by rule; nothing to train where widths are equal."""
    labels = [_label(rule) for rule in rules]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            f"recipe.taps: wanted one rule for each tap of a teacher, found several for {', '.join(twice)}"
        )
    if not rules:
        return nn.ModuleDict()
    shapes = feature_shapes(student, {_label(r): r.student for r in rules}, with_one_sample, where="recipe.taps")
    adapters = nn.ModuleDict()
    for index, (rule, teacher) in enumerate(zip(rules, teachers, strict=True)):
        wanted = _shape(teacher, rule.tap)
        where = f"recipe.taps.{index}"
        adapters[_key(rule)] = adapter(shapes[_label(rule)], wanted, seed=index, where=where)
    return adapters


def _shape(teacher: TeacherView, tap: str) -> tuple[int, ...]:
    taps = teacher.facts["taps"]
    assert isinstance(taps, dict)
    known = taps[tap]
    assert isinstance(known, dict)
    shape = known["shape"]
    assert isinstance(shape, list | tuple), "a tap's facts have its shape for one sample"
    return tuple(int(str(side)) for side in shape)
