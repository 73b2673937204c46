"""Momentum over depth (arXiv:2410.14574): the rules, their theory, and a state that lives as long as one call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from calls import assert_same_gradients, gradients, left_padded, recorded, right_padded, stepwise, whole
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import put_residual, put_routers, remember
from coterie.errors import ModelError, UsageError
from coterie.routing.record import Record, recording
from coterie.routing.residual import Momentum, Residual, momentum
from families import tiny, tokens

HOSTS = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
RULES: list[dict[str, Any]] = [
    {"mu": 0.7},
    {"rule": "adam", "kappa": 0.5, "adam_layers": 2, "adam_gamma": 0.3},
    {"rule": "robust", "rho": 0.75},
]


def model_with(family: str = "mixtral", **told: Any) -> Any:
    model = tiny(family)
    put_residual(model, told)
    return model


def rules_of(model: Any) -> list[Momentum]:
    return [rule for layer in moe_layers(model) if (rule := momentum(layer.block)) is not None]


def without_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]))


def watched(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Streams before the first layer and behind each, and what each MoE block gave before its rule."""
    given: list[Tensor] = []
    streams: list[Tensor] = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda m, a: streams.append(a[0]))]
    handles += [layer.register_forward_hook(lambda m, a, out: streams.append(out)) for layer in model.model.layers]
    for rule in rules_of(model):
        rule.added = lambda u, rule=rule: (given.append(u), Momentum.added(rule, u))[1]  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for rule in rules_of(model):
            del rule.added
    return streams, given


def iterate(told: Residual, curvature: Tensor, steps: int, x: Tensor) -> Tensor:
    """A stack of layers whose experts go down a quadratic: u(x) = -s x, one layer after another in one call."""
    with recording(Record()):
        for layer in range(steps):
            rule = Momentum(told, layer, layer)
            y = rule.ahead(x) if told.rule == "robust" else x
            x = x + rule.added(-curvature * y)
    return x


# -- heavy ball --------------------------------------------------------------------------------------------------------

PLAIN = [{"mu": 0.0}, {"rule": "robust", "mu": 0.0, "gamma": 1.0, "alpha": 0.0}]


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("told", PLAIN)
def test_without_momentum_the_model_is_as_it_was_to_the_bit(family: str, told: dict[str, Any]) -> None:
    plain, model = tiny(family), model_with(family, **told)
    assert torch.equal(whole(plain, tokens()), whole(model, tokens()))
    one, two = gradients(plain, tokens()), gradients(model, tokens())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mu", [0.3, 0.7, -0.5])
def test_the_output_is_the_unrolled_sum(mu: float) -> None:
    model = model_with(mu=mu, gamma=0.8)
    without_attention(model)
    streams, u = watched(model, tokens())
    wanted = streams[0] + sum(0.8 * mu ** (t - j) * u[j] for t in range(3) for j in range(t + 1))
    torch.testing.assert_close(streams[-1], wanted, atol=1e-5, rtol=1e-5)


def test_layers_without_experts_pass_the_momentum_through() -> None:
    model = model_with("qwen3-moe", mu=0.7)  # its layer 1 is dense
    record = recorded_states(model)
    u = watched(model, tokens())[1]
    assert sorted(record) == [0, 2]
    torch.testing.assert_close(record[2]["p"], 0.7 * u[0] + u[1], atol=1e-6, rtol=1e-5)


def recorded_states(model: Any, ids: Tensor | None = None) -> dict[int, dict[str, Tensor]]:
    put_routers(model, "top-k")  # records of calls without routers of ours are not shown
    record = recorded(model, tokens() if ids is None else ids)
    return {layer: state for (kind, layer), state in record.states.items() if kind == "momentum"}


@pytest.mark.parametrize("told", RULES)
def test_the_momentum_of_a_token_knows_no_batch_and_no_later_token(told: dict[str, Any]) -> None:
    model, ids = model_with(**told), tokens(3, 10)
    p = recorded_states(model, ids)[2]["p"]
    assert p.shape == (3, 10, 64)
    assert p.dtype == torch.float32
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(recorded_states(model, ids[order])[2]["p"], p[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(recorded_states(model, ids[:, :6])[2]["p"], p[:, :6], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_first_experts_through_the_momentum_alone() -> None:
    model, ids = model_with(mu=0.7), tokens(1, 6)
    fixed = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers[1:2]:  # the residual path is cut behind the first layer
        layer.register_forward_pre_hook(lambda m, a: (fixed, *a[1:]))
    weight = moe_layers(model)[0].experts.down_proj
    way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    loss().backward()
    slope = float((weight.grad * way).sum())
    assert abs(slope) > 1e-3
    found = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            weight.add_(step * way)
            found.append(float(loss()))
    assert slope == pytest.approx((found[0] - found[1]) / 2e-2, rel=0.02)
    for rule in rules_of(model):
        rule.dial(mu=0.0)
    assert torch.autograd.grad(loss(), weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_quadratics_are_stable_up_to_the_papers_threshold(mu: float, gamma: float) -> None:
    threshold = 2 * (1 + mu) / gamma
    curvature = torch.tensor([0.05, 0.5, 0.98, 1.02]) * threshold
    end = iterate(Residual(mu=mu, gamma=gamma), curvature, 1500, torch.ones(4)).abs()
    assert bool((end[:3] < 1e-3).all())
    assert not bool(end[3] < 1e3)  # large, or no number any more


def test_thresholds_of_stability_are_two_to_three_point_eight() -> None:
    assert [round(2 * (1 + mu), 1) for mu in (0, 0.5, 0.7, 0.9)] == [2, 3, 3.4, 3.8]


# -- robust ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "wanted"), [(1 - 10**-0.5, (1.684, 0.355, 0.211)), (0.9, (0.190, 0.810, 4.263))], ids=["fast", "robust"]
)
def test_robust_steps_are_those_of_the_method(rho: float, wanted: tuple[float, float, float]) -> None:
    mu, gamma, alpha = Residual(rule="robust", rho=rho, condition=10).steps
    assert (round(gamma, 3), round(mu, 3), round(alpha, 3)) == wanted
    assert Residual(rule="robust", rho=0.9).steps[1] / 2 == pytest.approx(
        Residual(rule="robust", rho=0.9, smoothness=2.0).steps[1]
    )


def test_without_a_rate_the_fastest_is_taken() -> None:
    assert Residual(rule="robust").steps == Residual(rule="robust", rho=1 - 10**-0.5).steps


@settings(max_examples=60, deadline=None)
@given(st.floats(1.5, 1000), st.floats(0, 1), st.floats(0.2, 5))
def test_on_quadratics_the_worst_rate_is_rho(k: float, place: float, smoothness: float) -> None:
    low, high = 1 - k**-0.5, 1 - 1 / k
    rho = low + place * (high - low)
    mu, gamma, alpha = Residual(rule="robust", rho=rho, condition=k, smoothness=smoothness).steps
    radius = []
    for s in torch.linspace(smoothness / k, smoothness, 41, dtype=torch.float64).tolist():
        p = [-s, mu - s * alpha * gamma]  # of x and p
        change = torch.tensor([[1 + gamma * p[0], gamma * p[1]], p], dtype=torch.float64)
        radius.append(float(torch.linalg.eigvals(change).abs().max()))
    # double eigenvalues are only found to the root of the precision
    assert max(radius) == pytest.approx(rho, abs=1e-6)


def test_the_layers_take_the_steps_of_that_map() -> None:
    told = Residual(rule="robust", rho=0.8)
    mu, gamma, alpha = told.steps
    s, x, p = torch.tensor([0.1, 0.4, 1.0]), torch.ones(3), torch.zeros(3)
    for _ in range(12):
        p = mu * p - s * (x + alpha * gamma * p)
        x = x + gamma * p
    torch.testing.assert_close(iterate(told, s, 12, torch.ones(3)), x, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rho", [0.6, 0.95])
def test_a_rate_outside_of_its_interval_is_refused(rho: float) -> None:
    with pytest.raises(UsageError, match=r"outside of 0.6838 to 0.9000"):
        put_residual(tiny("mixtral"), {"rule": "robust", "rho": rho})


@pytest.mark.parametrize(("family", "more"), [("mixtral", {}), ("granite-moe", {"residual_multiplier": 0.3})])
def test_norm_router_and_experts_see_the_point_ahead(family: str, more: dict[str, Any]) -> None:
    model = tiny(family, **more)
    put_residual(model, {"rule": "robust", "rho": 0.75})
    without_attention(model)
    alpha, seen = rules_of(model)[0].residual.steps[2], []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    routed: list[Tensor] = []
    for layer in moe_layers(model):
        layer.router.register_forward_pre_hook(lambda m, a: routed.append(a[0]))
    x, _ = watched(model, tokens())
    for t in (1, 2):  # only MoE layers move x
        y, normed = seen[t]
        torch.testing.assert_close(y, x[t] + alpha * (x[t] - x[t - 1]), atol=1e-5, rtol=1e-4)
        assert torch.equal(routed[t].flatten(), normed.flatten())
    assert torch.equal(seen[0][0], x[0])


# -- adam --------------------------------------------------------------------------------------------------------------


def test_adam_is_its_equations_and_later_layers_are_heavy_ball_on_its_momentum() -> None:
    told = Residual(rule="adam", mu=0.7, gamma=0.9, adam_mu=0.8, adam_gamma=0.5, beta=0.95, adam_layers=2)
    torch.manual_seed(0)
    u = [torch.randn(2, 3, 4) for _ in range(4)]
    with recording(Record()):
        found = [Momentum(told, layer, layer).added(value) for layer, value in enumerate(u)]
    p, m = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for t in range(2):
        p, m = 0.8 * p + 0.2 * u[t], 0.95 * m + 0.05 * u[t] ** 2
        torch.testing.assert_close(found[t], 0.5 * p / (m + 1e-8).sqrt())
    for t in (2, 3):
        p = 0.7 * p + u[t]
        torch.testing.assert_close(found[t], 0.9 * p)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 2))
def test_without_decay_adam_takes_steps_of_its_size(seed: int, gamma: float) -> None:
    told = Residual(rule="adam", adam_mu=0.0, beta=0.0, adam_gamma=gamma)
    u = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    u = u.sign() * (u.abs() + 0.05)
    with recording(Record()):
        torch.testing.assert_close(Momentum(told, 0, 0).added(u), gamma * u.sign(), atol=gamma * 1e-4, rtol=1e-4)


def test_squares_are_never_negative() -> None:
    state = recorded_states(model_with(rule="adam", adam_layers=3))
    assert all(bool((state[layer]["m"] >= 0).all()) for layer in range(3))


@pytest.mark.parametrize("more", [{}, {"residual_multiplier": 0.3}])
def test_with_all_decay_adam_replaces_the_stream(more: dict[str, Any]) -> None:
    model = tiny("granite-moe" if more else "mixtral", **more)
    put_residual(model, {"rule": "adam", "kappa": 1.0, "beta": 0.9})
    without_attention(model)
    x, u = watched(model, tokens())
    step = 0.1 * u[0] / (0.1 * u[0] ** 2 + 1e-8).sqrt()
    torch.testing.assert_close(x[1], step, atol=1e-5, rtol=1e-4)


# -- calls -------------------------------------------------------------------------------------------------------------

CASES = [(family, told) for family in HOSTS for told in RULES]


@pytest.mark.parametrize(("family", "told"), CASES)
def test_two_calls_in_a_row_give_the_same(family: str, told: dict[str, Any]) -> None:
    model = model_with(family, **told)
    first = whole(model, tokens())
    whole(model, tokens(3, 7, seed=4))
    assert torch.equal(whole(model, tokens()), first)
    assert not torch.allclose(first, whole(tiny(family), tokens()), atol=1e-3)


@pytest.mark.parametrize(("family", "told"), CASES)
def test_decoding_with_a_cache_equals_the_whole_call(family: str, told: dict[str, Any]) -> None:
    model, ids = model_with(family, **told), tokens(2, 12)
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("told", RULES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generating_with_and_without_a_cache_gives_the_same_tokens(told: dict[str, Any], beams: int) -> None:
    model, ids = model_with(**told), tokens(2, 6)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": left_padded(ids, (0, 2))}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize(("family", "told"), CASES)
@pytest.mark.parametrize("side", [left_padded, right_padded])
def test_padding_and_batch_mates_change_nothing(family: str, told: dict[str, Any], side: Any) -> None:
    model, ids = model_with(family, **told), tokens(3, 10)
    mask = side(ids, (0, 3, 6))
    together = whole(model, ids, mask)
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(together[row][real], whole(model, ids[row : row + 1, real])[0], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(("family", "told"), CASES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, told: dict[str, Any]) -> None:
    model, ids = model_with(family, **told), tokens(2, 9)
    assert_same_gradients(gradients(model, ids), gradients(model, ids, checkpointed=True))


@pytest.mark.parametrize("told", RULES)
def test_no_logit_depends_on_a_later_token(told: dict[str, Any]) -> None:
    model, ids = model_with(**told), tokens(1, 10)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits[0, 4].square().sum().backward()
    assert torch.equal(x.grad[0, 5:], torch.zeros_like(x.grad[0, 5:]))


@pytest.mark.parametrize(("family", "told"), CASES)
def test_a_saved_model_comes_back_with_no_parameter_more(family: str, told: dict[str, Any], tmp_path: Path) -> None:
    model = model_with(family, **told)
    assert model.state_dict().keys() == tiny(family).state_dict().keys()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))


def test_a_layers_own_constant_is_saved(tmp_path: Path) -> None:
    model = tiny("granite-moe", residual_multiplier=0.3)
    put_residual(model, {"rule": "robust"})
    assert [rule.scale for rule in rules_of(model)] == [0.3, 0.3, 0.3]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, tokens()), whole(model, tokens()))


def test_the_momentum_is_float32_in_narrow_models() -> None:
    model = model_with(mu=0.9).to(torch.bfloat16)
    assert recorded_states(model)[2]["p"].dtype == torch.float32
    assert whole(model, tokens()).dtype == torch.bfloat16


def test_a_schedule_dials_the_momentum_and_a_saved_model_remembers_it(tmp_path: Path) -> None:
    model = model_with(mu=0.0)
    plain = whole(model, tokens())
    for rule in rules_of(model):
        rule.dial(mu=0.6)
    remember(model)
    found = whole(model, tokens())
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(found, whole(model_with(mu=0.6), tokens()))
    model.save_pretrained(tmp_path)
    assert torch.equal(whole(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens()), found)
    with pytest.raises(UsageError, match="mu"):
        rules_of(model)[0].dial(mu=1.5)
    with pytest.raises(UsageError, match="another one"):
        rules_of(model)[0].dial(rule="adam")


def test_momentum_is_put_once() -> None:
    with pytest.raises(UsageError, match="layers 0, 1, 2 have momentum already"):
        put_residual(model_with(mu=0.5), {"mu": 0.6})


def test_it_stacks_with_a_recurrent_router() -> None:
    model = model_with(mu=0.7)
    put_routers(model, "rmoe", {"size": 16})
    ids = tokens(2, 12)
    torch.testing.assert_close(stepwise(model, ids), whole(model, ids), atol=5e-5, rtol=1e-3)
    assert_same_gradients(gradients(model, ids), gradients(model, ids, checkpointed=True))


def test_a_layer_that_does_more_than_add_is_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    more = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.FlexOlmoConfig(**sizes, **experts, **more, num_key_value_heads=2)  # a norm behind its experts
    with pytest.raises(ModelError, match="layer 0 does not simply add"):
        put_residual(AutoModelForCausalLM.from_config(config), {"mu": 0.5})


def test_a_block_outside_of_its_model_is_refused() -> None:
    with pytest.raises(ModelError, match="outside of its model"):
        moe_layers(model_with(mu=0.5))[1].block(torch.randn(1, 3, 64))


def test_the_weight_of_all_outputs_grows_to_its_limit() -> None:
    ones = iterate(Residual(mu=0.7), torch.zeros(1), 3, torch.zeros(1))
    assert float(ones) == 0
    with recording(Record()):
        found = [float(Momentum(Residual(mu=0.7), t, t).added(torch.ones(1))) for t in range(40)]
    assert found[-1] == pytest.approx(1 / (1 - 0.7), rel=1e-4)
    assert math.isclose(found[1], 1.7, rel_tol=1e-6)
