"""Greedy continuations of the same prompts by every model, for people to read.

samples.json: `{"tokens": n, "samples": [{"prompt": text, "reference": text | null, "outputs": {role: text}}]}`, where
`reference` is how the held-out row really goes on, and the roles are those of metrics.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raydistill.cache.read import Dataset
from raydistill.config.schema import RunConfig
from raydistill.signals import JsonValue

NUM_PROMPTS = 4
PROMPT_TOKENS = 24
"""Length of a prompt that is taken from a held-out row."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a text and, where it is known, how it goes on."""

    input_ids: tuple[int, ...]
    text: str
    reference: str | None = None


@dataclass
class Samples:
    """Continuations by role, filled model by model."""

    prompts: Sequence[Prompt]
    num_tokens: int
    outputs: dict[str, list[str]] = field(default_factory=dict)

    def add(self, role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let `model` continue every prompt."""
        self.outputs[role] = [continue_greedily(model, tokenizer, p.input_ids, self.num_tokens) for p in self.prompts]

    def as_json(self) -> dict[str, JsonValue]:
        """The content of samples.json."""
        samples: list[JsonValue] = [
            {
                "prompt": prompt.text,
                "reference": prompt.reference,
                "outputs": {role: texts[i] for role, texts in self.outputs.items()},
            }
            for i, prompt in enumerate(self.prompts)
        ]
        return {"tokens": self.num_tokens, "samples": samples}


def choose_prompts(config: RunConfig, held_out: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """`evaluate.prompts`, or the beginnings of a few held-out rows spread over the data."""
    if config.evaluate.prompts:
        bos = [tokenizer.bos_token_id] if config.text.add_bos and tokenizer.bos_token_id is not None else []
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in config.evaluate.prompts]
        return [Prompt((*bos, *ids), text) for ids, text in zip(encoded, config.evaluate.prompts, strict=True)]
    long = [i for i, n in enumerate(held_out.num_tokens) if n > PROMPT_TOKENS] or list(range(held_out.num_rows))
    chosen = [long[i * len(long) // NUM_PROMPTS] for i in range(min(NUM_PROMPTS, len(long)))]
    return [_beginning(held_out, row, tokenizer, config.evaluate.sample_tokens) for row in dict.fromkeys(chosen)]


def _beginning(held_out: Dataset, row: int, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Prompt:
    batch = held_out.batch([row])
    positions = batch["position_ids"][0][batch["valid"][0]]
    starts = (positions == 0).nonzero()[:, 0].tolist()
    ids: list[int] = batch["input_ids"][0][: starts[1] if len(starts) > 1 else len(positions)].tolist()
    cut = min(PROMPT_TOKENS, max(1, len(ids) // 2))
    before, after = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:cut], ids[cut:][:num_tokens])
    )
    return Prompt(tuple(ids[:cut]), before, after or None)


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], num_tokens: int
) -> str:
    """At most `num_tokens` most probable tokens after `input_ids`, as text; stops at the end-of-text token."""
    ids = torch.tensor([list(input_ids)], device=model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    # The model's own settings fill what is not set here (sampling, penalties), so they have to step aside.
    own, model.generation_config = model.generation_config, settings
    generate = cast("Callable[..., Tensor]", model.generate)
    output = generate(ids, attention_mask=torch.ones_like(ids))
    model.generation_config = own
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
