"""Conversations: the loss is on what the assistant wrote and on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import AddedToken
from toys import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from raydistill.config.sources import TextSource
from raydistill.errors import DataError
from raydistill.sources.chat import rendered
from raydistill.sources.text import TextRow, rows, units

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # like templates that drop the thoughts of earlier answers
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}(thinks) {% endif %}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": " Yes. "},
]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = template
    return tokenizer


def talk_rows(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *talks: list[dict[str, str]],
    dropped: Counter[str] | None = None,
    **settings: object,
) -> list[TextRow]:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    config = TextSource.model_validate({"paths": [str(path)], "tokenizer": "none", "seq_len": 256, **settings})
    return [row for unit in units(config) for row in rows(unit, config, tokenizer, 0.0, dropped)]


def learnt(row: TextRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of tokens that are targets, as text."""
    runs, current = [], ""
    for token, target in zip(row.input_ids[1:], row.target[:-1], strict=True):
        current += tokenizer.decode([token]) if target else ""
        if not target and current:
            runs.append(current)
            current = ""
    return [*runs, current] if current else runs


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_loss_is_on_the_answers_and_their_ends(tmp_path: Path, template: str) -> None:
    tokenizer = chat_tokenizer(template)
    (row,) = talk_rows(tmp_path, tokenizer, TALK)
    assert learnt(row, tokenizer) == ["4<|im_end|>", " Yes. <|im_end|>"]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert row.text_bytes == len("4<|im_end|> Yes. <|im_end|>")


def test_generation_tags_give_the_mask_of_transformers(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(MARKED)
    (row,) = talk_rows(tmp_path, tokenizer, TALK)
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert row.input_ids.tolist() == theirs["input_ids"]
    assert [*row.target[:-1].astype(int)] == theirs["assistant_masks"][1:]


def test_both_kinds_of_template_find_the_same_spans() -> None:
    assert rendered(TALK, chat_tokenizer(CHATML)) == rendered(TALK, chat_tokenizer(MARKED))


def test_a_template_that_rewrites_earlier_turns_is_refused_but_works_for_one_answer(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    with pytest.raises(DataError, match=r"talks\.jsonl#0: the chat template rewrites earlier text when message 2"):
        talk_rows(tmp_path, tokenizer, TALK)
    (row,) = talk_rows(tmp_path, tokenizer, TALK[:3])
    assert learnt(row, tokenizer) == ["(thinks) 4"]


def test_a_conversation_without_an_answer_is_dropped_and_counted(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    assert len(talk_rows(tmp_path, chat_tokenizer(CHATML), TALK[:2], TALK, [], dropped=dropped)) == 1
    assert dropped == Counter(no_target=1, empty=1)


def test_no_other_beginning_or_end_is_added_to_what_the_template_writes(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    (row,) = talk_rows(tmp_path, tokenizer, TALK, add_bos=True, add_eos=True)
    assert tokenizer.bos_token_id not in row.input_ids


def test_conversations_are_packed_without_learning_across_their_borders(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    (row,) = talk_rows(tmp_path, tokenizer, TALK[:3], TALK[:3], packing=True)
    assert len(row.segments) == 2
    assert learnt(row, tokenizer) == ["4<|im_end|>", "4<|im_end|>"]


def test_a_tokenizer_without_a_template_cannot_read_conversations(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"talks\.jsonl#0 holds a conversation, but the tokenizer .* has no chat template"
    ):
        talk_rows(tmp_path, chat_tokenizer(None), TALK)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"talks\.jsonl#1: the chat template does not accept .* begin with the user"):
        talk_rows(tmp_path, chat_tokenizer(strict), TALK[1:], TALK)
