"""What a worker builds before the first step: student, recipe, data, engines, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from raydistill.cache.joined import open_manifest
from raydistill.cache.loader import Loader, StepBatches
from raydistill.cache.open import open_dataset
from raydistill.cache.order import Order, Sampler
from raydistill.cache.samples import Samples
from raydistill.config.base import Config
from raydistill.config.checks import SIGNALS
from raydistill.config.metrics import few_steps
from raydistill.config.models import DiffusersModel
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.training import PhaseConfig
from raydistill.config.world import EpisodesSource, FeaturesRecipe, WorldModel
from raydistill.errors import ConfigError
from raydistill.models.assemble import own_state
from raydistill.models.student import load_student
from raydistill.models.world.model import WorldNetwork
from raydistill.progress import say
from raydistill.recipes import make_recipe
from raydistill.recipes.base import Recipe, TeacherView
from raydistill.signals import AVERAGE, Draws
from raydistill.storage import Store, local_folder
from raydistill.train.checkpoint import Checkpoints, Progressed
from raydistill.train.ema import Ema
from raydistill.train.engine import Engine, ensure_process_group
from raydistill.train.job import MAY_CHANGE, PhaseJob, require_same_settings
from raydistill.train.online import online_teacher
from raydistill.train.online_worlds import is_online, online_views
from raydistill.train.parameters import groups_table, player_groups

PLAYERS = "players.safetensors"
"""What players own beside the student, in the folder of the weights that a phase hands over."""


class Validator(Protocol):
    """Measures a student on held-out rows; written by `evaluate`."""

    def sums(self, student: nn.Module, *, rank: int, world_size: int) -> dict[str, float]:
        """The sums of this rank's share; every rank makes the same number of forward passes."""

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the summed `sums` of all ranks."""


@dataclass(slots=True)
class Prepared:
    """A phase that is ready to train on this rank."""

    job: PhaseJob
    recipe: Recipe[Config]
    engines: dict[str, Engine]
    ema: Ema | None
    dataset: Samples
    sampler: Sampler
    num_steps: int
    device: torch.device
    checkpoints: Checkpoints
    validator: Validator | None
    """Of evaluations inside the training; made when the first is due."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def resume(self) -> Progressed:
        """Load the newest complete checkpoint, if there is one."""
        if self.rank == 0:
            self.checkpoints.clear()
        dist.barrier()  # a file of a killed run must not pass for one of this run
        progressed = self.checkpoints.latest()
        if progressed is None:
            return Progressed()
        changed = require_same_settings(progressed.settings, self.job, allowed=MAY_CHANGE)
        if self.rank == 0:
            say(f"phase {self.job.phase.name}: continuing after step {progressed.step}")
            if changed:
                say("with settings that changed since the checkpoint:\n" + "\n".join(changed))
        self.checkpoints.load(progressed, self.engines, self.ema)
        return progressed

    def draws(self, batches: StepBatches) -> list[Draws]:
        """The random numbers of each micro-batch of a step."""
        seed, phase = self.job.config.seed, self.job.phase.name
        return [Draws(seed=seed, phase=phase, step=batches.step, positions=p) for p in batches.positions]

    def save(self, progressed: Progressed, losses: Iterable[float]) -> None:
        """Write a checkpoint; all ranks together."""
        complete = progressed.model_copy(
            update={
                "num_ranks": dist.get_world_size(),
                "updates": {name: engine.num_updates for name, engine in self.engines.items()},
                "ema_updates": self.ema.num_updates if self.ema is not None else 0,
                "losses": tuple(losses),
                "settings": self.job.settings(),
            }
        )
        self.checkpoints.save(self.engines, self.ema, complete)

    def loader(self, first_step: int) -> Loader:
        """This rank's micro-batches from `first_step` to the end of the phase."""
        return Loader(
            self.dataset,
            self.sampler,
            rank=self.rank,
            world_size=dist.get_world_size(),
            micro_size=self.job.phase.batch.micro_size,
            first_step=first_step,
            end_step=self.num_steps,
            pin_memory=self.device.type == "cuda",
        )

    def evaluate(self) -> dict[str, float]:
        """Metrics of the present weights on held-out rows; all ranks together."""
        job = self.job
        if self.validator is None:
            self.validator = make_validator(job)
        validator, student = self.validator, self.recipe.student
        sums = self.engines["student"].inside_forward(
            lambda: validator.sums(student, rank=self.rank, world_size=dist.get_world_size())
        )
        names = sorted(sums)
        totals = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return validator.metrics(dict(zip(names, totals.tolist(), strict=True)))


def prepare(job: PhaseJob, device: torch.device) -> Prepared:
    """Build a phase from its job; every rank does the same."""
    phase = job.phase
    ensure_process_group(device)
    teachers = teacher_views(job)
    student = student_with(job, job.weights, dtype=torch.float32)
    if job.config.student.gradient_checkpointing:
        recompute_activations(student)
    online = online_teacher(job, rank=dist.get_rank())
    recipe = make_recipe(phase.recipe, student, teachers, job.config.source, online)
    take_over(job.weights, recipe)
    stores = {name: Store(uri) for name, uri in job.signals.items()}
    dataset = open_dataset(
        job.config, Store(job.inputs), stores, split="train", fields=recipe.reads, only=_episodes(phase)
    )
    order = Order(
        dataset.shard_rows,
        seed=job.config.seed,
        window=phase.batch.shuffle_shards,
        shuffle=phase.batch.shuffle,
        bucket=dataset.buckets,
    )
    sampler = Sampler(order, phase.batch.global_size)
    num_steps = phase.steps if phase.steps is not None else sampler.num_steps(phase.epochs or 0.0)
    engines = make_engines(job, recipe, num_steps, device)
    ema = Ema(engines["student"].masters, phase.ema) if phase.ema is not None else None
    checkpoints = Checkpoints(job.store / "checkpoints", phase.checkpoint.keep)
    return Prepared(job, recipe, engines, ema, dataset, sampler, num_steps, device, checkpoints, None)


def _episodes(phase: PhaseConfig) -> str | None:
    """The episodes that a phase learns from, as an expression; None for all."""
    return phase.recipe.episodes if isinstance(phase.recipe, FeaturesRecipe) else None


def make_engines(job: PhaseJob, recipe: Recipe[Config], num_steps: int, device: torch.device) -> dict[str, Engine]:
    """One engine per player. The phase's rules choose parameters of the player `student`; others are trained whole."""
    phase, players = job.phase, recipe.players()
    if set(players) != set(phase.optimizer):
        raise ConfigError(
            f"phase {phase.name!r}: the recipe {phase.recipe.kind} has the players {', '.join(sorted(players))}, found "
            f"optimizers for {', '.join(sorted(phase.optimizer))}. Give each player an entry under optimizer."
        )
    engines = {}
    for name, network in players.items():
        rules = phase.trainable if name == "student" else ()
        own = recipe.student if name == "student" else network
        where = f"phase {phase.name!r}, player {name}"
        groups = player_groups(network, own, rules, phase.optimizer[name], where=where)
        if dist.get_rank() == 0:
            say(f"phase {phase.name}, player {name}: trained parameters\n{groups_table(groups, network)}")
        engines[name] = Engine(recipe, name, groups, phase, phase.optimizer[name], num_steps=num_steps, device=device)
    return engines


def take_over(weights: str | None, recipe: Recipe[Config]) -> None:
    """What players own beside the student goes on from where the phase before left it, by name and shape."""
    if weights is None:
        return
    store = Store(weights.rpartition("/")[0] if weights.endswith(".safetensors") else weights)
    kept = load_tensors(store.read(PLAYERS)) if store.exists(PLAYERS) else {}
    own = {id(p) for p in recipe.student.parameters()}
    for player, network in recipe.players().items():
        for name, parameter in network.named_parameters():
            found = kept.get(f"{player}/{name}")
            if id(parameter) not in own and found is not None and found.shape == parameter.shape:
                parameter.data.copy_(found)


def teacher_views(job: PhaseJob) -> dict[str, TeacherView]:
    """What the recipe is told about each teacher whose signal it reads; weights are made to sum to 1.

    Where the teachers have an average, it stands for all of them.
    """
    if AVERAGE in job.signals:
        return {AVERAGE: TeacherView(AVERAGE, 1.0, open_manifest(Store(job.signals[AVERAGE])).facts)}
    signal = SIGNALS.get(type(job.phase.recipe), Config)
    read = [t for t in job.config.teachers if isinstance(t, signal)]
    chosen = [t for t in read if t.name in job.signals]
    total = sum(t.weight for t in read if t.name in job.signals or is_online(t))
    views = {
        t.name: TeacherView(t.name, t.weight / total if total else 0.0, open_manifest(Store(job.signals[t.name])).facts)
        for t in chosen
    }
    return views | online_views(job, total, rank=dist.get_rank())


def student_with(job: PhaseJob, weights: str | None, *, dtype: torch.dtype) -> nn.Module:
    """The student of a run with the weights of a folder or file (None: its first ones), on the CPU, drop-out off."""
    with local_folder(job.student) as folder, contextlib.ExitStack() as stack:
        path = None if weights is None else stack.enter_context(local_folder(weights))
        return load_student(folder, weights=path, dtype=dtype).eval()


def first_state(job: PhaseJob) -> dict[str, Tensor]:
    """The fp32 tensors that the phase starts from, by the names under which weights are saved."""
    student = student_with(job, job.weights, dtype=torch.float32)
    if isinstance(job.config.student.model, DiffusersModel | WorldModel):
        return {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    return own_state(student)  # type: ignore[arg-type]


def make_validator(job: PhaseJob) -> Validator:
    """What measures the student on held-out rows."""
    rows = job.config.evaluate.max_rows
    match job.config.source:
        case TextSource():
            from raydistill.evaluate import language

            return language.make_validator(job.config, inputs=job.inputs, signals=job.signals, max_rows=rows)
        case EpisodesSource():
            from raydistill.evaluate import world_metrics

            return world_metrics.make_validator(job.config, inputs=job.inputs, max_rows=rows)
        case ImagesSource() | VideosSource() | PromptsSource() if few_steps(job.config):
            from raydistill.evaluate import trajectory

            return trajectory.make_validator(job.config, inputs=job.inputs, signals=job.signals, max_rows=rows)
        case ImagesSource() | VideosSource() | PromptsSource():
            from raydistill.evaluate import denoiser

            return denoiser.make_validator(job.config, inputs=job.inputs, signals=job.signals, max_rows=rows)


def recompute_activations(student: nn.Module) -> None:
    """Turn on gradient checkpointing.

    Denoisers of diffusers recompute their blocks wherever gradients are wanted. transformers recomputes a layer only in
    training mode, which would turn drop-out on too; so only the layers themselves are put into that mode, not what is
    inside them.
    """
    if isinstance(student, WorldNetwork):
        student.dynamics.recompute = True
        return
    if hasattr(student, "enable_gradient_checkpointing"):
        student.enable_gradient_checkpointing()  # type: ignore[operator]
        return
    student.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for module in student.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
