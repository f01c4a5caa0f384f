"""How a student learns: one section per recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raydistill.config.base import Config, tag_defaults_to


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


class TapRule(Config):
    """Features of a student's module are drawn towards those that a teacher kept."""

    teacher: str
    """Name of the teacher."""
    tap: str
    """Name of one of its `taps`."""
    student: str
    """Path of the student's module, e.g. `mid_block`. Where widths differ, a trained linear map (1×1 convolution) leads
    from the student's features to the teacher's."""
    weight: float = Field(default=1.0, gt=0)
    """Factor on the mean squared difference."""


class NoisePredictionRecipe(Config):
    """`(1-alpha) plain diffusion loss + alpha Σ_t w_t distance to teacher t` of a denoiser."""

    kind: Literal["noise_prediction"]
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Share of the teachers. 0 is plain diffusion training, which reads no teacher signal and draws noise and timesteps
    anew in every step."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Distance between predictions."""
    delta: float = Field(default=1.0, gt=0)
    """Difference beyond which `huber` and `smooth_l1` grow linearly."""
    timestep_weighting: Literal["constant", "snr", "min_snr"] = "constant"
    """Weight of a sample by its signal-to-noise ratio, stated for the clean latents: `snr` weighs their error by the
    ratio and `min_snr` by min(ratio, `snr_gamma`); `constant` leaves the error of what is predicted as it is."""
    snr_gamma: float = Field(default=5.0, gt=0)
    """Limit of `min_snr`."""
    taps: tuple[TapRule, ...] = ()
    """Block features to match besides."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the recipe reads a teacher's signal."""
        return self.alpha > 0

    def without_teacher(self) -> Self:
        """The same recipe learning from the data alone: what the distilled student is compared with."""
        return self.model_copy(update={"alpha": 0.0, "taps": ()})

    @model_validator(mode="after")
    def _taps(self) -> Self:
        if self.taps and self.alpha == 0:
            raise ValueError(
                "taps: match features of a teacher, which alpha 0 does not read; remove them or raise alpha."
            )
        return self


RecipeConfig = Annotated[
    LmLogitsRecipe | NoisePredictionRecipe, Field(discriminator="kind"), tag_defaults_to("kind", "lm_logits")
]
