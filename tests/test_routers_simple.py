"""Routers that look at nothing but their tokens: what each promises, exactly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

from calls import Rows
from coterie.anatomy import moe_layers
from coterie.anatomy.layers import refuse_unsliceable
from coterie.anatomy.routers import placed_routers, put_routers, remember
from coterie.anatomy.slicing import select, slice_names
from coterie.errors import ModelError, UsageError
from coterie.experts import forward
from coterie.routing.base import Router, Routing, checked, combined, entropy, router_class
from coterie.routing.record import Record, recording
from coterie.routing.sets import at, slots
from coterie.routing.top_p import smallest
from families import tiny

IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
SOME = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
# one of each kind of these routers; all but the hash router have rows of weights
LEARNING: dict[str, dict[str, Any]] = {
    "adamoe": {"top_k": 3, "nulls": 6},
    "top-p": {},
    "activation": {"sparsify": "threshold", "threshold": 0.1, "tau": 0.3},
    "dts": {"use": "soft", "tau": 0.3},
    "expert-choice": {},
    "random": {"top_k": 3},
}


def alone(kind: str, told: dict[str, Any] | None = None, experts: int = 8, hidden: int = 16, seed: int = 0) -> Router:
    """A router outside of any model, with weights wide enough to have opinions."""
    cls = router_class(kind)
    torch.manual_seed(seed)
    router = cls(hidden, experts, checked(kind, cls.Settings, told or {}))
    router.reset(0.4)
    return router.eval()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decide(router: Router, x_TH: Tensor, **known: Any) -> Routing:
    record = Record(**{"shape": (1, len(x_TH)), **known})
    with recording(record):
        router(x_TH)
    return record.routings[router.layer]


def dense(value_TK: Tensor, routing: Routing) -> Tensor:
    """[T, N] from what stands in the slots."""
    return value_TK.new_zeros(len(value_TK), routing.outputs + 1).scatter_add(1, routing.index_TK, value_TK)[:, :-1]


def counts(routing: Routing) -> Tensor:
    return (routing.expert_TK < routing.experts).sum(-1)


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("family", SOME)
def test_only_experts_that_were_picked_compute(family: str, kind: str) -> None:
    model = tiny(family)
    put_routers(model, kind, LEARNING[kind])
    model.set_experts_implementation(forward.NAME)
    layer = moe_layers(model)[0]
    seen: list[Routing] = []
    layer.router.watch = seen.append
    rows = Rows()
    with torch.no_grad(), forward.observe(layer.experts, rows):
        model(IDS)
    assert rows.rows == int(counts(seen[0]).sum())
    assert 0 < rows.rows < IDS.numel() * layer.num_experts


@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("family", SOME)
def test_every_experts_forward_agrees_on_no_expert(family: str, kind: str) -> None:
    model = tiny(family)
    put_routers(model, kind, LEARNING[kind])
    found = []
    for name in ("eager", "grouped_mm", "batched_mm", forward.NAME):
        model.set_experts_implementation(name)
        found.append(model(IDS).logits)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LEARNING)
def test_the_block_is_the_weighted_sum_of_the_picked_experts(kind: str) -> None:
    model = tiny("mixtral")
    put_routers(model, kind, LEARNING[kind])
    layer, x_TH = moe_layers(model)[0], numbers(10, 64)
    routing = decide(layer.router, x_TH)
    expected = torch.zeros(10, 64)
    for t in range(10):
        for slot, expert in enumerate(routing.index_TK[t].tolist()):
            if expert < 8:
                y = forward.expert_output(layer.experts, expert, x_TH[t : t + 1])[0]
                expected[t] += routing.weight_TK[t, slot] * y
    with recording(Record(shape=(1, 10))):
        found = layer.block(x_TH[None])
    torch.testing.assert_close((found[0] if isinstance(found, tuple) else found)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LEARNING)
def test_the_order_of_experts_does_not_matter(kind: str) -> None:
    model = tiny("qwen3-moe")
    put_routers(model, kind, LEARNING[kind])
    before = model(IDS).logits
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for layer in moe_layers(model):
            for name, dim in slice_names(layer).items():
                tensors[name].copy_(tensors[name].index_select(dim, order))
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*LEARNING, "hash"])
def test_the_order_of_tokens_does_not_matter(kind: str) -> None:
    router, x_TH = alone(kind, LEARNING.get(kind)), numbers(24, 16)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    first = decide(router, x_TH, ids_BL=IDS)
    second = decide(router, x_TH[order], ids_BL=IDS.reshape(-1)[order])
    assert torch.equal(second.index_TK, first.index_TK[order])
    torch.testing.assert_close(second.weight_TK, first.weight_TK[order])


@pytest.mark.parametrize("kind", [*LEARNING, "hash"])
def test_a_bfloat16_model_routes_in_float32(kind: str) -> None:
    router, x_TH = alone(kind, LEARNING.get(kind)).bfloat16(), numbers(64, 16).bfloat16()
    wide = alone(kind, LEARNING.get(kind))
    wide.load_state_dict(router.state_dict())
    narrow = decide(router, x_TH, ids_BL=torch.arange(64)[None])
    exact = decide(wide, x_TH.float(), ids_BL=torch.arange(64)[None])
    assert narrow.logits_TN.dtype == narrow.probability_TN.dtype == narrow.weight_TK.dtype == torch.float32
    assert torch.equal(narrow.index_TK, exact.index_TK)
    assert torch.equal(narrow.weight_TK, exact.weight_TK)


@pytest.mark.parametrize("kind", ["adamoe", "random", "activation"])
def test_experts_can_be_removed_with_their_rows(kind: str) -> None:
    model = tiny("mixtral")
    put_routers(model, kind, {**LEARNING[kind], **({"nulls": 8} if kind == "adamoe" else {})})
    layer = moe_layers(model)[0]
    router: Any = layer.router
    whole = router.weight.detach().clone()
    select(layer, [0, 2, 3, 5, 6])
    assert torch.equal(router.weight, whole[[0, 2, 3, 5, 6]])
    if kind == "adamoe":
        assert len(router.null_weight) == 8
    assert int(decide(router, numbers(40, 64)).expert_TK.max()) <= 5
    assert model(IDS).logits.isfinite().all()


def test_slots_are_as_many_as_the_largest_set() -> None:
    chosen = torch.tensor([[True, False, True, False], [False, False, False, False], [False, True, False, False]])
    value = torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.3, 0.4, 0.5, 0.6], [0.2, 0.1, 0.0, 0.4]])
    index = slots(chosen, value)
    assert index.tolist() == [[2, 0], [4, 4], [1, 4]]
    assert torch.equal(at(value, index), torch.tensor([[0.8, 0.1], [0, 0], [0.1, 0]]))
    assert slots(torch.zeros(2, 4, dtype=torch.bool), value[:2]).tolist() == [[4], [4]]


# -- AdaMoE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_adamoe_without_nulls_is_the_model_bit_for_bit(family: str) -> None:
    model = tiny(family)
    before = model(IDS).logits
    put_routers(model, "adamoe", {"nulls": 0})
    assert torch.equal(model(IDS).logits, before)


def test_adamoe_weighs_true_experts_alone_with_one_in_sum() -> None:
    router, x_TH = alone("adamoe", {"top_k": 4, "nulls": 12}), numbers(500, 16)
    routing = decide(router, x_TH)
    load, total = counts(routing), routing.weight_TK.sum(-1)
    assert set(load.tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(total[load > 0], torch.ones_like(total[load > 0]))
    assert not total[load == 0].any()
    assert ((routing.weight_TK > 0).sum(-1) == load).all()


def test_adamoe_equals_softmax_over_the_selected_where_no_null_is_picked() -> None:
    router, x_TH = alone("adamoe", {"top_k": 3, "nulls": 4}), numbers(200, 16)
    routing = decide(router, x_TH)
    full = counts(routing) == 3
    kept, index = routing.logits_TN[:, :8].topk(3)
    assert full.any()
    assert torch.equal(routing.index_TK[full], index[full])
    torch.testing.assert_close(routing.weight_TK[full], kept.softmax(-1)[full])


@pytest.mark.parametrize("family", SOME)
def test_a_token_that_picks_nulls_alone_adds_nothing(family: str) -> None:
    model = tiny(family)
    put_routers(model, "adamoe", {"top_k": 3, "nulls": 6})
    layer = moe_layers(model)[0]
    router: Any = layer.router
    with torch.no_grad():
        router.null_weight.fill_(1.0)
        router.weight.fill_(-1.0)
    x_TH = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    _, weights, index = router(x_TH)
    assert (index == layer.num_experts).all()
    assert torch.equal(layer.experts(x_TH, index, weights), torch.zeros(5, 64))


def test_null_rows_start_as_noisy_copies_of_the_routers_rows() -> None:
    model = tiny("mixtral")
    before = moe_layers(model)[0].router.weight.detach().clone()
    put_routers(model, "adamoe", {"top_k": 3, "nulls": 20})
    router: Any = placed_routers(model)[0]
    gap = router.null_weight.detach() - before[torch.arange(20) % 8]
    assert torch.equal(router.weight, before)
    assert 0.005 < gap.std() / before.std() < 0.02
    assert gap.any(-1).all()


@pytest.mark.parametrize("family", SOME)
def test_null_rows_learn_from_the_null_term_alone(family: str) -> None:
    from coterie.balancing.base import Balance

    model = tiny(family).train()
    put_routers(model, "adamoe", {"top_k": 3, "nulls": 6, "combine": "renormalised"})
    model(IDS, labels=IDS).loss.backward()
    routers: list[Any] = list(placed_routers(model).values())
    assert not any(router.null_weight.grad.any() for router in routers)
    assert all(router.weight.grad.any() for router in routers)
    model.zero_grad()
    Balance.of([{"name": "null"}]).watch(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(router.null_weight.grad.any(-1).all() for router in routers)
    assert all(router.weight.grad.any(-1).all() for router in routers)


def test_adamoes_gradient_is_that_of_softmax_over_the_selected() -> None:
    router: Any = alone("adamoe", {"top_k": 3, "nulls": 4})
    x_TH, target = numbers(50, 16), numbers(50, 3, seed=5)
    routing = decide(router, x_TH)
    (routing.weight_TK * target).sum().backward()
    found, router.weight.grad = router.weight.grad, None
    true = routing.index_TK < 8
    logits = (x_TH @ torch.cat([router.weight, router.null_weight]).T).gather(1, routing.index_TK)
    expected = logits.masked_fill(~true, -torch.inf)[true.any(-1)].softmax(-1)
    (expected * target[true.any(-1)]).sum().backward()
    torch.testing.assert_close(found, router.weight.grad, atol=1e-5, rtol=1e-4)


def test_more_nulls_mean_fewer_experts_and_a_larger_k_more() -> None:
    def load(top_k: int, nulls: int) -> float:
        model = tiny("mixtral")
        put_routers(model, "adamoe", {"top_k": top_k, "nulls": nulls})
        return float(counts(decide(placed_routers(model)[0], numbers(400, 64))).float().mean())

    loads = [load(3, nulls) for nulls in (0, 8, 16, 32)]
    assert loads[0] == 3
    assert loads == sorted(loads, reverse=True)
    assert load(3, 8) == pytest.approx(1.5, abs=0.15)  # rows equal their copies: k E / (E + M)
    assert load(3, 8) < load(5, 8) < load(8, 8)


# -- top-p -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.floats(0.01, 1.0), st.floats(0.01, 20.0), st.integers(0, 1000))
def test_top_p_picks_the_smallest_set_that_reaches_p(experts: int, p: float, spread: float, seed: int) -> None:
    probability = (numbers(16, experts, seed=seed) * spread).softmax(-1)
    index = smallest(probability, p, experts)
    picked = at(probability, index)
    real = index < experts
    assert (real.sum(-1) >= 1).all()
    assert (picked.sum(-1) >= p - 1e-6).all()
    several = real.sum(-1) > 1
    if p < 1:
        least = picked.masked_fill(~real, 2.0).amin(-1)
        assert (picked.sum(-1) - least < p + 1e-6)[several].all()
    assert torch.equal(picked, probability.sort(-1, descending=True).values[:, : index.shape[1]] * real)
    assert index.shape[1] == real.sum(-1).max()


def test_top_p_sets_grow_with_p() -> None:
    x_TH = numbers(100, 16)
    sizes = [counts(decide(alone("top-p", {"p": p}), x_TH)) for p in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    assert (sizes[0] == 1).all()
    assert (sizes[-1] == 8).all()
    assert all((b >= a).all() for a, b in itertools.pairwise(sizes))
    assert len(set(sizes[3].tolist())) > 2


def test_top_p_of_almost_nothing_is_top_1_and_of_one_the_whole_mixture() -> None:
    x_TH = numbers(50, 16)
    least, most = (decide(alone("top-p", {"p": p}), x_TH) for p in (1e-6, 1.0))
    best = least.probability_TN.max(-1)
    assert torch.equal(least.index_TK[:, 0], best.indices)
    assert torch.equal(least.weight_TK[:, 0], best.values)
    assert torch.equal(dense(most.weight_TK, most), most.probability_TN)
    torch.testing.assert_close(most.probability_TN, most.logits_TN.softmax(-1))


@pytest.mark.parametrize(("spread", "expected"), [(0.0, 7), (1e4, 1)])
def test_top_p_of_uniform_and_of_sure_probabilities(spread: float, expected: int) -> None:
    router: Any = alone("top-p", {"p": 0.4}, experts=16)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16) * spread)
    assert (counts(decide(router, torch.eye(16)[:9])) == expected).all()


def test_top_p_weighs_with_the_probabilities_as_they_are() -> None:
    routing = decide(alone("top-p", {"p": 0.4}), numbers(100, 16))
    real = routing.index_TK < 8
    assert torch.equal(routing.weight_TK[real], at(routing.probability_TN, routing.index_TK)[real])
    total = routing.weight_TK.sum(-1)
    assert ((total >= 0.4) & (total <= 1 + 1e-6)).all()
    renormalised = decide(alone("top-p", {"p": 0.4, "combine": "renormalised"}), numbers(100, 16))
    torch.testing.assert_close(renormalised.weight_TK.sum(-1), torch.ones(100))


def test_top_p_runs_at_most_most_experts() -> None:
    free, capped = (counts(decide(alone("top-p", {"p": 0.9, "most": most}), numbers(80, 16))) for most in (None, 2))
    assert free.max() > 2
    assert torch.equal(capped, free.clamp(max=2))


def test_top_p_has_no_top_k_and_keeps_p_when_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="top-p has no top_k"):
        put_routers(tiny("mixtral"), "top-p", {"top_k": 2})
    model = tiny("mixtral")
    put_routers(model, "top-p", {"most": 5})
    for router in placed_routers(model).values():
        router.dial(p=0.7)
    remember(model)
    model.save_pretrained(tmp_path)
    again = placed_routers(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all((r.settings.p, r.settings.most, r.top_k) == (0.7, 5, 5) for r in again.values())


def test_top_p_sends_gradients_to_rows_that_were_not_picked() -> None:
    router: Any = alone("top-p", {"p": 0.2})
    routing = decide(router, numbers(1, 16))
    assert counts(routing).item() < 8
    (routing.weight_TK * numbers(*routing.weight_TK.shape)).sum().backward()
    assert router.weight.grad.any(-1).all()


@pytest.mark.parametrize(("spread", "expected"), [(0.0, torch.tensor(8.0).log().item()), (1e4, 0.0)])
def test_top_ps_entropy_is_log_n_to_0_with_a_finite_gradient(spread: float, expected: float) -> None:
    router: Any = alone("top-p", hidden=8)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8) * spread)
    found = decide(router, torch.eye(8)).terms["entropy"]
    assert found.item() == pytest.approx(expected, abs=1e-6)
    found.backward()
    assert router.weight.grad.isfinite().all()


def test_entropy_of_probabilities_that_underflow_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -500.0]], requires_grad=True)
    found = entropy(logits.softmax(-1)).sum()
    found.backward()
    p = torch.tensor([1.0, 2.718281828]) / 3.718281828
    assert found.item() == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] == pytest.approx(float(-p[0] * (p[0].log() + found.detach())), rel=1e-4)


# -- hash --------------------------------------------------------------------------------------------------------------


def test_a_hash_router_gives_a_token_id_the_same_distinct_experts_everywhere() -> None:
    router, ids = alone("hash", {"top_k": 3, "vocabulary": 50}), torch.arange(100)[None] % 50
    routing = decide(router, numbers(100, 16), ids_BL=ids)
    assert torch.equal(routing.index_TK[:50], routing.index_TK[50:])
    assert all(len(set(row)) == 3 for row in routing.index_TK.tolist())
    assert torch.equal(routing.weight_TK, torch.ones(100, 3))
    assert torch.equal(decide(router, numbers(100, 16), ids_BL=ids + 50).index_TK, routing.index_TK)


def test_a_hash_table_spreads_the_vocabulary_evenly() -> None:
    table = alone("hash", {"top_k": 1, "vocabulary": 8000}).table
    assert chisquare(torch.bincount(table.flatten().long(), minlength=8)).pvalue > 1e-3


def test_hash_tables_differ_between_layers_and_are_saved_but_not_trained(tmp_path: Path) -> None:
    model = tiny("olmoe")
    put_routers(model, "hash")
    routers: list[Any] = list(placed_routers(model).values())
    assert not any(list(router.parameters()) for router in routers)
    assert [tuple(router.table.shape) for router in routers] == [(512, 2)] * 3
    assert not torch.equal(routers[0].table, routers[1].table)
    model.bfloat16().save_pretrained(tmp_path)
    again: list[Any] = list(placed_routers(AutoModelForCausalLM.from_pretrained(tmp_path)).values())
    assert all(torch.equal(a.table, b.table) for a, b in zip(again, routers))


def test_a_hash_router_needs_token_ids() -> None:
    model = tiny("mixtral")
    put_routers(model, "hash")
    with pytest.raises(ModelError, match="needs token ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))


def test_a_model_with_a_hash_router_loses_no_experts() -> None:
    model = tiny("mixtral")
    refuse_unsliceable(model)
    put_routers(model, "hash", layers=[1])
    with pytest.raises(ModelError, match="hash router of layer 1 looks experts up"):
        refuse_unsliceable(model)


def test_a_hash_router_picks_no_more_experts_than_its_table_has() -> None:
    router = alone("hash", {"top_k": 2, "vocabulary": 50})
    router.dial(top_k=1)
    assert decide(router, numbers(50, 16), ids_BL=torch.arange(50)[None]).index_TK.shape == (50, 1)
    with pytest.raises(UsageError, match="2 experts each"):
        router.dial(top_k=3)


def test_a_router_without_parameters_can_be_replaced() -> None:
    model = tiny("mixtral")
    for kind in ("hash", "random", "top-k"):
        put_routers(model, kind)
    weight = next(placed_routers(model)[0].parameters())
    assert weight.shape == (8, 64)
    assert weight.dtype == torch.float32


# -- frozen random -----------------------------------------------------------------------------------------------------


def test_a_frozen_router_is_saved_and_never_trained(tmp_path: Path) -> None:
    model = tiny("mixtral").train()
    put_routers(model, "random", {"top_k": 4})
    before = {n: t.clone() for n, t in model.state_dict().items() if ".gate." in n or "router" in n}
    assert len(before) == 6
    assert not set(before) & {n for n, _ in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in before.items())


@pytest.mark.parametrize("top_k", range(1, 9))
def test_a_frozen_router_at_any_k_is_softmax_over_the_kept(top_k: int) -> None:
    routing = decide(alone("random", {"top_k": top_k}), numbers(50, 16))
    kept, index = routing.logits_TN.topk(top_k)
    assert torch.equal(routing.index_TK, index)
    torch.testing.assert_close(routing.weight_TK, kept.softmax(-1), atol=1e-6, rtol=1e-5)
    assert (routing.weight_TK > 0).all()
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(50), atol=1e-6, rtol=0)


def test_the_k_of_a_frozen_router_grows_and_is_remembered(tmp_path: Path) -> None:
    model = tiny("qwen3-moe")
    put_routers(model, "random", {"top_k": 4})
    seen: list[int] = []
    for router in placed_routers(model).values():
        router.watch = lambda routing: seen.append(routing.index_TK.shape[-1])
    for top_k in (5, 8):
        for router in placed_routers(model).values():
            router.dial(top_k=top_k)
        model(IDS)
    assert seen == [5, 5, 8, 8]
    remember(model)
    model.save_pretrained(tmp_path)
    again = placed_routers(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert [router.top_k for router in again.values()] == [8] * len(again)
    with pytest.raises(UsageError):
        router.dial(top_k=9)


def test_a_frozen_router_lets_gradients_through_to_its_input() -> None:
    x_TH = numbers(10, 16).requires_grad_()
    routing = decide(alone("random", {"top_k": 3}), x_TH)
    (routing.weight_TK * numbers(10, 3)).sum().backward()
    assert x_TH.grad is not None
    assert x_TH.grad.any(-1).all()


# -- activation dense-to-sparse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_without_an_activation_it_starts_as_the_softmax_router(family: str, tau: float) -> None:
    plain, model = tiny(family), tiny(family)
    put_routers(plain, "top-k", {"groups": 1, "groups_used": 1} if family == "deepseek-v3" else {})
    put_routers(model, "activation", {"activation": "none", "tau": tau})
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=2e-6, rtol=1e-5)


def test_a_temperature_without_activation_divides_the_weights() -> None:
    router, x_TH = alone("activation", {"activation": "none", "tau": 0.5, "sparsify": "dense"}), numbers(30, 16)
    routing = decide(router, x_TH)
    expected = (x_TH @ (router.weight / 0.5).T).softmax(-1)
    torch.testing.assert_close(dense(routing.weight_TK, routing), expected)
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(30))


@pytest.mark.parametrize("activation", ["none", "sigmoid", "tanh", "softplus"])
def test_high_temperatures_are_uniform_and_low_ones_sure_of_the_same_expert(activation: str) -> None:
    x_TH = numbers(30, 16) * 0.3
    told = {"activation": activation, "sparsify": "dense"}
    hot, cold = (decide(alone("activation", {**told, "tau": tau}), x_TH) for tau in (1e6, 1e-6))
    torch.testing.assert_close(hot.probability_TN, torch.full((30, 8), 1 / 8), atol=1e-5, rtol=0)
    linear = decide(alone("activation", {**told, "activation": "none"}), x_TH)
    torch.testing.assert_close(cold.probability_TN.max(-1).values, torch.ones(30), atol=1e-3, rtol=0)
    assert torch.equal(cold.probability_TN.argmax(-1), linear.probability_TN.argmax(-1))


@pytest.mark.parametrize(("tau", "bound"), [(1.0, 0.1534), (0.5, 0.3300), (0.25, 0.7845), (0.1, 0.9993)])
def test_sigmoid_bounds_the_largest_weight(tau: float, bound: float) -> None:
    router: Any = alone("activation", {"activation": "sigmoid", "tau": tau, "bias": False}, experts=16)
    with torch.no_grad():
        router.weight.copy_(200 * torch.eye(16) - 100)
    largest = decide(router, torch.eye(16)).probability_TN.max().item()
    assert largest == pytest.approx(bound, abs=1e-4)
    wild = decide(router, numbers(500, 16) * 1e4)
    assert wild.probability_TN.max() <= largest + 1e-6
    assert wild.logits_TN.abs().max() <= 1 / tau + 1e-4


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "tanh", "gelu", "silu", "softplus"])
def test_scaling_weights_and_temperature_together_is_flat_for_a_linear_router_alone(
    activation: str, inside: bool
) -> None:
    told = {"activation": activation, "learn_tau": True, "tau": 0.7, "bias_inside": inside, "sparsify": "dense"}
    router: Any = alone("activation", told)
    with torch.no_grad():
        router.bias.copy_(numbers(8))
    routing = decide(router, numbers(40, 16))
    (routing.probability_TN * numbers(40, 8, seed=7)).sum().backward()
    along = (router.weight * router.weight.grad).sum() + (router.bias * router.bias.grad).sum() + router.log_tau.grad
    size = (router.weight * router.weight.grad).abs().sum()
    if activation == "none":
        assert abs(along) < 1e-5 * size
    else:
        assert abs(along) > 1e-3 * size


def test_a_learned_temperature_has_the_right_gradient_and_stays_positive() -> None:
    router: Any = alone("activation", {"learn_tau": True, "tau": 0.5, "sparsify": "dense"})
    router = router.double()
    x_TH, target = numbers(20, 16), numbers(20, 8, seed=7)

    def value() -> Tensor:
        routing = decide(router, x_TH)
        return (dense(routing.weight_TK, routing) * target).sum()

    value().backward()
    exact, ends = router.log_tau.grad.item(), []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            router.log_tau += step
            ends.append(value().item())
    assert exact == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-3)
    with torch.no_grad():
        router.log_tau -= 50
    assert router.tau > 0


def test_a_learned_temperature_is_saved_and_cannot_be_dialled(tmp_path: Path) -> None:
    model = tiny("mixtral")
    put_routers(model, "activation", {"learn_tau": True, "tau": 0.5})
    with torch.no_grad():
        placed_routers(model)[1].log_tau.fill_(-1.5)
    model.save_pretrained(tmp_path)
    again: Any = placed_routers(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert [round(r.log_tau.item(), 4) for r in again.values()] == [-0.6931, -1.5, -0.6931]
    with pytest.raises(UsageError, match="tau is learned"):
        again[0].dial(tau=0.1)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "silu", "softplus"])
def test_an_activated_router_starts_near_the_trained_one_where_logits_are_small(activation: str) -> None:
    router: Any = alone("activation", {"activation": activation, "tau": 0.003})
    weight = numbers(8, 16) * 0.2
    assert router.adopt(weight)
    x_TH = numbers(60, 16)
    found = decide(router, x_TH).probability_TN
    torch.testing.assert_close(found, (x_TH @ weight.T).softmax(-1), atol=0.03, rtol=0)


def test_a_threshold_keeps_what_is_above_it_and_always_the_likeliest() -> None:
    routing = decide(alone("activation", {"sparsify": "threshold", "threshold": 0.15, "tau": 0.5}), numbers(100, 16))
    assert torch.equal(routing.chosen_TN().bool(), routing.probability_TN > 0.15)
    sizes = counts(routing)
    assert sizes.min() < sizes.max() == routing.index_TK.shape[-1]
    one = decide(alone("activation", {"sparsify": "threshold", "threshold": 0.99}), numbers(100, 16))
    assert torch.equal(one.index_TK[:, 0], one.probability_TN.argmax(-1))
    assert one.index_TK.shape == (100, 1)


# -- the dense-to-sparse gate ------------------------------------------------------------------------------------------


def training(told: dict[str, Any], x_TH: Tensor, seed: int = 0, **more: Any) -> Routing:
    router = alone("dts", told, **more).train()
    torch.manual_seed(seed)
    return decide(router, x_TH)


def test_gumbel_weights_sum_to_one_without_a_threshold() -> None:
    routing = training({"weights": "gumbel", "threshold": 0.0, "tau": 1.0}, numbers(100, 16))
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(100))


def test_the_gate_is_dense_when_hot_and_sparser_as_it_cools() -> None:
    x_TH = numbers(400, 16)
    sizes = [counts(training({"tau": tau}, x_TH)).float() for tau in (100.0, 2.0, 1.0, 0.5, 0.3, 0.1, 1e-4)]
    means = [float(size.mean()) for size in sizes]
    assert means[0] == 8
    assert means == sorted(means, reverse=True)
    assert means[-1] == 1
    assert len(set(sizes[3].tolist())) > 3  # token by token


def test_the_hard_gate_picks_exactly_k() -> None:
    for top_k in (1, 2):
        routing = training({"tau": 2.0, "hard": True, "top_k": top_k}, numbers(50, 16))
        assert routing.index_TK.shape == (50, top_k)
        assert (counts(routing) == top_k).all()


def test_one_expert_is_always_above_the_threshold() -> None:
    routing = training({"tau": 1.0, "threshold": 0.999}, numbers(200, 16))
    assert (counts(routing) >= 1).all()
    assert (counts(routing) == 1).float().mean() > 0.9


def test_a_cold_gate_samples_from_the_softmax() -> None:
    routing = training({"tau": 1e-3, "top_k": 1}, numbers(1, 16).expand(4000, 16))
    load, p = routing.load_N().double(), routing.probability_TN[0].detach().double()
    assert chisquare(load, p / p.sum() * load.sum()).pvalue > 1e-3


@pytest.mark.parametrize("weights", ["softmax", "gumbel"])
def test_all_logits_get_gradients_while_the_gate_is_soft(weights: str) -> None:
    router: Any = alone("dts", {"tau": 1.0, "weights": weights, "threshold": 0.05}).train()
    routing = decide(router, numbers(1, 16))
    assert counts(routing).item() < 8
    (routing.weight_TK * numbers(*routing.weight_TK.shape)).sum().backward()
    assert router.weight.grad.any(-1).all()


def test_the_hard_gate_learns_through_the_weight_of_its_expert_alone() -> None:
    for combine, learns in (("raw", True), ("unit", False)):
        router: Any = alone("dts", {"hard": True, "top_k": 1, "combine": combine}).train()
        routing = decide(router, numbers(20, 16))
        assert routing.weight_TK.requires_grad == learns


def test_the_gate_in_use_has_no_noise_and_the_softmax_as_weight() -> None:
    for told in ({"top_k": 1}, {"top_k": 1, "weights": "gumbel"}, {"top_k": 1, "hard": True}):
        router = alone("dts", told)
        first, second = (decide(router, numbers(60, 16)) for _ in range(2))
        best = first.logits_TN.softmax(-1).max(-1)
        assert torch.equal(first.index_TK, second.index_TK)
        assert torch.equal(first.index_TK[:, 0], best.indices)
        torch.testing.assert_close(first.weight_TK[:, 0], best.values)
    soft = decide(alone("dts", {"use": "soft", "tau": 0.5, "threshold": 0.05}), numbers(60, 16))
    assert torch.equal(soft.chosen_TN().bool(), (soft.logits_TN / 0.5).softmax(-1) > 0.05)


def test_the_gates_balance_is_one_with_one_sure_expert_each_and_grows_with_more() -> None:
    x_TH = torch.eye(8).repeat(200, 1) * 1e3

    def balance(tau: float) -> float:
        router: Any = alone("dts", {"tau": tau, "weights": "gumbel"}, hidden=8).train()
        with torch.no_grad():
            router.weight.copy_(torch.eye(8))
        return decide(router, x_TH).terms["balance"].item()

    assert balance(1.0) == pytest.approx(1.0, abs=1e-5)
    assert balance(1e5) == pytest.approx(8.0, rel=1e-2)


# -- expert choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "top_k", "size"), [(40, 2, 10), (44, 1, 6), (3, 1, 1), (24, 8, 24)])
def test_each_expert_picks_its_c_likeliest_tokens(tokens: int, top_k: int, size: int) -> None:
    routing = decide(alone("expert-choice", {"top_k": top_k}), numbers(tokens, 16))
    assert routing.load_N().tolist() == [size] * 8
    likeliest = routing.probability_TN.topk(size, dim=0).indices
    assert torch.equal(routing.chosen_TN().bool(), torch.zeros(tokens, 8).scatter(0, likeliest, 1.0).bool())
    torch.testing.assert_close(dense(routing.weight_TK, routing), routing.probability_TN * routing.chosen_TN())


@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_with_expert_choice_a_later_token_changes_an_earlier_ones_route(pool: str) -> None:
    router, x_TH = alone("expert-choice", {"pool": pool}), numbers(24, 16)
    assert router.looks_ahead
    other = x_TH.clone()
    other[12:] *= 3
    first, second = (decide(router, x, shape=(1, 24)).chosen_TN()[:12] for x in (x_TH, other))
    assert not torch.equal(first, second)


def test_rows_compete_in_the_batch_but_not_by_sequence() -> None:
    x_TH = numbers(24, 16)
    other = x_TH.clone()
    other[12:] *= 3
    for pool, same in (("batch", False), ("sequence", True)):
        router = alone("expert-choice", {"pool": pool})
        first, second = (decide(router, x, shape=(2, 12)).chosen_TN()[:12] for x in (x_TH, other))
        assert torch.equal(first, second) == same


@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_padding_takes_no_place_with_any_expert(pool: str) -> None:
    router, x_TH = alone("expert-choice", {"pool": pool}), numbers(24, 16)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    routing = decide(router, x_TH, shape=(2, 12), mask_BL=mask)
    flat = mask.reshape(-1)
    assert not routing.chosen_TN()[~flat].any()
    if pool == "batch":
        assert torch.equal(routing.chosen_TN()[flat], decide(router, x_TH[flat]).chosen_TN())
    else:
        assert torch.equal(routing.chosen_TN()[5:12], decide(router, x_TH[5:12]).chosen_TN())
        assert torch.equal(routing.chosen_TN()[12:], decide(router, x_TH[12:]).chosen_TN())


def test_a_row_of_padding_alone_gets_no_expert() -> None:
    mask = torch.tensor([[True] * 12, [False] * 12])
    routing = decide(alone("expert-choice", {"pool": "sequence"}), numbers(24, 16), shape=(2, 12), mask_BL=mask)
    assert routing.chosen_TN()[:12].sum() == 24
    assert not routing.chosen_TN()[12:].any()


# -- settings and weights ----------------------------------------------------------------------------------------------


def test_weights_by_each_way_of_combining() -> None:
    p = torch.tensor([[0.5, 0.25], [0.2, 0.1], [0.3, 0.3]])
    real = torch.tensor([[True, True], [True, False], [False, False]])
    assert torch.equal(combined(p, "raw", real), torch.tensor([[0.5, 0.25], [0.2, 0], [0, 0]]))
    torch.testing.assert_close(combined(p, "renormalised", real), torch.tensor([[2 / 3, 1 / 3], [1, 0], [0, 0]]))
    for how in ("unit", "straight-through"):
        assert combined(p, how, real).tolist() == [[1, 1], [1, 0], [0, 0]]


def test_settings_of_a_router_in_use_are_checked() -> None:
    for kind in ("adamoe", "random"):
        router = alone(kind, {"top_k": 2})
        with pytest.raises(UsageError):
            router.dial(top_k=100)
        with pytest.raises(UsageError, match="It takes"):
            router.dial(colour="red")
