"""Routers that average gates over tokens (arXiv:2505.00792): the graph, its two sources, and what must not leak."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from calls import (
    assert_same_gradients,
    gradients,
    left_padded,
    recorded,
    right_padded,
    routings,
    stepwise,
    whole,
)
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import placed_routers, put_routers
from coterie.anatomy.slicing import select
from coterie.errors import ModelError, UsageError
from coterie.routing.attention_aware import AttentionAware, row_entropy, settle
from coterie.routing.base import entropy
from coterie.routing.record import Attention, Here, Record
from coterie.routing.similarity import Similarity
from coterie.routing.token_graph import Peers, averaged
from families import tiny, tokens

HOSTS = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
H, E, A, G, D = 16, 6, 4, 2, 4  # of routers alone: hidden, experts, heads, key and value heads, head size


def similarity(seed: int = 0, **told: Any) -> Similarity:
    router = Similarity(H, E, Similarity.Settings(**told))
    torch.manual_seed(seed)
    router.reset(0.6)
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            if name != "weight":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return router


def attentive(seed: int = 0, **told: Any) -> AttentionAware:
    """Distances are in units of one, heads are known."""
    router = AttentionAware(H, E, AttentionAware.Settings(heads=A, **told))
    torch.manual_seed(seed)
    router.reset(0.6)
    router.head_distance.fill_(1.0)
    router.best_head.fill_(1)
    return router.eval()


def attended(B: int = 2, L: int = 7, seed: int = 0, window: int | None = None, bias: bool = True) -> Attention:
    """What an attention with grouped heads does with random tokens; `.query`, `.key`, `.values` besides."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, n, D, generator=generator) for n in (A, G, G))
    score = torch.einsum("blad,bsad->bals", q, k.repeat_interleave(A // G, 2)) / math.sqrt(D)
    score = score.masked_fill(torch.ones(L, L).tril() == 0, -torch.inf)
    if window is not None:
        score = score.masked_fill(torch.ones(L, L).tril(-window) == 1, -torch.inf)
    probability = score.softmax(-1)
    projection = nn.Linear(A * D, H, bias=bias)
    torch.manual_seed(seed)
    nn.init.normal_(projection.weight, std=0.3)
    if bias:
        nn.init.normal_(projection.bias)
    heads = torch.einsum("bals,bsad->blad", probability, v.repeat_interleave(A // G, 2))
    found = Attention(probability, projection(heads.flatten(2)), v.flatten(2), projection)
    found.query, found.key, found.values = q, k, v  # type: ignore[attr-defined]
    found.output_BLH = found.output_BLH.detach()
    return found


def values_in_hidden(seen: Any) -> Tensor:
    """v_hj of the paper, [B, S, A, H]: so that the attention's output is the mean over heads of attended ones."""
    each = seen.values.repeat_interleave(A // G, 2)
    weight_HAD = seen.projection.weight.unflatten(1, (A, D))
    bias = 0 if seen.projection.bias is None else seen.projection.bias
    return A * torch.einsum("bsad,had->bsah", each, weight_HAD) + bias


def explicit_posterior(seen: Any, sigma: float) -> Tensor:
    """A'_h of all heads by its definition, [B, A, L, S]."""
    distance = (seen.output_BLH[:, :, None, None] - values_in_hidden(seen)[:, None]).square().sum(-1)  # [B, L, S, A]
    weight = seen.probability_BALS * torch.exp(-distance.double().permute(0, 3, 1, 2) / (2 * sigma**2))
    return (weight / weight.sum(-1, keepdim=True)).float()


def here_of(router: Any, B: int, L: int, seen: Attention | None = None, **more: Any) -> Here:
    record = Record(shape=(B, L), **more)
    if seen is not None:
        record.attention[0] = seen
    return Here(record, 0, router.kind)


def matrix(router: Any, x_BLH: Tensor, seen: Attention | None = None, peers: Peers | None = None) -> Tensor:
    """S, [B, L, L]."""
    B, L, _ = x_BLH.shape
    weights, _ = router.weights(x_BLH, L, here_of(router, B, L, seen))
    return averaged(torch.eye(L).expand(B, L, L), weights, peers or Peers(L), router.settings.rows)


def routed(router: Any, x_BLH: Tensor, seen: Attention | None = None, **more: Any) -> Any:
    B, L, _ = x_BLH.shape
    return router.route(x_BLH.reshape(B * L, H), here_of(router, B, L, seen, **more))


def some(B: int = 2, L: int = 7, seed: int = 5) -> Tensor:
    return torch.randn(B, L, H, generator=torch.Generator().manual_seed(seed))


def both(told: dict[str, Any] | None = None) -> list[tuple[Any, Attention | None]]:
    return [(similarity(**(told or {})), None), (attentive(**(told or {})), attended())]


KINDS = [
    (Similarity, {}),
    (Similarity, {"form": "low-rank", "rank": 4, "tau": 3.0}),
    (Similarity, {"form": "identity", "metric": "cosine", "tau": 0.2}),
    (AttentionAware, {"weights": "raw"}),
    (AttentionAware, {}),
    (AttentionAware, {"head": "mean"}),
    (AttentionAware, {"head": "all_posterior"}),
]


def made(kind: Any, told: dict[str, Any], **more: Any) -> tuple[Any, Attention | None]:
    if kind is Similarity:
        return similarity(**told, **more), None
    return attentive(**told, **more), attended()


# -- the average -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "told"), KINDS)
@pytest.mark.parametrize("peers", ["all", "lower_entropy"])
def test_rows_sum_to_one_and_few_weights_are_not_zero(kind: Any, told: Any, peers: Any) -> None:
    router, seen = made(kind, told, peers=peers)
    S = matrix(router, some(), seen)
    torch.testing.assert_close(S.sum(-1), torch.ones(2, 7))
    assert S.min() >= 0
    router, seen = made(kind, told, peers=peers)
    r = routed(router, some(), seen)
    torch.testing.assert_close(r.probability_TN.sum(-1), torch.ones(14))
    torch.testing.assert_close(r.weight_TK.sum(-1), torch.ones(14))
    assert r.probability_TN.min() >= 0
    assert r.index_TK.shape == (14, 2)


@pytest.mark.parametrize(("kind", "told"), KINDS)
def test_gates_are_averaged_with_s_and_the_best_of_the_average_are_picked(kind: Any, told: Any) -> None:
    router, seen = made(kind, told)
    S, x = matrix(router, some(), copy.copy(seen)), some()
    r = routed(router, x, seen)
    gate = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(r.probability_TN, (S @ gate).flatten(0, 1), atol=1e-6, rtol=1e-5)
    assert torch.equal(r.index_TK, (S @ gate).flatten(0, 1).topk(2, dim=-1).indices)
    torch.testing.assert_close(r.logits_TN, (x @ router.weight.T).flatten(0, 1))


@pytest.mark.parametrize(("kind", "told"), KINDS)
def test_with_all_weight_on_itself_a_token_routes_as_without_peers(kind: Any, told: Any) -> None:
    router, seen = made(kind, told, self_weight=1.0)
    assert torch.equal(
        routed(router, some(), seen).probability_TN, (some() @ router.weight.T).softmax(-1).flatten(0, 1)
    )


def test_half_of_the_weight_on_itself_is_half_way() -> None:
    x = some()
    own, none, half = (routed(similarity(self_weight=w), x).probability_TN for w in (1.0, 0.0, 0.5))
    torch.testing.assert_close(half, (own + none) / 2)


def test_a_cold_cosine_makes_every_token_its_own_only_peer() -> None:
    router = Similarity(H, E, Similarity.Settings(form="identity", metric="cosine", tau=1e-3))
    torch.testing.assert_close(matrix(router, some()), torch.eye(7).expand(2, 7, 7))


@pytest.mark.parametrize(("kind", "told"), KINDS)
def test_equal_tokens_keep_their_gate(kind: Any, told: Any) -> None:
    router, seen = made(kind, told)
    x = some(2, 1).expand(2, 7, H)
    expected = (x @ router.weight.T).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(routed(router, x, seen).probability_TN, expected)


def test_peers_that_are_all_alike_share_one_gate() -> None:
    router = similarity(tau=1e9)
    S = matrix(router, some(), peers=Peers(7, causal=False))
    torch.testing.assert_close(S, torch.full((2, 7, 7), 1 / 7))
    causal = matrix(router, some())
    torch.testing.assert_close(causal, torch.ones(7, 7).tril().expand(2, 7, 7) / torch.arange(1, 8)[:, None])


def test_similarity_is_the_papers_formula() -> None:
    router, x = similarity(tau=0.7), some()
    logits = torch.einsum("bih,hk,bjk->bij", x, router.peer_weight, x) / (0.7 * math.sqrt(H))
    wanted = logits.masked_fill(torch.ones(7, 7).tril() == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(matrix(router, x), wanted)


def test_low_rank_and_cosine_are_their_formulas() -> None:
    router, x = similarity(form="low-rank", rank=3, metric="cosine", tau=0.4), some()
    q, k = x @ router.peer_query.T, x @ router.peer_key.T
    logits = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1) / 0.4
    wanted = logits.masked_fill(torch.ones(7, 7).tril() == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(matrix(router, x), wanted, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 1.0, 10.0]), st.sampled_from(["all", "lower_entropy"]))
def test_entropy_of_the_average_lies_between_its_bounds(seed: int, heat: float, peers: Any) -> None:
    x, seen = some(seed=seed) * 2, attended(seed=seed)
    for router, attention in ((similarity(seed, tau=heat, peers=peers), None), (attentive(seed, sigma=heat), seen)):
        gate = (x @ router.weight.T).softmax(-1)
        limits = Peers(7, entropy_BS=entropy(gate) if router.settings.peers == "lower_entropy" else None)
        S = matrix(router, x, attention, limits)
        found, mean = entropy(S @ gate), (S @ entropy(gate)[..., None])[..., 0]
        assert bool((found >= mean - 1e-5).all())
        assert bool((found <= mean + entropy(S) + 1e-5).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_nearest_peers_that_are_as_sure_make_no_token_less_sure(seed: int) -> None:
    x, seen = some(seed=seed) * 2, attended(seed=seed)
    cold = similarity(seed, tau=1e-6, peers="lower_entropy")
    near = attentive(seed, sigma=1e-3, peers="lower_entropy")
    for router, attention in ((cold, None), (near, seen)):
        r = routed(router, x, attention)
        assert bool((entropy(r.probability_TN) <= entropy(r.logits_TN.softmax(-1)) + 1e-5).all())


def test_noise_of_gates_shrinks_by_the_sum_of_squares() -> None:
    router, x = similarity(tau=3.0), some(1, 9)
    S = matrix(router, x)
    weights, _ = router.weights(x, 9, here_of(router, 1, 9))
    noise = torch.randn(1, 9, 40_000, generator=torch.Generator().manual_seed(0))
    found = averaged(noise, weights, Peers(9), 512).var(-1)
    torch.testing.assert_close(found, S.square().sum(-1), rtol=0.05, atol=0)


@pytest.mark.parametrize(("kind", "told"), KINDS)
def test_pieces_change_neither_values_nor_gradients(kind: Any, told: Any) -> None:
    found = []
    for rows in (512, 3, 1):
        router, seen = made(kind, told, rows=rows)
        x = some().requires_grad_()
        r = routed(router, x, seen)
        (r.probability_TN * torch.arange(E)).square().sum().backward()
        found.append((r.probability_TN.detach(), x.grad, router.weight.grad))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", range(A))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sigma", [1.0, 3.0, 10.0])
def test_the_posterior_of_a_head_is_its_definition(head: int, bias: bool, sigma: float) -> None:
    seen = attended(bias=bias)
    found = matrix(attentive(head=head, sigma=sigma), some(), seen)
    torch.testing.assert_close(found, explicit_posterior(seen, sigma)[:, head], atol=1e-5, rtol=1e-4)


def test_the_posterior_is_an_attention_with_longer_queries_and_keys() -> None:
    seen, sigma, head = attended(), 0.8, 2
    v = values_in_hidden(seen)[:, :, head]
    u, scale = seen.output_BLH, 1 / sigma**2
    q, k = seen.query[:, :, head] / math.sqrt(D), seen.key[:, :, head // (A // G)]  # type: ignore[attr-defined]
    query = torch.cat([q, u * scale, torch.full((2, 7, 1), -0.5 * scale)], -1)
    key = torch.cat([k, v, v.square().sum(-1, keepdim=True)], -1)
    wanted = (query @ key.mT).masked_fill(torch.ones(7, 7).tril() == 0, -torch.inf).softmax(-1)
    found = matrix(attentive(head=head, sigma=sigma), some(), seen)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_wide_posterior_is_the_attention_row() -> None:
    seen = attended()
    found = matrix(attentive(head=3, sigma=1e4), some(), seen)
    torch.testing.assert_close(found, seen.probability_BALS[:, 3], atol=1e-5, rtol=1e-4)
    raw = matrix(attentive(head=3, weights="raw"), some(), seen)
    torch.testing.assert_close(raw, seen.probability_BALS[:, 3])


def test_a_narrow_posterior_is_the_token_whose_value_is_nearest() -> None:
    seen = attended()
    found = matrix(attentive(head=1, sigma=1e-3), some(), seen)
    distance = (seen.output_BLH[:, :, None] - values_in_hidden(seen)[:, None, :, 1]).norm(dim=-1)
    nearest = distance.masked_fill(torch.ones(7, 7).tril() == 0, torch.inf).argmin(-1)
    torch.testing.assert_close(found, nn.functional.one_hot(nearest, 7).float())


def test_means_are_over_heads_and_one_posterior_is_over_all() -> None:
    seen = attended()
    mean = matrix(attentive(head="mean", sigma=0.7), some(), seen)
    torch.testing.assert_close(mean, explicit_posterior(seen, 0.7).mean(1), atol=1e-5, rtol=1e-4)
    raw = matrix(attentive(head="mean", weights="raw"), some(), seen)
    torch.testing.assert_close(raw, seen.probability_BALS.mean(1))
    distance = (seen.output_BLH[:, :, None, None] - values_in_hidden(seen)[:, None]).square().sum(-1)
    joint = seen.probability_BALS * torch.exp(-distance.double().permute(0, 3, 1, 2) / (2 * 0.7**2))
    wanted = (joint.sum(1) / joint.sum((1, 3))[..., None]).float()
    torch.testing.assert_close(
        matrix(attentive(head="all_posterior", sigma=0.7), some(), seen), wanted, atol=1e-5, rtol=1e-4
    )


def test_sigma_is_in_units_of_the_mean_distance() -> None:
    seen = attended()
    router = attentive(head=2, sigma=0.5, decay=0.0).train()
    matrix(router, some(), seen)
    distance = (seen.output_BLH[:, :, None] - values_in_hidden(seen)[:, None, :, 2]).square().sum(-1)
    mean = (seen.probability_BALS[:, 2] * distance).sum(-1).mean()
    torch.testing.assert_close(router.head_distance[2], mean)
    found = matrix(router.eval(), some(), seen)
    sigma = 0.5 * float(mean.detach().sqrt())
    torch.testing.assert_close(found, explicit_posterior(seen, sigma)[:, 2], atol=1e-5, rtol=1e-4)


def test_the_surest_head_is_learned_in_training_and_frozen_in_use() -> None:
    router = attentive().train()
    router.reset()
    first, second = attended(seed=1), attended(seed=2)
    routed(router, some(), first)
    torch.testing.assert_close(router.head_entropy, row_entropy(first.probability_BALS))
    routed(router, some(), second)
    wanted = row_entropy(first.probability_BALS).lerp(row_entropy(second.probability_BALS), 0.01)
    torch.testing.assert_close(router.head_entropy, wanted)
    assert int(router.best_head) == int(wanted.argmin())
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    routed(router.eval(), some(), attended(seed=3))
    assert all(torch.equal(before[name], buffer) for name, buffer in router.named_buffers())


def test_padding_does_not_count_for_a_heads_entropy() -> None:
    seen, mask = attended(), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    wanted = entropy(seen.probability_BALS).transpose(1, 2)[mask].mean(0)
    torch.testing.assert_close(row_entropy(seen.probability_BALS, mask), wanted)


def test_a_token_that_attention_dropped_wholly_keeps_its_own_gate() -> None:
    seen = attended()
    seen.probability_BALS[:, :, 3] = 0  # as dropout can leave it
    S = matrix(attentive(), some(), seen)
    torch.testing.assert_close(S[:, 3], torch.eye(7)[3].expand(2, 7))


def test_contradicting_settings_are_refused() -> None:
    for told in ({"weights": "raw", "head": "all_posterior"}, {"head": 9}, {"sigma": 0.0}, {"head": "surest"}):
        with pytest.raises(UsageError):
            put_routers(tiny("mixtral"), "attention", told)


# -- who is a peer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [{}, {"peers": "lower_entropy"}, {"rows": 2}])
def test_unmasked_tokens_can_change_places(told: dict[str, Any]) -> None:
    router, x, order = similarity(**told), some(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    gate = (x @ router.weight.T).softmax(-1)

    def mixed(x: Tensor, gate: Tensor) -> Tensor:
        weights, _ = router.weights(x, 7, here_of(router, 2, 7))
        limit = entropy(gate) if router.settings.peers == "lower_entropy" else None
        return averaged(gate, weights, Peers(7, entropy_BS=limit, causal=False), router.settings.rows)

    torch.testing.assert_close(mixed(x[:, order], gate[:, order]), mixed(x, gate)[:, order])


@pytest.mark.parametrize("peers", ["all", "lower_entropy"])
def test_no_gate_depends_on_a_later_token(peers: Any) -> None:
    for router, seen in both({"peers": peers}):
        x = some().requires_grad_()
        routed(router, x, seen).probability_TN.view(2, 7, E)[:, 3].square().sum().backward()
        assert torch.equal(x.grad[:, 4:], torch.zeros(2, 3, H))
        assert x.grad[:, :3].abs().sum() > 0


def test_padding_and_other_sequences_are_no_peers() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    segment = torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2)
    for router, seen in both():
        S = matrix(router, some(), copy.copy(seen), Peers(7, mask_BS=mask))
        assert not bool(S[0, 2:, :2].any())
        assert not bool(S[1, :5, 5:].any())
        torch.testing.assert_close(S[0, :2], torch.eye(7)[:2])
        torch.testing.assert_close(S[1, 5:], torch.eye(7)[5:])
        S = matrix(router, some(), copy.copy(seen), Peers(7, segment_BS=segment))
        same = segment[:, :, None] == segment[:, None]
        assert not bool(S[~same].any())
        torch.testing.assert_close(S.sum(-1), torch.ones(2, 7))


def test_only_peers_that_are_as_sure_count() -> None:
    router, x = similarity(peers="lower_entropy", tau=1e9), some()
    H_g = entropy((x @ router.weight.T).softmax(-1))
    S = matrix(router, x, peers=Peers(7, entropy_BS=H_g))
    wanted = (H_g[:, None] <= H_g[:, :, None]) & (torch.ones(7, 7).tril() == 1)
    assert torch.equal(S > 0, wanted)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_tokens_gate_has_the_gradient_of_its_peers_gates() -> None:
    for router, seen in both():
        S = matrix(router, some(), copy.copy(seen))
        weights, _ = router.weights(some(), 7, here_of(router, 2, 7, seen))
        gate = (some() @ router.weight.T).softmax(-1).detach().requires_grad_()
        averaged(gate, weights, Peers(7), 512)[1, 5, 2].backward()
        torch.testing.assert_close(gate.grad[1, :, 2], S[1, 5])


def test_gradients_reach_what_makes_the_graph() -> None:
    router = similarity()
    routed(router, some()).weight_TK[:, 0].sum().backward()
    assert router.peer_weight.grad.abs().sum() > 0
    model = attentive_model("mixtral")
    found = gradients(model, tokens())
    cut = gradients(attentive_model("mixtral", detach=True), tokens())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        key = f"model.layers.2.self_attn.{name}.weight"
        assert not torch.allclose(found[key], cut[key], atol=1e-7), name


# -- in models ---------------------------------------------------------------------------------------------------------


def attentive_model(family: str, **told: Any) -> Any:
    model = tiny(family)
    model.set_attn_implementation("eager")
    put_routers(model, "attention", told)
    settle(model, [tokens(4, 20, seed=9)])
    return model


def similar_model(family: str, **told: Any) -> Any:
    model = tiny(family)
    put_routers(model, "similarity", {"tau": 3.0, **told})
    return model


def model_of(kind: str, family: str, **told: Any) -> Any:
    if kind == "attention" and family == "deepseek-v3":
        told = {"weights": "raw", **told}
    return attentive_model(family, **told) if kind == "attention" else similar_model(family, **told)


CASES = [(kind, family) for family in HOSTS for kind in ("similarity", "attention")]
OPTIONS = [
    ("similarity", {"form": "low-rank", "metric": "cosine", "tau": 0.3, "peers": "lower_entropy"}),
    ("attention", {"head": "all_posterior", "peers": "lower_entropy"}),
    ("attention", {"head": "mean", "self_weight": 0.3}),
    ("attention", {"head": 2, "weights": "raw", "rows": 3}),
]


@pytest.mark.parametrize("family", HOSTS)
def test_alone_in_its_graph_every_token_routes_as_in_the_plain_model(family: str) -> None:
    told: dict[str, Any] = {"gate": "sigmoid", "bias": True} if family == "deepseek-v3" else {}
    plain = whole(tiny(family), tokens())
    for kind in ("similarity", "attention"):
        torch.testing.assert_close(
            whole(model_of(kind, family, self_weight=1.0, **told), tokens()), plain, atol=2e-5, rtol=1e-4
        )
    assert not torch.allclose(whole(model_of("similarity", family, **told), tokens()), plain, atol=1e-3)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_decoding_with_a_cache_equals_the_whole_call(kind: str, family: str) -> None:
    model, ids = model_of(kind, family), tokens(2, 14)
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "told"), OPTIONS)
def test_so_it_does_with_all_options(kind: str, told: dict[str, Any]) -> None:
    model, ids = model_of(kind, "mixtral", **told), tokens(2, 14)
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_decoding_with_padding_on_the_left_equals_each_row_alone(kind: str, family: str) -> None:
    model, ids = model_of(kind, family), tokens(3, 12)
    mask = left_padded(ids, (0, 3, 5))
    found = stepwise(model, ids, mask, chunks=(7, 1, 2))
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(found[row][real], whole(model, ids[row : row + 1, real])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "family"), CASES)
@pytest.mark.parametrize("side", [left_padded, right_padded])
def test_padding_and_batch_mates_change_nothing(kind: str, family: str, side: Any) -> None:
    model, ids = model_of(kind, family), tokens(3, 12)
    mask = side(ids, (0, 3, 7))
    together = whole(model, ids, mask)
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(together[row][real], whole(model, ids[row : row + 1, real])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_packed_sequences_route_as_if_alone(kind: str) -> None:
    model, ids = model_of(kind, "mixtral"), tokens(1, 13)
    places = torch.tensor([[*range(5), *range(6), *range(2)]])
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits[0]
    parts = [whole(model, part)[0] for part in ids.split([5, 6, 2], 1)]
    torch.testing.assert_close(packed, torch.cat(parts), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_packed_sequences_can_also_be_told_pair_by_pair(kind: str) -> None:
    model, ids = model_of(kind, "mixtral"), tokens(1, 13)
    places = torch.tensor([[*range(5), *range(6), *range(2)]])
    part = torch.tensor([[0] * 5 + [1] * 6 + [2] * 2])
    pairs = (part[:, :, None] == part[:, None]) & (torch.ones(13, 13).tril() == 1)
    added = torch.zeros(1, 1, 13, 13).masked_fill(~pairs[:, None], torch.finfo(torch.float32).min)
    mask = added if kind == "attention" else pairs[:, None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, attention_mask=mask, use_cache=False).logits[0]
    parts = [whole(model, part)[0] for part in ids.split([5, 6, 2], 1)]
    torch.testing.assert_close(packed, torch.cat(parts), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_no_logit_depends_on_a_later_token(kind: str, family: str) -> None:
    model, ids = model_of(kind, family), tokens(1, 10)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits[0, 4].square().sum().backward()
    assert torch.equal(x.grad[0, 5:], torch.zeros_like(x.grad[0, 5:]))


@pytest.mark.parametrize(("kind", "family"), CASES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_and_without_a_cache_gives_the_same_tokens(kind: str, family: str, beams: int) -> None:
    model, ids = model_of(kind, family), tokens(2, 6)
    mask = left_padded(ids, (0, 2))
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_a_static_cache_with_padding_gives_the_same_logits(kind: str) -> None:
    model, ids = model_of(kind, "mixtral"), tokens(2, 9)
    how = {
        "max_new_tokens": 4,
        "do_sample": False,
        "attention_mask": left_padded(ids, (0, 4)),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    one = model.generate(ids, use_cache=False, **how).logits
    two = model.generate(ids, cache_implementation="static", disable_compile=True, **how).logits
    torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_a_window_of_attention_limits_who_is_a_peer_of_attention_alone(kind: str) -> None:
    model, ids = tiny("mixtral", sliding_window=4), tokens(2, 14)
    model.set_attn_implementation("eager")
    put_routers(model, kind)
    if kind == "attention":
        settle(model, [tokens(4, 20, seed=9)])
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_what_is_kept_follows_a_cache_that_is_copied_and_cut(kind: str) -> None:
    model, ids = model_of(kind, "mixtral"), tokens(2, 14)
    cache = model(ids[:, :8], past_key_values=DynamicCache(config=model.config)).past_key_values
    twin = copy.deepcopy(cache)
    model(ids[:, 8:11], past_key_values=cache)
    cache.crop(0)
    cache.crop(-3)
    expected = whole(model, ids)[:, 8:]
    for one in (cache, twin):
        torch.testing.assert_close(model(ids[:, 8:], past_key_values=one).logits, expected, atol=2e-5, rtol=1e-4)
    twin.reset()
    again = model(ids, past_key_values=twin).logits
    torch.testing.assert_close(again, whole(model, ids), atol=2e-5, rtol=1e-4)


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    model, ids = similar_model("mixtral"), tokens(3, 9)
    cache = model(ids[:, :6]).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    found = model(ids[[2, 2, 0, 0], 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, whole(model, ids[[2, 2, 0, 0]])[:, 6:], atol=2e-5, rtol=1e-4)


def test_a_cache_that_another_model_filled_is_refused() -> None:
    cache = tiny("mixtral")(tokens(1, 5)).past_key_values
    with pytest.raises(ModelError, match="5 tokens, but the similarity router of layer 0 saw 0"):
        similar_model("mixtral")(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, family: str) -> None:
    model, ids = model_of(kind, family), tokens(2, 9)
    twin = copy.deepcopy(model)
    assert_same_gradients(gradients(model, ids), gradients(twin, ids, checkpointed=True))
    for one, two in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, two)  # running averages moved once


@pytest.mark.parametrize("kind", ["similarity", "attention"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_cache_that_training_does_not_need_cuts_no_gradient(kind: str, checkpointed: bool) -> None:
    model, ids = model_of(kind, "mixtral"), tokens(2, 9)
    wanted = gradients(copy.deepcopy(model), ids)
    assert_same_gradients(wanted, gradients(model, ids, checkpointed=checkpointed, use_cache=None))


@torch.no_grad()
def test_outputs_that_are_tuples_keep_the_cache_too() -> None:
    model, ids = similar_model("mixtral"), tokens(2, 9)
    cache = model(ids[:, :6], return_dict=False)[1]
    found = model(ids[:, 6:], past_key_values=cache, return_dict=False)[0]
    torch.testing.assert_close(found, whole(model, ids)[:, 6:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_saved_model_comes_back(kind: str, family: str, tmp_path: Path) -> None:
    model = model_of(kind, family)
    model.save_pretrained(tmp_path)
    more = {"attn_implementation": "eager"} if kind == "attention" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **more).eval()
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **more).eval()
    assert torch.isfinite(whole(narrow, tokens())).all()


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_two_calls_in_a_row_give_the_same(kind: str, family: str) -> None:
    model = model_of(kind, family)
    first = whole(model, tokens())
    whole(model, tokens(3, 7, seed=4))
    assert torch.equal(whole(model, tokens()), first)


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_experts_receive_their_own_tokens(kind: str) -> None:
    model, seen = model_of(kind, "mixtral"), []
    layer = moe_layers(model)[1]
    layer.router.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 64)))
    layer.experts.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 64)))
    whole(model, tokens())
    assert torch.equal(seen[0], seen[1])


def test_sigmoid_scores_are_averaged_before_bias_and_groups() -> None:
    model = similar_model("deepseek-v3", gate="sigmoid", bias=True)
    router = placed_routers(model)[1]
    score, seen = [], []
    router.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    decide = router.decide
    router.decide = lambda logits, mixed: (score.append(mixed), decide(logits, mixed))[1]
    r = routings(model, tokens())[1]
    x = seen[0].view(2, 24, 64)
    own = (x @ router.weight.T).sigmoid()
    weights, _ = router.weights(x, 24, here_of(router, 2, 24))
    mixed = averaged(own, weights, Peers(24), 512).flatten(0, 1)
    torch.testing.assert_close(score[0], mixed)
    assert torch.equal(r.index_TK, router.picked(mixed))
    torch.testing.assert_close(r.probability_TN, mixed / mixed.sum(-1, keepdim=True))


def test_attention_without_probabilities_is_refused_with_the_way_out() -> None:
    model = tiny("mixtral")
    model.set_attn_implementation("sdpa")
    put_routers(model, "attention", {"weights": "raw", "head": 0})
    with pytest.raises(ModelError, match='attn_implementation="eager"'):
        model(tokens())


def test_latent_attention_has_no_posterior_and_says_so() -> None:
    model = tiny("deepseek-v3")
    model.set_attn_implementation("eager")
    put_routers(model, "attention", {"head": 0})
    with pytest.raises(ModelError, match="weights=raw"):
        settle(model, [tokens()])


def test_heads_that_were_never_seen_are_no_guess() -> None:
    model = tiny("mixtral")
    model.set_attn_implementation("eager")
    put_routers(model, "attention")
    with pytest.raises(UsageError, match="does not know its heads yet"):
        model(tokens())
    model.train()(tokens())
    model.eval()(tokens())


def test_layers_without_attention_are_refused() -> None:
    with pytest.raises(ModelError, match="decoder layer 0 has no attention"):
        put_routers(tiny("qwen3-next"), "attention")


def test_nothing_of_attention_is_kept_for_a_router_that_does_not_look() -> None:
    model = attentive_model("mixtral")
    put_routers(model, "top-k")
    assert recorded(model, tokens()).attention == {}


def test_removing_experts_removes_their_rows_and_nothing_else() -> None:
    model = similar_model("mixtral", form="low-rank", rank=8)  # as many as experts
    layer = moe_layers(model)[0]
    select(layer, [0, 2, 3, 5])
    assert layer.router.weight.shape == (4, 64)
    assert layer.router.peer_query.shape == layer.router.peer_key.shape == (8, 64)
    assert routings(model, tokens())[0].probability_TN.shape == (48, 4)
    model = attentive_model("mixtral")
    layer = moe_layers(model)[0]
    select(layer, [0, 2, 3, 5])
    assert layer.router.head_entropy.shape == (4,)
