"""PMQ: the released allocations, the integer program against search, what is measured, equal bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.allocation import dynamic_program, integer_program
from coterie.compression.quantizers import Spec, rtn
from coterie.compression.quantizing.pmq import significance
from coterie.compression.rounding import error_name, rounding_error
from coterie.errors import UsageError
from coterie.profiling.observers import GateMass, SelectionCount
from families import FEW, resident, saved, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")

# statistics and allocations released for layers 0 and 15 of Mixtral-8x7B
FREQUENCY = {
    0: [68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331],
    15: [57215, 75579, 71096, 41404, 68277, 71485, 73259, 65973],
}
MASS = {
    0: [19891.6, 22812.2, 21595.7, 21344.5, 19124.0, 16804.9, 17566.2, 18464.9],
    15: [16520.2, 20950.1, 21696.0, 13733.5, 19519.8, 22127.4, 22578.1, 21265.4],
}
EPS = {
    0: [
        [455.0, 180.4, 78.21],
        [3856.11, 708.03, 369.99],
        [735.98, 372.66, 156.33],
        [663.2, 341.52, 143.51],
        [525.43, 273.92, 114.71],
        [434.18, 218.07, 92.07],
        [3275.43, 677.75, 288.98],
        [450.27, 231.79, 97.39],
    ],
    15: [
        [8985.3, 7735.3, 3187.45],
        [9444.33, 8232.23, 3396.08],
        [10683.29, 9034.21, 3739.49],
        [9922.85, 7955.65, 3233.43],
        [9709.19, 8293.27, 3418.21],
        [9970.17, 8359.24, 3467.76],
        [10261.22, 8838.62, 3664.7],
        [10843.59, 9324.99, 3852.95],
    ],
}
RELEASED = {
    (0, 12): [1, 3, 2, 1, 1, 1, 2, 1],
    (0, 16): [2, 3, 2, 2, 2, 1, 3, 1],
    (0, 20): [2, 3, 3, 3, 2, 2, 3, 2],
    (15, 12): [1, 1, 2, 1, 1, 2, 3, 1],
    (15, 16): [1, 2, 3, 1, 1, 3, 3, 2],
    (15, 20): [2, 3, 3, 1, 2, 3, 3, 3],
}
SOLVERS = (integer_program, dynamic_program)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize(("layer", "budget"), RELEASED)
def test_the_released_allocations_come_out_of_the_released_statistics(solve, layer, budget):
    matter_E = significance(torch.tensor(FREQUENCY[layer]), torch.tensor(MASS[layer]), 1.0, 1.5)
    cost_EN = matter_E[:, None] * torch.tensor(EPS[layer]).double()
    assert solve(cost_EN, (1, 2, 3), budget, each_occurs=True) == RELEASED[layer, budget]


def _total(cost, widths, chosen):
    return sum(float(cost[i, widths.index(b)]) for i, b in enumerate(chosen))


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(3, 6),
    widths=st.sampled_from([(1, 2, 3), (2, 4), (1, 2, 3, 4), (2, 3, 8)]),
    seed=st.integers(0, 1000),
    occurs=st.booleans(),
    spare=st.integers(0, 12),
)
def test_no_choice_within_the_budget_costs_less(items, widths, seed, occurs, spare):
    if occurs and items < len(widths):
        return
    cost = torch.rand(items, len(widths), generator=torch.Generator().manual_seed(seed)).double()
    least = items * widths[0] + (sum(w - widths[0] for w in widths[1:]) if occurs else 0)
    budget = least + spare

    def allowed(chosen):
        if sum(chosen) > budget:
            return False
        return not occurs or budget >= items * widths[-1] or set(widths[1:]) <= set(chosen)

    best = min(_total(cost, widths, c) for c in itertools.product(widths, repeat=items) if allowed(c))
    for solve in SOLVERS:
        chosen = solve(cost, widths, budget, each_occurs=occurs)
        assert allowed(chosen)
        assert _total(cost, widths, chosen) == pytest.approx(best, abs=1e-9)


def test_a_larger_budget_never_costs_more_and_the_largest_takes_the_widest():
    cost = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)).sort(descending=True).values
    costs = [_total(cost, (1, 2, 3), integer_program(cost, (1, 2, 3), b, each_occurs=True)) for b in range(12, 28)]
    assert costs == sorted(costs, reverse=True)
    assert integer_program(cost, (1, 2, 3), 27, each_occurs=True) == [3] * 9


def test_a_budget_that_cannot_be_met_is_refused():
    for solve in SOLVERS:
        with pytest.raises(UsageError, match="at least 11"):
            solve(torch.rand(8, 3), (1, 2, 3), 10, each_occurs=True)


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True)


def profiled(folder, ids, widths=(1, 2, 3), **options):
    observed = (SelectionCount, GateMass, rounding_error(widths, 16))
    return coterie.profile(str(folder), tokens=str(ids), observers=observed, **options)


@pytest.mark.parametrize("family", FEW)
def test_the_error_of_an_expert_is_that_of_the_layers_output_with_it_alone_rounded(family, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    ids = token_file(tmp_path / "ids.safetensors", rows=2, length=24)
    profile = profiled(source, ids, widths=(2,))
    model = resident(source)
    layer = next(iter(moe_layers(model)))
    found = profile.layers[layer.index]
    seen: dict[str, torch.Tensor] = {}

    def keep(module, args, kwargs):
        seen["args"] = args if args else tuple(kwargs.values())

    handle = layer.experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens(2, 24))
        handle.remove()
        whole = layer.experts(*seen["args"])
        for e in (0, 3):
            before = layer.bank.read(e, torch.float64)
            rounded = layer.bank.read(e)
            for name in ("up_IH", "gate_IH", "down_HI"):
                value = getattr(rounded, name)
                setattr(rounded, name, rtn(value.contiguous(), Spec(2, 16, False, torch.float16)).dense())
            layer.bank.write(e, rounded)
            off = float((layer.experts(*seen["args"]) - whole).double().square().sum())
            layer.bank.write(e, before)
            assert float(found.stats[error_name((2,), 16)][e, 0]) == pytest.approx(off, rel=1e-3, abs=1e-9)


def test_statistics_do_not_depend_on_how_text_is_batched_and_sum_to_what_was_routed(tmp_path, ids):
    source = saved("qwen3-moe", tmp_path, torch.float32)
    one, two = profiled(source, ids, batch_size=1), profiled(source, ids, batch_size=4)
    for index, layer in one.layers.items():
        other = two.layers[index]
        assert int(layer.count_E.sum()) == layer.tokens * layer.top_k
        assert torch.equal(layer.count_E, other.count_E)
        name = error_name((1, 2, 3), 16)
        torch.testing.assert_close(layer.stats[name], other.stats[name], rtol=1e-4, atol=1e-9)
        unused = layer.count_E == 0
        assert torch.equal(layer.stats[name][unused], torch.zeros_like(layer.stats[name][unused]))


def test_an_expert_no_token_selected_matters_nothing():
    assert significance(torch.tensor([5, 0]), torch.tensor([1.0, 0.0]), 0.0, 0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("mean", [1.75, 2.57])
def test_every_layer_holds_the_mean_asked_for_and_each_width(mean, tmp_path, ids):
    source = saved("mixtral", tmp_path)
    parameters = {"mean": mean, "group_size": 16}
    result = coterie.compress(str(source), str(tmp_path / "out"), method="pmq", parameters=parameters, tokens=str(ids))
    for widths in result.plan.experts().values():
        assert widths["gate"] == widths["up"] == widths["down"]
        assert sum(widths["up"]) <= mean * 8
        assert {2, 3} <= set(widths["up"])
    assert result.plan.expert_bits <= mean
    assert set(result.plan.linears.values()) == {4}
    assert result.sweeps == 2


def test_the_command_line_explains_every_width(tmp_path, ids):
    source = saved("qwen3-moe", tmp_path)
    given = ("--method", "pmq")
    assert cli("profile", source, "--out", tmp_path / "profile", "--tokens", ids, *given).code == 0
    done = cli("plan", source, "--out", tmp_path / "plan.json", "--profile", tmp_path / "profile", *given)
    assert done.code == 0, done.err
    assert "of selections" in done.out
    done = cli("plan", source, "--out", tmp_path / "other.json", *given)
    assert done.code != 0
    assert "coterie profile" in done.err
    done = cli("compress", source, tmp_path / "out", *given, "--set", "mean=0.5", "--tokens", ids)
    assert done.code != 0
    assert "at least" in done.err
