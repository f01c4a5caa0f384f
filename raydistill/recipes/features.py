"""World models against a teacher's frames, codes, features and attention: `(1-α) task + α Σ_t w_t distillation`.

Notation: y frames that are true, ŷ those predicted, z latents, e their codebook entries; S steps between T = S + 1
frames. Every term is summed over valid steps, frames or clips and divided by their number in the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydistill.config.world import AttentionRule, FeatureRule, FeaturesRecipe
from raydistill.errors import ConfigError
from raydistill.losses import world as losses
from raydistill.models.taps import Taps, adapter, feature_shapes
from raydistill.models.world.features import TapKind, frames_valid, groups_valid, per_clip
from raydistill.models.world.model import WorldNetwork
from raydistill.models.world.probe import make_probe
from raydistill.models.world.protocol import WorldOutput, check_clips, meta_clip
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.recipes.noise_prediction import WithAdapters
from raydistill.signals import Batch, Draws

COMMITMENT = 0.25
"""Weight of latents being drawn to their entries. Source: van den Oord et al. 2017, arXiv 1711.00937, Sec. 3.2."""
USAGE = 0.02
"""Weight of the codebook being used evenly."""


class Features(Recipe[FeaturesRecipe]):
    """A world model of the reference family learns from episodes and from `features` or `rollout` signals.

    Batch: `frames` [B, T, C, H, W] uint8, `actions` [B, S] int64, `valid` [B, S] bool, and of each teacher
    `<teacher>/frames`, `logits`, `codes`, `tap.<name>`, and `trajectory` and `actions` of rollouts. A teacher that is
    online says the same of the batch here. With rollouts of several teachers each step takes those of one, by weight.

    Parts that are optimised, as far as they have a weight: `prediction`, `next_codes`, `reconstruction`, `codebook`,
    `commitment`, `usage`; `output/<t>`, `kl/<t>`, `codes/<t>`, `feature/<t>.<tap>`, `attention/<t>.<tap>`; `diversity`,
    `smoothness`, `action`. `prediction` and `output` are logged without, too, where frames are predicted.
    """

    def __init__(self, config: FeaturesRecipe, student: nn.Module, teachers: Mapping[str, TeacherView]):
        super().__init__(config, student, teachers)
        if not isinstance(student, WorldNetwork):
            raise ConfigError(
                f"recipe features wants a world model of the reference family, found {type(student).__name__}; use a "
                "student of library world."
            )
        self._world = student
        signal = "features" if config.learn_from == "episodes" else "rollout"
        asked = [t for t in teachers.values() if t.weight > 0 and t.facts["signal"] == signal]
        self._used = asked if config.alpha > 0 else []
        if config.alpha > 0 and not self._used:
            raise ConfigError(
                f"recipe features with alpha {config.alpha:g} and learn_from: {config.learn_from} wants a teacher of "
                f"signal {signal} and weight > 0, found none."
            )
        self._check_teachers()
        rules: tuple[tuple[str, Sequence[FeatureRule | AttentionRule]], ...] = (
            ("feature", config.features),
            ("attention", config.attention),
        )
        self._paths = {f"{word}{i}": rule.student for word, group in rules for i, rule in enumerate(group)}
        self._taps = Taps(student, self._paths, where="recipe: the student's")
        self._maps = self._adapters()
        self._probe = make_probe(student.frame_shape[0], student.num_actions, seed=0) if config.action > 0 else None
        parts = {"maps": self._maps} if any(True for _ in self._maps.parameters()) else {}
        extra = nn.ModuleDict({**parts, **({"probe": self._probe} if self._probe is not None else {})})
        self._player: nn.Module = WithAdapters(student, extra) if len(extra) else student
        wants = (config.prediction, config.next_codes, config.diversity, config.smoothness, config.action)
        told = (config.output, config.kl) if self._used else ()
        self._predicts = any((*wants, *told)) or any(not p.startswith("encoder") for p in self._paths.values())

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {t.name: tuple(self._fields(t)) for t in self._used if t.online is None}

    @property
    def _rules(self) -> list[FeatureRule | AttentionRule]:
        return [*self.config.features, *self.config.attention]

    def _fields(self, teacher: TeacherView) -> list[str]:
        config = self.config
        fields = ["trajectory", "actions"] if config.learn_from == "rollouts" else []
        fields += ["frames"] if config.output or config.diversity else []
        fields += ["logits"] if config.kl else []
        fields += ["codes"] if config.codes else []
        names = [name for rule in self._rules for name in rule.teacher]
        return [*fields, *(f"tap.{name}" for name in dict.fromkeys(names) if name in _taps(teacher))]

    def counts(self, batch: Batch) -> dict[str, float]:
        valid = self._valid(batch)
        return {
            "steps": float(valid.sum()),
            "frames": float(frames_valid(valid).sum()),
            "clips": float(valid.any(1).sum()),
            "pairs": float(valid[:, 1:].sum()),
        }

    def _valid(self, batch: Batch) -> Tensor:
        """Steps that count; those of rollouts all do, since a teacher plays whole clips."""
        valid = batch["valid"]
        return valid.any(1, keepdim=True).expand_as(valid) if self.config.learn_from == "rollouts" else valid

    def players(self) -> dict[str, nn.Module]:
        return {"student": self._player}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        config, valid = self.config, self._valid(batch)
        teachers = self._asked(rng)
        frames, actions = self._clips(batch, teachers)
        answers = self._asked_of(teachers, {"frames": frames, "actions": actions, "valid": valid})
        clips = frames.to(next(self._world.parameters()).dtype) / 255
        check_clips(clips, actions, self._world, where="recipe features: the student")
        with self._taps:
            out = self._world(clips, actions, predict=self._predicts, reconstruct=config.reconstruction > 0)
        batch = {**batch, **answers()}
        parts = self._task(out, clips, valid, 1 - config.alpha)
        for teacher in teachers:
            share = config.alpha * self._share(teacher, teachers)
            parts |= self._distilled(teacher, out, batch, valid, share)
        parts |= self._matched(teachers, batch, valid)
        return Loss({**parts, **self._remedies(out, clips, actions, self._target(teachers, batch, clips), valid)})

    @staticmethod
    def _share(teacher: TeacherView, teachers: Sequence[TeacherView]) -> float:
        """A teacher's part of the weight of those that are asked in this step."""
        return teacher.weight / sum(t.weight for t in teachers)

    def _asked(self, rng: Draws) -> list[TeacherView]:
        """The teachers of this step: all, or the one whose rollouts are its clips."""
        if self.config.learn_from == "episodes" or len(self._used) == 1:
            return self._used
        total = sum(t.weight for t in self._used)
        left = rng.shared("teacher").random() * total
        for teacher in self._used:
            left -= teacher.weight
            if left < 0:
                return [teacher]
        return self._used[-1:]

    def _clips(self, batch: Batch, teachers: Sequence[TeacherView]) -> tuple[Tensor, Tensor]:
        if self.config.learn_from == "rollouts":
            return teachers[0].field(batch, "trajectory"), teachers[0].field(batch, "actions").long()
        return batch["frames"], batch["actions"]

    def _asked_of(self, teachers: Sequence[TeacherView], clips: Batch) -> Callable[[], dict[str, Tensor]]:
        """Ask those that are online; the result waits for what they say, by the names under which a cache has it."""
        place = clips["frames"].device
        answers = {t.name: t.online.start(clips, self._fields(t)) for t in teachers if t.online is not None}
        return lambda: {
            f"{name}/{field}": values.to(place) for name, said in answers.items() for field, values in said().items()
        }

    def _task(self, out: WorldOutput, clips: Tensor, valid: Tensor, share: float) -> dict[str, Part]:
        config, parts = self.config, {}
        assert out.latents is not None
        assert out.quantised is not None
        assert out.assignment is not None
        assert out.codes is not None
        if self._predicts:
            parts["prediction"] = _part(
                losses.squared_error(out.frames, clips[:, 1:]), valid, share * config.prediction, "steps"
            )
        if config.next_codes:
            assert out.logits is not None
            entropy = losses.code_cross_entropy(out.logits, out.codes[:, 1:])
            parts["next_codes"] = _part(entropy, valid, share * config.next_codes, "steps")
        if config.reconstruction:
            assert out.reconstruction is not None
            weight, there = share * config.reconstruction, frames_valid(valid)
            drawn = losses.squared_error(out.latents.detach(), out.quantised)
            committed = losses.squared_error(out.latents, out.quantised.detach())
            parts |= {
                "reconstruction": _part(losses.squared_error(out.reconstruction, clips), there, weight, "frames"),
                "codebook": _part(drawn, there, weight, "frames"),
                "commitment": _part(committed, there, weight * COMMITMENT, "frames"),
                "usage": Part(losses.codebook_usage(out.assignment), weight * USAGE),
            }
        return parts

    def _distilled(
        self, teacher: TeacherView, out: WorldOutput, batch: Batch, valid: Tensor, share: float
    ) -> dict[str, Part]:
        config, name, parts = self.config, teacher.name, {}
        if config.output:
            error = losses.squared_error(out.frames, teacher.field(batch, "frames"))
            parts[f"output/{name}"] = _part(error, valid, share * config.output, "steps")
        if config.kl:
            assert out.logits is not None
            kl = losses.tempered_kl(out.logits, teacher.field(batch, "logits"), config.temperature)
            parts[f"kl/{name}"] = _part(kl, valid, share * config.kl, "steps")
        if config.codes:
            assert out.assignment is not None
            entropy = losses.code_cross_entropy(out.assignment, teacher.field(batch, "codes"))
            parts[f"codes/{name}"] = _part(entropy, frames_valid(valid), share * config.codes, "frames")
        return parts

    def _matched(self, teachers: Sequence[TeacherView], batch: Batch, valid: Tensor) -> dict[str, Part]:
        """Features and attention maps, by rule, teacher and tap."""
        config, parts, taken = self.config, {}, self._taps.taken()
        rules: tuple[tuple[str, Sequence[FeatureRule | AttentionRule]], ...] = (
            ("feature", config.features),
            ("attention", config.attention),
        )
        for word, group in rules:
            for index, rule in enumerate(group):
                own = taken[f"{word}{index}"]
                for teacher, tap in self._pairs(rule, teachers):
                    share = config.alpha * self._share(teacher, teachers) * rule.weight
                    target = teacher.field(batch, f"tap.{tap}")
                    label = f"{word}/{teacher.name}.{tap}"
                    where = f"recipe.{word} {index} ({rule.student} to {teacher.name}.{tap})"
                    kind = _kind(teacher, tap)
                    mine = per_clip(own, kind, len(valid), where=where)
                    if word == "feature":
                        value, there, count = self._hidden(mine, target, _key(index, teacher, tap), valid, where)
                        parts[label] = _part(value, there, share / len(rule.teacher), count)
                    else:
                        value = _attention(mine, target, kind, valid, where)
                        parts[label] = Part((value * valid.any(1)).sum(), share / len(rule.teacher), "clips")
        return parts

    def _hidden(self, own: Tensor, target: Tensor, key: str, valid: Tensor, where: str) -> tuple[Tensor, Tensor, str]:
        """Squared differences [B, groups] after the trained map, which of them count, and what they are counted in."""
        steps = valid.shape[1]
        if own.shape[1] == 2 * steps + 1 and target.shape[1] == steps:
            own = own[:, :steps]  # of the decoder: predictions, then reconstructions
        mapped = self._maps[key](own)
        if mapped.shape != target.shape:
            if mapped.shape[1] * mapped.shape[2] != target.shape[1] * target.shape[2]:
                raise ConfigError(
                    f"{where}: wanted hidden states [groups, tokens, width] {list(target.shape[1:])}, found "
                    f"{list(mapped.shape[1:])}; match modules of as many tokens."
                )
            mapped = mapped.flatten(1, 2).unflatten(1, target.shape[1:3])
        groups = target.shape[1]
        there = groups_valid(groups, valid)
        value = losses.squared_error(mapped, target)
        if groups == steps:
            return value, there, "steps"
        if groups == steps + 1:
            return value, there, "frames"
        return value.mean(1, keepdim=True), there[:, :1], "clips"

    def _remedies(
        self, out: WorldOutput, clips: Tensor, actions: Tensor, target: Tensor, valid: Tensor
    ) -> dict[str, Part]:
        config, parts = self.config, {}
        if config.diversity:
            parts["diversity"] = Part(losses.diversity(out.frames, target, valid), config.diversity)
        if config.smoothness:
            change = losses.smoothness(out.frames, clips[:, 1:])
            parts["smoothness"] = _part(change, valid[:, 1:], config.smoothness, "pairs")
        if self._probe is not None:
            # The probe learns from true frames alone: it and the student could else agree on a language of their own.
            read = _action_entropy(self._probe(clips[:, :-1], clips[:, 1:]), actions)
            parts["action/probe"] = _part(read, valid, config.action, "steps")
            with _frozen(self._probe):
                obeyed = _action_entropy(self._probe(clips[:, :-1], out.frames), actions)
            parts["action"] = _part(obeyed, valid, config.action, "steps")
        return parts

    def _target(self, teachers: Sequence[TeacherView], batch: Batch, clips: Tensor) -> Tensor:
        """The frames whose diversity is wanted: the teachers' mean prediction, else the true ones."""
        if not teachers or not self.config.diversity:
            return clips[:, 1:]
        total = sum(t.weight for t in teachers)
        return torch.stack([t.weight / total * t.field(batch, "frames").float() for t in teachers]).sum(0)

    def _pairs(
        self, rule: FeatureRule | AttentionRule, teachers: Sequence[TeacherView]
    ) -> list[tuple[TeacherView, str]]:
        return [(t, name) for name in rule.teacher for t in teachers if name in _taps(t)]

    def _adapters(self) -> nn.ModuleDict:
        """A linear map for each pair of hidden states; nothing to train where widths are equal."""
        maps = nn.ModuleDict()
        if not self.config.features:
            return maps
        length = int(str(self._used[0].facts["clip_frames"]))
        paths = {name: path for name, path in self._paths.items() if name.startswith("feature")}
        shapes = feature_shapes(self._world, paths, _one_clip(length), where="recipe.features")
        for index, rule in enumerate(self.config.features):
            for teacher, tap in self._pairs(rule, self._used):
                where = f"recipe.features.{index}"
                own = shapes[f"feature{index}"][-2:]
                wanted = tuple(int(str(side)) for side in _shape(teacher, tap)[-2:])
                seed = len(maps)
                maps[_key(index, teacher, tap)] = adapter(own, (own[0], wanted[1]), seed=seed, where=where)
        return maps

    def _check_teachers(self) -> None:
        """`ConfigError` unless the recipe can be computed from what these teachers keep."""
        config, sizes = self.config, self._world.sizes
        for teacher in self._used:
            num_codes = teacher.facts.get("num_codes")
            if (config.kl or config.codes) and num_codes != sizes.codebook_size:
                found = "none" if num_codes is None else f"{num_codes}"
                raise ConfigError(
                    f"recipe features wants as many codes as teacher {teacher.name} has logits for (the student has "
                    f"{sizes.codebook_size}), found {found}; set sizes.codebook_size, or kl: 0 and codes: 0."
                )
            shape = [int(str(side)) for side in _list(teacher.facts["frame_shape"])]
            if shape != list(self._world.frame_shape):
                raise ConfigError(
                    f"recipe features wants the frames of teacher {teacher.name}, {shape}, found a student of "
                    f"{list(self._world.frame_shape)}; set student.model.sizes.frame_size."
                )
        for rule in self._rules if self._used else ():
            for name in rule.teacher:
                if not any(name in _taps(t) for t in self._used):
                    known = sorted({tap for t in self._used for tap in _taps(t)})
                    raise ConfigError(
                        f"recipe features wants tap {name!r} of a teacher, found {', '.join(known) or 'none'}; add it "
                        "to the teacher's taps and run --stages signals."
                    )


def _part(each: Tensor, valid: Tensor, weight: float, count: str) -> Part:
    total = (each * valid).sum()
    return Part(total if weight else total.detach(), weight, count)


def _action_entropy(logits: Tensor, actions: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), actions.flatten(), reduction="none").view(actions.shape)


class _frozen:
    """Inside `with`, what a module computes has no gradient for its own parameters, only for its input."""

    def __init__(self, module: nn.Module):
        self._wanted = [p for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self._wanted:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self._wanted:
            parameter.requires_grad_(True)


def _attention(own: Tensor, target: Tensor, kind: TapKind, valid: Tensor, where: str) -> Tensor:
    if own.shape != target.shape:
        raise ConfigError(
            f"{where}: wanted maps [maps, queries, keys] {list(target.shape[1:])}, found {list(own.shape[1:])}; match "
            "attention over as many tokens or frames."
        )
    maps, queries = own.shape[1:3]
    if kind == "spatial":
        there = groups_valid(maps, valid)[:, :, None].expand(-1, -1, queries)
    else:
        there = groups_valid(queries, valid)[:, None].expand(-1, maps, -1)
    return losses.attention_transfer(own, target, there)


def _one_clip(length: int) -> Callable[[nn.Module], object]:
    def forward(network: nn.Module) -> object:
        assert isinstance(network, WorldNetwork)
        frames, actions = meta_clip(network, clip_frames=length)
        return network(frames, actions)

    return forward


def _key(index: int, teacher: TeacherView, tap: str) -> str:
    """The name of a map, in which a module's name must have no dot."""
    return f"{index}/{teacher.name}/{tap}".replace(".", ":")


def _taps(teacher: TeacherView) -> Mapping[str, object]:
    taps = teacher.facts.get("taps", {})
    assert isinstance(taps, dict)
    return taps


def _list(value: object) -> list[object]:
    assert isinstance(value, list | tuple)
    return list(value)


def _shape(teacher: TeacherView, tap: str) -> list[object]:
    known = _taps(teacher)[tap]
    assert isinstance(known, dict)
    return _list(known["shape"])


def _kind(teacher: TeacherView, tap: str) -> TapKind:
    known = _taps(teacher)[tap]
    assert isinstance(known, dict)
    kind = known["kind"]
    assert kind in ("hidden", "spatial", "temporal")
    return kind
