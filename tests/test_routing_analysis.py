"""Measures of routing, on numbers small enough to know the answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calls import right_padded
from coterie.analysis.routing import (
    dropped,
    expert_similarity,
    fluctuation,
    gate_entropy,
    inner_balance,
    load_entropy,
    mutual_information,
    outer_balance,
    routed,
    router_gradients,
)
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import put_routers
from coterie.errors import DataError, ModelError, UsageError
from coterie.routing.base import Routing
from families import tiny, tokens


def routing(probability: Any, index: Any = None, mask: Any = None, kept: Any = None) -> Routing:
    p_TN = torch.tensor(probability, dtype=torch.float32)
    index_TK = p_TN.topk(2, dim=-1).indices if index is None else torch.tensor(index)
    weight_TK = torch.cat([p_TN, p_TN.new_zeros(len(p_TN), 1)], 1).gather(1, index_TK)
    mask_T = None if mask is None else torch.tensor(mask)
    kept_TK = None if kept is None else torch.tensor(kept)
    return Routing(p_TN.log(), p_TN, index_TK, weight_TK, p_TN.shape[1], "raw", mask_T, kept_TK)


def test_entropies_are_those_of_the_distributions() -> None:
    r = routing([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], index=[[0, 1], [0, 3]])
    assert gate_entropy(r) == pytest.approx(math.log(2) / 2)
    assert load_entropy(r) == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))


def test_balances_are_the_medians_of_the_paper() -> None:
    r = routing([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.8, 0.1, 0.1]])
    assert inner_balance(r) == pytest.approx(2.0)
    assert outer_balance(r) == pytest.approx(0.9)


@pytest.mark.parametrize("measure", [gate_entropy, load_entropy, inner_balance, outer_balance, dropped])
def test_padding_does_not_count(measure: Any) -> None:
    rows, kept = [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.34, 0.33, 0.33]], [[True, False], [True, True], [False, False]]
    assert measure(routing(rows, mask=[True, True, False], kept=kept)) == measure(routing(rows[:2], kept=kept[:2]))


def test_fluctuation_counts_first_choices_and_sets() -> None:
    before = routing([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.6, 0.4, 0.0]])
    after = routing([[0.4, 0.6, 0.0], [0.6, 0.0, 0.4], [0.6, 0.4, 0.0]])
    found = fluctuation(before, after)
    assert found.first == pytest.approx(1 / 3)
    assert found.sets == pytest.approx((0 + (1 - 1 / 3) + 0) / 3)
    assert fluctuation(before, before) == (0, 0)


def test_no_expert_is_no_member_of_a_set() -> None:
    one = routing([[0.6, 0.4]], index=[[0, 2]])
    two = routing([[0.6, 0.4]], index=[[0, 1]])
    assert fluctuation(one, two).sets == pytest.approx(0.5)


def test_routes_of_different_texts_are_not_compared() -> None:
    with pytest.raises(DataError, match="2 and of 1 tokens"):
        fluctuation(routing([[0.6, 0.4]] * 2), routing([[0.6, 0.4]]))


def test_a_layer_that_repeats_another_tells_its_whole_entropy() -> None:
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    swapped = [[row[1], row[0], row[2]] for row in rows]
    found = mutual_information({3: routing(rows), 5: routing(swapped)})
    wanted = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    torch.testing.assert_close(found, torch.full((2, 2), wanted, dtype=torch.float64))


def test_a_constant_gate_tells_nothing() -> None:
    found = mutual_information({0: routing([[0.7, 0.3]] * 3), 1: routing([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])})
    assert float(found[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(found[1, 1]) > 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_mutual_information_is_symmetric_not_negative_and_bounded(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = {i: routing(torch.rand(9, 4, generator=generator).softmax(-1).tolist()) for i in range(3)}
    for of in ("probability", "choice"):
        found = mutual_information(layers, of)
        assert torch.equal(found, found.T)
        assert float(found.min()) > -1e-12
        assert float(found.max()) <= math.log(4)
    with pytest.raises(UsageError, match="'rank'"):
        mutual_information(layers, "rank")  # type: ignore[arg-type]


def test_all_batches_of_a_model_are_joined_without_their_padding() -> None:
    model = tiny("mixtral")
    put_routers(model, "top-k")
    ids = tokens(3, 10)
    mask = right_padded(ids, (0, 4, 2))
    seen = routed(model, [{"input_ids": ids, "attention_mask": mask}, tokens(1, 5)])
    assert sorted(seen) == [0, 1, 2]
    assert all(r.index_TK.shape[0] == 24 + 5 and r.mask_T is None for r in seen.values())
    alone = routed(model, [ids[1:2, :6]])
    torch.testing.assert_close(seen[2].probability_TN[10:16], alone[2].probability_TN, atol=1e-5, rtol=1e-4)


def test_a_model_with_only_its_own_routers_is_refused() -> None:
    with pytest.raises(ModelError, match="keep no record"):
        routed(tiny("mixtral"), [tokens()])


def test_equal_experts_are_alike_and_random_ones_are_not() -> None:
    layer = moe_layers(tiny("mixtral"))[0]
    assert abs(expert_similarity(layer)) < 0.02
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert expert_similarity(layer) == pytest.approx(1, abs=1e-5)


def test_the_gradient_of_routers_is_told_by_part_of_the_loss() -> None:
    model = tiny("mixtral")
    put_routers(model, "rmoe", {"size": 8})
    parts = {"text": model(tokens(), labels=tokens(), use_cache=False).loss}
    parts["twice"] = 2 * parts["text"]
    found = router_gradients(model, parts)
    assert found["twice"] == pytest.approx(2 * found["text"], rel=1e-5)
    parts["text"].backward()
    routers = [p.grad for n, p in model.named_parameters() if ".gate." in n or "shared.rmoe" in n]
    total = torch.stack([g.square().sum() for g in routers]).sum()
    assert found["text"] == pytest.approx(float(total.sqrt()), rel=1e-4)
