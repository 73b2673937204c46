"""UNCURL: clusters of router logits, merged after alignment, with a new router; and the pieces it stands on."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coterie
from coterie.anatomy import ExpertWeights, moe_layers
from coterie.compression.alignment import aligned, match_neurons, matching_II, reordered
from coterie.compression.clustering import k_means, spectral_embedding
from coterie.compression.merging.operators import weighted_mean
from coterie.compression.merging.uncurl import Uncurl
from coterie.compression.methods import get_method
from coterie.compression.plan import LayerPlan
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile
from families import FAMILIES, FEW, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True)


def bank_of(family, seed=0):
    return moe_layers(tiny(family, seed=seed))[0].bank


def outputs(expert: ExpertWeights, x_RH: torch.Tensor) -> torch.Tensor:
    """Any gated form will do: what counts is that neurons are independent."""
    up_RI = x_RH @ expert.up_IH.T + (0 if expert.up_bias_I is None else expert.up_bias_I)
    gate_RI = torch.ones_like(up_RI) if expert.gate_IH is None else x_RH @ expert.gate_IH.T
    gate_RI = gate_RI + (0 if expert.gate_bias_I is None else expert.gate_bias_I)
    return (torch.nn.functional.silu(gate_RI) * up_RI) @ expert.down_HI.T


def profile_of(logits_TE, index_TK, groups=1):
    T, E = logits_TE.shape
    logits = logits_TE.double()
    stats = {
        "count_E": torch.bincount(index_TK.reshape(-1), minlength=E),
        "router_gram_EE": logits.T @ logits,
        "router_sum_E": logits.sum(0),
    }
    return LayerProfile(0, "layer", E, index_TK.shape[1], T, groups, stats)


# -- alignment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_reordering_neurons_changes_no_output(family):
    expert = bank_of(family).read(0, torch.float32)
    order = torch.randperm(expert.up_IH.shape[0], generator=torch.Generator().manual_seed(1))
    x_RH = torch.randn(16, expert.up_IH.shape[1])
    torch.testing.assert_close(outputs(reordered(expert, order), x_RH), outputs(expert, x_RH), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_matching_undoes_a_permutation_and_never_fits_worse(family):
    bank = bank_of(family)
    expert, other = bank.read(0, torch.float32), bank.read(1, torch.float32)
    order = torch.randperm(expert.up_IH.shape[0], generator=torch.Generator().manual_seed(2))
    assert torch.equal(aligned(expert, reordered(expert, order)).up_IH, expert.up_IH)
    before = matching_II(expert, other).diagonal().sum()
    assert matching_II(expert, aligned(expert, other)).diagonal().sum() >= before
    assert sorted(match_neurons(expert, other).tolist()) == list(range(expert.up_IH.shape[0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_weighted_mean_has_weights_that_sum_to_one(frequencies, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = [
        ExpertWeights(torch.randn(3, 4, generator=generator), torch.randn(4, 3, generator=generator))
        for _ in frequencies
    ]
    mean = weighted_mean(experts, frequencies)
    total = sum(frequencies)
    shares = [f / total for f in frequencies] if total else [1 / len(frequencies)] * len(frequencies)
    expected = sum(share * expert.up_IH for share, expert in zip(shares, experts, strict=True))
    torch.testing.assert_close(mean.up_IH, expected, atol=1e-5, rtol=1e-5)
    assert mean.gate_IH is None


# -- similarity and clusters --------------------------------------------------------------------------------------


def test_similarity_is_one_for_proportional_and_zero_for_opposite_logits():
    base_T = torch.randn(100)
    logits_TE = torch.stack([base_T, 3 * base_T, -base_T, torch.randn(100)], dim=1)
    s_EE = Uncurl().similarity(profile_of(logits_TE, logits_TE.topk(2).indices))
    assert s_EE[0, 1] == pytest.approx(1.0)
    assert s_EE[0, 2] == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(s_EE, s_EE.T)
    assert bool((s_EE.diagonal() == 1).all())
    assert 0 <= s_EE.min() <= s_EE.max() <= 1


def test_an_expert_whose_logit_is_always_zero_makes_no_nan():
    logits_TE = torch.randn(50, 6)
    logits_TE[:, 3] = 0
    layer = profile_of(logits_TE, logits_TE.topk(2).indices)
    assert torch.isfinite(Uncurl().similarity(layer)).all()
    assert len(Uncurl().clusters(layer, 3)) == 3


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**31))
def test_planted_groups_are_recovered(groups, members, seed):
    generator = torch.Generator().manual_seed(seed)
    base_TC = torch.randn(400, groups, generator=generator)
    owner = torch.randperm(groups * members, generator=generator) % groups
    logits_TE = base_TC[:, owner] * (0.5 + torch.rand(groups * members, generator=generator))
    logits_TE = logits_TE + 0.01 * torch.randn(logits_TE.shape, generator=generator)
    found = Uncurl().clusters(profile_of(logits_TE, logits_TE.topk(1).indices), groups)
    expected = {tuple(torch.nonzero(owner == g).flatten().tolist()) for g in range(groups)}
    assert {tuple(m) for m in found.values()} == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.data())
def test_every_cluster_is_used_even_where_points_coincide(count, data):
    clusters = data.draw(st.integers(1, count))
    distinct = data.draw(st.integers(1, count))
    points = torch.eye(count)[torch.arange(count) % distinct]
    labels = k_means(points, clusters, 0)
    assert sorted(set(labels)) == list(range(clusters))


def test_the_embedding_is_that_of_the_smallest_eigenvalues():
    s_EE = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2))
    f_EC = spectral_embedding(s_EE, 2)
    scale = s_EE.sum(1).double().rsqrt()
    laplacian = torch.eye(5, dtype=torch.float64) - scale[:, None] * s_EE.double() * scale
    torch.testing.assert_close(laplacian @ f_EC, torch.zeros_like(f_EC), atol=1e-9, rtol=0)  # two parts: eigenvalue 0


def test_the_most_used_member_leads_and_protected_experts_stay_alone():
    torch.manual_seed(0)
    logits_TE = torch.randn(200, 8)
    layer = profile_of(logits_TE, logits_TE.topk(2).indices)
    for protected in (set(), {1, 5}):
        found = Uncurl().clusters(layer, 4, protected)
        assert sorted(e for members in found.values() for e in members) == list(range(8))
        for first, members in found.items():
            assert first in members
            assert layer.count_E[first] == max(layer.count_E[m] for m in members)
        assert all(found.get(e) == [e] for e in protected)


def test_clusters_stay_inside_routing_groups():
    torch.manual_seed(0)
    logits_TE = torch.randn(200, 16)
    found = Uncurl().clusters(profile_of(logits_TE, logits_TE.topk(4).indices, groups=4), 8)
    assert all(len({m // 4 for m in members}) == 1 for members in found.values())
    assert [sum(first // 4 == g for first in found) for g in range(4)] == [2, 2, 2, 2]


# -- the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_expert_and_the_old_router_changes_nothing(family, ids, tmp_path):
    source = saved(family, tmp_path)
    coterie.compress(
        str(source), str(tmp_path / "out"), method="uncurl", parameters={"router": "keep"}, keep=1.0, tokens=str(ids)
    )
    before, after = each_tensor(source), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("router", ["random", "mean", "keep"])
def test_every_layer_ends_with_the_same_number_and_the_router_it_was_asked_for(family, router, ids, tmp_path):
    source = saved(family, tmp_path)
    options = {"method": "uncurl", "keep": 0.5, "tokens": str(ids)}
    result = coterie.compress(str(source), str(tmp_path / "out"), parameters={"router": router}, **options)
    model = resident(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
    old = {layer.index: layer for layer in moe_layers(resident(source))}
    for plan, layer in zip(result.plan.layers, moe_layers(model), strict=True):
        assert layer.num_experts == len(plan.keep) == plan.experts // 2
        members = plan.extra["members"]
        assert sorted(e for own in members for e in own) == list(range(plan.experts))
        (mine,), (before,) = ([p for p in m.router.parameters() if p.dim() == 2] for m in (layer, old[plan.index]))
        if router == "keep":
            assert torch.equal(mine, before[plan.keep])
        elif router == "mean":
            expected = torch.stack([before[own].mean(0) for own in members])
            torch.testing.assert_close(mine, expected, atol=2e-3, rtol=1e-2)
        else:
            assert 0.01 < mine.std() < 0.03
            assert (
                abs(float(torch.corrcoef(torch.stack([mine.flatten(), before[plan.keep].flatten()]).detach())[0, 1]))
                < 0.3
            )
            for name, bias in [*layer.router.named_parameters(), *layer.router.named_buffers()]:
                if bias.numel() == layer.num_experts:
                    assert not bias.any(), name
    assert any("have to be trained" in w for w in result.warnings) == (router == "random")
    again = coterie.compress(str(source), str(tmp_path / "again"), parameters={"router": router}, **options)
    assert again.plan.layers == result.plan.layers
    assert all(torch.equal(t, each_tensor(tmp_path / "again")[n]) for n, t in each_tensor(tmp_path / "out").items())


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("align", [True, False])
def test_permuted_copies_of_one_expert_merge_to_that_expert_only_when_aligned(family, align):
    bank = bank_of(family)
    first = bank.read(2, torch.float32)
    for number, member in enumerate((4, 5)):
        order = torch.randperm(first.up_IH.shape[0], generator=torch.Generator().manual_seed(number))
        bank.write(member, reordered(first, order))
    frequency = [3, 1, 9, 1, 4, 0, *[1] * (bank.num_experts - 6)]
    plan = LayerPlan(index=0, name="layer", experts=bank.num_experts, keep=[2])
    plan.extra = {"members": [[2, 4, 5]], "frequency": frequency}
    before = bank.read(2, torch.float32).up_IH.clone()
    assert Uncurl(align=align).rebuild(bank, plan) == {"clusters": 1, "merged": 3}
    assert torch.allclose(bank.read(2).up_IH, before, atol=1e-6) == align


def test_an_expert_that_is_never_used_adds_nothing(ids):
    bank = bank_of("mixtral")
    before = bank.read(0, torch.float32).up_IH.clone()
    plan = LayerPlan(index=0, name="layer", experts=8, keep=[0])
    plan.extra = {"members": [[0, 3]], "frequency": [5, 0, 0, 0, 0, 0, 0, 0]}
    Uncurl().rebuild(bank, plan)
    assert torch.equal(bank.read(0).up_IH, before)


def test_a_plan_whose_clusters_do_not_fit_is_refused(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    coterie.profile(str(source), tokens=str(ids), methods=["uncurl"], out=str(tmp_path / "profile"))
    plan = tmp_path / "plan.json"
    done = cli("plan", source, "--profile", tmp_path / "profile", "--method", "uncurl", "--keep", 0.5, "--out", plan)
    assert done.code == 0, done.err
    content = json.loads(plan.read_text())
    content["layers"][0]["keep"] = sorted(set(range(8)) - set(content["layers"][0]["keep"]))
    plan.write_text(json.dumps(content))
    done = cli("compress", source, tmp_path / "out", "--plan", plan)
    assert done.code == 2
    assert "layer 0: the clusters in the plan do not belong to the experts it keeps" in done.err


def test_a_budget_over_all_layers_is_refused(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    with pytest.raises(UsageError, match="uncurl gives every layer the same number"):
        coterie.compress(str(source), str(tmp_path / "out"), method="uncurl", keep=0.5, scope="global", tokens=str(ids))


def test_the_gram_matrix_does_not_depend_on_batches_or_padding(ids, tmp_path):
    source = saved("deepseek-v3", tmp_path)
    one = coterie.profile(str(source), tokens=str(ids), methods=["uncurl"], batch_size=4)
    two = coterie.profile(str(source), tokens=str(ids), methods=["uncurl"], batch_size=1)
    method = get_method("uncurl")
    for index, layer in one.layers.items():
        torch.testing.assert_close(method.similarity(layer), method.similarity(two.layers[index]), atol=1e-5, rtol=0)
