"""Balancing terms: their values where the papers give them, what carries a gradient, and what they do not look at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.anatomy import moe_layers
from coterie.anatomy.routers import placed_routers, put_routers
from coterie.balancing.base import Balance, Term, terms
from coterie.errors import UsageError
from coterie.routing.base import Routing, router_class
from coterie.routing.record import Record, listening, recording
from families import tiny

IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
SOME = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
# one of each name, and of each variant; all can be asked of 8 experts
TERMS: dict[str, dict[str, Any]] = {
    "switch": {"name": "switch"},
    "switch, tokens": {"name": "switch", "count": "tokens"},
    "switch, sequence": {"name": "switch", "scope": "sequence"},
    "switch, unbiased": {"name": "switch", "unbiased": True},
    "gshard": {"name": "gshard"},
    "z": {"name": "z"},
    "device": {"name": "device", "devices": 4},
    "communication": {"name": "communication", "devices": 4, "reach": 2},
    "mutual-information": {"name": "mutual-information"},
    "null": {"name": "null"},
    "entropy": {"name": "entropy"},
}
each_term = pytest.mark.parametrize("told", TERMS.values(), ids=TERMS.keys())


def made(name: str, **told: Any) -> Term:
    return Balance.of([{"name": name, **told}]).parts[0]


def value(part: Term, routing: Routing, record: Record | None = None) -> Tensor:
    found = part.of(routing, record or Record(shape=(1, len(routing.index_TK))))
    assert found is not None
    return found


def routed(index_TK: Tensor, logits_TN: Tensor, experts: int = 8, mask_T: Tensor | None = None) -> Routing:
    probability = logits_TN.softmax(-1)
    real = torch.cat([probability, torch.zeros_like(probability[:, :1])], -1)
    return Routing(logits_TN, probability, index_TK, real.gather(-1, index_TK), experts, "raw", mask_T)


def random(tokens: int = 24, outputs: int = 8, top_k: int = 2, experts: int = 8, seed: int = 0) -> Routing:
    logits = torch.randn(tokens, outputs, generator=torch.Generator().manual_seed(seed)) * 2
    return routed(logits.topk(top_k).indices, logits, experts)


def balanced(top_k: int = 1, outputs: int = 8, experts: int = 8) -> Routing:
    """Every output is picked as often, and all probabilities are equal."""
    index = (torch.arange(outputs)[:, None] + torch.arange(top_k)) % outputs
    return routed(index, torch.zeros(outputs, outputs), experts)


def collapsed(top_k: int = 1, outputs: int = 8, tokens: int = 10) -> Routing:
    """All tokens are sure of the same k outputs."""
    logits = torch.full((tokens, outputs), -200.0)
    logits[:, :top_k] = 0
    return routed(torch.arange(top_k).expand(tokens, top_k), logits, outputs)


def sure(outputs: int = 8) -> Routing:
    """Every token is sure of its one output, all outputs are picked as often."""
    return routed(torch.arange(outputs)[:, None], torch.eye(outputs) * 400, outputs)


def test_there_are_these_terms() -> None:
    assert {told["name"] for told in TERMS.values()} | {"router"} == set(terms())


# -- what holds for all ------------------------------------------------------------------------------------------------


@each_term
def test_padding_is_not_counted(told: dict[str, Any]) -> None:
    part, real, junk = Balance.of([told]).parts[0], random(seed=1), random(12, seed=2)
    joined = routed(
        torch.cat([junk.index_TK * 0, real.index_TK]),
        torch.cat([junk.logits_TN * 30, real.logits_TN]),
        mask_T=torch.cat([torch.zeros(12), torch.ones(24)]).bool(),
    )
    record = Record(shape=(3, 12))
    expected = value(part, real, Record(shape=(2, 12)))
    torch.testing.assert_close(value(part, joined, record), expected)
    joined.mask_T = None
    assert not torch.allclose(value(part, joined, record), expected)


@each_term
def test_the_order_of_tokens_is_not_looked_at(told: dict[str, Any]) -> None:
    if told.get("scope") == "sequence":
        pytest.skip("it asks which tokens make a sequence")
    part, routing = Balance.of([told]).parts[0], random()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other = routed(routing.index_TK[order], routing.logits_TN[order])
    torch.testing.assert_close(value(part, other), value(part, routing))


@each_term
def test_the_numbers_of_experts_are_not_looked_at(told: dict[str, Any]) -> None:
    part, routing = Balance.of([told]).parts[0], random()
    order = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])  # keeps neighbours on one device
    other = routed(order[routing.index_TK], routing.logits_TN[:, order])
    torch.testing.assert_close(value(part, other), value(part, routing))


@each_term
def test_what_a_capacity_drops_is_counted_all_the_same(told: dict[str, Any]) -> None:
    part, routing = Balance.of([told]).parts[0], random()
    before = value(part, routing)
    routing.kept_TK = torch.zeros_like(routing.index_TK, dtype=torch.bool)
    assert torch.equal(value(part, routing), before)


@each_term
@pytest.mark.parametrize("kind", ["top-k", "sigmoid", "adamoe", "top-p", "dts", "expert-choice"])
def test_every_term_trains_every_learning_router(kind: str, told: dict[str, Any]) -> None:
    cls = router_class(kind)
    torch.manual_seed(0)
    router: Any = cls(16, 8, cls.Settings())
    router.reset(0.3)
    record = Record(shape=(2, 12))
    with recording(record):
        router(torch.randn(24, 16))
    value(Balance.of([told]).parts[0], record.routings[0], record).backward()
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.any()


@pytest.mark.parametrize("family", SOME)
def test_a_model_in_training_has_its_loss_and_the_terms(family: str) -> None:
    model = tiny(family)
    put_routers(model, "top-k")
    told = [{"weight": 0.1 * (i + 1), **told} for i, told in enumerate(TERMS.values()) if told["name"] != "switch"]
    told.append({"weight": 0.5, "name": "switch", "scope": "sequence"})
    balance = Balance.of(told)
    plain = model(IDS, labels=IDS).loss
    balance.watch(model)
    assert torch.equal(model(IDS, labels=IDS).loss, plain)
    records: list[Record] = []
    with listening(model, records.append):
        loss = model.train()(IDS, labels=IDS).loss
    layers = list(records[0].routings.values())
    assert len(layers) == len(moe_layers(model))
    expected = plain + sum(
        part.weight * sum(value(part, layer, records[0]) for layer in layers) / len(layers) for part in balance.parts
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(router.weight.grad.isfinite().all() for router in placed_routers(model).values())


def test_a_schedule_scales_a_term_and_zero_leaves_the_loss() -> None:
    model = tiny("mixtral")
    put_routers(model, "adamoe", {"top_k": 3})
    plain = model(IDS, labels=IDS).loss
    balance = Balance.of([{"name": "null", "weight": 0.5}])
    balance.watch(model.train())
    for scale in (1.0, 0.25, 0.0):
        balance.scale["null"] = scale
        loss = model(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, plain + 0.5 * scale * balance.told["null"])


def test_checkpointing_counts_a_term_once() -> None:
    model = tiny("mixtral").train()
    put_routers(model, "top-k")
    Balance.of([{"name": "switch", "weight": 1.0}]).watch(model)
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.detach(), [router.weight.grad.clone() for router in placed_routers(model).values()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    record = Record(routings={0: collapsed(), 1: collapsed()})
    record.routings[1] = routed(7 - record.routings[0].index_TK, record.routings[0].logits_TN.flip(-1))
    balance = Balance.of([{"name": "switch", "weight": 1.0}])
    assert balance(record, torch.zeros(())).item() == pytest.approx(8.0)


# -- Switch and GShard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [4, 8, 16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_switch_is_one_in_balance_and_n_over_k_when_collapsed(top_k: int, outputs: int) -> None:
    assert value(made("switch"), balanced(top_k, outputs)).item() == pytest.approx(1.0)
    assert value(made("switch"), collapsed(top_k, outputs)).item() == pytest.approx(outputs / top_k)
    assert value(made("switch", count="tokens"), balanced(top_k, outputs)).item() == pytest.approx(top_k)
    assert value(made("switch", count="tokens"), collapsed(top_k, outputs)).item() == pytest.approx(outputs)


def test_switch_is_the_product_the_papers_write() -> None:
    routing = random(30, top_k=3)
    expected = 0.0
    for i in range(8):
        f = 8 / (3 * 30) * int((routing.index_TK == i).sum())
        expected += f * routing.probability_TN[:, i].mean().item()
    assert value(made("switch"), routing).item() == pytest.approx(expected, rel=1e-5)


def test_switch_with_sets_of_experts_is_one_in_balance_and_the_mean_size_by_tokens() -> None:
    index = torch.tensor([[0, 1, 2], [3, 4, 4], [4, 4, 4]])  # 4: none
    routing = routed(index, torch.zeros(3, 4), 4)
    assert value(made("switch"), routing).item() == pytest.approx(1.0)
    assert value(made("switch", count="tokens"), routing).item() == pytest.approx(4 / 3)


@pytest.mark.parametrize("name", ["switch", "gshard", "null"])
def test_counts_carry_no_gradient_and_probabilities_do(name: str) -> None:
    routing = random(top_k=1)
    logits = routing.logits_TN.clone().requires_grad_()
    routing.probability_TN = logits.softmax(-1)
    routing.probability_TN.retain_grad()
    value(made(name), routing).backward()
    share = torch.bincount(routing.index_TK[:, 0], minlength=8) / 24
    assert routing.probability_TN.grad is not None
    torch.testing.assert_close(routing.probability_TN.grad, (8 * share / 24).expand(24, 8))


def test_gshard_counts_first_choices_alone() -> None:
    routing = random(top_k=2)
    other = routed(routing.index_TK.clone(), routing.logits_TN)
    other.index_TK[:, 1] = 0
    assert torch.equal(value(made("gshard"), other), value(made("gshard"), routing))
    first = routed(routing.index_TK[:, :1], routing.logits_TN)
    torch.testing.assert_close(value(made("gshard"), routing), value(made("switch"), first))
    assert value(made("gshard"), balanced(2)).item() == pytest.approx(1.0)


def test_one_sequence_is_the_batch() -> None:
    routing = random()
    torch.testing.assert_close(value(made("switch", scope="sequence"), routing), value(made("switch"), routing))


def test_sequences_that_are_unbalanced_each_in_its_way_are_seen_by_sequence_alone() -> None:
    logits = torch.full((20, 2), -200.0)
    logits[:10, 0] = logits[10:, 1] = 0
    routing, record = routed(logits.argmax(-1, keepdim=True), logits, 2), Record(shape=(2, 10))
    assert value(made("switch"), routing, record).item() == pytest.approx(1.0)
    assert value(made("switch", scope="sequence"), routing, record).item() == pytest.approx(2.0)


def test_by_sequence_is_the_mean_over_sequences_without_empty_ones() -> None:
    routing, part = random(36), made("switch", scope="sequence")
    rows = [routed(routing.index_TK[i : i + 12], routing.logits_TN[i : i + 12]) for i in (0, 12, 24)]
    single = [value(part, row) for row in rows]
    record = Record(shape=(3, 12))
    torch.testing.assert_close(value(part, routing, record), torch.stack(single).mean())
    routing.mask_T = torch.ones(36, dtype=torch.bool)
    routing.mask_T[12:24] = False
    torch.testing.assert_close(value(part, routing, record), (single[0] + single[2]) / 2)


def test_packed_sequences_count_apart() -> None:
    routing, part = random(24), made("switch", scope="sequence")
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    pieces = [(0, 5), (5, 12), (12, 24)]
    single = [value(part, routed(routing.index_TK[a:b], routing.logits_TN[a:b])) for a, b in pieces]
    found = value(part, routing, Record(shape=(2, 12), segment_BL=segments))
    torch.testing.assert_close(found, torch.stack(single).mean())


def test_by_sequence_needs_sequences() -> None:
    with pytest.raises(UsageError, match="which of 24 tokens make a sequence"):
        value(made("switch", scope="sequence"), random(24), Record())


def test_unbiased_counts_are_those_of_the_scores_without_the_selection_bias() -> None:
    cls = router_class("sigmoid")
    torch.manual_seed(0)
    router: Any = cls(16, 8, cls.Settings())
    router.reset(0.3)
    x, found = torch.randn(40, 16), []
    for bias in (0.0, 5.0):
        router.e_score_correction_bias[0] = bias
        record = Record(shape=(1, 40))
        with recording(record):
            router(x)
        routing = record.routings[0]
        torch.testing.assert_close(routing.probability_TN.sum(-1), torch.ones(40))  # s / sum s
        found.append([value(made("switch", unbiased=u), routing).item() for u in (True, False)])
    assert found[0][0] == pytest.approx(found[0][1])
    assert found[1][0] == pytest.approx(found[0][0])
    assert abs(found[1][1] - found[0][1]) > 0.01


def test_training_on_the_switch_term_balances_a_router() -> None:
    cls = router_class("top-k")
    torch.manual_seed(0)
    router: Any = cls(16, 8, cls.Settings())
    router.reset(0.1)
    x = torch.randn(512, 16) + 1.0  # tokens have much in common
    optimizer, loads = torch.optim.Adam(router.parameters(), lr=0.02), []
    for _ in range(150):
        record = Record(shape=(1, 512))
        with recording(record):
            router(x)
        loads.append(record.routings[0].load_N().float().max() / 128)
        optimizer.zero_grad()
        value(made("switch"), record.routings[0]).backward()
        optimizer.step()
    assert loads[0] > 2.0
    assert loads[-1] < 1.3


# -- devices -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_device_for_each_expert_is_the_switch_term(seed: int, top_k: int) -> None:
    routing = random(top_k=top_k, seed=seed)
    torch.testing.assert_close(value(made("device", devices=8), routing), value(made("switch"), routing))


def test_one_device_is_constant_without_a_gradient() -> None:
    routing = random()
    logits = routing.logits_TN.clone().requires_grad_()
    routing.probability_TN = logits.softmax(-1)
    found = value(made("device", devices=1), routing)
    assert found.item() == pytest.approx(1.0)
    found.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


@pytest.mark.parametrize("devices", [2, 4])
def test_device_and_communication_terms_are_what_the_papers_write(devices: int) -> None:
    routing, size = random(30, top_k=3), 8 // devices
    device = communication = 0.0
    for d in range(devices):
        members = range(d * size, (d + 1) * size)
        f = sum(8 / (3 * 30) * int((routing.index_TK == i).sum()) for i in members) / size
        P = sum(routing.probability_TN[:, i].mean().item() for i in members)
        sent = sum(any(i // size == d for i in row) for row in routing.index_TK.tolist())
        device += f * P
        communication += devices / (2 * 30) * sent * P
    assert value(made("device", devices=devices), routing).item() == pytest.approx(device, rel=1e-5)
    found = value(made("communication", devices=devices, reach=2), routing)
    assert found.item() == pytest.approx(communication, rel=1e-5)


def test_communication_is_one_if_all_devices_receive_alike() -> None:
    index = torch.tensor([[0, 2], [2, 4], [4, 6], [6, 0]])  # two of four devices each
    routing = routed(index, torch.zeros(4, 8))
    assert value(made("communication", devices=4, reach=2), routing).item() == pytest.approx(1.0)
    same = routed(torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]), torch.zeros(4, 8))  # one of them is enough
    assert value(made("communication", devices=4, reach=2), same).item() == pytest.approx(0.5)


def test_null_experts_stand_on_no_device() -> None:
    index = torch.tensor([[0, 8], [2, 9], [4, 10], [6, 8]])
    logits = torch.zeros(4, 12)
    routing = routed(index, logits)
    assert value(made("communication", devices=4, reach=1), routing).item() == pytest.approx(8 / 12)
    assert value(made("device", devices=4), routing).item() == pytest.approx(4 * 12 / 8 / 2 * 8 / 12 / 4)


def test_devices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="8 experts cannot stand in 3 equal groups"):
        value(made("device", devices=3), random())
    with pytest.raises(UsageError, match="cannot reach 3 of 2 devices"):
        made("communication", devices=2, reach=3)


@pytest.mark.parametrize("used", [1, 2, 4])
def test_device_limited_routing_reaches_so_many_devices(used: int) -> None:
    cls = router_class("top-k")
    torch.manual_seed(0)
    limited: Any = cls(16, 16, cls.Settings(top_k=4, groups=4, groups_used=used))
    limited.reset(0.3)
    plain: Any = cls(16, 16, cls.Settings(top_k=4))
    plain.load_state_dict(limited.state_dict())
    x = torch.randn(200, 16)
    index = limited(x)[2]
    reached = torch.tensor([len({e // 4 for e in row}) for row in index.tolist()])
    assert reached.max() == used
    best = (x @ limited.weight.T).view(200, 4, 4).amax(-1).topk(used).indices
    assert all({e // 4 for e in row} <= set(groups) for row, groups in zip(index.tolist(), best.tolist()))
    assert torch.equal(index, plain(x)[2]) == (used == 4)


# -- z, mutual information, entropy ------------------------------------------------------------------------------------


def test_z_is_the_squared_log_of_the_softmaxes_denominator() -> None:
    part = made("z")
    assert value(part, balanced()).item() == pytest.approx(math.log(8) ** 2)
    assert value(part, routed(torch.zeros(3, 1).long(), torch.full((3, 8), 5.0))).item() == pytest.approx(
        (math.log(8) + 5) ** 2
    )


def test_mutual_information_is_least_where_every_token_is_sure_and_all_experts_are_used() -> None:
    part = made("mutual-information")
    assert value(part, sure()).item() == pytest.approx(-math.log(8))
    assert value(part, balanced()).item() == pytest.approx(0.0, abs=1e-6)
    assert value(part, collapsed()).item() == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 50.0))
def test_mutual_information_stays_within_its_bounds(seed: int, spread: float) -> None:
    routing = random(seed=seed)
    routing.probability_TN = (routing.logits_TN * spread).softmax(-1)
    assert -math.log(8) - 1e-5 <= value(made("mutual-information"), routing).item() <= 1e-5


def test_mutual_information_learns_through_both_entropies() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + torch.arange(8) * 0.2
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        value(made("mutual-information"), routed(logits.topk(1).indices, logits)).backward()
        optimizer.step()
    probability = logits.softmax(-1)
    assert probability.max(-1).values.min() > 0.95
    assert torch.bincount(logits.argmax(-1), minlength=8).min() > 0
    assert value(made("mutual-information"), routed(logits.topk(1).indices, logits)).item() < -0.9 * math.log(8)


def test_entropy_is_log_n_to_0_and_never_without_a_gradient() -> None:
    assert value(made("entropy"), balanced()).item() == pytest.approx(math.log(8))
    assert value(made("entropy"), sure()).item() == pytest.approx(0.0, abs=1e-6)
    logits = (torch.eye(8) * 400).requires_grad_()
    value(made("entropy"), routed(torch.arange(8)[:, None], logits)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_entropy_term_is_the_one_top_p_keeps() -> None:
    model = tiny("mixtral").train()
    put_routers(model, "top-p")
    balance = Balance.of([{"name": "entropy"}, {"name": "router", "key": "entropy"}])
    balance.watch(model)
    model(IDS, labels=IDS).loss.backward()
    assert set(balance.told) == {"entropy", "router.entropy"}
    assert balance.told["entropy"] == pytest.approx(balance.told["router.entropy"], rel=1e-5)


# -- null experts ------------------------------------------------------------------------------------------------------


def test_null_experts_are_one_bucket() -> None:
    part, routing = made("null"), random(40, outputs=12, top_k=3)
    swap = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 8, 9, 12])
    other = routed(swap[routing.index_TK], routing.logits_TN)
    assert not torch.equal(other.load_N(), routing.load_N())
    torch.testing.assert_close(value(part, other), value(part, routing))
    assert not torch.allclose(value(made("switch"), other), value(made("switch"), routing))
    logits = routing.logits_TN.clone().requires_grad_()
    routing.probability_TN = logits.softmax(-1)
    routing.probability_TN.retain_grad()
    value(part, routing).backward()
    assert routing.probability_TN.grad is not None
    on_nulls = routing.probability_TN.grad[:, 8:]
    assert torch.equal(on_nulls, on_nulls[:, :1].expand_as(on_nulls))  # it depends on their mass alone


@pytest.mark.parametrize("nulls", [0, 1])
def test_up_to_one_null_is_the_plain_loss(nulls: int) -> None:
    routing = random(40, outputs=8 + nulls, top_k=3)
    torch.testing.assert_close(value(made("null"), routing), value(made("switch", count="tokens"), routing))
    torch.testing.assert_close(value(made("null"), routing), 3 * value(made("switch"), routing))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_null_term_is_k_in_balance(top_k: int) -> None:
    assert value(made("null"), balanced(top_k, outputs=12)).item() == pytest.approx(top_k)


# -- routers' own terms, and settings ----------------------------------------------------------------------------------


def test_a_routers_own_term_is_weighted_where_there_is_one() -> None:
    model = tiny("mixtral").train()
    put_routers(model, "dts", {"tau": 1.0}, layers=[0, 2])
    put_routers(model, "top-k", layers=[1])
    records: list[Record] = []
    balance = Balance.of([{"name": "router", "key": "balance", "weight": 0.5}, {"name": "router", "key": "no such"}])
    torch.manual_seed(0)
    plain = model(IDS, labels=IDS).loss
    balance.watch(model)
    torch.manual_seed(0)
    with listening(model, records.append):
        loss = model(IDS, labels=IDS).loss
    own = [records[0].routings[layer].terms["balance"] for layer in (0, 2)]
    torch.testing.assert_close(loss, plain + 0.5 * (own[0] + own[1]) / 2)
    assert set(balance.told) == {"router.balance"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "swich"}, "no balancing term 'swich'"),
        ({"name": "switch", "weight": -1}, "weight"),
        ({"name": "router"}, "key"),
        ({"name": "z", "scope": "batch"}, "scope"),
    ],
)
def test_terms_that_cannot_be_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Balance.of([entry])
