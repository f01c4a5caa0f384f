"""What a codec gives back."""

from __future__ import annotations

import numpy as np
import pytest

from raydistill.cache.codecs import SOFTEST, Codec, codec_for, id_bytes

Fields = dict[str, np.ndarray]


def top_k(positions: int, k: int, vocab_size: int, *, seed: int = 0, sharpness: float = 2.0) -> Fields:
    """A top-k signal of random logits; `vocab_size` only bounds the ids."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, sharpness, (positions, max(200, 2 * k)))
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logp = -np.sort(-logp, axis=1)
    pool = rng.permutation(min(vocab_size, 1 << 20))[: 2 * k + 8].astype(np.int64)
    ids = np.stack([rng.permutation(pool)[:k] for _ in range(positions)]) if positions else np.zeros((0, k))
    return {
        "ids": (ids + max(vocab_size - (1 << 20), 0)).astype(np.uint32).view(np.int32),
        "logp": logp[:, :k].astype(np.float16),
        "log_tail": np.log(np.exp(logp[:, k:]).sum(axis=1)).astype(np.float16),
        "entropy": (-(np.exp(logp) * logp).sum(axis=1)).astype(np.float16),
        "psi": rng.normal(size=(positions, 2)).astype(np.float16),
        "label_logp": -rng.random(positions).astype(np.float16),
    }


def round_trip(codec: Codec, fields: Fields) -> Fields:
    dtypes = {name: values.dtype for name, values in fields.items()}
    sizes = {name: values.shape[1:] for name, values in fields.items()}
    return codec.decode(codec.encode(fields), dtypes, sizes)


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("vocab_size", [200, 49_152, 151_936, 1 << 31])
@pytest.mark.parametrize("positions", [0, 1, 2500])
def test_fp16_loses_nothing(positions: int, k: int, vocab_size: int) -> None:
    fields = top_k(positions, min(k, vocab_size // 3), vocab_size)
    for name, values in round_trip(codec_for("fp16", vocab_size=vocab_size), fields).items():
        np.testing.assert_array_equal(values, fields[name])
        assert values.dtype == fields[name].dtype
        assert values.shape == fields[name].shape


def test_fp16_brings_back_any_bit_pattern_in_any_order() -> None:
    bits = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).reshape(1024, 64)
    fields = top_k(1024, 64, 500) | {"logp": bits.view(np.float16)}
    found = round_trip(codec_for("fp16", vocab_size=500), fields)
    np.testing.assert_array_equal(found["logp"].view(np.uint16), bits)


def test_ids_use_as_many_bytes_as_the_vocabulary_needs() -> None:
    assert [id_bytes(v) for v in (1, 2, 256, 257, 65_536, 65_537, 1 << 24, (1 << 24) + 1, 1 << 32)] == [
        1, 1, 1, 2, 2, 3, 3, 4, 4,
    ]  # fmt: skip
    fields = {"ids": np.array([[0, -1], [-2, 5]], np.int32)}  # -1 is the bit pattern of id 2^32 - 1
    np.testing.assert_array_equal(round_trip(codec_for("fp16", vocab_size=1 << 32), fields)["ids"], fields["ids"])


@pytest.mark.parametrize("name", ["fp16", "u8"])
@pytest.mark.parametrize("k", [0, 3])
def test_sampled_tails_pass_unchanged(name: str, k: int) -> None:
    rng = np.random.default_rng(1)
    fields = top_k(300, 3, 70_000)
    fields |= {"ids": fields["ids"][:, :k], "logp": fields["logp"][:, :k]}
    fields |= {
        "tail_ids": rng.integers(0, 70_000, (300, 5)).astype(np.int32),
        "tail_counts": rng.integers(0, 256, (300, 5)).astype(np.int32),
        "tail_logp": -rng.random((300, 5)).astype(np.float16),
    }
    found = round_trip(codec_for(name, vocab_size=70_000), fields)
    for field in set(fields) - ({"logp"} if name == "u8" else set()):
        np.testing.assert_array_equal(found[field], fields[field])
    assert found["logp"].shape == (300, k)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_u8_is_a_distribution_close_to_the_true_one(sharpness: float) -> None:
    fields = top_k(3000, 64, 49_152, sharpness=sharpness)
    found = round_trip(codec_for("u8", vocab_size=49_152), fields)["logp"].astype(np.float64)
    true, tail = fields["logp"].astype(np.float64), np.exp(fields["log_tail"].astype(np.float64))
    assert (np.diff(found, axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(found).sum(1) + tail, 1, atol=4e-3)
    kl = (np.exp(true) * (true - found)).sum(1) + np.exp(found).sum(1) - np.exp(true).sum(1)
    assert kl.mean() < 2e-4
    assert kl.max() < 1e-3
    # a level is at most half a step away: 0.011 nats at p = 1, growing with -log p; the rescaling adds a little
    assert (np.abs(found - true) < 0.03 + 0.0147 * (1.5 - true)).all()


def test_u8_takes_impossible_ids_as_the_least_probable() -> None:
    fields = top_k(1, 4, 100) | {"logp": np.array([[-1.0, -2.0, -70.0, -np.inf]], np.float16)}
    fields["log_tail"] = np.log1p(-np.exp(-1.0) - np.exp(-2.0)).astype(np.float16)[None]
    found = round_trip(codec_for("u8", vocab_size=100), fields)["logp"][0]
    assert np.isfinite(found).all()
    assert found[2] == found[3] == pytest.approx(-SOFTEST, abs=0.05)


def test_the_same_fields_give_the_same_bytes() -> None:
    for name in ("fp16", "u8"):
        one, two = (codec_for(name, vocab_size=49_152).encode(top_k(500, 64, 49_152)) for _ in range(2))
        assert {n: p.tobytes() for n, p in one.items()} == {n: p.tobytes() for n, p in two.items()}
