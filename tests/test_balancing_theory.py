"""Auxiliary-loss-free balancing without a model: the rules, and what their theory says of loads and dual values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.balancing import bias
from coterie.balancing.assignment import (
    disobedient,
    dual_value,
    follow,
    loads,
    moves,
    optimum,
    rise_bound,
    subgradient,
    top_k_of,
)
from coterie.balancing.loads import count, load_figures, target_loads
from coterie.balancing.online import GumbelScores, excess_of_runs, growth, regret
from coterie.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
ADDITIVE = ("sign", "proportional", "centred")


def skewed(tokens=512, experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logit_TE = torch.randn(tokens, experts, generator=generator) + torch.linspace(-1.5, 1.5, experts)
    return torch.sigmoid(logit_TE.double())


# ---- loads ----


def test_padding_and_the_index_of_no_expert_are_not_counted():
    index_TK = torch.tensor([[0, 1], [1, 3], [2, 2]])  # 3 stands for "none"
    assert count(index_TK, 3, torch.tensor([True, True, False])).tolist() == [1, 2, 0]


def test_runs_are_counted_apart():
    assert count(torch.tensor([[[0], [1]], [[1], [1]]]), 2).tolist() == [[1, 1], [0, 2]]


def test_figures_of_known_loads():
    figures = load_figures(torch.tensor([4, 2, 2, 0]))
    assert figures.max_vio == 1.0
    assert figures.min_load == 0.0
    assert figures.dead == 0.25
    assert figures.cv == pytest.approx(math.sqrt(0.5))
    assert figures.entropy == pytest.approx(1.5 * math.log(2))


def test_loads_at_their_targets_are_perfect():
    figures = load_figures(torch.tensor([30, 10]), target_E=torch.tensor([3.0, 1.0]))
    assert (figures.max_vio, figures.min_load, figures.cv) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("load", [torch.zeros(4), torch.ones(2, 2)])
def test_loads_that_say_nothing_are_refused(load):
    with pytest.raises(UsageError, match="no loads to judge"):
        load_figures(load)


def test_a_target_that_wants_nothing_of_an_expert_is_allowed_in_updates_but_not_in_figures():
    target = torch.tensor([1.0, 0.0])
    assert target_loads(torch.tensor([2, 2]), target).tolist() == [4, 0]
    with pytest.raises(UsageError, match="target load 0"):
        load_figures(torch.tensor([2, 2]), target)


# ---- rules ----


@pytest.mark.parametrize("rule", ["sign", "multiplicative"])
def test_one_sign_step_moves_each_bias_by_u_in_either_direction_or_not_at_all(rule):
    before = bias.initial(4, rule)
    after = bias.step(before, torch.tensor([9, 5, 5, 1]), rule, 0.125)
    assert (after - before).tolist() == [-0.125, 0.0, 0.0, 0.125]


def test_a_proportional_step_is_the_error_in_assignments():
    assert bias.step(torch.zeros(3), torch.tensor([5, 3, 1]), "proportional", 0.5).tolist() == [-1.0, 0.0, 1.0]


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_centred_updates_sum_to_zero(load):
    after = bias.step(torch.zeros(len(load), dtype=torch.float64), torch.tensor(load), "centred", 1e-3)
    assert float(after.sum()) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("rule", bias.RULES)
@pytest.mark.parametrize("load", [0, 7, 2**24 + 1])
def test_equal_counts_move_nothing(rule, load):
    before = torch.tensor([0.3, -0.1, 0.7])
    assert torch.equal(bias.step(before, torch.full((3,), load), rule, 0.01), before)


def test_counts_at_their_targets_move_nothing_whatever_the_scale_of_the_targets():
    before, load, target = torch.tensor([0.3, -0.1, 0.7]), torch.tensor([6, 3, 1]), torch.tensor([0.6, 0.3, 0.1])
    for scale in (1, 10, 3):
        assert torch.equal(bias.step(before, load, "sign", 0.01, (target * scale * 10).round()), before)


def test_a_difference_of_one_assignment_is_seen_beyond_the_exact_range_of_float32():
    after = bias.step(torch.zeros(2), torch.tensor([2**24 + 1, 2**24]), "sign", 0.5)
    assert after.tolist() == [-0.5, 0.5]


def test_step_sizes_fall_as_asked():
    load = torch.tensor([2, 0])
    found = {s: float(bias.step(torch.zeros(2), load, "sign", 0.5, schedule=s, iteration=4)[1]) for s in bias.SCHEDULES}
    assert found == {"constant": 0.5, "1/n": 0.125, "1/sqrt(n)": 0.25}


def test_the_old_bias_is_left_alone():
    before = torch.zeros(2)
    bias.step(before, torch.tensor([2, 0]), "sign", 0.5)
    assert before.tolist() == [0, 0]


def test_layers_are_updated_apart():
    load_NE = torch.tensor([[3, 1], [0, 4]])
    after = bias.step(torch.zeros(2, 2), load_NE, "centred", 0.5)
    assert after.tolist() == [[-0.5, 0.5], [0.5, -0.5]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rule": "signed"}, "unknown balancing rule"),
        ({"schedule": "1/t"}, "unknown schedule"),
        ({"iteration": 0}, "counted from 1"),
        ({"bias_E": torch.zeros(2, dtype=torch.bfloat16)}, "would lose its updates"),
        ({"target_E": torch.ones(3)}, "3 target loads for 2 experts"),
        ({"target_E": torch.zeros(2)}, "negative or all zero"),
    ],
)
def test_a_wrong_request_is_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        bias.step(**{"bias_E": torch.zeros(2), "load_E": torch.tensor([1, 3]), **wrong})


@pytest.mark.parametrize("rule", bias.RULES)
def test_the_first_bias_leaves_the_selection_as_it_is(rule):
    score_TE = skewed(32)
    first = bias.initial(8, rule, torch.float64)
    assert torch.equal(top_k_of(score_TE, first, 2, rule), score_TE.topk(2).indices)


def test_a_constant_added_to_every_bias_changes_no_selection_and_no_dual_value():
    score_TE, bias_E = skewed(64), torch.randn(8, generator=torch.Generator().manual_seed(1)).double() / 4
    assert torch.equal(top_k_of(score_TE, bias_E, 2), top_k_of(score_TE, bias_E + 0.375, 2))
    torch.testing.assert_close(dual_value(score_TE, bias_E, 2), dual_value(score_TE, bias_E + 0.375, 2))


def test_the_centred_rule_routes_as_the_sign_rule_does():
    plain, centred = (follow(skewed(128), 2, rule, 1e-2, 100) for rule in ("sign", "centred"))
    assert torch.equal(plain.load_E, centred.load_E)
    assert float(centred.bias_E.sum()) == pytest.approx(0, abs=1e-12)
    assert abs(float(plain.bias_E.sum())) > 0.1


# ---- one batch of scores, again and again ----


@pytest.mark.parametrize("k", [1, 2])
def test_sign_steps_balance_skewed_scores(k):
    trace = follow(skewed(), k, "sign", 1e-3, 4000)
    assert trace.max_vio_S[0] > 1
    assert trace.max_vio_S[-1] < 0.1


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("rule", "u", "schedule"), [("proportional", 1e-5, "constant"), ("proportional", 1e-2, "1/n"), ("sign", 0.1, "1/n")]
)
def test_small_and_falling_steps_end_within_one_assignment_of_balance(rule, u, schedule, k):
    trace = follow(skewed(), k, rule, u, 1500, schedule=schedule)
    assert trace.deviation_S[-1] <= 1


def test_the_multiplicative_rule_balances_too():
    score_TE, bias_E = skewed(), bias.initial(8, "multiplicative", torch.float64)
    for _ in range(1200):
        load_E = count(top_k_of(score_TE, bias_E, 2, "multiplicative"), 8)
        bias_E = bias.step(bias_E, load_E, "multiplicative", 1e-3)
    assert load_figures(load_E).max_vio < 0.1


def test_uneven_targets_are_reached():
    target = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 2])
    trace = follow(skewed(), 2, "sign", 2e-3, 1000, target_E=target)
    assert load_figures(trace.load_E, target).max_vio < 0.1


@pytest.mark.parametrize("rule", ADDITIVE)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_token_moves_against_the_preference_rule(rule, k):
    trace = follow(skewed(256, seed=k), k, rule, 1e-4 if rule == "proportional" else 3e-3, 400)
    assert trace.moved > 100
    assert trace.disobedient == 0


def test_a_move_against_the_preference_rule_is_noticed():
    move_EE = moves(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 2], [1, 2]]), 3)
    assert move_EE.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert disobedient(move_EE, torch.tensor([0.1, 0.1, 0.1])) == 0
    assert disobedient(move_EE, torch.tensor([-0.1, 0.1, 0.0])) == 1


def test_tokens_that_move_under_a_sign_step_had_a_margin_of_at_most_two_u():
    score_TE, u = skewed(), 5e-3
    before_TK = top_k_of(score_TE, torch.zeros(8).double(), 1)
    bias_E = bias.step(torch.zeros(8).double(), count(before_TK, 8), "sign", u)
    after_TK = top_k_of(score_TE, bias_E, 1)
    margin_T = (score_TE.gather(1, before_TK) - score_TE.gather(1, after_TK))[before_TK != after_TK]
    assert len(margin_T) > 0
    assert float(margin_T.max()) <= 2 * u + 1e-12


@pytest.mark.parametrize("rule", ADDITIVE)
@pytest.mark.parametrize("k", [1, 2])
def test_the_dual_rises_only_where_experts_change_sides_and_by_no_more_than_the_bound(rule, k):
    trace = follow(skewed(256), k, rule, 1e-3, 1000)
    rises = trace.rise_S > 1e-9
    assert rises.sum() > 50
    assert (trace.flip_bound_S[rises] > 0).all()
    assert (trace.rise_S <= trace.bound_S + 1e-9).all()
    assert (trace.bound_S <= trace.flip_bound_S + 1e-9).all()


def test_the_part_of_the_bound_due_to_changes_of_sides_is_its_positive_part_and_centring_does_not_change_it():
    plain, centred = (follow(skewed(128), 2, rule, 1e-2, 200) for rule in ("sign", "centred"))
    assert (plain.flip_bound_S >= 0).all()
    assert (plain.flip_bound_S > plain.bound_S).any()
    torch.testing.assert_close(plain.flip_bound_S, centred.flip_bound_S)


def test_under_small_proportional_steps_the_dual_falls_until_balance():
    trace = follow(skewed(), 2, "proportional", 1e-5, 1500)
    far = trace.deviation_S > 1
    assert trace.deviation_S[-1] == 0
    assert (trace.rise_S[far] <= 1e-9).all()


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 5), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_no_step_in_any_direction_lifts_the_dual_above_the_bound(seed, tokens, experts, length):
    generator = torch.Generator().manual_seed(seed)
    score_TE, bias_E, delta_E = (torch.randn(*s, experts, generator=generator).double() for s in ((tokens,), (), ()))
    k, after_E = max(1, experts // 2), bias_E + length * delta_E
    rise = dual_value(score_TE, after_E, k) - dual_value(score_TE, bias_E, k)
    wanted_E = torch.full((experts,), tokens * k / experts, dtype=torch.float64)
    assert float(rise) <= float(rise_bound(loads(score_TE, after_E, k), wanted_E, after_E - bias_E)) + 1e-9


def test_the_subgradient_is_the_slope_of_the_dual():
    score_TE, bias_E = skewed(64), torch.linspace(-0.2, 0.1, 8).double().requires_grad_()
    (slope_E,) = torch.autograd.grad(dual_value(score_TE, bias_E, 2), bias_E)
    torch.testing.assert_close(slope_E, subgradient(score_TE, bias_E.detach(), 2))


# ---- the linear program ----


@given(st.integers(0, 10**6), st.integers(2, 10), st.integers(2, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_the_least_dual_value_is_the_best_balanced_assignment(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts - 1))
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(tokens, experts, generator=generator).double()
    best = optimum(score_TE, k)
    assert float(dual_value(score_TE, best.bias_E, k)) == pytest.approx(best.value, abs=1e-7)
    elsewhere_E = best.bias_E + torch.randn(experts, generator=generator).double() / 4
    assert float(dual_value(score_TE, elsewhere_E, k)) >= best.value - 1e-7
    torch.testing.assert_close(best.share_TE.sum(1), torch.full((tokens,), float(k)).double())
    torch.testing.assert_close(best.share_TE.sum(0), torch.full((experts,), tokens * k / experts).double())


def test_the_least_dual_value_meets_uneven_targets():
    target = torch.tensor([3.0, 1, 1, 1])
    best = optimum(skewed(24, 4), 1, target)
    assert best.share_TE.sum(0).tolist() == pytest.approx([12, 4, 4, 4])
    assert float(dual_value(skewed(24, 4), best.bias_E, 1, target)) == pytest.approx(best.value, abs=1e-9)


def test_a_target_above_all_tokens_is_refused():
    with pytest.raises(UsageError, match="cannot get 18 of 10 tokens"):
        optimum(skewed(10, 4), 2, torch.tensor([9.0, 1, 0, 0]))


def test_the_gap_to_the_best_balanced_assignment_shrinks_to_nothing():
    score_TE = skewed(256)
    best = optimum(score_TE, 2).value
    gap_S = follow(score_TE, 2, "sign", 0.1, 3000, schedule="1/n").dual_S - best
    assert (gap_S >= -1e-7).all()
    assert float(gap_S[0]) > 10
    assert float(gap_S[-1]) < 1e-3


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tokens", [32, 128, 512])
def test_at_the_best_prices_loads_are_off_by_fewer_assignments_than_experts_whatever_the_batch(tokens, k):
    for seed in range(3):
        score_TE = skewed(tokens, 6, seed)
        assert float(subgradient(score_TE, optimum(score_TE, k).bias_E, k).abs().max()) <= 5


# ---- new batches ----


@pytest.mark.parametrize("k", [1, 2])
def test_the_expected_dual_is_the_mean_over_many_tokens(k):
    scores = GumbelScores(torch.linspace(-1, 1, 5).double(), k)
    sample_TE = scores.draw(1, 100_000, torch.Generator().manual_seed(0))[0]
    bias_E = torch.tensor([0.5, -0.3, 0.0, 0.2, -0.9]).double()
    measured = (dual_value(sample_TE, bias_E, k) - dual_value(sample_TE, scores.best(), k)) / len(sample_TE)
    assert float(scores.excess(bias_E)) == pytest.approx(float(measured), abs=0.01)
    assert float(scores.excess(scores.best() + 3)) == pytest.approx(0, abs=1e-12)


def test_the_expected_dual_curves_by_one_over_the_experts_at_top_1():
    assert GumbelScores(torch.linspace(-1, 1, 5).double()).modulus() == pytest.approx(1 / 5)


@pytest.mark.parametrize(("schedule", "part", "grows"), [("1/n", 1, 0), ("1/sqrt(n)", 1, 0.5), ("constant", 0.1, 1)])
def test_regret_grows_as_the_schedule_says(schedule, part, grows):
    scores = GumbelScores(torch.linspace(-1.5, 1.5, 8).double())
    excess_RN = excess_of_runs(
        scores, "proportional", part / scores.modulus(), 2048, tokens=32, runs=16, schedule=schedule
    )
    assert growth(regret(excess_RN).mean(0), 128) == pytest.approx(grows, abs=0.2)


def test_the_noise_floor_of_a_constant_step_is_proportional_to_it():
    scores = GumbelScores(torch.linspace(-1, 1, 8).double())
    floors = [float(excess_of_runs(scores, "sign", u, 1000, tokens=32, runs=16)[:, 500:].mean()) for u in (0.02, 0.04)]
    assert floors[1] / floors[0] == pytest.approx(2, rel=0.2)


def test_growth_of_known_regrets():
    n = torch.arange(1, 4097, dtype=torch.float64)
    assert growth(7 + n.log(), 64) == pytest.approx(0, abs=1e-9)
    assert growth(7 + n.sqrt(), 64) == pytest.approx(0.5)
    assert growth(7 + 3 * n, 64) == pytest.approx(1)


def test_too_short_a_run_has_no_growth():
    with pytest.raises(UsageError, match="no two doublings"):
        growth(torch.ones(100), 64)


@pytest.mark.parametrize("call", [lambda: follow(skewed(8), 1, "multiplicative"), lambda: excess_of_runs(
    GumbelScores(torch.zeros(3)), "multiplicative", 0.1, 2, tokens=4)])  # fmt: skip
def test_the_multiplicative_rule_has_no_dual(call):
    with pytest.raises(UsageError, match="no dual value"):
        call()


def test_gumbel_scores_of_many_experts_per_token_are_refused():
    with pytest.raises(UsageError, match="1 or 2"):
        GumbelScores(torch.zeros(8), 3)
