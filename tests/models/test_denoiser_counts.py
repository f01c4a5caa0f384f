"""Counting denoisers: exact on a convolution by hand, and the known size of SDXL."""

import pytest
import torch
from test_denoiser import SDXL_BASE
from tiny_denoisers import save_pipeline, tiny_sdxl, tiny_unet

from raydistill.config.models import BlocksInit, DiffusersModel, StudentConfig
from raydistill.models.denoiser import blank_network
from raydistill.models.denoiser_counts import count_denoiser, empty_denoiser_student
from raydistill.models.student import build_student


def _by_hand(network, side):
    """FLOP of convolutions and linear layers from the shapes that pass through them."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        positions = output.shape[-1] * output.shape[-2] if output.ndim == 4 else output.numel() // output.shape[-1]
        total += 2 * module.weight.numel() * positions

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side), torch.zeros(1))
    return total


@pytest.mark.parametrize("side", [8, 16])
def test_flops_of_a_network_without_attention_are_those_of_its_matrices(side):
    network = tiny_unet(add_attention=False)
    counts = count_denoiser(torch.nn.Module.to(tiny_unet(add_attention=False), "meta"), latents=(side, side))
    assert counts.forward == _by_hand(network, side)
    assert counts.parameters == sum(p.numel() for p in network.parameters())
    assert counts.training(recompute=True) == 4 * counts.forward


def test_frozen_parameters_are_not_trained():
    network = torch.nn.Module.to(tiny_unet(), "meta")
    network.conv_in.requires_grad_(False)
    counts = count_denoiser(network)
    assert counts.parameters - counts.trained_parameters == network.conv_in.weight.numel() + 8


def test_text_costs_what_is_attended_to():
    network = torch.nn.Module.to(tiny_sdxl(), "meta")
    one, two, three = (count_denoiser(network, tokens=tokens).forward for tokens in (10, 20, 30))
    assert 0 < two - one == three - two


def test_sdxl_at_its_size():
    network = blank_network(SDXL_BASE, source="sdxl")
    counts = count_denoiser(torch.nn.Module.to(network, "meta"), latents=(128, 128), tokens=77)
    assert counts.parameters == 2_567_463_684
    assert counts.forward == pytest.approx(6.76e12, rel=0.01)  # 2.98 T multiply-adds of matrices, 0.4 of attention


def test_empty_student_has_the_shapes_of_the_built_one(tmp_path):
    save_pipeline(tiny_sdxl(), tmp_path)
    model = DiffusersModel(library="diffusers", source=str(tmp_path), overrides={"layers_per_block": 1})
    student = StudentConfig(model=model, init=BlocksInit(kind="blocks"))
    empty, built = empty_denoiser_student(student), build_student(student, seed=0)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
