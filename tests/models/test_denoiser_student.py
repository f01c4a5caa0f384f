"""Denoisers as students: what they start from, what their folders hold, and what diffusers makes of an export."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tiny_denoisers import (
    POOLED_WIDTH,
    SCHEDULE,
    TEXT_WIDTH,
    conditioning,
    save_pipeline,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
)
from toys import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from raydistill.config.models import BlocksInit, CheckpointInit, DiffusersModel, RandomInit, StudentConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.denoiser import load_denoiser, predict, process_of
from raydistill.models.student import build_student, export_student, load_student, save_student

SMALLER = {"layers_per_block": 1}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type="v_prediction")
    return save_pipeline(tiny_sdxl(), tmp_path_factory.mktemp("pipeline"), scheduler)


def _student(source, *, init=None, overrides=None, **keys):
    model = DiffusersModel(library="diffusers", source=str(source), dtype="float32", overrides=overrides or {}, **keys)
    return StudentConfig(model=model, **({} if init is None else {"init": init}))


def _same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _prediction(network):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, network.config.in_channels, 8, 8, generator=generator)
    return predict(network, x, torch.tensor([5, 900]), conditioning(2))


# --- first weights


def test_pretrained_student_is_the_model_itself_with_its_schedule(pipeline):
    student = build_student(_student(pipeline), seed=0)
    assert _same_weights(student, tiny_sdxl())
    assert student.process.prediction_type == "v_prediction"
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert not student.training


def test_random_student_depends_on_the_seed_alone(pipeline):
    config = _student(pipeline, init=RandomInit(kind="random"), overrides=SMALLER)
    torch.manual_seed(1)
    one = build_student(config, seed=0)
    torch.manual_seed(2)
    assert _same_weights(build_student(config, seed=0), one)
    assert not _same_weights(build_student(config, seed=1), one)
    assert one.config.layers_per_block == 1


def test_random_student_needs_no_weights_but_a_scheduler(pipeline, tmp_path):
    (tmp_path / "config.json").write_text((pipeline / "unet" / "config.json").read_text())
    init = RandomInit(kind="random")
    with pytest.raises(ConfigError, match=r"wanted the configuration of its scheduler.*model\.scheduler"):
        build_student(_student(tmp_path, init=init), seed=0)
    student = build_student(_student(tmp_path, init=init, scheduler=str(pipeline)), seed=0)
    assert student.process.prediction_type == "v_prediction"


def test_overrides_that_make_no_network_are_named(pipeline):
    overrides = {"down_block_types": ["DownBlock2D"]}
    with pytest.raises(ConfigError, match=r"student\.model\.overrides: .*'down_block_types'.* make no UNet2DCondition"):
        build_student(_student(pipeline, init=RandomInit(kind="random"), overrides=overrides), seed=0)


@pytest.mark.parametrize("layout", ["student", "pipeline", "component", "file"])
def test_checkpoint_gives_other_weights_to_the_architecture(pipeline, tmp_path, layout):
    other = tiny_sdxl(seed=1)
    if layout == "student":
        source = save_pipeline(other, tmp_path / "source")
        save_student(build_student(_student(source), seed=0), tmp_path / "w")
    else:
        save_pipeline(other, tmp_path / "w")
    path = {"component": tmp_path / "w" / "unet", "file": tmp_path / "w.safetensors"}.get(layout, tmp_path / "w")
    if layout == "file":
        save_file(other.state_dict(), path)
    init = CheckpointInit(kind="checkpoint", path=str(path))
    student = build_student(_student(pipeline, init=init), seed=0)
    assert _same_weights(student, other)
    assert student.process.prediction_type == "v_prediction"  # that of student.model


def test_checkpoint_of_another_architecture_is_refused(pipeline, tmp_path):
    save_pipeline(tiny_sdxl(layers_per_block=1), tmp_path / "other")
    init = CheckpointInit(kind="checkpoint", path=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"other settings .*layers_per_block \(wanted 2, found 1\)"):
        build_student(_student(pipeline, init=init), seed=0)
    save_file({"conv_in.bias": torch.zeros(8)}, tmp_path / "one.safetensors")
    init = CheckpointInit(kind="checkpoint", path=str(tmp_path / "one.safetensors"))
    with pytest.raises(ConfigError, match=r"missing: conv_in\.weight.* student\.model\.source is "):
        build_student(_student(pipeline, init=init), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"wanted weights \(model\.safetensors or diffusion_pytorch_model"):
        build_student(_student(pipeline, init=CheckpointInit(kind="checkpoint", path=str(tmp_path / "empty"))), seed=0)


# --- blocks


def _blocks(pipeline, **overrides):
    return build_student(_student(pipeline, init=BlocksInit(kind="blocks"), overrides=overrides), seed=0)


def test_removing_nothing_is_the_identity(pipeline):
    student = _blocks(pipeline, layers_per_block=2)
    assert _same_weights(student, tiny_sdxl())
    assert torch.equal(_prediction(student), _prediction(tiny_sdxl()))
    assert student.kept["new"] == []


def test_fewer_layers_keep_the_first_and_of_up_blocks_the_last_too(pipeline, capsys):
    student, larger = _blocks(pipeline, layers_per_block=1), tiny_sdxl().state_dict()
    moved = {
        "down_blocks.0.resnets.0": "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0": "down_blocks.1.attentions.0",
        "up_blocks.0.resnets.0": "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.1": "up_blocks.0.resnets.2",
        "up_blocks.0.attentions.1": "up_blocks.0.attentions.2",
        "up_blocks.1.resnets.1": "up_blocks.1.resnets.2",
        "mid_block.attentions.0": "mid_block.attentions.0",
        "add_embedding.linear_1": "add_embedding.linear_1",
    }
    state = student.state_dict()
    for here, there in moved.items():
        names = [name for name in state if name.startswith(f"{here}.")]
        assert names
        for name in names:
            assert torch.equal(state[name], larger[there + name.removeprefix(here)]), name
    assert student.kept["new"] == []
    assert student.kept["parameters"] == sum(p.numel() for p in student.parameters())
    assert f"those of the model with {sum(t.numel() for t in larger.values()):,}" in capsys.readouterr().out
    assert student.config.layers_per_block == 1


def test_no_middle_and_fewer_transformer_layers(pipeline):
    student, larger = _blocks(pipeline, mid_block_type=None, transformer_layers_per_block=[1, 1]), tiny_sdxl()
    assert student.mid_block is None
    assert student.kept["new"] == []
    assert all(torch.equal(tensor, larger.state_dict()[name]) for name, tensor in student.state_dict().items())
    assert _prediction(student).isfinite().all()


def test_fewer_stages_lose_the_innermost_one(tmp_path):
    three = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 2, 2),
        "norm_num_groups": 4,
    }
    larger = tiny_sdxl(**three)
    save_pipeline(larger, tmp_path)
    student = _blocks(
        tmp_path,
        **{
            key: list(value)[1:] if key == "up_block_types" else list(value)[:2]
            for key, value in three.items()
            if key != "norm_num_groups"
        },
    )
    state, there = student.state_dict(), larger.state_dict()
    assert torch.equal(state["up_blocks.0.resnets.1.conv1.weight"], there["up_blocks.1.resnets.1.conv1.weight"])
    assert torch.equal(state["up_blocks.1.resnets.2.conv1.weight"], there["up_blocks.2.resnets.2.conv1.weight"])
    assert torch.equal(state["down_blocks.1.attentions.1.norm.weight"], there["down_blocks.1.attentions.1.norm.weight"])
    assert student.kept["new"] == []
    assert _prediction(student).isfinite().all()


def test_tensors_that_fit_nowhere_are_listed_and_seeded(tmp_path):
    save_pipeline(tiny_sdxl(), tmp_path)
    config = _student(tmp_path, init=BlocksInit(kind="blocks"), overrides={"conv_in_kernel": 5})
    one, same, other = (build_student(config, seed=seed) for seed in (0, 0, 1))
    assert one.kept["new"] == ["conv_in.weight"]
    assert _same_weights(one, same)
    changed = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])]
    assert changed == ["conv_in.weight"]


def test_widths_are_not_pruned_by_leaving_out_blocks(pipeline):
    with pytest.raises(ConfigError, match=r"Change numbers of blocks and layers, not widths"):
        _blocks(pipeline, block_out_channels=[4, 8])


def test_more_layers_than_there_are_cannot_be_kept(pipeline):
    with pytest.raises(ConfigError, match=r"wanted at most 2 down_blocks\.0\.resnets, .* found 3"):
        _blocks(pipeline, layers_per_block=3)


def test_transformer_keeps_blocks_with_both_ends(tmp_path):
    save_pipeline(tiny_sd3(), tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0), inside="transformer")
    student, larger = _blocks(tmp_path, num_layers=2), tiny_sd3().state_dict()
    state = student.state_dict()
    for name in (n for n in state if n.startswith("transformer_blocks.1.")):
        assert torch.equal(state[name], larger[name.replace("blocks.1.", "blocks.3.")])
    assert student.kept["new"] == []
    assert student.process.kind == "flow"


# --- folders


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_unet, tiny_sd3, tiny_pixart], ids=lambda make: make.__name__)
def test_a_saved_student_comes_back_bit_for_bit(tmp_path, make):
    network = make()
    inside = "transformer" if "Transformer" in type(network).__name__ else "unet"
    source = save_pipeline(network, tmp_path / "source", inside=inside)
    student = build_student(_student(source), seed=0)
    save_student(student, tmp_path / "init")
    assert {p.name for p in (tmp_path / "init").iterdir()} == {
        "config.json", "scheduler_config.json", "model.safetensors", "student.json",
    }  # fmt: skip
    again = load_student(tmp_path / "init")
    assert _same_weights(again, student)
    assert torch.equal(_prediction(again), _prediction(network))
    assert again.process.differs(process_of(_student(source).model)) is None
    assert json.loads((tmp_path / "init" / "student.json").read_text())["kind"] == "denoiser"
    assert str(tmp_path) not in (tmp_path / "init" / "config.json").read_text()


def test_pruned_config_is_true(pipeline, tmp_path):
    save_student(_blocks(pipeline, layers_per_block=1, mid_block_type=None), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["layers_per_block"], config["mid_block_type"]) == (1, None)
    fresh = UNet2DConditionModel.from_config(config)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert json.loads((tmp_path / "student.json").read_text())["kept"]["new"] == []


def test_other_weights_in_the_same_folder(pipeline, tmp_path):
    save_student(build_student(_student(pipeline), seed=0), tmp_path / "init")
    other = tiny_sdxl(seed=3)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    loaded = load_student(tmp_path / "init", weights=tmp_path / "w.safetensors", dtype=torch.bfloat16)
    assert _same_weights(loaded, other.bfloat16())
    state = other.state_dict()
    state["conv_in.extra"] = state.pop("conv_in.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"1 missing: conv_in\.bias; 1 unexpected: conv_in\.extra"):
        load_student(tmp_path / "init", weights=tmp_path / "w.safetensors")


def test_network_changed_behind_its_configuration_is_not_saved(pipeline, tmp_path):
    student = build_student(_student(pipeline), seed=0)
    del student.down_blocks[0].resnets[1]
    with pytest.raises(DataError, match="configuration does not describe it"):
        save_student(student, tmp_path)


# --- training


def test_gradient_checkpointing_changes_no_gradient(pipeline):
    gradients = []
    for recompute in (False, True):
        student = build_student(_student(pipeline), seed=0).train()
        if recompute:
            student.enable_gradient_checkpointing()
            assert student.is_gradient_checkpointing
        _prediction(student).square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


# --- export


def test_export_is_a_part_of_a_pipeline(pipeline, tmp_path):
    student = _blocks(pipeline, layers_per_block=1)
    export_student(student, tmp_path, dtype=torch.float16)
    wanted = {name: tensor.half() for name, tensor in student.state_dict().items()}
    for unet in (
        UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", dtype=torch.float16),
        UNet2DConditionModel.from_pretrained(tmp_path / "unet", dtype=torch.float16),
        load_denoiser(DiffusersModel(library="diffusers", source=str(tmp_path), dtype="float16")),
    ):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet.state_dict().items())
        assert unet.config.layers_per_block == 1
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.prediction_type == "v_prediction"
    for place in (tmp_path, tmp_path / "unet"):
        section = DiffusersModel(library="diffusers", source=str(place))
        assert process_of(section).prediction_type == "v_prediction"


def test_transformers_are_exported_into_their_own_folder(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    source = save_pipeline(tiny_sd3(), tmp_path / "source", scheduler, inside="transformer")
    export_student(build_student(_student(source), seed=0), tmp_path / "export", dtype=torch.float32)
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "export", subfolder="transformer")
    assert _same_weights(again, tiny_sd3())
    assert process_of(DiffusersModel(library="diffusers", source=str(tmp_path / "export"))).kind == "flow"


def test_export_drops_into_an_sdxl_pipeline(tmp_path):
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": POOLED_WIDTH, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": POOLED_WIDTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    assert TEXT_WIDTH == 2 * POOLED_WIDTH  # the two encoders side by side
    tokenizer.model_max_length = 16
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_sdxl(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )  # fmt: skip
    save_pipeline(tiny_sdxl(), tmp_path / "source", EulerDiscreteScheduler(**SCHEDULE))
    export_student(_blocks(tmp_path / "source", layers_per_block=1), tmp_path / "export", dtype=torch.float32)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "export", subfolder="unet")
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "export", subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2, height=16, width=16, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
