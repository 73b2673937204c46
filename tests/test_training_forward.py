"""The experts implementation for training gives the outputs and the gradients of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import use_experts_implementation

from coterie.anatomy import moe_layers
from coterie.errors import UsageError
from coterie.experts import forward, training
from coterie.experts.kernels import dense
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


def plain(dtype=torch.float32, k=K, T=20, experts=8, sentinels=True):
    """One layer of Qwen3-MoE experts with something to compute."""
    module = experts_of("qwen3-moe").to(dtype)
    index, weights = routed(T, experts, sentinels=sentinels, k=k, dtype=dtype)
    return module, torch.randn(T, 64, generator=torch.Generator().manual_seed(3), dtype=dtype), index, weights


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("tokens", [0, 1])
def test_none_and_one_token_run(family, tokens):
    module = experts_of(family)
    index, weights = routed(tokens, forward.stored_experts(module))
    x = torch.randn(tokens, 64)
    found = outcome(module, training.training_forward, x, index, weights)
    assert found["output"].shape == (tokens, 64)
    if tokens:
        assert_same(found, outcome(module, forward.experts_forward, x, index, weights))
    else:
        assert all((t == 0).all() for name, t in found.items() if name != "output")


def test_an_expert_without_a_token_gets_gradient_zero():
    module, x, index, weights = plain()
    index[index == 5] = 8
    found, expected = both(module, x, index, weights)
    assert (found["gate_up_proj"][5] == 0).all()
    assert (found["down_proj"][5] == 0).all()
    assert found["gate_up_proj"][4].any()
    assert_same(found, expected)


@pytest.mark.parametrize("family", FEW)
def test_all_tokens_may_go_to_one_expert(family):
    module = experts_of(family)
    index = torch.full((300, 1), 3)
    assert_same(*both(module, torch.randn(300, 64), index, torch.rand(300, 1)), rtol=1e-3, atol=1e-3)


def test_one_slot_per_token_runs():
    assert_same(*both(*plain(k=1)))


def test_all_slots_may_be_empty():
    module, x, index, weights = plain()
    found = outcome(module, training.training_forward, x, torch.full_like(index, 8), weights)
    assert all((t == 0).all() for t in found.values())


def test_empty_slots_weights_get_exactly_no_gradient_and_may_be_anything():
    module, x, index, weights = plain()
    empty = index == 8
    assert empty.any()
    expected = outcome(module, training.training_forward, x, index, weights)
    found = outcome(module, training.training_forward, x, index, weights.masked_fill(empty, float("nan")))
    assert (found["weights"][empty] == 0).all()
    assert found["weights"][~empty].all()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_ids_above_the_number_of_experts_are_empty_too():
    module, x, index, weights = plain()
    expected = outcome(module, training.training_forward, x, index, weights)
    found = outcome(module, training.training_forward, x, index.masked_fill(index == 8, 11), weights)
    assert torch.equal(found["gate_up_proj"], expected["gate_up_proj"])
    assert torch.equal(found["output"], expected["output"])


@pytest.mark.parametrize("family", FEW)
def test_without_gradients_the_output_is_the_same(family):
    module = experts_of(family)
    index, weights = routed(20, forward.stored_experts(module), sentinels=True)
    x = torch.randn(20, 64)
    with torch.no_grad():
        alone = training.training_forward(module, x, index, weights)
    assert not alone.requires_grad
    assert torch.equal(alone, outcome(module, training.training_forward, x, index, weights)["output"])


def test_an_earlier_output_survives_later_calls():
    module, x, index, weights = plain()
    with torch.no_grad():
        first = training.training_forward(module, x, index, weights)
        kept = first.clone()
        training.training_forward(module, -x, index, weights)
    assert torch.equal(first, kept)


def test_two_layers_keep_their_gradients_apart():
    module, x, index, weights = plain()

    def twice(function, module, x, index, weights):
        return function(module, function(module, x, index, weights), index, weights)

    assert_same(
        outcome(module, training.training_forward, x, index, weights, twice),
        outcome(module, forward.experts_forward, x, index, weights, twice),
    )


@pytest.mark.parametrize("family", FEW)
def test_checkpointing_gives_the_same_gradients(family):
    module = experts_of(family)
    index, weights = routed(20, forward.stored_experts(module), sentinels=True)
    x = torch.randn(20, 64)

    def again(function, module, x, index, weights):
        return checkpoint(function, module, x, index, weights, use_reentrant=False)

    found = outcome(module, training.training_forward, x, index, weights, again)
    expected = outcome(module, training.training_forward, x, index, weights)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_under_autocast_results_are_those_of_bfloat16_products(family, stored):
    module = experts_of(family).to(stored)
    index, weights = routed(20, forward.stored_experts(module), sentinels=True)
    x = torch.randn(20, 64)

    def cast(function, module, x, index, weights):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(module, x, index, weights)
        assert y.dtype == x.dtype
        return y

    found = outcome(module, training.training_forward, x, index, weights, cast)
    exact = outcome(module.float(), forward.experts_forward, x, index, weights)
    for name in exact:
        error = (found[name].float() - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, f"{name}: {error}"


def test_products_under_autocast_are_in_its_dtype():
    module, x, index, weights = plain()
    seen = []
    times = training.dense.times
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(training.dense, "times", lambda x, *rest: (seen.append(x.dtype), times(x, *rest)))
        training.training_forward(module, x, index, weights)
    assert seen == [torch.bfloat16] * 2


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, H, I = 4, 5, 3  # noqa: E741
        P = 2 * I if config["has_gate"] else I
        self.act_fn = nn.SiLU() if config["silu"] else nn.Tanh()
        up, turned = "gate_up_proj" if config["has_gate"] else "up_proj", config["is_transposed"]
        setattr(self, up, nn.Parameter(torch.randn((E, H, P) if turned else (E, P, H), dtype=torch.float64)))
        self.down_proj = nn.Parameter(torch.randn((E, I, H) if turned else (E, H, I), dtype=torch.float64))
        if config["has_bias"]:
            setattr(self, f"{up}_bias", nn.Parameter(torch.randn(E, P, dtype=torch.float64)))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H, dtype=torch.float64))

    def forward(self, *given):
        raise NotImplementedError


def toy(**flags):
    config = {"has_gate": True, "has_bias": False, "is_transposed": False, "silu": True} | flags
    options = {n: v for n, v in config.items() if n != "silu"}
    torch.manual_seed(0)
    return use_experts_implementation(**options)(type("Toy", (Toy,), {}))(config)


@pytest.mark.parametrize("gate", ["silu gate", "other gate", "no gate"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("turned", [False, True], ids=["as stored by most", "transposed"])
def test_gradients_are_those_of_finite_differences(gate, has_bias, turned):
    module = toy(has_gate=gate != "no gate", silu=gate == "silu gate", has_bias=has_bias, is_transposed=turned)
    index, weights = routed(6, 4, sentinels=True, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters())

    def run(x, weights, *parameters):
        bound = dict(zip(names, parameters))
        return torch.func.functional_call(
            Called(module), {f"module.{n}": p for n, p in bound.items()}, (x, index, weights)
        )

    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weights.requires_grad_(), *parameters))


class Called(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *given):
        return training.training_forward(self.module, *given)


def test_a_second_derivative_is_refused():
    module, x, index, weights = plain()
    x.requires_grad_()
    y = training.training_forward(module, x, index, weights)
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    module, x, index, weights = plain()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name != frozen and frozen != "both")
    assert_same(*both(module, x, index, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torch_without_a_compiler_gives_the_same(dtype, monkeypatch):
    monkeypatch.setattr(training.dense, "kernel", lambda: None)
    assert_same(*both(*plain(dtype)))


def test_the_number_of_threads_does_not_change_a_bit():
    module, x, index, weights = plain(T=200)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(outcome(module, training.training_forward, x, index, weights))
    torch.set_num_threads(1)
    for name in ("output", "hidden", "gate_up_proj", "down_proj"):
        assert torch.equal(found[0][name], found[1][name]), name


def test_watched_experts_run_by_the_reference():
    module, x, index, weights = plain()

    class Tap:
        seen = 0

        def routed(self, *given):
            return True

        def expert(self, *given):
            Tap.seen += 1

        def combined(self, sum_TH):
            pass

    with forward.observe(module, Tap()):
        training.training_forward(module, x, index, weights)
    assert Tap.seen == 8


def test_slots_are_asked():
    module, x, index, weights = plain()
    with forward.rerouted(module, lambda index, weights: (torch.full_like(index, 8), weights)):
        assert not training.training_forward(module, x, index, weights).any()


def test_weights_in_another_dtype_than_their_inputs_run_by_the_reference():
    module, x, index, weights = plain()
    module.bfloat16()
    expected = forward.experts_forward(module, x, index, weights)
    assert torch.equal(training.training_forward(module, x, index, weights), expected)


def test_a_model_trains_with_it_by_name():
    model, ids = tiny("mixtral"), tokens()
    losses = {}
    for name in (training.NAME, forward.NAME):
        model.set_experts_implementation(name)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses[name] = loss.item(), [p.grad.clone() for p in model.parameters()]
    (a, grads_a), (b, grads_b) = losses.values()
    assert a == pytest.approx(b, rel=1e-5)
    for one, other in zip(grads_a, grads_b):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


SIZES = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([260, 530])), min_size=1, max_size=4),
    inputs=st.one_of(SIZES, st.sampled_from([256, 515, 1040])),
    outputs=st.one_of(SIZES, st.sampled_from([512, 530])),
    turned=st.booleans(),
    gathered=st.booleans(),
)
def test_products_of_any_shape_are_those_of_float64(counts, inputs, outputs, turned, gathered):
    generator = torch.Generator().manual_seed(sum(counts) + inputs)
    rows = sum(counts)
    x, b = (torch.randn(9 if gathered else rows, n, generator=generator) for n in (inputs, outputs))
    row = torch.randint(0, 9, (rows,), generator=generator) if gathered else None
    shape = (len(counts), outputs, inputs) if turned else (len(counts), inputs, outputs)
    w = torch.randn(shape, generator=generator)
    out, grad = torch.full((rows, outputs), float("nan")), torch.full(shape, float("nan"))
    if turned:
        w, grad = w.transpose(1, 2), grad.transpose(1, 2)
    dense.times(x, row, w, counts, out)
    dense.outer(x, row, b, row, counts, grad)
    xs, bs = (torch.split(t.double() if row is None else t[row].double(), counts) for t in (x, b))
    # a sum of n float32 products is off by up to n roundings of its terms, in whatever order they are added
    exact, terms = (torch.cat([f(p) @ f(m.double()) for p, m in zip(xs, w)]) for f in (torch.clone, torch.abs))
    assert bool(((out - exact).abs() <= (inputs + 2) * 2**-24 * terms).all())
    exact, terms = (torch.stack([f(p).T @ f(q) for p, q in zip(xs, bs)]) for f in (torch.clone, torch.abs))
    assert bool(((grad - exact).abs() <= (max(counts) + 2) * 2**-24 * terms).all())


@pytest.mark.parametrize("width", [1, 15, 16, 40])
def test_the_gate_is_torchs_for_all_sizes_of_numbers(width):
    gate = torch.linspace(-120, 120, 31 * width).view(31, width)
    up = torch.cat([gate, torch.linspace(-3, 3, 31 * width).view(31, width)], 1)
    factor, grad = torch.rand(31) + 0.1, torch.linspace(1, -1, 31 * width).view(31, width)
    found = torch.empty(31, width), torch.empty(31, width)
    dense.silu_gate(up, factor, found[0])
    made = dense.silu_gate_backward(up, factor, grad, found[1])
    wide, wide_factor = up.double().requires_grad_(), factor.double().requires_grad_()
    g, u = wide.chunk(2, -1)
    exact = nn.functional.silu(g) * u * wide_factor[:, None]
    exact.backward(grad.double())
    for one, other in zip((*found, *made), (exact, exact, wide.grad, wide_factor.grad)):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-5, atol=1e-4 if one.dim() == 1 else 1e-6)
