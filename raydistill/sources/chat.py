"""Conversations as text, with the parts that the assistant wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raydistill.errors import DataError
from raydistill.sources.records import Message

Span = tuple[int, int]


def rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, assistant: str = "assistant"
) -> tuple[str, list[Span]]:
    """The conversation as the chat template writes it, and the character spans of the assistant's own words.

    A template with `{% generation %}` marks them itself. Otherwise the text up to each answer is rendered twice: with
    the generation prompt, and with the answer. What the second adds is the answer with its end-of-turn token, less
    white space behind it. That needs a template which only ever appends; `DataError` when it does not.
    """
    template = tokenizer.get_chat_template()
    if "generation %}" in template or "generation -%}" in template:
        render_marked = cast(Callable[..., tuple[list[str], list[list[Span]]]], render_jinja_template)
        texts, spans = render_marked(
            conversations=[list(messages)], chat_template=template, return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
        return texts[0], spans[0]

    def render(count: int, *, prompt: bool = False) -> str:
        conversation = cast("list[dict[str, str]]", list(messages[:count]))
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt))

    whole = render(len(messages))
    found: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != assistant:
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                f"the chat template rewrites earlier text when message {index} (of the assistant) is added, so its "
                "tokens cannot be told from the others. Use a tokenizer folder whose chat template marks them with "
                "{% generation %} … {% endgeneration %}, or conversations with a single answer at the end."
            )
        found.append((len(before), len(after.rstrip())))
    return whole, found


def require_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise `DataError` unless the tokenizer has a chat template and knows which characters a token stands for."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} holds a conversation, but the tokenizer {tokenizer.name_or_path} has no chat template; use the "
            "tokenizer of a chat model, or a text column"
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"{where} holds a conversation, but {type(tokenizer).__name__} does not say where a token stands; "
            "use a tokenizer with a tokenizer.json"
        )


RENDER_ERRORS = (TemplateError, ValueError, TypeError, KeyError)
"""What a template raises for a conversation that it does not accept."""
