from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from denoiser_toys import DDPM, FLOW, batch_of, process_of, tiny_unet
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from raydistill.diffusion.process import PredictionType, Process
from raydistill.evaluate import generate
from raydistill.evaluate.generate import Sampling, first_noise, guided, png, sample, trailing
from raydistill.models.denoiser import predict

MEAN, DEVIATION = 0.4, 0.25


def _knows_the_answer(process: Process):
    """The best prediction for data whose elements are normal with `MEAN` and `DEVIATION`, in the process' own type."""

    def perfect(network: nn.Module, x_t: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        t = times if process.kind == "variance_preserving" else _index(process, times)
        alpha, sigma = process.at(t, x_t)
        share = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        x0 = MEAN + share * (x_t.double() - alpha * MEAN)
        return process.target(x0, (x_t.double() - alpha * x0) / sigma, t, process.prediction_type)

    return perfect


def _index(process: Process, times: Tensor) -> Tensor:
    return (process.sigmas[None] - times[:, None].double() / process.num_timesteps).abs().argmin(1)


ZERO_SNR = {**DDPM, "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (DDPM, "epsilon"),
        (DDPM, "v_prediction"),
        (DDPM, "sample"),
        (DDPM, "flow"),
        (ZERO_SNR, "v_prediction"),
        (ZERO_SNR, "sample"),
        (FLOW, "flow"),
        (FLOW, "sample"),
    ],
)
def test_samples_of_a_perfect_denoiser_are_the_noise_moved_to_the_data(
    scheduler: dict, kind: PredictionType, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(kind, scheduler)
    monkeypatch.setattr(generate, "predict", _knows_the_answer(process))
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = sample(tiny_unet(kind), process, noise, {}, Sampling(steps=1000))
    # The ODE of a normal distribution keeps every value at its quantile.
    alpha, sigma = process.alphas[-1], process.sigmas[-1]
    wanted = MEAN + DEVIATION * (noise - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
    assert float((found - wanted).abs().max()) < 0.02
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=0.004)


def test_a_real_network_is_stepped_as_by_the_schedulers_of_diffusers() -> None:
    network, given = tiny_unet(), batch_of(2)
    noise = given["noise"]
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(7)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predict(network, x, t.repeat(2), given), t, x).prev_sample
    torch.testing.assert_close(sample(network, network.process, noise, given, Sampling(steps=7)), x)


def test_a_flow_is_told_the_times_of_its_own_scheduler() -> None:
    network, given = tiny_unet("flow", scheduler=FLOW), batch_of(1)
    told: list[float] = []
    network.register_forward_pre_hook(lambda module, args: told.append(float(args[1][0])))
    sample(network, network.process, given["noise"], given, Sampling(steps=4))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert told == pytest.approx(scheduler.timesteps.tolist())


def test_guidance_is_uncond_plus_w_times_the_difference() -> None:
    network, given = tiny_unet(), batch_of(2)
    x, times = given["noise"], given["timestep"]
    empty = {**given, "prompt_embeds": given["empty_embeds"], "pooled": given["empty_pooled"]}
    with torch.no_grad():
        cond, uncond = predict(network, x, times, given), predict(network, x, times, empty)
        assert torch.equal(guided(network, x, times, given, 1.0), cond)
        torch.testing.assert_close(guided(network, x, times, given, 0.0), uncond)
        torch.testing.assert_close(guided(network, x, times, given, 3.0), uncond + 3 * (cond - uncond))
    assert not torch.allclose(cond, uncond)


def test_clipped_pixels_stay_in_their_range() -> None:
    network, given = tiny_unet(), batch_of(2)
    with torch.no_grad():
        for parameter in network.conv_out.parameters():
            parameter.mul_(5)
    plain, clipped = (
        sample(network, network.process, given["noise"], given, Sampling(steps=5, clip=clip)) for clip in (False, True)
    )
    assert float(plain.abs().max()) > 1
    assert float(clipped.abs().max()) <= 1 + 1e-6


def test_the_first_noise_is_that_of_the_row_and_of_no_training_draw() -> None:
    from raydistill.diffusion.draws import noise_of

    one = first_noise("a", 0, (3, 8, 8), 0)
    assert torch.equal(one, first_noise("a", 0, (3, 8, 8), 0))
    others = [
        first_noise("b", 0, (3, 8, 8), 0), first_noise("a", 1, (3, 8, 8), 0), first_noise("a", 0, (3, 8, 8), 1),
        noise_of("a", 0, (3, 8, 8), 0),
    ]  # fmt: skip
    assert all(not torch.allclose(one, other) for other in others)


def test_trailing_timesteps_start_at_the_last_one() -> None:
    assert trailing(1000, 4) == [999, 749, 499, 249]
    assert trailing(1000, 1) == [999]
    assert len(trailing(1000, 7)) == 7


def test_a_png_holds_the_rounded_pixels() -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0] = torch.tensor([-0.5, 0.5, 1.5])
    pixels = np.asarray(Image.open(io.BytesIO(png(image))))
    assert pixels.shape == (5, 7, 3)
    assert pixels[0, 0].tolist() == [0, 128, 255]
    assert np.abs(pixels.astype(float).transpose(2, 0, 1) - 255 * image.clamp(0, 1).numpy()).max() <= 0.5


def test_samples_are_those_of_the_sdxl_pipeline_of_diffusers() -> None:
    network, given = tiny_unet(), batch_of(2)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(unet=network, scheduler=scheduler, add_watermarker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt_embeds=given["prompt_embeds"], pooled_prompt_embeds=given["pooled"],
        negative_prompt_embeds=given["empty_embeds"], negative_pooled_prompt_embeds=given["empty_pooled"],
        height=64, width=64, original_size=(48, 80), crops_coords_top_left=(4, 0), target_size=(64, 64),
        latents=given["noise"], num_inference_steps=5, guidance_scale=3.0, output_type="latent",
    ).images  # fmt: skip
    given["time_ids"] = torch.tensor([[48.0, 80, 4, 0, 64, 64]]).repeat(2, 1)
    found = sample(network, network.process, given["noise"], given, Sampling(steps=5, guidance_scale=3.0))
    torch.testing.assert_close(found, made, rtol=1e-4, atol=1e-5)
