"""Few-step generation with a cache against the same made by recomputing everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from video_toys import FAMILIES, FLOW, captions, clips, tiny_wan

from raydistill.config.models import CausalConfig, GeneratorConfig
from raydistill.diffusion.process import Process
from raydistill.models.causal import CausalDenoiser
from raydistill.models.rollout import Rollout

PROCESS = Process.from_scheduler(FLOW)
TIMES = (1.0, 0.9, 0.5, 0.0)
families = pytest.mark.parametrize("family", FAMILIES)


def generator(**settings: object) -> GeneratorConfig:
    causal = CausalConfig(chunk_frames=2, context_noise=float(str(settings.pop("context_noise", 0.1))))
    return GeneratorConfig(t_list=TIMES, causal=causal, **settings)


def noise(samples: int, frames: int):  # type: ignore[no-untyped-def]
    """Noise by the name of its use."""
    uses = ("start", "step 1", "step 2", "context")
    return lambda use: clips(samples, frames, seed=10 + uses.index(use))


def recomputed(causal: CausalDenoiser, how: GeneratorConfig, frames: int, text: dict[str, Tensor], last: int) -> Tensor:
    """The same videos by asking about all frames at every step, with context noised by hand; flows only."""
    assert how.causal is not None
    draw, level = noise(2, frames), how.causal.context_noise
    made = torch.zeros_like(draw("start"))
    for a, b in causal.spans(frames):
        x = draw("start")[:, :, a:b]
        for step in range(last + 1):
            whole = (1 - level) * made + level * draw("context")
            whole[:, :, a:b] = x
            t = torch.full((2, frames), level)
            t[:, a:b] = TIMES[step]
            with torch.no_grad():
                flow = causal.predict(whole, PROCESS.told(t), text)[:, :, a:b]
            clean = x - TIMES[step] * flow
            if step < last:
                eps = draw(f"step {step + 1}")[:, :, a:b] if how.renoise == "fresh" else x + (1 - TIMES[step]) * flow
                x = (1 - TIMES[step + 1]) * clean + TIMES[step + 1] * eps
        made[:, :, a:b] = clean
    return made


@families
@pytest.mark.parametrize("renoise", ["fresh", "same"])
@pytest.mark.parametrize(("frames", "level", "last"), [(6, 0.1, 2), (5, 0.0, 2), (5, 0.2, 0), (4, 0.1, 1)])
def test_a_rollout_with_a_cache_is_the_one_that_recomputes_everything(
    family: str, renoise: str, frames: int, level: float, last: int
) -> None:
    causal, text = CausalDenoiser(FAMILIES[family](), 2), captions(2)
    how = generator(renoise=renoise, context_noise=level)
    with torch.no_grad():
        ours = Rollout(causal, PROCESS, how)(noise(2, frames), text, exit_step=None if last == 2 else last)
    full = recomputed(causal, how, frames, text, last)
    assert (ours - full).abs().max() < 5e-5 * full.abs().max()


@families
def test_earlier_frames_of_a_rollout_do_not_depend_on_its_length(family: str) -> None:
    text, how = captions(2), generator()
    rollout = Rollout(CausalDenoiser(FAMILIES[family](), 2), PROCESS, how)
    draw = noise(2, 8)
    with torch.no_grad():
        long = rollout(draw, text)
        short = rollout(lambda use: draw(use)[:, :, :4], text)
    assert torch.equal(long[:, :, :4], short)


@families
def test_only_the_exit_step_has_gradients_and_none_reaches_the_context(family: str) -> None:
    network, text = FAMILIES[family](), captions(1)
    causal, how = CausalDenoiser(network, 2), generator()
    passes: list[tuple[bool, float]] = []
    told = causal.predict_chunk

    def watched(x_t: Tensor, t: Tensor, *rest: object) -> Tensor:
        passes.append((torch.is_grad_enabled(), round(float(t[0]) / 1000, 3)))
        return told(x_t, t, *rest)  # type: ignore[arg-type]

    causal.predict_chunk = watched  # type: ignore[method-assign]
    made = Rollout(causal, PROCESS, how)(noise(1, 4), text, exit_step=1)
    assert passes == [(False, 1.0), (True, 0.9), (False, 0.1), (False, 1.0), (True, 0.9)]

    def gradient(frames: slice) -> dict[str, Tensor]:
        network.zero_grad()
        made[:, :, frames].square().sum().backward(retain_graph=True)
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    # The second chunk depends on the first through the cache; its gradient must be that of one pass beside it.
    last = gradient(slice(2, 4))
    assert any(g.abs().max() > 0 for g in last.values())
    network.zero_grad()
    with torch.no_grad():
        first = made[:, :, :2].detach()
        known = causal.new_cache(4)
        context = PROCESS.noised(first, noise(1, 4)("context")[:, :, :2], torch.tensor([0.1]))
        told(context, PROCESS.told(torch.tensor([0.1])), text, known, 0)
        start = noise(1, 4)("start")[:, :, 2:]
        clean = PROCESS.clean_of(told(start, PROCESS.told(torch.ones(1)), text, known, 2), start, torch.ones(1))
        x = PROCESS.noised(clean, noise(1, 4)("step 1")[:, :, 2:], torch.tensor([0.9], dtype=torch.float64))
    t = torch.tensor([0.9], dtype=torch.float64)
    again = PROCESS.clean_of(told(x, PROCESS.told(t), text, known, 2), x, t)
    again.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - last[name]).abs().max() < 1e-4 * max(1.0, float(last[name].abs().max())), name


def test_noise_is_drawn_once_for_each_use() -> None:
    asked: list[str] = []
    draw = noise(1, 6)

    def counted(use: str) -> Tensor:
        asked.append(use)
        return draw(use)

    with torch.no_grad():
        Rollout(CausalDenoiser(tiny_wan(), 2), PROCESS, generator())(counted, captions(1))
    assert sorted(asked) == ["context", "start", "step 1", "step 2"]
