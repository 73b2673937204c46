"""The losses of distillation: what is zero, what has which gradient, what does not count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import UsageError
from coterie.training.distillation import (
    LOSSES,
    cross_entropy,
    distillation_loss,
    full_kl,
    lm_losses,
    renormalised_kl,
    tail_kl,
    token_losses,
    top_k,
)

T, V = 6, 50
seeds = st.integers(0, 2**20)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 4.0])


def draw(seed, *shape, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(loss, student):
    student = student.clone().requires_grad_()
    loss(student).sum().backward()
    return student.grad


@settings(max_examples=20, deadline=None)
@given(seeds, temperatures, st.integers(1, V))
@pytest.mark.parametrize("loss", ["full", "tail", "renormalised"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(loss, seed, temperature, k):
    z = draw(seed, T, V)

    def of(s):
        return token_losses(s, z, loss, k=k, temperature=temperature)

    assert of(z).abs().max() < 1e-4
    assert gradient(of, z).abs().max() < 1e-5


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, V))
def test_the_gradient_of_cross_entropy_is_q_minus_p(seed, k):
    z, s = draw(seed, T, V), draw(seed + 1, T, V)
    kept = top_k(z, k)
    p = torch.zeros(T, V).scatter(1, kept.ids_TK, kept.log_p_TK.softmax(-1))
    torch.testing.assert_close(gradient(lambda x: cross_entropy(x, kept), s), s.softmax(-1) - p, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_cross_entropy_is_not_zero_at_equality():
    z = draw(0, T, V)
    assert gradient(lambda x: cross_entropy(x, top_k(z, 8)), z).abs().max() > 1e-2


@settings(max_examples=20, deadline=None)
@given(seeds, temperatures)
@pytest.mark.parametrize("loss", ["tail", "renormalised"])
def test_all_of_the_vocabulary_is_the_full_loss(loss, seed, temperature):
    z, s = draw(seed, T, V), draw(seed + 1, T, V)
    one = token_losses(s, z, loss, k=V, temperature=temperature)
    torch.testing.assert_close(one, full_kl(s, z, temperature), atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, V))
def test_cross_entropy_is_the_loss_over_all_of_the_vocabulary_up_to_the_teachers_entropy(seed, k):
    z, s = draw(seed, T, V), draw(seed + 1, T, V)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross_entropy(s, top_k(z, V)) - entropy, full_kl(s, z), atol=1e-3, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seeds, temperatures, st.integers(1, V - 1))
def test_buckets_never_see_more_than_the_whole(seed, temperature, k):
    z, s = draw(seed, T, V), draw(seed + 1, T, V)
    assert (tail_kl(s, top_k(z, k, temperature), temperature) <= full_kl(s, z, temperature) + 1e-4).all()


def test_what_is_outside_of_the_top_counts_for_the_tail_only():
    z = draw(0, T, V)
    kept, moved = top_k(z, 8), z.clone()
    outside = torch.ones(T, V, dtype=torch.bool).scatter(1, kept.ids_TK, False)
    moved[outside] += 3.0
    assert renormalised_kl(moved, kept).abs().max() < 1e-5
    assert (tail_kl(moved, kept) > 1e-2).all()


def test_a_tail_too_small_for_float32_does_not_break_the_loss():
    z = torch.full((1, V), -200.0)
    z[0, 0] = 0.0
    for teacher, student in ((z, draw(0, 1, V)), (draw(0, 1, V), z), (z, z)):
        kept = top_k(teacher, 4)
        assert torch.isfinite(kept.tail_T).all()
        assert torch.isfinite(tail_kl(student, kept)).all()
        assert torch.isfinite(gradient(lambda x, kept=kept: tail_kl(x, kept), student)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_keeps_its_size_when_the_temperature_changes(loss):
    z = draw(0, 64, V, scale=0.3)  # the claim is one about temperatures above the spread of the logits
    s = z + draw(1, 64, V, scale=0.1)
    sizes = [gradient(lambda x, t=t: token_losses(x, z, loss, k=V, temperature=t), s).norm() for t in (1, 2, 4)]
    assert max(sizes) < 1.25 * min(sizes)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_labels_contribute_nothing(loss):
    z, s, labels = draw(0, 2, 8, V), draw(1, 2, 8, V), torch.arange(16).view(2, 8).clone()
    labels[0, 5:] = labels[1, 2] = -100
    dead = torch.zeros(2, 8, dtype=torch.bool)
    dead[0, 4:], dead[1, 1], dead[:, -1] = True, True, True  # positions before a masked label, and the last
    other = s.clone()
    other[dead] = draw(2, int(dead.sum()), V)
    one = distillation_loss(s, labels, z, loss)
    assert torch.equal(one, distillation_loss(other, labels, z, loss))
    grad = gradient(lambda x: distillation_loss(x, labels, z, loss), s)
    assert not grad[dead].any()
    assert grad[~dead].abs().sum(-1).min() > 0


def test_the_mean_is_over_tokens_and_does_not_grow_with_length():
    z, s, labels = draw(0, 1, 9, V), draw(1, 1, 9, V), torch.zeros(1, 9, dtype=torch.int64)
    one = distillation_loss(s[:, :-1].repeat(1, 4, 1), labels[:, :1].repeat(1, 32), z[:, :-1].repeat(1, 4, 1))
    parts = token_losses(s[0, :-1], z[0, :-1], "tail")
    weights = torch.tensor([4.0] * 7 + [3.0])  # the very last position predicts nothing
    torch.testing.assert_close(one, (parts * weights).sum() / weights.sum())


def test_half_precision_logits_are_scored_in_float32():
    z, s = draw(0, T, V), draw(1, T, V)
    for loss in LOSSES:
        found = token_losses(s.bfloat16(), z.bfloat16(), loss)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, token_losses(s.bfloat16().float(), z.bfloat16().float(), loss))


def test_the_lm_loss_is_minus_log_q_of_the_next_token():
    s, target = draw(0, T, V), torch.arange(T)
    torch.testing.assert_close(lm_losses(s, target), -s.log_softmax(-1)[torch.arange(T), target])


def test_an_unknown_loss_and_a_full_loss_of_kept_logits_are_refused():
    z = draw(0, T, V)
    with pytest.raises(UsageError, match="no loss 'kl'"):
        token_losses(z, z, "kl")
    with pytest.raises(UsageError, match="needs all of the teacher's logits"):
        token_losses(z, top_k(z, 4), "full")
