"""The experts implementation for training gives the outputs and the gradients of the reference."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import use_experts_implementation

from coterie.anatomy import moe_layers
from coterie.experts import forward, training
from families import FAMILIES, FEW, tiny, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

K = 3


def experts_of(family):
    """The experts of the last sparse layer, in the reference implementation, biases included in what is random."""
    model = tiny(family)
    module = moe_layers(model)[-1].experts
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    module.config._experts_implementation = forward.NAME
    return module


def routed(T, experts, *, sentinels=False, k=K, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack(
        [torch.randperm(experts, generator=generator)[:k] for _ in range(T)] or [torch.empty(0, k).long()]
    )
    index = index.view(T, k)
    if sentinels:
        index[torch.rand(T, k, generator=generator) < 0.4] = experts
    return index, torch.rand(T, k, generator=generator, dtype=dtype)


def outcome(module, function, x, index, weights, run=None):
    """Output and all gradients of a scalar that depends on every output."""
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = function(module, x, index, weights) if run is None else run(function, module, x, index, weights)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    (y * probe).sum().backward()
    gradients = {"hidden": x.grad, "weights": weights.grad} | {n: p.grad for n, p in module.named_parameters()}
    return {"output": y.detach()} | {name: torch.zeros(()) if g is None else g.clone() for name, g in gradients.items()}


def assert_same(found, expected, rtol=1e-4, atol=2e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name].expand_as(found[name]), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def both(module, x, index, weights):
    return (
        outcome(module, training.training_forward, x, index, weights),
        outcome(module, forward.experts_forward, x, index, weights),
    )


@pytest.mark.parametrize("sentinels", [False, True], ids=["all slots", "some slots empty"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_reference(family, sentinels):
    module = experts_of(family)
    index, weights = routed(20, forward.stored_experts(module), sentinels=sentinels)
    assert training.trains(module)
    assert_same(*both(module, torch.randn(20, 64, generator=torch.Generator().manual_seed(3)), index, weights))
