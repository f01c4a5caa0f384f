"""The configuration knows the names of what evaluations measure: an unknown `best_metric` is refused before a run."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest

from raydistill.config import metrics
from raydistill.config.models import DiffusersModel, TransformersModel
from raydistill.config.teachers import NoisePredictionTeacher, TopKLogitsTeacher
from raydistill.evaluate import denoiser, language
from raydistill.recipes.base import TeacherView

TOTALS = defaultdict(lambda: 1.0, bytes=1.0)


@pytest.mark.parametrize("top_k", [(), (4,), (4, 0), (0,)])
def test_names_for_language_models_are_those_that_are_measured(top_k: tuple[int, ...]) -> None:
    model = TransformersModel(library="transformers", source="x")
    teachers = [
        TopKLogitsTeacher(name=f"t{i}", model=model, top_k=k, estimator={"kind": "head_tail_sample"})
        for i, k in enumerate(top_k)
    ]
    views = [TeacherView(t.name, 1.0, {"top_k": t.top_k}) for t in teachers]
    assert set(metrics.language_metrics(teachers)) == set(language.language_metrics(TOTALS, views))


@pytest.mark.parametrize(("names", "averaged"), [((), False), (("a",), False), (("a", "b"), False), (("a", "b"), True)])
def test_names_for_denoisers_are_those_that_are_measured(names: tuple[str, ...], averaged: bool) -> None:
    model = DiffusersModel(library="diffusers", source="x")
    teachers = [NoisePredictionTeacher(signal="noise_prediction", name=n, model=model) for n in names]
    views = () if averaged else tuple(TeacherView(n, 1.0, {}) for n in names)
    rows = denoiser.HeldOutDraws(
        SimpleNamespace(), (), views, averaged, "epsilon", SimpleNamespace(), bins=2, batch_rows=1
    )
    assert set(metrics.denoiser_metrics(teachers, averaged=averaged)) == set(denoiser.denoiser_metrics(TOTALS, rows))
