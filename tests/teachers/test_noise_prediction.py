"""The denoising teacher: what it keeps is what diffusers would say, in the common kind, guided as the formula says."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_denoisers import (
    SCHEDULE,
    conditioning,
    save_pipeline,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
)

from raydistill.config.models import DiffusersModel
from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher
from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.denoiser import process_of_scheduler
from raydistill.signals import check_batch
from raydistill.teachers import build_teacher
from raydistill.teachers.noise_prediction import NoisePrediction

MODEL = DiffusersModel(library="diffusers", source="none")
KINDS = ("epsilon", "v_prediction", "sample", "flow")


def _section(**keys):
    return NoisePredictionTeacher(signal="noise_prediction", name="t", model=keys.pop("model", MODEL), **keys)


def _process(kind="epsilon", **settings) -> Process:
    scheduler = DDPMScheduler(**SCHEDULE, **settings)
    return process_of_scheduler(dict(scheduler.config) | {"_class_name": "DDPMScheduler", "prediction_type": kind})


def _teacher(network=None, *, own="epsilon", common="epsilon", **keys):
    network = tiny_sdxl() if network is None else network
    return NoisePrediction(_section(**keys), network, _process(own), NoiseConfig(prediction_type=common))


def _batch(samples=3, channels=4, *, side=8):
    generator = torch.Generator().manual_seed(1)
    text, empty = conditioning(samples), conditioning(1, seed=9)
    return {
        "latents": torch.randn(samples, channels, side, side, generator=generator),
        "noise": torch.randn(samples, channels, side, side, generator=generator),
        "timestep": torch.tensor([3, 500, 998])[:samples],
        **text,
        "empty_embeds": empty["prompt_embeds"].expand(samples, -1, -1),
        "empty_pooled": empty["pooled"].expand(samples, -1),
    }


def _said(network, batch, text=None):
    """What diffusers says, called by hand."""
    x_t = DDPMScheduler(**SCHEDULE).add_noise(batch["latents"], batch["noise"], batch["timestep"])
    embeds, pooled = (batch["prompt_embeds"], batch["pooled"]) if text is None else text
    added = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
    with torch.no_grad():
        return network(x_t, batch["timestep"], embeds, added_cond_kwargs=added).sample, x_t


def test_prediction_is_that_of_diffusers_at_the_noised_latents():
    teacher, batch = _teacher(), _batch()
    signal = teacher(batch)
    torch.testing.assert_close(signal["prediction"], _said(tiny_sdxl(), batch)[0], rtol=1e-4, atol=1e-4)
    check_batch(signal, teacher.schema, where="here")


@pytest.mark.parametrize("own", KINDS)
def test_own_kind_is_turned_into_the_common_one(own):
    batch = _batch()
    said, x_t = _said(tiny_sdxl(), batch)
    signal = _teacher(own=own, common="v_prediction")(batch)
    bar = DDPMScheduler(**SCHEDULE).alphas_cumprod[batch["timestep"]].double()[:, None, None, None]
    alpha, sigma, said, x_t = bar.sqrt(), (1 - bar).sqrt(), said.double(), x_t.double()
    velocity = {
        "epsilon": (said - sigma * x_t) / alpha,
        "v_prediction": said,
        "sample": (alpha * x_t - said) / sigma,
        "flow": alpha * (x_t + alpha * said) / (alpha + sigma) - sigma * (x_t - sigma * said) / (alpha + sigma),
    }[own]
    torch.testing.assert_close(signal["prediction"].double(), velocity, rtol=1e-3, atol=1e-3)


def test_guidance_follows_its_formula():
    batch = _batch()
    cond = _said(tiny_sdxl(), batch)[0]
    uncond = _said(tiny_sdxl(), batch, (batch["empty_embeds"], batch["empty_pooled"]))[0]
    for scale in (0.0, 3.0):
        signal = _teacher(guidance_scale=scale)(batch)
        torch.testing.assert_close(signal["prediction"], uncond + scale * (cond - uncond), rtol=1e-3, atol=1e-3)
    assert torch.equal(_teacher(guidance_scale=1.0)(batch)["prediction"], _teacher()(batch)["prediction"])


def test_guidance_is_the_same_in_whatever_kind_it_is_stored():
    batch, process = _batch(), _process("v_prediction")
    kept = _teacher(own="v_prediction", common="v_prediction", guidance_scale=4.0)(batch)["prediction"]
    x_t = process.noisy(batch["latents"], batch["noise"], batch["timestep"])
    epsilon = process.convert(kept, x_t, batch["timestep"], source="v_prediction", target="epsilon")
    stored = _teacher(own="v_prediction", common="epsilon", guidance_scale=4.0)(batch)["prediction"]
    torch.testing.assert_close(stored, epsilon, rtol=1e-4, atol=1e-4)


def test_guidance_without_text_is_refused():
    batch = {key: value for key, value in _batch().items() if not key.startswith("empty")}
    with pytest.raises(ConfigError, match=r"guidance_scale 3: .*remove teachers"):
        _teacher(guidance_scale=3.0)(batch)


def test_taps_keep_what_modules_put_out_in_the_conditional_pass():
    taps = {"mid": "mid_block", "tokens": "mid_block.attentions.0.transformer_blocks.0", "time": "time_embedding"}
    batch, network, seen = _batch(), tiny_sdxl(), {}
    for name, path in taps.items():
        network.get_submodule(path).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    _said(network, batch)
    wanted = dict(seen)
    teacher = _teacher(taps=taps, guidance_scale=2.0)
    signal = teacher(batch)
    for name in taps:
        torch.testing.assert_close(signal[f"tap.{name}"], wanted[name], rtol=1e-3, atol=1e-3)
    check_batch(signal, teacher.schema, where="here")
    assert teacher.schema["tap.mid"].dims == ("mid.channel", "mid.height", "mid.width")
    facts = teacher.facts["taps"]
    assert facts["mid"] == {"module": "mid_block", "shape": [16, 4, 4]}
    assert [len(facts[name]["shape"]) for name in ("tokens", "time")] == [2, 1]
    assert facts["mid"]["shape"] == list(signal["tap.mid"].shape[1:])


def test_tap_of_a_module_that_is_none_names_those_nearby():
    with pytest.raises(ConfigError, match=r"teachers\.t, tap 'm': .*no 'mid_blok'.*mid_block"):
        _teacher(taps={"m": "mid_blok"})


def test_facts_say_what_a_reader_must_know():
    facts = _teacher(own="v_prediction", guidance_scale=3.0).facts
    assert (facts["prediction_type"], facts["own_prediction_type"]) == ("epsilon", "v_prediction")
    assert (facts["guidance_scale"], facts["guidance_formula"]) == (3.0, "uncond + w (cond - uncond)")
    assert Process.from_json(facts["process"]).differs(_process()) is None
    assert NoiseConfig.model_validate(facts["noise"]) == NoiseConfig()


@pytest.mark.parametrize(
    ("network", "channels"), [(tiny_unet(), 3), (tiny_pixart(), 4)], ids=["without text", "learned variance"]
)
def test_other_families_answer_with_the_shape_of_the_latents(network, channels):
    signal = _teacher(network)(_batch(channels=channels))
    assert signal["prediction"].shape == (3, channels, 8, 8)


def test_flow_is_told_the_time_of_its_schedule():
    scheduler, network, batch = FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_sd3(), _batch()
    process = process_of_scheduler(dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    teacher = NoisePrediction(_section(), network, process, NoiseConfig(prediction_type="flow"))
    told = scheduler.timesteps.flip(0)[batch["timestep"]]
    x_t = scheduler.scale_noise(batch["latents"], told, batch["noise"])
    with torch.no_grad():
        wanted = network(x_t, batch["prompt_embeds"], batch["pooled"], told).sample
    torch.testing.assert_close(teacher(batch)["prediction"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("own", "noise", "words"),
    [
        ("v_prediction", {}, r"epsilon says nothing of the image at timestep 999.*prediction_type: v_prediction"),
        ("epsilon", {"prediction_type": "flow"}, r"epsilon says nothing .*end source\.noise\.timesteps at 999"),
    ],
)
def test_epsilon_at_zero_terminal_snr_is_refused_before_anything_runs(own, noise, words):
    process = _process(own, rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match=words):
        NoisePrediction(_section(), tiny_sdxl(), process, NoiseConfig(**noise))
    NoisePrediction(_section(), tiny_sdxl(), process, NoiseConfig(**noise, timesteps=(0, 999)))


def test_timesteps_beyond_the_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"found a noise schedule of 500; end the range at 500"):
        NoisePrediction(_section(), tiny_sdxl(), _process(num_train_timesteps=500), NoiseConfig())


def test_build_teacher_loads_the_configured_model(tmp_path):
    save_pipeline(tiny_sdxl(), tmp_path, DDPMScheduler(**SCHEDULE, prediction_type="v_prediction"))
    section = _section(model=DiffusersModel(library="diffusers", source=str(tmp_path), dtype="float32"))
    teacher = build_teacher(section, NoiseConfig())
    wanted = _teacher(own="v_prediction")(_batch())["prediction"]
    assert torch.equal(teacher(_batch())["prediction"], wanted)
