"""STUN's first half: which experts cluster, which of them stay, how many per layer, and that no text is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method
from coterie.compression.plan import Plan
from coterie.compression.pruning.stun import _choose, _Pairs, _Part, complete_merges
from coterie.errors import UsageError
from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import CoActivation
from coterie.profiling.weights import ExpertGram, Moments, RouterRows, distances_to_mean, expert_kurtosis
from coterie.streaming.lockstep import Batch
from families import FEW, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors")


def stun(source, out, **options):
    asked = {"method": "stun", "keep": 0.75, **options}
    return coterie.compress(str(source), str(out), **asked)


def like(model, layer_number, expert, other, *, noise=0.0, weights=True):
    """Make `other` a copy of `expert` in one MoE layer: router row, biases and weights."""
    layer = moe_layers(model)[layer_number]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        tensors = [t for t in layer.router.parameters() if t.dim() and t.shape[0] == layer.num_experts]
        tensors += list(layer.experts.parameters(recurse=False)) if weights else []
        for tensor in tensors:
            tensor[other] = tensor[expert] + noise * torch.randn(tensor[expert].shape, generator=generator)


# -- clustering -------------------------------------------------------------------------------------------------------


def by_hand(distance_EE, threshold, most):
    """The authors' loop, step by step; the set of clusters."""
    E = len(distance_EE)
    distance = distance_EE.copy()
    cluster, left = {e: {e} for e in range(E)}, E
    while left > E - most:
        u, v = divmod(int(distance.argmin()), E)
        if not distance[u, v] < threshold:
            break
        looked_at = [(w, v) for w in cluster[u]] + [(w, u) for w in cluster[v]]
        if max(distance[a, b] for a, b in looked_at) < threshold:
            both = cluster[u] | cluster[v]
            cluster |= dict.fromkeys(both, both)
            left -= 1
            for a, b in looked_at:
                distance[a, b] = distance[b, a] = np.inf
        else:
            distance[u, v] = distance[v, u] = np.inf
    return {tuple(sorted(c)) for c in cluster.values()}


def random_distances(seed, E, dimensions, ties):
    points = np.random.default_rng(seed).normal(size=(E, dimensions))
    points = points.round(0) if ties else points
    distance = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    np.fill_diagonal(distance, np.inf)
    return distance


def clusters_at(part, threshold):
    return {tuple(c) for c in part.clusters(threshold, part.joins(threshold))}


drawn = {
    "seed": st.integers(0, 10_000),
    "E": st.integers(2, 12),
    "dimensions": st.integers(1, 5),
    "ties": st.booleans(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**drawn, most=st.integers(1, 11))
def test_code_linkage_is_the_authors_loop_at_every_threshold(seed, E, dimensions, ties, most):
    distance = random_distances(seed, E, dimensions, ties)
    part = _Part(0, E, [_Pairs(distance)], min(most, E - 1), "code")
    values = np.append(np.unique(distance[np.isfinite(distance)]), np.inf)
    for threshold in np.random.default_rng(seed).permutation(values):  # what is remembered of one must fit the next
        assert clusters_at(part, threshold) == by_hand(distance, threshold, min(most, E - 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**drawn)
def test_under_complete_linkage_all_members_are_closer_than_the_threshold(seed, E, dimensions, ties):
    distance = random_distances(seed, E, dimensions, ties)
    part = _Part(0, E, [_Pairs(distance)], E - 1, "complete")
    for threshold in np.append(np.unique(distance[np.isfinite(distance)]), np.inf):
        found = part.clusters(threshold, part.joins(threshold))
        assert sorted(e for c in found for e in c) == list(range(E))
        assert all(distance[a, b] < threshold for c in found for a in c for b in c if a != b)
        closest = [max(distance[a, b] for a in c for b in d) for c in found for d in found if c != d]
        assert min(closest, default=np.inf) >= threshold  # nothing that could be joined was left


def stepped(layers, target):
    """The paper's search: step the threshold, double until the direction flips, then halve; None if it gives up."""
    threshold, step, direction, flipped = 0.5, 0.1, 0, False
    for _ in range(60):
        found = [by_hand(d, threshold, len(d) - 1) for d in layers]
        count = sum(len(clusters) for clusters in found)
        if count == target:
            return found
        now = 1 if count > target else -1
        flipped |= direction == -now
        step = step / 2 if flipped else step * 2
        threshold, direction = threshold + now * step, now
    return None


@pytest.mark.parametrize("seed", range(12))
def test_the_search_ends_where_the_papers_does(seed):
    layers = [random_distances(seed * 10 + n, 10, 6, False) for n in range(4)]
    met = 0
    for gone in (2, 6, 10, 16, 22):
        parts = [_Part(n, 10, [_Pairs(d)], 9, "code") for n, d in enumerate(layers)]
        found = _choose(parts, gone)
        assert sum(len(c) for c in found.values()) == 40 - gone
        wanted = stepped(layers, 40 - gone)
        met += wanted is not None
        if wanted is not None and monotone(layers):
            assert [{tuple(c) for c in found[n]} for n in range(4)] == wanted
    assert met >= 4


def monotone(layers):
    for distance in layers:
        counts = [len(by_hand(distance, t, 9)) for t in [*np.unique(distance[np.isfinite(distance)]), np.inf]]
        if counts != sorted(counts, reverse=True):
            return False
    return True


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), gone=st.integers(0, 24), linkage=st.sampled_from(["code", "complete"]))
def test_the_count_is_met_exactly_whatever_the_ties(seed, gone, linkage):
    layers = [random_distances(seed + n, 9, 2, True) for n in range(3)]
    parts = [_Part(n, 9, [_Pairs(d)], 8, linkage) for n, d in enumerate(layers)]
    found = _choose(parts, gone)
    assert sum(len(c) for c in found.values()) == 27 - gone
    assert all(sorted(e for c in clusters for e in c) == list(range(9)) for clusters in found.values())


def test_complete_linkage_heights_rise():
    merges, heights = complete_merges(_Pairs(random_distances(1, 20, 3, False)))
    assert len(merges) == 19
    assert heights == sorted(heights)


# -- statistics of weights --------------------------------------------------------------------------------------------


def seen(layer, *observers):
    return LayerObservation(layer, observers, 1).result()


@pytest.mark.parametrize("family", FEW)
def test_router_rows_are_the_logit_without_the_input(family):
    layer = moe_layers(tiny(family))[0]
    rows_EC = seen(layer, RouterRows).router_rows_EC
    x_TH = torch.randn(5, 64)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x_TH, layer.router.weight, getattr(layer.router, "bias", None))
    found = x_TH @ rows_EC[:, :64].T + (rows_EC[:, 64] if rows_EC.shape[1] == 65 else 0)
    torch.testing.assert_close(found, expected)
    assert rows_EC.shape[1] == (65 if family == "gpt-oss" else 64)


@pytest.mark.parametrize("family", FEW)
def test_the_gram_matrix_gives_distances_to_the_mean_of_any_cluster(family):
    layer = moe_layers(tiny(family))[0]
    gram_EE = seen(layer, ExpertGram).expert_gram_EE
    flat = torch.cat([p.detach().reshape(layer.num_experts, -1) for p in layer.experts.parameters(recurse=False)], 1)
    members = [1, 2, 5]
    expected = (flat[members].double() - flat[members].double().mean(0)).square().sum(1)
    torch.testing.assert_close(distances_to_mean(gram_EE, members), expected)


def test_kurtosis_is_of_the_weights_that_are_not_zero():
    weight = torch.randn(200_000, dtype=torch.float64)
    moments = Moments()
    moments.add(weight[:70_000])
    moments.add(weight[70_000:])
    assert moments.kurtosis == pytest.approx(3, abs=0.1)
    gone = Moments()
    gone.add(torch.where(weight.abs() < 0.6745, 0.0, weight))  # half of them: the two humps that are left
    assert gone.kurtosis == pytest.approx(1.77, abs=0.1)
    alike = Moments()
    alike.add(torch.full((5,), 0.1))
    assert alike.kurtosis == 0.0


@pytest.mark.parametrize("family", FEW)
def test_co_selection_is_symmetric_and_counts_every_ordered_pair_once(family, ids):
    model = tiny(family)
    model.set_experts_implementation("coterie")
    layer = moe_layers(model)[-1]
    with LayerObservation(layer, [CoActivation], 1) as watch, torch.no_grad():
        watch.batch(Batch(tokens()))
        model(tokens(), use_cache=False)
    profile = watch.result()
    together = profile.coactivation_EE.clone().fill_diagonal_(0)
    assert torch.equal(together, together.T)
    assert int(together.sum()) == profile.tokens * layer.top_k * (layer.top_k - 1)
    distance = get_method("stun", {"source": "coactivation"}).distances(profile)
    finite = torch.isfinite(distance)
    assert bool((finite == ~torch.eye(layer.num_experts, dtype=torch.bool)).all())
    torch.testing.assert_close(distance[finite], -(together.double() / together.double().mean())[finite])


def test_mixed_distances_are_rows_less_weighted_co_selection(ids):
    model = resident_profile("gpt-oss")
    rows = get_method("stun", {"source": "router", "division_by_norm": False}).distances(model)
    together = get_method("stun", {"source": "coactivation"}).distances(model)
    mixed = get_method("stun", {"source": "mixed", "mix": 0.5, "division_by_norm": False}).distances(model)
    finite = torch.isfinite(rows)
    torch.testing.assert_close(mixed[finite], (rows + 0.5 * together)[finite])
    divided = get_method("stun").distances(model)
    torch.testing.assert_close(divided[finite] * model.router_rows_EC.double().norm(), rows[finite])


def resident_profile(family):
    model = tiny(family)
    model.set_experts_implementation("coterie")
    layer = moe_layers(model)[0]
    with LayerObservation(layer, [CoActivation, RouterRows, ExpertGram], 1) as watch, torch.no_grad():
        watch.batch(Batch(tokens()))
        model(tokens(), use_cache=False)
    return watch.result()


# -- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("how", [{"keep": 1.0}, {"keep": 1.0, "parameters": {"max_merges": 0}}])
def test_without_a_join_nothing_changes(how, family, tmp_path):
    source = saved(family, tmp_path)
    stun(source, tmp_path / "out", scope="global", **how)
    before, after = each_tensor(source), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


@pytest.mark.parametrize("linkage", ["code", "complete"])
@pytest.mark.parametrize("family", FEW)
def test_a_global_budget_is_met_exactly_and_redundant_layers_lose_more(family, linkage, tmp_path):
    model = tiny(family)
    first = moe_layers(model)[0]
    size = first.num_experts // first.groups
    for group in range(first.groups):  # one layer whose router treats experts alike in pairs
        for expert in range(1, size, 2):
            like(model, 0, group * size + expert - 1, group * size + expert, noise=1e-3, weights=False)
    model.save_pretrained(tmp_path / "model")
    result = stun(tmp_path / "model", tmp_path / "out", scope="global", parameters={"linkage": linkage})
    counts = [len(plan.keep) for plan in result.plan.layers]
    total = sum(plan.experts for plan in result.plan.layers)
    assert sum(counts) == round(0.75 * total)
    assert all(count >= first.top_k for count in counts)
    assert counts[0] < min(counts[1:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.num_experts for layer in moe_layers(loaded)] == counts


@pytest.mark.parametrize("family", FEW)
def test_an_even_budget_gives_a_plain_checkpoint(family, tmp_path):
    result = stun(saved(family, tmp_path), tmp_path / "out", keep=0.5)
    assert {len(plan.keep) / plan.experts for plan in result.plan.layers} == {0.5}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", FEW)
def test_duplicates_join_first_and_the_one_that_stays_is_their_copy(family, tmp_path):
    model = tiny(family)
    for number in range(len(moe_layers(model))):
        like(model, number, 1, 2)
    model.save_pretrained(tmp_path / "model")
    E, groups = moe_layers(model)[0].num_experts, moe_layers(model)[0].groups
    result = stun(tmp_path / "model", tmp_path / "out", keep=None, keep_experts=E - groups)
    after = moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for layer, pruned, plan in zip(moe_layers(model), after, result.plan.layers, strict=True):
        assert [1, 2] in plan.extra["members"]
        place = plan.extra["members"].index([1, 2])
        assert plan.keep[place] in (1, 2)
        for name, tensor in layer.experts.named_parameters(recurse=False):
            assert torch.equal(dict(pruned.experts.named_parameters())[name][place], tensor[1])


@pytest.mark.parametrize("family", FEW)
def test_the_expert_nearest_to_its_clusters_mean_stays_with_its_own_row(family, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    result = stun(source, tmp_path / "out", keep=0.5, parameters={"merge_max_clusters": 0})
    after = moe_layers(resident(tmp_path / "out"))
    for layer, pruned, plan in zip(moe_layers(resident(source)), after, result.plan.layers, strict=True):
        flat = torch.cat([p.detach().reshape(plan.experts, -1) for p in layer.experts.parameters(recurse=False)], 1)
        assert sorted(e for members in plan.extra["members"] for e in members) == list(range(plan.experts))
        for kept, members in zip(plan.keep, plan.extra["members"], strict=True):
            distance = (flat[members].double() - flat[members].double().mean(0)).norm(dim=1)
            assert members[int(distance.argmin())] == kept
        for name, tensor in [*layer.router.named_parameters(), *layer.experts.named_parameters(recurse=False)]:
            own = dict([*pruned.router.named_parameters(), *pruned.experts.named_parameters(recurse=False)])[name]
            assert torch.equal(own, tensor[plan.keep] if tensor.shape[0] == plan.experts else tensor), name


@pytest.mark.parametrize("family", FEW)
def test_layers_left_with_few_clusters_average_experts_and_rows(family, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    E = moe_layers(tiny(family))[0].num_experts
    result = stun(source, tmp_path / "out", keep=0.5, parameters={"merge_max_clusters": E // 2})
    after = moe_layers(resident(tmp_path / "out"))
    for layer, pruned, plan in zip(moe_layers(resident(source)), after, result.plan.layers, strict=True):
        assert plan.extra["merge"] is True
        pairs = [*zip(layer.router.named_parameters(), pruned.router.parameters(), strict=True)]
        pairs += [*zip(layer.experts.named_parameters(recurse=False), pruned.experts.parameters(), strict=True)]
        for (name, old), new in pairs:
            if old.dim() and old.shape[0] == E:
                for place, members in enumerate(plan.extra["members"]):
                    torch.testing.assert_close(new[place], old[members].mean(0), msg=name)
    even = stun(source, tmp_path / "even", keep=0.5, parameters={"merge_max_clusters": E // 2 - 1})
    assert not any(plan.extra["merge"] for plan in even.plan.layers)


def test_clusters_of_a_grouped_router_stay_inside_their_group(tmp_path):
    result = stun(saved("deepseek-v3", tmp_path), tmp_path / "out", scope="global", keep=0.75)
    for plan in result.plan.layers:
        assert all(len({e // 4 for e in members}) == 1 for members in plan.extra["members"])
        assert len({sum(e // 4 == g for e in plan.keep) for g in range(4)}) == 1


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("linkage", ["code", "complete"])
def test_protected_experts_stay_alone(scope, linkage, tmp_path):
    held = ["0:1", "0:2", "2:7"]
    given = {"scope": scope, "keep": 0.5, "protect": held, "parameters": {"linkage": linkage}}
    result = stun(saved("mixtral", tmp_path), tmp_path / "out", **given)
    members = {plan.index: plan.extra["members"] for plan in result.plan.layers}
    assert [1] in members[0]
    assert [2] in members[0]
    assert [7] in members[2]
    assert sum(len(plan.keep) for plan in result.plan.layers) == 12


def test_excluded_layers_and_the_minimum_are_kept(tmp_path):
    source = saved("mixtral", tmp_path)
    result = stun(source, tmp_path / "out", scope="global", keep=0.75, exclude_layers="0", minimum=5)
    counts = [len(plan.keep) for plan in result.plan.layers]
    assert counts[0] == 8
    assert min(counts) >= 5
    assert sum(counts) == 18
    with pytest.raises(UsageError, match="minimum, top-k and excluded layers"):
        stun(source, tmp_path / "no", scope="global", keep=0.5, exclude_layers="0", minimum=5)
    with pytest.raises(UsageError, match=r"keeps 12 of 24 experts, but at least 21 have to stay.*max_merges"):
        stun(source, tmp_path / "no", scope="global", keep=0.5, parameters={"max_merges": 1})


@pytest.mark.parametrize("experts", [8, 16])
@pytest.mark.parametrize(("source", "sweeps"), [("router", 0), ("coactivation", 1), ("mixed", 1)])
def test_the_text_passes_once_or_never_however_many_experts(source, sweeps, experts, ids, tmp_path, monkeypatch):
    from coterie.streaming import lockstep

    model = saved("mixtral", tmp_path, num_local_experts=experts)
    passed, run = [], lockstep.Step.run

    def counted(self, **options):
        passed.append(self.index)
        run(self, **options)

    monkeypatch.setattr(lockstep.Step, "run", counted)
    given = {} if source == "router" else {"tokens": str(ids)}
    result = stun(model, tmp_path / "out", scope="global", parameters={"source": source}, **given)
    assert passed == [0, 1, 2] * sweeps
    assert result.record["data_digest"] == "" or source != "router"
    if source != "router":
        with pytest.raises(UsageError, match="no text was given"):
            stun(model, tmp_path / "none", parameters={"source": source})


def test_kurtosis_of_the_survivors_is_reported(tmp_path):
    source = saved("mixtral", tmp_path)
    result = stun(source, tmp_path / "out", keep=0.5)
    for layer, plan in zip(moe_layers(resident(source)), result.plan.layers, strict=True):
        every = [expert_kurtosis(layer, e) for e in range(8)]
        figures = result.figures[plan.index]
        assert figures["kurtosis_before"] == pytest.approx(sum(every) / 8)
        assert figures["kurtosis_after"] == pytest.approx(sum(every[e] for e in plan.keep) / 4)


# -- with the rest of the house -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_a_saved_profile_and_a_plan_give_the_same_checkpoint(family, ids, tmp_path):
    source = saved(family, tmp_path)
    stun(source, tmp_path / "direct", scope="global")
    coterie.profile(str(source), tokens=str(ids), methods=["stun"], out=str(tmp_path / "profile"))
    asked = {"method": "stun", "keep": 0.75, "scope": "global", "out": str(tmp_path / "plan.json")}
    plan = coterie.plan(str(source), str(tmp_path / "profile"), **asked)
    coterie.compress(str(source), str(tmp_path / "planned"), plan=str(tmp_path / "plan.json"))
    direct, planned = each_tensor(tmp_path / "direct"), each_tensor(tmp_path / "planned")
    assert direct.keys() == planned.keys()
    assert all(torch.equal(direct[key], planned[key]) for key in direct)
    assert [p.keep for p in Plan.load(tmp_path / "direct/plan.json").layers] == [p.keep for p in plan.layers]


def test_an_edited_plan_that_no_longer_fits_its_clusters_is_refused(tmp_path):
    source = saved("mixtral", tmp_path)
    result = stun(source, tmp_path / "out", keep=0.5)
    plan = result.plan
    members = plan.layers[0].extra["members"]
    other = next(e for e in range(8) if e not in plan.layers[0].keep)
    keep = sorted([*plan.layers[0].keep[1:], other])
    assert any(e not in own for e, own in zip(keep, members, strict=True))
    plan.layers[0].keep = keep
    with pytest.raises(UsageError, match="the clusters in the plan do not belong"):
        coterie.compress(str(source), str(tmp_path / "again"), plan=plan)


def test_compared_on_the_fly_it_is_what_it_writes(ids, tmp_path):
    source = saved("gpt-oss", tmp_path)
    asked = {"tokens": str(ids), "eval_tokens": str(ids), "keep": [0.5]}
    (found,) = coterie.compare(str(source), methods=["stun:merge_max_clusters=4"], **asked).contenders
    coterie.compress(str(source), str(tmp_path / "out"), plan=found.plan)
    _, measured = coterie.evaluate([str(source), str(tmp_path / "out")], tokens=str(ids))
    assert found.quality.mean_loss == pytest.approx(measured.mean_loss, abs=1e-6)


def test_the_command_line_needs_no_text(tmp_path):
    source = saved("qwen3-moe", tmp_path)
    done = cli("compress", source, tmp_path / "out", "--method", "stun", "--keep", 0.75, "--scope", "global")
    assert done.code == 0, done.err
    assert "up to" in done.out or "8" in done.out
    record = json.loads((tmp_path / "out/coterie.json").read_text())
    assert record["after"]["experts_total"] == 12
    assert record["tokens"] == {}
    told = cli("methods", "stun", "--json").json()[0]
    assert told["paper"] == "arXiv:2409.06211"
    assert told["observes"] == ["RouterRows", "ExpertGram"]
    wrong = cli("compress", source, tmp_path / "no", "--method", "stun", "--keep", 0.75, "--set", "linkage=single")
    assert wrong.code == 2
    assert "stun: linkage = 'single'" in wrong.err
