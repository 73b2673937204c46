"""M-SMoE, HC-SMoE and Sub-MoE: what their specifications promise, on several architectures."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.alignment import reordered
from coterie.compression.merging.base import clusters_of
from coterie.compression.methods import get_method
from coterie.compression.plan import Plan
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile
from families import FAMILIES, FEW, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
MERGERS = ("m-smoe", "hc-smoe", "sub-moe")
SOME = (*FEW, "olmoe", "phimoe")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return str(token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True))


def merge(folder, out, ids, method, **options):
    options.setdefault("keep", 0.5)
    return coterie.compress(str(folder), str(out), tokens=ids, method=method, **options)


def logits(path):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens()).logits


def with_copies(family, folder, *, permuted, dtype=torch.float32):
    """A checkpoint in which expert 2i + 1 of every layer is expert 2i, its neurons in another order if `permuted`."""
    from shutil import copy

    from coterie.assets import pocket

    model, generator = tiny(family), torch.Generator().manual_seed(5)
    for layer in moe_layers(model):
        for first in range(0, layer.num_experts, 2):
            expert = layer.bank.read(first)
            if permuted:
                expert = reordered(expert, torch.randperm(expert.up_IH.shape[0], generator=generator))
            layer.bank.write(first + 1, expert)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(pocket() / name, folder)
    return folder


# -- what must not change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("family", SOME)
def test_keeping_every_expert_changes_no_byte(method, family, tmp_path, ids):
    folder = saved(family, tmp_path)
    merge(folder, tmp_path / "out", ids, method, keep=1.0)
    before, after = each_tensor(folder), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("method", ["hc-smoe", "sub-moe"])
@pytest.mark.parametrize("family", SOME)
def test_duplicated_experts_are_found_and_merged_without_loss(method, family, tmp_path, ids):
    folder = with_copies(family, tmp_path / "in", permuted=False)
    result = merge(folder, tmp_path / "out", ids, method)
    for plan in result.plan.layers:
        assert list(clusters_of(plan).values()) == [[e, e + 1] for e in range(0, plan.experts, 2)]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["hc-smoe", "sub-moe"])
@pytest.mark.parametrize("family", SOME)
def test_permuted_copies_are_merged_without_loss_once_they_are_aligned(method, family, tmp_path, ids):
    folder = with_copies(family, tmp_path / "in", permuted=True)
    merge(folder, tmp_path / "out", ids, method, parameters={"align": "weights"})
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-4, rtol=1e-3)


def test_permuted_copies_are_merged_with_loss_where_they_are_not_aligned(tmp_path, ids):
    folder = with_copies("mixtral", tmp_path / "in", permuted=True)
    merge(folder, tmp_path / "out", ids, "hc-smoe")
    assert float((logits(tmp_path / "out") - logits(folder)).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FEW)
def test_activations_align_permuted_copies_too(family, tmp_path, ids):
    folder = with_copies(family, tmp_path / "in", permuted=True)
    merge(folder, tmp_path / "out", ids, "hc-smoe", parameters={"align": "activations"})
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", SOME)
def test_experts_that_stay_alone_keep_their_bytes(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    result = merge(folder, tmp_path / "out", ids, "hc-smoe", keep=0.75, parameters={"router": "duplicated"})
    before, after = resident(folder, torch.bfloat16), resident(tmp_path / "out", torch.bfloat16)
    alone = 0
    for plan, old, new in zip(result.plan.layers, moe_layers(before), moe_layers(after), strict=True):
        for leader, members in clusters_of(plan).items():
            if len(members) == 1:
                alone += 1
                one, two = old.bank.read(leader), new.bank.read(leader)
                assert torch.equal(one.up_IH, two.up_IH)
                assert torch.equal(one.down_HI, two.down_HI)
    assert alone


# -- the three ways of writing it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("family", SOME)
def test_a_map_and_duplicates_are_the_same_function(method, family, tmp_path, ids):
    folder = saved(family, tmp_path, torch.float32)
    for router in ("map", "duplicated"):
        merge(folder, tmp_path / router, ids, method, parameters={"router": router})
    torch.testing.assert_close(logits(tmp_path / "map"), logits(tmp_path / "duplicated"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", ["leader", "mean"])
@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("family", FEW)
def test_a_reduced_router_makes_a_plain_checkpoint(method, rows, family, tmp_path, ids):
    even = {"m-smoe": {"ratio": "uniform"}, "sub-moe": {"window": 1}, "hc-smoe": {}}[method]
    folder = saved(family, tmp_path)
    merge(folder, tmp_path / "out", ids, method, parameters={"router": "reduced", "rows": rows, **even})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.isfinite(logits(tmp_path / "out")).all()
    before, after = resident(folder), resident(tmp_path / "out")
    plans = Plan.load(tmp_path / "out" / "plan.json").layers
    for plan, old, new in zip(plans, moe_layers(before), moe_layers(after), strict=True):
        one, two = next(old.router.parameters()), next(new.router.parameters())
        for row, (leader, members) in enumerate(clusters_of(plan).items()):
            wanted = one[members].mean(0) if rows == "mean" else one[leader]
            torch.testing.assert_close(two[row], wanted, atol=2e-3, rtol=1e-2)


def test_a_layer_may_keep_fewer_experts_than_the_router_picks_where_it_stays_whole(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    merge(folder, tmp_path / "out", ids, "hc-smoe", keep=None, keep_experts=1)
    assert torch.isfinite(logits(tmp_path / "out")).all()
    with pytest.raises(UsageError, match="router picks 2"):
        merge(folder, tmp_path / "no", ids, "hc-smoe", keep=None, keep_experts=1, parameters={"router": "reduced"})


# -- M-SMoE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_the_budget_is_met_exactly_over_all_layers_and_none_is_empty(family, tmp_path, ids):
    result = merge(saved(family, tmp_path), tmp_path / "out", ids, "m-smoe", keep=0.375)
    counts = [len(plan.keep) for plan in result.plan.layers]
    assert sum(counts) == sum(int(plan.experts * 0.375 + 0.5) for plan in result.plan.layers)
    assert min(counts) >= 1


def test_the_most_used_experts_lead_whatever_the_router_logits(tmp_path, ids):
    folder = saved("qwen3-moe", tmp_path)
    plans = [
        merge(folder, tmp_path / s, ids, "m-smoe", parameters={"similarity": s, "ratio": "uniform"}).plan
        for s in ("router-logits", "router-rows", "weights")
    ]
    for layers in zip(*(plan.layers for plan in plans), strict=True):
        frequency = torch.tensor(layers[0].extra["frequency"])
        most = frequency.argsort(descending=True, stable=True)[: len(layers[0].keep)].sort().values.tolist()
        assert [layer.keep for layer in layers] == [most] * 3


def test_members_join_the_dominant_expert_with_the_most_similar_logits():
    gram = torch.eye(4, dtype=torch.float64)
    gram[2, 0] = gram[0, 2] = 0.9
    gram[3, 1] = gram[1, 3] = 0.8
    stats = {"count_E": torch.tensor([9, 8, 1, 1]), "router_gram_EE": gram, "router_sum_E": torch.zeros(4).double()}
    layer = LayerProfile(0, "layer", 4, 2, 10, 1, stats)
    assert get_method("m-smoe", {}).clusters(layer, range(4), 2, ()) == [[0, 2], [1, 3]]


def test_a_group_nobody_used_becomes_the_plain_mean():
    bank = moe_layers(tiny("mixtral"))[0].bank
    before = [bank.read(e, torch.float32) for e in (2, 3)]
    mean = (before[0].up_IH + before[1].up_IH) / 2
    layer = LayerProfile(0, "layer", 8, 2, 10, 1, {"count_E": torch.tensor([4, 4, 0, 0, 4, 4, 4, 4])})
    method = get_method("m-smoe", {"align": "none"})
    picked = method.picked(layer, [[0], [1], [2, 3], [4], [5], [6], [7]])
    from coterie.compression.planning import layer_plan_of

    method.rebuild(bank, layer_plan_of(method, layer, picked))
    torch.testing.assert_close(bank.read(2).up_IH, mean)


@pytest.mark.parametrize("reference", ["first", "leader"])
def test_alignment_to_any_reference_merges_permuted_copies_back(reference):
    bank = moe_layers(tiny("gpt-oss"))[0].bank
    original = bank.read(0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for expert in range(1, bank.num_experts):
        bank.write(expert, reordered(original, torch.randperm(original.up_IH.shape[0], generator=generator)))
    layer = LayerProfile(0, "layer", 8, 2, 10, 1, {"count_E": torch.tensor([1, 1, 1, 9, 1, 1, 1, 1])})
    method = get_method("m-smoe", {"reference": reference})
    from coterie.compression.planning import layer_plan_of

    method.rebuild(bank, layer_plan_of(method, layer, method.picked(layer, [list(range(8))])))
    merged = bank.read(3, torch.float32)
    assert sorted(merged.up_IH[:, 0].tolist()) == pytest.approx(sorted(original.up_IH[:, 0].tolist()), abs=1e-6)
    x = torch.randn(5, original.up_IH.shape[1])
    one, two = (e.down_HI @ torch.relu(e.up_IH @ x.T) for e in (original, merged))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


# -- Sub-MoE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_full_rank_is_frequency_weighted_averaging(family, tmp_path, ids):
    folder = saved(family, tmp_path, torch.float32)
    bank = moe_layers(tiny(family))[0].bank
    rank = min(bank.hidden_size, bank.intermediate_size)
    merge(folder, tmp_path / "plain", ids, "sub-moe")
    merge(folder, tmp_path / "full", ids, "sub-moe", parameters={"rank": rank})
    plain, full = resident(tmp_path / "plain"), resident(tmp_path / "full")
    for one, two in zip(moe_layers(plain), moe_layers(full), strict=True):
        for expert in range(one.num_experts):
            a, b = one.bank.read(expert), two.bank.read(expert)
            torch.testing.assert_close(a.up_IH, b.up_IH, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.down_HI, b.down_HI, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_truncated_experts_have_the_rank_asked_for_and_nothing_more(family, whiten, tmp_path, ids):
    folder = saved(family, tmp_path)
    result = merge(folder, tmp_path / "out", ids, "sub-moe", parameters={"rank": 6, "whiten": whiten})
    after = each_tensor(tmp_path / "out")
    assert result.after.bytes == sum(t.nbytes for t in after.values())
    model = resident(tmp_path / "out")
    for layer in moe_layers(model):
        assert layer.bank.factored
        assert layer.experts.factor_up_a.shape[2] == 6
        assert int(torch.linalg.matrix_rank(layer.bank.read(0).up_IH, rtol=1e-4)) == 6
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_truncation_is_the_projection_of_the_mean_on_the_leading_subspace_of_the_members(tmp_path, ids):
    folder = saved("mixtral", tmp_path, torch.float32)
    result = merge(folder, tmp_path / "out", ids, "sub-moe", parameters={"rank": 6, "window": 1})
    before, after = resident(folder), resident(tmp_path / "out")
    for plan, old, new in zip(result.plan.layers, moe_layers(before), moe_layers(after), strict=True):
        for position, members in enumerate(clusters_of(plan).values()):
            share = torch.tensor([float(plan.extra["frequency"][m]) for m in members])
            share = share / share.sum() if float(share.sum()) else torch.full_like(share, 1 / len(members))
            ups = [old.bank.read(m).up_IH for m in members]
            basis = torch.linalg.svd(torch.cat(ups, 1)).U[:, :6]
            mean = sum(s * up for s, up in zip(share, ups, strict=True))
            torch.testing.assert_close(new.bank.read(position).up_IH, basis @ basis.T @ mean, atol=1e-5, rtol=1e-3)


def test_a_window_spends_the_merges_where_experts_are_alike(tmp_path, ids):
    model = tiny("mixtral", num_hidden_layers=2)
    first = moe_layers(model)[0]
    for e in range(0, 8, 2):
        first.bank.write(e + 1, first.bank.read(e))
    saved_as = saved("mixtral", tmp_path, num_hidden_layers=2)
    model.save_pretrained(saved_as)
    result = merge(saved_as, tmp_path / "out", ids, "sub-moe", keep=None, keep_experts=6)
    assert [len(plan.keep) for plan in result.plan.layers] == [4, 8]
    even = merge(saved_as, tmp_path / "even", ids, "sub-moe", keep=None, keep_experts=6, parameters={"window": 1})
    assert [len(plan.keep) for plan in even.plan.layers] == [6, 6]


def test_profile_plan_and_apply_are_one_sweep(tmp_path, ids):
    folder = saved("qwen3-moe", tmp_path)
    for method in MERGERS:
        merge(folder, tmp_path / f"one-{method}", ids, method)
        profile = coterie.profile(str(folder), tokens=ids, methods=[method])
        coterie.compress(str(folder), str(tmp_path / f"two-{method}"), profile=profile, method=method, keep=0.5)
        plan = Plan.load(tmp_path / f"one-{method}" / "plan.json")
        coterie.compress(str(folder), str(tmp_path / f"three-{method}"), plan=plan)
        one = each_tensor(tmp_path / f"one-{method}")
        for other in ("two", "three"):
            again = each_tensor(tmp_path / f"{other}-{method}")
            assert all(torch.equal(one[k], again[k]) for k in one)


# -- HC-SMoE ---------------------------------------------------------------------------------------------------------


def test_clusters_do_not_depend_on_the_router(tmp_path, ids):
    folder = saved("mixtral", tmp_path, torch.float32, num_hidden_layers=1)
    clusters = [merge(folder, tmp_path / "a", ids, "hc-smoe").plan.layers[0].extra["clusters"].values()]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        moe_layers(model)[0].router.weight.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(folder)
    clusters.append(merge(folder, tmp_path / "b", ids, "hc-smoe").plan.layers[0].extra["clusters"].values())
    assert sorted(clusters[0]) == sorted(clusters[1])


# -- protected experts, sizes, bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGERS)
def test_protected_experts_stay_alone(method, tmp_path, ids):
    result = merge(saved("mixtral", tmp_path), tmp_path / "out", ids, method, protect=["0:3,1:0"])
    for index, expert in ((0, 3), (1, 0)):
        plan = next(p for p in result.plan.layers if p.index == index)
        assert clusters_of(plan)[expert] == [expert]


@pytest.mark.parametrize("method", MERGERS)
def test_no_cluster_exceeds_the_largest_size(method, tmp_path, ids):
    result = merge(saved("mixtral", tmp_path), tmp_path / "out", ids, method, parameters={"max_size": 2})
    assert all(len(c) <= 2 for plan in result.plan.layers for c in clusters_of(plan).values())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("hc-smoe", ["--keep", "0.25", "--set", "max_size=2"], "2"),
        ("sub-moe", ["--keep", "0.5", "--set", "rank=49"], "above the full rank"),
        ("sub-moe", ["--keep", "0.5", "--set", "rank=0"], "rank"),
        ("hc-smoe", ["--keep", "0.5", "--scope", "global"], "same number"),
        ("m-smoe", ["--keep", "0.5", "--set", "ratio=uniform", "--scope", "global"], "same number"),
        ("hc-smoe", ["--keep", "0.5", "--set", "linkage=hirarchical"], "linkage"),
        ("hc-smoe", ["--keep-experts", "2", "--protect", "0:0,0:1,0:2"], "protected"),
        ("low-rank", ["--keep", "0.5"], "would be ignored"),
        ("low-rank", ["--set", "rank=49"], "above the full rank"),
        ("low-rank", ["--set", "rank=4", "--set", "save=0.5"], "give one of them"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(method, options, said, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    done = cli("compress", folder, tmp_path / "out", "--tokens", ids, "--method", method, *options)
    assert done.code == 2, done.out + done.err
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_an_edited_plan_whose_clusters_do_not_fit_is_refused(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    plan = merge(folder, tmp_path / "out", ids, "hc-smoe").plan
    leader, members = next((k, m) for k, m in plan.layers[0].extra["clusters"].items() if len(m) > 1)
    for change in ({leader: members[:1]}, {leader: [*members, 99]}, {"8": members}):
        wrong = plan.model_copy(deep=True)
        wrong.layers[0].extra["clusters"] = {**plan.layers[0].extra["clusters"], **change}
        with pytest.raises(UsageError, match="clusters"):
            coterie.compress(str(folder), str(tmp_path / "no"), plan=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_works_on_every_family(family, tmp_path, ids):
    merge(saved(family, tmp_path), tmp_path / "out", ids, "m-smoe", keep=0.5)
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_merged_experts_are_not_reported_as_dropped(tmp_path, ids):
    from coterie.compression.forecast import redundancy

    folder = saved("mixtral", tmp_path)
    shares = []
    for method in ("hc-smoe", "frequency"):
        result = merge(folder, tmp_path / method, ids, method)
        figures = redundancy(result.layers, {plan.index: plan for plan in result.plan.layers})
        shares.append(figures["dropped_load"])
    assert shares[0] == 0
    assert shares[1] > 0
