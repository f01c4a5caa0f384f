"""Models that do not speak the tokenizer's ids are refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import save_model, tiny_llama, tiny_tokenizer

from raydistill.config.schema import RunConfig
from raydistill.errors import ConfigError, DataError
from raydistill.models.agreement import check_vocabularies


def config(tokenizer: Path, teacher: Path, student: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "source": {"kind": "text", "paths": ["a.txt"], "tokenizer": str(tokenizer), "seq_len": 8},
            "teachers": [{"name": "toy", "model": {"library": "transformers", "source": str(teacher)}}],
            "student": {"model": {"library": "transformers", "source": str(student)}},
            "phases": [
                {
                    "name": "a",
                    "steps": 1,
                    "batch": {"global_size": 1, "micro_size": 1},
                    "optimizer": {"student": {"lr": 1}},
                }
            ],
        }
    )


def test_student_with_fewer_ids_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    large, small = save_model(tiny_llama(), tmp_path / "large"), save_model(tiny_llama(50), tmp_path / "small")
    check_vocabularies(config(large, large, large))
    with pytest.raises(ConfigError, match=r"student\.model .* knows 50 ids, source\.tokenizer .* has 97"):
        check_vocabularies(config(large, large, small))


def test_teacher_with_other_tokens_under_the_same_ids_is_refused(tmp_path: Path) -> None:
    ours = save_model(tiny_llama(), tmp_path / "ours")
    theirs = save_model(tiny_llama(), tmp_path / "theirs", tiny_tokenizer())
    file = theirs / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(stored))
    with pytest.raises(DataError, match="2 ids differ"):
        check_vocabularies(config(ours, theirs, ours))
