from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toys import Bigram, bigram_model, save_model, tiny_llama, tiny_qwen3_moe, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_bigram_model_says_what_the_table_says() -> None:
    bigram = Bigram.random(vocab_size=64, seed=3)
    tokens = torch.arange(64).reshape(4, 16)
    with torch.no_grad():
        logits = bigram_model(bigram)(tokens).logits
    assert torch.equal(logits, torch.from_numpy(bigram.log_p).float()[tokens])


def test_the_bigram_model_survives_a_transformers_folder(tmp_path: Path) -> None:
    model = bigram_model(Bigram.random(seed=1))
    loaded = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path))
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_samples_follow_the_table() -> None:
    bigram = Bigram.random(vocab_size=4, seed=0)
    tokens = bigram.sample(40_000, np.random.default_rng(0))
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), np.exp(bigram.log_p), atol=0.03)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3_moe])
def test_tiny_models_depend_on_the_seed_and_on_the_past_only(make: type) -> None:
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        one, same, other = make(seed=1)(tokens).logits, make(seed=1)(tokens).logits, make(seed=2)(tokens).logits
        changed = make(seed=1)(torch.where(tokens == 19, 5, tokens)).logits
    assert torch.equal(one, same)
    assert (one - other).abs().mean() > 0.1
    torch.testing.assert_close(one[:, :19], changed[:, :19])


def test_the_tiny_tokenizer_round_trips_printable_text(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn {x: 'é`'}  # ~!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert max(ids) < len(tokenizer) == 97
    assert tokenizer.decode(ids) == text.replace("\t", "?").replace("é", "?").replace("`", "?")
    assert tokenizer("a<|end|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]


def _gather(rank: int, world_size: int, offset: int) -> list[int]:
    sent = torch.tensor(rank + offset)
    received = [torch.zeros_like(sent) for _ in range(world_size)]
    dist.all_gather(received, sent)
    return [int(r) for r in received]


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("as asked")
    dist.barrier()


def test_ranks_talk_to_each_other_and_return_by_rank() -> None:
    assert run_ranks(_gather, world_size=2, args=(10,)) == [[10, 11], [10, 11]]


def test_the_error_of_a_rank_is_raised_though_another_waits_for_it() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: as asked"):
        run_ranks(_fail, world_size=2)
