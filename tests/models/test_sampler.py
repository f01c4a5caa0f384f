"""The states of deterministic samplers: diffusers' own, at the alpha and sigma that they really have."""

from __future__ import annotations

import diffusers
import pytest
import torch

from raydistill.diffusion.process import Process
from raydistill.errors import ConfigError
from raydistill.models.denoiser import process_of_scheduler
from raydistill.models.sampler import Sampler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0,
    "prediction_type": "flow_prediction", "num_train_timesteps": 1000,
}  # fmt: skip
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **BETAS}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1, **BETAS}
TRAILING = {"timestep_spacing": "trailing"}
SOLVERS = {
    "flow": FLOW, "unipc": UNIPC, "ddim": DDIM, "ddim v": {**DDIM, "prediction_type": "v_prediction"}, "euler": EULER,
    "dpm": {"_class_name": "DPMSolverMultistepScheduler", **BETAS},
    "cogvideox": {
        "_class_name": "CogVideoXDDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}  # fmt: skip
NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
MEAN, STD = 0.7, 0.4
TOLERANCE = {"cogvideox": 6e-2}
"""Of a thousand steps: without any signal at its first node, the first step is a large one."""


def own_type(process: Process, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a perfect denoiser of data N(0.7, 0.4²) says at x_t, in the type of `process`."""
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t.double() - alpha * MEAN)
    eps = (x_t.double() - alpha * x0) / sigma
    match process.prediction_type:
        case "flow":
            return (eps - x0).float()
        case "v_prediction":
            return (alpha * eps - sigma * x0).float()
        case _:
            return eps.float()


def exact(sampler: Sampler):
    nodes = {round(node.told, 3): node for node in sampler.nodes[:-1]}

    def predict(x_t: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        node = nodes[round(float(told[0]), 3)]
        return own_type(sampler.process, x_t, node.alpha, node.sigma)

    return predict


def make(config: dict, keep_t: list[float], *, steps: int = 20, insert: bool = True) -> Sampler:
    process = process_of_scheduler(config)
    return Sampler(config, process, steps=steps, keep_t=keep_t, insert=insert, where="teachers.t")


@pytest.mark.parametrize("name", SOLVERS)
def test_without_times_of_ours_the_sample_is_that_of_diffusers(name):
    config = SOLVERS[name]
    kind = getattr(diffusers, config["_class_name"])
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(20)
    first = make(config, [0.5], steps=20).nodes[0].t
    sampler = make(config, [first], steps=20, insert=False)
    x = NOISE * (scheduler.init_noise_sigma if name == "euler" else 1)
    for index, t in enumerate(scheduler.timesteps):
        node = sampler.nodes[index]
        given = scheduler.scale_model_input(x, t) if name == "euler" else x
        x = scheduler.step(own_type(sampler.process, given, node.alpha, node.sigma), t, x, return_dict=False)[0]
    clean, path = sampler(NOISE, exact(sampler))
    torch.testing.assert_close(clean, x, rtol=0, atol=3e-5)
    assert path.shape == (2, 1, 3, 4, 4)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_kept_state_has_the_alpha_and_sigma_that_are_told_of_it(name):
    """On data N(m, s²) the exact path is x_t = alpha m + sqrt(alpha² s² + sigma²) z with one z for all times."""
    wanted = [0.9, 0.613, 0.25]
    config = SOLVERS[name]
    config = config if name in ("flow", "unipc") else {**config, **TRAILING}
    sampler = make(config, wanted, steps=1000)
    kept = [sampler.nodes[index] for index in sampler.kept]
    for node, t in zip(kept, wanted, strict=True):
        alpha, sigma = sampler.process.at_time(torch.tensor(t, dtype=torch.float64))
        assert abs(node.t - t) < 1e-6
        assert abs(node.sigma - float(sigma)) < 1e-6
        assert abs(node.alpha - float(alpha)) < 1e-6
    clean, path = sampler(NOISE, exact(sampler))
    end = sampler.nodes[-1]
    z = (clean.double() - end.alpha * MEAN) / (end.alpha**2 * STD**2 + end.sigma**2) ** 0.5
    for place, node in enumerate(kept):
        spread = (node.alpha**2 * STD**2 + node.sigma**2) ** 0.5
        torch.testing.assert_close(
            path[:, place].double(), node.alpha * MEAN + spread * z, rtol=0, atol=TOLERANCE.get(name, 3e-2)
        )


def test_a_time_that_is_no_node_is_stepped_on_exactly_or_refused():
    config = {**UNIPC, "flow_shift": 5.0}
    assert 0.833 not in [round(node.t, 4) for node in make(config, [0.9], steps=35).nodes]
    node = make(config, [0.833], steps=35)
    assert node.nodes[node.kept[0]].sigma == pytest.approx(0.833, abs=1e-9)
    assert len(node.nodes) == 37
    with pytest.raises(ConfigError, match=r"wanted times at which the sampler stands.*found 0\.833"):
        make(config, [0.833], steps=35, insert=False)


def test_times_that_are_nodes_add_no_step():
    sampler = make(FLOW, [1.0, 0.9375, 0.8333333, 0.625], steps=48)
    same = make({**FLOW, "shift": 1.0}, [0.5], steps=2)
    assert len(same.nodes) - 1 <= 3
    assert [round(sampler.nodes[i].sigma, 6) for i in sampler.kept] == [1.0, 0.9375, 0.833333, 0.625]


def test_a_time_above_the_beginning_is_refused_where_the_noise_schedule_ends():
    with pytest.raises(ConfigError, match=r"from 0\.99\d+ down, where the sampler begins, found 1"):
        make(UNIPC, [1.0])
    with pytest.raises(ConfigError, match="where the sampler begins"):
        make(EULER, [0.9999])


def test_samplers_that_are_not_known_are_named():
    config = {"_class_name": "HeunDiscreteScheduler", **BETAS}
    with pytest.raises(ConfigError, match=r"wanted one of .*DDIMScheduler.*found HeunDiscreteScheduler"):
        make(config, [0.5])
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        make({**FLOW, "use_dynamic_shifting": True}, [0.5])


def test_a_sampler_that_draws_noise_gives_way_to_the_path_without():
    assert make({"_class_name": "DDPMScheduler", **BETAS}, [0.5]).name == "DDIMScheduler"
