"""What world models say as teachers: taps of every kind, reduced features, other people's models, odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from world_toys import TEACHER, teacher_section

from raydistill.config.world import FeaturesTeacher, RolloutTeacher, WorldPythonModel
from raydistill.errors import ConfigError, SignalMismatch
from raydistill.models.world import WorldOutput, random_world
from raydistill.models.world.features import directions, per_clip
from raydistill.models.world.files import load_world_teacher
from raydistill.teachers.world import Features


def section(**changes: Any) -> FeaturesTeacher:
    return FeaturesTeacher.model_validate(teacher_section(Path("/nowhere"), **changes))


def batch(clips: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "frames": torch.randint(0, 256, (clips, 5, 3, 12, 12), generator=generator, dtype=torch.uint8),
        "actions": torch.randint(0, 5, (clips, 4), generator=generator),
        "row_key": torch.arange(clips),
    }


class VideoModel(nn.Module):
    """A video model without codes: one layer over all frames at once, whose tokens are in one long row."""

    def __init__(self, odd: bool = False):
        super().__init__()
        self.num_actions, self.frame_shape = 5, (3, 12, 12)
        self.hidden, self.odd = nn.Linear(3 * 12 * 12, 8), odd
        self.out = nn.Linear(8, 3 * 12 * 12)
        self.extra = nn.Identity()

    def encode(self, frames: Tensor) -> Tensor:
        return self.hidden(frames.flatten(2))[:, :, None]

    def forward(self, frames: Tensor, actions: Tensor) -> WorldOutput:
        hidden = self.hidden(frames[:, :-1].flatten(2))
        if self.odd and len(frames) > 1:
            self.extra(hidden[..., :4])
        else:
            self.extra(hidden)
        return WorldOutput(frames=self.out(hidden).unflatten(-1, self.frame_shape))

    def rollout(self, initial: Tensor, actions: Tensor) -> Tensor:
        steps = actions.shape[1] + 1 - initial.shape[1]
        return initial[:, -1:].expand(-1, steps, -1, -1, -1)


def make_video_model(odd: bool = False) -> VideoModel:
    torch.manual_seed(0)
    return VideoModel(odd)


def test_any_module_with_the_methods_teaches() -> None:
    model = WorldPythonModel(library="python", source="test_world_teacher:make_video_model", dtype="float32")
    network = load_world_teacher(model)
    teacher = Features(section(taps={"hidden": "hidden"}), network, 5)
    said = teacher(batch())
    assert set(said) == {"frames", "tap.hidden"}
    assert said["tap.hidden"].shape == (3, 1, 4, 8)
    assert teacher.facts["num_codes"] is None


def test_features_that_change_their_shape_between_batches_are_refused() -> None:
    teacher = Features(section(taps={"extra": "extra"}), make_video_model(odd=True), 5)
    with pytest.raises(SignalMismatch, match=r"tap\.extra of the shape \[1, 4, 8\] in every batch, found \[1, 4, 4\]"):
        teacher(batch())


def test_a_tap_that_names_no_module_shows_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"found no 'dynamics\.block\.0'; names that come near: dynamics\.blocks\.0"):
        Features(section(taps={"x": "dynamics.block.0"}), random_world(TEACHER, seed=0), 5)


def test_an_attention_map_that_is_none_is_refused() -> None:
    taps = {"x": {"module": "dynamics.norm", "kind": "spatial"}}
    teacher = Features(section(taps=taps), random_world(TEACHER, seed=0), 5)
    assert teacher.schema["tap.x"].dims == ("x.map", "x.query", "x.key")  # four axes could be anything
    with pytest.raises(ConfigError, match=r"wanted an output \[…, heads, queries, keys\], found \[1, 5\]"):
        per_clip(torch.zeros(1, 5), "spatial", 1, where="x")


def test_frames_and_actions_that_do_not_fit_are_named() -> None:
    teacher = Features(section(), random_world(TEACHER, seed=0), 5)
    wrong = {**batch(), "actions": batch()["actions"][:, :2]}
    with pytest.raises(ConfigError, match=r"teachers\.big: wanted one action less than frames, \[3, 4\], found"):
        teacher(wrong)
    with pytest.raises(ConfigError, match="wanted actions from 0 to 4, found 9 to 9"):
        teacher({**batch(), "actions": torch.full((3, 4), 9)})


def test_a_clip_says_the_same_alone_and_among_others() -> None:
    teacher = Features(section(), random_world(TEACHER, seed=0), 5)
    together, alone = teacher(batch()), teacher({n: v[1:2] for n, v in batch().items()})
    for name, values in together.items():
        torch.testing.assert_close(values[1:2], alone[name], msg=name)


def test_fewer_directions_keep_distances_in_proportion() -> None:
    basis = directions("x", 64, 16)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16) * 4, rtol=1e-4, atol=1e-5)
    draws = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    ratio = (draws @ basis).square().sum(1).mean() / draws.square().sum(1).mean()
    assert float(ratio) == pytest.approx(1, abs=0.05)
    teacher = Features(section(rank=6), random_world(TEACHER, seed=0), 5)
    assert teacher(batch())["tap.block"].shape == (3, 4, 9, 6)
    assert teacher(batch())["tap.latents"].shape == (3, 5, 9, 4)  # already narrower


def test_a_rollout_needs_room_in_the_clip() -> None:
    config = RolloutTeacher.model_validate(teacher_section(Path("/x"), signal="rollout", initial_frames=5))
    with pytest.raises(ConfigError, match="wanted fewer than the 5 frames of a clip, found 5"):
        Features(config, random_world(TEACHER, seed=0), 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:make", "cannot import this function"),
        ("test_world_teacher:section", "wanted a torch.nn.Module, found FeaturesTeacher"),
        ("test_world_teacher:make_linear", "found Linear without encode"),
    ],
)
def test_functions_that_build_none_are_named(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_world_teacher(WorldPythonModel(library="python", source=source, dtype="float32"))


def make_linear() -> nn.Module:
    return nn.Linear(2, 2)
