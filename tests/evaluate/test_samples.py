from __future__ import annotations

from pathlib import Path

import torch
from toy_run import toy_config, toy_held_out
from toys import tiny_llama, tiny_tokenizer

from raydistill.evaluate.samples import Samples, choose_prompts, continue_greedily


def test_a_continuation_is_the_most_probable_token_again_and_again() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.do_sample = True  # must not be listened to
    model.generation_config.repetition_penalty = 5.0
    ids = [0, 40, 41]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[3 : ids.index(1, 3) if 1 in ids[3:] else None], skip_special_tokens=True)
    assert continue_greedily(model, tokenizer, [0, 40, 41], 6) == expected


def test_prompts_of_the_configuration_begin_like_the_training_rows(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path)
    prompts = choose_prompts(toy_config(tmp_path, prompts=["ab", "c"]), rows.dataset, tiny_tokenizer())
    assert [p.text for p in prompts] == ["ab", "c"]
    assert [p.input_ids[0] for p in prompts] == [0, 0]  # <|begin|>
    assert prompts[0].reference is None


def test_prompts_from_held_out_rows_go_on_as_the_row_does_and_stay_in_its_first_document(tmp_path: Path) -> None:
    caches, rows = toy_held_out(tmp_path)
    tokenizer = tiny_tokenizer()
    prompts = choose_prompts(toy_config(tmp_path), rows.dataset, tokenizer)
    assert len(prompts) == 4
    firsts = [row.input_ids[: row.segments[0]].tolist() for row in caches.rows["held_out"]]
    for prompt in prompts:
        whole = [ids for ids in firsts if tuple(ids[: len(prompt.input_ids)]) == prompt.input_ids]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
        assert prompt.text + (prompt.reference or "") in texts


def test_outputs_stand_beside_their_prompt(tmp_path: Path) -> None:
    _, rows = toy_held_out(tmp_path)
    tokenizer = tiny_tokenizer()
    samples = Samples(choose_prompts(toy_config(tmp_path, prompts=["ab", "c"]), rows.dataset, tokenizer), 3)
    for role, seed in (("teacher", 0), ("student", 1)):
        samples.add(role, tiny_llama(seed=seed), tokenizer)
    content = samples.as_json()
    assert content["tokens"] == 3
    second = content["samples"][1]
    assert second["prompt"] == "c"
    ids = [0, *tokenizer("c")["input_ids"]]
    assert second["outputs"]["student"] == continue_greedily(tiny_llama(seed=1), tokenizer, ids, 3)
