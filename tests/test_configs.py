"""Every configuration that is shipped loads, and the editors' schema accepts it."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from raydistill.config.docs import json_schema
from raydistill.run import main

ROOT = Path(__file__).parents[1]
RUNS = [p for p in sorted(ROOT.glob("configs/**/*.yaml")) if "size" not in p.relative_to(ROOT).parts]
PARTS = sorted(ROOT.glob("configs/size/*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_it_passes_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", [*RUNS, *PARTS], ids=name)
def test_the_editors_schema_accepts_it(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


@pytest.mark.slow  # 14 billion parameters take a while even without memory
def test_the_shipped_projection_of_wan_accounts_for_every_number_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["configs/wan_lite_projection.yaml", "configs/size/wan_architecture.yaml", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "parameters  14.3 B" in said
    assert "parameters   282 M" in said
    assert "wan_a14b: 100.0% of its parameters, 16 of 40 blocks" in said
    assert "at random" not in said
    assert "16 × 64 × 64" in said
    assert "taken to be 512 tokens" in said
