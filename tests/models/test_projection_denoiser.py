"""Denoisers projected from larger ones: identities, exact cases, changes of shape, and what is refused."""

import json

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tiny_denoisers import SCHEDULE, conditioning, save_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl, tiny_unet

from raydistill.config.models import StudentConfig
from raydistill.errors import ConfigError, DataError, SignalMismatch
from raydistill.models.denoiser import predict, shape_facts
from raydistill.models.projection.heads import map_heads
from raydistill.models.projection.kernels import Patch, fit_kernel, repatched
from raydistill.models.projection.transformer import transformer_structure
from raydistill.models.projection.unet import unet_structure
from raydistill.models.student import build_student, export_student, load_student, publish_student
from raydistill.storage import Store

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 3,
}
COG = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
}


def seeded(kind, seed=0, **settings):
    torch.manual_seed(seed)
    network = kind(**settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


def wan(seed=0, **changes):
    return seeded(WanTransformer3DModel, seed, **{**WAN, **changes})


def rows(number):
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(number, 4, 8, 8, generator=generator) for name in ("latents", "noise")}
    return [{**batch, "timestep": torch.arange(number) * 900 // number + 20, **conditioning(number)}]


def projected(folder, overrides=None, *, rows=rows, model=None, **init):
    teacher = {"library": "diffusers", "source": str(folder), "dtype": "float32"}
    student = {
        "model": {**(model or teacher), "overrides": overrides or {}},
        "init": {"kind": "projection", "teacher": teacher, "calibration_rows": 4} | init,
    }
    return build_student(StudentConfig.model_validate(student), seed=0, rows=rows)


def saved(network, tmp_path):
    is_unet = "UNet" in type(network).__name__
    schedule = DDPMScheduler(**SCHEDULE) if is_unet else FLOW
    return save_pipeline(network, tmp_path / "teacher", schedule, inside="unet" if is_unet else "transformer")


def said(network, number=4):
    batch = rows(number)[0]
    with torch.no_grad():
        return predict(network, batch["latents"], batch["timestep"].float(), batch)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def origins(student):
    return {t.name: t.origin for t in student.projection.tensors}


# --- every tensor has its place ---


@pytest.mark.parametrize(
    "network",
    [
        tiny_sdxl(),
        tiny_sdxl(block_out_channels=(8, 8), attention_head_dim=(2, 2)),
        tiny_unet(),
        tiny_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        wan(),
        seeded(CogVideoXTransformer3DModel, **COG),
        seeded(CogVideoXTransformer3DModel, **COG, use_rotary_positional_embeddings=True),
        tiny_pixart(),
        tiny_sd3(),
        tiny_sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    ],
    ids=lambda network: type(network).__name__,
)
def test_pieces_cover_every_number_once(network):
    structure = unet_structure(network) if "UNet" in type(network).__name__ else transformer_structure(network)
    assert structure.unmatched == ()
    assert structure.sizes
    for name, tensor in network.state_dict().items():
        counted = torch.zeros_like(tensor)
        for piece in structure.pieces.values():
            if piece.stored == name:
                counted[piece.index] += 1
                assert counted[piece.index].shape == piece.shape
        assert bool((counted == 1).all()), name


@pytest.mark.parametrize("teacher", [tiny_sdxl, wan, tiny_pixart, tiny_sd3], ids=["sdxl", "wan", "pixart", "sd3"])
@pytest.mark.parametrize("basis", ["importance", "pca"])
def test_equal_shape_is_the_teacher_bit_for_bit(teacher, basis, tmp_path):
    network = teacher()
    student = projected(saved(network, tmp_path), basis=basis, depth="importance")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    report = student.projection
    assert report.exact.parameters == sum(t.numel() for t in network.state_dict().values())
    assert (report.coverage, report.left_out) == (1.0, {})
    assert report.output_error == pytest.approx(0, abs=1e-10)
    assert max(block.error for block in report.blocks) < 1e-5


@pytest.mark.parametrize("rotary", [False, True])
def test_cogvideox_is_projected_with_and_without_images(rotary, tmp_path):
    settings = {**COG, "max_text_seq_length": 5, "use_rotary_positional_embeddings": rotary, "attention_head_dim": 16}
    network = seeded(CogVideoXTransformer3DModel, **settings)
    folder = saved(network, tmp_path)
    same = projected(folder)
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in network.state_dict().items())
    assert same.projection.output_error == 0.0
    smaller = {"num_attention_heads": 2, "num_layers": 1}
    for init in ({"calibration_rows": 0}, {"depth": "importance"}):
        report = projected(folder, smaller, **init).projection
        assert report.coverage == 1.0
        assert report.spaces["residual"] == "64 → 32, selected"


def test_captions_that_cogvideox_has_no_positions_for_are_said(tmp_path):
    folder = saved(seeded(CogVideoXTransformer3DModel, **COG), tmp_path)
    with pytest.raises(SignalMismatch, match=r"captions of 226 places, .* found 5; set max_tokens: 226"):
        projected(folder, {"num_layers": 1, "num_attention_heads": 2})


def test_wan_is_asked_about_an_image_as_one_frame():
    network, batch = wan(), rows(3)[0]
    time = batch["timestep"].float()
    with torch.no_grad():
        wanted = network(batch["latents"][:, :, None], time, batch["prompt_embeds"], return_dict=False)[0][:, :, 0]
    assert torch.equal(said(network, 3), wanted)
    assert shape_facts(network) == {"latent_channels": 4, "text_width": 16, "pooled_width": 0}


# --- exact cases ---


def test_groups_of_a_unet_that_are_silent_are_the_ones_that_go(tmp_path):
    settings = {"block_out_channels": (8, 8), "in_channels": 4, "out_channels": 4, "add_attention": False}
    teacher = tiny_unet(**settings)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.startswith("time_embedding"):
                parameter[16:] = 0
                if "linear_1.weight" in name:
                    parameter.zero_()  # the sinusoids of another number of frequencies are others
            elif "norm" in name and name.endswith("bias"):
                parameter.view(-1, 2, 4)[:, 1] = 0
            elif "norm" not in name and not name.startswith("conv_out"):
                parameter[4:] = 0
    folder = saved(teacher, tmp_path)
    overrides = {"block_out_channels": [4, 4], "norm_num_groups": 2}
    for calibration_rows in (0, 4):
        student = projected(folder, overrides, calibration_rows=calibration_rows)
        assert relative(said(student), said(teacher)) < 1e-6
    assert student.projection.coverage == 1.0


def test_blocks_that_do_nothing_are_the_ones_that_go_in_each_list_of_a_unet(tmp_path):
    teacher = tiny_sdxl()
    idle = {
        "down_blocks.1.attentions.0": 0, "down_blocks.1.attentions.1": 1, "mid_block.attentions.0": 0,
        "up_blocks.0.attentions.0": 1, "up_blocks.0.attentions.1": 0, "up_blocks.0.attentions.2": 1,
    }  # fmt: skip
    with torch.no_grad():
        for name, block in idle.items():
            module = teacher.get_submodule(f"{name}.transformer_blocks.{block}")
            for part in (module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]):
                part.weight.zero_()
                part.bias.zero_()
    student = projected(saved(teacher, tmp_path), {"transformer_layers_per_block": [1, 1]}, depth="importance")
    kept = {b.list.removesuffix(".transformer_blocks"): b.teacher for b in student.projection.blocks}
    assert kept == {name: 1 - block for name, block in idle.items()}
    assert relative(said(student), said(teacher)) < 1e-6


def test_a_unet_with_fewer_layers_keeps_the_first_and_of_up_blocks_also_the_last(tmp_path):
    teacher = tiny_sdxl()
    student = projected(saved(teacher, tmp_path), {"layers_per_block": 1})
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(ours["down_blocks.1.resnets.0.conv2.weight"], theirs["down_blocks.1.resnets.0.conv2.weight"])
    assert torch.equal(ours["up_blocks.0.resnets.1.conv2.weight"], theirs["up_blocks.0.resnets.2.conv2.weight"])
    assert student.projection.coverage == 1.0


def test_a_unet_of_fewer_stages_is_not_compared_where_it_sees_another_resolution(tmp_path):
    changes = {
        "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "transformer_layers_per_block": [1], "attention_head_dim": [2],
    }  # fmt: skip
    report = projected(saved(tiny_sdxl(), tmp_path), changes, min_coverage=0.1).projection
    assert {block.error for block in report.blocks} == {None}
    assert report.output_error > 0


def test_channels_of_a_unet_stay_in_the_group_of_their_norm(tmp_path):
    teacher = tiny_sdxl()
    student = projected(saved(teacher, tmp_path), {"block_out_channels": [4, 8], "attention_head_dim": [2, 4]})
    wide, narrow = teacher.conv_in.weight, student.conv_in.weight
    for channel in range(4):  # four groups of two channels of which one is kept
        assert any(torch.equal(narrow[channel], wide[2 * channel + i]) for i in (0, 1))
    assert student.projection.coverage == 1.0


def silent_channels(teacher):
    """Wan whose stream lives in the first twelve channels and has no mean there, and without a time embedding."""
    size, live = 24, 12
    onto = torch.zeros(size, size)
    onto[:live, :live] = torch.eye(live) - 1 / live
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.startswith("patch_embedding") or "to_out.0" in name or "ffn.net.2" in name:
                parameter.copy_(torch.tensordot(onto, parameter, dims=1))
            if "time_embedder.linear_2" in name:
                parameter.zero_()
            if "text_embedder" in name:
                parameter[live:] = 0
        gates = [teacher.condition_embedder.time_proj.bias.view(6, size)[i] for i in (2, 5)]
        for block in teacher.blocks:
            gates += [block.scale_shift_table[0, i] for i in (2, 5)]
        for gate in gates:
            gate.fill_(float(gate.mean()))  # another gate for each channel would bring a mean in
        shifts = [teacher.condition_embedder.time_proj.bias.view(6, size)[i] for i in (0, 3)]
        shifts += [block.scale_shift_table[0, i] for block in teacher.blocks for i in (0, 3)]
        for shift in (*shifts, *(block.norm2.bias for block in teacher.blocks), teacher.scale_shift_table[0, 0]):
            shift[live:] = 0
    return teacher


def test_a_wan_transformer_that_uses_some_channels_is_reproduced_by_selecting_them(tmp_path):
    teacher = silent_channels(wan(cross_attn_norm=True))
    # Heads keep their size and number only if the width does, so both halve; the silent half of the heads goes.
    with torch.no_grad():
        for block in teacher.blocks:
            for attention in (block.attn1, block.attn2):
                attention.to_out[0].weight[:, 12:] = 0
                for part in (attention.to_q, attention.to_k):  # their norm is over all heads together
                    part.weight[12:] = 0
                    part.bias[12:] = 0
    folder = saved(teacher, tmp_path)
    student = projected(folder, {"num_attention_heads": 1})
    assert relative(said(student), said(teacher)) < 1e-4
    assert student.projection.output_error < 1e-8
    silent = projected(folder, {"num_attention_heads": 1}, calibration_rows=0)
    assert relative(said(silent), said(teacher)) > 0.01  # without rows nobody knows what the norms see


def test_rotary_pairs_of_wan_stay_on_their_axis(tmp_path):
    teacher = wan(attention_head_dim=24, ffn_dim=16)
    structure = transformer_structure(teacher)
    student = transformer_structure(wan(attention_head_dim=12, ffn_dim=16))
    wide, narrow = structure.attentions["blocks.0.attn1"], student.attentions["blocks.0.attn1"]
    kept = map_heads(wide, narrow, torch.ones(48), None).one.index.tolist()
    axis_of = {p: axis for i, j, _, axis in wide.pairs for p in (i, j)}
    partner = {i: j for i, j, _, _ in wide.pairs}
    for i, j, _, axis in narrow.pairs:
        assert axis_of[kept[i]] == axis
        assert partner[kept[i]] == kept[j]


# --- changes of shape ---


def test_a_convolution_over_time_becomes_its_sum():
    weight = torch.randn(6, 4, 3, 2, 2)
    frame = torch.randn(5, 4, 8, 8)
    video = frame[:, :, None].expand(-1, -1, 3, -1, -1)
    wanted = torch.nn.functional.conv3d(video, weight, stride=(3, 2, 2))[:, :, 0]
    flat = fit_kernel(weight, (6, 4, 2, 2), num_mapped=2, temporal="sum")
    assert torch.allclose(torch.nn.functional.conv2d(frame, flat, stride=2), wanted, atol=1e-5)
    mean = fit_kernel(weight, (6, 4, 2, 2), num_mapped=2, temporal="mean")
    assert torch.allclose(mean, flat / 3)
    assert torch.equal(fit_kernel(weight, (6, 4, 2, 2), num_mapped=2, temporal="centre"), weight[:, :, 1])
    one = torch.randn(6, 4, 1, 2, 2)  # one frame is the same in every way, bit for bit
    for temporal in ("sum", "centre"):
        assert torch.equal(fit_kernel(one, (6, 4, 2, 2), num_mapped=2, temporal=temporal), one[:, :, 0])


def test_linear_layers_and_convolutions_of_one_pixel_are_the_same():
    weight = torch.randn(6, 4)
    kernel = fit_kernel(weight, (6, 4, 1, 1), num_mapped=2, temporal="sum")
    image = torch.randn(2, 4, 3, 3)
    wanted = torch.einsum("oi,bihw->bohw", weight, image)
    assert torch.allclose(torch.nn.functional.conv2d(image, kernel), wanted, atol=1e-6)
    assert torch.equal(fit_kernel(kernel, (6, 4), num_mapped=2, temporal="sum"), weight)


@pytest.mark.parametrize("size", [1, 4])
def test_patches_of_another_size_say_the_same_of_a_constant_image(size):
    weight = torch.randn(6, 4, 2, 2)
    resized = fit_kernel(weight, (6, 4, size, size), num_mapped=2, temporal="sum")
    assert torch.allclose(resized.sum((2, 3)), weight.sum((2, 3)), atol=1e-5)


def test_what_is_said_of_a_patch_is_put_into_another_order_and_size():
    image = torch.randn(5, 3, 2, 4)  # patches of 2 × 4 with 3 channels
    by_pixel, by_channel = image.permute(0, 2, 3, 1).flatten(1), image.flatten(1)
    moved = repatched(Patch(2, 4, 3), Patch(2, 4, 3, channels_first=True))
    assert torch.equal(by_pixel @ moved, by_channel)
    assert torch.equal(by_channel @ moved.T, by_pixel)
    small = torch.nn.functional.avg_pool2d(image, 2)
    moved = repatched(Patch(2, 4, 3, channels_first=True), Patch(1, 2, 3))
    assert torch.allclose(by_channel @ moved, small.permute(0, 2, 3, 1).flatten(1), atol=1e-6)
    assert repatched(Patch(2, 4, 3), Patch(2, 4, 6)) is None


def test_kernels_that_cannot_become_each_other_are_left_alone():
    assert fit_kernel(torch.randn(6, 4, 3, 3), (6, 4), num_mapped=2, temporal="sum") is None
    assert fit_kernel(torch.randn(6, 4), (6, 4, 3, 3), num_mapped=2, temporal="sum") is None


def test_unets_with_linear_and_convolutional_projections_start_from_each_other(tmp_path):
    teacher = tiny_sdxl(use_linear_projection=True)
    student = projected(saved(teacher, tmp_path), {"use_linear_projection": False})
    name = "down_blocks.1.attentions.0.proj_in.weight"
    assert student.state_dict()[name].shape == (16, 16, 1, 1)
    assert relative(said(student), said(teacher)) < 1e-6


def test_an_image_transformer_starts_from_a_video_transformer(tmp_path):
    teacher = wan(ffn_dim=48)
    folder = saved(teacher, tmp_path)
    settings = {"cross_attention_dim": 12, "attention_head_dim": 6, "num_attention_heads": 2, "out_channels": 4}
    image = tiny_pixart(**settings, num_layers=2, use_additional_conditions=False)
    pattern = save_pipeline(image, tmp_path / "pixart", FLOW, inside="transformer")
    student = projected(folder, model={"library": "diffusers", "source": str(pattern)}, min_coverage=0.5)
    report = student.projection
    states = origins(student)
    assert states["pos_embed.proj.weight"] == "projected"
    assert states["transformer_blocks.1.attn2.to_k.weight"] == "projected"
    assert states["transformer_blocks.0.scale_shift_table"] == "projected"
    assert states["caption_projection.linear_1.weight"] == "projected"
    # PixArt has 256 sinusoids of the timestep, Wan here 8.
    assert states["adaln_single.emb.timestep_embedder.linear_1.weight"] == "random"
    assert [b.teacher for b in report.blocks] == [0, 2]
    assert "attn1.norm_q.weight" in " ".join(report.left_out)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("a PixArtTransformer2DModel from a WanTransformer3DModel")
    assert sum(t.parameters for t in report.tensors) == sum(p.numel() for p in student.parameters())
    kept = teacher.patch_embedding.weight[:, :, 0].flatten(1)
    for channel in student.pos_embed.proj.weight.flatten(1):
        assert bool((kept == channel).all(1).any())


def test_other_patches_captions_and_timesteps_keep_what_means_the_same(tmp_path):
    teacher = wan(patch_size=(1, 2, 2), freq_dim=8)
    folder = saved(teacher, tmp_path)
    changes = {"patch_size": [1, 4, 4], "text_dim": 20, "freq_dim": 4}
    student = projected(folder, changes, calibration_rows=0, min_coverage=0.5)
    states = origins(student)
    changed = {
        "patch_embedding.weight": "projected",
        "condition_embedder.time_embedder.linear_1.weight": "projected",
        "condition_embedder.text_embedder.linear_1.weight": "random",  # another encoder's features mean something else
        "proj_out.weight": "projected",
        "proj_out.bias": "projected",
    }
    assert {name: state for name, state in states.items() if state != "exact"} == changed
    kernel = student.patch_embedding.weight
    assert torch.allclose(kernel.sum((3, 4)), teacher.patch_embedding.weight.sum((3, 4)), atol=1e-5)
    # Each pixel of the old patch is four of the new one: rows are height, width, channel.
    assert torch.equal(student.proj_out.weight.view(4, 4, 4, 24)[::2, 1::2], teacher.proj_out.weight.view(2, 2, 4, 24))
    assert torch.equal(student.proj_out.bias.view(4, 4, 4)[1::2, ::2], teacher.proj_out.bias.view(2, 2, 4))
    # Two of four wave lengths take up what the others said, each for its cosine and its sine.
    ours, theirs = (n.condition_embedder.time_embedder.linear_1.weight for n in (student, teacher))
    for half in range(2):
        given, taken = theirs[:, 4 * half : 4 * half + 4], ours[:, 2 * half : 2 * half + 2]
        assert torch.allclose(taken.sum(1), given.sum(1), atol=1e-6)


def test_a_teacher_in_one_file_gives_the_same_student_as_its_folder(tmp_path):
    folder = saved(wan(), tmp_path)
    overrides = {"num_attention_heads": 1, "num_layers": 2}
    wanted = projected(folder, overrides).state_dict()
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    scheduler = str(folder / "scheduler")
    teacher = {"library": "diffusers", "source": str(file), "dtype": "float32", "scheduler": scheduler}
    found = projected(folder, overrides, teacher=teacher).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


# --- the folder ---


def test_a_projected_denoiser_is_published_with_its_report(tmp_path):
    folder = saved(tiny_sdxl(), tmp_path)
    teacher = {"library": "diffusers", "source": str(folder), "dtype": "float32"}
    student = StudentConfig.model_validate(
        {
            "model": {**teacher, "overrides": {"transformer_layers_per_block": [1, 1]}},
            "init": {"kind": "projection", "teacher": teacher, "calibration_rows": 0},
        }
    )
    publish_student(student, seed=0, run=Store(tmp_path / "run"))
    report = json.loads((tmp_path / "run/init/projection.json").read_text())
    assert report["coverage"] == 1.0
    assert torch.equal(said(load_student(tmp_path / "run/init")), said(build_student(student, seed=0)))


def test_a_student_of_one_frame_trains_and_is_exported_for_diffusers(tmp_path):
    folder = saved(wan(), tmp_path)
    student = projected(folder, {"num_attention_heads": 1, "ffn_dim": 16, "num_layers": 2})
    batch = rows(4)[0]
    with torch.no_grad():
        wanted = predict(wan(), batch["latents"], batch["timestep"].float(), batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (predict(student, batch["latents"], batch["timestep"].float(), batch) - wanted).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert losses[-1] < 0.5 * losses[0]
    export_student(student, tmp_path / "export", dtype=torch.float32)
    again = WanTransformer3DModel.from_pretrained(tmp_path / "export", subfolder="transformer").eval()
    assert torch.equal(said(again), said(student.eval()))


# --- what is refused ---


@pytest.mark.parametrize("basis", ["pca", "weights"])
@pytest.mark.parametrize(
    ("teacher", "overrides", "why"),
    [
        (tiny_sdxl, {"block_out_channels": [4, 8]}, "group norms and residual convolutions work on single channels"),
        (wan, {"num_attention_heads": 1}, "adaptive norms scale and shift single channels"),
    ],
)
def test_rotations_are_refused_where_they_cannot_be(teacher, overrides, why, basis, tmp_path):
    with pytest.raises(ConfigError, match=rf"basis: {basis} rotates the residual stream.*{why}.*basis: importance"):
        projected(saved(teacher(), tmp_path), overrides, basis=basis)


def test_a_unet_from_a_transformer_shares_no_rule(tmp_path):
    folder = saved(wan(), tmp_path)
    pattern = save_pipeline(tiny_sdxl(), tmp_path / "unet")
    with pytest.raises(ConfigError, match="wanted a teacher and a student that share rules"):
        projected(folder, model={"library": "diffusers", "source": str(pattern)}, calibration_rows=0)


def test_a_family_without_rules_is_named(tmp_path):
    network = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=16,
        adaln_lora_dim=4, max_size=(4, 8, 8), concat_padding_mask=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"wanted a UNet, or .* CogVideoX, .* found CosmosTransformer3DModel"):
        projected(saved(network, tmp_path), {"num_layers": 1}, calibration_rows=0)


def test_a_teacher_that_predicts_something_else_is_noted(tmp_path):
    teacher = save_pipeline(tiny_sdxl(), tmp_path / "teacher", DDPMScheduler(**SCHEDULE))
    pattern = save_pipeline(tiny_sdxl(), tmp_path / "v", DDPMScheduler(**SCHEDULE, prediction_type="v_prediction"))
    report = projected(teacher, model={"library": "diffusers", "source": str(pattern)}).projection
    assert report.notes == (
        "the teacher predicts epsilon, the student v_prediction: its output head begins with weights that mean the "
        "other",
    )
    assert report.output_error is None


def test_low_coverage_names_what_is_missing_and_builds_nothing(tmp_path):
    folder = saved(tiny_sdxl(), tmp_path)
    overrides = {"cross_attention_dim": 24}
    with pytest.raises(ConfigError, match=r"wanted at least 95% .* found \d\d\.\d%; .*attn2.to_[kv].weight \(384\)"):
        projected(folder, overrides, rows=lambda n: [], calibration_rows=0, min_coverage=0.95)


def test_a_wider_or_deeper_student_is_refused(tmp_path):
    folder = saved(tiny_sdxl(), tmp_path)
    with pytest.raises(ConfigError, match="wanted at most 4 query heads, as many as the teacher has, found 8"):
        projected(folder, {"block_out_channels": [8, 32], "attention_head_dim": [2, 8]}, calibration_rows=0)
    with pytest.raises(ConfigError, match=r"wanted at most 2 down_blocks\.0\.resnets, .*found 3"):
        projected(folder, {"layers_per_block": 3}, calibration_rows=0)


def test_missing_misshapen_and_truncated_tensors_are_said(tmp_path):
    folder = saved(wan(), tmp_path)
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = "blocks.1.ffn.net.2.weight"
    save_file({n: t for n, t in state.items() if n != name}, path)
    with pytest.raises(DataError, match=rf"wanted {name} of shape \[24, 32\], found none \(1 are missing\)"):
        projected(folder, {"num_layers": 2})
    save_file({**state, name: torch.zeros(24, 31)}, path)
    with pytest.raises(DataError, match=rf"wanted {name} of shape \[24, 32\], found \[24, 31\]"):
        projected(folder, {"num_layers": 2})
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read .*diffusion_pytorch_model.safetensors as safetensors"):
        projected(folder, {"num_layers": 2})


def test_calibration_without_rows_is_said(tmp_path):
    with pytest.raises(ConfigError, match="wanted 4 rows of the inputs cache, found none at hand"):
        projected(saved(wan(), tmp_path), {"num_layers": 2}, rows=None)
