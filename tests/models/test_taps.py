"""Taps of a UNet of diffusers: what they hold, with recomputed activations too, and what cannot be tapped."""

from __future__ import annotations

import pytest
import torch
from denoiser_toys import SIDE, batch_of, tiny_unet
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.models.taps import Taps, adapter, feature_shapes

PATHS = {"mid": "mid_block", "up": "up_blocks.0", "down": "down_blocks.1", "tokens": "mid_block.attentions.0.proj_out"}
RESNET = {"resnet": "down_blocks.0.resnets.0"}
"""A module that is itself recomputed in the backward pass."""


def forward(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    return unet(batch["noise"], batch["timestep"], batch["prompt_embeds"], added_cond_kwargs=added).sample


def test_a_tap_is_the_output_of_its_module_and_is_let_go_when_taken() -> None:
    unet, batch = tiny_unet(), batch_of(2)
    seen: dict[str, Tensor] = {}
    unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.update(mid=output))
    unet.down_blocks[1].register_forward_hook(lambda module, inputs, output: seen.update(down=output[0]))
    taps = Taps(unet, PATHS, where="test")
    with taps:
        forward(unet, batch)
    features = taps.taken()
    assert features.keys() == PATHS.keys()
    assert torch.equal(features["mid"], seen["mid"])
    assert torch.equal(features["down"], seen["down"])
    assert features["mid"].shape == (2, 16, SIDE // 2, SIDE // 2)
    assert not taps.features
    forward(unet, batch)
    assert not taps.features, "outside `with`, nothing is kept"


def test_recomputed_activations_change_no_gradient_through_a_tap() -> None:
    found = []
    for recompute in (False, True):
        unet, batch = tiny_unet(), batch_of(2)
        if recompute:
            unet.enable_gradient_checkpointing()
        calls = 0

        def count(*args: object) -> None:
            nonlocal calls
            calls += 1

        unet.down_blocks[0].resnets[0].register_forward_pre_hook(count)
        taps = Taps(unet, PATHS | RESNET, where="test")
        with taps:
            prediction = forward(unet, batch)
        features = taps.taken()
        (prediction.square().mean() + sum(f.square().mean() for f in features.values())).backward()
        assert calls == (2 if recompute else 1), "activations are recomputed when asked, and only then"
        assert not taps.features, "what is recomputed is not kept"
        found.append({n: p.grad for n, p in unet.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-7)


def test_shapes_are_found_without_computing_anything() -> None:
    unet = tiny_unet()
    before = {n: p.clone() for n, p in unet.named_parameters()}
    calls: list[torch.device] = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: calls.append(output.device))

    def one(network: nn.Module) -> Tensor:
        return forward(network, {n: t.to("meta") for n, t in batch_of(1).items()})

    shapes = feature_shapes(unet, PATHS, one, where="test")
    assert shapes == {"mid": (16, 4, 4), "up": (16, 8, 8), "down": (16, 4, 4), "tokens": (16, 16)}
    assert calls == [torch.device("meta")]
    assert all(torch.equal(p, before[n]) and p.device.type == "cpu" for n, p in unet.named_parameters())


def test_a_path_that_is_none_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.taps, tap 'mid': wanted a module.*no 'midblock'.*mid_block"):
        Taps(tiny_unet(), {"mid": "midblock"}, where="recipe.taps")
    with pytest.raises(ConfigError, match="found no ''"):
        Taps(tiny_unet(), {"all": ""}, where="recipe.taps")


def test_a_module_that_does_not_run_is_named() -> None:
    network = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    taps = Taps(network, {"a": "used", "b": "idle"}, where="test")
    with pytest.raises(ConfigError, match="taps b, found that the forward pass does not use"), taps:
        network["used"](torch.zeros(1, 2))


def test_an_error_in_the_forward_pass_is_not_replaced_and_takes_the_hooks_away() -> None:
    network = nn.ModuleDict({"used": nn.Linear(2, 2)})
    taps = Taps(network, {"a": "used"}, where="test")
    with pytest.raises(ZeroDivisionError), taps:
        raise ZeroDivisionError
    network["used"](torch.zeros(1, 2))
    assert not taps.features


def test_adapters_exist_where_widths_differ_and_are_the_same_on_every_rank() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    conv = adapter((16, 4, 4), (24, 4, 4), seed=1, where="x")
    linear = adapter((10, 16), (10, 24), seed=1, where="x")
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert isinstance(adapter((16, 4, 4), (16, 8, 8), seed=1, where="x"), nn.Identity)
    assert conv(torch.zeros(2, 16, 5, 5)).shape == (2, 24, 5, 5)
    assert linear(torch.zeros(2, 7, 16)).shape == (2, 7, 24)
    torch.manual_seed(6)
    again = adapter((16, 4, 4), (24, 4, 4), seed=1, where="x")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), conv.parameters(), strict=True))


def test_maps_and_tokens_are_not_matched() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.taps\.0: wanted features of one kind.*\[16, 4, 4\].*\[16, 16\]"):
        adapter((16, 4, 4), (16, 16), seed=0, where="recipe.taps.0")
