"""Codes survive packing, whatever their width; packed modules multiply with what the codes stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.anatomy import moe_layers
from coterie.anatomy.forms import ExpertBits, Form, Linears, apply_forms, apply_linears, form_of
from coterie.errors import CheckpointError
from coterie.experts import packed, packing
from coterie.experts.packing import Coded
from families import FEW, tiny


def coded(bits: int, shape: tuple[int, int], group: int, *, symmetric: bool, seed: int = 0) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    O, I = shape  # noqa: E741
    G = packing.groups(I, group)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(O, G, generator=generator) * 0.1 / 2**bits).half()
    zero = None if symmetric else (torch.rand(O, G, generator=generator) * 2**bits).half()
    return Coded(codes, bits, group, scale, zero)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 130), seed=st.integers(0, 10))
def test_unpacking_gives_back_what_was_packed(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = packing.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packing.words(columns, bits))
    assert torch.equal(packing.unpack(words, bits, columns).long(), codes)


@pytest.mark.parametrize("bits", packing.WIDTHS)
def test_bits_of_a_row_are_one_dense_stream_least_significant_first(bits):
    codes = torch.randint(0, 2**bits, (1, 37), generator=torch.Generator().manual_seed(1))
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))
    words = packing.pack(codes, bits)[0]
    assert sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words)) == stream


def test_a_last_group_may_be_shorter():
    matrix = coded(3, (2, 10), 4, symmetric=False)
    dense = matrix.dense()
    expected = (matrix.codes_OI[:, 8:].float() - matrix.zero_OG[:, 2:].float()) * matrix.scale_OG[:, 2:].float()
    assert torch.equal(dense[:, 8:], expected)


def _fill(module, widths, shapes, group, *, symmetric):
    """Random codes for every expert; returns the dense matrices they stand for."""
    dense = {}
    for p, bits in widths.items():
        plain = getattr(module, f"plain_{p}").dtype
        matrices = [
            coded(b, shapes[p], group, symmetric=symmetric, seed=e)
            if b != packed.PLAIN
            else torch.randn(shapes[p], generator=torch.Generator().manual_seed(e), dtype=plain) * 0.05
            for e, b in enumerate(bits)
        ]
        for part, value in packed.assembled(matrices, shapes[p], group, plain, symmetric=symmetric).items():
            held = getattr(module, f"{part}_{p}")
            assert held.shape == value.shape, (part, held.shape, value.shape)
            held.data.copy_(value)
        dense[p] = [m.dense() if isinstance(m, Coded) else m for m in matrices]
    return dense


def _mixed(E: int, names: tuple[str, ...]) -> dict[str, list[int]]:
    choice = [1, 2, 3, 4, 8, 16]
    return {p: [choice[(e + i) % len(choice)] for e in range(E)] for i, p in enumerate(names)}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", FEW)
def test_packed_experts_compute_what_their_dense_matrices_do(family, symmetric):
    stock, model = tiny(family), tiny(family)
    for m in (stock, model):
        m.set_experts_implementation("coterie")
    layer, other = next(iter(moe_layers(model))), next(iter(moe_layers(stock)))
    from coterie.anatomy.forms import projection_shapes

    shapes = projection_shapes(layer.bank)
    widths = _mixed(layer.num_experts, tuple(shapes))
    form = Form(bits=ExpertBits(group=24, symmetric=symmetric, **widths))
    apply_forms(model, {layer.index: form})
    assert form_of(layer) == form
    dense = _fill(layer.experts, widths, shapes, 24, symmetric=symmetric)
    for e in range(layer.num_experts):
        weights = other.bank.read(e)
        for p, name in (("gate", "gate_IH"), ("up", "up_IH"), ("down", "down_HI")):
            if p in dense:
                setattr(weights, name, dense[p][e])
        other.bank.write(e, weights)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(model(ids).logits, stock(ids).logits, atol=1e-5)


def test_gradients_pass_through_packed_experts_to_what_is_below():
    model = tiny(FEW[0])
    model.set_experts_implementation("coterie")
    layers = list(moe_layers(model))
    from coterie.anatomy.forms import projection_shapes

    shapes = projection_shapes(layers[-1].bank)
    widths = _mixed(layers[-1].num_experts, tuple(shapes))
    apply_forms(model, {layers[-1].index: Form(bits=ExpertBits(group=16, symmetric=False, **widths))})
    dense = _fill(layers[-1].experts, widths, shapes, 16, symmetric=False)
    x = torch.randn(3, layers[-1].bank.hidden_size, requires_grad=True)
    layers[-1].experts.project("down_proj", 0, torch.randn(3, shapes["down"][1]))
    y = packed.multiply(layers[-1].experts.stack("up"), 1, x)
    y.sum().backward()
    assert torch.allclose(x.grad, dense["up"][1].sum(0).expand(3, -1), atol=1e-5)


def test_a_packed_linear_layer_multiplies_with_its_codes():
    model = tiny(FEW[0])
    path = next(n for n, m in model.named_modules() if n.endswith("q_proj"))
    module = model.get_submodule(path)
    shape = tuple(module.weight.shape)
    apply_linears(model, Linears(group=16, symmetric=False, bits={path: 3}))
    matrix = coded(3, shape, 16, symmetric=False)
    module.packed.copy_(matrix.packed())
    module.scale.data.copy_(matrix.scale_OG)
    module.zero.data.copy_(matrix.zero_OG)
    x = torch.randn(2, 5, shape[1])
    expected = torch.nn.functional.linear(x, matrix.dense(), getattr(module, "bias", None))
    assert torch.allclose(module(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"group": 8, "symmetric": False, "up": [4], "down": [4], "gate": [4]}, "widths for"),
        ({"group": 8, "symmetric": False, "up": [4] * 8, "down": [4] * 8}, "bits of layer"),
        ({"group": 8, "symmetric": False, "up": [9] * 8, "down": [4] * 8, "gate": [4] * 8}, "9 bits"),
        ({"group": 0, "symmetric": False, "up": [4] * 8, "down": [4] * 8, "gate": [4] * 8}, "group"),
        ({"group": 2**40, "symmetric": False, "up": [4] * 8, "down": [4] * 8, "gate": [4] * 8}, "group"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(entry, told):
    from coterie.anatomy.forms import forms_of

    with pytest.raises(CheckpointError, match=told):
        apply_forms(tiny("mixtral"), forms_of({"layers": {"0": {"bits": entry}}}))


def test_a_header_that_packs_something_else_than_a_linear_layer_is_refused():
    with pytest.raises(CheckpointError, match="no linear layer"):
        apply_linears(tiny("mixtral"), Linears(group=8, symmetric=True, bits={"model.norm": 4}))
