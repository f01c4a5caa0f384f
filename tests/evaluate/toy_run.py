"""A configuration over toy caches, for the tests of evaluation and export."""

from __future__ import annotations

from pathlib import Path

from toys import Bigram, ToyCaches, write_toy_caches

from raydistill.config.schema import RunConfig
from raydistill.evaluate.language import HeldOut, open_held_out


def toy_config(folder: Path, **evaluate: object) -> RunConfig:
    """Teacher `toy` and a student, both bigram models of 64 ids."""
    return RunConfig.model_validate(
        {
            "name": "toy",
            "run_dir": str(folder / "run"),
            "cache": {"dir": str(folder)},
            "source": {"paths": ["toy.txt"], "tokenizer": str(folder / "tokenizer"), "seq_len": 12},
            "teachers": [{"name": "toy", "top_k": 8, "model": _bigram(seed=0)}],
            "student": {"model": _bigram(seed=1)},
            "phases": [
                {
                    "name": "only",
                    "steps": 2,
                    "batch": {"global_size": 4, "micro_size": 4},
                    "optimizer": {"student": {"lr": 1e-3}},
                }
            ],
            "evaluate": evaluate,
        }
    )


def _bigram(*, seed: int) -> dict[str, object]:
    source = {"library": "python", "source": "toys:bigram_teacher", "dtype": "float32"}
    return {**source, "arguments": {"seed": seed}}


def toy_held_out(
    folder: Path, *, top_k: int = 8, teachers: dict[str, Bigram] | None = None
) -> tuple[ToyCaches, HeldOut]:
    """Toy caches and the held-out rows opened over them."""
    caches = write_toy_caches(folder, top_k=top_k, num_held_out=11, teachers=teachers)
    config = toy_config(folder)
    if teachers:
        weights = {name: 1.0 + i for i, name in enumerate(teachers)}
        sections = [config.teachers[0].model_copy(update={"name": n, "weight": w}) for n, w in weights.items()]
        config = config.model_copy(update={"teachers": tuple(sections)})
    signals = {name: store.uri for name, store in caches.signals.items()}
    return caches, open_held_out(config, inputs=caches.inputs.uri, signals=signals)
