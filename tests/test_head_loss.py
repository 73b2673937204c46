"""Head and cross entropy in one operation give torch's loss and gradients."""

import pytest
import torch
from torch.nn import functional as F

from coterie.architectures.head_loss import head_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def given(T=37, H=12, V=50, dtype=torch.float32, ignored=0.3):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    label = torch.randint(0, V, (T,), generator=g).masked_fill(torch.rand(T, generator=g) < ignored, -100)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), label


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_loss_and_gradients_are_torchs(chunk, factor):
    x, weight, label = given()
    found = head_loss(x, weight, label, chunk=chunk)
    exact = F.cross_entropy(x @ weight.T, label)
    torch.testing.assert_close(found, exact)
    for one, other in zip(*(torch.autograd.grad(factor * loss, (x, weight)) for loss in (found, exact))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    x, weight, label = given(T=5, V=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: head_loss(x, weight, label, chunk=2), (x, weight))


def test_items_divide_the_sum():
    x, weight, label = given()
    exact = F.cross_entropy(x @ weight.T, label, reduction="sum") / 99
    torch.testing.assert_close(head_loss(x, weight, label, items=99), exact)


def test_ignored_tokens_may_hold_anything_and_get_gradient_zero():
    x, weight, label = given()
    with torch.no_grad():
        x[label == -100] = float("nan")
    head_loss(x, weight, label).backward()
    assert weight.grad.isfinite().all()
    assert (x.grad[label == -100] == 0).all()
    assert x.grad[label != -100].any()


def test_without_labels_loss_and_gradients_are_zero():
    x, weight, label = given(ignored=2)
    loss = head_loss(x, weight, label)
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()
    assert not x.grad.any()


def test_large_logits_do_not_overflow():
    x, weight, label = given()
    torch.testing.assert_close(head_loss(x * 1e4, weight, label), F.cross_entropy(1e4 * x @ weight.T, label))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight, label = given()
    still, moving = (x, weight) if frozen == "hidden" else (weight, x)
    still.requires_grad_(False)
    head_loss(x, weight, label).backward()
    assert still.grad is None
    (exact,) = torch.autograd.grad(F.cross_entropy(x @ weight.T, label), moving)
    torch.testing.assert_close(moving.grad, exact, rtol=1e-4, atol=1e-6)


def test_under_autocast_the_loss_is_float32_and_close():
    x, weight, label = given()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(x, weight, label)
    exact = F.cross_entropy(x @ weight.T, label)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (found, exact))):
        assert (one - other).norm() / other.norm() < 0.03
