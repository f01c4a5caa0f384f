"""Language models against cached next-token distributions: `(1-α) cross-entropy + α T² Σ_t w_t D_t`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn

from raydistill.config.recipes import LmLogitsRecipe
from raydistill.errors import ConfigError
from raydistill.losses.divergence import divergence
from raydistill.losses.head import Objective, head_loss
from raydistill.losses.targets import SparseTarget, Tail
from raydistill.models.language import (
    head_of,
    head_rows,
    hidden_states,
    is_packed,
    isolates_documents,
    num_experts,
    require_language_model,
    router_aux_coefficient,
    router_aux_loss,
)
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.signals import Batch, Draws


class LmLogits(Recipe[LmLogitsRecipe]):
    """A causal language model learns from labels and from the `top_k_logits` signals of teachers of one tokenizer.

    Batch: `input_ids`, `position_ids`, `labels` [B, S] int64, `target`, `valid` [B, S] bool, and `<teacher>/<field>`.
    Parts: `blend` is what is optimised; `ce`, `kd` (weighted), `kd/<teacher>`, `accuracy` and `agreement/<teacher>` are
    logged; `router_aux` is the load-balancing loss of an MoE student, a statistic of its micro-batch.
    """

    def __init__(self, config: LmLogitsRecipe, student: nn.Module, teachers: Mapping[str, TeacherView]):
        super().__init__(config, student, teachers)
        self._model = require_language_model(student, where="recipe lm_logits")
        self._used = [t for t in teachers.values() if t.weight > 0] if config.alpha > 0 else []
        if config.alpha > 0 and not self._used:
            raise ConfigError(f"recipe lm_logits with alpha {config.alpha} wants a teacher of weight > 0, found none")
        self._sampled = _sampled(self._used)
        check_teachers(config, list(teachers.values()), head_rows(self._model))
        self._vocab_size = next((int(str(t.facts["vocab_size"])) for t in teachers.values()), None)
        weight = config.router_aux_weight
        asked = router_aux_coefficient(self._model) if weight is None else weight
        self._aux_weight = asked if num_experts(self._model) else 0.0
        self._isolates = isolates_documents(self._model)
        self._objective = Objective(
            alpha=config.alpha,
            temperature=config.temperature,
            mode=config.temperature_mode,
            tail=self._tail,
            top_k=config.top_k,
            divergence=divergence(config.divergence, beta=config.beta, skew=config.skew),
        )

    @property
    def _tail(self) -> Tail:
        return "sample" if self._sampled else self.config.tail

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {t.name: self._fields(t) for t in self._used}

    def _fields(self, teacher: TeacherView) -> tuple[str, ...]:
        config, names = self.config, ["ids", "logp"]
        exact = self._objective.exact
        if self._sampled:
            names += ["log_tail", "tail_ids", "tail_counts", "tail_logp", *(["psi"] if exact else [])]
        elif config.tail == "bucket":
            names.append("psi" if exact else "log_tail")
        return tuple(names)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch["target"].sum())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        position_ids, target = batch["position_ids"], batch["target"]
        if not self._isolates and is_packed(position_ids):
            raise ConfigError(
                f"{type(self._model).__name__} lets packed documents see each other; set source.packing: false"
            )
        hidden = hidden_states(self._model, batch["input_ids"], position_ids, router_logits=self._aux_weight > 0)
        rows = target.flatten().nonzero().squeeze(-1)
        sums = head_loss(
            head_of(self._model, self._vocab_size),
            hidden.states.flatten(0, 1).index_select(0, rows),
            batch["labels"].flatten().index_select(0, rows),
            [self._target(t, batch, rows) for t in self._used],
            self._objective,
            chunk_tokens=self.config.chunk_tokens,
        )
        parts = {
            "blend": Part(sums.total, 1.0, "tokens"),
            "ce": Part(sums.cross_entropy, 0.0, "tokens"),
            "accuracy": Part(sums.correct, 0.0, "tokens"),
        }
        if self._used:
            shares = sums.divergences.new_tensor([t.weight for t in self._used])
            parts["kd"] = Part((shares * sums.divergences).sum(), 0.0, "tokens")
        for teacher, value, agreed in zip(self._used, sums.divergences, sums.agreements, strict=True):
            parts[f"kd/{teacher.name}"] = Part(value, 0.0, "tokens")
            if teacher.facts["top_k"] != 0:
                parts[f"agreement/{teacher.name}"] = Part(agreed, 0.0, "tokens")
        if hidden.router_logits is not None:
            balance = router_aux_loss(self._model, hidden.router_logits, batch["valid"])
            parts["router_aux"] = Part(balance, self._aux_weight)
        return Loss(parts)

    def _target(self, teacher: TeacherView, batch: Batch, rows: Tensor) -> SparseTarget:
        def read(name: str) -> Tensor | None:
            if name not in self._fields(teacher):
                return None
            return teacher.field(batch, name).flatten(0, 1).index_select(0, rows)

        psi = read("psi")
        if psi is not None:
            psi = psi[:, _temperatures(teacher).index(self.config.temperature)]
        ids, logp = read("ids"), read("logp")
        assert ids is not None
        assert logp is not None
        return SparseTarget(
            ids=ids,
            logp=logp,
            log_tail=read("log_tail"),
            psi=psi,
            tail_ids=read("tail_ids"),
            tail_counts=read("tail_counts"),
            tail_logp=read("tail_logp"),
            weight=teacher.weight,
        )


def _temperatures(teacher: TeacherView) -> list[float]:
    grid = teacher.facts["temperatures"]
    assert isinstance(grid, list | tuple)
    return [float(str(t)) for t in grid]


def _sampled(teachers: Sequence[TeacherView]) -> bool:
    kinds = sorted({str(t.facts["estimator"]) for t in teachers})
    if len(kinds) > 1:
        raise ConfigError(
            f"the teachers of one phase want one estimator, found {', '.join(kinds)}; "
            "use the same teachers.*.estimator.kind for all of them"
        )
    return kinds == ["head_tail_sample"]


def check_teachers(config: LmLogitsRecipe, teachers: Sequence[TeacherView], student_rows: int) -> None:
    """Raise `ConfigError` unless the recipe can be computed from these signals with a student of so many head rows."""
    for first, other in pairwise(teachers):
        for key, word in (("vocab_size", "vocabulary size"), ("tokenizer", "tokenizer")):
            if first.facts.get(key) != other.facts.get(key):
                raise ConfigError(
                    f"the teachers of one phase want one {word}, found {first.facts.get(key)} ({first.name}) and "
                    f"{other.facts.get(key)} ({other.name}); use teachers of one tokenizer"
                )
    for teacher in teachers:
        vocab_size = int(str(teacher.facts["vocab_size"]))
        if vocab_size > student_rows:
            raise ConfigError(
                f"teacher {teacher.name} speaks {vocab_size} ids, but the student's head has {student_rows} rows; "
                "use a student of the same tokenizer, or resize its embeddings"
            )
        if config.alpha > 0 and teacher.weight > 0:
            _check_signal(config, teacher)


def _check_signal(config: LmLogitsRecipe, teacher: TeacherView) -> None:
    stored_k, grid = int(str(teacher.facts["top_k"])), _temperatures(teacher)
    if config.top_k is not None and config.top_k > stored_k:
        raise ConfigError(
            f"recipe.top_k {config.top_k} wants more ids than the cache of teacher {teacher.name} holds ({stored_k}); "
            f"set recipe.top_k to at most {stored_k}, or rebuild the cache with a larger teachers.*.top_k"
        )
    exact = config.temperature_mode == "exact" and config.temperature != 1.0
    if exact and config.tail == "bucket" and config.temperature not in grid:
        raise ConfigError(
            f"temperature_mode exact wants T = {config.temperature} in the cache of teacher {teacher.name}, found the "
            f"grid {grid}; add it to teachers.*.temperatures and rebuild the cache, or use temperature_mode: coarse"
        )
    if teacher.facts["estimator"] != "head_tail_sample":
        return
    wrong = {
        f"divergence {config.divergence}": config.divergence != "forward_kl",
        f"tail {config.tail}": config.tail != "bucket",
        f"top_k {config.top_k}": config.top_k is not None and config.top_k < stored_k,
        f"coarse temperature {config.temperature}": config.temperature != 1.0 and not exact,
    }
    found = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
    if found:
        raise ConfigError(
            f"the sampled cache of teacher {teacher.name} (estimator head_tail_sample) wants divergence forward_kl, "
            f"tail bucket, all ids, and T = 1 or temperature_mode exact; found {found}"
        )
