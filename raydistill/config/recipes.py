"""How a student learns: one section per recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raydistill.config.base import Config, tag_defaults_to
from raydistill.config.models import DiffusersModel, TeacherAttention
from raydistill.config.world import FeaturesRecipe


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

    @property
    def learns_alone(self) -> bool:
        """Whether there is a form without a teacher."""
        return True

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

    @property
    def learns_alone(self) -> bool:
        """Whether there is a form without a teacher."""
        return True

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


class OneForm(Config):
    """A recipe that has no other form without a teacher: nothing of it would be left, or it reads no signal anyway."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the recipe reads a teacher's signal."""
        return False

    @property
    def learns_alone(self) -> bool:
        """Whether there is a form without a teacher."""
        return False

    def without_teacher(self) -> Self:
        """The same recipe."""
        return self


class TrajectoryRecipe(OneForm):
    """`½ ‖f(x_t, t) - x0‖²` between a student's clean prediction and the teacher's sample, at kept states of its path.

    t is one of the times of `student.generator.t_list`. Luhman & Luhman 2021, arXiv 2101.02388; chunk by chunk, Yin et
    al. 2024, arXiv 2412.07772.
    """

    kind: Literal["trajectory"]
    causal: bool = False
    """Draw one time for each chunk of `student.generator.causal`, the clean end among them, and let a chunk see those
    before it only; clean chunks are context and do not count."""
    context: Literal["drawn", "clean"] = "drawn"
    """What a chunk sees of those before it, with `causal`: them at the times that were drawn for them, or, as in a
    rollout, the teacher's clean chunks at `context_noise` (twice the tokens, and every chunk counts)."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the recipe reads a teacher's signal."""
        return True


class GanConfig(Config):
    """Heads on frozen features of the real score that tell its data from the student's samples."""

    weight: float = Field(default=0.003, gt=0)
    """Factor of the student's part, `softplus(-D)`."""
    features: tuple[str, ...] = Field(min_length=1)
    """Modules of the real score whose outputs the heads read, e.g. `blocks.15`."""
    r1_weight: float = Field(default=0.0, ge=0)
    """Factor of the approximate R1 penalty on real data."""
    r1_sigma: float = Field(default=0.1, gt=0)
    """Noise by which the penalty shifts real data."""


class SelfForcingRecipe(OneForm):
    """A causal student on its own rollouts: its samples are drawn towards the distribution of the real score.

    Huang et al. 2025, arXiv 2506.08009; Yin et al. 2024, arXiv 2405.14867 (distribution matching).
    """

    kind: Literal["self_forcing"]
    real_score: DiffusersModel | None = None
    """The denoiser whose distribution is matched, and that the critic starts from; null takes the model of the first
    teacher."""
    guidance_scale: float = Field(default=5.0, ge=0)
    """Guidance of the real score: `uncond + w (cond - uncond)`."""
    teacher_attention: TeacherAttention = "bidirectional"
    """Whether real score and critic see all frames of a rollout, or chunk by chunk those before."""
    online: Literal["local", "actors"] = "local"
    """Ask the real score in the training worker, or a pool of Ray actors on `resources.teacher`."""
    critic_updates: int = Field(default=4, ge=1)
    """Updates of the critic (and of the heads) for each of the student."""
    frames: int | None = Field(default=None, ge=1)
    """Latent frames of a rollout; null makes those of the source."""
    t_range: tuple[float, float] = (0.02, 0.98)
    """Least and largest time at which the scores are compared."""
    shift: float = Field(default=5.0, gt=0)
    """Times are drawn evenly and shifted towards noise: `s t / (1 + (s - 1) t)`."""
    gan: GanConfig | None = None
    """Also tell real from made; wants a source of kind videos, and `online: local`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.t_range
        if not 0 < low < high <= 1:
            raise ValueError(f"t_range: wanted two rising times above 0 and up to 1, found {list(self.t_range)}.")
        if self.gan is not None and self.online == "actors":
            raise ValueError("gan: the heads read features of a teacher in the worker; set online: local, or no gan.")
        return self


class CausalConsistencyRecipe(OneForm):
    """Consistency distillation of a causal student on clips, without stored trajectories.

    At each chunk, with clean chunks before it, `f(x_t, t)` is drawn towards `f(x_s, s)`, where the teacher leads from t
    to the time s before it. Song et al. 2023, arXiv 2303.01469; for causal students, arXiv 2602.02214.
    """

    kind: Literal["causal_consistency"]
    teacher: DiffusersModel | None = None
    """The denoiser that leads from t to s; null takes the model of the first teacher."""
    teacher_attention: TeacherAttention = "autoregressive"
    """An autoregressive teacher sees what the student sees, clean chunks before and the noised one, so that its step is
    a function of that. One that sees all frames is no such function: the student then learns an average."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Guidance of the teacher: `uncond + w (cond - uncond)`."""
    online: Literal["local", "actors"] = "local"
    """Ask the teacher in the training worker, or a pool of Ray actors on `resources.teacher`."""
    grid: int = Field(default=48, ge=2)
    """Times between noise and clean data, among which t and s are neighbours."""
    shift: float = Field(default=5.0, gt=0)
    """The even grid is shifted towards noise: `s t / (1 + (s - 1) t)`."""


class TeacherForcingRecipe(OneForm):
    """Plain diffusion training of a causal video model: each chunk is denoised beside the clean chunks before it.

    It makes an autoregressive teacher of a bidirectional one. Source: arXiv 2602.02214.
    """

    kind: Literal["teacher_forcing"]
    shift: float = Field(default=5.0, gt=0)
    """Times are drawn evenly for each chunk and shifted towards noise: `s t / (1 + (s - 1) t)`."""

    @property
    def learns_alone(self) -> bool:
        """Whether there is a form without a teacher."""
        return True


RecipeConfig = Annotated[
    LmLogitsRecipe
    | NoisePredictionRecipe
    | TrajectoryRecipe
    | SelfForcingRecipe
    | CausalConsistencyRecipe
    | TeacherForcingRecipe
    | FeaturesRecipe,
    Field(discriminator="kind"),
    tag_defaults_to("kind", "lm_logits"),
]
