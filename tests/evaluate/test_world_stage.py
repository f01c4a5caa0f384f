"""World models measured and judged: exact answers of models that know the game, the checklist, pictures and play."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from world_toys import PHASE, build_inputs, build_signal, run_config, small_world, teacher_folder, write_episodes

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, VerificationFailed
from raydistill.evaluate import play
from raydistill.evaluate.stage import check_evaluation
from raydistill.evaluate.video_features import VideoExtractor
from raydistill.evaluate.world_checklist import checklist, falls
from raydistill.evaluate.world_metrics import Clips, clip_cosine, held_out_clips, make_validator
from raydistill.evaluate.world_pictures import animation, strip
from raydistill.evaluate.worlds import (
    beside_teacher,
    feature_similarity,
    look_at,
    measured,
    seen,
    swapped_actions,
    trained_probe,
)
from raydistill.models.world.files import save_world
from raydistill.models.world.protocol import WorldOutput
from raydistill.pipeline import Run, advance
from raydistill.storage import Store

MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


class KnowsTheGame(nn.Module):
    """Rolls the toy game's picture by the action: the exact next frame. With `deaf` it hears no action."""

    def __init__(self, deaf: bool = False, copies: bool = False):
        super().__init__()
        self.num_actions, self.frame_shape = 5, (3, 12, 12)
        self.weight, self.deaf, self.copies = nn.Parameter(torch.zeros(1)), deaf, copies

    def encode(self, frames: Tensor) -> Tensor:
        return frames.flatten(3).mT

    def _next(self, frame: Tensor, action: Tensor) -> Tensor:
        if self.copies:
            return frame
        moves = [MOVES[1] if self.deaf else MOVES[int(a)] for a in action]
        return torch.stack([f.roll((4 * r, 4 * c), (1, 2)) for f, (r, c) in zip(frame, moves, strict=True)])

    def forward(self, frames: Tensor, actions: Tensor) -> WorldOutput:
        made = [self._next(frames[:, t], actions[:, t]) for t in range(actions.shape[1])]
        return WorldOutput(frames=torch.stack(made, 1))

    def rollout(self, initial: Tensor, actions: Tensor) -> Tensor:
        frame, made = initial[:, -1], []
        for t in range(initial.shape[1] - 1, actions.shape[1]):
            frame = self._next(frame, actions[:, t])
            made.append(frame)
        return torch.stack(made, 1)


def config_of(folder: Path, **changes: Any) -> RunConfig:
    write_episodes(folder / "episodes", number=12, steps=12)
    return run_config(folder, **changes)


def clips_of(config: RunConfig) -> tuple[Clips, Any, str]:
    inputs, _ = build_inputs(config)
    clips = held_out_clips(config, inputs.uri, max_rows=16)
    probe, read = trained_probe(config, inputs.uri, clips)
    assert read > 0.9  # the toy game's actions can be seen
    return clips, probe, inputs.uri


def test_a_model_that_knows_the_game_scores_one_and_a_copy_scores_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluate={"held_out": 0.3, "worlds": {"probe_steps": 150}})
    clips, probe, _ = clips_of(config)
    knows, deaf, copy = (
        measured(model, clips, probe, config)
        for model in (KnowsTheGame(), KnowsTheGame(deaf=True), KnowsTheGame(copies=True))
    )
    assert knows.line["mse_to_truth"] == pytest.approx(0)
    assert knows.line["true_change_cosine"] == pytest.approx(1)
    assert knows.line["rollout_cosine"] == pytest.approx(1)
    assert knows.line["diversity"] == pytest.approx(1)
    assert float(str(knows.line["obedience"])) > 0.9
    assert float(str(knows.line["action_effect"])) > 0.5
    assert copy.line["true_change_cosine"] == 0
    assert float(str(copy.line["true_raw_cosine"])) > 0.6  # which is why the raw cosine says little
    assert float(str(deaf.line["obedience"])) < 0.6
    assert deaf.line["action_effect"] == 0
    line = beside_teacher(knows, knows, clips, context=1)
    assert line["change_cosine"] == pytest.approx(1)
    assert line["obedience_ratio"] == 1
    assert line["feature_similarity"] == pytest.approx(1)
    assert "psnr_to_teacher" not in line  # of equal frames there is none
    assert beside_teacher(copy, knows, clips, context=1)["change_cosine"] == 0


def test_drift_is_by_step_and_steps_behind_an_end_do_not_count() -> None:
    change = torch.ones(1, 3, 1, 2, 2)
    other = change.clone()
    other[:, 2] = -1
    assert float(clip_cosine(other, change, torch.tensor([[True, True, False]]))) == pytest.approx(1)
    assert float(clip_cosine(other, change, torch.tensor([[True, True, True]]))) == pytest.approx(1 / 3)


def test_swapped_actions_are_others() -> None:
    actions = torch.arange(6)[None]
    assert (swapped_actions(actions, 6) != actions).all()
    assert swapped_actions(torch.zeros(1, 3, dtype=torch.long), 2).tolist() == [[1, 1, 1]]


def test_similar_features_are_those_that_turn_into_each_other() -> None:
    a = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert feature_similarity(a, 3 * a @ turn) == pytest.approx(1)
    b = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert feature_similarity(a, b) < 0.5


def test_the_validator_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    inputs, _ = build_inputs(config)
    validator = make_validator(config, inputs=inputs.uri)
    student = small_world()
    whole = validator.sums(student, rank=0, world_size=1)
    halves = [validator.sums(student, rank=rank, world_size=2) for rank in (0, 1)]
    for name, value in whole.items():
        assert halves[0][name] + halves[1][name] == pytest.approx(value, rel=1e-5)
    assert set(validator.metrics(whole)) == {"mse_to_truth", "true_change_cosine"}


def run_of(folder: Path, **changes: Any) -> Run:
    """A run on toy episodes with its caches, trained for a few steps."""
    teacher_folder(folder / "teacher")
    phases = [{**PHASE, "recipe": {"kind": "features", "reconstruction": 1.0}}]
    run = Run(config_of(folder, **{"phases": phases, **changes}))
    run.inputs = build_inputs(run.config)
    run.signals = {"big": build_signal(run.config)}
    advance(run, ("init", "train", "evaluate"))
    return run


def test_a_whole_run_ends_with_a_checklist_an_export_and_a_page(tmp_path: Path, capsys: Any) -> None:
    run = run_of(tmp_path)
    metrics = json.loads(run.store.read_text("metrics.json"))
    assert {"teacher", "student_init", "student_ce", "student", "comparison", "held_out"} <= set(metrics)
    assert metrics["teacher"]["change_cosine"] == pytest.approx(1)
    assert len(metrics["student"]["drift"]) == 4
    checks = checklist(run.config, run.store, weights=run.handed_over("phases"))
    assert len(checks) == 8  # every line of the list
    assert [check.state for check in checks[-2:]] == ["not measured here"] * 2
    advance(run, ("checklist",))  # in a whole run a failed line is told
    assert "action conditioning works" in capsys.readouterr().out
    advance(run, ("export", "report"))
    page = run.store.read_text("report.html")
    assert "data:image/gif;base64" in page
    assert "then every model plays the same actions by itself" in page
    assert "cosine of the predicted change" in (Path(run.store.path("export")) / "README.md").read_text()


def test_a_failed_line_of_the_checklist_ends_with_status_three(tmp_path: Path) -> None:
    run = run_of(tmp_path, evaluate={"held_out": 0.3, "worlds": {"min_visual": 90.0, "probe_steps": 20, "strips": 1}})
    with pytest.raises(VerificationFailed, match="generated frames are visually similar") as failed:
        advance(run, ("checklist",), asked=True)
    assert failed.value.exit_status == 3


@pytest.mark.parametrize(
    ("losses", "state"),
    [
        ([1.0 - 0.01 * i for i in range(40)], "pass"),
        ([1.0 + 0.01 * i for i in range(40)], "fail"),
        ([1.0, 0.5], "not measured here"),
    ],
)
def test_a_loss_that_rises_fails_and_a_few_steps_do_not_tell(tmp_path: Path, losses: list[float], state: str) -> None:
    config, store = run_config(tmp_path), Store(tmp_path)
    lines = [json.dumps({"phase": "all", "step": i, "loss": loss}) for i, loss in enumerate(losses)]
    store.publish("metrics.jsonl", "\n".join(lines))
    assert falls(config, store).state == state


def test_strips_and_animations_hold_every_frame() -> None:
    frames = torch.rand(4, 3, 6, 8)
    image = Image.open(io.BytesIO(strip(frames)))
    assert image.size == (4 * 9 - 1, 6)
    assert np.array_equal(np.asarray(image)[:, 9:17], (frames[1] * 255).round().byte().permute(1, 2, 0).numpy())
    movie = Image.open(io.BytesIO(animation(frames, scale=3)))
    assert (movie.size, movie.n_frames) == ((24, 18), 4)  # type: ignore[attr-defined]


def test_play_writes_an_animation_of_what_was_typed(tmp_path: Path, capsys: Any) -> None:
    save_world(small_world(), tmp_path / "model")
    write_episodes(tmp_path / "episodes", number=1)
    start, out = str(tmp_path / "episodes/episode-00.npz"), tmp_path / "play.gif"
    arguments = [str(tmp_path / "model"), "--start", start, "--out", str(out)]
    assert play.main([*arguments, "--actions", "1 2 34", "--strip"]) == 0
    assert Image.open(out).n_frames == 5  # type: ignore[attr-defined]
    assert out.with_suffix(".png").exists()
    for wrong, message in (("9", "wanted actions from 0 to 4, found 9"), ("up", "wanted digits such as 11223")):
        assert play.main([*arguments, "--actions", wrong]) == 2
        assert message in capsys.readouterr().err
    assert play.main([str(tmp_path / "model"), "--actions", "1"]) == 2
    assert "exactly one of --start FILE and --game ID" in capsys.readouterr().err


class Grey:
    """A game that begins with one grey."""

    class _Space:
        n = 5

    action_space = _Space()

    def __init__(self, level: int = 0):
        self._level = level

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, object]]:
        return np.full((12, 12, 3), self._level, np.uint8), {}


def test_play_begins_with_the_game_as_its_arguments_make_it(tmp_path: Path, capsys: Any) -> None:
    save_world(small_world(), tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--game", "test_world_stage:Grey", "--actions", "1", "--out"]
    for level, words in ((0, []), (200, ["--arguments", "{level: 200}"])):
        out = tmp_path / f"{level}.gif"
        assert play.main([*arguments, str(out), *words]) == 0
        assert np.asarray(Image.open(out).convert("RGB")).mean() == pytest.approx(level, abs=2)
    with pytest.raises(SystemExit) as stop:
        play.main([*arguments, "x.gif", "--arguments", "[200"])
    assert stop.value.code == 2
    assert "wanted a map such as {area: [32, 32]}, found '[200'" in capsys.readouterr().err


def test_nothing_held_out_is_said(tmp_path: Path) -> None:
    from raydistill.errors import DataError

    config = config_of(tmp_path, evaluate={"held_out": 1e-9})
    inputs, _ = build_inputs(config)
    with pytest.raises(DataError, match=r"raise evaluate\.held_out"):
        held_out_clips(config, Store(inputs.uri).uri, max_rows=4)


class Colours(nn.Module):
    """Mean colour of a video, and how it changes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3, 4)), (x[:, :, 1:] - x[:, :, :-1]).abs().mean((2, 3, 4))], 1)


def test_rollouts_are_compared_with_real_clips_and_with_the_teachers_by_the_extractors_name(tmp_path: Path) -> None:
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    worlds = {"probe_steps": 1, "video_extractor": str(tmp_path / "colours.pt")}
    config = config_of(tmp_path, evaluate={"held_out": 0.3, "worlds": worlds})
    clips, probe, _ = clips_of(run_config(tmp_path, evaluate={"held_out": 0.3, "worlds": {"probe_steps": 150}}))
    check_evaluation(config)
    extractor = VideoExtractor(str(tmp_path / "colours.pt"), 12, torch.device("cpu"))
    real = seen(extractor, clips.frames[:, 1:], clips)
    assert len(real) == int(clips.valid.all(1).sum())
    said = {}
    for name, model in (("knows", KnowsTheGame()), ("copies", KnowsTheGame(copies=True))):
        said[name] = measured(model, clips, probe, config)
        look_at(said[name], extractor, real, clips)
    distance = {name: one.line["video_features"]["frechet_distance"] for name, one in said.items()}  # type: ignore
    assert distance["knows"] == pytest.approx(0, abs=1e-6)
    assert distance["copies"] > 1e-3
    line = beside_teacher(said["copies"], said["knows"], clips, context=1)
    assert line["video_features_to_teacher"]["frechet_distance"] == pytest.approx(distance["copies"])  # type: ignore
    assert line["video_features_to_teacher"]["extractor"] == "colours"  # type: ignore[call-overload, index]
    assert "video_features_to_teacher" not in beside_teacher(said["knows"], said["knows"], clips, context=1)


def test_rollouts_too_short_for_i3d_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "i3d.ckpt").write_bytes(b"")
    worlds = {"video_extractor": str(tmp_path / "i3d.ckpt")}
    with pytest.raises(
        ConfigError, match=r"evaluate\.worlds\.video_extractor: I3D looks .* at least 9 frames, found 4"
    ):
        check_evaluation(config_of(tmp_path, evaluate={"held_out": 0.3, "worlds": worlds}))
