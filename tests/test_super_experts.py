"""Super experts: the statistic, the rule, dynamic pruning, attention sinks, and the list that compression honours."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie import api
from coterie.analysis import ablation
from coterie.analysis import super_experts as se
from coterie.anatomy import moe_layers
from coterie.compression.plan import Plan
from coterie.compression.selector import parse_protect
from coterie.errors import ModelError, OutputError, UsageError
from coterie.evaluation.variants import RunLosses
from coterie.experts.forward import observe, rerouted
from coterie.profiling.massive import HiddenPeaks, Peak
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FEW, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli
from test_selector import quick

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_SHARED = ("qwen2-moe", "deepseek-v3", "ernie4.5-moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder):
    """Float32 checkpoints by family, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = saved(family, folder, torch.float32)
        return made[family]

    return get


def text(rows=4, length=24, size=2, mask=None, seed=0, domains=1):
    ids = tokens(rows, length, seed)
    domain = torch.arange(rows) % domains
    batches = [
        Batch(i, m, d)
        for i, m, d in zip(
            ids.split(size),
            mask.split(size) if mask is not None else [None] * rows,
            domain.split(size),
            strict=False,
        )
    ]
    names = [f"d{n}" for n in range(domains)]
    return TokenData(batches, names, "digest", dict.fromkeys(names, rows * length // domains))


def opened(path):
    return StreamedModel(Checkpoint.open(path))


def planted(family, folder, layer, expert, factor=1000.0):
    """A tiny model in which one expert's down projection is `factor` times as large."""
    path = saved(family, folder, torch.float32)
    model = tiny(family)
    moe = next(m for m in moe_layers(model) if m.index == layer)
    with torch.no_grad():
        moe.bank.read(expert).down_HI.mul_(factor)
        if moe.bank.has_bias:
            moe.bank.read(expert).down_bias_H.mul_(factor)
    model.save_pretrained(path)
    return path


# -- the statistic ----------------------------------------------------------------------------------------------------


class Loop:
    """Plain loops over tokens: the largest |output| of each expert, and of what its down projection receives."""

    def __init__(self, moe):
        self.moe, E = moe, moe.num_experts
        self.output, self.channel, self.inner = [0.0] * E, [-1] * E, [-1] * E

    def routed(self, x_TH, index_TK, weight_TK):
        for x_H, index_K in zip(x_TH, index_TK, strict=True):
            for e in index_K.tolist():
                w = self.moe.bank.read(e)
                if w.gate_bias_I is not None:  # GPT-OSS: clamped, with biases and one added to up
                    gate = (w.gate_IH @ x_H + w.gate_bias_I).clamp(max=7.0)
                    up = (w.up_IH @ x_H + w.up_bias_I).clamp(-7.0, 7.0)
                    inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
                    y_H = w.down_HI @ inner + w.down_bias_H
                else:
                    inner = torch.nn.functional.silu(w.gate_IH @ x_H) * (w.up_IH @ x_H)
                    y_H = w.down_HI @ inner
                if y_H.abs().max() > self.output[e]:
                    self.output[e] = float(y_H.abs().max())
                    self.channel[e], self.inner[e] = int(y_H.abs().argmax()), int(inner.abs().argmax())
        return False


@pytest.mark.parametrize("family", FEW)
def test_the_statistic_is_that_of_plain_loops_over_tokens(family, models):
    path, data = models(family), text()
    seen = se.watch(opened(path), data)
    model = resident(path)
    for moe in moe_layers(model):
        loop = Loop(moe)
        with observe(moe.experts, loop), torch.no_grad():
            for batch in data.batches:
                model(batch.ids_BL)
        layer = seen.layers[moe.index]
        assert layer.output_max_DE[0].tolist() == pytest.approx(loop.output, rel=1e-4)
        assert layer.output_max_channel_E.tolist() == loop.channel
        assert layer.inner_max_channel_E.tolist() == loop.inner


@pytest.mark.parametrize("family", FEW)
def test_the_statistic_does_not_depend_on_how_the_text_is_cut_into_batches(family, models):
    whole = se.watch(opened(models(family)), text(size=4)).values()
    reversed_ = text(size=1)
    reversed_.batches.reverse()
    assert se.watch(opened(models(family)), reversed_).values() == pytest.approx(whole, rel=1e-5)


def test_padding_is_not_seen(models):
    lengths = (3, 2, 4, 2)  # short, so that the largest entries of all 96 tokens stand in the padding
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    data = text(size=4, mask=mask)
    seen = se.watch(opened(models("deepseek-v3")), data)
    alone = []
    for row, length in enumerate(lengths):
        short = TokenData([Batch(tokens(4, 24)[row : row + 1, :length])], ["d0"], "", {})
        alone.append(se.watch(opened(models("deepseek-v3")), short))
    for pair, value in seen.values().items():
        assert value == pytest.approx(max(a.values()[pair] for a in alone), rel=1e-4), pair
    for index, hidden in seen.hidden.items():
        assert hidden.largest == pytest.approx(max(a.hidden[index].largest for a in alone), rel=1e-4)
    assert seen.layers[1].starts == 4


@pytest.mark.parametrize("family", FEW)
def test_gate_weights_do_not_enter_the_statistic(family, models):
    def watched(scale):
        streamed, last = opened(models(family)), {}
        with rerouted(streamed.moe[2].experts, lambda index, weight: (index, weight * scale)):
            last = se.watch(streamed, text()).values()
        return {pair: value for pair, value in last.items() if pair[0] == 2}

    assert watched(3.0) == watched(1.0)


@pytest.mark.parametrize("family", FEW)
def test_a_scaled_down_projection_scales_its_own_value_only(family, models, folder):
    before = se.watch(opened(models(family)), text()).values()
    after = se.watch(opened(planted(family, folder / "scaled", 2, 3, 5.0)), text()).values()
    for pair, value in before.items():
        if pair[0] <= 2:
            assert after[pair] == pytest.approx(value * (5.0 if pair == (2, 3) else 1.0), rel=1e-5), pair


@pytest.mark.parametrize("family", WITH_SHARED)
def test_shared_experts_are_measured_before_their_gate(family, models):
    data, model, values = text(), resident(models(family)), {}
    for moe in moe_layers(model):
        name = next(n for n, _ in moe.block.named_children() if "shared" in n and "gate" not in n)
        module = moe.block.get_submodule(name)
        module.register_forward_hook(
            lambda m, a, y, i=moe.index: values.update({i: max(values.get(i, 0.0), float(y.abs().max()))})
        )
    with torch.no_grad():
        for batch in data.batches:
            model(batch.ids_BL)
    seen = se.watch(opened(models(family)), data)
    assert {i: v for i, (v, _) in seen.shared.items()} == pytest.approx(values, rel=1e-5)
    assert set(values) == set(seen.layers)


def test_dense_layers_are_seen_in_the_residual_stream_but_are_no_experts(models):
    seen = se.watch(opened(models("deepseek-v3")), text())
    assert sorted(seen.hidden) == [-1, 0, 1, 2]
    assert sorted(seen.layers) == [1, 2]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_the_peaks_of_the_residual_stream_are_those_of_the_hidden_states(family, models):
    data = text(size=3)
    seen = se.watch(opened(models(family)), data)
    with torch.no_grad():
        output = resident(models(family)).model(tokens(4, 24), output_hidden_states=True)
    for index, hidden_BLH in enumerate(output.hidden_states[:-1], -1):  # the last is behind the final norm
        value, at = hidden_BLH.abs().flatten().max(0)
        sample, rest = divmod(int(at), hidden_BLH[0].numel())
        assert seen.hidden[index].peaks[0] == Peak(pytest.approx(float(value), rel=1e-4), sample, *divmod(rest, 64))
        medians = hidden_BLH.abs().flatten(1).median(1).values
        assert seen.hidden[index].median == pytest.approx(float(medians.double().median()), rel=1e-3)


def test_first_tokens_and_others_share_their_gates_out(models):
    layer = se.watch(opened(models("mixtral")), text()).layers[1]
    assert float(layer.start_share_E.sum()) == pytest.approx(4)
    assert float(layer.rest_share_E.sum()) == pytest.approx(4 * 23)
    assert float(layer.start_score_E.sum()) == pytest.approx(4)


def test_outputs_that_are_no_numbers_are_refused(folder):
    path, model = saved("mixtral", folder / "infinite", torch.float32), tiny("mixtral")
    weights = moe_layers(model)[1].bank.read(0)
    weights.up_IH.mul_(1e25)
    weights.down_HI.mul_(1e25)
    model.save_pretrained(path)
    with pytest.raises(ModelError, match="layer 1"):
        se.watch(opened(path), text())


# -- the rule ---------------------------------------------------------------------------------------------------------


def grid_of(values, layers=range(24), **rule):
    return se.select(values, layers, se.Rule(**rule))


def matrix(layers=32, experts=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value_LE = torch.rand(layers, experts, generator=generator) + 0.5
    return {(i, e): float(value_LE[i, e]) for i in range(layers) for e in range(experts)}


def test_of_32_layers_the_first_24_count():
    assert se.first_fraction(32, 0.75) == list(range(24))


@pytest.mark.parametrize("p", se.PERCENTILES)
@pytest.mark.parametrize("f", se.FACTORS)
@pytest.mark.parametrize("family", FEW)
def test_a_planted_expert_is_the_only_one_found_at_every_threshold(family, p, f, planted_values):
    values, depth, pair = planted_values(family)
    chosen = se.select(values, range(depth), se.Rule(percentile=p, factor=f))
    assert chosen.super_experts == [pair]


@pytest.fixture(scope="module")
def planted_values(folder):
    made = {}

    def get(family):
        if family not in made:
            path = planted(family, folder / "planted", 2, 3)
            made[family] = (se.watch(opened(path), text(rows=8, length=32)).values(), 3, (2, 3))
        return made[family]

    return get


def test_published_values_give_the_published_experts():
    values = {(layer, e): 0.5 + 0.001 * e for layer in range(48) for e in range(128)}
    values |= {(1, 68): 744.0, (2, 92): 540.0, (3, 82): 430.0, (4, 5): 63.5, (47, 8): 900.0, (47, 48): 800.0}
    chosen = se.select(values, se.first_fraction(48, 0.75), se.Rule())
    assert chosen.super_experts == [(1, 68), (2, 92), (3, 82)]
    assert chosen.outliers == [(47, 8), (47, 48)]
    counted = [v for (layer, _), v in values.items() if layer < 36]
    assert se.tail_exponent(counted, 74.0) == pytest.approx(1.50, abs=0.01)


def test_the_exponents_of_the_other_published_models_come_out():
    assert se.tail_exponent([1424.0, 462.0, 112.0], 140.0) == pytest.approx(1.57, abs=0.01)
    assert se.tail_exponent([5600.0, 302.0], 300.0) == pytest.approx(1.68, abs=0.01)
    assert se.tail_exponent([5600.0], 300.0) is None


def test_later_layers_do_not_matter_unless_the_whole_model_counts():
    values = matrix()
    values[3, 4] = 50.0
    loud = {pair: value * (1000 if pair[0] >= 24 else 1) for pair, value in values.items()}
    assert grid_of(loud).super_experts == grid_of(values).super_experts == [(3, 4)]
    assert grid_of(loud).threshold == grid_of(values).threshold
    assert grid_of(loud, scope="all_layers").super_experts == []


def test_the_percentile_is_linear_and_the_comparison_strict():
    numpy = pytest.importorskip("numpy")
    values = matrix(4, 50)
    values[0, 0] = 9.0
    chosen = se.select(values, range(4), se.Rule(percentile=98.7, factor=0.001))
    assert chosen.percentile == pytest.approx(numpy.percentile(list(values.values()), 98.7))
    assert chosen.super_experts == sorted(
        (p for p, v in values.items() if v > numpy.percentile(list(values.values()), 98.7)), key=lambda p: -values[p]
    )
    exact = {(0, e): 1.0 for e in range(300)} | {(0, 300): 10.0, (0, 301): 100.0}
    assert se.select(exact, [0], se.Rule(percentile=50)).super_experts == [(0, 301)]


def test_a_tenth_of_a_small_maximum_is_not_rounded_down():
    values = {(0, e): 0.01 for e in range(1000)} | {(0, 1): 7.3, (0, 2): 0.6}
    assert se.select(values, [0], se.Rule(percentile=99)).super_experts == [(0, 1)]


@quick
@given(value=st.floats(1e-3, 1e6), layers=st.integers(1, 5), experts=st.integers(2, 40))
def test_equal_values_hold_no_super_expert(value, layers, experts):
    values = {(i, e): value for i in range(layers) for e in range(experts)}
    chosen = se.select(values, range(layers), se.Rule())
    assert chosen.super_experts == []
    assert "no heavy tail" in chosen.reason


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_the_rule_does_not_depend_on_the_unit(seed, factor):
    values = matrix(seed=seed)
    values[seed % 24, seed % 16] *= 3
    scaled = {pair: value * factor for pair, value in values.items()}
    assert grid_of(scaled).super_experts == grid_of(values).super_experts


def test_a_model_without_a_heavy_tail_is_told_so_and_its_largest_is_not_returned(models, folder):
    found = api.super_experts(str(models("mixtral")), tokens=str(token_file(folder / "any.safetensors")))
    assert found.protect == []
    assert "no heavy tail" in found.report["reason"]
    assert found.report["verification"] is None


@pytest.mark.parametrize(
    "rule",
    [{"layers": "all"}, {"scope": "x"}, {"fraction": 0.0}, {"fraction": 1.1}, {"percentile": 101}, {"factor": 0.0}],
)
def test_a_rule_that_makes_no_sense_is_refused(rule):
    with pytest.raises(UsageError, match=f"--{next(iter(rule))}"):
        se.Rule(**rule)


def hidden(*sizes, massive_from=100.0):
    """Residual streams with these largest entries, first that of the embeddings; massive above a limit."""
    found = {}
    for index, size in enumerate(sizes, -1):
        large = size > massive_from
        found[index] = HiddenPeaks([Peak(size, 0, 0, 0)], int(large), size if large else 0.0, [0.05])
    return found


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [
        ((1, 2, 700, 1200, 1600, 1620, 1610, 300), [1, 2, 3]),  # one step after the other, a plateau, a fall
        ((1, 2, 2, 5600, 5600, 5600, 5600, 5700), [2]),  # one step; what the last layer adds is not a step
        ((1, 2, 3, 4, 5), []),
    ],
)
def test_layers_in_which_massive_activations_form_are_seen(sizes, layers):
    assert se.ma_formation(hidden(*sizes)) == layers


def test_massive_is_above_100_and_above_1000_medians():
    def massive(entry, median):
        watched = HiddenPeaks()
        hidden_BLH = torch.full((1, 4, 8), median)
        hidden_BLH[0, 0, 3] = -entry
        watched.see(hidden_BLH, Batch(torch.zeros(1, 4, dtype=torch.int64)), 7)
        assert watched.peaks[0] == Peak(entry, 7, 0, 3)
        return watched.massive

    assert [massive(101.0, 0.1), massive(99.0, 0.01), massive(150.0, 0.2)] == [1, 0, 0]


def test_the_layers_of_a_planted_model_are_those_after_which_its_activation_stands(folder):
    seen = se.watch(opened(planted("mixtral", folder / "formed", 1, 2, 1e6)), text(rows=8, length=32))
    chosen = se.choose(seen, se.Rule(layers="ma_formation"))
    assert chosen.layers == [1]
    assert chosen.super_experts == [(1, 2)]


# -- dynamic pruning --------------------------------------------------------------------------------------------------


def run_in_order(path, *runs):
    """Hidden states [B, L, H] of each run."""
    data, final = text(), {}
    many = [ablation.Variant(f"run {n}", frozenset(removed), tuple(zeroed)) for n, (removed, zeroed) in enumerate(runs)]
    ablation.run(opened(path), data.batches, many, lambda v, n, batch, h: final.update({(v, n): h.clone()}))
    return [torch.cat([final[v, n] for n in range(len(data.batches))]) for v in range(len(runs))]


def ablated(path, removed, data=None, zeroed=()):
    """Hidden states [B, L, H] of the whole model and of one without `removed`, and what was traced."""
    data, final = data or text(), {}
    runs = [ablation.Variant("whole"), ablation.Variant("less", frozenset(removed), tuple(zeroed))]
    trace = ablation.run(opened(path), data.batches, runs, lambda v, n, batch, h: final.update({(v, n): h.clone()}))
    count = len(data.batches)
    return *(torch.cat([final[v, n] for n in range(count)]) for v in range(2)), trace


@pytest.mark.parametrize("family", FEW)
def test_removing_equals_zeroing_the_down_projection(family, models, folder):
    removed = [(2, 1), (2, 5)]
    _, less, _ = ablated(models(family), removed)
    model = resident(models(family))
    moe = next(m for m in moe_layers(model) if m.index == 2)
    for _, expert in removed:
        weights = moe.bank.read(expert)
        weights.down_HI.zero_()
        if weights.down_bias_H is not None:
            weights.down_bias_H.zero_()
    with torch.no_grad():
        expected = torch.cat([model.model(b.ids_BL)[0] for b in text().batches])
    whole, _, _ = ablated(models(family), [])
    torch.testing.assert_close(less, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(whole, expected, atol=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_removing_nothing_or_an_expert_nobody_uses_changes_no_bit(family, models):
    data = text(rows=1, length=3, size=1)
    seen = se.watch(opened(models(family)), data)
    unused = next(
        (index, int(e)) for index, layer in seen.layers.items() for e in (layer.count_E == 0).nonzero().flatten()
    )
    for removed in ([], [unused]):
        whole, less, trace = ablated(models(family), removed, data)
        assert torch.equal(whole, less)
        for index, sink in trace.sinks["whole"].items():
            assert ablation.sink_decay(sink, trace.sinks["less"][index]) == 0.0


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_without_all_experts_only_residual_and_shared_experts_are_left(family, models):
    E = 16 if family == "deepseek-v3" else 8
    _, less, _ = ablated(models(family), [(2, e) for e in range(E)])
    model = resident(models(family))
    experts = next(m for m in moe_layers(model) if m.index == 2).experts
    experts.forward = lambda hidden_states, *args: torch.zeros_like(hidden_states)
    with torch.no_grad():
        expected = torch.cat([model.model(b.ids_BL)[0] for b in text().batches])
    torch.testing.assert_close(less, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", WITH_SHARED)
def test_shared_experts_can_be_removed_too(family, models):
    _, less, _ = ablated(models(family), [(2, se.SHARED)])
    model = resident(models(family))
    block = next(m for m in moe_layers(model) if m.index == 2).block
    for name, module in block.named_children():
        if "shared" in name and "gate" not in name:
            module.down_proj.weight.data.zero_()
    with torch.no_grad():
        expected = torch.cat([model.model(b.ids_BL)[0] for b in text().batches])
    torch.testing.assert_close(less, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_a_single_weight_counts_as_zero_in_its_own_run_only(family, models):
    whole, less, _ = ablated(models(family), [], zeroed=[(2, 1, 7, 3)])
    model = resident(models(family))
    moe = next(m for m in moe_layers(model) if m.index == 2)
    with torch.no_grad():
        untouched = torch.cat([model.model(b.ids_BL)[0] for b in text().batches])
        moe.bank.read(1).down_HI[7, 3] = 0
        expected = torch.cat([model.model(b.ids_BL)[0] for b in text().batches])
    torch.testing.assert_close(whole, untouched, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(less, expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(whole, less)


@pytest.mark.parametrize("family", FEW)
def test_a_run_does_not_see_what_the_one_before_it_removed(family, models):
    first, second, third = run_in_order(
        models(family), ([], [(2, 1, 7, 3), (2, 1, 8, 4)]), ([], []), ([(0 if family == "mixtral" else 2, 1)], [])
    )
    (alone,) = run_in_order(models(family), ([], []))
    assert torch.equal(second, alone)
    assert not torch.equal(first, alone)
    assert not torch.equal(third, alone)


def test_random_sets_are_as_many_and_spare_the_chosen(models):
    streamed, chosen = opened(models("mixtral")), [(0, 1), (0, 2), (2, 7)]
    for same in (False, True):
        sets = ablation.random_sets(chosen, streamed.moe, 20, same_layers=same, seed=3)
        assert sets == ablation.random_sets(chosen, streamed.moe, 20, same_layers=same, seed=3)
        assert len(set(sets)) > 10
        for pairs in sets:
            assert len(pairs) == 3
            assert not pairs & set(chosen)
            if same:
                assert Counter(i for i, _ in pairs) == {0: 2, 2: 1}


def test_losses_of_runs_are_those_of_the_model(models):
    data = text()
    losses = RunLosses(data, 10**9)
    streamed = opened(models("mixtral"))
    runs = [ablation.Variant("whole"), ablation.Variant("less", frozenset({(0, 1), (1, 3)}))]
    ablation.run(streamed, losses.data.batches, runs, losses.finish)
    whole, less = losses.results(streamed, ["whole", "less"])
    model = resident(models("mixtral"))
    with torch.no_grad():
        expected = model(tokens(4, 24), labels=tokens(4, 24)).loss
        for moe in moe_layers(model)[:2]:
            moe.bank.read({0: 1, 1: 3}[moe.index]).down_HI.zero_()
        changed = model(tokens(4, 24), labels=tokens(4, 24)).loss
    assert whole.mean_loss == pytest.approx(float(expected), rel=1e-5)
    assert less.mean_loss == pytest.approx(float(changed), rel=1e-5)
    assert less.domains[0].delta == pytest.approx(float(changed - expected), abs=1e-5)
    assert less.domains[0].kl > 0


def test_smaller_batches_hold_the_same_samples():
    mask = torch.ones(5, 24, dtype=torch.bool)
    mask[3, 9:] = False
    data = text(rows=5, size=3, mask=mask)
    small = ablation.smaller_batches(data, heads=4, limit=2 * 4 * 4 * 24 * 24)
    assert [len(b.ids_BL) for b in small.batches] == [2, 1, 2]
    assert torch.equal(torch.cat([b.ids_BL for b in small.batches]), tokens(5, 24))
    assert torch.equal(torch.cat([b.mask_BL for b in small.batches]), mask)


# -- attention sinks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "qwen3-moe"])
def test_attention_on_the_first_token_is_that_of_the_plain_model(family, models):
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[2, 11:] = False
    _, _, trace = ablated(models(family), [], text(mask=mask))
    model = resident(models(family))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(tokens(4, 24), attention_mask=mask.long(), output_attentions=True)
    for index, p_BNLL in enumerate(output.attentions):
        expected = sum(p_BNLL[b, :, t, 0].double() for b in range(4) for t in range(1, 24) if mask[b, t])
        sink = trace.sinks["whole"][index]
        torch.testing.assert_close(sink.start_N, expected, atol=1e-5, rtol=1e-4)
        assert sink.queries == int(mask.sum()) - 4
        assert sink.row_sum == pytest.approx(1, abs=1e-5)


def test_a_learned_sink_shows_in_the_sum_of_rows(models):
    _, _, trace = ablated(models("gpt-oss"), [])
    assert all(sink.row_sum < 0.99 for sink in trace.sinks["whole"].values())


def test_layers_without_softmax_attention_have_no_sink(models):
    _, _, trace = ablated(models("qwen3-next"), [])
    assert sorted(trace.sinks["whole"]) == [3]


def test_decay_is_0_for_an_intact_sink_1_for_a_lost_one_and_a_mean_over_heads():
    def sink(*start):
        return ablation.Sink(torch.tensor(start, dtype=torch.float64), 10)

    assert ablation.sink_decay(sink(3, 4), sink(3, 4)) == 0
    assert ablation.sink_decay(sink(3, 4), sink(0, 0)) == 1
    assert ablation.sink_decay(sink(1, 4), sink(0.5, 4)) == pytest.approx(0.25)
    assert ablation.sink_decay(sink(1, 1), sink(2, 2)) == -1
    assert ablation.sink_decay(sink(0, 2), sink(5, 1)) == 0.5
    assert ablation.sink_decay(sink(0, 0), sink(1, 1)) is None


def test_a_first_token_nobody_may_look_at_any_more_is_a_lost_sink(models):
    streamed, final = opened(models("mixtral")), []
    attention = streamed.layers[2].self_attn

    def blind(module, args, output):
        gone = output[1].clone()
        if len(final) % 2:  # the second run
            gone[..., 0] = 0
        final.append(0)
        return output[0], gone

    attention.register_forward_hook(blind)  # stands before the watching hook
    data = text(size=4)
    trace = ablation.run(streamed, data.batches, [ablation.Variant("whole"), ablation.Variant("blind")])
    assert ablation.sink_decay(trace.sinks["whole"][2], trace.sinks["blind"][2]) == 1
    assert ablation.sink_decay(trace.sinks["whole"][1], trace.sinks["blind"][1]) == 0


def test_attention_is_as_it_was_afterwards(models):
    streamed = opened(models("mixtral"))
    before = streamed.model.config._attn_implementation
    ablation.run(streamed, text().batches, [ablation.Variant("whole")])
    assert streamed.model.config._attn_implementation == before != "eager"


# -- the whole, and the list that compression honours -----------------------------------------------------------------


@pytest.fixture(scope="module")
def found(folder):
    """(planted model, tokens, the list written for it)."""
    path = planted("qwen3-moe", folder / "whole", 2, 3)
    ids = token_file(folder / "ids.safetensors", rows=8, padded=True)
    out = folder / "super-experts.json"
    done = cli(
        "--json", "analyze", "super-experts", path, "--tokens", ids, "--out", out, "--fraction", 1, "--controls", 2
    )
    assert done.code == 0, done.err
    assert done.json() == json.loads(out.read_text())
    return path, ids, out


def test_the_command_finds_the_planted_expert_and_verifies_it(found):
    report = json.loads(found[2].read_text())
    assert report["protect"] == [[2, 3]]
    assert [(e["layer"], e["expert"], e["rank"]) for e in report["super_experts"]] == [(2, 3, 1)]
    assert report["constant"]
    assert len(report["sensitivity"]) == 16
    runs = {run["removed"]: run for run in report["verification"]["runs"]}
    assert list(runs) == [
        "nothing", "super experts", "super weights", "random experts 1", "random experts 2",
        "random experts of the same layers 1", "random experts of the same layers 2",
    ]  # fmt: skip
    assert runs["super experts"]["hidden_max"]["2"] < runs["nothing"]["hidden_max"]["2"] / 10
    assert runs["nothing"]["delta"] == 0
    assert all(math.isfinite(run["loss"]) for run in runs.values())
    assert "start token" in " ".join(report["notes"])  # random ids begin with anything


@pytest.mark.parametrize("method", ["reap", "dern", "random"])
@pytest.mark.parametrize("form", ["@{}", "{}", "0:5,@{}"])
def test_every_method_keeps_what_the_list_names(method, form, found, tmp_path):
    path, ids, out = found
    done = cli(
        "compress", path, tmp_path / "small", "--method", method, "--keep", 0.5, "--tokens", ids,
        "--protect", form.format(out), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    keep = {layer.index: layer.keep for layer in Plan.load(tmp_path / "small" / "plan.json").layers}
    assert 3 in keep[2]
    assert len(keep[2]) == 4
    assert form[0] != "0" or 5 in keep[0]
    assert each_tensor(tmp_path / "small")


def test_some_method_would_drop_the_expert_without_the_list(found, tmp_path):
    path = found[0]
    plan = api.compress(str(path), str(tmp_path / "s"), method="random", parameters={"seed": 7}, keep=0.5).plan
    again = api.compress(
        str(path), str(tmp_path / "t"), method="random", parameters={"seed": 7}, keep=0.5, protect=[str(found[2])]
    ).plan
    assert 3 not in plan.layers[-1].keep
    assert 3 in again.layers[-1].keep


def test_a_list_of_another_model_is_refused(found, models):
    done = cli("compress", models("mixtral"), "x", "--method", "random", "--keep", 0.5, "--protect", found[2])
    assert done.code == 2
    assert "another model" in done.err


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"protect": [[1]], "model": "m", "model_digest": "d"}', '{"protect": [["a", 1]]}', "\x00",
     '{"protect": [[1, "2"]], "model": "m", "model_digest": "d"}', '{"protect": 5, "model": "m", "model_digest": "d"}'],
)  # fmt: skip
def test_a_file_that_is_no_list_is_refused(content, tmp_path):
    file = tmp_path / "list.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"list\.json"):
        parse_protect([f"@{file}"], lambda: "d")


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        parse_protect([f"1:2,@{tmp_path}/no.json"], lambda: "d")


def test_pairs_of_a_list_that_the_model_does_not_have_are_refused(found, tmp_path):
    report = json.loads(found[2].read_text())
    file = tmp_path / "edited.json"
    file.write_text(json.dumps({**report, "protect": [[2, 99]]}))
    with pytest.raises(UsageError, match="2:99"):
        api.compress(str(found[0]), str(tmp_path / "x"), method="random", keep=0.5, protect=[f"@{file}"])


def test_an_existing_file_is_not_replaced_unasked(found):
    before = found[2].read_bytes()
    done = cli("analyze", "super-experts", found[0], "--tokens", found[1], "--out", found[2])
    assert done.code == OutputError.exit_code
    assert "exists" in done.err
    assert found[2].read_bytes() == before


def test_the_table_names_the_experts_and_what_removing_them_did(found, tmp_path):
    done = cli(
        "analyze", "super-experts", found[0], "--tokens", found[1], "--fraction", 1, "--controls", 1,
        "--ablate", "0:1,2:5", "--out", tmp_path / "list.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    for words in ("2:3", "super experts", "given experts", "0:1 2:5", "sink decay", "verdict:", "protects 2:3"):
        assert words in done.out, words


def test_an_expert_to_run_without_that_is_not_there_is_refused_before_any_work(found):
    done = cli("analyze", "super-experts", found[0], "--tokens", found[1], "--ablate", "1:0")
    assert done.code == 2
    assert "layer 1 is no MoE layer" in done.err


def test_no_text_is_refused(found):
    assert cli("analyze", "super-experts", found[0]).code == 2


def test_the_overlap_of_two_texts_is_reported(folder):
    path = planted("mixtral", folder / "domains", 1, 2)
    seen = se.watch(opened(path), text(rows=8, length=32, domains=2))
    rule = se.Rule()
    report = se.describe(seen, rule, se.choose(seen, rule))
    assert report["domains"] == {"d0": [[1, 2]], "d1": [[1, 2]]}
    assert report["jaccard"] == 1
    assert se.jaccard([(1, 2)], [(1, 2), (1, 3)]) == 0.5
    assert se.jaccard([], []) is None
