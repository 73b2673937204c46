"""Codes stand for what the papers say they do: round-to-nearest, HQQ, GPTQ and nested planes, on tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compression.quantizers import Spec, gptq, hqq, mwq, nested_bytes, quantize, report, rtn, too_few
from coterie.compression.quantizers.gptq import upper_factor
from coterie.compression.quantizers.grids import encode, fit, nearest
from coterie.compression.quantizers.measure import energy
from coterie.errors import ModelError, UsageError
from coterie.experts import packing
from coterie.experts.packing import Coded, dense, spread

# O outputs and I inputs of a matrix, T tokens, G groups

HALVES = [torch.float16, torch.bfloat16]


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(columns: int = 96, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Inputs that go together, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    return torch.randn(tokens, columns, generator=generator) @ (mixed + 0.5 * torch.eye(columns))


def gram(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.T @ x_TI


def loss(w_OI: torch.Tensor, coded: Coded, gram_II: torch.Tensor) -> float:
    return float(energy(w_OI - coded.dense(), gram_II).sum())


def same(one: Coded, other: Coded) -> bool:
    return (
        torch.equal(one.codes_OI, other.codes_OI)
        and torch.equal(one.scale_OG, other.scale_OG)
        and (one.zero_OG is None) == (other.zero_OG is None)
        and (one.zero_OG is None or torch.equal(one.zero_OG, other.zero_OG))
    )


def column_by_column(w_OI: torch.Tensor, gram_II: torch.Tensor, spec: Spec, damp: float = 0.01) -> torch.Tensor:
    """The paper's algorithm, one column after the other, in float64: codes."""
    w, n = w_OI.double().clone(), w_OI.shape[1]
    h = gram_II.double() + torch.eye(n) * damp * gram_II.double().diagonal().mean()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty_like(w_OI)
    for i in range(n):
        if i % spec.group == 0:
            scale, zero = fit(w[:, i : i + spec.group].float(), spec)
            scale = scale[:, 0].double()
            zero = packing.symmetric_zero(spec.bits) if zero is None else zero[:, 0].double()
        q = nearest(w[:, i].clone(), scale, zero, spec)
        codes[:, i] = q
        error = (w[:, i] - (q - zero) * scale) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
    return codes.to(torch.uint8)


# --------------------------------------------------------------------------------------------------- grids and RTN


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    kind=st.sampled_from(["symmetric", "integer", "float"]),
    dtype=st.sampled_from(HALVES),
    power=st.integers(-30, 12),
    shift=st.sampled_from([0.0, 0.0, 1.0, -3.0]),
    seed=st.integers(0, 100),
)
def test_inside_the_range_no_weight_is_off_by_more_than_half_a_step(
    bits, columns, group, kind, dtype, power, shift, seed
):
    spec = Spec(bits, group, symmetric=kind == "symmetric", scale_dtype=dtype, float_zero=kind == "float")
    w = (torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**power
    coded = rtn(w, spec)
    scale = spread(coded.scale_OG, group, columns)
    zero = packing.symmetric_zero(bits) if coded.zero_OG is None else spread(coded.zero_OG, group, columns)
    low, high = -zero * scale, (spec.top - zero) * scale
    inside = (w >= low) & (w <= high)
    error = (coded.dense() - w).abs()
    assert (error <= scale * 0.5001 + 1e-6 * w.abs())[inside].all()
    # what lies outside is clipped to the edge; a range is short by the roundings of scale and zero only
    edge = torch.where(w < low, low, high)
    assert torch.allclose(coded.dense()[~inside], edge[~inside], rtol=1e-5)
    steps = (w - edge).abs() / scale
    allowed = 0.51 + spec.top * torch.finfo(dtype).eps
    assert (steps[~inside] <= allowed).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_are_never_worse(symmetric):
    w = weights()
    errors = [float((rtn(w, Spec(b, 32, symmetric)).dense() - w).norm()) for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zero": True}])
def test_codes_do_not_change_when_a_row_is_scaled(bits, kind):
    w = weights()
    factor = 2.0 ** torch.arange(-4, 20)[: len(w), None]
    spec = Spec(bits, 40, scale_dtype=torch.bfloat16, **kind)
    one, other = rtn(w, spec), rtn(w * factor, spec)
    assert torch.equal(one.codes_OI, other.codes_OI)
    assert torch.equal(one.dense() * factor, other.dense())


def on_grid(bits: int, dtype: torch.dtype, *, float_zero: bool) -> Coded:
    """Codes whose every group uses the whole range of its grid."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 80), generator=generator, dtype=torch.uint8)
    codes[:, ::16], codes[:, 1::16] = 0, 2**bits - 1
    scale = (torch.rand(6, 5, generator=generator) * 0.1 + 0.01).to(dtype)
    zero = torch.rand(6, 5, generator=generator) * (2**bits - 1)
    return Coded(codes, bits, 16, scale, (zero if float_zero else zero.round()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_a_grid_are_reproduced_exactly(bits, float_zero, dtype):
    made = on_grid(bits, dtype, float_zero=float_zero)
    spec = Spec(bits, 16, scale_dtype=dtype, float_zero=float_zero)
    w = made.dense()
    x = gram(inputs(80))
    for coded in (rtn(w, spec), gptq(w, x, 400, spec), gptq(w, x, 400, spec, order="static")):
        assert torch.equal(coded.dense(), w)


def test_zeros_are_those_of_the_scale_that_is_stored():
    w = weights(200)
    coded = rtn(w, Spec(8, 96, scale_dtype=torch.bfloat16))
    assert torch.equal(coded.zero_OG.float(), (-w.amin(1, keepdim=True) / coded.scale_OG.float()).round())


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    w = weights()
    w[0, :5] = 0
    for symmetric in (False, True):
        coded = rtn(w, Spec(1, 32, symmetric))
        mean = w.abs().view(24, 3, 32).mean(-1)
        assert torch.allclose(coded.scale_OG.float(), 2 * mean, rtol=1e-3)
        assert (coded.zero_OG is None) == symmetric
        signs = torch.where(w >= 0, 1.0, -1.0)
        assert torch.equal(coded.dense(), signs * coded.scale_OG.float().repeat_interleave(32, 1) / 2)
    assert (coded.codes_OI[0, :5] == 1).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zero": True}, {"search": True}])
@pytest.mark.parametrize("bits", range(1, 9))
def test_groups_of_zeros_are_reproduced_exactly(bits, kind, dtype):
    w = torch.zeros(3, 20)
    w[1, 10:] = 1
    dense = rtn(w, Spec(bits, 8, scale_dtype=dtype, **kind)).dense()
    assert torch.equal(dense[[0, 2]], w[[0, 2]])
    assert torch.equal(dense[1, :8], w[1, :8])


@pytest.mark.parametrize("quantizer", [rtn, hqq])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0, -0.37, 5e-6, 100.0])
def test_groups_of_one_value_are_reproduced(value, dtype, quantizer):
    w = torch.full((2, 24), value)
    for float_zero in (False, True):
        dense = quantizer(w, Spec(3, 8, scale_dtype=dtype, float_zero=float_zero)).dense()
        assert torch.allclose(dense, w, rtol=0.02)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zero": True}])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_largest_and_smallest_weights_there_are_give_finite_numbers(bits, kind, dtype):
    spec = Spec(bits, 8, scale_dtype=dtype, **kind)
    top = float(torch.finfo(torch.bfloat16).max)
    for w in (
        torch.tensor([[top, -top] * 4, [top] * 8, [-top] * 8, [top, 1, 0, 0, 0, 0, 0, 0]]),
        torch.tensor([[1e-38, -1e-38] * 4, [1e-30] * 8, [3e-8, 0, 0, 0, 0, 0, 0, -3e-8]]),
    ):
        for coded in (rtn(w, spec), gptq(w, torch.eye(8), 8, spec)):
            assert torch.isfinite(coded.dense()).all()
            assert torch.isfinite(coded.scale_OG).all()
            assert coded.zero_OG is None or torch.isfinite(coded.zero_OG).all()


@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zero": True}])
@pytest.mark.parametrize("power", [1e-4, 1e-5, 1e-6])
def test_scales_at_the_end_of_float16_still_cover_their_group(power, kind):
    w = weights() * power
    coded = rtn(w, Spec(4, 32, **kind))
    assert float(coded.scale_OG.max()) < torch.finfo(torch.float16).smallest_normal
    assert ((coded.dense() - w).abs() <= 1.01 * spread(coded.scale_OG, 32, 96)).all()


def test_one_outlier_ruins_only_its_own_group():
    w = weights()
    spoiled = w.clone()
    spoiled[3, 40] = 6e4
    spec = Spec(4, 32)
    one, other = rtn(w, spec).dense(), rtn(spoiled, spec).dense()
    elsewhere = torch.ones_like(w, dtype=torch.bool)
    elsewhere[3, 32:64] = False
    assert torch.equal(one[elsewhere], other[elsewhere])
    assert other[3, 40] == pytest.approx(6e4, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("run", [rtn, hqq, lambda w, s: gptq(w, torch.eye(96), 9, s), lambda w, s: nested(w, None, s)])
def test_weights_that_are_no_numbers_are_refused(run, bad):
    w = weights()
    w[1, 2] = w[5, 6] = bad
    with pytest.raises(ModelError, match=r"2 of 2304 weights"):
        run(w, Spec(4, 32))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"bits": 0}, "0 bits"),
        ({"bits": 9}, "9 bits"),
        ({"group": 0}, "group of 0"),
        ({"scale_dtype": torch.float32}, "16 bits"),
        ({"symmetric": True, "float_zero": True}, "symmetric"),
        ({"narrowest": 1.5}, "searched"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(values, told):
    with pytest.raises(UsageError, match=told):
        Spec(**{"bits": 4, "group": 32, **values})


def test_searching_the_range_lowers_the_error_it_minimises():
    w = weights()
    plain, found = rtn(w, Spec(2, 32)), rtn(w, Spec(2, 32, search=True))
    wide = rtn(w, Spec(2, 32, search=True, narrowest=0.2))
    costs = [(c.dense() - w).abs().pow(2.4).view(24, 3, 32).sum(-1) for c in (plain, found)]
    assert (costs[1] <= costs[0]).all()
    errors = [float((c.dense() - w).norm()) for c in (plain, found, wide)]
    assert errors == sorted(errors, reverse=True)


def test_real_zeros_lower_the_error_at_two_bits():
    w = weights()
    errors = [float((rtn(w, Spec(2, 32, float_zero=f)).dense() - w).norm()) for f in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("run", ["rtn", "hqq", "gptq", "static", "blocks"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_are_the_nearest_to_what_is_read_back_in_16_bits(bits, run, dtype):
    w, x = weights(columns=90), gram(inputs(90))
    spec = Spec(bits, 32, scale_dtype=dtype, float_zero=run == "hqq")
    coded = {
        "rtn": lambda: rtn(w, spec),
        "hqq": lambda: hqq(w, spec),
        "gptq": lambda: gptq(w, x, 400, spec),
        "static": lambda: gptq(w, x, 400, spec, order="static"),
        "blocks": lambda: gptq(w, x, 400, spec, compensate_inside=False),
    }[run]()
    assert all(part.is_contiguous() for part in (coded.codes_OI, coded.scale_OG, coded.zero_OG))
    assert coded.scale_OG.dtype == dtype
    assert coded.zero_OG.dtype == dtype
    assert coded.scale_OG.shape == coded.zero_OG.shape == (24, 3)
    if run in ("rtn", "hqq"):
        assert torch.equal(encode(w, coded.scale_OG, coded.zero_OG, spec), coded.codes_OI)
    read = packing.unpack(coded.packed(), bits, 90)
    assert torch.equal(dense(read, bits, 32, coded.scale_OG, coded.zero_OG), coded.dense())


def test_a_group_wider_than_the_matrix_is_a_whole_row():
    w, x = weights(), gram(inputs())
    for run in (lambda s: rtn(w, s), lambda s: hqq(w, s), lambda s: gptq(w, x, 400, s)):
        assert same(run(Spec(4, 96)), run(Spec(4, 1000)))


def test_parameters_of_a_model_are_quantized_without_their_gradients():
    w, x = torch.nn.Parameter(weights().bfloat16()), gram(inputs()).double()
    for quantizer in ("rtn", "hqq", "gptq"):
        coded, told = quantize(w, Spec(3, 32), quantizer=quantizer, gram_II=x, tokens=400)
        assert not coded.dense().requires_grad
        assert told.output_error > 0
    assert not nested(w, x, NEST).dense().requires_grad


def test_inputs_are_left_as_they_were():
    w, x = weights(), gram(inputs())
    before = w.clone(), x.clone()
    for order in ("natural", "static"):
        gptq(w, x, 400, Spec(3, 32), order=order)
    hqq(w, Spec(3, 32))
    nested(w, x, Spec(3, 32))
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_grids_and_their_packing_are_those_of_compressed_tensors(bits, dtype):
    peer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as peer_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    w = weights().to(dtype).float()
    options = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    groups = w.view(24, 3, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), options)
    signed = peer_quantize(w, scale.to(dtype), zero, options, dtype=torch.int8)
    coded = rtn(w, Spec(bits, 32, symmetric=True, scale_dtype=dtype))
    assert torch.equal(coded.scale_OG, scale.to(dtype))
    assert torch.equal(coded.codes_OI.short() - 2 ** (bits - 1), signed.short())
    assert torch.equal(coded.packed(), peer.pack_to_int32(signed, bits))


# --------------------------------------------------------------------------------------------------------------- HQQ


def test_hqq_never_ends_with_a_larger_error_than_it_started_with():
    w = weights(seed=5) + 0.5 * weights(seed=6).pow(3) * 400
    for bits in range(2, 9):
        spec = Spec(bits, 32, float_zero=True)
        start, end = ((c.dense() - w).abs().view(24, 3, 32).mean(-1) for c in (rtn(w, spec), hqq(w, spec)))
        assert (end <= start).all()
        assert bits > 4 or float(end.mean()) < float(start.mean())


def test_a_step_of_hqq_is_the_authors_equation():
    w = weights() * 20  # about half of the errors are then shrunk to nothing
    spec = Spec(3, 32, float_zero=True)
    start, one = rtn(w, spec), hqq(w, spec, iterations=1)
    scale = spread(start.scale_OG, 32, 96)
    error = w - start.dense()
    shrunk = error.sign() * (error.abs() - error.abs().pow(0.7 - 1) / 10).clamp(min=0)
    assert 0.2 < (shrunk != 0).float().mean() < 0.8
    step = (start.codes_OI - (w - shrunk) / scale).view(24, 3, 32).mean(-1).half()
    moved = one.zero_OG != start.zero_OG
    assert moved.sum() >= 10
    assert torch.allclose(one.zero_OG[moved].float(), step[moved].float(), atol=5e-3)


def test_hqq_refuses_a_symmetric_grid():
    with pytest.raises(UsageError, match="zero"):
        hqq(weights(), Spec(4, 32, symmetric=True))


# -------------------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize(
    ("rows", "columns", "group", "bits", "symmetric"),
    [
        (9, 64, 16, 3, False),
        (9, 150, 48, 2, False),
        (9, 200, 200, 4, True),
        (9, 200, 144, 4, False),
        (9, 96, 32, 1, False),
    ],
)
@pytest.mark.parametrize("block", [16, 64, 128])
def test_gptq_gives_the_codes_of_the_papers_algorithm_whatever_the_block(rows, columns, group, bits, symmetric, block):
    w, x = weights(rows, columns), gram(inputs(columns, 1000))
    spec = Spec(bits, group, symmetric)
    codes = gptq(w, x, 1000, spec, block=block).codes_OI
    differ = (codes != column_by_column(w, x, spec)).float().mean()
    assert float(differ) <= 0.002  # ties of float32 and float64


@pytest.mark.parametrize("order", ["natural", "static"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("group", [32, 96, 40])
def test_gptq_with_inputs_that_have_nothing_in_common_rounds_to_nearest(group, inside, order):
    w = weights()
    for bits in (1, 2, 4):
        spec = Spec(bits, group)
        found = gptq(w, 3 * torch.eye(96), 50, spec, order=order, compensate_inside=inside)
        assert same(found, rtn(w, spec))


@pytest.mark.parametrize("order", ["natural", "static"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_rounding_to_nearest(bits, inside, order):
    w, x = weights(columns=256), gram(inputs(256, 1000))
    spec = Spec(bits, 32)
    found = gptq(w, x, 1000, spec, order=order, compensate_inside=inside, block=64)
    assert loss(w, found, x) < 0.9 * loss(w, rtn(w, spec), x)


def test_compensation_inside_of_blocks_loses_less_than_without():
    w, x = weights(columns=256), gram(inputs(256, 1000))
    losses = [loss(w, gptq(w, x, 1000, Spec(4, 32), compensate_inside=i), x) for i in (True, False)]
    assert losses[0] < losses[1]


def test_without_compensation_inside_the_first_block_is_rounded_to_nearest():
    w, x = weights(columns=256), gram(inputs(256, 1000))
    found, plain = gptq(w, x, 9, Spec(2, 32), block=64, compensate_inside=False), rtn(w, Spec(2, 32))
    assert torch.equal(found.codes_OI[:, :64], plain.codes_OI[:, :64])
    assert not torch.equal(found.codes_OI[:, 64:128], plain.codes_OI[:, 64:128])


def test_blocks_that_compensate_reach_the_best_that_later_columns_can_do():
    """With the first block's codes fixed, the next block is rounded at the least squares optimum."""
    w, x = weights(5, 64), inputs(64, 500)
    spec = Spec(3, 32)
    found = gptq(w, gram(x), 500, spec, block=32, compensate_inside=False, damp=0.0)
    lost = (w - found.dense())[:, :32] @ x[:, :32].T
    best = torch.linalg.lstsq(x[:, 32:].double(), lost.T.double()).solution.T.float() + w[:, 32:]
    assert same(rtn(best, spec), Coded(found.codes_OI[:, 32:], 3, 32, found.scale_OG[:, 1:], found.zero_OG[:, 1:]))


def test_permuted_columns_give_the_same_codes_in_static_order():
    w, x = weights(), gram(inputs())
    at = torch.randperm(96, generator=torch.Generator().manual_seed(4))
    spec = Spec(3, 96)
    one = gptq(w, x, 400, spec, order="static")
    other = gptq(w[:, at], x[at][:, at], 400, spec, order="static")
    assert torch.equal(one.codes_OI[:, at], other.codes_OI)
    assert torch.equal(one.scale_OG, other.scale_OG)


def test_static_order_rounds_what_the_largest_inputs_meet_first():
    w, x = weights(), inputs()
    x[:, 50] *= 10
    x[:, 7] *= 0.05
    codes, plain = gptq(w, gram(x), 400, Spec(3, 32), order="static").codes_OI, rtn(w, Spec(3, 32)).codes_OI
    assert torch.equal(codes[:, 50], plain[:, 50])
    assert not torch.equal(codes[:, 7], plain[:, 7])


def test_static_order_keeps_the_scales_of_the_original_weights():
    w, x = weights(), gram(inputs())
    spec = Spec(3, 32)
    assert torch.equal(gptq(w, x, 400, spec, order="static").scale_OG, rtn(w, spec).scale_OG)


@pytest.mark.parametrize("order", ["natural", "static"])
def test_inputs_that_were_never_seen_keep_their_weights_up_to_rounding(order):
    w, x = weights(), inputs()
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[0, 17, 40, 41, 95]] = True
    dead[64:80] = True
    x[:, dead] = 0
    found = gptq(w, gram(x), 400, Spec(4, 16), order=order)
    scale = spread(found.scale_OG, 16, 96)
    assert ((found.dense() - w).abs() <= 0.51 * scale)[:, dead].all()
    assert same(
        Coded(found.codes_OI[:, 64:80], 4, 16, found.scale_OG[:, 4:5], found.zero_OG[:, 4:5]),
        rtn(w[:, 64:80], Spec(4, 16)),
    )


def test_an_expert_that_no_token_reached_is_rounded_to_nearest():
    w = weights()
    spec = Spec(3, 32)
    assert same(gptq(w, torch.zeros(96, 96), 0, spec), rtn(w, spec))
    assert same(gptq(w, torch.zeros(96, 96), 5, spec), rtn(w, spec))
    coded, told = quantize(w, spec, quantizer="gptq", gram_II=torch.zeros(96, 96), calibration_tokens=1000)
    assert same(coded, rtn(w, spec))
    assert told.fallback
    assert told.tokens == 0
    assert math.isnan(told.output_error)


def test_a_gram_matrix_of_few_tokens_is_damped_until_it_can_be_factored():
    w, x = weights(), gram(inputs(tokens=3))
    spec = Spec(4, 32)
    found = gptq(w, x, 3, spec, damp=0.0)
    assert torch.isfinite(found.dense()).all()
    assert loss(w, found, x) < loss(w, rtn(w, spec), x)


def test_the_size_of_the_gram_matrix_does_not_matter():
    w, x = weights(), inputs()
    x[:, 7] = 0
    assert same(gptq(w, gram(x), 400, Spec(3, 32)), gptq(w, gram(x) * 2.0**-30, 400, Spec(3, 32)))


def test_inputs_that_were_never_seen_need_no_damping():
    x = inputs()
    x[:, 30:35] = 0
    factor = upper_factor(gram(x)[None], 0.0)[0]
    seen = torch.tensor([i for i in range(96) if i not in range(30, 35)])
    assert torch.allclose((factor @ factor.T)[seen][:, seen], gram(x)[seen][:, seen], rtol=1e-4, atol=1e-4)


def test_the_factor_times_itself_is_the_damped_gram_matrix():
    x = gram(inputs())
    factor = upper_factor(x[None], 0.01)[0]
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor @ factor.T, x + 0.01 * x.diagonal().mean() * torch.eye(96), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("order", ["natural", "static"])
def test_several_matrices_at_once_are_each_quantized_as_if_alone(order):
    w = torch.stack([weights(seed=s) for s in range(3)])
    x = torch.stack([gram(inputs(seed=s)) for s in range(3)])
    spec = Spec(3, 40)
    both = gptq(w, x, 400, spec, order=order)
    assert both.codes_OI.shape == (3, 24, 96)
    for e in range(3):
        one = gptq(w[e], x[e], 400, spec, order=order)
        assert same(one, Coded(both.codes_OI[e], 3, 40, both.scale_OG[e], both.zero_OG[e]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    group=st.integers(1, 170),
    block=st.integers(1, 140),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    order=st.sampled_from(["natural", "static"]),
    inside=st.booleans(),
    tokens=st.sampled_from([1, 20, 300]),
)
def test_gptq_takes_any_shape_group_and_block(rows, columns, group, block, bits, symmetric, order, inside, tokens):
    w, x = weights(rows, columns), gram(inputs(columns, tokens))
    spec = Spec(bits, group, symmetric)
    found = gptq(w, x, tokens, spec, block=block, order=order, compensate_inside=inside)
    assert found.codes_OI.shape == (rows, columns)
    assert int(found.codes_OI.max()) < 2**bits
    assert found.scale_OG.shape == (rows, packing.groups(columns, group))
    assert (found.zero_OG is None) == symmetric
    assert torch.isfinite(found.dense()).all()


@pytest.mark.parametrize("group", [1, 7, 32, 96])
def test_blocks_of_one_column_are_the_column_by_column_algorithm(group):
    w, x = weights(), gram(inputs())
    spec = Spec(3, group)
    alone = gptq(w, x, 400, spec, block=1, compensate_inside=False)
    assert (alone.codes_OI != gptq(w, x, 400, spec).codes_OI).float().mean() <= 0.002
    assert (gptq(w, x, 400, spec, block=1).codes_OI != column_by_column(w, x, spec)).float().mean() <= 0.002


def test_a_gram_matrix_that_is_none_is_refused():
    w = weights()
    with pytest.raises(ModelError, match="not finite"):
        gptq(w, torch.full((96, 96), math.nan), 9, Spec(4, 32))
    with pytest.raises(ModelError, match="Cholesky"):
        gptq(w, torch.eye(96) - 500 * torch.ones(96, 96).fill_diagonal_(0), 9, Spec(4, 32))
    with pytest.raises(UsageError, match="damp"):
        gptq(w, torch.eye(96), 9, Spec(4, 32), damp=-1)


# ------------------------------------------------------------------------------------------------------ quantize


def test_gptq_falls_back_for_an_expert_that_saw_too_little_and_says_so():
    w, x = weights(), gram(inputs())
    spec = Spec(3, 32)
    rare, told = quantize(w, spec, quantizer="gptq", gram_II=x, tokens=400, calibration_tokens=100_000)
    assert same(rare, rtn(w, spec))
    assert told.fallback
    usual, told = quantize(w, spec, quantizer="gptq", gram_II=x, tokens=400, calibration_tokens=10_000)
    assert same(usual, gptq(w, x, 400, spec))
    assert not told.fallback
    asked, told = quantize(
        w, spec, quantizer="gptq", gram_II=x, tokens=400, calibration_tokens=100_000, fallback_share=0.001
    )
    assert same(asked, usual)
    assert not told.fallback


@pytest.mark.parametrize(
    ("tokens", "of", "few"), [(31, 100, True), (32, 100, False), (499, 10**5, True), (500, 10**5, False)]
)
def test_too_few_tokens_are_less_than_half_a_percent_or_than_32(tokens, of, few):
    assert too_few(tokens, of) == few


@pytest.mark.parametrize("quantizer", ["rtn", "hqq", "gptq"])
def test_the_report_is_the_error_of_the_outputs_themselves(quantizer):
    w, x = weights(40, 300), inputs(300, 500)
    coded, told = quantize(w, Spec(3, 32), quantizer=quantizer, gram_II=gram(x), tokens=500, calibration_tokens=500)
    lost = w - coded.dense()
    assert told.output_error == pytest.approx(float((lost @ x.T).norm() / (w @ x.T).norm()), rel=1e-4)
    assert told.weight_error == pytest.approx(float(lost.norm() / w.norm()), rel=1e-5)


def test_energy_of_a_row_is_the_squared_norm_of_its_outputs():
    w, x = weights(5, 600), inputs(600, 300)
    assert torch.allclose(energy(w, gram(x)).float(), (w @ x.T).pow(2).sum(1), rtol=1e-4)


def test_quantizing_without_what_it_needs_is_refused():
    with pytest.raises(UsageError, match="awq"):
        quantize(weights(), Spec(4, 32), quantizer="awq")
    with pytest.raises(UsageError, match="Gram"):
        quantize(weights(), Spec(4, 32), quantizer="gptq", tokens=50)


def test_hqq_stands_between_rounding_and_gptq_at_two_bits():
    w, x = weights(64, 256), gram(inputs(256, 2000))
    spec = Spec(2, 64, float_zero=True)
    losses = [loss(w, c, x) for c in (gptq(w, x, 2000, spec), hqq(w, spec), rtn(w, Spec(2, 64)))]
    assert losses == sorted(losses)


# ------------------------------------------------------------------------------------------------------------- MWQ


def nested(w, x, spec, planes=3, **options):
    return mwq(w, x, base_bits=spec.bits, planes=planes, spec=spec, **options)


WAYS = ["best", "paper", "never"]
NEST = Spec(2, 32, float_zero=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_level_is_the_level_below_and_one_plane(way):
    w, x = weights(columns=200), gram(inputs(200))
    found = nested(w, x, NEST, compensate=way)
    running = found.base.dense()
    for k, (sign, scale) in enumerate(found.planes, start=1):
        assert not torch.equal(found.dense(k), running)
        running = running + (2 * sign.float() - 1) * spread(scale, 32, 200)
        assert torch.equal(found.dense(k), running)
    assert torch.equal(found.dense(), running)


@pytest.mark.parametrize("way", ["paper", "never"])
def test_more_planes_do_not_change_the_levels_below(way):
    w, x = weights(columns=200), gram(inputs(200))
    few, many = nested(w, x, NEST, planes=1, compensate=way), nested(w, x, NEST, planes=4, compensate=way)
    for k in (0, 1):
        assert torch.equal(few.dense(k), many.dense(k))


@pytest.mark.parametrize("tokens", [20, 400])
@pytest.mark.parametrize("way", WAYS)
def test_every_plane_brings_every_rows_outputs_closer(way, tokens):
    w, x = weights(columns=200), gram(inputs(200, tokens))
    found = nested(w, x, NEST, planes=6, compensate=way)
    errors = torch.stack([energy(w - found.dense(k), x) for k in range(7)])
    assert (errors.diff(dim=0) <= 0).all()
    assert (errors.sum(1).diff() < 0).all()


def test_every_plane_brings_the_weights_closer_where_there_are_no_inputs():
    w = weights(columns=200)
    found = nested(w, None, NEST, planes=6)
    errors = torch.stack([(w - found.dense(k)).pow(2).sum(1) for k in range(7)])
    assert (errors.diff(dim=0) < 0).all()


def test_without_planes_nothing_is_left_but_group_wise_quantization():
    w, x = weights(columns=200), gram(inputs(200))
    assert same(nested(w, None, NEST, planes=0).base, rtn(w, NEST))
    assert same(nested(w, x, NEST, planes=0, compensate="never").base, rtn(w, NEST))
    blocks = gptq(w, x, 400, NEST, compensate_inside=False)
    assert same(nested(w, x, NEST, planes=0, compensate="paper").base, blocks)
    assert not same(blocks, rtn(w, NEST))


def test_a_planes_scale_is_the_mean_residual_weighted_by_the_inputs():
    w, x = weights(), torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(2)))
    found = nested(w, x, NEST, planes=1)
    residual, h = (w - found.base.dense()).abs().view(24, 3, 32), x.diagonal().view(3, 32)
    expected = (residual * h).sum(-1) / h.sum(-1)
    assert torch.allclose(found.planes[0][1].float(), expected, rtol=1e-3)


def test_planes_are_signs_and_zero_counts_as_plus():
    w = on_grid(2, torch.float16, float_zero=False).dense()
    spec = Spec(2, 16)
    (sign, scale), *_ = nested(w, None, spec, planes=1).planes
    assert sign.dtype == torch.uint8
    assert (sign == 1).all()
    assert (scale == 0).all()
    signs = torch.cat([s for s, _ in nested(weights(), gram(inputs()), NEST).planes])
    assert set(signs.unique().tolist()) == {0, 1}


def test_the_best_chain_is_no_worse_over_all_levels_than_the_papers():
    w, x = weights(columns=256), gram(inputs(256))

    def product(way):
        found = nested(w, x, NEST, compensate=way, block=64)
        return math.prod(float(energy(w - found.dense(k), x).sum()) for k in range(4))

    best, paper, never = (product(way) for way in WAYS)
    assert best <= min(paper, never)


def test_compensated_planes_are_taken_where_they_lose_less():
    w, x = weights(columns=256), gram(inputs(256, 60))
    spec = Spec(2, 32, float_zero=True)
    one = nested(w, x, spec, compensate="paper", block=32).planes[0][0]
    base = nested(w, x, spec, compensate="paper", block=32, planes=0).base.dense()
    plain = (w - base >= 0).to(torch.uint8)
    rows = (one != plain).any(1)
    assert rows.any()


def test_stored_bytes_of_a_nested_matrix_are_those_of_its_tensors():
    for rows, columns, bits, group in [(24, 200, 2, 32), (5, 33, 3, 16)]:
        w = weights(rows, columns)
        found = nested(w, None, Spec(bits, group), planes=2)
        tensors = [found.base.packed(), found.base.scale_OG, found.base.zero_OG]
        tensors += [t for sign, scale in found.planes for t in (packing.pack(sign, 1), scale)]
        total = sum(t.numel() * t.element_size() for t in tensors)
        assert nested_bytes(rows, columns, bits, 2, group, symmetric=False) == total
    w = 128 * 128  # the paper's 4.5 bits for 2 bits and two planes, groups of 128
    assert nested_bytes(128, 128, 2, 2, 128, symmetric=False) * 8 / w == 4.5


def test_a_negative_number_of_planes_is_refused():
    with pytest.raises(UsageError, match="-1 planes"):
        nested(weights(), None, NEST, planes=-1)


def test_an_expert_that_no_token_reached_is_nested_all_the_same():
    w = weights()
    unseen, plain = nested(w, torch.zeros(96, 96), NEST), nested(w, None, NEST)
    assert torch.equal(unseen.dense(), plain.dense())


def test_the_report_of_a_dense_matrix_against_itself_is_nothing_lost():
    w = weights()
    told = report(w, w, gram(inputs()), fallback=False, tokens=400)
    assert (told.output_error, told.weight_error) == (0.0, 0.0)
