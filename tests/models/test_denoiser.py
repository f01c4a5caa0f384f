"""Denoisers: loading every layout, what they predict against diffusers' own call, and shapes without weights."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny_denoisers import (
    POOLED_WIDTH,
    SCHEDULE,
    TEXT_WIDTH,
    conditioning,
    original_names,
    save_pipeline,
    save_scheduler,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
)

from raydistill.config.models import DiffusersModel
from raydistill.errors import ConfigError, DataError, SignalMismatch
from raydistill.models import hub
from raydistill.models.denoiser import (
    SCHEDULER,
    denoiser_config,
    denoiser_identity,
    empty_denoiser,
    load_denoiser,
    predict,
    process_of,
    shape_facts,
    shapes_of,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _section(source, **keys):
    return DiffusersModel(library="diffusers", source=str(source), dtype="float32", **keys)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tiny_sdxl(), tmp_path_factory.mktemp("pipeline"))


def _same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- loading


@pytest.mark.parametrize(
    "keys",
    [{}, {"subfolder": "unet"}, {"source": "unet"}, {"source": f"unet/{WEIGHTS}"}],
    ids=["pipeline", "subfolder", "component", "single file"],
)
def test_every_layout_gives_the_same_network(pipeline, keys):
    section = _section(pipeline / keys.pop("source", ""), scheduler=str(pipeline / "scheduler"), **keys)
    network = load_denoiser(section)
    assert _same_weights(network, tiny_sdxl())
    assert not network.training
    assert process_of(section).prediction_type == "epsilon"


def test_transformers_are_found_in_their_folder(tmp_path):
    save_pipeline(tiny_sd3(), tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0), inside="transformer")
    assert _same_weights(load_denoiser(_section(tmp_path)), tiny_sd3())
    assert process_of(_section(tmp_path)).kind == "flow"


@pytest.mark.parametrize("lacking", [None, "model.diffusion_model.out.2.weight"], ids=["whole", "damaged"])
def test_fine_tuned_checkpoint_in_one_file_has_other_names_and_the_same_weights(pipeline, tmp_path, lacking):
    state = {**original_names(tiny_sdxl()), "first_stage_model.decoder.conv_in.weight": torch.zeros(2)}
    state.pop(lacking, None)
    save_file(state, tmp_path / "fine-tuned.safetensors")
    shutil.copy(pipeline / "unet" / "config.json", tmp_path)
    section = _section(tmp_path / "fine-tuned.safetensors")
    if lacking is not None:
        with pytest.raises(DataError, match=r"wanted the tensors of UNet2DConditionModel|cannot be loaded"):
            load_denoiser(section)
        return
    network = load_denoiser(section)
    assert _same_weights(network, tiny_sdxl())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_whole_checkpoint_of_a_model_family_is_told_what_it_lacks(tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "sd.safetensors")
    with pytest.raises(DataError, match=r"wanted the config\.json of its denoiser .* found none"):
        load_denoiser(_section(tmp_path / "sd.safetensors"))


def test_old_name_of_pixart_is_understood(tmp_path):
    save_pipeline(tiny_pixart(), tmp_path, inside="transformer")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}))
    assert type(load_denoiser(_section(tmp_path))).__name__ == "PixArtTransformer2DModel"


def test_number_format_is_that_of_the_section(pipeline):
    section = DiffusersModel(library="diffusers", source=str(pipeline))
    assert {p.dtype for p in load_denoiser(section).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_denoiser(section, dtype=torch.float16).parameters()} == {torch.float16}


def test_pickled_weights_are_not_read(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "p")
    state = load_file(tmp_path / "p" / "unet" / WEIGHTS)
    (tmp_path / "p" / "unet" / WEIGHTS).unlink()
    torch.save(state, tmp_path / "p" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match=r"wanted weights \(diffusion_pytorch_model\*\.safetensors\)"):
        load_denoiser(_section(tmp_path / "p"))


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_weights_that_do_not_fill_the_network_are_refused(pipeline, tmp_path, single):
    shutil.copytree(pipeline, tmp_path / "p")
    state = load_file(tmp_path / "p" / "unet" / WEIGHTS)
    del state["conv_in.weight"]
    save_file(state, tmp_path / "p" / "unet" / WEIGHTS)
    with pytest.raises(DataError, match=r"UNet2DConditionModel.* found .*1 missing: conv_in\.weight"):
        load_denoiser(_section(tmp_path / "p" / "unet" / WEIGHTS if single else tmp_path / "p"))


def test_config_that_was_left_behind_by_pruning_is_refused(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "p")
    path = tmp_path / "p" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 1}))
    with pytest.raises(
        DataError, match=r"unexpected: .*Use the weights and the config\.json of one|size mismatch|shape"
    ):
        load_denoiser(_section(tmp_path / "p"))


def test_overrides_do_not_go_with_pretrained_weights(pipeline):
    with pytest.raises(ConfigError, match=r"init\.kind: random or blocks"):
        load_denoiser(_section(pipeline, overrides={"layers_per_block": 1}))


def test_class_that_cannot_be_asked_is_named_with_those_that_can(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel, .*PixArt.*found LTXVideoTransformer3DModel"):
        load_denoiser(_section(tmp_path))


def test_network_with_a_condition_that_we_lack_is_refused(tmp_path):
    save_pipeline(tiny_unet(num_class_embeds=10), tmp_path)
    with pytest.raises(ConfigError, match=r"num_class_embeds: null, found 10"):
        load_denoiser(_section(tmp_path))


def test_folder_without_a_model_is_told_so(tmp_path):
    with pytest.raises(DataError, match=r"wanted a config\.json in .*, found nothing"):
        load_denoiser(_section(tmp_path))


def test_of_a_hub_pipeline_only_the_denoiser_and_its_scheduler_are_fetched(pipeline, tmp_path, monkeypatch):
    names = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "unet/config.json"]
    names += [f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"]
    names += ["scheduler/scheduler_config.json"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    fetched = set()

    def snapshot(repo, *, revision, allow_patterns):
        for name in set(allow_patterns) - {"model_index.json"}:
            fetched.add(name)
            (tmp_path / "abc" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pipeline / name, tmp_path / "abc" / name)
        return str(tmp_path / "abc")

    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    section = _section("team/fine-tuned")
    assert process_of(section).prediction_type == "epsilon"
    identity = denoiser_identity(section)
    assert f"unet/{WEIGHTS}" not in fetched  # a fingerprint costs no download
    assert (identity["hub"], identity["commit"], identity["subfolder"]) == ("team/fine-tuned", "abc", "unet")
    assert _same_weights(load_denoiser(section), tiny_sdxl())
    assert fetched == {"unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"}


# --- scheduler


def test_missing_scheduler_is_asked_for(pipeline, tmp_path):
    shutil.copytree(pipeline / "unet", tmp_path / "unet")
    with pytest.raises(ConfigError, match=r"wanted the configuration of its scheduler.*model\.scheduler"):
        process_of(_section(tmp_path / "unet"))


def test_scheduler_beside_the_weights_counts(pipeline, tmp_path):
    shutil.copytree(pipeline / "unet", tmp_path / "unet")
    save_scheduler(DDPMScheduler(**SCHEDULE, prediction_type="v_prediction"), tmp_path / "unet")
    assert process_of(_section(tmp_path / "unet")).prediction_type == "v_prediction"
    assert process_of(_section(tmp_path / "unet" / WEIGHTS)).prediction_type == "v_prediction"


@pytest.mark.parametrize("place", ["", "scheduler", "scheduler/scheduler_config.json"])
def test_named_scheduler_wins(pipeline, tmp_path, place):
    save_scheduler(EulerDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction"), tmp_path / "scheduler")
    process = process_of(_section(pipeline, scheduler=str(tmp_path / place)))
    assert process.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("file", "read", "text", "words"),
    [
        (f"scheduler/{SCHEDULER}", process_of, "[1]", rf"wanted a map of settings in .*{SCHEDULER}, found \[1\]"),
        (f"scheduler/{SCHEDULER}", process_of, "{nope", "is no JSON"),
        ("unet/config.json", empty_denoiser, "3", r"wanted a map of settings in .*config.json, found 3"),
        (
            "unet/config.json",
            empty_denoiser,
            '{"_class_name": "UNet2DConditionModel", "cross_attention_dim": "x"}',
            "cannot be loaded: ",
        ),
    ],
)
def test_settings_that_are_none_are_a_fault_of_their_file(pipeline, tmp_path, file, read, text, words):
    shutil.copytree(pipeline, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(DataError, match=words):
        read(_section(tmp_path / "model"))


def test_what_a_scheduler_config_leaves_out_is_its_class_default(pipeline, tmp_path):
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler", "num_train_timesteps": 500}')
    process = process_of(_section(pipeline, scheduler=str(tmp_path)))
    assert process.num_timesteps == 500
    assert torch.allclose(process.alphas.float() ** 2, DDPMScheduler(num_train_timesteps=500).alphas_cumprod, atol=1e-6)


# --- identity


def test_identity_follows_weights_schedule_and_dtype_but_not_the_place(pipeline, tmp_path):
    wanted = denoiser_identity(_section(pipeline))
    shutil.copytree(pipeline, tmp_path / "moved")
    assert denoiser_identity(_section(tmp_path / "moved")) == wanted
    assert denoiser_identity(DiffusersModel(library="diffusers", source=str(pipeline))) != wanted
    save_scheduler(DDPMScheduler(**SCHEDULE, prediction_type="v_prediction"), tmp_path / "moved" / "scheduler")
    assert denoiser_identity(_section(tmp_path / "moved")) != wanted
    save_pipeline(tiny_sdxl(seed=1), tmp_path / "other")
    assert denoiser_identity(_section(tmp_path / "other")) != wanted


# --- shapes


def test_size_of_the_real_sdxl_is_known_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SDXL_BASE))
    network = empty_denoiser(_section(tmp_path))
    assert sum(p.numel() for p in network.parameters()) == 2_567_463_684
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {"meta"}
    shapes = shapes_of(network)
    assert (shapes.latent_channels, shapes.text_width, shapes.pooled_width, shapes.multiple) == (4, 2048, 1280, 4)


def test_shapes_of_the_families():
    text = {"latent_channels": 4, "text_width": TEXT_WIDTH}
    assert shape_facts(tiny_sdxl()) == text | {"pooled_width": POOLED_WIDTH}
    assert shape_facts(tiny_sd3()) == text | {"pooled_width": POOLED_WIDTH}
    assert shape_facts(tiny_pixart()) == text | {"pooled_width": 0}
    assert shape_facts(tiny_unet()) == {"latent_channels": 3, "text_width": 0, "pooled_width": 0}


def test_unknown_override_is_met_with_the_nearest_key(pipeline):
    with pytest.raises(ConfigError, match=r"overrides\.layer_per_block: .* did you mean layers_per_block\?"):
        denoiser_config(_section(pipeline, overrides={"layer_per_block": 1}))


# --- predictions


def test_sdxl_is_asked_as_diffusers_pipelines_ask_it():
    network, given, x, t = tiny_sdxl(), conditioning(3), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    wanted = network(x, t, given["prompt_embeds"], added_cond_kwargs=added).sample
    assert torch.equal(predict(network, x, t, given), wanted)
    turned = given | {"time_ids": given["time_ids"][:, [1, 0, 3, 2, 5, 4]]}
    assert not torch.allclose(predict(network, x, t, turned), wanted)


def test_size_conditioning_keeps_its_precision_beside_half_weights():
    network, given = tiny_sdxl().bfloat16(), conditioning(1)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    one, other = (given | {"time_ids": torch.full((1, 6), size)} for size in (1023.0, 1024.0))
    assert predict(network, x, t, one).dtype == torch.float32
    assert not torch.equal(predict(network, x, t, one), predict(network, x, t, other))


@pytest.mark.parametrize("make", [tiny_sd3, tiny_pixart, tiny_unet], ids=lambda make: make.__name__)
def test_each_sample_gets_its_own_timestep_and_text(make):
    network, given = make(), conditioning(3)
    x, t = torch.randn(3, shapes_of(network).latent_channels, 8, 8), torch.tensor([0, 500, 999])
    together = predict(network, x, t, given)
    assert together.shape == x.shape
    for i in range(3):
        alone = predict(network, x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in given.items()})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(network, x, t.flip(0), given)[0], together[0])
    if shapes_of(network).text_width:
        other = given | {"prompt_embeds": given["prompt_embeds"] + 1}
        assert not torch.allclose(predict(network, x, t, other), together)


def test_learned_variance_is_cut_off():
    network, given, x, t = tiny_pixart(), conditioning(2), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    sizes = given["time_ids"]
    added = {"resolution": sizes[:, :2], "aspect_ratio": (sizes[:, 4] / sizes[:, 5])[:, None]}
    whole = network(x, given["prompt_embeds"], t, added_cond_kwargs=added).sample
    assert whole.shape[1] == 8
    assert torch.equal(predict(network, x, t, given), whole.chunk(2, 1)[0])


def test_pixart_does_not_look_at_padded_places():
    network, given, x, t = tiny_pixart(), conditioning(2), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    text = given["prompt_embeds"]
    padded = given | {"prompt_embeds": torch.cat([text, torch.zeros_like(text)], dim=1)}
    torch.testing.assert_close(predict(network, x, t, padded), predict(network, x, t, given))


def test_text_that_is_missing_is_named():
    given = conditioning(1)
    del given["pooled"]
    with pytest.raises(SignalMismatch, match="UNet2DConditionModel wants pooled, found prompt_embeds, time_ids"):
        predict(tiny_sdxl(), torch.randn(1, 4, 8, 8), torch.tensor([1]), given)


def test_any_other_module_is_refused():
    with pytest.raises(ConfigError, match="found Linear"):
        predict(torch.nn.Linear(2, 2), torch.randn(1, 4, 8, 8), torch.tensor([1]), {})


SDXL_BASE = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
"""Podell et al. 2023, arXiv 2307.01952, Tab. 1: 2.6 B parameters."""
