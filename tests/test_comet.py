"""COMET, DSelect-k and the search for a permutation: what arXiv:2306.02824 and 2106.03760 promise exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie import api
from coterie.anatomy import moe_layers
from coterie.anatomy.layers import refuse_unsliceable
from coterie.anatomy.routers import fold_permutations, placed_routers, put_routers, remember
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.assets import write_demo_texts
from coterie.balancing.base import Balance
from coterie.errors import ModelError, UsageError
from coterie.experts import forward
from coterie.routing.base import Router, Routing, checked, router_class
from coterie.routing.comet import mixed
from coterie.routing.permuted import Permutation, PermutedSettings, sinkhorn, unevenness
from coterie.routing.record import Record, listening, recording
from coterie.routing.trees import leaves, saturation, smooth_step, words
from coterie.training import train as train_module
from families import tiny

IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
MODELS = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
KINDS: dict[str, dict[str, Any]] = {
    "comet": {"gamma": 4.0},
    "dselect-k": {"gamma": 4.0},
    "permuted": {"inner": {"kind": "comet", "gamma": 4.0}},
}
INNER: dict[str, dict[str, Any]] = {
    "top-k": {"kind": "top-k"},
    "sigmoid": {"kind": "sigmoid"},
    "hash": {"kind": "hash", "vocabulary": 64},
    "comet": {"kind": "comet", "gamma": 4.0},
    "dselect-k": {"kind": "dselect-k", "gamma": 4.0},
    "adamoe": {"kind": "adamoe", "top_k": 3, "nulls": 4},
}


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def alone(kind: str, told: dict[str, Any] | None = None, experts: int = 8, hidden: int = 16, seed: int = 0) -> Any:
    """A router outside of any model, as it starts."""
    cls = router_class(kind)
    torch.manual_seed(seed)
    router = cls(hidden, experts, checked(kind, cls.Settings, told or {}))
    router.reset()
    return router.eval()


def decide(router: Router, x_TH: Tensor, **known: Any) -> Routing:
    ids = torch.arange(len(x_TH))[None] * 5
    record = Record(**{"shape": (1, len(x_TH)), "ids_BL": ids, "grad": torch.is_grad_enabled(), **known})
    with recording(record):
        router(x_TH)
    return record.routings[router.layer]


def dense(routing: Routing) -> Tensor:
    """[T, N] from what stands in the slots."""
    empty = routing.weight_TK.new_zeros(len(routing.weight_TK), routing.outputs + 1)
    return empty.scatter_add(1, routing.index_TK, routing.weight_TK)[:, :-1]


def by_hand(score_Q: list[float], width: float) -> tuple[list[float], list[int]]:
    """Leaf probabilities of one tree and their depths, from left to right, by walking it."""
    found: list[tuple[float, int]] = []

    def step(t: float) -> float:
        if abs(t) >= width / 2:
            return float(t > 0)
        return -2 * t**3 / width**3 + 1.5 * t / width + 0.5

    def walk(node: int, mass: float, depth: int) -> None:
        if node >= len(score_Q):
            found.append((mass, depth))
            return
        left = step(score_Q[node])
        walk(2 * node + 1, mass * left, depth + 1)
        walk(2 * node + 2, mass * (1 - left), depth + 1)

    walk(0, 1.0, 0)
    return [p for p, _ in found], [d for _, d in found]


# -- the smooth step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.001, 1.0, 7.0])
def test_smooth_step_has_its_values_and_slopes(width: float) -> None:
    t = (torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0], dtype=torch.float64) * width).requires_grad_()
    value = smooth_step(t, width)
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert value.tolist() == [0, 0, 0.5, 1, 1]
    assert slope.tolist() == [0, 0, pytest.approx(1.5 / width), 0, 0]


@given(st.floats(-1, 1), st.floats(0.01, 10))
def test_smooth_step_is_its_cubic_within_the_band(u: float, width: float) -> None:
    t = u * width / 2
    expected = -2 * t**3 / width**3 + 1.5 * t / width + 0.5
    assert float(smooth_step(torch.tensor(t, dtype=torch.float64), width)) == pytest.approx(expected, abs=1e-12)


# -- trees -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 34))
def test_leaves_equal_a_walk_through_the_tree_for_any_number_of_experts(n: int) -> None:
    score = numbers(5, 3, n - 1, seed=n, dtype=torch.float64)
    found = leaves(score, 2.0)
    for t in range(5):
        for tree in range(3):
            expected, _ = by_hand(score[t, tree].tolist(), 2.0)
            torch.testing.assert_close(found[t, tree], torch.tensor(expected, dtype=torch.float64))
    assert (found == 0).any() or n == 2
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 3, dtype=torch.float64))


def test_leaves_are_counted_from_left_to_right_and_the_deep_ones_come_first() -> None:
    middle = leaves(torch.zeros(1, 1, 4, dtype=torch.float64), 1.0)[0, 0]
    assert by_hand([0.0] * 4, 1.0)[1] == [3, 3, 2, 2, 2]
    assert middle.log2().tolist() == [-3, -3, -2, -2, -2]


def test_the_gradient_of_leaves_is_that_of_finite_differences() -> None:
    score = (numbers(2, 2, 5, dtype=torch.float64) * 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: leaves(s, 2.0), (score,))


# -- COMET -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 33), st.integers(1, 4), st.floats(0.05, 20), st.integers(0, 99))
def test_weights_are_a_convex_combination(n: int, k: int, size: float, seed: int) -> None:
    router = alone("comet", {"top_k": min(k, n), "gamma": 1.0}, experts=n, seed=seed)
    g_TE = dense(decide(router, numbers(7, 16, seed=seed) * size / 0.01))
    assert (g_TE >= 0).all()
    torch.testing.assert_close(g_TE.sum(-1), torch.ones(7))


@pytest.mark.parametrize("n", [2, 5, 8, 16, 23])
@pytest.mark.parametrize("k", [1, 2])
def test_with_all_nodes_closed_a_token_has_at_most_k_experts(n: int, k: int) -> None:
    router = alone("comet", {"top_k": k}, experts=n)
    routing = decide(router, numbers(50, 16) * 1e6)
    assert routing.index_TK.shape[-1] <= k
    assert router.open_nodes(numbers(50, 16) * 1e6) == 0
    assert routing.terms["entropy"].item() == pytest.approx(0, abs=1e-5)


def test_as_many_trees_as_experts_are_allowed() -> None:
    routing = decide(alone("comet", {"top_k": 5}, experts=5), numbers(20, 16) * 1e6)
    assert routing.index_TK.shape[-1] <= 5
    torch.testing.assert_close(dense(routing).sum(-1), torch.ones(20))


def test_a_fresh_router_runs_all_experts() -> None:
    assert decide(alone("comet"), numbers(9, 16)).index_TK.shape == (9, 8)


def test_the_softmax_is_one_over_all_trees() -> None:
    p_TKE, a_TKE = leaves(numbers(4, 3, 5), 3.0), numbers(4, 3, 6, seed=2)
    raw_TKE = p_TKE * a_TKE.exp()
    torch.testing.assert_close(mixed(p_TKE, a_TKE), raw_TKE.sum(1) / raw_TKE.sum((1, 2))[:, None])
    each_TE = (raw_TKE / raw_TKE.sum(-1, keepdim=True)).mean(1)
    assert (mixed(p_TKE, a_TKE) - each_TE).abs().max() > 0.01


def test_gradients_are_finite_where_leaves_are_out_of_reach_and_zero_behind_closed_nodes() -> None:
    score = torch.tensor([[[5.0, 0.1, 0.2, -5.0, 0.3]]], requires_grad=True)  # 6 leaves; the root is closed to the left
    a = numbers(1, 1, 6).requires_grad_()
    p = leaves(score, 1.0)
    grads = torch.autograd.grad((mixed(p, a) * numbers(1, 6, seed=3)).sum(), (score, a))
    assert (p == 0).any()
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0, 0].ne(0).tolist() == [False, True, False, False, True]


def test_the_gradient_of_the_router_is_that_of_finite_differences() -> None:
    x, w, a = (numbers(*s, seed=i, dtype=torch.float64) * 0.3 for i, s in enumerate([(3, 4), (10, 4), (12, 4)]))

    def gate(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        p = leaves((x @ w.T).unflatten(-1, (2, 5)), 2.0)
        return torch.cat([mixed(p, (x @ a.T).unflatten(-1, (2, 6))), saturation(p)[:, None]], -1)

    assert torch.autograd.gradcheck(gate, tuple(t.requires_grad_() for t in (x, w, a)))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_entropy_term_is_k_log_n_in_the_middle(n: int) -> None:
    p_TKE = leaves(torch.zeros(6, 3, n - 1), 1.0)
    torch.testing.assert_close(saturation(p_TKE), torch.full((6,), 3 * math.log(n)), rtol=1e-4, atol=1e-4)


def test_the_entropy_term_is_a_mean_over_tokens_without_padding() -> None:
    router, x_TH = alone("comet", {"gamma": 0.05}), numbers(6, 16) * 3
    mask = torch.tensor([[1, 1, 1, 0, 0, 1]]).bool()
    whole = decide(router, x_TH, mask_BL=mask).terms["entropy"]
    torch.testing.assert_close(whole, decide(router, x_TH[mask[0]]).terms["entropy"])


@pytest.mark.parametrize("kind", ["comet", "dselect-k"])
def test_dense_and_sparse_evaluation_are_equal(kind: str) -> None:
    model = tiny("mixtral")
    put_routers(model, kind, {"gamma": 0.1})
    layer, x_TH = moe_layers(model)[0], numbers(10, 64) * 8
    routing = decide(layer.router, x_TH)
    y_ETH = torch.stack([forward.expert_output(layer.experts, e, x_TH) for e in range(8)])
    expected = torch.einsum("te,eth->th", dense(routing), y_ETH)
    assert 2 <= routing.index_TK.shape[-1]
    assert (routing.index_TK == 8).any()
    with recording(Record(shape=(1, 10))):
        found = layer.block(x_TH[None])
    torch.testing.assert_close((found[0] if isinstance(found, tuple) else found)[0], expected, atol=1e-5, rtol=1e-4)


def test_training_with_the_term_makes_a_dense_router_sparse() -> None:
    router = alone("comet", {"gamma": 1.0}).train()
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    x_TH = numbers(64, 16)
    before = (decide(router, x_TH).index_TK < 8).sum(-1).float().mean()
    for _ in range(80):
        optimizer.zero_grad()
        routing = decide(router, x_TH)
        (routing.terms["entropy"] + (dense(routing)[:, :4].sum(-1) - 0.5).square().mean()).backward()
        optimizer.step()
    after = (decide(router, x_TH).index_TK < 8).sum(-1).float().mean()
    assert before == 8
    assert after < 2.5


# -- DSelect-k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 6, 8, 16])
def test_words_are_products_over_the_digits_of_their_number(n: int) -> None:
    z = numbers(3, 2, (n - 1).bit_length(), dtype=torch.float64)
    b = smooth_step(z, 3.0)
    expected = [torch.stack([b[..., m] if j >> m & 1 else 1 - b[..., m] for m in range(z.shape[-1])]).prod(0)
                for j in range(n)]  # fmt: skip
    torch.testing.assert_close(words(z, 3.0, n), torch.stack(expected, -1))


@pytest.mark.parametrize("n", [4, 8, 16])
def test_dselect_k_is_convex_and_at_most_k_for_powers_of_two(n: int) -> None:
    router = alone("dselect-k", experts=n)
    assert decide(router, numbers(9, 16)).index_TK.shape[-1] == n
    for size in (1.0, 1e6):
        torch.testing.assert_close(dense(decide(router, numbers(30, 16) * size)).sum(-1), torch.ones(30))
    routing = decide(router, numbers(30, 16) * 1e6)
    assert routing.index_TK.shape[-1] <= 2
    assert "reachable" not in routing.terms


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1e6), st.integers(0, 99))
def test_the_mass_term_of_six_experts_is_finite_and_at_least_k(size: float, seed: int) -> None:
    routing = decide(alone("dselect-k", {"top_k": 3}, experts=6, seed=seed), numbers(20, 16, seed=seed) * size)
    assert routing.terms["reachable"].isfinite()
    assert routing.terms["reachable"].item() >= 3 - 1e-5


def test_selectors_for_all_tokens_do_not_look_at_them() -> None:
    router = alone("dselect-k", {"per_token": False})
    torch.testing.assert_close(*dense(decide(router, numbers(2, 16))))
    assert {name for name, _ in router.named_parameters()} == {"digit_bias", "selector_bias"}


# -- the search for a permutation --------------------------------------------------------------------------------------


def search(experts: int = 8, **told: Any) -> Permutation:
    torch.manual_seed(0)
    made = Permutation(experts, PermutedSettings(**told))
    made.reset()
    return made


@pytest.mark.parametrize("n", [2, 5, 16, 64])
def test_before_any_training_the_nearest_is_a_permutation(n: int) -> None:
    order = search(n).nearest()
    P_EE = torch.eye(n)[order]
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(P_EE @ P_EE.T, torch.eye(n))


def test_the_schedule_goes_from_end_to_end() -> None:
    made = search(search=0.5)
    found = []
    for step in (0, 5, 9):
        made.at(step, 20)
        found.append(made.schedule())
    assert found[0] == (1e-3, 20)
    assert found[1] == (pytest.approx(10 ** (-3 - 4 * 5 / 9)), 92)
    assert found[2] == (pytest.approx(1e-7), 150)


def test_sinkhorn_has_columns_of_sum_one_and_nearly_so_rows() -> None:
    P_EE = sinkhorn(search(16).logits.double() / 1e-2, 500)
    torch.testing.assert_close(P_EE.sum(0), torch.ones(16, dtype=torch.float64))
    assert (P_EE.sum(1) - 1).abs().max() < 1e-3


def test_a_fresh_permutation_is_soft() -> None:
    widest = search(16).now().max(1).values.mean()
    assert 0.6 < widest.item() < 0.95


def test_the_gradient_of_the_search_does_not_grow_as_the_temperature_falls() -> None:
    def slope(tau: float) -> float:
        made = search(tau_first=tau)
        return float(torch.autograd.grad((made.now() * numbers(8, 8).double()).sum(), made.logits)[0].norm())

    def plain(tau: float) -> float:
        made = search()
        P_EE = sinkhorn(made.logits.double() / tau, 20)
        return float(torch.autograd.grad((P_EE * numbers(8, 8).double()).sum(), made.logits)[0].norm())

    assert slope(1e-3) < 5
    assert plain(1e-3) == pytest.approx(1e3 * slope(1e-3), rel=1e-3)


def test_the_penalty_is_zero_at_a_permutation() -> None:
    assert float(unevenness(torch.eye(6).double())) == pytest.approx(0, abs=1e-4)
    assert float(unevenness(torch.full((6, 6), 1 / 6).double())) == pytest.approx(12 * math.log(6), rel=1e-4)


def trained(router: Any, x_TH: Tensor, steps: int, until: int | None = None) -> list[bool]:
    """Some steps of Adam; whether L had a gradient in each."""
    router.train()
    optimizer = torch.optim.Adam(router.parameters(), 0.01)
    told = []
    for step in range(until or steps):
        router.at(step, steps)
        optimizer.zero_grad(set_to_none=True)
        (dense(decide(router, x_TH)) * numbers(len(x_TH), router.num_outputs, seed=5)).sum().backward()
        told.append(router.permutation.logits.grad is not None)
        optimizer.step()
    router.at(until or steps, steps)
    router.eval()
    return told


@pytest.mark.parametrize("inner", INNER)
def test_during_the_search_and_after_it_a_token_keeps_its_total_weight(inner: str) -> None:
    router = alone("permuted", {"inner": INNER[inner], "search": 0.5})
    x_TH = numbers(12, 16)
    expected = dense(decide(router.inner, x_TH))[:, :8].sum(-1)
    router.at(2, 10)
    soft = decide(router.train(), x_TH)
    torch.testing.assert_close(dense(soft)[:, :8].sum(-1), expected)
    assert (soft.terms["permutation"]) > 0
    torch.testing.assert_close(soft.probability_TN.sum(-1), torch.ones(12))
    hard = decide(router.eval(), x_TH)
    torch.testing.assert_close(dense(hard)[:, :8].sum(-1), expected)
    assert "permutation" not in hard.terms


@pytest.mark.parametrize("inner", INNER)
def test_without_a_search_it_is_the_inner_router_up_to_a_fixed_order(inner: str) -> None:
    router = alone("permuted", {"inner": INNER[inner], "search": 0}).train()
    x_TH, order = numbers(12, 16), router.permutation.nearest()
    for step in (0, 5, 10):
        router.at(step, 10)
        plain, found = decide(router.inner, x_TH), decide(router, x_TH)
        torch.testing.assert_close(dense(found)[:, order], dense(plain)[:, :8])
        torch.testing.assert_close(found.probability_TN[:, order], plain.probability_TN[:, :8])
        torch.testing.assert_close(found.logits_TN[:, 8:], plain.logits_TN[:, 8:])
    assert sorted(order.tolist()) == list(range(8))
    assert order.tolist() != list(range(8))


def test_learning_of_the_permutation_ends_with_the_search() -> None:
    router = alone("permuted", {"search": 0.4})
    assert trained(router, numbers(20, 16), 10) == [True] * 4 + [False] * 6
    assert sorted(router.permutation.nearest().tolist()) == list(range(8))


def test_the_permutation_in_use_is_the_nearest_to_the_last_one_of_the_search() -> None:
    router = alone("permuted", {"search": 0.5})
    trained(router, numbers(20, 16), 10, until=4)
    best = sum(float(router.permutation.soft[e, o]) for e, o in enumerate(router.permutation.nearest().tolist()))
    rows = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(200)])
    assert all(float(router.permutation.soft[torch.arange(8), row].sum()) <= best + 1e-9 for row in rows)


def test_a_search_that_is_over_is_not_begun_again() -> None:
    router = alone("permuted", {"search": 0.4})
    trained(router, numbers(20, 16), 10)
    order = router.permutation.nearest().clone()
    assert trained(router, numbers(20, 16), 10) == [False] * 10
    assert torch.equal(router.permutation.nearest(), order)


def test_a_search_goes_on_from_a_checkpoint() -> None:
    x_TH = numbers(20, 16)
    first = alone("permuted", {"search": 0.5})
    trained(first, x_TH, 10, until=3)
    second = alone("permuted", {"search": 0.5}, seed=9)
    second.load_state_dict(first.state_dict())
    assert second.permutation.schedule() == first.permutation.schedule()
    assert torch.equal(decide(second, x_TH).index_TK, decide(first, x_TH).index_TK)
    second.train(), first.train()
    torch.testing.assert_close(dense(decide(second, x_TH)), dense(decide(first, x_TH)))


@pytest.mark.parametrize(("share", "steps"), [(0.01, 50), (60, 50)])
def test_a_search_that_has_no_step_or_too_many_is_refused(share: float, steps: int) -> None:
    with pytest.raises(UsageError, match=f"training of {steps}"):
        alone("permuted", {"search": share}).at(0, steps)


def test_a_search_that_is_not_told_the_step_says_so() -> None:
    router = alone("permuted").train()
    with pytest.warns(UserWarning, match="at\\(step, steps\\)"):
        routing = decide(router, numbers(4, 16))
    assert "permutation" not in routing.terms


@pytest.mark.parametrize(
    "told",
    [{"inner": {}}, {"inner": {"kind": "permuted"}}, {"inner": {"kind": "comet", "gamma": 0}}, {"combine": "unit"}],
)
def test_what_cannot_be_permuted_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        alone("permuted", told)


def test_settings_of_the_inner_router_are_dials_too() -> None:
    router = alone("permuted", {"inner": {"kind": "comet"}})
    router.dial(gamma=3.0, search=0.2)
    assert router.inner.settings.gamma == 3.0
    assert router.settings.inner == {"kind": "comet", "gamma": 3.0}
    assert router.permutation.settings.search == 0.2


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["top-k", "comet", "hash"])
@pytest.mark.parametrize("family", MODELS)
def test_folding_changes_no_output_and_leaves_no_permutation(family: str, inner: str, tmp_path: Path) -> None:
    model = tiny(family)
    put_routers(model, "permuted", {"inner": INNER[inner], "search": 0.5})
    for router in placed_routers(model).values():
        router.at(10, 10)
    before = model(IDS).logits
    assert fold_permutations(model) == [layer.index for layer in moe_layers(model)]
    assert {router.kind for router in placed_routers(model).values()} == {inner}
    assert not [name for name, _ in model.named_parameters() if "permutation" in name]
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_models_half_way_to_sparse_are_saved_decode_and_generate(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    put_routers(model, kind, KINDS[kind])
    with torch.no_grad():
        for router in placed_routers(model).values():
            for name, parameter in router.named_parameters():
                if "weight" in name:
                    parameter.mul_(8)
    seen: list[Record] = []
    with torch.no_grad(), listening(model, seen.append):
        whole = model(IDS).logits
    counts = torch.cat([(r.expert_TK < r.experts).sum(-1) for r in seen[0].routings.values()])
    assert 1 <= counts.min() < counts.max()
    out = model(IDS[:, :7], use_cache=True)
    rest = model(IDS[:, 7:], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([out.logits, rest.logits], 1), whole, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, whole)
    assert again.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_a_search_that_is_over_is_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny("mixtral")
    put_routers(model, "permuted", {"search": 0.5})
    for router in placed_routers(model).values():
        router.at(10, 10)
    remember(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for old, new in zip(placed_routers(model).values(), placed_routers(again).values(), strict=True):
        assert bool(new.permutation.over)
        assert torch.equal(new.permutation.nearest(), old.permutation.nearest())


@pytest.mark.parametrize("kind", KINDS)
def test_experts_cannot_be_removed(kind: str) -> None:
    model = tiny("mixtral")
    put_routers(model, kind)
    with pytest.raises(ModelError, match="cannot be removed"):
        refuse_unsliceable(model)


@pytest.mark.parametrize("kind", KINDS)
def test_our_decoder_is_built_with_them_and_their_terms_reach_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    config = CoterieConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_experts=6,
        moe_intermediate_size=16, router={"kind": kind, **KINDS[kind]},
    )  # fmt: skip
    model = CoterieForCausalLM(config).train()
    for router in placed_routers(model).values():
        router.at(0, 10)
    plain = model(IDS, labels=IDS).loss
    balance = Balance.of([{"name": "router", "key": "entropy", "weight": 0.5}])
    balance.watch(model)
    whole = model(IDS, labels=IDS).loss
    assert (whole - plain).item() == pytest.approx(0.5 * balance.told["router.entropy"], rel=1e-3)


def test_our_decoder_is_folded_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CoterieConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_experts=6,
        moe_intermediate_size=16, router={"kind": "permuted", "inner": {"kind": "comet", "gamma": 2.0}},
    )  # fmt: skip
    model = CoterieForCausalLM(config).eval()
    for router in placed_routers(model).values():
        assert router.permutation.logits.abs().max() <= 0.05
        router.at(10, 10)
    before = model(IDS).logits
    assert fold_permutations(model) == [0, 1]
    model.save_pretrained(tmp_path)
    again = CoterieForCausalLM.from_pretrained(tmp_path).eval()
    assert {router.kind for router in placed_routers(again).values()} == {"comet"}
    assert again.config.router["gamma"] == 2.0
    torch.testing.assert_close(again(IDS).logits, before, atol=1e-5, rtol=1e-4)


class Killed(Exception):
    pass


def test_a_training_killed_while_it_searches_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, evaluation = write_demo_texts(tmp_path / "text")
    router = {"kind": "permuted", "inner": {"kind": "comet", "top_k": 2}, "search": 0.9}
    told = {
        "model": {"vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_experts": 5, "moe_intermediate_size": 8, "router": router},
        "balancing": [{"name": "router", "key": "permutation", "weight": 1e-4}],
        "data": [str(calibration / "prose.jsonl")],
        "evaluate": [str(evaluation / "prose.jsonl")],
        "training": {"steps": 10, "batch_size": 2, "length": 16, "evaluate_samples": 1, "rate": 0.01},
    }  # fmt: skip
    api.train(told, str(tmp_path / "whole"))
    plain = train_module._tensorboard

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise Killed

    monkeypatch.setattr(train_module, "_tensorboard", lambda folder: [Kill()])
    with pytest.raises(Killed):
        api.train(told, str(tmp_path / "cut"))
    monkeypatch.setattr(train_module, "_tensorboard", plain)
    api.train(told, str(tmp_path / "cut"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert bool(one["model.layers.0.mlp.gate.permutation.over"])
    soft = one["model.layers.0.mlp.gate.permutation.soft"]
    assert (soft.max(1).values > 0.99).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_built_cannot_be_dialled(kind: str) -> None:
    with pytest.raises(UsageError, match="fixed"):
        alone(kind, KINDS[kind]).dial(top_k=3)
