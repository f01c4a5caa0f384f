"""Small problems whose exact answer is known, and tiny models and tokenizers for tests.

The bigram language model: the next token depends on the current one alone, through a table of probabilities. As
`Bigram` it is plain NumPy in fp64, the second implementation that the package is compared with; as `bigram_model` it
is a Llama of transformers without any block, so it goes wherever a pretrained model goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from raydistill.cache.batches import InputRow
from raydistill.cache.codecs import codec_for
from raydistill.cache.manifest import Manifest, ShardRecord, fingerprint_of
from raydistill.cache.shards import (
    INPUT_FIELDS,
    SignalShard,
    field_records,
    publish_record,
    shard_name,
    tokens_sha,
    write_inputs,
    write_signal,
)
from raydistill.signals import Field, JsonValue, Schema
from raydistill.storage import Store

if TYPE_CHECKING:  # transformers takes seconds to import, and half of the tests need none of it
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

TOP_K_FIELDS: Schema = {
    "ids": Field(torch.int32, ("target", "k"), "most probable ids, by descending probability"),
    "logp": Field(torch.float16, ("target", "k"), "their log-probabilities, nats"),
    "log_tail": Field(torch.float16, ("target",), "log of the mass outside ids, nats"),
    "entropy": Field(torch.float16, ("target",), "entropy, nats"),
    "psi": Field(torch.float16, ("target", "grid"), "log of the sum of p^(1/T) outside ids, for each T"),
    "label_logp": Field(torch.float16, ("target",), "log-probability of the true next token, nats"),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Bigram:
    """p(next | current) for all pairs of tokens."""

    log_p: np.ndarray
    """[current, next] fp64, natural log; every row is normalised."""

    @classmethod
    def random(cls, vocab_size: int = 64, seed: int = 0, scale: float = 2.0) -> Bigram:
        """A table of softmaxed normal logits; `scale` is their standard deviation."""
        return cls(_log_softmax(np.random.default_rng(seed).normal(0, scale, (vocab_size, vocab_size))))

    @property
    def vocab_size(self) -> int:
        return len(self.log_p)

    def sample(self, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """[num_tokens] int32 drawn from the model; the first token is uniform."""
        cumulative = np.exp(self.log_p).cumsum(axis=1)
        tokens = [int(rng.integers(self.vocab_size))]
        for draw in rng.random(num_tokens - 1):
            tokens.append(min(int(np.searchsorted(cumulative[tokens[-1]], draw)), self.vocab_size - 1))
        return np.array(tokens, np.int32)

    def entropy(self) -> np.ndarray:
        """[current]: entropy of the next token, in nats."""
        return -(np.exp(self.log_p) * self.log_p).sum(axis=1)

    def label_logp(self, row: InputRow) -> np.ndarray:
        """[targets]: exact log-probability of the true next token at the row's targets."""
        at = np.flatnonzero(row.target)
        return self.log_p[row.input_ids[at], row.input_ids[at + 1]]

    def kl(self, other: Bigram, row: InputRow) -> np.ndarray:
        """[targets]: exact KL(self ‖ other) at the row's targets, in nats."""
        per_token = (np.exp(self.log_p) * (self.log_p - other.log_p)).sum(axis=1)
        return per_token[row.input_ids[np.flatnonzero(row.target)]]

    def top_k_signal(self, row: InputRow, top_k: int, temperatures: Sequence[float]) -> dict[str, np.ndarray]:
        """The fields of `top_k_logits` (estimator `top_k`) at the row's targets: [targets, ...] in stored dtypes."""
        log_p = self.log_p[row.input_ids[np.flatnonzero(row.target)]]
        ids = np.argsort(-log_p, axis=1, kind="stable")
        inside, outside = ids[:, :top_k], ids[:, top_k:]
        tail = np.take_along_axis(log_p, outside, axis=1)
        powers = [_logsumexp(tail / t) for t in temperatures]
        return {
            "ids": inside.astype(np.int32),
            "logp": np.take_along_axis(log_p, inside, axis=1).astype(np.float16),
            "log_tail": np.maximum(_logsumexp(tail), -60).astype(np.float16),
            "entropy": -(np.exp(log_p) * log_p).sum(axis=1).astype(np.float16),
            "psi": np.maximum(np.stack(powers, axis=1), -60).astype(np.float16)
            if powers
            else np.zeros((len(log_p), 0), np.float16),
            "label_logp": self.label_logp(row).astype(np.float16),
        }


def bigram_model(bigram: Bigram) -> LlamaForCausalLM:
    """`bigram` as a Llama without blocks: its fp32 logits are the rounded table, exactly.

    The embedding is the identity, so the hidden state is one-hot; RMSNorm (with eps 0) scales it by sqrt(V), which the
    head divides away. With V a power of 4 that is exact in every floating-point format.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = bigram.vocab_size
    root = 2 ** (vocab_size.bit_length() // 2)
    assert root * root == vocab_size, "the vocabulary size must be a power of 4"
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        intermediate_size=1,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        model.lm_head.weight.copy_(torch.from_numpy(bigram.log_p.T / root))
    return model


def bigram_teacher(vocab_size: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """`bigram_model(Bigram.random(...))`, for `model: {library: python, source: "toys:bigram_teacher"}`."""
    return bigram_model(Bigram.random(vocab_size, seed))


def tiny_llama(
    vocab_size: int = 97, *, seed: int = 0, hidden: int = 32, layers: int = 2, tied: bool = True
) -> LlamaForCausalLM:
    """A random Llama in fp32 and eval mode; about 20,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_qwen3_moe(vocab_size: int = 97, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE (4 experts, 2 of them used per token) in fp32 and eval mode."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return Qwen3MoeForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 97 in all: <|begin|> (bos, 0), <|end|> (eos and padding, 1), newline, printable ASCII.

    Characters outside this set become question marks, and so does the backtick.
    """
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(c) for c in range(32, 127) if chr(c) != "`")]
    vocab = {token: i for i, token in enumerate(["<|begin|>", "<|end|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def save_model(model: torch.nn.Module, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a model (and `tiny_tokenizer()` unless another is given) as a transformers folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def toy_rows(
    bigram: Bigram, num_rows: int, *, longest: int = 12, seed: int = 0, prefix: str = "toy.txt"
) -> list[InputRow]:
    """Rows drawn from the bigram: of 2 to `longest` tokens, some packed from two documents, some targets masked out."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        length = int(rng.integers(2, longest + 1))
        cut = int(rng.integers(2, length - 1)) if length >= 4 and rng.random() < 0.5 else 0
        segments = np.array([cut, length - cut] if cut else [length], np.int32)
        target = rng.random(length) < 0.8
        target[np.cumsum(segments) - 1] = False
        target[0] |= not target.any()
        ids = np.concatenate([bigram.sample(int(n), rng) for n in segments])
        rows.append(InputRow(f"{prefix}#{i}.0", ids, target, segments, text_bytes=4 * int(target.sum())))
    return rows


@dataclass(frozen=True)
class ToyCaches:
    """An inputs cache and the signals of bigram teachers, with the rows they were made from."""

    inputs: Store
    signals: dict[str, Store]
    teachers: dict[str, Bigram]
    rows: dict[str, list[InputRow]]
    """By split, in cache order: row i of the list is row i of a `Dataset`."""


def write_toy_caches(
    folder: Path,
    *,
    teachers: Mapping[str, Bigram] | None = None,
    num_rows: int = 50,
    num_held_out: int = 10,
    shard_rows: int = 8,
    longest: int = 12,
    top_k: int = 8,
    temperatures: tuple[float, ...] = (2.0,),
    codec: str = "fp16",
    seed: int = 0,
) -> ToyCaches:
    """Finished caches below `folder`: text of the first teacher (by default one teacher, `toy`) and exact signals."""
    teachers = dict(teachers or {"toy": Bigram.random(seed=seed)})
    first = next(iter(teachers.values()))
    vocab_size = first.vocab_size
    inputs = Store(folder / "inputs-toy")
    rows: dict[str, list[InputRow]] = {"train": [], "held_out": []}
    shards: list[tuple[str, list[InputRow]]] = []
    for split, count in (("train", num_rows), ("held_out", num_held_out)):
        drawn = toy_rows(first, count, longest=longest, seed=seed + (split == "held_out"), prefix=f"{split}.txt")
        for start in range(0, count, shard_rows):
            shard = sorted(drawn[start : start + shard_rows], key=lambda row: (len(row.input_ids), row.row_id))
            rows[split] += shard
            shards.append((split, shard))
    content: dict[str, JsonValue] = {
        "toy": "inputs",
        "seed": seed,
        "rows": [num_rows, num_held_out, shard_rows, longest],
    }
    records = [write_inputs(inputs, shard_name(k), shard, split=split) for k, (split, shard) in enumerate(shards)]
    facts: dict[str, JsonValue] = {
        "vocab_size": vocab_size,
        "tokenizer": "toy",
        "num_rows": {split: len(rows[split]) for split in rows},
        "num_tokens": {split: sum(len(row.input_ids) for row in rows[split]) for split in rows},
        "num_targets": {split: sum(int(row.target.sum()) for row in rows[split]) for split in rows},
    }
    parent = _finish(inputs, "inputs", content, None, INPUT_FIELDS, facts, records)
    signals = {}
    for name, bigram in teachers.items():
        signals[name] = Store(folder / f"{name}-toy")
        records = [
            write_signal(
                signals[name],
                shard_name(k),
                signal_shard(bigram, shard, top_k=top_k, temperatures=temperatures),
                codec_for(codec, vocab_size=vocab_size),
                split=split,
                vocab_size=vocab_size,
            )
            for k, (split, shard) in enumerate(shards)
        ]
        facts = {
            "vocab_size": vocab_size,
            "head_rows": vocab_size,
            "top_k": top_k,
            "temperatures": list(temperatures),
            "estimator": "top_k",
            "samples": 0,
            "sample_seed": 0,
            "codec": codec,
            "tokenizer": "toy",
        }
        content = {"toy": name, "inputs": parent, "top_k": top_k, "temperatures": list(temperatures), "codec": codec}
        _finish(signals[name], "signal", content, parent, TOP_K_FIELDS, facts, records)
    return ToyCaches(inputs, signals, teachers, rows)


def signal_shard(bigram: Bigram, rows: Sequence[InputRow], *, top_k: int, temperatures: Sequence[float]) -> SignalShard:
    """The exact signal of some rows, as it is written."""
    found = [bigram.top_k_signal(row, top_k, temperatures) for row in rows]
    return SignalShard(
        row_ids=[row.row_id for row in rows],
        tokens_sha=[tokens_sha(row.input_ids) for row in rows],
        num_targets=np.array([row.target.sum() for row in rows], np.int32),
        fields={name: np.concatenate([fields[name] for fields in found]) for name in TOP_K_FIELDS},
    )


def _finish(
    store: Store,
    kind: Literal["inputs", "signal"],
    content: dict[str, JsonValue],
    parent: str | None,
    fields: Schema,
    facts: dict[str, JsonValue],
    records: list[ShardRecord],
) -> str:
    for record in records:
        publish_record(store, record)
    manifest = Manifest(
        kind=kind,
        content=content,
        fingerprint=fingerprint_of(content),
        parent=parent,
        fields=field_records(fields),
        facts=facts,
        shards=tuple(records),
    )
    store.publish("manifest.json", manifest.model_dump_json(indent=1) + "\n")
    return manifest.fingerprint


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _logsumexp(x)[:, None]


def _logsumexp(x: np.ndarray) -> np.ndarray:
    """log Σ exp over the last axis; -inf where that axis is empty."""
    if x.shape[-1] == 0:
        return np.full(x.shape[:-1], -np.inf)
    top = x.max(axis=-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))[..., 0]
