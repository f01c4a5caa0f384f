"""The recipe on teachers and students whose losses are known exactly."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from collate import collate
from toys import Bigram, bigram_model, tiny_llama, tiny_qwen3_moe

from raydistill.config.models import PythonModel
from raydistill.config.recipes import LmLogitsRecipe, RecipeConfig
from raydistill.config.teachers import HeadTailSample
from raydistill.config.teachers import TopKLogitsTeacher as TeacherSection
from raydistill.errors import ConfigError
from raydistill.recipes import RECIPES
from raydistill.recipes.base import TeacherView
from raydistill.recipes.lm_logits import LmLogits
from raydistill.signals import Draws
from raydistill.teachers.logits import TopKLogitsTeacher

VOCAB = 64
RNG = Draws(seed=0, phase="p", step=0, positions=(0,))
BIGRAM, OTHER = Bigram.random(VOCAB, seed=1), Bigram.random(VOCAB, seed=2)


def _tokens(count, seed=0):
    return BIGRAM.sample(count, np.random.default_rng(seed)).tolist()


def _taught(batch, vocab_size=VOCAB, *, weights=None, tokenizer="toy", **teachers):
    """(batch with the signals of these models, their views); a teacher is a model or (model, settings)."""
    batch, views = dict(batch), {}
    for name, model in teachers.items():
        model, settings = model if isinstance(model, tuple) else (model, {})
        source = PythonModel(library="python", source="toys:bigram_teacher", dtype="float32")
        section = TeacherSection(**{"name": name, "model": source, "top_k": 8, **settings})
        teacher = TopKLogitsTeacher(section, model, vocab_size)
        batch |= {f"{name}/{field}": tensor for field, tensor in teacher(batch).items()}
        weight = (weights or {}).get(name, 1 / len(teachers))
        views[name] = TeacherView(name, weight, {**teacher.facts, "tokenizer": tokenizer})
    return batch, views


def _parts(recipe, batch):
    return recipe.loss("student", batch, RNG).parts


def _total(recipe, batch):
    """The loss as the training loop forms it."""
    counts = recipe.counts(batch)
    parts = _parts(recipe, batch).values()
    return sum(p.weight * p.sum / (counts[p.count] if p.count else 1) for p in parts if p.weight)


def _gradients(recipe, batch):
    loss = _total(recipe, batch)
    names, parameters = zip(*recipe.student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_a_student_equal_to_its_teacher_loses_only_the_entropy_of_the_text():
    batch, views = _taught(collate(_tokens(12), [_tokens(5, 1), _tokens(4, 2)]), toy=bigram_model(BIGRAM))
    for temperature in (1.0, 2.0):
        for mode in ("coarse", "exact"):
            config = LmLogitsRecipe(alpha=0.5, temperature=temperature, temperature_mode=mode)
            parts = _parts(LmLogits(config, bigram_model(BIGRAM), views), batch)
            assert abs(parts["kd"].sum) < 1e-4  # stored in fp16
            at = batch["target"]
            exact = -BIGRAM.log_p[batch["input_ids"][at], batch["labels"][at]].sum()
            assert float(parts["ce"].sum) == pytest.approx(exact, rel=1e-5)
            assert parts["agreement/toy"].sum == at.sum()


def test_cached_divergence_is_the_known_kl_of_two_tables():
    batch, views = _taught(collate(_tokens(40)), toy=(bigram_model(BIGRAM), {"top_k": VOCAB}))
    recipe = LmLogits(LmLogitsRecipe(alpha=1.0), bigram_model(OTHER), views)
    rows = batch["input_ids"][batch["target"]]
    exact = (np.exp(BIGRAM.log_p) * (BIGRAM.log_p - OTHER.log_p)).sum(1)[rows].sum()
    assert float(_parts(recipe, batch)["kd"].sum.detach()) == pytest.approx(exact, rel=1e-3)


def test_shifting_the_signal_by_one_token_is_seen():
    batch, views = _taught(collate(_tokens(12)), toy=bigram_model(BIGRAM))
    for name in list(batch):
        if name.startswith("toy/"):
            batch[name] = batch[name].roll(1, dims=1)
    parts = _parts(LmLogits(LmLogitsRecipe(alpha=0.5), bigram_model(BIGRAM), views), batch)
    assert parts["kd"].sum > 1.0


def test_training_on_the_cache_reaches_the_teachers_table():
    batch, views = _taught(collate(*([[*range(i, VOCAB), 0] for i in (0, 1)])), toy=bigram_model(BIGRAM))
    student = bigram_model(OTHER)
    recipe = LmLogits(LmLogitsRecipe(alpha=1.0), student, views)
    optimizer = torch.optim.Adam([student.lm_head.weight], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = _total(recipe, batch)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    learned = student(input_ids=batch["input_ids"]).logits[0, 1].log_softmax(-1).double().detach().numpy()
    top = np.argsort(-BIGRAM.log_p[1])[:8]
    np.testing.assert_allclose(np.exp(learned[top]), np.exp(BIGRAM.log_p[1][top]), atol=5e-3)


def test_logged_loss_is_the_optimised_loss():
    batch, views = _taught(
        collate(_tokens(12)), a=bigram_model(BIGRAM), b=bigram_model(OTHER), weights={"a": 0.25, "b": 0.75}
    )
    recipe = LmLogits(LmLogitsRecipe(alpha=0.3, temperature=2.0), tiny_llama(VOCAB), views)
    sums = {name: part.sum.detach() for name, part in _parts(recipe, batch).items()}
    torch.testing.assert_close(sums["kd"], 0.25 * sums["kd/a"] + 0.75 * sums["kd/b"])
    torch.testing.assert_close(sums["blend"], 0.7 * sums["ce"] + 0.3 * sums["kd"])
    tokens = recipe.counts(batch)["tokens"]
    torch.testing.assert_close(_total(recipe, batch).detach(), sums["blend"] / tokens)


def test_two_teachers_of_half_weight_that_agree_are_one_teacher():
    inputs = collate(_tokens(12))
    one, one_view = _taught(inputs, a=bigram_model(BIGRAM))
    two, two_views = _taught(inputs, a=bigram_model(BIGRAM), b=bigram_model(BIGRAM))
    config = LmLogitsRecipe(alpha=0.6, temperature=2.0)
    student = tiny_llama(VOCAB)
    torch.testing.assert_close(
        _gradients(LmLogits(config, student, two_views), two), _gradients(LmLogits(config, student, one_view), one)
    )


def test_a_teacher_of_weight_zero_is_not_read():
    batch, views = _taught(
        collate(_tokens(9)), a=bigram_model(BIGRAM), b=bigram_model(OTHER), weights={"a": 1.0, "b": 0.0}
    )
    recipe = LmLogits(LmLogitsRecipe(), bigram_model(OTHER), views)
    assert set(recipe.reads) == {"a"}
    assert "kd/b" not in _parts(recipe, batch)


def test_gradients_do_not_depend_on_padding_packing_chunks_or_the_split_into_micro_batches():
    documents = [_tokens(9), _tokens(5, 1), _tokens(6, 2)]
    student, teacher = tiny_llama(VOCAB), tiny_llama(VOCAB, seed=5)

    def gradients(*batches, chunk_tokens=1024):
        """Sums over micro-batches divided by the count of the whole step."""
        config = LmLogitsRecipe(alpha=0.7, temperature=2.0, chunk_tokens=chunk_tokens)
        total, count = 0.0, 0.0
        for inputs in batches:
            batch, views = _taught(inputs, toy=teacher)
            recipe = LmLogits(config, student, views)
            total = total + _parts(recipe, batch)["blend"].sum
            count += recipe.counts(batch)["tokens"]
        return torch.autograd.grad(total / count, list(student.parameters()))

    whole = gradients(collate(*documents))
    for other in (
        gradients(collate(*documents, length=20)),
        gradients(collate(documents)),
        gradients(collate(*documents), chunk_tokens=3),
        gradients(*(collate(d) for d in documents)),
        gradients(collate(documents[0], documents[2]), collate(documents[1])),
    ):
        for a, b in zip(other, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


def test_without_any_target_everything_is_zero():
    batch, views = _taught(collate(_tokens(5)), toy=bigram_model(BIGRAM))
    batch["target"] = torch.zeros_like(batch["target"])
    student = tiny_llama(VOCAB)
    recipe = LmLogits(LmLogitsRecipe(), student, views)
    assert recipe.counts(batch) == {"tokens": 0.0}
    parts = _parts(recipe, batch)
    assert all(part.sum == 0 for part in parts.values())
    gradients = torch.autograd.grad(parts["blend"].sum, list(student.parameters()))
    assert all(g.abs().sum() == 0 for g in gradients)


def test_targets_that_are_masked_out_change_nothing():
    inputs = collate(_tokens(12))
    inputs["target"][0, 3:6] = False
    batch, views = _taught(inputs, toy=bigram_model(BIGRAM))
    recipe = LmLogits(LmLogitsRecipe(alpha=0.5), bigram_model(OTHER), views)
    before = _total(recipe, batch)
    batch["labels"][0, 3:6] = 7
    batch["toy/ids"][0, 3:6] = 9
    torch.testing.assert_close(_total(recipe, batch), before)
    assert recipe.counts(batch) == {"tokens": 8.0}


def test_plain_cross_entropy_reads_no_signal_and_is_transformers_own_loss():
    batch, views = _taught(collate(_tokens(12)), toy=bigram_model(BIGRAM))
    inputs = {k: v for k, v in batch.items() if "/" not in k}
    student = tiny_llama(VOCAB)
    recipe = LmLogits(LmLogitsRecipe(alpha=0.0), student, views)
    assert recipe.reads == {}
    ours = _total(recipe, inputs)
    theirs = student(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(_total(LmLogits(LmLogitsRecipe(alpha=0.0), student, {}), inputs), theirs)


def test_router_loss_is_added_as_transformers_adds_it():
    student = tiny_qwen3_moe(VOCAB)
    inputs = collate(_tokens(12))
    recipe = LmLogits(LmLogitsRecipe(alpha=0.0), student, {})
    theirs = student(input_ids=inputs["input_ids"], labels=inputs["input_ids"], output_router_logits=True)
    part = _parts(recipe, inputs)["router_aux"]
    assert part.count is None
    assert part.weight == student.config.router_aux_loss_coef > 0
    torch.testing.assert_close(part.sum, theirs.aux_loss)
    torch.testing.assert_close(_total(recipe, inputs), theirs.loss)
    gate = student.model.layers[0].mlp.gate.weight
    ours, own = (torch.autograd.grad(x, gate)[0] for x in (_total(recipe, inputs), theirs.loss))
    torch.testing.assert_close(ours, own)


def test_router_weight_can_be_set_or_turned_off():
    inputs = collate(_tokens(8))
    off = LmLogits(LmLogitsRecipe(alpha=0.0, router_aux_weight=0.0), tiny_qwen3_moe(VOCAB), {})
    assert "router_aux" not in _parts(off, inputs)
    strong = LmLogits(LmLogitsRecipe(alpha=0.0, router_aux_weight=0.5), tiny_qwen3_moe(VOCAB), {})
    assert _parts(strong, inputs)["router_aux"].weight == 0.5
    dense = LmLogits(LmLogitsRecipe(alpha=0.0, router_aux_weight=0.5), tiny_llama(VOCAB), {})
    assert "router_aux" not in _parts(dense, inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_student_with_padded_rows_is_normalised_over_the_real_ids(tied):
    student = tiny_llama(VOCAB + 9, tied=tied)
    batch, views = _taught(collate(_tokens(12)), toy=bigram_model(BIGRAM))
    recipe = LmLogits(LmLogitsRecipe(alpha=0.5), student, views)
    logits = student(input_ids=batch["input_ids"]).logits[..., :VOCAB][batch["target"]]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][batch["target"]], reduction="sum")
    torch.testing.assert_close(_parts(recipe, batch)["ce"].sum, expected.detach())
    if not tied:
        assert _gradients(recipe, batch)["lm_head.weight"][VOCAB:].abs().max() == 0


@pytest.mark.parametrize(("mode", "temperature"), [("coarse", 1.0), ("exact", 2.0)])
def test_sampled_gradient_is_unbiased(mode, temperature):
    """The mean over many seeds approaches the gradient of the full KL, which K = V gives exactly."""
    inputs = collate([10, 20, 30, 11])
    student, config = bigram_model(OTHER), LmLogitsRecipe(alpha=1.0, temperature=temperature, temperature_mode=mode)
    full, views = _taught(inputs, toy=(bigram_model(BIGRAM), {"top_k": VOCAB}))
    recipe = LmLogits(config, student, views)
    head = student.lm_head.weight
    exact = torch.autograd.grad(_total(recipe, full), head)[0]
    runs, mean, single = 150, torch.zeros_like(exact), 0.0
    for seed in range(runs):
        estimator = HeadTailSample(kind="head_tail_sample", samples=8, seed=seed)
        batch, views = _taught(inputs, toy=(bigram_model(BIGRAM), {"top_k": 4, "estimator": estimator}))
        gradient = torch.autograd.grad(_total(LmLogits(config, student, views), batch), head)[0]
        mean += gradient / runs
        single += float((gradient - exact).norm()) / runs
    assert single > 0.02 * exact.norm(), "one draw is noisy, else this test shows nothing"
    assert (mean - exact).norm() < 2 * single / math.sqrt(runs)


def test_reads_only_the_fields_it_uses():
    _, views = _taught(collate(_tokens(5)), toy=bigram_model(BIGRAM))
    _, sampled = _taught(
        collate(_tokens(5)), toy=(bigram_model(BIGRAM), {"estimator": HeadTailSample(kind="head_tail_sample")})
    )
    student = bigram_model(OTHER)

    def reads(views, **settings):
        return set(LmLogits(LmLogitsRecipe(**settings), student, views).reads.get("toy", ()))

    assert reads(views) == {"ids", "logp", "log_tail"}
    assert reads(views, temperature=2.0, temperature_mode="exact") == {"ids", "logp", "psi"}
    assert reads(views, tail="renormalise") == {"ids", "logp"}
    assert reads(sampled) == {"ids", "logp", "log_tail", "tail_ids", "tail_counts", "tail_logp"}
    assert reads(sampled, temperature=2.0, temperature_mode="exact") == reads(sampled) | {"psi"}
    assert reads(views, alpha=0.0) == set()


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"top_k": 9}, {}, r"top_k 9 .* toy holds \(8\)"),
        ({"temperature": 3.0, "temperature_mode": "exact"}, {}, r"T = 3.0 .*grid \[2.0, 4.0\]"),
        ({}, {"vocab_size": VOCAB + 1}, "65 ids.*64 rows"),
        ({"divergence": "jsd"}, {"estimator": "head_tail_sample"}, "divergence jsd"),
        ({"temperature": 2.0}, {"estimator": "head_tail_sample"}, "coarse temperature 2.0"),
        ({"tail": "renormalise"}, {"estimator": "head_tail_sample"}, "tail renormalise"),
        ({"top_k": 4}, {"estimator": "head_tail_sample"}, "top_k 4"),
    ],
)
def test_settings_that_the_cache_cannot_serve_are_refused(settings, facts, message):
    _, views = _taught(collate(_tokens(5)), toy=bigram_model(BIGRAM))
    view = TeacherView("toy", 1.0, {**views["toy"].facts, **facts})
    with pytest.raises(ConfigError, match=message):
        LmLogits(LmLogitsRecipe(**settings), bigram_model(OTHER), {"toy": view})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer", "else", "one tokenizer"),
        ("vocab_size", 60, "one vocabulary size"),
        ("estimator", "x", "estimator"),
    ],
)
def test_teachers_that_do_not_belong_together_are_refused(key, value, message):
    _, views = _taught(collate(_tokens(5)), a=bigram_model(BIGRAM), b=bigram_model(OTHER))
    views["b"] = TeacherView("b", 0.5, {**views["b"].facts, key: value})
    with pytest.raises(ConfigError, match=message):
        LmLogits(LmLogitsRecipe(), bigram_model(OTHER), views)


def test_a_share_for_teachers_without_any_teacher_is_refused():
    with pytest.raises(ConfigError, match="wants a teacher"):
        LmLogits(LmLogitsRecipe(alpha=0.5), bigram_model(OTHER), {})


def test_something_else_than_a_language_model_is_refused():
    with pytest.raises(ConfigError, match="found Linear"):
        LmLogits(LmLogitsRecipe(alpha=0.0), torch.nn.Linear(2, 2), {})


def test_every_recipe_section_has_its_recipe():
    assert set(RECIPES) == set(get_args(get_args(RecipeConfig)[0]))
