"""Mixtures for feature vectors and images: what they compute, exactly, and that the toolkit's parts work in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.architectures.mixtures import DenseExperts, ImageMixture, Mixture, PairEmbedding, Task, weighted
from coterie.balancing.base import Balance
from coterie.errors import UsageError
from coterie.routing.permuted import Permuted
from coterie.routing.record import Record, listening

TASKS = {"watch": Task(weight=0.1), "rating": Task(kind="regression", weight=0.9)}
ROUTERS: dict[str, dict[str, Any]] = {
    "top-k": {"kind": "top-k", "combine": "renormalised"},
    "comet": {"kind": "comet"},
    "dselect-k": {"kind": "dselect-k"},
    "hash": {"kind": "hash", "vocabulary": 9},
    "adamoe": {"kind": "adamoe", "top_k": 3, "nulls": 3},
    "permuted": {"kind": "permuted", "inner": {"kind": "comet"}, "search": 0.5},
}
RULES: dict[str, dict[str, Any]] = {
    "heavy-ball": {"mu": 0.7},
    "adam": {"rule": "adam", "mu": 0.7},
    "robust": {"rule": "robust"},
}


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(router: str = "top-k", **more: Any) -> Any:
    torch.manual_seed(0)
    return Mixture(12, TASKS, router=ROUTERS[router], **{"experts": 6, "width": 10, "head": 8, **more}).eval()


def picture(**more: Any) -> Any:
    torch.manual_seed(0)
    told = {"router": ROUTERS["top-k"], "hidden": 16, "layers": 3, "experts": 4, "width": 8, **more}
    return ImageMixture(8, 2, 10, **told).eval()


X, IDS = numbers(20, 12), torch.arange(20)[:, None]
LABELS = {"watch": (X[:, 0] > 0).long(), "rating": X[:, 1]}
PIXELS, DIGITS = numbers(5, 1, 8, 8), torch.arange(5)


@pytest.mark.parametrize("outputs", [0, 7])
def test_experts_evaluated_one_by_one_and_all_at_once_are_equal(outputs: int) -> None:
    torch.manual_seed(0)
    experts = DenseExperts(12, 10, 6, outputs=outputs)
    index = torch.randint(0, 7, (20, 2), generator=torch.Generator().manual_seed(2))  # 6 is no expert
    weight = numbers(20, 2).masked_fill(index == 6, 0.0)
    dense, sparse = weighted(experts.all(X), index, weight), experts(X, index, weight)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    hand = torch.zeros(20, experts.outputs)
    for t in range(20):
        for expert, w in zip(index[t].tolist(), weight[t], strict=True):
            if expert < 6:
                hand[t] += w * experts.one(expert, X[t : t + 1])[0]
    torch.testing.assert_close(sparse, hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_each_task_has_its_own_router_over_shared_experts(router: str) -> None:
    model, seen = mixture(router), []
    with listening(model, seen.append):
        out = model(X, input_ids=IDS, labels=LABELS)
    assert sorted(seen[0].routings) == [0, 1]
    for number, name in enumerate(TASKS):
        routing = seen[0].routings[number]
        y_TO = weighted(model.experts.all(X), routing.expert_TK, routing.weight_TK * (routing.index_TK < 6))
        torch.testing.assert_close(out.told[name], model.heads[name](y_TO), atol=1e-5, rtol=1e-4)
    loss = sum(task.weight * task.loss(out.told[name], LABELS[name]) for name, task in TASKS.items())
    torch.testing.assert_close(out.loss, loss)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_reaches_all_that_learns(router: str) -> None:
    model = mixture(router).train()
    model.at(0, 10)
    model(X, input_ids=IDS, labels=LABELS).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert without == set()


def test_a_term_of_the_routers_reaches_the_loss() -> None:
    model = mixture("comet").train()
    plain = model(X, labels=LABELS).loss.item()
    balance = Balance.of([{"name": "router", "key": "entropy", "weight": 0.5}])
    balance.watch(model)
    assert model(X, labels=LABELS).loss.item() == pytest.approx(plain + 0.5 * balance.told["router.entropy"], rel=1e-4)


def test_tasks_share_one_permutation_and_folding_it_changes_nothing() -> None:
    model = mixture("permuted")
    assert isinstance(model.gates[0], Permuted)
    assert model.gates[0].permutation is model.gates[1].permutation
    model.at(10, 10)
    before = model(X).told
    assert model.gates[0].permutation.nearest().tolist() != list(range(6))
    model.fold()
    assert not any("permutation" in name for name in model.state_dict())
    for name, told in model(X).told.items():
        torch.testing.assert_close(told, before[name], atol=1e-6, rtol=1e-5)


def test_a_recommender_looks_users_and_items_up() -> None:
    torch.manual_seed(0)
    bottom = PairEmbedding([5, 7], 6)
    model = Mixture(bottom.features, TASKS, router=ROUTERS["hash"], experts=6, width=4, head=0, bottom=bottom)
    ids = torch.tensor([[1, 2], [4, 6]])
    assert model(ids, input_ids=ids[:, :1]).told["rating"].shape == (2, 1)
    torch.testing.assert_close(bottom(ids)[0], torch.cat([bottom.tables[0].weight[1], bottom.tables[1].weight[2]]))


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "hash"])
@pytest.mark.parametrize("rule", [None, *RULES])
def test_images_of_a_batch_do_not_know_each_other_and_two_calls_are_equal(router: str, rule: str | None) -> None:
    model = picture(router=ROUTERS[router], residual=RULES.get(rule or ""))
    whole = model(PIXELS).told["classes"]
    assert torch.equal(model(PIXELS).told["classes"], whole)
    torch.testing.assert_close(model(PIXELS[2:3]).told["classes"], whole[2:3], atol=1e-5, rtol=1e-4)


def test_no_momentum_is_the_plain_model_bit_for_bit() -> None:
    plain = picture()(PIXELS).told["classes"]
    assert torch.equal(picture(residual={"mu": 0.0, "gamma": 1.0})(PIXELS).told["classes"], plain)
    for rule in RULES.values():
        assert not torch.allclose(picture(residual=rule)(PIXELS).told["classes"], plain, atol=1e-4)


def test_heavy_ball_adds_earlier_layers_again() -> None:
    model, outputs = picture(residual={"mu": 0.5}), []
    for layer in model.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
        torch.nn.init.zeros_(layer.attention.out_proj.bias)
        layer.block.experts.register_forward_hook(lambda m, a, y: outputs.append(y))
    streams: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda m, a: streams.append(a[0]))
    model(PIXELS)
    u0, u1, u2 = (y.view(5, 16, 16) for y in outputs)
    start = model.embed(PIXELS).flatten(2).mT + model.positions
    expected = start + u0 + (u1 + 0.5 * u0) + (u2 + 0.5 * u1 + 0.25 * u0)
    torch.testing.assert_close(streams[0], expected, atol=1e-5, rtol=1e-4)


def test_a_robust_rule_lets_the_experts_look_ahead() -> None:
    model, seen = picture(residual=RULES["robust"]), []
    model.layers[1].norm2.register_forward_pre_hook(lambda m, a: seen.append(a[0]), prepend=True)
    model.layers[1].norm2.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(PIXELS)
    assert not torch.allclose(seen[0], seen[1])


def test_a_record_knows_which_patches_make_an_image() -> None:
    model, seen = picture(), []
    with listening(model, seen.append):
        model(PIXELS)
    assert isinstance(seen[0], Record)
    assert seen[0].shape == (5, 16)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Mixture(12, {}, router={}), "needs a task"),
        (lambda: mixture()(X, labels={"watch": LABELS["watch"]}), "no labels for rating"),
        (lambda: mixture(experts=1), "pick 2 of 1"),
        (lambda: picture(router={"kind": "none"}), "no router 'none'"),
        (lambda: picture(router={"kind": "comet", "gamma": 0}), "gamma"),
        (lambda: picture(heads=5), "5 heads"),
        (lambda: ImageMixture(8, 3, 10, router={}), "patches of 3"),
        (lambda: picture(residual={"rule": "robust", "rho": 0.1}), "rho"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make()
