"""RMoE (arXiv:2408.06793): one state per token goes through all MoE layers of one call, forward and backward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from calls import (
    assert_same_gradients,
    gradients,
    left_padded,
    recorded,
    right_padded,
    routings,
    stepwise,
    whole,
    without_experts,
)
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import placed_routers, put_routers
from coterie.anatomy.slicing import select
from coterie.errors import ModelError, UsageError
from coterie.routing.record import Here, Record
from coterie.routing.rmoe import Recurrence
from families import tiny, tokens

HOSTS = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
P = 24


def rmoe(family: str = "mixtral", **settings: Any) -> Any:
    """A model with recurrent routers that have opinions. qwen3-moe has a dense layer between its two MoE layers."""
    model = tiny(family)
    put_routers(model, "rmoe", {"size": P, **settings}, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routing_shared" in name or ".gate." in name or ".router." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def routers_of(model: Any) -> list[Any]:
    return [router for _, router in sorted(placed_routers(model).items())]


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gru", "rnn", "lstm"])
def test_the_step_is_that_of_torchs_own_cell(kind: Any) -> None:
    torch.manual_seed(0)
    shared, x_TP = Recurrence(8, P, kind, projection=False), torch.randn(7, P)
    first = shared(x_TP, None)
    second = shared(x_TP + 1, first)
    one = shared.cell(x_TP)
    two = shared.cell(x_TP + 1, one)
    expected = two if kind == "lstm" else (two,)
    assert len(second) == len(expected)
    for found, wanted in zip(second, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_gru_is_the_papers_equations() -> None:
    torch.manual_seed(0)
    shared, x, h = Recurrence(8, P, "gru", projection=False), torch.randn(5, P), torch.randn(5, P)
    cell = shared.cell
    w_s, w_z, w_h = cell.weight_ih.chunk(3)
    u_s, u_z, u_h = cell.weight_hh.chunk(3)
    b_s, b_z, b_h = cell.bias_ih.chunk(3)
    c_s, c_z, c_h = cell.bias_hh.chunk(3)
    s = torch.sigmoid(x @ w_s.T + b_s + h @ u_s.T + c_s)
    z = torch.sigmoid(x @ w_z.T + b_z + h @ u_z.T + c_z)
    c = torch.tanh(x @ w_h.T + b_h + s * (h @ u_h.T + c_h))
    torch.testing.assert_close(shared(x, (h,))[0], (1 - z) * c + z * h, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", HOSTS)
def test_parameters_are_those_of_the_papers_formula(family: str) -> None:
    plain = sum(p.numel() for p in tiny(family).parameters())
    model = rmoe(family)
    layers, H = moe_layers(model), model.config.hidden_size
    N, L = layers[0].num_experts, len(layers)
    assert sum(p.numel() for p in model.parameters()) - plain == L * (H * P + P * N) + 6 * P**2 + 6 * P - L * H * N


def test_the_formula_gives_the_papers_numbers() -> None:
    def count(L: int, h: int, p: int, N: int) -> int:
        return L * (h * p + p * N) + 6 * p**2 + 6 * p

    def ours(L: int, h: int, p: int, N: int) -> int:
        with torch.device("meta"):
            shared = Recurrence(h, p, "gru", projection=False)
        return sum(w.numel() for w in shared.parameters()) + L * (h * p + p * N)

    assert ours(8, 352, 128, 16) == count(8, 352, 128, 16)
    assert round(ours(8, 352, 128, 16) / 1e6, 2) == 0.48  # the paper rounds 0.476 down to 0.47M
    assert round((ours(24, 1280, 128, 16) - 24 * 1280 * 16) / 1e6, 1) == 3.6


def test_without_passing_there_are_as_many_parameters_and_flops() -> None:
    counts = {}
    for passing in ("on", "off", "detach"):
        model = rmoe(passing=passing)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(2, 12), use_cache=False)
        counts[passing] = (sum(p.numel() for p in model.parameters()), counter.get_total_flops())
    assert counts["on"] == counts["off"] == counts["detach"]


def test_a_router_costs_the_flops_of_its_three_products() -> None:
    model = rmoe()
    router = routers_of(model)[0]
    x_TH, H, N = torch.randn(10, 64), 64, 8
    record = Record(shared=model.model.routing_shared)
    with FlopCounterMode(display=False) as counter:
        router.route(x_TH, Here(record, 0, "rmoe"))
    assert counter.get_total_flops() == 10 * 2 * (H * P + 6 * P**2 + P * N)


# -- the state flows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HOSTS)
def test_the_first_projection_changes_later_logits_through_the_state_alone(family: str) -> None:
    model = rmoe(family)
    without_experts(model)
    before = routings(model, tokens())
    with torch.no_grad():
        routers_of(model)[0].projection.mul_(2)
    after = routings(model, tokens())
    assert all(not torch.allclose(after[i].logits_TN, before[i].logits_TN, atol=1e-3) for i in before)


@pytest.mark.parametrize("change", [{"passing": "off"}, {"cell": "rnn", "passing": "off"}])
def test_without_passing_it_does_not(change: dict[str, Any]) -> None:
    model = rmoe(**change)
    without_experts(model)
    before = routings(model, tokens())
    with torch.no_grad():
        routers_of(model)[0].projection.mul_(2)
    after = routings(model, tokens())
    assert not torch.equal(after[0].logits_TN, before[0].logits_TN)
    assert all(torch.equal(after[i].logits_TN, before[i].logits_TN) for i in (1, 2))


def test_the_first_layers_logits_depend_on_its_own_input_alone() -> None:
    model = rmoe()
    before = routings(model, tokens())[0].logits_TN
    with torch.no_grad():
        for router in routers_of(model)[1:]:
            router.projection.zero_()
    assert torch.equal(routings(model, tokens())[0].logits_TN, before)


def first_gradient(**settings: Any) -> float:
    """Of the last layer's logits in the first projection, with the path through experts cut."""
    model = rmoe(**settings)
    without_experts(model)
    last = routings(model, tokens())[2].logits_TN
    (gradient,) = torch.autograd.grad(last.square().sum(), routers_of(model)[0].projection, allow_unused=True)
    return 0.0 if gradient is None else float(gradient.abs().sum())


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm"])
def test_the_recurrent_gradient_reaches_the_first_router_only_if_passed(cell: str) -> None:
    assert first_gradient(cell=cell) > 1e-3
    assert first_gradient(cell=cell, passing="off") == 0
    assert first_gradient(cell=cell, passing="detach") == 0


def test_detaching_changes_no_value() -> None:
    one, two = rmoe(), rmoe(passing="detach")
    assert torch.equal(whole(one, tokens()), whole(two, tokens()))


def test_dense_layers_pass_the_state_through() -> None:
    model = rmoe("qwen3-moe")
    record = recorded(model, tokens())
    assert sorted(layer for kind, layer in record.states if kind == "rmoe") == [0, 2]
    (h_TP,) = record.states["rmoe", 0]
    assert h_TP.shape == (48, P)
    assert first_gradient() > 0


def test_experts_receive_the_hidden_states_and_not_the_state() -> None:
    model, seen = rmoe(), []
    layer = moe_layers(model)[1]
    layer.router.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 64)))
    layer.experts.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 64)))
    whole(model, tokens())
    assert torch.equal(seen[0], seen[1])


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HOSTS)
def test_weights_sum_to_one_over_at_most_k_experts(family: str) -> None:
    model = rmoe(family, scale=1.0)
    for layer, routing in routings(model, tokens()).items():
        assert routing.weight_TK.shape[1] == placed_routers(model)[layer].top_k
        torch.testing.assert_close(routing.weight_TK.sum(1), torch.ones(48))
        torch.testing.assert_close(routing.probability_TN.sum(1), torch.ones(48))
        assert routing.logits_TN.dtype == torch.float32


def test_sigmoid_gates_and_groups_only_change_the_selection() -> None:
    model = rmoe("deepseek-v3", gate="sigmoid", bias=True)
    routing = routings(model, tokens())[1]
    score_TE = routing.logits_TN.sigmoid()
    chosen = score_TE.gather(1, routing.index_TK)
    router = routers_of(model)[0]
    torch.testing.assert_close(routing.weight_TK, router.settings.scale * chosen / chosen.sum(1, keepdim=True))
    group_TG = (score_TE + router.e_score_correction_bias).view(48, 4, 4).topk(2, dim=-1).values.sum(-1)
    best = [set(row.topk(2).indices.tolist()) for row in group_TG]
    assert all(set((row // 4).tolist()) <= groups for row, groups in zip(routing.index_TK, best, strict=True))


def test_the_residual_adds_the_logits_of_the_layer_before() -> None:
    plain = rmoe(passing="off")
    added = rmoe(passing="off", residual=0.5)
    for model in (plain, added):
        without_experts(model)
    own, found = routings(plain, tokens()), routings(added, tokens())
    expected = own[0].logits_TN
    for layer in (1, 2):
        expected = own[layer].logits_TN + 0.5 * expected
        torch.testing.assert_close(found[layer].logits_TN, expected)


def test_a_detached_residual_gives_no_gradient() -> None:
    assert first_gradient(passing="off", residual=0.5) > 0
    assert first_gradient(passing="off", residual=0.5, residual_detach=True) == 0


def test_the_cosine_head_is_blind_to_lengths() -> None:
    model = rmoe(dim=8)
    before = routings(model, tokens())[2].logits_TN
    assert before.abs().max() <= 1 / routers_of(model)[2].cosine.log_temperature.exp() + 1e-5
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.mul_(3)
    torch.testing.assert_close(routings(model, tokens())[2].logits_TN, before)


def test_a_shared_projection_is_one_tensor() -> None:
    own = sum(p.numel() for p in rmoe().parameters())
    shared = rmoe(shared_projection=True)
    assert own - sum(p.numel() for p in shared.parameters()) == 2 * P * 64
    assert gradients(shared, tokens())["model.routing_shared.rmoe.projection"].abs().sum() > 0


# -- calls -------------------------------------------------------------------------------------------------------------

SWITCHES = [{}, {"cell": "lstm"}, {"dim": 8}, {"shared_projection": True, "residual": 0.5}]


@pytest.mark.parametrize("family", HOSTS)
def test_two_calls_in_a_row_give_the_same(family: str) -> None:
    model = rmoe(family)
    first = whole(model, tokens())
    whole(model, tokens(3, 7, seed=4))
    assert torch.equal(whole(model, tokens()), first)


@pytest.mark.parametrize("family", HOSTS)
def test_decoding_with_a_cache_equals_the_whole_call(family: str) -> None:
    model, ids = rmoe(family), tokens(2, 14)
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", SWITCHES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_and_without_a_cache_gives_the_same_tokens(settings: dict[str, Any], beams: int) -> None:
    model, ids = rmoe(**settings), tokens(2, 6)
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("side", [left_padded, right_padded])
def test_padding_and_batch_mates_change_nothing(family: str, side: Any) -> None:
    model, ids = rmoe(family), tokens(3, 12)
    mask = side(ids, (0, 3, 7))
    together = whole(model, ids, mask)
    for row in range(3):
        real = mask[row].bool()
        alone = whole(model, ids[row : row + 1, real])
        torch.testing.assert_close(together[row][real], alone[0], atol=2e-5, rtol=1e-4)


def test_a_tokens_state_depends_on_its_own_hidden_states_alone() -> None:
    model, order = rmoe(), torch.randperm(48, generator=torch.Generator().manual_seed(0))
    hidden = [torch.randn(48, 64) for _ in range(3)]
    found = []
    for index in (torch.arange(48), order):
        record = Record(shared=model.model.routing_shared)
        for layer, (router, x_TH) in enumerate(zip(routers_of(model), hidden, strict=True)):
            last = router.route(x_TH[index], Here(record, layer, "rmoe"))
        found.append(last.logits_TN)
    torch.testing.assert_close(found[1], found[0][order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", HOSTS)
def test_no_logit_depends_on_a_later_token(family: str) -> None:
    model, ids = rmoe(family), tokens(1, 10)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits[0, 4].square().sum().backward()
    assert x.grad[0, :5].abs().sum() > 0
    assert torch.equal(x.grad[0, 5:], torch.zeros_like(x.grad[0, 5:]))


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("settings", SWITCHES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, settings: dict[str, Any]) -> None:
    model, ids = rmoe(family, **settings), tokens(2, 9)
    plain = gradients(model, ids)
    assert plain["model.routing_shared.rmoe.cell.weight_hh"].abs().sum() > 0
    assert_same_gradients(plain, gradients(model, ids, checkpointed=True))


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("settings", SWITCHES)
def test_a_saved_model_comes_back(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = rmoe(family, **settings)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))


def test_a_copy_of_the_model_is_another_model() -> None:
    model = rmoe()
    before, twin = whole(model, tokens()), copy.deepcopy(model)
    with torch.no_grad():
        model.model.routing_shared["rmoe"].cell.weight_hh.zero_()
        routers_of(model)[0].projection.zero_()
    assert torch.equal(whole(twin, tokens()), before)


def test_bfloat16_models_route_in_float32() -> None:
    model = rmoe().to(torch.bfloat16)
    routing = routings(model, tokens())[2]
    assert routing.logits_TN.dtype == routing.weight_TK.dtype == torch.float32


# -- change ------------------------------------------------------------------------------------------------------------


def test_removing_experts_removes_their_rows_and_nothing_else() -> None:
    model = rmoe("deepseek-v3", size=16, dim=16)  # as many as experts: only rows of experts may go
    layer = moe_layers(model)[0]
    before = routings(model, tokens())[1].logits_TN
    keep = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]
    select(layer, keep)
    assert layer.router.projection.shape == (16, 64)
    assert layer.router.cosine.down.shape == (16, 16)
    torch.testing.assert_close(routings(model, tokens())[1].logits_TN, before[:, keep])


def test_routers_of_another_size_replace_the_shared_cell() -> None:
    model = rmoe()
    put_routers(model, "rmoe", {"size": 12})
    assert model.model.routing_shared["rmoe"].size == 12
    whole(model, tokens())
    put_routers(model, "top-k")
    assert not any("routing_shared" in name for name in model.state_dict())


def test_sizes_that_differ_between_layers_are_refused() -> None:
    model = tiny("mixtral")
    put_routers(model, "rmoe", {"size": 12}, layers=[0])
    with pytest.raises(UsageError, match="share one part; layer 1"):
        put_routers(model, "rmoe", {"size": 16}, layers=[1, 2])


def test_a_block_outside_of_its_model_is_refused() -> None:
    block = moe_layers(rmoe())[1].block
    with pytest.raises(ModelError, match="outside of its model"):
        block(torch.randn(1, 3, 64))


def test_reentrant_checkpointing_is_refused() -> None:
    model = rmoe().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="use_reentrant"):
        model(tokens(1, 4), labels=tokens(1, 4), use_cache=False).loss.backward()


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_the_two_layer_router_is_its_formula() -> None:
    model = tiny("mixtral")
    put_routers(model, "mlp", {"size": 10})
    router, x_TH = routers_of(model)[0], torch.randn(5, 64)
    expected = nn.functional.gelu(x_TH @ router.projection.T) @ router.weight.T
    torch.testing.assert_close(router(x_TH)[0], expected)


@pytest.mark.parametrize("dim", [0, 8])
def test_the_cosine_router_is_its_formula(dim: int) -> None:
    model = tiny("mixtral")
    put_routers(model, "cosine", {"dim": dim, "temperature": 0.2})
    router, x_TH = routers_of(model)[0], torch.randn(5, 64)
    low = x_TH @ router.cosine.down.T if dim else x_TH
    expected = torch.cosine_similarity(low[:, None], router.weight[None], dim=-1) / 0.2
    torch.testing.assert_close(router(x_TH)[0], expected, atol=1e-5, rtol=1e-4)
