from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from raydistill.config import docs
from raydistill.config.docs import json_schema, main, markdown

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_committed_files_are_what_the_schema_says() -> None:
    assert main(["--compare"]) == 0


def test_compare_fails_when_a_file_differs_and_writing_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "FOLDER", tmp_path)
    assert main(["--compare"]) == 1
    assert "configuration.md is not what the schema says" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--compare"]) == 0
    (tmp_path / "configuration.md").write_text("old")
    assert main(["--compare"]) == 1


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


VALID = """
name: toy
run_dir: runs/${name}
phases:
  - name: one
    recipe: {kind: lm_logits, alpha: 0.5}
    batch: {global_size: 8, micro_size: "${phases.0.batch.global_size}"}
  - {name: two, recipe: "${phases.0.recipe}"}
student: {init: {kind: layers, num_layers: 2}, model: {source: x}}
phases.0.batch.micro_size: 8
evaluate: {every_steps: null}
"""


def test_editors_accept_partial_files_interpolations_and_dotted_keys() -> None:
    VALIDATOR.validate(yaml.safe_load(VALID))


@pytest.mark.parametrize(
    "text", ["nmae: x", "phases: [{batch: {micro: 8}}]", "seed: many", "student: {init: {kind: x}}"]
)
def test_editors_refuse_misspelt_keys_and_wrong_types(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(yaml.safe_load(text))
