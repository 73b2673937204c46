"""Capacity: nobody is dropped without need, nobody stays without a place, and where a token stands decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from calls import Rows
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import put_routers
from coterie.experts import forward
from coterie.routing.base import Routing
from coterie.routing.capacity import Capacity
from families import tiny

IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
SOME = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")


def routed(index_TK: Tensor, experts: int, weight_TK: Tensor | None = None, mask_T: Tensor | None = None) -> Routing:
    probability = torch.full((len(index_TK), experts), 1 / experts)
    weight_TK = torch.ones(index_TK.shape) if weight_TK is None else weight_TK
    return Routing(probability, probability, index_TK, weight_TK, experts, "raw", mask_T)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 3), st.floats(0.1, 3.0), st.sampled_from(["random", "position", "probability"]),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_a_capacity_is_never_exceeded_and_never_left_unused(
    tokens: int, slots_: int, factor: float, policy: Any, training: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, 6, generator=generator).pow(torch.arange(1, 7) / 2).topk(slots_).indices
    index[:, -1].masked_fill_(torch.rand(tokens, generator=generator) < 0.2, 6)
    mask = torch.rand(tokens, generator=generator) < 0.8
    capacity = Capacity(factor=factor, eval_factor=factor, policy=policy, minimum=1)
    routing = routed(index, 6, torch.rand(tokens, slots_, generator=generator), mask)
    kept = capacity.kept(routing, training=training)
    filled = (index[mask] < 6).sum()
    size = capacity.size(int(filled), 6, training=training)
    wanted = torch.bincount(index[mask].flatten(), minlength=7)[:6]
    got = torch.bincount(index[kept], minlength=7)
    assert torch.equal(got[:6], wanted.clamp(max=size))
    assert got[6] == 0
    assert not kept[~mask].any()


def test_random_token_selection_keeps_every_position_alike() -> None:
    index = torch.zeros(40, 1, dtype=torch.long)
    capacity = Capacity(factor=1.0, minimum=10)  # 40 tokens, 4 experts: 10 of expert 0's 40
    torch.manual_seed(0)
    kept = sum(capacity.kept(routed(index, 4), training=True)[:, 0].long() for _ in range(1000))
    assert isinstance(kept, Tensor)
    assert int(kept.sum()) == 10_000
    assert chisquare(kept).pvalue > 1e-3
    first = sum(capacity.kept(routed(index, 4), training=False)[:, 0].long() for _ in range(10))
    assert isinstance(first, Tensor)
    assert first.tolist() == [10] * 20 + [0] * 20  # in use by position, at twice the factor


def test_experts_with_room_lose_nobody() -> None:
    index = torch.tensor([0] * 12 + [1] * 4 + [2] * 4)[:, None]
    for seed in range(20):
        torch.manual_seed(seed)
        kept = Capacity(factor=1.0, minimum=1).kept(routed(index, 4), training=True)[:, 0]
        assert kept[12:].all()
        assert kept[:12].sum() == 5


@pytest.mark.parametrize("policy", ["random", "position"])
def test_second_choices_queue_behind_all_first_ones(policy: Any) -> None:
    index = torch.tensor([[1, 0]] * 6 + [[0, 1]] * 6)
    for seed in range(10):
        torch.manual_seed(seed)
        kept = Capacity(factor=1.0, minimum=1, policy=policy).kept(routed(index, 4), training=True)  # 6 places each
        assert kept[:, 0].all()
        assert not kept[:, 1].any()


def test_by_probability_the_surest_tokens_stay() -> None:
    weight = torch.rand(24, 1, generator=torch.Generator().manual_seed(0))
    index = torch.zeros(24, 1, dtype=torch.long)
    capacity = Capacity(factor=1.0, minimum=1, policy="probability")
    kept = capacity.kept(routed(index, 4, weight), training=True)[:, 0]
    assert set(kept.nonzero().flatten().tolist()) == set(weight[:, 0].topk(6).indices.tolist())


@pytest.mark.parametrize(("factor", "size"), [(1.0, 8), (1.25, 10), (0.01, 4)])
def test_the_size_of_a_capacity_is_the_papers(factor: float, size: int) -> None:
    assert Capacity(factor=factor).size(60, 8, training=True) == size
    assert Capacity(eval_factor=2.0).size(60, 8, training=False) == 15


@pytest.mark.parametrize("family", SOME)
def test_dropped_slots_cost_nothing_and_the_model_in_use_repeats_itself(family: str) -> None:
    model = tiny(family)
    put_routers(model, "top-k", {"capacity": {"factor": 0.5, "eval_factor": 0.5, "minimum": 1}})
    model.set_experts_implementation(forward.NAME)
    layer, rows, seen = moe_layers(model)[0], Rows(), []
    router: Any = layer.router
    router.watch = seen.append
    with torch.no_grad(), forward.observe(layer.experts, rows):
        first = model(IDS).logits
    assert (
        rows.rows
        == int(seen[0].kept_TK.sum())
        <= layer.num_experts * (-(-IDS.numel() * layer.top_k // (2 * layer.num_experts)))
    )
    assert rows.rows < IDS.numel() * layer.top_k
    assert int(seen[0].load_N().sum()) == IDS.numel() * layer.top_k  # what was picked, before any was dropped
    assert torch.equal(model(IDS).logits, first)


def test_null_experts_take_no_capacity() -> None:
    index = torch.tensor([[0, 4], [5, 4], [4, 0], [5, 1]])
    roomy, tight = (Capacity(factor=factor, minimum=1, policy="position") for factor in (2.0, 1.0))
    assert torch.equal(roomy.kept(routed(index, 4), training=True), index < 4)  # 3 slots for 4 experts: 2 places each
    assert tight.kept(routed(index, 4), training=True).sum() == 2  # 1 place each


def test_what_was_dropped_is_no_expert() -> None:
    index = torch.zeros(8, 1, dtype=torch.long)
    routing = routed(index, 4)
    routing.kept_TK = Capacity(factor=1.0, minimum=1, policy="position").kept(routing, training=True)
    assert routing.expert_TK.flatten().tolist() == [0, 0, 4, 4, 4, 4, 4, 4]
    assert routing.load_N().tolist() == [8, 0, 0, 0]
