"""The stage `evaluate` of students of few steps: teacher and students from the same noise and prompts.

samples.json: `{"kind": "videos" | "images", "steps": K, "samples": [{"prompt", "row_id", "reference": null, "outputs":
{who: file}, "players": {who: file}}]}`, where `outputs` are what a page shows (animated WebP, or PNG for images),
`players` the same as MP4, and `who` is a role of metrics.json or `teacher/<name>`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raydistill.config.teachers import OdeTrajectoryTeacher
from raydistill.diffusion.chunks import chunk_spans
from raydistill.diffusion.draws import noise_of
from raydistill.evaluate.comparison import compare
from raydistill.evaluate.denoiser import process_in
from raydistill.evaluate.generate import png
from raydistill.evaluate.images import cache_sizes, image_cache_stats
from raydistill.evaluate.job import EvaluateJob, Evaluation, device, student_in
from raydistill.evaluate.language import model_size
from raydistill.evaluate.motion import drift, motion
from raydistill.evaluate.speed import peak_bytes, samples_per_second
from raydistill.evaluate.trajectory import (
    MADE,
    HeldOutTrajectories,
    TrajectoryValidator,
    open_held_out_trajectories,
    trajectory_metrics,
)
from raydistill.evaluate.video_features import VideoExtractor, video_distance
from raydistill.models.autoencoder import Space, load_space
from raydistill.models.denoiser import load_denoiser
from raydistill.models.few_step import generate, seeded_noise
from raydistill.progress import say
from raydistill.signals import JsonValue
from raydistill.sources.films import mp4, webp
from raydistill.storage import Store
from raydistill.teachers import build_teacher

FOLDER = "samples"
MORE_VIDEOS = "raise evaluate.videos.feature_videos and evaluate.held_out"
SPEED_TURNS = 2
"""Samples on which the speed of a model is measured."""
SHOWN = ("student_ce", "student", "student_ema")
"""Students whose samples are shown; before training there is nothing to see."""

Line = dict[str, JsonValue]


@dataclass
class Films:
    """Samples by model, filled model by model."""

    prompts: list[str]
    row_ids: list[str]
    fps: float
    files: dict[str, bytes] = field(default_factory=dict)
    """By their name in the run folder."""
    _shown: dict[int, dict[str, str]] = field(default_factory=dict)
    _players: dict[int, dict[str, str]] = field(default_factory=dict)

    def add(self, who: str, pictures: Tensor) -> None:
        """Keep what a model made: pictures [samples, 3, (frames,) height, width] with values in [0, 1]."""
        for place, picture in enumerate(pictures):
            name = f"{FOLDER}/{place:02}-{who.replace('/', '-')}"
            if picture.ndim == 3:
                self._keep(self._shown, place, who, f"{name}.png", png(picture))
                continue
            self._keep(self._shown, place, who, f"{name}.webp", webp(picture, self.fps))
            self._keep(self._players, place, who, f"{name}.mp4", mp4(picture, self.fps))

    def _keep(self, table: dict[int, dict[str, str]], place: int, who: str, name: str, content: bytes) -> None:
        self.files[name] = content
        table.setdefault(place, {})[who] = name

    def as_json(self, steps: int) -> dict[str, JsonValue]:
        """The content of samples.json."""
        samples: list[JsonValue] = [
            {
                "prompt": prompt, "row_id": row_id, "reference": None,
                "outputs": {**self._shown.get(place, {})}, "players": {**self._players.get(place, {})},
            }
            for place, (prompt, row_id) in enumerate(zip(self.prompts, self.row_ids, strict=True))
        ]  # fmt: skip
        return {"kind": "videos" if self._players else "images", "steps": steps, "samples": samples}


def evaluate_generators(job: EvaluateJob) -> Evaluation:
    """Measure teachers and students; one model is in memory at a time."""
    config, settings = job.config, job.config.evaluate.videos
    rows = open_held_out_trajectories(config, inputs=job.inputs, signals=job.signals)
    space = load_space(config.latents.vae, str(device()))
    chosen = _spread(rows, settings.samples)
    films = Films(rows.dataset.captions(chosen), rows.dataset.row_ids(chosen), settings.fps)
    lines: dict[str, Line] = {}
    against: tuple[VideoExtractor, Tensor] | None = None
    """What looks at videos, and what it saw in the teacher's."""
    if rows.teacher is not None:
        say("evaluate: teacher")
        lines["teacher"], pictures = _teacher_line(job, rows, space, chosen, films)
        if settings.feature_extractor is not None and pictures.ndim == 5:
            extractor = VideoExtractor(settings.feature_extractor, settings.feature_size, device())
            against = extractor, extractor(pictures[: settings.feature_videos])
    for role, student in _students(job):
        say(f"evaluate: {role.replace('_', ' ')}")
        lines[role] = _student_line(job, rows, student, space, against)
        if role in SHOWN:
            films.add(role, _made(rows, student, space, chosen))
        del student
        gc.collect()
    stats = image_cache_stats(Store(job.inputs), {name: Store(uri) for name, uri in job.signals.items()})
    exported = "student_ema" if config.export.weights == "ema" else "student"
    metrics: dict[str, JsonValue] = {
        **lines,
        "comparison": compare(lines, MADE, exported=exported),
        "cache": cache_sizes(stats),
        "held_out": {"rows": rows.dataset.num_rows // rows.dataset.draws_per_row, "draws": rows.dataset.num_rows},
    }
    return Evaluation(metrics, films.as_json(rows.num_steps), stats, films.files)


def _teacher_line(
    job: EvaluateJob, rows: HeldOutTrajectories, space: Space, chosen: list[int], films: Films
) -> tuple[Line, Tensor]:
    """The teacher, whose samples are in the cache, and these; how long one takes is measured."""
    section = next(t for t in job.config.teachers if t.name == rows.teacher)
    assert isinstance(section, OdeTrajectoryTeacher), "its signal is a trajectory"
    size = model_size(load_denoiser(section.model))
    teacher = build_teacher(section, job.config.latents.noise)
    place = device()
    batch = {name: tensor[:1] for name, tensor in rows.read([0], place).items()}
    films.add(f"teacher/{rows.teacher}", torch.cat([_pictures(space, rows.clean(_one(rows, i))) for i in chosen]))
    pictures = torch.cat([_pictures(space, rows.clean(_one(rows, i))) for i in range(rows.dataset.num_rows)])
    line: Line = {**size, "mse_to_teacher": 0.0, **_movement(rows, pictures)}
    return line | _costs(lambda: teacher(batch), pictures, place, turns=1), pictures


def _student_line(
    job: EvaluateJob,
    rows: HeldOutTrajectories,
    student: nn.Module,
    space: Space,
    against: tuple[VideoExtractor, Tensor] | None,
) -> Line:
    size = model_size(student)
    nn.Module.to(student, torch.float32 if device().type == "cpu" else None)  # a CPU computes float16 by detours
    totals = TrajectoryValidator(rows).sums(student)
    pictures = torch.cat([_made(rows, student, space, part) for part in rows.batches()])
    batch = rows.read([0], device())
    line: Line = {**size, **trajectory_metrics(totals), **_movement(rows, pictures)}
    if against is not None:
        extractor, teachers = against
        own = extractor(pictures[: job.config.evaluate.videos.feature_videos])
        line["video_features_to_teacher"] = video_distance(extractor.name, own, teachers, remedy=MORE_VIDEOS)
    line |= _costs(lambda: rows.made(student, [0], batch), pictures, device(), turns=SPEED_TURNS)
    return line | _long(job, rows, student, space)


@torch.no_grad()
def _made(rows: HeldOutTrajectories, student: nn.Module, space: Space, indices: list[int]) -> Tensor:
    parts = [rows.made(student, [i], rows.read([i], device())) for i in indices]
    return torch.cat([_pictures(space, part) for part in parts])


def _movement(rows: HeldOutTrajectories, pictures: Tensor) -> Line:
    """How videos move; between chunks, where the student makes such."""
    if pictures.ndim != 5:
        return {}
    seams: list[int] = []
    if rows.generator.causal is not None:
        latent = rows.read([0], torch.device("cpu"))["noise"].shape[2]
        each = (pictures.shape[2] - 1) // max(1, latent - 1)  # frames of a latent, but for the first
        spans = chunk_spans(latent, rows.generator.causal.chunk_frames)
        seams = [(first - 1) * each + 1 for first, _ in spans[1:]]
    return motion(pictures, seams=seams)


@torch.no_grad()
def _costs(make: Callable[[], object], pictures: Tensor, place: torch.device, *, turns: int) -> Line:
    """Speed and memory of making one sample."""

    def forward(turn: int) -> int:
        make()
        return 1

    speed = samples_per_second(forward, place, turns=turns)
    frames = pictures.shape[2] if pictures.ndim == 5 else 1
    return {
        "samples_per_second": speed,
        "frames_per_second": speed * frames,
        "peak_memory_bytes": peak_bytes(make, place),
    }


@torch.no_grad()
def _long(job: EvaluateJob, rows: HeldOutTrajectories, student: nn.Module, space: Space) -> Line:
    """Drift over rollouts of `evaluate.videos.rollout_frames` latent frames; nothing without."""
    frames, generator = job.config.evaluate.videos.rollout_frames, rows.generator
    if frames is None or generator.causal is None:
        return {}
    found = []
    for index in _spread(rows, job.config.evaluate.videos.samples):
        batch = rows.read([index], device())
        (name,) = rows.dataset.row_ids([index])
        shape = list(batch["noise"].shape[1:])
        shape[1] = frames
        start = noise_of(name, 0, shape, rows.seed)[None].to(device())
        noise = seeded_noise([name], start, rows.seed)
        latents = generate(student, process_in(student), generator, noise, batch)
        found.append(_pictures(space, latents))
    videos = torch.cat(found)
    width = max(1, videos.shape[2] // max(1, frames // generator.causal.chunk_frames))
    away = drift(videos, window=width)
    return {"rollout_frames": frames, "rollout_drift": away["drift"], "rollout_drift_by_frame": away["by_frame"]}


def _students(job: EvaluateJob) -> Iterator[tuple[str, nn.Module]]:
    """The students, loaded when their turn comes."""
    for role in job.students:
        yield role, student_in(job, role)


def _pictures(space: Space, latents: Tensor) -> Tensor:
    """Pictures with values in [0, 1], on the CPU."""
    return (space.decode(latents) / 2 + 0.5).clamp(0, 1)


def _one(rows: HeldOutTrajectories, index: int) -> dict[str, Tensor]:
    return rows.read([index], torch.device("cpu"))


def _spread(rows: HeldOutTrajectories, count: int) -> list[int]:
    """Samples spread over the held-out rows, one of a row as long as there are others."""
    draws = rows.dataset.draws_per_row
    firsts = list(range(0, rows.dataset.num_rows, draws))
    pool = firsts if len(firsts) >= min(count, rows.dataset.num_rows) else list(range(rows.dataset.num_rows))
    count = min(count, len(pool))
    return [pool[i * len(pool) // count] for i in range(count)]
