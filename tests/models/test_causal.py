"""The causal passes against diffusers' own networks under a mask, and against one another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import dispatch_attention_fn
from tiny_denoisers import save_pipeline
from torch import Tensor, nn
from video_toys import FAMILIES, SIDE, captions, clips, tiny_cogvideox, tiny_cosmos, tiny_wan

from raydistill.config.models import DiffusersModel
from raydistill.diffusion.chunks import chunk_spans
from raydistill.errors import ConfigError, SignalMismatch
from raydistill.models import causal_families
from raydistill.models.causal import CausalDenoiser
from raydistill.models.denoiser import load_denoiser, predict

FRAME_TOKENS = (SIDE // 2) ** 2
ROUNDING = 2e-5
"""Of fp32, on outputs of order 1."""
families = pytest.mark.parametrize("family", FAMILIES)


def times(samples: int, spans: tuple[tuple[int, int], ...], seed: int = 5) -> Tensor:
    """A time for each chunk, [samples, frames]."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([(1000 * torch.rand(samples, 1, generator=g)).expand(-1, b - a) for a, b in spans], 1)


def masked(monkeypatch: pytest.MonkeyPatch, mask: Tensor) -> None:
    """Make diffusers' stock self-attention obey `mask` [tokens, tokens]."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, **settings: object) -> Tensor:
        own = mask if query.shape[1] == key.shape[1] == len(mask) else None
        return dispatch_attention_fn(query, key, value, attn_mask=own, dropout_p=0.0, is_causal=False)

    for family in ("wan", "cosmos"):
        monkeypatch.setattr(f"diffusers.models.transformers.transformer_{family}.dispatch_attention_fn", attention)


def ask_stock(network: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """diffusers' own forward pass with a time for each frame."""
    if type(network).__name__.startswith("Wan"):
        told = t.repeat_interleave(FRAME_TOKENS, dim=1)
        return network(x, timestep=told, encoder_hidden_states=text, return_dict=False)[0]
    return network(x, timestep=t[:, None, :, None, None] / 1000, encoder_hidden_states=text, return_dict=False)[0]


def by_chunks(causal: CausalDenoiser, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    cache, out = causal.new_cache(x.shape[2]), []
    with torch.no_grad():
        for a, b in causal.spans(x.shape[2]):
            out.append(causal.predict_chunk(x[:, :, a:b], t[:, a], text, cache, a))
    return torch.cat(out, 2)


@pytest.mark.parametrize(
    ("frames", "chunk", "wanted"),
    [
        (6, 3, ((0, 3), (3, 6))),
        (7, 3, ((0, 1), (1, 4), (4, 7))),
        (8, 3, ((0, 2), (2, 5), (5, 8))),
        (3, 3, ((0, 3),)),
        (2, 1, ((0, 1), (1, 2))),
    ],
)
def test_the_first_chunk_takes_the_remainder(frames: int, chunk: int, wanted: tuple[tuple[int, int], ...]) -> None:
    assert chunk_spans(frames, chunk) == wanted


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_chunk_beyond_the_clip_is_refused(chunk: int) -> None:
    with pytest.raises(ConfigError, match=r"chunk of 1 to 4 latent frames.*found"):
        chunk_spans(4, chunk)


@families
@pytest.mark.parametrize(("frames", "chunk"), [(6, 3), (5, 2), (4, 1), (3, 3)])
def test_a_causal_pass_is_diffusers_own_under_a_block_causal_mask(
    family: str, frames: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x, text = FAMILIES[family](), clips(2, frames), captions(2)
    spans = chunk_spans(frames, chunk)
    t = times(2, spans)
    with torch.no_grad():
        ours = CausalDenoiser(copy.deepcopy(network), chunk).predict(x, t, text)
        block = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(spans)]).repeat_interleave(FRAME_TOKENS)
        masked(monkeypatch, block[:, None] >= block[None, :])
        stock = ask_stock(network, x, t, text["prompt_embeds"])
    assert (ours - stock).abs().max() < ROUNDING * stock.abs().max()


@families
@pytest.mark.parametrize(("frames", "chunk"), [(6, 3), (7, 3), (5, 2), (4, 1)])
def test_the_cached_rollout_is_the_full_recomputation(family: str, frames: int, chunk: int) -> None:
    x, text, causal = clips(2, frames), captions(2), CausalDenoiser(FAMILIES[family](), chunk)
    t = times(2, causal.spans(frames))
    with torch.no_grad():
        full = causal.predict(x, t, text)
    assert (by_chunks(causal, x, t, text) - full).abs().max() < ROUNDING * full.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_on_a_gpu_the_cached_rollout_is_the_full_recomputation(
    family: str, dtype: torch.dtype, rounding: float
) -> None:
    causal = CausalDenoiser(nn.Module.to(FAMILIES[family](), "cuda", dtype), 3)
    x, text = clips(2, 7).cuda(), {name: value.cuda() for name, value in captions(2).items()}
    t = times(2, causal.spans(7)).cuda()
    with torch.no_grad():
        full = causal.predict(x, t, text)
    assert (by_chunks(causal, x, t, text) - full).abs().max() < rounding * full.abs().max()


@families
def test_past_frames_do_not_change_when_the_future_does(family: str) -> None:
    x, text, causal = clips(2, 7), captions(2), CausalDenoiser(FAMILIES[family](), 3)
    t = times(2, causal.spans(7))
    other, later = x.clone(), t.clone()
    other[:, :, 4:], later[:, 4:] = 9.0, 3.0
    with torch.no_grad():
        a, b = causal.predict(x, t, text), causal.predict(other, later, text)
    assert torch.equal(a[:, :, :4], b[:, :, :4])
    assert not torch.allclose(a[:, :, 4:], b[:, :, 4:])


@families
def test_every_chunk_sees_all_before_it(family: str) -> None:
    x, text, causal = clips(1, 6), captions(1), CausalDenoiser(FAMILIES[family](), 2)
    t = times(1, causal.spans(6))
    other = x.clone()
    other[:, :, 0] += 1
    with torch.no_grad():
        moved = (causal.predict(x, t, text) - causal.predict(other, t, text)).abs().amax((0, 1, 3, 4))
    assert (moved > 1e-4).all()


@families
def test_noisy_chunks_beside_clean_ones_are_the_rollout_with_clean_context(family: str) -> None:
    frames, x, clean, text = 7, clips(2, 7), clips(2, 7, seed=8), captions(2)
    causal = CausalDenoiser(FAMILIES[family](), 3)
    t, context = times(2, causal.spans(frames)), torch.full((2, frames), 20.0)
    cache, parts = causal.new_cache(frames), []
    with torch.no_grad():
        full = causal.predict(x, t, text, clean=clean, clean_t=context)
        for a, b in causal.spans(frames):
            parts.append(causal.predict_chunk(x[:, :, a:b], t[:, a], text, cache, a))
            causal.predict_chunk(clean[:, :, a:b], context[:, a], text, cache, a)
    assert (torch.cat(parts, 2) - full).abs().max() < ROUNDING * full.abs().max()


@families
def test_one_chunk_of_all_frames_is_the_bidirectional_network(family: str) -> None:
    network, x, text = FAMILIES[family](), clips(2, 5), captions(2)
    t = times(2, ((0, 5),))
    with torch.no_grad():
        stock = ask_stock(network, x, t, text["prompt_embeds"])
        causal = CausalDenoiser(network, 5).predict(x, t, text)
        again = ask_stock(network, x, t, text["prompt_embeds"])
    assert (causal - stock).abs().max() < ROUNDING * stock.abs().max()
    assert torch.equal(again, stock), "outside of causal calls the network is diffusers' own"


@families
def test_a_chunk_with_gradients_reads_the_cache_and_leaves_it(family: str) -> None:
    x, text, causal = clips(1, 4), captions(1), CausalDenoiser(FAMILIES[family](), 2)
    t = times(1, causal.spans(4))
    cache = causal.new_cache(4)
    with torch.no_grad():
        causal.predict_chunk(x[:, :, :2], t[:, 0], text, cache, 0)
        known = {layer: k.clone() for layer, k in cache.keys.items()}
        plain = causal.predict_chunk(x[:, :, 2:], t[:, 2], text, cache, 2)
    chunk = x[:, :, 2:].clone().requires_grad_()
    traced = causal.predict_chunk(chunk, t[:, 2], text, cache, 2)
    assert (traced - plain).abs().max() < 1e-6
    traced.sum().backward()
    assert chunk.grad is not None
    assert chunk.grad.abs().sum() > 0
    for layer, key in known.items():
        assert torch.equal(cache.keys[layer][:, : 2 * FRAME_TOKENS], key[:, : 2 * FRAME_TOKENS])


@families
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    x, text = clips(1, 6), captions(1)
    found = []
    for checkpointing in (False, True):
        network: Any = FAMILIES[family]()
        if checkpointing:
            network.enable_gradient_checkpointing()
        causal = CausalDenoiser(network, 2)
        t = times(1, causal.spans(6))
        cache = causal.new_cache(6)
        with torch.no_grad():
            causal.predict_chunk(x[:, :, :2], t[:, 0], text, cache, 0)
        chunk = causal.predict_chunk(x[:, :, 2:4], t[:, 2], text, cache, 2)
        with torch.no_grad():  # between the two passes the cache goes on
            causal.predict_chunk(x[:, :, 2:4] + 1, t[:, 2], text, cache, 2)
        full = causal.predict(x, t, text)
        (chunk.square().sum() + full.square().sum()).backward()
        found.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max((found[0][n] - found[1][n]).abs().max() / found[0][n].abs().max().clamp_min(1) for n in found[0]) < 1e-5


@families
def test_causal_denoisers_of_other_chunks_share_a_network_and_copies_are_their_own(family: str) -> None:
    network, x, text = FAMILIES[family](), clips(1, 4), captions(1)
    two, four = CausalDenoiser(network, 2), CausalDenoiser(network, 4)
    t = times(1, ((0, 4),))
    with torch.no_grad():
        before = two.predict(x, t, text)
        assert not torch.allclose(before, four.predict(x, t, text), atol=1e-4)
        twin = CausalDenoiser(copy.deepcopy(network), 2)
        assert torch.equal(twin.predict(x, t, text), before)
    assert twin._call is not two._call
    assert two._call is four._call


@families
def test_networks_that_diffusers_loads_in_half_precision_are_asked_in_it(family: str, tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    save_pipeline(FAMILIES[family](), tmp_path, scheduler, inside="transformer")
    network = load_denoiser(DiffusersModel(library="diffusers", source=str(tmp_path), dtype="bfloat16"))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16, torch.float32}
    x, text, told = clips(1, 4), captions(1), torch.full((1, 4), 500.0)
    with torch.no_grad():
        exact = CausalDenoiser(FAMILIES[family](), 2).predict(x, told, text)
        causal = CausalDenoiser(network, 2)
        full = causal.predict(x, told, text)
        assert (full - exact).abs().max() < 0.1 * exact.abs().max()
        assert (by_chunks(causal, x, told, text) - full).abs().max() < 0.05 * full.abs().max()
        assert predict(network, x, told[:, 0], text).dtype == torch.float32


def test_a_video_beyond_the_positions_is_refused() -> None:
    for network in (tiny_wan(), tiny_cosmos()):
        with pytest.raises(ConfigError, match=r"at most 32 latent frames.*found 33"):
            CausalDenoiser(network, 3).new_cache(33)


def test_what_cannot_be_causal_says_so_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"CogVideoXTransformer3DModel.*text and video attend"):
        CausalDenoiser(tiny_cogvideox(), 2)
    with pytest.raises(ConfigError, match="WanTransformer3DModel or CosmosTransformer3DModel, found Linear"):
        CausalDenoiser(nn.Linear(1, 1), 2)
    thick: Any = tiny_wan()
    thick.register_to_config(patch_size=(2, 2, 2))
    with pytest.raises(ConfigError, match=r"patches of one latent frame, found patch_size \[2, 2, 2\]"):
        CausalDenoiser(thick, 2)
    padded: Any = tiny_cosmos()
    padded.register_to_config(concat_padding_mask=True)
    monkeypatch.setattr(causal_families.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wants torchvision"):
        CausalDenoiser(padded, 2)


def test_missing_text_is_named() -> None:
    with pytest.raises(SignalMismatch, match="WanTransformer3DModel wants prompt_embeds, found nothing"):
        CausalDenoiser(tiny_wan(), 2).predict(clips(1, 2), torch.zeros(1, 2), {})
