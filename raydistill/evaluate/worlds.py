"""The stage `evaluate` of world models: teachers and students on the same held-out clips and actions.

Every model's line has, on one-step predictions from true frames, `mse_to_truth`, `true_change_cosine`,
`true_raw_cosine`, `diversity` (spread of its predictions over that of the true frames), `obedience` (share of the steps
in which a probe that was trained on true frames reads the right action off the predicted change) and `action_effect`
(rms change of the prediction when actions are swapped, over the rms of the true change); on rollouts `drift` by step,
`rollout_cosine`; and `frames_per_second` and `peak_memory_bytes` at batch 1. Beside a teacher also `change_cosine`,
`raw_cosine`, `mse_to_teacher`, `feature_similarity`, `psnr_to_teacher` of rollouts, `drift_to_teacher` and
`obedience_ratio`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raydistill.cache.joined import open_manifest
from raydistill.cache.manifest import Manifest
from raydistill.config.schema import RunConfig
from raydistill.config.world import WorldTeacher
from raydistill.evaluate.comparison import Quality, compare
from raydistill.evaluate.features import Extractor, extractor_file, feature_distances
from raydistill.evaluate.job import EvaluateJob, Evaluation, device, student_in
from raydistill.evaluate.language import model_size
from raydistill.evaluate.speed import peak_bytes, samples_per_second
from raydistill.evaluate.video_features import VideoExtractor, check_video_extractor, video_distance
from raydistill.evaluate.world_metrics import Clips, clip_cosine, held_out_clips, one_step
from raydistill.evaluate.world_pictures import actions_line, animation, strip
from raydistill.losses import world as losses
from raydistill.models.world.files import load_world_teacher
from raydistill.models.world.probe import ActionProbe, make_probe
from raydistill.models.world.protocol import WorldModel, require_world_model
from raydistill.progress import say
from raydistill.signals import JsonValue
from raydistill.storage import Store

TAUGHT = Quality("change_cosine", lower_is_better=False)
"""Ranks students of teachers."""
ALONE = Quality("true_change_cosine", lower_is_better=False)
"""Ranks world models without any."""
BATCH = 16
PROBE_CLIPS = 256
"""Training clips that the probe learns from at most."""
FEATURE_SIDE = 299
VIDEO_SIDE = 224
VIDEO_KEY = "evaluate.worlds.video_extractor"
MORE_CLIPS = "raise evaluate.worlds.clips and evaluate.held_out"
Line = dict[str, JsonValue]


@dataclass
class Said:
    """What a model did on the held-out clips."""

    frames: Tensor
    """One-step predictions [B, S, C, H, W]."""
    rollout: Tensor
    """Frames [B, S', C, H, W] after `context` true ones, made without seeing another."""
    latents: Tensor
    """Of the true frames [B, T, N, D]."""
    videos: Tensor | None = None
    """What a video extractor sees in whole rollouts [n, d]."""
    line: Line = field(default_factory=dict)


def check_worlds_evaluation(config: RunConfig) -> None:
    """Raise what the stage would end with: missing files."""
    if config.evaluate.worlds.feature_extractor is not None:
        extractor_file(config.evaluate.worlds.feature_extractor, key="evaluate.worlds.feature_extractor")
    if config.evaluate.worlds.video_extractor is not None:
        made = config.episodes.clip_frames - config.evaluate.worlds.context
        check_video_extractor(config.evaluate.worlds.video_extractor, made, key=VIDEO_KEY)


def evaluate_worlds(job: EvaluateJob) -> Evaluation:
    """Measure teachers and students; one model is in memory at a time."""
    config, place = job.config, device()
    found = held_out_clips(config, job.inputs, max_rows=config.evaluate.worlds.clips)
    clips = Clips(found.frames.to(place), found.actions.to(place), found.valid.to(place), found.row_ids)
    probe, read = trained_probe(config, job.inputs, clips)
    said: dict[str, Said] = {}
    extractor, videos = _extractor(config, place), _video_extractor(config, place)
    real = None if videos is None else seen(videos, clips.frames[:, config.evaluate.worlds.context :], clips)
    for who, network in _models(job):
        say(f"evaluate: {who.replace('_', ' ')}")
        said[who] = measured(network, clips, probe, config, extractor)
        if videos is not None and real is not None:
            look_at(said[who], videos, real, clips)
        said[who].line |= model_size(network)
        del network
        gc.collect()
    teachers = [who for who in said if who.startswith("teacher/")]
    heaviest = _heaviest(config)
    if heaviest is not None:
        for one in said.values():
            one.line |= beside_teacher(one, said[heaviest], clips, config.evaluate.worlds.context)
    roles: dict[str, Line] = {"teacher": said[heaviest].line} if heaviest else {}
    roles |= {who: one.line for who, one in said.items() if who not in teachers}
    metrics: dict[str, JsonValue] = dict(roles)
    if len(teachers) > 1:
        metrics["teachers"] = {who.removeprefix("teacher/"): said[who].line for who in teachers}
    metrics["comparison"] = _compared(roles, TAUGHT if heaviest else ALONE)
    metrics["held_out"] = {"clips": len(clips.frames), "steps": int(clips.valid.sum()), "probe_accuracy": read}
    stats = world_cache_stats(Store(job.inputs), {name: Store(uri) for name, uri in job.signals.items()})
    metrics["cache"] = stats
    files: dict[str, bytes] = {}
    samples = pictures(said, clips, config, files)
    return Evaluation(metrics, samples, stats, files)


def _compared(roles: Mapping[str, Line], quality: Quality) -> dict[str, JsonValue]:
    found = compare(roles, quality)
    speeds = [roles.get(role, {}).get("frames_per_second") for role in ("student", "teacher")]
    if all(isinstance(speed, float) and speed > 0 for speed in speeds):
        found["speed_ratio"] = float(str(speeds[0])) / float(str(speeds[1]))
    return found


def _heaviest(config: RunConfig) -> str | None:
    if not config.teachers:
        return None
    return f"teacher/{max(config.teachers, key=lambda t: t.weight).name}"


def _models(job: EvaluateJob) -> Iterator[tuple[str, nn.Module]]:
    """The models where they are measured, loaded when their turn comes; half precision is held in fp32 on a CPU."""
    for teacher in job.config.teachers:
        assert isinstance(teacher, WorldTeacher), "the configuration lets world models learn from these alone"
        yield f"teacher/{teacher.name}", _ready(load_world_teacher(teacher.model))
    for role in job.students:
        yield role, _ready(student_in(job, role))


def _ready(network: nn.Module) -> nn.Module:
    place = device()
    half = any(p.dtype == torch.float16 for p in network.parameters())
    return network.to(place, torch.float32 if half and place.type == "cpu" else None).eval().requires_grad_(False)


def _extractor(config: RunConfig, place: torch.device) -> Extractor | None:
    source = config.evaluate.worlds.feature_extractor
    if source is None:
        return None
    return Extractor(source, FEATURE_SIDE, place, key="evaluate.worlds.feature_extractor")


def _video_extractor(config: RunConfig, place: torch.device) -> VideoExtractor | None:
    source = config.evaluate.worlds.video_extractor
    return None if source is None else VideoExtractor(source, VIDEO_SIDE, place, key=VIDEO_KEY)


def seen(extractor: VideoExtractor, frames: Tensor, clips: Clips) -> Tensor:
    """Features [n, d] of those videos [B, S, C, H, W] whose clips end where their episodes do not."""
    whole = clips.valid.all(1)
    return extractor(video.transpose(0, 1) for video, ok in zip(frames, whole, strict=True) if ok)


def look_at(one: Said, extractor: VideoExtractor, real: Tensor, clips: Clips) -> None:
    """Tell the distance of a model's rollouts from real clips, of which `real` was seen."""
    one.videos = seen(extractor, one.rollout.clamp(0, 1), clips)
    one.line["video_features"] = video_distance(extractor.name, one.videos, real, remedy=MORE_CLIPS)


@torch.no_grad()
def measured(
    network: nn.Module, clips: Clips, probe: ActionProbe, config: RunConfig, extractor: Extractor | None = None
) -> Said:
    """What `network` does on the clips, and its line as far as no teacher is needed."""
    model, context = require_world_model(network, where=type(network).__name__), config.evaluate.worlds.context
    frames, actions, valid = clips.frames, clips.actions, clips.valid
    predicted, swapped, latents, made = [], [], [], []
    other = swapped_actions(actions, model.num_actions)
    for first in range(0, len(frames), BATCH):
        part = slice(first, first + BATCH)
        predicted.append(one_step(network, frames[part], actions[part]))
        swapped.append(one_step(network, frames[part], other[part]))
        latents.append(model.encode(frames[part]).float())
        made.append(model.rollout(frames[part, :context], actions[part]).float())
    said = Said(torch.cat(predicted), torch.cat(made), torch.cat(latents))
    truth, last = frames[:, 1:], frames[:, :-1]
    mask = valid.float()
    steps = mask.sum()
    read = probe(last, said.frames).argmax(-1) == actions
    moved = (truth - last).abs().amax((2, 3, 4)) > 0
    told = valid & moved
    effect = _rms(torch.cat(swapped) - said.frames, valid) / _rms(truth - last, valid).clamp_min(1e-9)
    later = frames[:, context:]
    there = valid[:, context - 1 :]
    start = frames[:, context - 1 : context].expand_as(later)
    said.line = {
        "mse_to_truth": float((losses.squared_error(said.frames, truth) * mask).sum() / steps),
        "true_change_cosine": float(clip_cosine(said.frames - last, truth - last, valid).mean()),
        "true_raw_cosine": float((losses.raw_cosine(said.frames, truth) * mask).sum() / steps),
        "diversity": 1 - float(losses.diversity(said.frames, truth, valid)),
        "obedience": float((read & told).sum() / told.sum().clamp_min(1)),
        "action_effect": float(effect),
        "rollout_cosine": float(clip_cosine(said.rollout - start, later - start, there).mean()),
        "drift": _by_step(losses.squared_error(said.rollout, later), there),
        **play_costs(model, clips),
    }
    if extractor is not None:
        shown = [image for clip, ok in zip(said.rollout.clamp(0, 1), there, strict=True) for image in clip[ok]]
        real = [image for clip, ok in zip(later, there, strict=True) for image in clip[ok]]
        said.line["features"] = feature_distances(extractor(shown), extractor(real), extractor.name, remedy=MORE_CLIPS)
    return said


def swapped_actions(actions: Tensor, num_actions: int) -> Tensor:
    """Other actions than these: each is moved on by half the number of actions."""
    return (actions + max(1, num_actions // 2)) % num_actions


def play_costs(model: WorldModel, clips: Clips) -> dict[str, float]:
    """Frames per second of a rollout of one clip, and the memory that it takes beside the weights."""
    initial, actions = clips.frames[:1, :1], clips.actions[:1]
    place = initial.device

    def forward(turn: int) -> int:
        return int(model.rollout(initial, actions).shape[1])

    speed = samples_per_second(forward, place, turns=20)
    return {"frames_per_second": speed, "peak_memory_bytes": peak_bytes(lambda: forward(0), place)}


def beside_teacher(one: Said, teacher: Said, clips: Clips, context: int) -> Line:
    """What a model's line says of its likeness to the teacher."""
    last, valid = clips.frames[:, :-1], clips.valid
    mask, there = valid.float(), valid[:, context - 1 :]
    error = (losses.squared_error(one.rollout.clamp(0, 1), teacher.rollout.clamp(0, 1)) * there).sum() / there.sum()
    line: Line = {
        "change_cosine": float(clip_cosine(one.frames - last, teacher.frames - last, valid).mean()),
        "raw_cosine": float((losses.raw_cosine(one.frames, teacher.frames) * mask).sum() / mask.sum()),
        "mse_to_teacher": float((losses.squared_error(one.frames, teacher.frames) * mask).sum() / mask.sum()),
        "drift_to_teacher": _by_step(losses.squared_error(one.rollout, teacher.rollout), there),
        "feature_similarity": feature_similarity(one.latents, teacher.latents),
    }
    if one.videos is not None and teacher.videos is not None and one is not teacher:
        found = one.line["video_features"]
        assert isinstance(found, dict)
        name = str(found["extractor"])
        line["video_features_to_teacher"] = video_distance(name, one.videos, teacher.videos, remedy=MORE_CLIPS)
    if error > 0:
        line["psnr_to_teacher"] = -10 * math.log10(float(error))
    own, other = one.line["obedience"], teacher.line["obedience"]
    assert isinstance(own, float)
    assert isinstance(other, float)
    line["obedience_ratio"] = own / other if other else None
    return line


def feature_similarity(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two models' latents over all tokens: 1 when one is a rotation and scaling of the other.

    Source: Kornblith et al. 2019, arXiv 1905.00414, Sec. 3 (linear CKA).
    """
    if a.shape[1:3] != b.shape[1:3]:  # other tokens: compare whole frames
        a, b = a.flatten(2)[:, :, None], b.flatten(2)[:, :, None]
    x, y = (z.flatten(0, 2).double() for z in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (x.T @ y).square().sum()
    return float(cross / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt().clamp_min(1e-12))


def trained_probe(config: RunConfig, inputs: str, clips: Clips) -> tuple[ActionProbe, float]:
    """A probe that reads actions off true training frames, and how often it is right on held-out steps that changed.

    The same for all models, trained anew in each evaluation: from a fixed seed, on at most `PROBE_CLIPS` clips.
    """
    taught = held_out_clips(config, inputs, max_rows=PROBE_CLIPS, split="train")
    place = clips.frames.device
    probe = make_probe(clips.frames.shape[2], config.episodes.num_actions, seed=0).to(place)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    pairs = taught.valid.nonzero()
    generator = torch.Generator().manual_seed(0)
    for _ in range(config.evaluate.worlds.probe_steps):
        chosen = pairs[torch.randint(len(pairs), (64,), generator=generator)]
        clip, step = chosen.unbind(1)
        before, after = (taught.frames[clip, step + more][:, None].to(place) for more in (0, 1))
        loss = nn.functional.cross_entropy(probe(before, after)[:, 0], taught.actions[clip, step].to(place))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probe.eval().requires_grad_(False)
    last, truth = clips.frames[:, :-1], clips.frames[:, 1:]
    told = clips.valid & ((truth - last).abs().amax((2, 3, 4)) > 0)
    right = (probe(last, truth).argmax(-1) == clips.actions) & told
    return probe, float(right.sum() / told.sum().clamp_min(1))


def _rms(x: Tensor, valid: Tensor) -> Tensor:
    each = x.square().flatten(2).mean(2)
    return ((each * valid).sum() / valid.sum().clamp_min(1)).sqrt()


def _by_step(each: Tensor, valid: Tensor) -> list[JsonValue]:
    """Mean over the clips that have a step, step by step."""
    sums, counts = (each * valid).sum(0), valid.sum(0)
    return [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]


def pictures(
    said: Mapping[str, Said], clips: Clips, config: RunConfig, files: dict[str, bytes]
) -> dict[str, JsonValue]:
    """The content of samples.json: strips and animations of real frames and of every model under the same actions."""
    context, samples = config.evaluate.worlds.context, []
    count = min(config.evaluate.worlds.strips, len(clips.frames))
    for number in range(count):
        place = number * len(clips.frames) // count
        real = clips.frames[place, context - 1 :]
        shown = {"held-out": real}
        for who, one in said.items():
            if who != "student_init":
                shown[who] = torch.cat([real[:1], one.rollout[place]])
        line = actions_line(clips.actions[place, context - 1 :].tolist())
        for kind, ending, draw in (("film strip", "png", strip), ("played", "gif", _enlarged)):
            outputs: dict[str, JsonValue] = {}
            for who, frames in shown.items():
                name = f"samples/{number:02}-{who.replace('/', '-')}.{ending}"
                files[name] = draw(frames)
                outputs[who] = name
            reference = outputs.pop("held-out")
            prompt = f"{clips.row_ids[place]}, {kind}, actions {line}"
            samples.append(
                {"prompt": prompt, "row_id": clips.row_ids[place], "reference": reference, "outputs": outputs}
            )
    begun = f"{context} real frame{'s' * (context > 1)}"
    note = f"Each row begins with {begun}; then every model plays the same actions by itself."
    return {"kind": "images", "note": note, "samples": [*samples]}


def _enlarged(frames: Tensor) -> bytes:
    return animation(frames, scale=max(1, 144 // frames.shape[-2]))


def world_cache_stats(inputs: Store, signals: Mapping[str, Store]) -> dict[str, JsonValue]:
    """The content of cache_stats.json: rows and bytes of the inputs and of each signal."""
    manifest = open_manifest(inputs)
    kept = ("episodes", "clip_frames", "num_actions")
    return {
        "inputs": {
            "rows": {split: sum(s.rows for s in manifest.split_shards(split)) for split in ("train", "held_out")},
            "bytes": sum(s.bytes for s in manifest.shards),
            **{key: manifest.facts[key] for key in kept if key in manifest.facts},
        },
        "signals": {name: _signal_stats(open_manifest(store)) for name, store in signals.items()},
    }


def _signal_stats(signal: Manifest) -> dict[str, JsonValue]:
    rows, size = sum(s.rows for s in signal.shards), sum(s.bytes for s in signal.shards)
    return {"rows": rows, "draws": rows, "bytes": size, "bytes_per_draw": size / max(rows, 1)}
