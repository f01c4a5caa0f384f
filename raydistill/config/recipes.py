"""How a student learns: one section per recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from raydistill.config.base import Config


class LmLogitsRecipe(Config):
    """`(1-alpha) cross-entropy + alpha T² divergence` of a language model against cached distributions."""

    kind: Literal["lm_logits"] = "lm_logits"
    alpha: float = Field(default=0.7, ge=0, le=1)
    """Share of the teacher; 0 is plain cross-entropy training, which reads no teacher signal."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature T of both distributions."""
    temperature_mode: Literal["coarse", "exact"] = "coarse"
    """`coarse` tempers the K+1 classes (any T, no extra storage); `exact` tempers the full vocabulary
    (only stored T)."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "forward_kl"
    """Divergence between teacher and student on the K+1 classes."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Mixture weight of `jsd`: m = beta p + (1-beta) q, loss = beta KL(p‖m) + (1-beta) KL(q‖m)."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Mixture weight of `skew_kl`: KL(p ‖ skew p + (1-skew) q)."""
    tail: Literal["bucket", "renormalise"] = "bucket"
    """`bucket` keeps the mass outside K as one more class; `renormalise` compares only inside K,
    both sides renormalised."""
    top_k: int | None = Field(default=None, ge=1)
    """Use only the K' most probable ids of the cache; the others join the tail."""
    router_aux_weight: float | None = Field(default=None, ge=0)
    """Weight of the MoE load-balancing loss; by default the student's own `router_aux_loss_coef`. 0 turns it off."""
    chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose full logits exist at one time."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the recipe reads a teacher's signal."""
        return self.alpha > 0

    def without_teacher(self) -> Self:
        """The same recipe learning from the data alone: what the distilled student is compared with."""
        return self.model_copy(update={"alpha": 0.0})


RecipeConfig = LmLogitsRecipe
