"""QuantMoE-Bench: mean bits, orders and overrides of its policies, outlier scores, the predictor of cosines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.bits import Linear
from coterie.compression.quantizing.quantmoe import Heuristics
from coterie.compression.two_levels import Item, Weights, allocate, mean_of
from coterie.errors import UsageError
from coterie.profiling.observers import SelectionCount
from coterie.profiling.outliers import outlier_score
from coterie.profiling.turning import Predictor, trained, turning, turning_name
from families import FEW, resident, saved, token_file, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTRAL = Weights(
    {i: {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)} for i in range(32)},
    dict.fromkeys(range(32), 8),
    [
        Linear(f"{i}.{name}", "attention", shape)
        for i in range(32)
        for name, shape in (("q", (4096, 4096)), ("k", (1024, 4096)), ("v", (1024, 4096)), ("o", (4096, 4096)))
    ],
)


def _raised(experts=(), blocks=(), attention=4):
    items = [Item("attention", attention, linears=MIXTRAL.linears)]
    items += [Item("expert", 4, [(i, e, p) for p in MIXTRAL.shapes[i]]) for i, e in experts]
    items += [Item("block", 4, [m for m in MIXTRAL.matrices if m[0] == i]) for i in blocks]
    return allocate(MIXTRAL, 2, {n.name: 2 for n in MIXTRAL.linears}, items, None)


@pytest.mark.parametrize(
    ("made", "mean"),
    [
        ({}, 2.06),
        ({"attention": 8}, 2.17),
        ({"blocks": range(4)}, 2.30),
        ({"experts": [(i, e) for i in range(32) for e in (0, 1)]}, 2.54),
        ({"blocks": range(8)}, 2.54),
        ({"experts": [(i, e) for i in range(32) for e in range(4)]}, 3.03),
    ],
)
def test_mean_bits_are_those_of_the_paper_for_mixtral(made, mean):
    assert round(mean_of(MIXTRAL, _raised(**made)), 2) == pytest.approx(mean, abs=0.011)


@settings(max_examples=30, deadline=None)
@given(mean=st.floats(2.0, 4.0), seed=st.integers(0, 100))
def test_a_mean_is_never_exceeded_and_the_first_items_come_first(mean, seed):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).tolist()
    items = [Item(str(n), 4, [(n // 8, n % 8, p) for p in MIXTRAL.shapes[0]]) for n in order]
    made = allocate(MIXTRAL, 2, {n.name: 2 for n in MIXTRAL.linears}, items, mean)
    assert mean_of(MIXTRAL, made) <= mean + 1e-9
    wide = [made.experts[n // 8]["up"][n % 8] == 4 for n in order]
    assert wide == sorted(wide, reverse=True)
    assert made.facts[0]["mean_bits_of_the_model"] == pytest.approx(mean_of(MIXTRAL, made), abs=1e-5)


def test_a_mean_below_the_base_is_refused():
    with pytest.raises(UsageError, match=r"mean of 1\.9 bits"):
        allocate(MIXTRAL, 2, {n.name: 2 for n in MIXTRAL.linears}, [], 1.9)


# -- outliers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), scale=st.floats(0.01, 100), seed=st.integers(0, 50))
def test_outlier_scores_ignore_scale_and_the_order_of_rows_and_are_at_least_one(rows, columns, scale, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    score = outlier_score(w)
    assert score >= 1 - 1e-6
    assert outlier_score(w * scale) == pytest.approx(score, rel=1e-4)
    assert outlier_score(w.flip(0)) == pytest.approx(score, rel=1e-5)


def test_columns_of_one_magnitude_score_one_and_a_column_of_zeros_counts_as_that():
    w = torch.ones(5, 3) * torch.tensor([1.0, -2.0, 0.0])
    assert outlier_score(w) == pytest.approx(1.0)


def test_the_score_looks_down_columns_of_inputs():
    w = torch.ones(4, 2)
    w[:, 1] = 100  # one large input everywhere is no outlier of its column
    assert outlier_score(w) == pytest.approx(1.0)
    w[0, 0] = 5
    assert outlier_score(w) == pytest.approx(5 / 2)


@pytest.mark.parametrize("family", FEW)
def test_a_planted_outlier_is_raised_first(family, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    model = resident(source)
    layer = list(moe_layers(model))[-1]
    weights = layer.bank.read(2)
    weights.down_HI[1, 1] = 1000.0
    layer.bank.write(2, weights)
    model.save_pretrained(tmp_path / "planted")
    parameters = {"mean": 2.2, "attention_bits": 2, "shared_bits": 2, "dense_bits": 2}
    plan = coterie.plan(str(tmp_path / "planted"), method="quantmoe-outlier", parameters=parameters)
    widths = plan.experts()[layer.index]
    assert widths["down"][2] == 4
    assert "down has an outlier" in next(p for p in plan.layers if p.index == layer.index).extra["why"][2]


# -- cosines ----------------------------------------------------------------------------------------------------------


def test_the_predictor_learns_more_than_the_mean_and_stays_within_one():
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(2000, 16, generator=generator)
    cosine_T = torch.tanh(x_TH[:, 0] * 0.8)
    network, loss, plain = trained(x_TH, cosine_T)
    assert loss < 0.5 * plain
    with torch.no_grad():
        foretold = network(x_TH)
    assert float(foretold.abs().max()) < 1
    assert [tuple(p.shape) for p in Predictor(16).parameters()] == [(1024, 16), (1, 1024)]


@pytest.mark.parametrize("side", ["ffn", "residual"])
@pytest.mark.parametrize("family", ["qwen2-moe", "mixtral", "deepseek-v3"])
def test_measured_cosines_are_those_of_what_the_block_receives_and_puts_out(family, side, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    ids = token_file(tmp_path / "ids.safetensors", rows=2, length=24)
    profile = coterie.profile(str(source), tokens=str(ids), observers=(turning(side, 40),))
    model = resident(source)
    layer = next(iter(moe_layers(model)))
    seen = {}

    def block(module, args, output):
        seen["x"], seen["y"] = args[0], output[0] if isinstance(output, tuple) else output

    def norm(module, args):
        seen["h"] = args[0]

    layer.block.register_forward_hook(block)
    layer.decoder.post_attention_layernorm.register_forward_pre_hook(norm)
    with torch.no_grad():
        model(tokens(2, 24))
    x, y = (seen["x"], seen["y"]) if side == "ffn" else (seen["h"], seen["h"] + seen["y"].view_as(seen["h"]))
    cosine = nn.functional.cosine_similarity(x.reshape(-1, 64), y.reshape(-1, 64), dim=-1)
    figures = profile.layers[layer.index].stats[turning_name(side, 40)]
    assert float(figures[0]) == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert -1 < float(figures[1]) < 1


# -- policies ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    ids = token_file(folder / "ids.safetensors", padded=True)

    def made(family):
        source = saved(family, folder)
        observers = (SelectionCount, turning("ffn", 60))
        return str(source), coterie.profile(str(source), tokens=str(ids), observers=observers)

    return made


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_every_rule_raises_what_it_names(family, profile_of):
    source, profile = profile_of(family)
    parameters = {"frequent": 1, "first_blocks": 1, "matrices": ["down"], "attention_bits": 8}
    plan = coterie.plan(source, profile, method="quantmoe-heuristics", parameters=parameters)
    first, *others = sorted(plan.experts())
    assert set(plan.experts()[first]["up"]) == {4}
    for index in others:
        count_E = profile.layers[index].count_E
        widths = plan.experts()[index]
        assert [b == 4 for b in widths["up"]] == [e == int(count_E.argmax()) for e in range(len(count_E))]
        assert set(widths["down"]) == {4}
    roles = {n: b for n, b in plan.linears.items() if "shared" in n}
    assert set(roles.values()) <= {4}
    assert {b for n, b in plan.linears.items() if "attn" in n} == {8}
    again = coterie.plan(source, profile, method="quantmoe-heuristics", parameters=parameters)
    assert again == plan


def test_with_a_mean_attention_comes_before_experts(profile_of):
    source, profile = profile_of("mixtral")
    plan = coterie.plan(source, profile, method="quantmoe-heuristics", parameters={"mean": 2.4})
    assert set(plan.linears.values()) == {4}
    facts = plan.layers[0].extra["facts"]["mean_bits_of_the_model"]
    assert facts <= 2.4
    everything = coterie.plan(source, profile, method="quantmoe-heuristics", parameters={"mean": 16.0})
    assert everything.layers[0].extra["facts"]["mean_bits_of_the_model"] > facts


@pytest.mark.parametrize("mode", ["measured", "predictor"])
def test_the_blocks_with_the_lowest_cosines_are_raised(mode, profile_of):
    source, profile = profile_of("mixtral")
    at = 0 if mode == "measured" else 1
    cosine = {i: float(layer.stats[turning_name("ffn", 60)][at]) for i, layer in profile.layers.items()}
    parameters = {"blocks": 1, "mode": mode, "predictor_tokens": 60}
    plan = coterie.plan(source, profile, method="quantmoe-blocks", parameters=parameters)
    raised = [i for i, widths in plan.experts().items() if set(widths["up"]) == {4}]
    assert raised == [min(cosine, key=lambda i: cosine[i])]


def test_random_controls_depend_on_their_seed_alone(profile_of):
    source, _ = profile_of("mixtral")

    def drawn(seed):
        return coterie.plan(source, method="quantmoe-random", parameters={"mean": 2.5, "draw": seed}).experts()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_low_has_to_be_below_high():
    with pytest.raises(ValueError, match="not below"):
        Heuristics(low=4, high=4)
