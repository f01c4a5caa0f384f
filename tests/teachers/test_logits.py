"""The top_k_logits teacher against a bigram table whose every probability is known, and against dense formulas."""

import math

import numpy as np
import pytest
import torch
from collate import collate
from toys import Bigram, bigram_model, tiny_llama

from raydistill.config.models import PythonModel
from raydistill.config.teachers import HeadTailSample
from raydistill.config.teachers import TopKLogitsTeacher as TeacherSection
from raydistill.errors import ConfigError
from raydistill.signals import check_batch
from raydistill.teachers import build_teacher
from raydistill.teachers.logits import TopKLogitsTeacher, decode_dense, draw_tail, top_k_of_rows

VOCAB = 64
BIGRAM = Bigram.random(VOCAB, seed=3)


def _section(**settings):
    model = PythonModel(library="python", source="toys:bigram_teacher", dtype="float32")
    return TeacherSection(**{"name": "toy", "model": model, "top_k": 8, **settings})


def _tokens(count, seed=0):
    return BIGRAM.sample(count, np.random.default_rng(seed)).tolist()


def test_row_t_holds_the_distribution_of_token_t_plus_1():
    teacher = TopKLogitsTeacher(_section(temperatures=(2.0, 4.0)), bigram_model(BIGRAM), VOCAB)
    batch = collate(_tokens(9), [_tokens(4, 1), _tokens(5, 2)], _tokens(3, 3))
    signal = teacher(batch)
    check_batch(signal, teacher.schema, where="teacher")
    for row, t in batch["target"].nonzero().tolist():
        log_p = torch.from_numpy(BIGRAM.log_p[batch["input_ids"][row, t]])
        top = log_p.topk(8)
        rest = log_p.scatter(-1, top.indices, -torch.inf)
        found = {name: tensor[row, t].double() for name, tensor in signal.items()}
        assert found["ids"].tolist() == top.indices.tolist()
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(found["logp"], top.values, **close)
        torch.testing.assert_close(found["log_tail"], rest.logsumexp(-1), **close)
        torch.testing.assert_close(found["entropy"], -(log_p.exp() * log_p).sum(), **close)
        torch.testing.assert_close(found["psi"], torch.stack([(rest / T).logsumexp(-1) for T in (2.0, 4.0)]), **close)
        torch.testing.assert_close(found["label_logp"], log_p[batch["input_ids"][row, t + 1]], **close)


def test_positions_without_target_are_zero_and_a_batch_without_targets_has_the_shapes():
    teacher = TopKLogitsTeacher(_section(), bigram_model(BIGRAM), VOCAB)
    batch = collate(_tokens(5), _tokens(3, 1))
    signal = teacher(batch)
    assert all(tensor[~batch["target"]].abs().sum() == 0 for tensor in signal.values())
    batch["target"] = torch.zeros_like(batch["target"])
    empty = teacher(batch)
    assert {n: t.shape for n, t in empty.items()} == {n: t.shape for n, t in signal.items()}
    assert all(tensor.abs().sum() == 0 for tensor in empty.values())


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_chunks_padding_and_packing_do_not_change_the_signal(chunk_tokens):
    model = tiny_llama()
    teacher = TopKLogitsTeacher(_section(chunk_tokens=chunk_tokens), model, 97)
    a, b = list(range(5, 12)), list(range(30, 35))
    alone = [teacher(collate(a)), teacher(collate(b))]
    together = teacher(collate(a, b, length=11))
    packed = teacher(collate([a, b]))
    for name in teacher.schema:
        for place, length, one, row in ((0, 7, alone[0], 0), (7, 5, alone[1], 1)):
            expected = one[name][0].float()
            torch.testing.assert_close(together[name][row, :length].float(), expected, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(packed[name][0, place : place + length].float(), expected, rtol=2e-3, atol=2e-3)


def test_padded_head_rows_get_no_mass():
    model = tiny_llama(100, tied=False)
    with torch.no_grad():
        model.lm_head.weight[97:] *= 1000
    batch = collate(list(range(3, 20)))
    signal = TopKLogitsTeacher(_section(top_k=97), model, 97)(batch)
    here = batch["target"]
    assert signal["ids"].max() < 97
    torch.testing.assert_close(signal["logp"][here].float().exp().sum(-1), torch.ones(16), rtol=1e-2, atol=0)
    assert (signal["log_tail"][here] == -60).all()


def test_certain_and_impossible_tokens_stop_at_the_floor():
    model = bigram_model(Bigram(np.zeros((VOCAB, VOCAB))))
    model.lm_head.bias = torch.nn.Parameter(torch.full((VOCAB,), -torch.inf))
    with torch.no_grad():
        model.lm_head.bias[[5, 6]] = torch.tensor([0.75, 0.25]).log()
    batch = collate([1, 5, 6, 7, 5])
    signal = TopKLogitsTeacher(_section(top_k=3), model, VOCAB)(batch)
    here = batch["target"]
    assert signal["ids"][here][:, :2].tolist() == [[5, 6]] * 4
    torch.testing.assert_close(signal["logp"][here][0, :2].float().exp(), torch.tensor([0.75, 0.25]), rtol=1e-3, atol=0)
    assert (signal["logp"][here][:, 2] == -60).all()
    assert (signal["log_tail"][here] == -60).all()
    assert signal["label_logp"][here].tolist() == pytest.approx(
        [math.log(0.75), math.log(0.25), -60, math.log(0.75)], 1e-3
    )
    assert all(tensor.isfinite().all() for tensor in signal.values())


def test_full_vocabulary_decodes_to_the_table():
    batch = collate(_tokens(12))
    signal = TopKLogitsTeacher(_section(top_k=VOCAB), bigram_model(BIGRAM), VOCAB)(batch)
    dense = decode_dense(signal, VOCAB)[batch["target"]]
    expected = torch.from_numpy(np.exp(BIGRAM.log_p))[batch["input_ids"][batch["target"]]].float()
    torch.testing.assert_close(dense, expected, rtol=3e-3, atol=1e-6)


def test_decoded_tail_is_even_and_everything_sums_to_one():
    batch = collate(_tokens(12))
    signal = TopKLogitsTeacher(_section(top_k=4), bigram_model(BIGRAM), VOCAB)(batch)
    dense = decode_dense(signal, VOCAB)[batch["target"]]
    torch.testing.assert_close(dense.sum(-1), torch.ones(11), rtol=2e-3, atol=0)
    tail = dense.scatter(-1, signal["ids"][batch["target"]].long(), torch.nan)
    values = tail[0][~tail[0].isnan()]
    assert len(values) == VOCAB - 4
    assert values.std() == 0


@pytest.mark.parametrize("head_size", [0, 4])
def test_sampled_tail_is_unbiased_over_seeds(head_size):
    batch = collate([10, 20, 30])
    mean, runs = torch.zeros(2, VOCAB), 300
    model = bigram_model(BIGRAM)
    for seed in range(runs):
        section = _section(top_k=head_size, estimator=HeadTailSample(kind="head_tail_sample", samples=8, seed=seed))
        signal = TopKLogitsTeacher(section, model, VOCAB)(batch)
        mean += decode_dense(signal, VOCAB)[batch["target"]] / runs
    p = torch.from_numpy(np.exp(BIGRAM.log_p[[10, 20]])).float()
    error = (p * (1 - p) / (8 * runs)).sqrt()  # of independent draws; strata have less
    assert ((mean - p).abs() < 5 * error + 1e-3 * p).all()
    assert (mean - p).norm() < (p * (1 - p) / (8 * runs)).sum().sqrt() * 1.5


def test_draws_depend_on_row_position_and_seed_alone():
    def signal(*rows, length=None, seed=0):
        section = _section(top_k=2, estimator=HeadTailSample(kind="head_tail_sample", samples=5, seed=seed))
        return TopKLogitsTeacher(section, bigram_model(BIGRAM), VOCAB)(collate(*rows, length=length))

    a, b = _tokens(6), _tokens(9, 1)
    alone, beside = signal(a), signal(a, b, length=12)
    for name in alone:
        assert torch.equal(alone[name], beside[name][:1, :6])
    assert not torch.equal(alone["tail_ids"], signal(a, seed=1)["tail_ids"])
    constant = signal([7] * 8)
    assert len(constant["tail_ids"][0, :7].unique(dim=0)) > 1, "equal distributions at two positions are drawn apart"


def test_drawn_ids_are_unique_outside_the_head_and_count_to_the_samples():
    section = _section(top_k=3, estimator=HeadTailSample(kind="head_tail_sample", samples=40))
    batch = collate(_tokens(20))
    signal = {k: v[batch["target"]] for k, v in TopKLogitsTeacher(section, bigram_model(BIGRAM), VOCAB)(batch).items()}
    assert (signal["tail_counts"].sum(-1) == 40).all()
    for ids, head, counts, log_p, token in zip(
        signal["tail_ids"],
        signal["ids"],
        signal["tail_counts"],
        signal["tail_logp"],
        batch["input_ids"][0],
        strict=False,
    ):
        used = ids[counts > 0].tolist()
        assert len(set(used)) == len(used)
        assert not set(used) & set(head.tolist())
        exact = torch.from_numpy(BIGRAM.log_p[token][used])
        torch.testing.assert_close(log_p[counts > 0].double(), exact, rtol=1e-3, atol=1e-3)


def test_a_row_without_tail_mass_draws_nothing():
    ids, counts = draw_tail(torch.zeros(1, 9), torch.rand(1, 4, dtype=torch.float64))
    assert ids.tolist() == [[0] * 4]
    assert counts.tolist() == [[0] * 4]


def test_draws_at_the_very_end_of_the_distribution_have_mass():
    e = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    ids, counts = draw_tail(e, torch.full((1, 3), 1 - 1e-16, dtype=torch.float64))
    assert ids[counts > 0].max() == 1


@pytest.mark.parametrize(("width", "k"), [(97, 8), (1000, 8), (4103, 64), (4096, 1), (200, 200)])
def test_two_step_top_k_is_topk(width, k):
    z = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    values, ids = top_k_of_rows(z, k)
    expected = z.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_ids_beyond_131072_survive():
    model = tiny_llama(151_936, hidden=8, layers=1, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[[150_000, 70_000]] = 3.0
        model.lm_head.weight[[140_000, 66_000]] = -3.0
    batch = collate([1, 150_000, 70_000])
    signal = TopKLogitsTeacher(_section(top_k=2), model, 151_900)(batch)
    assert set(signal["ids"][0, 0].tolist()) in ({150_000, 70_000}, {140_000, 66_000})


@pytest.mark.parametrize(
    ("settings", "vocab_size", "message"),
    [
        ({"top_k": VOCAB + 1}, VOCAB, "top_k 65.*64"),
        ({}, VOCAB + 1, "65 ids.*64 rows"),
    ],
)
def test_impossible_settings_are_refused(settings, vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        TopKLogitsTeacher(_section(**settings), bigram_model(BIGRAM), vocab_size)


def test_build_teacher_loads_the_configured_model():
    teacher = build_teacher(_section(), VOCAB)
    assert teacher.facts["vocab_size"] == teacher.facts["head_rows"] == VOCAB
    assert teacher.facts["top_k"] == 8
