"""The chunked head against a dense second implementation with autograd, in fp64."""

import math

import pytest
import torch
from dense import dense_loss, dense_target

from raydistill.losses.divergence import divergence
from raydistill.losses.head import Head, Objective, head_loss, logits_in_chunks
from raydistill.losses.targets import SparseTarget

TOKENS, HIDDEN, ROWS, VOCAB = 13, 8, 41, 37


def _problem(seed=0, *, bias=False, scale=1.0, softcap=None, spread=1.0, rows=ROWS, vocab=VOCAB):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden = (spread * normal(TOKENS, HIDDEN)).requires_grad_(True)
    weight = normal(rows, HIDDEN).requires_grad_(True)
    offset = normal(rows).requires_grad_(True) if bias else None
    labels = torch.randint(0, vocab, (TOKENS,), generator=g)
    teachers = [normal(TOKENS, vocab).mul(2).log_softmax(-1) for _ in range(3)]
    return Head(weight, offset, scale, softcap, vocab), hidden, labels, teachers


def _leaves(head, hidden):
    return [hidden, head.weight] + ([] if head.bias is None else [head.bias])


def _compare(head, hidden, labels, targets, objective, dense, chunk_tokens=5):
    """Same value and gradients; the incoming number 0.37 plays the normalisation outside."""
    sums = head_loss(head, hidden, labels, targets, objective, chunk_tokens=chunk_tokens)
    ours = torch.autograd.grad(0.37 * sums.total, _leaves(head, hidden))
    expected = dense_loss(head, hidden, labels, dense, objective)
    theirs = torch.autograd.grad(0.37 * expected, _leaves(head, hidden))
    torch.testing.assert_close(sums.total, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return sums


@pytest.mark.parametrize("divergence_kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_equal_dense_autograd(divergence_kind, mode, tail, temperature):
    head, hidden, labels, teachers = _problem(bias=True)
    objective = Objective(
        alpha=0.7, temperature=temperature, mode=mode, tail=tail, divergence=divergence(divergence_kind, beta=0.3)
    )
    targets = [dense_target(teachers[0], 6, temperature)]
    _compare(head, hidden, labels, targets, objective, [(teachers[0], 6, 1.0)])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("architecture", [{}, {"scale": 0.3}, {"softcap": 3.0}, {"bias": True, "softcap": 4.0}])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_scale_soft_cap_bias_and_every_alpha_equal_dense_autograd(alpha, architecture, mode):
    head, hidden, labels, teachers = _problem(**architecture)
    objective = Objective(alpha=alpha, temperature=2.0, mode=mode)
    _compare(head, hidden, labels, [dense_target(teachers[0], 4, 2.0)], objective, [(teachers[0], 4, 1.0)])


@pytest.mark.parametrize("mode", ["coarse", "exact"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_teachers_add_up_by_weight_even_where_their_ids_overlap(mode, tail):
    head, hidden, labels, teachers = _problem()
    teachers[1] = (teachers[0] + 0.1 * teachers[1]).log_softmax(-1)
    objective = Objective(alpha=0.8, temperature=1.5, mode=mode, tail=tail)
    ks, weights = (3, 9, 20), (0.5, 0.2, 0.3)
    targets = [dense_target(p, k, 1.5, weight=w) for p, k, w in zip(teachers, ks, weights, strict=True)]
    sums = _compare(head, hidden, labels, targets, objective, list(zip(teachers, ks, weights, strict=True)))
    assert sums.divergences.shape == (3,)


@pytest.mark.parametrize("top_k", [1, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_one_id_and_the_whole_vocabulary_work(top_k, mode):
    head, hidden, labels, teachers = _problem()
    objective = Objective(alpha=0.9, temperature=3.0, mode=mode)
    _compare(head, hidden, labels, [dense_target(teachers[0], top_k, 3.0)], objective, [(teachers[0], top_k, 1.0)])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_full_vocabulary_top_k_is_dense_kl(temperature, mode):
    head, hidden, labels, teachers = _problem()
    objective = Objective(alpha=1.0, temperature=temperature, mode=mode)
    sums = head_loss(head, hidden, labels, [dense_target(teachers[0], VOCAB, temperature)], objective)
    log_q = (head.logits(hidden) / temperature).log_softmax(-1)
    log_p = (teachers[0] / temperature).log_softmax(-1)
    torch.testing.assert_close(sums.total, temperature**2 * (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_divergence_from_itself_is_zero_at_every_temperature(temperature, mode, kind):
    head, hidden, labels, _ = _problem(softcap=5.0)
    own = head.logits(hidden).detach().log_softmax(-1)
    objective = Objective(alpha=1.0, temperature=temperature, mode=mode, divergence=divergence(kind))
    sums = head_loss(head, hidden, labels, [dense_target(own, 5, temperature)], objective)
    assert abs(sums.total) < 1e-9
    for gradient in torch.autograd.grad(sums.total, _leaves(head, hidden)):
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_folding_ids_into_the_tail_equals_a_cache_of_fewer_ids(temperature, mode):
    head, hidden, labels, teachers = _problem()
    wide, narrow = dense_target(teachers[0], 20, temperature), dense_target(teachers[0], 6, temperature)
    folded = Objective(alpha=0.7, temperature=temperature, mode=mode, top_k=6)
    plain = Objective(alpha=0.7, temperature=temperature, mode=mode)
    a = head_loss(head, hidden, labels, [wide], folded).total
    b = head_loss(head, hidden, labels, [narrow], plain).total
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # folding adds masses in fp32


def test_gradient_keeps_the_factor_of_temperature_squared():
    # Hinton et al. 2015: T² keeps the gradient's size; without it, it falls as 1/T².
    head, hidden, labels, teachers = _problem(spread=0.1)
    norms = []
    for temperature in (8.0, 16.0, 32.0):
        objective = Objective(alpha=1.0, temperature=temperature)
        total = head_loss(head, hidden, labels, [dense_target(teachers[0], 10, temperature)], objective).total
        norms.append(float(torch.autograd.grad(total, hidden)[0].norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.15)
    assert norms[2] == pytest.approx(norms[1], rel=0.1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100])
def test_chunk_size_does_not_matter(chunk_tokens):
    head, hidden, labels, teachers = _problem()
    target, objective = dense_target(teachers[0], 6, 2.0), Objective(alpha=0.7, temperature=2.0)
    whole = head_loss(head, hidden, labels, [target], objective)
    parts = head_loss(head, hidden, labels, [target], objective, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(parts.total, _leaves(head, hidden))
    torch.testing.assert_close(ours, torch.autograd.grad(whole.total, _leaves(head, hidden)), rtol=1e-11, atol=1e-12)


def test_sums_and_gradients_add_up_over_micro_batches():
    head, hidden, labels, teachers = _problem()
    target, objective = dense_target(teachers[0], 6, 2.0), Objective(alpha=0.7, temperature=2.0)
    whole = head_loss(head, hidden, labels, [target], objective)
    halves = [
        head_loss(head, hidden[r], labels[r], [target.rows(r, torch.float64)], objective)
        for r in (slice(0, 4), slice(4, 13))
    ]
    torch.testing.assert_close(halves[0].total + halves[1].total, whole.total)
    ours = torch.autograd.grad(halves[0].total + halves[1].total, _leaves(head, hidden))
    torch.testing.assert_close(ours, torch.autograd.grad(whole.total, _leaves(head, hidden)))


def test_padded_rows_have_no_mass_and_no_gradient():
    head, hidden, labels, teachers = _problem()
    with torch.no_grad():
        head.weight[VOCAB:] = 1e6
    objective = Objective(alpha=0.5)
    sums = _compare(head, hidden, labels, [dense_target(teachers[0], 6, 1.0)], objective, [(teachers[0], 6, 1.0)])
    gradient = torch.autograd.grad(
        head_loss(head, hidden, labels, [dense_target(teachers[0], 6, 1.0)], objective).total, head.weight
    )[0]
    assert gradient[VOCAB:].abs().max() == 0
    assert sums.total.isfinite()


def test_no_targets_at_all_give_zero_sums_and_zero_gradients():
    head, hidden, labels, teachers = _problem()
    none = slice(0, 0)
    target = dense_target(teachers[0], 6, 1.0).rows(none, torch.float64)
    sums = head_loss(head, hidden[none], labels[none], [target], Objective(alpha=0.5))
    gradients = torch.autograd.grad(sums.total, _leaves(head, hidden))
    assert sums.total.item() == 0.0
    assert all(g.abs().max() == 0 for g in gradients)


@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_teacher_and_student_with_all_mass_on_one_id_stay_finite(mode):
    head, hidden, labels, _ = _problem(spread=300.0)
    certain = torch.full((TOKENS, VOCAB), -60.0)
    certain[:, 0] = 0.0
    target = SparseTarget(
        ids=certain.topk(4).indices,
        logp=certain.topk(4).values.half(),
        log_tail=torch.full((TOKENS,), -60.0).half(),
        psi=torch.full((TOKENS,), -30.0).half(),
    )
    head32 = Head(head.weight.detach().float().requires_grad_(True), None, 1.0, None, VOCAB)
    hidden32 = hidden.detach().float().requires_grad_(True)
    sums = head_loss(head32, hidden32, labels, [target], Objective(alpha=0.5, temperature=2.0, mode=mode))
    gradients = torch.autograd.grad(sums.total, [hidden32, head32.weight])
    assert sums.total.isfinite()
    assert all(g.isfinite().all() for g in gradients)


def test_confident_student_gets_an_accurate_gradient_where_the_teachers_tail_is_heavy():
    # q_tail ~ 1e-13: multiplying every id by G_tail / q_tail and correcting the ids afterwards would lose all digits.
    head, hidden, labels, _ = _problem(spread=3.0)
    logits = head.logits(hidden).detach()
    best = logits.topk(6)
    tail = logits.log_softmax(-1).scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    assert tail.min() < math.log(1e-9)
    assert tail.min() > math.log(1e-30)
    flat = torch.full((TOKENS, VOCAB), -torch.log(torch.tensor(float(VOCAB))).item(), dtype=torch.float64)
    target = SparseTarget(
        ids=best.indices,
        logp=flat.gather(-1, best.indices),
        log_tail=torch.full((TOKENS,), (VOCAB - 6) / VOCAB, dtype=torch.float64).log(),
    )
    objective = Objective(alpha=1.0)
    exact = torch.autograd.grad(head_loss(head, hidden, labels, [target], objective).total, hidden)[0]
    hidden32 = hidden.detach().float().requires_grad_(True)
    head32 = Head(head.weight.detach().float(), None, 1.0, None, VOCAB)
    ours = torch.autograd.grad(head_loss(head32, hidden32, labels, [target], objective).total, hidden32)[0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_logged_sums_are_what_is_optimised():
    head, hidden, labels, teachers = _problem()
    targets = [dense_target(p, 6, 2.0, weight=w) for p, w in zip(teachers[:2], (0.25, 0.75), strict=True)]
    sums = head_loss(head, hidden, labels, targets, Objective(alpha=0.3, temperature=2.0))
    torch.testing.assert_close(
        sums.total, 0.7 * sums.cross_entropy + 0.3 * (0.25 * sums.divergences[0] + 0.75 * sums.divergences[1])
    )
    logits = head.logits(hidden)
    torch.testing.assert_close(sums.cross_entropy, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert sums.correct == (logits.argmax(-1) == labels).sum()
    assert sums.agreements[0] == (logits.argmax(-1) == teachers[0].argmax(-1)).sum()


@pytest.mark.parametrize("mode", ["coarse", "exact"])
def test_bf16_stays_near_fp32(mode):
    head, hidden, labels, teachers = _problem(spread=0.5)
    objective = Objective(alpha=0.7, temperature=2.0, mode=mode)
    target = dense_target(teachers[0], 6, 2.0)
    weight, states = head.weight.detach().bfloat16(), hidden.detach().bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        w, h = weight.to(dtype).requires_grad_(True), states.to(dtype).requires_grad_(True)
        sums = head_loss(Head(w, None, 1.0, None, VOCAB), h, labels, [target], objective, chunk_tokens=4)
        results.append((float(sums.total), *[g.float() for g in torch.autograd.grad(sums.total, [h, w])]))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.01)
    for a, b in zip(results[1][1:], results[0][1:], strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_weight_gradient_of_many_bf16_chunks_does_not_drift():
    # A bf16 accumulator would stop growing: 256 + 1 = 256.
    tokens, hidden_size, vocab = 2048, 4, 8
    hidden = torch.ones(tokens, hidden_size, dtype=torch.bfloat16)
    weight = torch.zeros(vocab, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)
    total = head_loss(Head(weight, None, 1.0, None, vocab), hidden, labels, [], Objective(), chunk_tokens=1).total
    gradient = torch.autograd.grad(total, weight)[0]
    assert float(gradient[0, 0]) == pytest.approx(-tokens * 7 / 8, rel=0.005)


def test_ids_beyond_65536_and_131072():
    rows, vocab = 151_936, 151_900
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 4, generator=generator)
    hidden = torch.randn(3, 4, generator=generator)
    teacher = torch.randn(3, vocab, generator=generator)
    favourites = torch.tensor([[150_001, 70_000], [131_072, 65_536], [151_899, 0]])
    teacher.scatter_(-1, favourites, 12.0)
    log_p = teacher.double().log_softmax(-1)
    head = Head(weight.double().requires_grad_(True), None, 1.0, None, vocab)
    hidden = hidden.double().requires_grad_(True)
    target = dense_target(log_p, 2, 1.0)
    assert sorted(target.ids.flatten().tolist()) == sorted(favourites.flatten().tolist())
    _compare(head, hidden, favourites[:, 0], [target], Objective(alpha=0.6), [(log_p, 2, 1.0)])


def test_nothing_is_differentiated_without_grad():
    head, hidden, labels, teachers = _problem()
    target, objective = dense_target(teachers[0], 6, 2.0), Objective(alpha=0.7, temperature=2.0)
    with torch.no_grad():
        quiet = head_loss(head, hidden, labels, [target], objective)
    assert not quiet.total.requires_grad
    torch.testing.assert_close(quiet.total, head_loss(head, hidden, labels, [target], objective).total)


def test_frozen_head_and_frozen_backbone_get_their_own_half():
    head, hidden, labels, teachers = _problem()
    target, objective = dense_target(teachers[0], 6, 1.0), Objective(alpha=0.7)
    both = torch.autograd.grad(head_loss(head, hidden, labels, [target], objective).total, [hidden, head.weight])
    frozen = Head(head.weight.detach(), None, 1.0, None, VOCAB)
    only_hidden = torch.autograd.grad(head_loss(frozen, hidden, labels, [target], objective).total, hidden)[0]
    only_weight = torch.autograd.grad(head_loss(head, hidden.detach(), labels, [target], objective).total, head.weight)[
        0
    ]
    torch.testing.assert_close((only_hidden, only_weight), both)


def test_logits_in_chunks_are_the_logits():
    head, hidden, _, _ = _problem(bias=True, scale=0.5, softcap=2.0)
    pieces = [logits for _, logits in logits_in_chunks(head, hidden, chunk_tokens=4)]
    raw = 0.5 * (hidden @ head.weight.t() + head.bias)[:, :VOCAB]
    torch.testing.assert_close(torch.cat(pieces), 2.0 * torch.tanh(raw / 2.0))
