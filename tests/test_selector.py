"""From scores to kept experts: budgets, groups, protection; what the command line's texts mean; the register."""

# E experts

import contextlib
import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from coterie.anatomy import MoELayer, check_keep
from coterie.anatomy.slicing import minimum_keep
from coterie.compression.methods import get_method, methods
from coterie.compression.selector import (
    Budget,
    check_protect,
    counts_for,
    parse_layers,
    parse_protect,
    select_global,
    select_layer,
)
from coterie.compression.sizes import measure
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import parse_size
from families import saved

quick = settings(max_examples=80, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


def moe(index=0, E=8, top_k=2, groups=1, groups_used=1, group_minimum=1):
    """An MoE layer of these sizes, without weights."""
    experts, name = nn.Module(), f"layers.{index}.mlp"
    experts.is_transposed = False
    experts.down_proj = nn.Parameter(torch.empty(E, 1, 1, device="meta"))
    parts = {"name": name, "block": nn.Module(), "router_name": f"{name}.gate", "router": nn.Module()}
    parts |= {"experts_name": f"{name}.experts", "experts": experts, "decoder": nn.Module()}
    return MoELayer(index, top_k=top_k, groups=groups, groups_used=groups_used, group_minimum=group_minimum, **parts)


def best(scores, count):
    """The highest `count` of a list, ties to the lower index."""
    return sorted(sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count])


# Small whole numbers make many ties; floats of all sizes make none.
values = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6, width=32))


@st.composite
def one_layer(draw, groups=1):
    """(layer, scores, count): a layer with `groups` routing groups and a count its router can work with."""
    size = draw(st.integers(2, 8))
    layer = moe(
        E=groups * size, top_k=2, groups=groups, groups_used=min(2, groups), group_minimum=2 if groups > 1 else 1
    )
    scores = draw(st.lists(values, min_size=groups * size, max_size=groups * size))
    count = groups * draw(st.integers(-(-minimum_keep(layer) // groups), size))
    return layer, scores, count


@st.composite
def model(draw, grouped=False):
    """({index: layer}, {index: scores}, minimum) of a few layers."""
    layers, scores = {}, {}
    for index in draw(st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)):
        groups = draw(st.sampled_from([1, 2, 4])) if grouped else 1
        E = groups * draw(st.integers(3, 6))
        layers[index] = moe(index, E, top_k=2, groups=groups, groups_used=min(groups, 2))
        scores[index] = torch.tensor(draw(st.lists(values, min_size=E, max_size=E)))
    return layers, scores, draw(st.integers(1, 3))


def needed(layers, minimum):
    """Experts that stay whatever the scores are."""
    return sum(-(-max(minimum_keep(m), minimum) // m.groups) * m.groups for m in layers.values())


# -- one layer --------------------------------------------------------------------------------------------------------


@quick
@given(one_layer())
def test_the_best_experts_stay_and_ties_go_to_the_lower_index(case):
    layer, scores, count = case
    assert select_layer(torch.tensor(scores), count, layer, Budget(keep=0.5)) == best(scores, count)


@quick
@given(one_layer(), st.data())
def test_protected_experts_stay_and_the_rest_is_ranked_as_ever(case, data):
    layer, scores, count = case
    protect = data.draw(st.sets(st.integers(0, layer.num_experts - 1), max_size=count))
    budget = Budget(keep=0.5, protect=frozenset({(0, e) for e in protect} | {(1, 0)}))
    others = [s if e not in protect else float("-inf") for e, s in enumerate(scores)]
    expected = sorted(protect | set(best(others, count - len(protect))))
    assert select_layer(torch.tensor(scores), count, layer, budget) == expected


@quick
@given(one_layer())
def test_a_protected_expert_stays_even_against_infinite_scores(case):
    layer, scores, count = case
    scores[:] = [float("inf")] * len(scores)
    worst = layer.num_experts - 1
    assert worst in select_layer(torch.tensor(scores), count, layer, Budget(keep=0.5, protect=frozenset({(0, worst)})))


@quick
@given(st.sampled_from([2, 3, 4]).flatmap(lambda groups: one_layer(groups=groups)))
def test_every_routing_group_keeps_its_best_and_the_same_number(case):
    layer, scores, count = case
    keep = select_layer(torch.tensor(scores), count, layer, Budget(keep=0.5))
    size, per_group = layer.num_experts // layer.groups, count // layer.groups
    for group in range(layer.groups):
        inside = [e - group * size for e in keep if e // size == group]
        assert inside == best(scores[group * size : (group + 1) * size], per_group)
    check_keep(layer, keep)


@quick
@given(one_layer())
def test_a_smaller_budget_keeps_a_subset(case):
    layer, scores, count = case
    keeps = [set(select_layer(torch.tensor(scores), c, layer, Budget(keep=0.5))) for c in range(count, len(scores) + 1)]
    assert all(small < large for small, large in itertools.pairwise(keeps))


@pytest.mark.parametrize("scores", [[1.0, float("nan"), 2.0], [1.0, 2.0], [[1.0, 2.0, 3.0]]])
@pytest.mark.parametrize("count", [2, 3])
def test_unusable_scores_are_refused(scores, count):
    with pytest.raises(UsageError, match=r"layer 0.* 3 experts"):
        select_layer(torch.tensor(scores), count, moe(E=3), Budget(keep=0.5))


def test_more_protected_experts_than_may_stay_are_refused_also_in_one_group():
    budget = Budget(keep=0.5, protect=frozenset({(0, 0), (0, 1), (0, 2)}))
    with pytest.raises(UsageError, match=r"3 experts.* protected, but only 2 may stay"):
        select_layer(torch.ones(8), 2, moe(E=8), budget)
    with pytest.raises(UsageError, match=r"3 experts.* protected, but only 2 may stay"):
        select_layer(torch.ones(8), 4, moe(E=8, groups=2, groups_used=2), budget)


@pytest.mark.parametrize("pair", [(1, 0), (0, 8), (0, -1)])
def test_a_protected_expert_that_does_not_exist_is_refused_before_anything_runs(pair):
    with pytest.raises(UsageError, match=f"--protect {pair[0]}:{pair[1]}"):
        check_protect(Budget(keep=1.0, protect=frozenset({pair})), {0: moe(0)})


# -- over all layers --------------------------------------------------------------------------------------------------


@quick
@given(model(), st.floats(0.05, 1))
def test_a_global_budget_keeps_exactly_the_number_asked(case, share):
    layers, scores, minimum = case
    total = sum(m.num_experts for m in layers.values())
    wanted = int(total * share + 0.5)
    assume(wanted >= needed(layers, minimum))
    keep = select_global(scores, layers, Budget(keep=share, scope="global", minimum=minimum))
    assert sum(len(k) for k in keep.values()) == wanted
    assert all(k == sorted(set(k)) for k in keep.values())


@quick
@given(model(grouped=True), st.floats(0.05, 1))
def test_with_groups_a_global_budget_falls_less_than_one_group_short_and_groups_stay_equal(case, share):
    layers, scores, minimum = case
    total = sum(m.num_experts for m in layers.values())
    wanted = int(total * share + 0.5)
    assume(wanted >= needed(layers, minimum))
    keep = select_global(scores, layers, Budget(keep=share, scope="global", minimum=minimum))
    short = wanted - sum(len(k) for k in keep.values())
    smallest = min((m.groups for i, m in layers.items() if len(keep[i]) < m.num_experts), default=1)
    assert 0 <= short < smallest
    for index, layer in layers.items():
        size = layer.num_experts // layer.groups
        per_group = Counter(e // size for e in keep[index])
        assert len({per_group[g] for g in range(layer.groups)}) == 1


@quick
@given(model(grouped=True), st.floats(0.05, 1))
def test_under_a_global_budget_every_layer_keeps_its_minimum_and_what_its_router_needs(case, share):
    layers, scores, minimum = case
    assume(int(sum(m.num_experts for m in layers.values()) * share + 0.5) >= needed(layers, minimum))
    keep = select_global(scores, layers, Budget(keep=share, scope="global", minimum=minimum))
    for index, layer in layers.items():
        assert len(keep[index]) >= min(max(minimum, minimum_keep(layer)), layer.num_experts)
        check_keep(layer, keep[index])


@quick
@given(model(), st.floats(0.3, 1))
def test_a_global_budget_takes_the_largest_shares_of_their_layers_after_the_minimum(case, share):
    layers, scores, minimum = case
    wanted = int(sum(m.num_experts for m in layers.values()) * share + 0.5)
    assume(wanted >= needed(layers, minimum))
    keep = select_global(scores, layers, Budget(keep=share, scope="global", minimum=minimum))
    inside, outside = [], []
    for index, layer in layers.items():
        share_E = scores[index].double() / scores[index].double().sum().clamp(min=1e-30)
        assert keep[index] == best(share_E.tolist(), len(keep[index]))
        least = max(minimum_keep(layer), minimum)
        ranked = sorted(share_E[keep[index]].tolist(), reverse=True)
        inside += ranked[least:]  # those that won their place
        outside += [float(s) for e, s in enumerate(share_E) if e not in keep[index]]
    assert min(inside, default=1.0) >= max(outside, default=0.0)


@quick
@given(model(grouped=True), st.floats(0.05, 1), st.lists(st.integers(-20, 20), min_size=4, max_size=4))
def test_a_global_budget_does_not_depend_on_the_scale_of_a_layers_scores(case, share, powers):
    """Powers of two, so that rescaling rounds nothing; no subnormal numbers for the same reason."""
    layers, scores, minimum = case
    scores = {i: s.double().where(s > 1e-20, 0.0) for i, s in scores.items()}
    assume(int(sum(m.num_experts for m in layers.values()) * share + 0.5) >= needed(layers, minimum))
    budget = Budget(keep=share, scope="global", minimum=minimum)
    rescaled = {i: s * 2.0**p for (i, s), p in zip(scores.items(), powers)}
    assert select_global(rescaled, layers, budget) == select_global(scores, layers, budget)


@quick
@given(model(grouped=True), st.floats(0.05, 1), st.data())
def test_under_a_global_budget_protected_experts_stay_or_the_budget_is_refused(case, share, data):
    layers, scores, minimum = case
    every = [(i, e) for i, m in layers.items() for e in range(m.num_experts)]
    protect = data.draw(st.sets(st.sampled_from(every), max_size=8))
    budget = Budget(keep=share, scope="global", minimum=minimum, protect=frozenset(protect))
    most = needed(layers, minimum) + sum(layers[i].groups for i, _ in protect)  # a protected expert takes a whole rank
    enough = int(len(every) * share + 0.5) >= most
    with contextlib.nullcontext() if enough else contextlib.suppress(UsageError):
        keep = select_global(scores, layers, budget)
        assert all(e in keep[i] for i, e in protect)


def test_protected_experts_that_find_no_room_in_a_global_budget_are_refused():
    layers = {i: moe(i, 6, top_k=2) for i in range(2)}
    budget = Budget(keep=0.5, scope="global", protect=frozenset({(0, e) for e in range(5)}))
    with pytest.raises(UsageError, match="protected, but only 6 of 12 may stay"):
        select_global({i: torch.ones(6) for i in layers}, layers, budget)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_compared_between_layers_are_refused(bad):
    scores = {0: torch.ones(4), 3: torch.tensor([1.0, bad, 2.0, 3.0])}
    with pytest.raises(UsageError, match="layer 3"):
        select_global(scores, {0: moe(0, 4), 3: moe(3, 4)}, Budget(keep=0.5, scope="global"))


def test_layers_outside_a_global_budget_stay_whole():
    layers = {i: moe(i, 6) for i in (1, 2, 5)}
    scores = {i: torch.rand(6, generator=torch.Generator().manual_seed(i)) for i in layers}
    keep = select_global(scores, layers, Budget(keep=0.7, scope="global", layers=frozenset({1, 5})))
    assert keep[2] == list(range(6))
    assert sum(len(k) for k in keep.values()) == 13


def test_a_global_budget_below_what_routers_need_is_refused_with_the_numbers():
    layers = {i: moe(i, 6, top_k=3) for i in range(2)}
    with pytest.raises(UsageError, match=r"keeps 5 of 12 experts, .* need 6"):
        select_global({i: torch.ones(6) for i in layers}, layers, Budget(keep=0.4, scope="global"))


def test_more_experts_than_there_are_is_refused_under_either_scope():
    layers = {i: moe(i, 6) for i in range(2)}
    with pytest.raises(UsageError, match="--keep-experts 7 is more than the 6"):
        counts_for(Budget(keep_experts=7), layers, 10, 100)
    with pytest.raises(UsageError, match="--keep-experts 7 is more than the 6"):
        select_global({i: torch.ones(6) for i in layers}, layers, Budget(keep_experts=7, scope="global"))


# -- counts -----------------------------------------------------------------------------------------------------------


def test_a_budget_is_exactly_one_of_three():
    for given_ in ({}, {"keep": 0.5, "keep_experts": 4}, {"keep_experts": 4, "target_bytes": 10}):
        with pytest.raises(UsageError, match="exactly one"):
            Budget(**given_)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_outside_0_to_1_is_refused(keep):
    with pytest.raises(UsageError, match="not a share"):
        Budget(keep=keep)


def test_counts_of_layers_outside_the_budget_are_whole():
    layers = {i: moe(i, 8) for i in (0, 2, 3)}
    assert counts_for(Budget(keep=0.5, layers=frozenset({0, 3})), layers, 10, 100) == {0: 4, 2: 8, 3: 4}
    assert counts_for(Budget(keep_experts=5, layers=frozenset({2})), layers, 10, 100) == {0: 8, 2: 5, 3: 8}
    assert counts_for(Budget(target_bytes=100 + 80 + 2 * 33, layers=frozenset({0, 3})), layers, 10, 100) == {
        0: 3,
        2: 8,
        3: 3,
    }


@quick
@given(st.integers(2, 64), st.floats(0.01, 1))
def test_a_share_is_rounded_to_the_nearest_count(E, share):
    layer = moe(E=E, top_k=1)
    assume(E * share >= 0.5)
    count = counts_for(Budget(keep=share), {0: layer}, 1, 0)[0]
    assert abs(count - E * share) <= 0.5


@pytest.mark.parametrize(("count", "near"), [(3, "Keep at least 8"), (6, "Keep at least 8"), (10, "Keep 8 or 12")])
def test_a_count_no_router_can_work_with_is_refused_with_those_it_can(count, near):
    layer = moe(4, E=16, top_k=4, groups=4, groups_used=2, group_minimum=2)
    with pytest.raises(UsageError, match=near) as error:
        counts_for(Budget(keep_experts=count), {4: layer}, 10, 100)
    assert f"cannot keep {count} of 16 experts in layer 4" in error.value.message


@quick
@given(
    st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(1, 1000), st.integers(0, 10_000), st.integers(0, 200_000)
)
def test_a_target_size_is_met_and_one_more_expert_per_layer_would_exceed_it(n, groups, per_expert, other, target):
    layers = {i: moe(i, 16, top_k=2, groups=groups, groups_used=min(groups, 2)) for i in range(n)}
    least = minimum_keep(layers[0])
    budget = Budget(target_bytes=target)
    if target < other + n * least * per_expert:
        with pytest.raises(UsageError, match="cannot be reached"):
            counts_for(budget, layers, per_expert, other)
        return
    counts = counts_for(budget, layers, per_expert, other)
    (count,) = set(counts.values())
    assert other + n * count * per_expert <= target
    assert count == 16 or other + n * (count + groups) * per_expert > target


@pytest.mark.parametrize(
    ("family", "field"),
    [("qwen3-moe", "num_experts"), ("deepseek-v3", "n_routed_experts"), ("gpt-oss", "num_local_experts")],
)
def test_a_target_size_is_the_size_of_a_real_checkpoint_to_the_byte(family, field, tmp_path):
    """The checkpoint with fewer experts is built from its config, not sliced."""
    streamed = StreamedModel(Checkpoint.open(saved(family, tmp_path / "whole")))
    layer = next(iter(streamed.moe.values()))
    size, count = measure(streamed), layer.num_experts - layer.groups
    smaller = Checkpoint.open(saved(family, tmp_path / "smaller", **{field: count})).nbytes
    for target, expected in ((smaller, count), (smaller - 1, count - layer.groups)):
        counts = counts_for(Budget(target_bytes=target), streamed.moe, size.bytes_of_expert, size.other_bytes)
        assert set(counts.values()) == {expected}


# -- texts ------------------------------------------------------------------------------------------------------------


@quick
@given(st.sets(st.integers(0, 60), min_size=1))
def test_layers_written_as_numbers_or_ranges_are_read_back(layers):
    available = list(range(61))
    ranges, ordered = [], sorted(layers)
    for layer in ordered:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    assert parse_layers(",".join(map(str, ordered)), None, available) == layers
    assert parse_layers(", ".join(f"{a}-{b}" for a, b in ranges), None, available) == layers
    if len(layers) < 61:
        assert parse_layers(None, ",".join(map(str, ordered)), available) == set(available) - layers


def test_without_layers_all_are_meant():
    assert parse_layers(None, None, [0, 1]) is None
    assert parse_layers("", "", [0, 1]) is None


def test_excluded_layers_are_taken_from_the_included_ones_and_dense_ones_inside_a_range_are_passed_over():
    assert parse_layers("0-5", "2,4", [1, 2, 3, 4, 9]) == {1, 3}


@pytest.mark.parametrize("text", ["x", "1-", "-3", "1-2-3", "1,,2", "1.5", "4 7"])
def test_layers_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError, match="layers"):
        parse_layers(text, None, list(range(9)))


@pytest.mark.parametrize("text", ["9", "1,12", "7-5", "20-99999999999"])
def test_a_layer_the_model_does_not_have_is_refused_with_those_it_has(text):
    with pytest.raises(UsageError, match="1-8"):
        parse_layers(text, None, list(range(1, 9)))


def test_excluding_every_layer_is_refused():
    with pytest.raises(UsageError, match="no MoE layer is left"):
        parse_layers(None, "0-9", [1, 2, 3])


@quick
@given(st.sets(st.tuples(st.integers(0, 99), st.integers(0, 511))))
def test_protected_pairs_are_read_back_from_one_text_or_many(pairs):
    texts = [f"{layer}:{expert}" for layer, expert in pairs]
    assert parse_protect(texts) == pairs == parse_protect([",".join(texts)])


@pytest.mark.parametrize("text", ["1", "1:", ":2", "1:2:3", "a:b", "1-2"])
def test_protected_pairs_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError, match="--protect"):
        parse_protect([text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GB", 12 * 10**9),
        ("500 MB", 5 * 10**8),
        ("8GiB", 2**33),
        ("1.5kib", 1536),
        ("77", 77),
        (" 2 tb ", 2 * 10**12),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@quick
@given(st.integers(1, 10**6), st.sampled_from([("B", 1), ("kB", 10**3), ("MiB", 2**20), ("GB", 10**9), ("TiB", 2**40)]))
def test_whole_sizes_are_read_to_the_byte(number, unit):
    assert parse_size(f"{number}{unit[0]}") == parse_size(f"{number} {unit[0].upper()}") == number * unit[1]


@pytest.mark.parametrize("text", ["", "GB", "12XB", "twelve", "1,5GB", "12 G B", "1e"])
def test_sizes_that_cannot_be_read_are_refused(text):
    with pytest.raises(UsageError, match="cannot read the size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "-5GB", "0"])
def test_sizes_that_are_no_amount_are_refused(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


# -- the register -----------------------------------------------------------------------------------------------------


def numeric_parameters():
    for name, entry in methods().items():
        for parameter in entry.parameters():
            for bound, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
                if bound in parameter:
                    yield name, parameter["name"], parameter[bound] + step


def test_an_unknown_method_is_refused_with_the_closest_name():
    with pytest.raises(UsageError, match=r"no method 'reep'\n  Did you mean 'reap'\?"):
        get_method("reep")
    with pytest.raises(UsageError, match=r"frequency, .*random, reap, .*soft-frequency"):
        get_method("qqqqqqqq")


def test_an_unknown_parameter_is_refused_with_the_closest_name():
    with pytest.raises(UsageError, match="Did you mean 'renormalise'"):
        get_method("reap", {"renormalize": True})
    with pytest.raises(UsageError, match="It takes no parameters"):
        get_method("frequency", {"alpha": 1})


def test_parameters_of_the_wrong_type_are_refused_by_name():
    with pytest.raises(UsageError, match="reap: renormalise = 'perhaps'"):
        get_method("reap", {"renormalise": "perhaps"})
    with pytest.raises(UsageError, match="ean: reduce = 'median'"):
        get_method("ean", {"reduce": "median"})


@pytest.mark.parametrize(("method", "parameter", "value"), numeric_parameters())
def test_parameters_outside_their_range_are_refused_by_name(method, parameter, value):
    with pytest.raises(UsageError, match=f"{method}: {parameter}"):
        get_method(method, {parameter: value})


def test_the_random_seed_has_a_range_that_its_generator_can_take():
    layer = LayerProfile(10_000, "mlp", 4, 2, 1)
    highest = next(p for p in methods()["random"].parameters() if p["name"] == "seed")["maximum"]
    assert get_method("random", {"seed": highest}).score(layer).shape == (4,)


def test_random_scores_depend_on_seed_and_layer_alone():
    one, two = LayerProfile(3, "mlp", 8, 2, 1), LayerProfile(3, "mlp", 8, 2, 99)
    assert torch.equal(get_method("random").score(one), get_method("random", {"seed": 0}).score(two))
    assert not torch.equal(get_method("random").score(one), get_method("random", {"seed": 1}).score(one))
    assert not torch.equal(get_method("random").score(one), get_method("random").score(LayerProfile(4, "mlp", 8, 2, 1)))


def test_the_register_lists_every_method_with_what_a_machine_needs():
    known = methods()
    assert list(known) == sorted(known)
    assert {"dern", "ean", "frequency", "random", "reap", "soft-frequency"} <= set(known)
    for name, entry in known.items():
        assert entry.name == name
        assert set(entry.kind.split(" + ")) <= {
            "pruning",
            "merging",
            "factorizing",
            "editing",
            "sparsifying",
            "slimming",
            "skipping",
            "quantizing",
        }
        assert entry.paper == "folklore" or entry.paper.startswith("arXiv:")
        assert entry.summary.endswith(".")
        parameters = json.loads(json.dumps(entry.parameters()))
        assert [p["name"] for p in parameters] == list(entry.cls.model_fields)
        for parameter in parameters:
            assert parameter["description"].endswith(".")
            default = json.dumps(entry.cls.model_fields[parameter["name"]].default)
            assert parameter["default"] == json.loads(default)
            assert {"type", "enum", "anyOf", "const"} & parameter.keys()
            assert "title" not in parameter


def test_methods_are_values_that_cannot_be_changed():
    assert get_method("reap") == get_method("reap", {"renormalise": True})
    with pytest.raises(ValueError, match="frozen"):
        get_method("reap").renormalise = False


def test_a_long_list_to_protect_is_no_file_name():
    pairs = [(layer, expert) for layer in range(60) for expert in range(20)]
    assert parse_protect([",".join(f"{i}:{e}" for i, e in pairs)]) == set(pairs)
