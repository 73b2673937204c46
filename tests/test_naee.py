"""NAEE: losses of sets of experts against layers sliced and run again; search, protection, profiles."""

# T tokens, H hidden, E experts, K experts per token

import copy
import functools
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers, select
from coterie.compression.methods import get_method
from coterie.compression.planning import layer_plan_of
from coterie.compression.selector import Budget
from coterie.errors import ModelError, UsageError
from coterie.experts.forward import NAME, observe
from coterie.profiling import reconstruction
from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import GateMass, LayerShape, OutputNorm, Routing, SelectionCount, WeightedOutputNorm
from coterie.profiling.profile import LayerProfile
from coterie.profiling.reconstruction import Replay, count_subsets, removal_curve, subset_loss, subsets
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FEW, each_tensor, resident, saved, tiny, token_file, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
SEARCHED = (*FEW, "qwen2-moe", "phimoe")  # qwen2-moe does not renormalise
ALL, BOTH = subset_loss(None), [subset_loss(None), removal_curve()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


def batches():
    """Two batches of different sizes, the first one padded."""
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:] = mask[2, 3:] = False
    return [Batch(tokens(3, 12), mask, torch.zeros(3).long()), Batch(tokens(2, 9, seed=5), None, torch.zeros(2).long())]


def profiled(folder, parts, observers):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    sizes = {"text": sum(b.tokens for b in parts)}
    return profile_model(streamed, TokenData(list(parts), ["text"], "digest", sizes), observers, model="tiny")


@pytest.fixture(scope="module")
def searched(checkpoint):
    """Exact losses of all sets, and the greedy curve, once per family."""
    return functools.cache(lambda family: profiled(checkpoint(family), batches(), BOTH))


def all_sets(layer, groups):
    """{kept experts: loss} of every set an exact profile of all numbers holds."""
    method = get_method("naee")
    recorded = method._recorded(layer)
    return {
        keep: float(loss)
        for count, loss_C in recorded.items()
        for keep, loss in zip(subsets(layer.experts, count, groups), loss_C, strict=True)
    }


# -- brute force: slice a copy of the block, run it again -------------------------------------------------------------


@torch.no_grad()
def rerun(folder, parts):
    """{layer: function from kept experts to the loss}: deep copies of blocks, sliced and run batch by batch."""
    model = resident(folder)
    found, inputs = {}, {}
    layers = moe_layers(model)
    for layer in layers:
        calls = inputs.setdefault(layer.index, [])
        layer.block.register_forward_pre_hook(lambda m, a, calls=calls: calls.append(a[0].clone()))
    for batch in parts:
        model(batch.ids_BL, attention_mask=None if batch.mask_BL is None else batch.mask_BL.long(), use_cache=False)
    for layer in layers:
        layer.block._forward_pre_hooks.clear()

        def loss(keep, layer=layer):
            cut = copy.copy(layer)
            cut.block = copy.deepcopy(layer.block)
            cut.router = cut.block.get_submodule(layer.router_name[len(layer.name) + 1 :])
            cut.experts = cut.block.get_submodule(layer.experts_name[len(layer.name) + 1 :])
            select(cut, list(keep))
            total = 0.0
            for batch, x_BLH in zip(parts, inputs[layer.index], strict=True):
                whole, less = (
                    out[0] if isinstance(out, tuple) else out for out in (layer.block(x_BLH), cut.block(x_BLH))
                )
                real = slice(None) if batch.mask_BL is None else batch.mask_BL
                total += float((whole[real].double() - less[real].double()).norm())
            return total

        found[layer.index] = torch.no_grad()(loss)
    return found


@pytest.mark.parametrize("family", SEARCHED)
def test_losses_are_those_of_a_sliced_layer_that_is_run_again(family, checkpoint, searched):
    expected = rerun(checkpoint(family), batches())
    for index, layer in searched(family).layers.items():
        sets = list(all_sets(layer, layer.groups).items())
        assert len(sets) == (1553 if family == "deepseek-v3" else 247)
        for keep, loss in sets[:: 100 if family == "deepseek-v3" else 8]:
            assert loss == pytest.approx(expected[index](keep), rel=2e-4, abs=2e-5), (index, keep)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_the_chosen_set_has_the_smallest_loss_of_all_by_brute_force(family, checkpoint, searched):
    expected = rerun(checkpoint(family), batches())
    moe = {m.index: m for m in moe_layers(tiny(family))}
    for index, layer in searched(family).layers.items():
        keep, *_ = get_method("naee").pick(layer, moe[index], 5, Budget(keep_experts=5))
        assert tuple(keep) == min(subsets(8, 5), key=expected[index])


@pytest.mark.parametrize("family", SEARCHED)
def test_losing_no_expert_loses_exactly_nothing(family, searched):
    for layer in searched(family).layers.values():
        losses = layer.stats["subset_loss_t4096_C"]
        assert losses[-1] == 0.0
        assert (losses[:-1] >= 0).all()
        assert losses[0] > 0


@pytest.mark.parametrize("family", SEARCHED)
def test_experts_run_on_all_tokens_compute_what_they_compute_on_their_own(family):
    layer = moe_layers(tiny(family).requires_grad_(False))[0]
    layer.block.eval()
    x_TH = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    layer.experts.config._experts_implementation = NAME
    seen = {}

    class Keep:
        def routed(self, *routing):
            seen["routing"] = routing
            return True

        def expert(self, expert, row_R, x_RH, y_RH):
            seen[expert] = (row_R // layer.top_k, y_RH)

        def combined(self, sum_TH): ...

    with observe(layer.experts, Keep()):
        layer.block(x_TH[None])
    _, index_TK, weight_TK = seen.pop("routing")
    gram_TEE = Replay(layer, torch.zeros(20).long(), index_TK, weight_TK, x_TH).gram_TEE
    assert len(seen) > 3
    for expert, (token_R, y_RH) in seen.items():
        squared_R = y_RH.double().square().sum(-1)
        torch.testing.assert_close(gram_TEE[token_R, expert, expert], squared_R, rtol=1e-5, atol=1e-9)


def test_an_expert_that_is_never_used_is_dropped_at_no_loss(tmp_path):
    model = tiny("gpt-oss")
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.bias[5] = -1e4
    model.save_pretrained(tmp_path / "model")
    profile = profiled(tmp_path / "model", batches(), [subset_loss(7), removal_curve()])
    for layer in profile.layers.values():
        losses = dict(zip(subsets(8, 7), layer.stats["subset_loss_t4096_C"].tolist(), strict=True))
        assert losses[(0, 1, 2, 3, 4, 6, 7)] < 1e-5 * min(v for keep, v in losses.items() if 5 in keep)
        assert layer.stats["removal_order_t4096_E"][0] == 5
    for search in ("exact", "greedy"):
        options = {"method": "naee", "parameters": {"search": search}, "keep_experts": 7}
        ids = token_file(tmp_path / "ids.safetensors")
        result = coterie.compress(str(tmp_path / "model"), str(tmp_path / search), tokens=str(ids), **options)
        assert all(plan.keep == [0, 1, 2, 3, 4, 6, 7] for plan in result.plan.layers)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / search).eval()
        with torch.no_grad():
            torch.testing.assert_close(after(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-4)


# -- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEARCHED)
def test_each_greedy_step_removes_what_costs_least_and_measures_what_the_exact_search_measures(family, searched):
    for layer in searched(family).layers.values():
        sets, size = all_sets(layer, layer.groups), layer.experts // layer.groups
        order, losses = (layer.stats[f"removal_{what}_t4096_E"].tolist() for what in ("order", "loss"))
        assert sorted(order) == list(range(layer.experts))
        keep, rounds = set(range(layer.experts)), 0
        for start in range(0, layer.experts, layer.groups):
            if losses[start + layer.groups - 1] == math.inf:
                break
            gone = order[start : start + layer.groups]
            left = tuple(sorted(keep - set(gone)))
            assert losses[start + layer.groups - 1] == pytest.approx(sets[left], rel=1e-6, abs=1e-9)
            if layer.groups == 1:
                best = min(sets[tuple(sorted(keep - {e}))] for e in keep)
            else:  # no exchange in the group that was decided last gives less
                others = keep - set(gone[:-1])
                last = [e for e in others if e // size == gone[-1] // size]
                best = min(sets[tuple(sorted(others - {e}))] for e in last)
            assert sets[left] == pytest.approx(best, rel=1e-6, abs=1e-9)
            keep, rounds = set(left), rounds + 1
        assert len(keep) == (8 if family == "deepseek-v3" else layer.top_k)
        assert losses[rounds * layer.groups :] == [math.inf] * len(keep)


@pytest.mark.parametrize("family", FEW)
def test_running_only_the_tokens_that_used_an_expert_changes_no_greedy_step(family, checkpoint, searched, monkeypatch):
    calls = []
    route = Replay.route
    monkeypatch.setattr(Replay, "route", lambda self, *args: calls.append(len(args)) or route(self, *args))
    profiled(checkpoint(family), batches(), [removal_curve()])
    assert (2 in calls) == (family != "deepseek-v3")  # the shortcut is taken where it may be
    monkeypatch.setattr(reconstruction, "_agree", lambda *args: False)
    calls.clear()
    slow = profiled(checkpoint(family), batches(), [removal_curve()])
    assert 2 not in calls
    for index, layer in searched(family).layers.items():
        for what in ("order", "loss"):
            name = f"removal_{what}_t4096_E"
            torch.testing.assert_close(slow.layers[index].stats[name], layer.stats[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2-moe", "olmoe", "deepseek-v2"])
def test_routers_whose_weights_depend_on_the_unselected_are_run_on_all_tokens(family, checkpoint, monkeypatch):
    calls = []
    route = Replay.route
    monkeypatch.setattr(Replay, "route", lambda self, *args: calls.append(len(args)) or route(self, *args))
    profiled(checkpoint(family), batches(), [removal_curve()])
    assert set(calls) == {1}


def test_a_shortcut_found_wrong_later_is_given_up(checkpoint, searched, monkeypatch):
    """The first round is told that every router is local, as a sample of tokens might: the next look corrects it."""
    agree, first, calls, route = reconstruction._agree, [], [], Replay.route
    monkeypatch.setattr(Replay, "route", lambda self, *args: calls.append(len(args)) or route(self, *args))
    monkeypatch.setattr(
        reconstruction, "_agree", lambda *args: (first.append(1) or True) if len(first) < 9 else agree(*args)
    )
    found = profiled(checkpoint("qwen2-moe"), batches(), [removal_curve()])
    for what in ("order", "loss"):
        name = f"removal_{what}_t4096_E"
        expected = searched("qwen2-moe").layers[0].stats[name]
        torch.testing.assert_close(found.layers[0].stats[name], expected, rtol=1e-6, atol=1e-9)
    assert calls.count(2) == 7  # the second round's, before it was looked at


@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v3"])
def test_shared_experts_do_not_run_in_a_search(family):
    model, ran = tiny(family), []
    model.set_experts_implementation(NAME)
    layer = moe_layers(model)[0]
    for path in layer.shared:
        for child in model.get_submodule(path).children():
            child.register_forward_hook(lambda *args: ran.append(1))
    watch = LayerObservation(layer, [removal_curve()], 1)
    with watch, torch.no_grad():
        watch.batch(Batch(tokens()))
        model(tokens(), use_cache=False)
    before = len(ran)
    watch.result()
    assert len(ran) == before > 0


# -- sets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "keep", "groups"), [(8, 4, 1), (8, 6, 1), (16, 8, 4), (12, 6, 2), (5, 5, 1)])
def test_sets_are_all_there_are_in_order_and_equal_in_groups(experts, keep, groups):
    found = list(subsets(experts, keep, groups))
    size = experts // groups
    expected = [
        s
        for s in subsets(experts, keep)
        if all(sum(e // size == g for e in s) == keep // groups for g in range(groups))
    ]
    assert found == sorted(expected)
    assert len(found) == count_subsets(experts, keep, groups)


def test_too_many_sets_are_refused_with_their_number_and_auto_goes_greedy(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "MAX_SUBSETS", 69)
    folder, ids = saved("mixtral", tmp_path), token_file(tmp_path / "ids.safetensors")
    options = {"tokens": str(ids), "method": "naee", "keep_experts": 4}
    with pytest.raises(UsageError, match="try 70 sets of experts \\(4 of 8\\), and tries at most 69") as error:
        coterie.compress(str(folder), str(tmp_path / "out"), parameters={"search": "exact"}, **options)
    assert "search=greedy" in error.value.hint
    result = coterie.compress(str(folder), str(tmp_path / "out"), **options)
    assert {plan.extra["search"] for plan in result.plan.layers} == {"greedy"}
    monkeypatch.setattr(reconstruction, "MAX_SUBSETS", 70)
    result = coterie.compress(str(folder), str(tmp_path / "out"), overwrite=True, **options)
    assert {plan.extra["search"] for plan in result.plan.layers} == {"exact"}


def test_layers_may_keep_different_numbers(checkpoint):
    method = get_method("naee", {"search": "exact"})
    profile = profiled(checkpoint("mixtral"), batches(), method.observes_for({0: 4, 1: 6, 2: 8}))
    found = {i: [t.tolist() for t in layer.stats.values()] for i, layer in profile.layers.items()}
    assert [(sizes, len(losses)) for sizes, losses in found.values()] == [([4], 70), ([6], 28), ([8], 1)]
    moe = {m.index: m for m in moe_layers(tiny("mixtral"))}
    keeps = [method.pick(profile.layers[i], moe[i], n, Budget(keep=0.5))[0] for i, n in ((0, 4), (1, 6), (2, 8))]
    assert [len(keep) for keep in keeps] == [4, 6, 8]
    profile.require(method.observes_for({0: 4, 1: 6, 2: 8}))
    with pytest.raises(UsageError, match="no losses of sets of 5 experts"):
        method.pick(profile.layers[0], moe[0], 5, Budget(keep_experts=5))


# -- inputs -----------------------------------------------------------------------------------------------------------


def fed(observer, lengths):
    """An observer that saw tokens 0, 1, 2, ... in batches of these lengths."""
    seen = observer(LayerShape(4, 2, 1, 1))
    start = 0
    for length in lengths:
        x_TH = torch.arange(start, start + length).float()[:, None]
        index_TK, start = torch.tensor([[0, 1]]).expand(length, 2), start + length
        seen.see_routing(Routing(x_TH, None, torch.ones(length, 2), index_TK, torch.zeros(length), torch.zeros(length)))
    return seen


def test_the_sample_of_tokens_is_uniform_and_does_not_depend_on_batches():
    whole, split = fed(subset_loss(2, 50), [1000]), fed(subset_loss(2, 50), [3, 60, 0, 437, 500])
    assert torch.equal(whole._kept.parts[3], split._kept.parts[3])
    assert len(whole._kept.parts[3]) == 50
    assert 380 < float(whole._kept.parts[3].mean()) < 620  # 500 with a standard error of 40
    batch_of = torch.repeat_interleave(torch.arange(5), torch.tensor([3, 60, 0, 437, 500]))
    assert torch.equal(split._kept.parts[0], batch_of[split._kept.parts[3][:, 0].long()])
    few = fed(subset_loss(2, 50), [20, 30])
    assert torch.equal(few._kept.parts[3][:, 0], torch.arange(50.0))


def test_a_sample_smaller_than_the_text_is_searched_and_named_in_the_statistic(checkpoint):
    profile = profiled(checkpoint("mixtral"), batches(), [subset_loss(4, 10), subset_loss(4)])
    for layer in profile.layers.values():
        assert 0 < layer.stats["subset_loss_t10_C"].max() < layer.stats["subset_loss_t4096_C"].max()


def test_losses_of_two_texts_add_up_and_greedy_orders_do_not(checkpoint):
    one, two = batches()
    parts = [profiled(checkpoint("gpt-oss"), [b], [subset_loss(6)]) for b in (one, two)]
    both = profiled(checkpoint("gpt-oss"), [one, two], [subset_loss(6)])
    merged = parts[0].merge(parts[1])
    for index, layer in both.layers.items():
        name = "subset_loss_t4096_C"
        torch.testing.assert_close(merged.layers[index].stats[name], layer.stats[name], rtol=1e-5, atol=1e-8)
    greedy = profiled(checkpoint("mixtral"), [one], [removal_curve()])
    with pytest.raises(UsageError, match="does not follow from that of each"):
        greedy.merge(greedy)


def test_losses_are_norms_of_batches_summed_not_squares(checkpoint):
    """The same text twice in one batch weighs sqrt(2), in two batches 2."""
    ids = tokens(1, 12)
    single, double = Batch(ids, None, torch.zeros(1).long()), Batch(ids.repeat(2, 1), None, torch.zeros(2).long())
    once, twice, wide = (
        profiled(checkpoint("mixtral"), parts, [subset_loss(4)]) for parts in ([single], [single] * 2, [double])
    )
    name = "subset_loss_t4096_C"
    for index, layer in once.layers.items():
        torch.testing.assert_close(twice.layers[index].stats[name], layer.stats[name] * 2, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(wide.layers[index].stats[name], layer.stats[name] * 2**0.5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["changes", "wants more", "sends elsewhere"])
def test_a_block_that_cannot_be_replayed_is_an_error(kind):
    model = tiny("qwen3-moe")
    model.set_experts_implementation(NAME)
    layer = moe_layers(model)[0]
    watch = LayerObservation(layer, [subset_loss(4)], 1)
    with watch, torch.no_grad():
        watch.batch(Batch(tokens()))
        model(tokens(), use_cache=False)
    original = layer.block.forward
    if kind == "changes":
        layer.block.forward = lambda x: original(x * 2)
        expected = "changes its inputs before they reach the experts"
    elif kind == "wants more":
        layer.block.forward = lambda x, ids: original(x)
        expected = "missing 1 required positional argument"
    else:
        layer.router.weight.data.copy_(layer.router.weight.data.flip(0))
        expected = "of 48 tokens elsewhere"
    with pytest.raises(ModelError, match=expected):
        watch.result()


def test_a_search_leaves_the_layer_as_it_was():
    for family in SEARCHED:
        model = tiny(family)
        model.set_experts_implementation(NAME)
        layer = moe_layers(model)[0]
        with torch.no_grad():
            before = model(tokens(), use_cache=False).logits
            modules = {name: dict(module.__dict__) for name, module in layer.block.named_modules()}
            watch = LayerObservation(layer, [subset_loss(4 if layer.groups == 1 else 12), removal_curve()], 1)
            with watch:
                watch.batch(Batch(tokens()))
                model(tokens(), use_cache=False)
            watch.result()
            after = {name: dict(module.__dict__) for name, module in layer.block.named_modules()}
            assert {n: d.keys() - {"_coterie_slots"} for n, d in after.items()} == {
                n: d.keys() for n, d in modules.items()
            }
            assert torch.equal(model(tokens(), use_cache=False).logits, before)


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["exact", "greedy"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_protected_experts_stay_at_any_budget(family, search, searched):
    method = get_method("naee", {"search": search})
    moe = {m.index: m for m in moe_layers(tiny(family))}
    for index, layer in searched(family).layers.items():
        sets = all_sets(layer, layer.groups)
        order = layer.stats["removal_order_t4096_E"].tolist()
        victims = order[:2] if family == "mixtral" else order[:1]
        budget = Budget(keep=0.5, protect=frozenset((index, e) for e in victims))
        free = Budget(keep=0.5, protect=frozenset((index + 1, e) for e in victims))
        for count in sorted({len(keep) for keep in sets} - {layer.experts}):
            keep, *_ = method.pick(layer, moe[index], count, budget)
            assert set(victims) <= set(keep)
            assert len(keep) == count
            assert tuple(keep) in sets
            if search == "exact":
                assert sets[tuple(keep)] == min(
                    v for s, v in sets.items() if len(s) == count and set(victims) <= set(s)
                )
            loose, *_ = method.pick(layer, moe[index], count, free)
            assert sets[tuple(loose)] <= sets[tuple(keep)] or search == "greedy"
            assert not set(victims) <= set(loose) or count == layer.experts - 1 or search == "exact"


@pytest.mark.parametrize(
    ("family", "search"),
    [("mixtral", "exact"), ("gpt-oss", "exact"), *((f, "greedy") for f in (*FEW, "qwen2-moe"))],
)
def test_one_sweep_equals_profile_then_plan_then_apply(family, search, tmp_path, checkpoint):
    folder, ids = checkpoint(family), token_file(tmp_path / "ids.safetensors", rows=2, padded=True)
    options = {"method": "naee", "parameters": {"search": search}, "keep": 0.75}
    one = coterie.compress(str(folder), str(tmp_path / "one"), tokens=str(ids), **options)
    method = get_method("naee", {"search": search})
    coterie.profile(str(folder), tokens=str(ids), observers=method.observes(), out=str(tmp_path / "profile"))
    plan = coterie.plan(str(folder), str(tmp_path / "profile"), **options)
    coterie.compress(str(folder), str(tmp_path / "two"), plan=plan)
    assert [p.keep for p in one.plan.layers] == [p.keep for p in plan.layers]
    assert [p.extra for p in one.plan.layers] == [p.extra for p in plan.layers]
    first, second = each_tensor(tmp_path / "one"), each_tensor(tmp_path / "two")
    assert all(torch.equal(first[k], second[k]) for k in first)
    kept = len(one.plan.layers[0].keep)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "two").config
    assert kept >= moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "two"))[0].top_k
    assert kept in (getattr(config, "num_experts", 0), getattr(config, "num_local_experts", 0))


def test_the_plan_says_which_search_decided_and_what_it_measured(searched):
    moe = moe_layers(tiny("mixtral"))[0]
    layer = searched("mixtral").layers[0]
    for search in ("exact", "greedy"):
        method = get_method("naee", {"search": search})
        plan = layer_plan_of(method, layer, method.pick(layer, moe, 4, Budget(keep_experts=4)))
        keep = plan.keep
        assert plan.extra["search"] == search
        assert plan.extra["loss"] == pytest.approx(all_sets(layer, 1)[tuple(keep)], rel=1e-6)
        assert max(plan.scores[e] for e in range(8) if e not in keep) <= min(plan.scores[e] for e in keep)


def test_the_first_layer_is_the_same_with_and_without_propagation(tmp_path, checkpoint):
    folder, ids = checkpoint("qwen3-moe"), token_file(tmp_path / "ids.safetensors")
    plans = {}
    for propagate in (False, True):
        out = tmp_path / str(propagate)
        options = {"method": "naee", "keep": 0.25, "propagate": propagate}
        plans[propagate] = coterie.compress(str(folder), str(out), tokens=str(ids), **options).plan.layers
    assert plans[False][0] == plans[True][0]
    assert plans[False][1].extra != plans[True][1].extra


def test_a_profile_without_the_losses_is_refused(checkpoint, searched):
    moe = moe_layers(tiny("mixtral"))[0]
    budget = Budget(keep=0.5)
    plain = profiled(checkpoint("mixtral"), batches()[1:], [SelectionCount])
    for search in ("exact", "greedy", "auto"):
        method = get_method("naee", {"search": search})
        with pytest.raises(UsageError, match="lacks"):
            plain.require(method.observes())
        with pytest.raises(UsageError, match="the profile of layer 0 has no"):
            method.pick(plain.layers[0], moe, 4, budget)
    with pytest.raises(UsageError, match="the profile of layer 0 has no"):
        get_method("naee", {"tokens": 7}).pick(searched("mixtral").layers[0], moe, 4, budget)
    broken = copy.deepcopy(searched("mixtral").layers[0])
    for stat in broken.stats.values():
        if stat.is_floating_point():
            stat.fill_(math.nan)
    for search in ("exact", "greedy"):
        with pytest.raises(UsageError, match="no finite numbers"):
            get_method("naee", {"search": search}).pick(broken, moe, 4, budget)


def test_greedy_scores_grow_with_the_order_of_removal():
    order_E, loss_E = torch.tensor([2, 0, 1, 3]), torch.tensor([5, 3, 6, math.inf], dtype=torch.float64)
    stats = {"removal_order_t4096_E": order_E, "removal_loss_t4096_E": loss_E}
    score_E = get_method("naee").score(LayerProfile(0, "mlp", 4, 1, 9, stats=stats))
    assert score_E.tolist() == [5, 6, 5, 7.5]


@pytest.mark.parametrize("search", ["exact", "greedy"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_the_ranking_that_other_methods_may_ask_for_is_finite_and_not_negative(family, search, searched):
    for layer in searched(family).layers.values():
        score_E = get_method("naee", {"search": search}).score(layer)
        assert score_E.shape == (layer.experts,)
        assert torch.isfinite(score_E).all()
        assert (score_E >= 0).all()
        assert len(score_E.unique()) > layer.experts // 2


def test_an_exact_search_finds_a_pair_that_no_ranking_finds(tmp_path):
    """Experts 0 and 1 are copies with copied router rows: either may go at little cost, both together may not."""
    model = tiny("mixtral", num_hidden_layers=1)
    with torch.no_grad():
        layer = moe_layers(model)[0]
        for tensor in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
            tensor[1] = tensor[0]
        layer.experts.down_proj[:2] *= 30
    model.save_pretrained(tmp_path / "model")
    losses = all_sets(profiled(tmp_path / "model", batches(), [ALL]).layers[0], 1)
    one, two = ({keep: v for keep, v in losses.items() if len(keep) == n} for n in (7, 6))
    without_0, without_1 = one[tuple(range(1, 8))], one[(0, *range(2, 8))]
    assert without_0 == pytest.approx(without_1, rel=1e-3)
    assert two[tuple(range(2, 8))] == max(two.values())


def test_the_command_line_prunes_with_naee_and_the_record_says_so(tmp_path, checkpoint):
    from inprocess import cli

    ids = token_file(tmp_path / "ids.safetensors")
    arguments = ["compress", checkpoint("mixtral"), tmp_path / "out", "--method", "naee", "--set", "search=exact"]
    done = cli(*arguments, "--keep", "0.5", "--tokens", ids, "--no-report")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out/coterie.json").read_text())
    assert (record["recipe"]["method"], record["recipe"]["parameters"]["search"]) == ("naee", "exact")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert all(len(layer["keep"]) == 4 and layer["extra"]["loss"] > 0 for layer in plan["layers"])


# -- identities of the scores that NAEE is compared with --------------------------------------------------------------


@pytest.mark.parametrize("family", [*SEARCHED, "olmoe", "glm4-moe"])
def test_mean_scores_are_sums_over_frequency(family, tmp_path, checkpoint):
    observers = [SelectionCount, GateMass, OutputNorm, WeightedOutputNorm]
    profile = profiled(checkpoint(family), batches(), observers)
    for layer in profile.layers.values():
        score = {n: get_method(n).score(layer).double() for n in ("reap", "frequency")}
        score["ean"] = get_method("ean", {"reduce": "mean"}).score(layer).double()
        total = get_method("ean", {"reduce": "sum"}).score(layer).double()
        raw = get_method("reap", {"renormalise": False}).score(layer).double()
        used = layer.count_E > 0
        torch.testing.assert_close(score["reap"] * score["frequency"], layer.shared_norm_E, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(raw * score["frequency"], layer.weighted_norm_E, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(score["ean"] * score["frequency"], total, rtol=1e-5, atol=1e-8)
        assert (score["reap"][used] <= score["ean"][used] * (1 + 1e-6)).all()  # gates are at most 1
        assert int(score["frequency"].sum()) == layer.top_k * layer.tokens


def test_random_text_in_another_order_gives_the_same_choice(tmp_path, checkpoint):
    """Batches keep their tokens, and come in another order."""
    rows = tokens(6, 16, seed=9)
    for name, order in (("a", [0, 1, 2, 3, 4, 5]), ("b", [2, 3, 0, 1, 4, 5]), ("c", [1, 0, 3, 2, 5, 4])):
        save_file({"input_ids": rows[order].clone()}, tmp_path / f"{name}.safetensors")
    keeps = []
    for name in "abc":
        out, ids = tmp_path / f"out-{name}", tmp_path / f"{name}.safetensors"
        options = {"tokens": str(ids), "batch_size": 2, "method": "naee", "keep": 0.5}
        keeps.append([p.keep for p in coterie.compress(str(checkpoint("gpt-oss")), str(out), **options).plan.layers])
    assert keeps[0] == keeps[1] == keeps[2]
