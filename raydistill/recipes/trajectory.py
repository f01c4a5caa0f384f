"""Students of few steps against kept trajectories: `½ ‖f(x_t, t) - x0‖²` at states x_t of a teacher's path to x0.

Sources: Luhman & Luhman 2021, arXiv 2101.02388, Eq. 5 (one step); Yin et al. 2024, arXiv 2412.07772, Sec. 4.2 (several
steps, chunk by chunk). The state, its time and its alpha and sigma are those at which the teacher's sampler stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from raydistill.config.models import GeneratorConfig
from raydistill.config.recipes import TrajectoryRecipe
from raydistill.diffusion.process import Process, convert_at, on_frames
from raydistill.errors import CacheMismatch, ConfigError
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import predict
from raydistill.recipes.base import Loss, Part, Recipe, TeacherView
from raydistill.signals import Batch, Draws, JsonValue

CONDITIONS = ("prompt_embeds", "pooled", "time_ids")
SAME_TIME = 1e-6
"""Times that differ by no more are one time."""


class Trajectory(Recipe[TrajectoryRecipe]):
    """Batch: `<teacher>/path` [B, K, C, (T,) h, w], `<teacher>/clean` [B, C, (T,) h, w], the conditions, `weight` [B].

    A time of the student's `t_list` is drawn for each sample; with `causal` one for each chunk, the clean end among
    them, and a chunk sees those before it only. The one part, `trajectory`, is half the mean squared error of the clean
    prediction, per sample; clean chunks have nothing to learn and are left out of a sample's mean. The parts of
    several teachers are weighted.
    """

    def __init__(self, config: TrajectoryRecipe, student: nn.Module, teachers: Mapping[str, TeacherView]):
        super().__init__(config, student, teachers)
        self._process, generator = _carried(student)
        self._used = [teacher for teacher in teachers.values() if teacher.weight > 0]
        if not self._used:
            raise ConfigError("recipe trajectory wants a teacher of weight > 0; raise a teachers.*.weight.")
        self._grids = {t.name: Grid.of(t, generator.t_list[:-1], self._process) for t in self._used}
        self._causal: CausalDenoiser | None = None
        self._context = 0.0
        if config.causal:
            if generator.causal is None:
                raise ConfigError(
                    "recipe trajectory with causal: true wants student.generator.causal, found null; set chunk_frames."
                )
            self._causal = CausalDenoiser(student, generator.causal.chunk_frames)
            self._context = generator.causal.context_noise

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {teacher.name: ("clean", "path") for teacher in self._used}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"samples": float(batch["weight"].sum())}

    def loss(self, player: str, batch: Batch, rng: Draws) -> Loss:
        parts = {}
        total = sum(teacher.weight for teacher in self._used)
        for teacher in self._used:
            error = self._error(teacher, batch, rng)
            name = "trajectory" if len(self._used) == 1 else f"trajectory/{teacher.name}"
            parts[name] = Part((batch["weight"] * error).sum(), teacher.weight / total, "samples")
        return Loss(parts)

    def _error(self, teacher: TeacherView, batch: Batch, rng: Draws) -> Float[Tensor, " samples"]:
        grid = self._grids[teacher.name]
        clean, path = teacher.field(batch, "clean").float(), teacher.field(batch, "path")
        if self._causal is None:
            steps = torch.tensor([int(g.integers(len(grid.states))) for g in rng.rows("step")], device=clean.device)
            x_t = path[torch.arange(len(path), device=path.device), grid.state(steps)].float()
            own = predict(self.student, x_t, self._process.told(grid.time(steps)), _given(batch))
            return _half_square(grid.clean_of(own, x_t, steps), clean).flatten(1).mean(1)
        spans = self._causal.spans(clean.shape[2])
        forced = self.config.context == "clean"
        steps = self._drawn(rng, len(grid.states), len(spans), forced=forced).to(clean.device)
        steps = steps.repeat_interleave(torch.tensor([b - a for a, b in spans], device=clean.device), dim=1)
        x_t = grid.mixed(path, clean, steps)
        told = self._process.told(grid.time(steps))
        if forced:
            context, context_t = self._remembered(clean, steps, rng)
            own = self._causal.predict(x_t, told, _given(batch), clean=context, clean_t=context_t)
        else:
            own = self._causal.predict(x_t, told, _given(batch))
        counted = (steps < len(grid.states)).float()  # [samples, frames]
        error = _half_square(grid.clean_of(own, x_t, steps), clean).mean(dim=(1, 3, 4))
        return (error * counted).sum(1) / counted.sum(1)

    def _drawn(self, rng: Draws, num_steps: int, num_chunks: int, *, forced: bool) -> Int64[Tensor, "samples chunks"]:
        """A step for each chunk, `num_steps` standing for the clean end. Some chunk of every sample is not clean."""
        rows = []
        for generator in rng.rows("step"):
            row = generator.integers(num_steps + (not forced), size=num_chunks)
            if (row == num_steps).all():
                row[generator.integers(num_chunks)] = generator.integers(num_steps)
            rows.append(torch.from_numpy(row))
        return torch.stack(rows).long()

    def _remembered(self, clean: Tensor, steps: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """The context that chunks see, as the cache of a rollout has it, and what the network is told of its time."""
        t = torch.full(steps.shape, self._context, dtype=torch.float64, device=clean.device)
        if self._context == 0:
            return clean, self._process.told(t)
        noise = rng.normal("context", tuple(clean.shape[1:])).to(clean.device)
        return self._process.noised(clean, noise, t), self._process.told(t)


class Grid:
    """The states of a teacher that a student starts from, and where they lie. Step k is time k of the student's list;
    one more step stands for the clean end."""

    def __init__(
        self, states: Sequence[int], t: Sequence[float], alphas: Sequence[float], sigmas: Sequence[float], kind: Process
    ):
        self.states = list(states)
        """Number of the kept state for each time of the student."""
        self._process = kind
        self._state = torch.tensor(self.states)
        self._t, self._alpha, self._sigma = (
            torch.tensor([*(values[s] for s in states), end], dtype=torch.float64)
            for values, end in ((t, 0.0), (alphas, 1.0), (sigmas, 0.0))
        )

    @classmethod
    def of(cls, teacher: TeacherView, times: Sequence[float], process: Process) -> Grid:
        """The grid for the student's falling `times`, without the 0; `CacheMismatch` when the cache lacks one of them,
        `ConfigError` for another noise schedule or a prediction that says nothing at a state."""
        facts = teacher.facts
        if "t" not in facts or "sigmas" not in facts:
            raise CacheMismatch(
                f"teacher {teacher.name}: wanted a signal with times and sigmas of its states, found {sorted(facts)}; "
                "use a teacher of signal ode_trajectory."
            )
        kept, alphas, sigmas = (_numbers(facts[key]) for key in ("t", "alphas", "sigmas"))
        own = facts["process"]
        assert isinstance(own, dict), "a signal's facts hold what Process.to_json wrote"
        apart = process.differs(Process.from_json(own), timesteps=False)
        if apart is not None:
            raise ConfigError(
                f"the student wants the noise schedule of teacher {teacher.name}, found {apart} (student and teacher); "
                "name the teacher's with student.model.scheduler."
            )
        states = []
        for t in times:
            nearest = min(range(len(kept)), key=lambda i: abs(kept[i] - t))
            if abs(kept[nearest] - t) > SAME_TIME:
                pairs = ", ".join(f"{k:.6g} (sigma {s:.6g})" for k, s in zip(kept, sigmas, strict=True))
                raise CacheMismatch(
                    f"student.generator.t_list: wanted states that teacher {teacher.name} keeps, at t {pairs}, found "
                    f"{t:g}; use times that are kept, or add it to its keep_t and run --stages signals."
                )
            states.append(nearest)
            if process.prediction_type == "epsilon" and alphas[nearest] == 0:
                raise ConfigError(
                    f"student.generator.t_list: at t {t:g} nothing is left of the data, and a student that predicts "
                    "the noise says nothing of it there; begin later, or use one that predicts velocities."
                )
        return cls(states, kept, alphas, sigmas, process)

    def state(self, steps: Tensor) -> Tensor:
        """Number of the kept state of each step."""
        return self._state.to(steps.device)[steps]

    def time(self, steps: Tensor) -> Tensor:
        """Time of each step, fp64; 0 of the clean end."""
        return self._t.to(steps.device)[steps]

    def mixed(self, path: Tensor, clean: Tensor, steps: Int64[Tensor, "samples frames"]) -> Tensor:
        """Latents [samples, C, T, h, w] in fp32 whose frames are at steps of their own."""
        every = torch.cat([path[:, self.states].float(), clean[:, None]], dim=1)
        index = steps[:, None, None, :, None, None].expand(-1, 1, *clean.shape[1:])
        return every.gather(1, index)[:, 0]

    def clean_of(self, own: Tensor, x_t: Tensor, steps: Tensor) -> Tensor:
        """The clean latents that a prediction at `steps` ([samples] or [samples, frames]) stands for, fp32."""
        alpha, sigma = (on_frames(v.to(steps.device)[steps], x_t) for v in (self._alpha, self._sigma))
        return convert_at(own, x_t, alpha, sigma, source=self._process.prediction_type, target="sample")


def _half_square(found: Tensor, wanted: Tensor) -> Tensor:
    return 0.5 * (found - wanted).square()


def _given(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in CONDITIONS if name in batch}


def _numbers(values: JsonValue) -> list[float]:
    assert isinstance(values, list), "facts of a trajectory are lists of numbers"
    return [float(str(value)) for value in values]


def _carried(student: nn.Module) -> tuple[Process, GeneratorConfig]:
    process, generator = getattr(student, "process", None), getattr(student, "generator", None)
    if not isinstance(process, Process) or not isinstance(generator, GeneratorConfig):
        raise ConfigError(
            f"recipe trajectory wants a denoiser of few steps, found {type(student).__name__} without "
            "student.generator; name its t_list."
        )
    return process, generator
