"""The process against diffusers' own schedulers, exact conversions and a denoiser known in closed form."""

import itertools
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from gaussian_mixture import GaussianMixture

from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError

KINDS = ("epsilon", "v_prediction", "sample", "flow")
PAIRS = list(itertools.permutations(KINDS, 2))
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


def _process(scheduler):
    return Process.from_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})


def _pair(seed=0, shape=(6, 4, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        SDXL,
        {},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {**SDXL, "rescale_betas_zero_snr": True},
        {"trained_betas": torch.linspace(0.001, 0.03, 1000).tolist()},
    ],
    ids=["sdxl", "linear", "cosine", "sigmoid", "zero_snr", "trained"],
)
def test_noise_and_velocity_are_those_of_diffusers(settings):
    scheduler = DDPMScheduler(**settings)
    process, (x0, eps) = _process(scheduler), _pair()
    assert torch.allclose(process.noisy(x0, eps, TIMES), scheduler.add_noise(x0, eps, TIMES), atol=2e-5)
    velocity = scheduler.get_velocity(x0, eps, TIMES)
    assert torch.allclose(process.target(x0, eps, TIMES, "v_prediction"), velocity, atol=2e-5)


def test_zero_terminal_snr_leaves_nothing_of_the_image():
    process = _process(DDPMScheduler(**SDXL, rescale_betas_zero_snr=True))
    assert process.alphas[-1] == 0
    assert process.sigmas[-1] == 1
    assert process.undefined("epsilon", (0, 1000)) == 999
    assert process.undefined("epsilon", (0, 999)) is None
    assert process.undefined("v_prediction", (0, 1000)) is None


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_that_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process, (x0, eps) = _process(scheduler), _pair()
    assert (process.kind, process.prediction_type) == ("flow", "flow")
    told = process.times(TIMES)
    assert torch.allclose(told, scheduler.timesteps.flip(0)[TIMES], rtol=1e-6)
    same = scheduler.timesteps.flip(0)[TIMES]  # diffusers looks its noise up by exact values
    assert torch.allclose(process.noisy(x0, eps, TIMES), scheduler.scale_noise(x0, same, eps), atol=1e-5)


def test_shift_by_image_size_is_left_to_sampling():
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert _process(shifted).differs(_process(FlowMatchEulerDiscreteScheduler())) is None


def test_schedulers_of_one_schedule_agree_whatever_they_sample_with():
    ddpm = _process(DDPMScheduler(**SDXL))
    for other in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        assert _process(other(**SDXL, prediction_type="v_prediction")).differs(ddpm) is None


def test_flow_sigmas_of_a_solver_are_a_flow():
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    flow = _process(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert _process(solver).differs(flow) is None
    assert _process(solver).prediction_type == "flow"


def test_difference_names_the_first_timestep():
    one, other = _process(DDPMScheduler(**SDXL)), _process(DDPMScheduler(**SDXL | {"beta_end": 0.013}))
    words = one.differs(other)
    assert words is not None
    assert words.startswith("from timestep 1 on: alpha 0.999")
    assert "flow" in str(one.differs(_process(FlowMatchEulerDiscreteScheduler())))
    assert "500" in str(one.differs(_process(DDPMScheduler(**SDXL, num_train_timesteps=500))))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**SDXL), FlowMatchEulerDiscreteScheduler(shift=3.0)])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_true_prediction_of_one_kind_is_the_true_prediction_of_every_other(scheduler, source, target):
    process, t = _process(scheduler), torch.tensor([0, 1, 250, 500, 997, 998])
    x0, eps = (part.double() for part in _pair())
    alpha, sigma = process.at(t, x0)
    x_t = alpha * x0 + sigma * eps
    truth = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}
    found = process.convert(truth[source], x_t, t, source=source, target=target)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth[target], rtol=0, atol=1e-9)
    assert torch.allclose(process.target(x0, eps, t, target), truth[target].float(), atol=1e-6)
    back = process.convert(found, x_t, t, source=target, target=source)
    torch.testing.assert_close(back, truth[source], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_error_scale_is_by_how_much_a_mistake_grows(source, target):
    process, t = _process(DDPMScheduler(**SDXL)), TIMES
    x_t, pred = (part.double() for part in _pair(shape=(6, 3)))
    one = process.convert(pred, x_t, t, source=source, target=target)
    other = process.convert(pred + 0.5, x_t, t, source=source, target=target)
    scale = process.error_scale(t, source=source, target=target)
    torch.testing.assert_close((other - one).abs(), 0.5 * scale[:, None].expand(6, 3), rtol=1e-6, atol=1e-9)


def test_error_of_the_image_is_that_of_the_noise_over_the_snr():
    process = _process(DDPMScheduler(**SDXL))
    scale = process.error_scale(TIMES, source="epsilon", target="sample") ** 2
    torch.testing.assert_close(scale * process.snr(TIMES), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("t", [5, 300, 900])
def test_best_noise_prediction_becomes_the_posterior_mean(t):
    process, mixture = _process(DDPMScheduler(**SDXL)), GaussianMixture.two_humps()
    alpha, sigma = process.alphas[t], process.sigmas[t]
    x_t = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    times = torch.full((7,), t)
    best = mixture.best_epsilon(x_t, alpha, sigma)
    mean = mixture.posterior_mean(x_t, alpha, sigma)
    torch.testing.assert_close(
        process.convert(best, x_t, times, source="epsilon", target="sample"), mean, rtol=1e-6, atol=1e-6
    )


def test_epsilon_without_signal_is_refused_and_v_is_not():
    process, (x0, eps) = _process(DDPMScheduler(**SDXL, rescale_betas_zero_snr=True)), _pair(shape=(1, 2))
    t = torch.tensor([999])
    with pytest.raises(ConfigError, match=r"timestep 999: .*prediction_type: v_prediction"):
        process.convert(eps, eps, t, source="epsilon", target="v_prediction")
    velocity = process.target(x0, eps, t, "v_prediction")
    assert torch.allclose(process.convert(velocity, eps, t, source="v_prediction", target="sample"), x0)
    assert process.convert(eps, eps, torch.tensor([998]), source="epsilon", target="sample").isfinite().all()


def test_gradient_passes_through_a_conversion():
    process, (pred, x_t) = _process(DDPMScheduler(**SDXL)), _pair(shape=(6, 3))
    pred.requires_grad_()
    process.convert(pred, x_t, TIMES, source="v_prediction", target="epsilon").sum().backward()
    torch.testing.assert_close(pred.grad, process.alphas[TIMES].float()[:, None].expand(6, 3))


def test_half_precision_comes_back_in_the_wider_type():
    process, (pred, x_t) = _process(DDPMScheduler(**SDXL)), _pair(shape=(6, 3))
    half = process.convert(pred.bfloat16(), x_t, TIMES, source="v_prediction", target="epsilon")
    assert half.dtype == torch.float32
    both = process.convert(pred.bfloat16(), x_t.bfloat16(), TIMES, source="v_prediction", target="epsilon")
    assert both.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        DDPMScheduler(trained_betas=[0.01, 0.02, 0.03], num_train_timesteps=3),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_facts_bring_the_same_process_back(scheduler):
    process = _process(scheduler)
    again = Process.from_json(json.loads(json.dumps(process.to_json())))
    assert torch.equal(again.alphas, process.alphas)
    assert torch.equal(again.sigmas, process.sigmas)
    assert (again.kind, again.prediction_type) == (process.kind, process.prediction_type)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002}, "EDMEulerScheduler: wanted .* betas"),
        (dict(DDPMScheduler().config) | {"beta_schedule": "laplace"}, "beta_schedule: wanted linear.* found 'laplace'"),
        (dict(DDPMScheduler().config) | {"prediction_type": "score"}, "prediction_type: wanted .* found 'score'"),
        (dict(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config), "invert_sigmas"),
        (dict(DDPMScheduler().config) | {"beta_end": "x"}, "beta_end: wanted a number above 0, found 'x'"),
        (dict(DDPMScheduler().config) | {"num_train_timesteps": 0}, "num_train_timesteps: wanted .*, found 0"),
        (dict(FlowMatchEulerDiscreteScheduler().config) | {"shift": None}, "shift: wanted .*, found None"),
    ],
    ids=["edm", "laplace", "score", "inverted", "text for a number", "no timesteps", "no shift"],
)
def test_schedulers_outside_the_two_families_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        Process.from_scheduler(config)
