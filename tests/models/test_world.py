"""The reference family of world models: causality, kept keys and values, taps, and one seed one network."""

from __future__ import annotations

import pytest
import torch

from raydistill.config.world import WorldSizes
from raydistill.errors import ConfigError
from raydistill.models.taps import Taps
from raydistill.models.world import empty_world, random_world, require_world_model
from raydistill.models.world.dynamics import Spatial, empty_memory
from raydistill.models.world.protocol import check_clips

SIZES = WorldSizes(
    frame_size=(8, 12), num_actions=5, patch=4, stages=2, tokenizer_width=8, tokenizer_blocks=1, codebook_size=16,
    code_width=4, width=16, layers=2, heads=2, context=3,
)  # fmt: skip


def clips(frames: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, frames, 3, 8, 12, generator=generator), torch.randint(
        0, 5, (2, frames - 1), generator=generator
    )


def test_one_seed_makes_one_network_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = random_world(SIZES, seed=3), random_world(SIZES, seed=3), random_world(SIZES, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_future_does_not_reach_the_past() -> None:
    network = random_world(SIZES, seed=0)
    frames, actions = clips()
    before = network(frames, actions).logits
    later, other = frames.clone(), actions.clone()
    later[:, 3:], other[:, 3:] = 0, (actions[:, 3:] + 1) % 5
    after = network(later, other).logits
    assert before is not None
    assert after is not None
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_an_action_changes_what_follows_it() -> None:
    network = random_world(SIZES, seed=0)
    frames, actions = clips()
    swapped = actions.clone()
    swapped[:, 2] = (actions[:, 2] + 1) % 5
    difference = (network(frames, actions).frames - network(frames, swapped).frames).abs().amax((0, 2, 3, 4))
    assert difference[:2].max() == 0
    assert difference[2] > 0


def test_frames_one_by_one_give_what_all_at_once_give_also_beyond_the_context() -> None:
    network = random_world(SIZES, seed=1).double()
    vectors = torch.randn(2, 7, 6, 4, dtype=torch.float64)
    actions = torch.randint(0, 5, (2, 7))
    whole = network.dynamics(vectors, actions)
    memory = empty_memory(SIZES.layers)
    pieces = [network.dynamics(vectors[:, a:b], actions[:, a:b], memory) for a, b in ((0, 2), (2, 3), (3, 6), (6, 7))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_a_rollout_is_what_predicting_from_its_own_codes_gives() -> None:
    network = random_world(SIZES, seed=2)
    frames, actions = clips(5)
    found = network.rollout(frames[:, :2], actions)
    assert found.shape == (2, 3, 3, 8, 12)
    entries, assignment = network.codebook(network.encode(frames[:, :2]))
    vectors = entries[assignment.argmax(-1)]
    for step in range(3):
        logits = network.dynamics(vectors, actions[:, : 2 + step])[:, -1:]
        torch.testing.assert_close(network.decoder(logits.softmax(-1) @ entries)[:, 0], found[:, step])
        vectors = torch.cat([vectors, entries[logits.argmax(-1)]], 1)


def test_attention_maps_are_read_by_name_and_do_not_change_the_result() -> None:
    network = random_world(SIZES, seed=0)
    frames, actions = clips()
    plain = network(frames, actions).frames
    paths = {"space": "dynamics.blocks.1.spatial.map", "time": "dynamics.blocks.0.temporal.map", "z": "encoder.latents"}
    with Taps(network, paths, where="here") as taps:
        read = network(frames, actions).frames
    torch.testing.assert_close(read, plain)
    found = taps.taken()
    assert found["space"].shape == (2 * 5, 2, 6, 6)
    assert found["time"].shape == (2 * 6, 2, 5, 5)
    assert found["z"].shape == (2, 6, 6, 4)
    for name in ("space", "time"):
        torch.testing.assert_close(found[name].sum(-1), torch.ones(found[name].shape[:-1]))
    assert found["time"].triu(1).max() == 0
    assert found["time"][..., 4, 0].max() == 0  # beyond a context of 3


def test_recomputing_activations_gives_the_same_gradient() -> None:
    network = random_world(SIZES, seed=0)
    frames, actions = clips()
    gradients = []
    for recompute in (False, True):
        network.dynamics.recompute = recompute
        network.zero_grad()
        network(frames, actions, reconstruct=True).frames.sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_network_has_the_same_parameters() -> None:
    wanted = {n: tuple(p.shape) for n, p in random_world(SIZES, seed=0).named_parameters()}
    assert {n: tuple(p.shape) for n, p in empty_world(SIZES).named_parameters()} == wanted


def test_a_module_without_the_methods_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Linear without encode, rollout, num_actions, frame_shape"):
        require_world_model(torch.nn.Linear(2, 2), where="teachers.0")
    assert require_world_model(random_world(SIZES, seed=0), where="teachers.0").num_actions == 5


@pytest.mark.parametrize(
    ("frames", "actions", "message"),
    [
        ((2, 6, 3, 8, 8), (2, 5), r"wanted frames \[clips, frames, 3, 8, 12\]"),
        ((2, 6, 3, 8, 12), (2, 6), r"one action less than frames, \[2, 5\], found actions \[2, 6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(frames: tuple[int, ...], actions: tuple[int, ...], message: str) -> None:
    network = random_world(SIZES, seed=0)
    with pytest.raises(ConfigError, match=message):
        check_clips(torch.zeros(frames), torch.zeros(actions, dtype=torch.long), network, where="teacher")


def test_an_action_beyond_the_action_space_is_named() -> None:
    network = random_world(SIZES, seed=0)
    with pytest.raises(ConfigError, match=r"wanted actions from 0 to 4, found 0 to 7"):
        check_clips(torch.zeros(1, 3, 3, 8, 12), torch.tensor([[0, 7]]), network, where="teacher")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_size": (9, 12)}, "multiples of patch"),
        ({"heads": 3}, "a divisor of width"),
        ({"patch": 2, "frame_size": (8, 12), "stages": 2}, "stages"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldSizes.model_validate({**SIZES.model_dump(), **change})


def test_attention_between_tiles_depends_on_where_they_lie_to_each_other() -> None:
    """Equal tokens at two places of one distance, whatever the place: rows and columns apart."""
    spatial = Spatial(16, 2, columns=3)
    x = torch.randn(1, 1, 1, 16).expand(1, 1, 9, 16)
    q, k, _ = spatial.projected(x.flatten(0, 1))
    scores = spatial._placed(q) @ spatial._placed(k).mT
    torch.testing.assert_close(scores[..., 0, 1], scores[..., 4, 5])
    torch.testing.assert_close(scores[..., 0, 3], scores[..., 5, 8])
    assert not torch.allclose(scores[..., 0, 1], scores[..., 0, 3])
    assert not torch.allclose(scores[..., 1, 0], scores[..., 0, 1])
