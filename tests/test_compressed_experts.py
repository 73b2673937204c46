"""Compressed experts: only the strongest of a token's experts run, vectors stand in for the others."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import ExpertBank, moe_layers
from coterie.anatomy.forms import form_of
from coterie.errors import CheckpointError, CoterieError, ModelError, UsageError
from coterie.experts import factored
from coterie.experts.compressed import Compressed, convert, division, shares, theta_shape
from coterie.experts.forward import observe, rerouted
from coterie.experts.mapped import redirect
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, sweep
from coterie.streaming.model import StreamedModel
from coterie.text import load_tokens
from coterie.training import finetune as training
from coterie.training import trainer as trainers
from coterie.training.trainer import PlainTrainer, stand_ins, training_arguments
from families import FEW, each_tensor, edit_json, resident, saved, tiny, token_file, tokens
from inprocess import cli

# T tokens, K slots, H hidden, I intermediate, E experts, C numbers in a vector

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "olmoe", "phimoe")
TOP_4 = {"num_experts_per_tok": 4}  # half of them is 2; Phi-MoE's router knows top-2 only


def changes(family):
    return {} if family == "phimoe" else TOP_4


def built(family, **more):
    model = tiny(family, **changes(family), **more)
    model.set_experts_implementation("coterie")
    return model


def seen(family, **more):
    """The first MoE layer of a model, and what its experts receive: hidden states, ids, weights."""
    model, found = built(family, **more), []
    layer = moe_layers(model)[0]
    hook = layer.experts.register_forward_pre_hook(lambda module, args: found.append(args))
    with torch.no_grad():
        model(tokens())
    hook.remove()
    return layer, *(t.clone() for t in found[0])


def drawn(module, seed=0, spread=0.3):
    """Give a module vectors that are not ones."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        module.theta.copy_(1 + spread * torch.randn(module.theta.shape, generator=generator))
    return module


def strongest(index_TK, weight_TK, main):
    order = torch.argsort(weight_TK, dim=-1, descending=True, stable=True)[:, :main]
    return index_TK.gather(-1, order), weight_TK.gather(-1, order)


def half(layer):
    return layer.top_k // 2


# -- the forward pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_with_no_auxiliaries_the_output_is_the_same_bit_for_bit(family):
    layer, *inputs = seen(family)
    with torch.no_grad():
        before = layer.experts(*inputs)
        convert(layer.experts, layer.top_k)
        assert torch.equal(drawn(layer.experts)(*inputs), before)


@pytest.mark.parametrize("family", SOME)
def test_fresh_vectors_run_the_strongest_experts_alone_with_the_weights_they_had(family):
    layer, hidden, index, weights = seen(family)
    with torch.no_grad():
        expected = layer.experts(hidden, *strongest(index, weights, half(layer)))
        convert(layer.experts, half(layer))
        torch.testing.assert_close(layer.experts(hidden, index, weights), expected, atol=1e-6, rtol=0)


def reduce_plainly(layer):
    main = half(layer)
    layer.experts.register_forward_pre_hook(lambda module, args: (args[0], *strongest(args[1], args[2], main)))


@pytest.mark.parametrize("family", SOME)
def test_fresh_vectors_leave_the_routers_the_gradient_of_plain_reduction(family):
    plain, fresh = built(family), built(family)
    for layer in moe_layers(plain):
        reduce_plainly(layer)
    for layer in moe_layers(fresh):
        convert(layer.experts, half(layer))
    for model in (plain, fresh):
        model(tokens(), labels=tokens()).loss.backward()
    for one, two in zip(moe_layers(plain), moe_layers(fresh), strict=True):
        for (name, p), q in zip(one.router.named_parameters(), two.router.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-7, rtol=1e-5, msg=name)


def by_hand(layer, hidden, index, weights, main):
    """The paper's equations, one token and one expert after another."""
    module, bank = layer.experts, ExpertBank(layer.experts)
    H, rows = bank.hidden_size, []
    for x_H, i_K, w_K in zip(hidden, index.tolist(), weights.tolist(), strict=True):
        order = sorted(range(len(i_K)), key=lambda k: -w_K[k])
        auxiliary = order[main:]
        total = sum(w_K[k] for k in auxiliary)
        t_C = sum(w_K[k] / total * module.theta[i_K[k]] for k in auxiliary)
        t_gate, t_up, t_down = t_C[:H], t_C[H : 2 * H], t_C[2 * H :]
        y_H = torch.zeros(H)
        for k in order[:main]:
            e = bank.read(i_K[k])
            gate, up = e.gate_IH @ (t_gate * x_H), e.up_IH @ (t_up * x_H)
            if bank.has_bias:  # GPT-OSS
                gate, up = gate + e.gate_bias_I, up + e.up_bias_I
                gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
                inner = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
            else:
                inner = module.act_fn(gate) * up
            y_H = y_H + w_K[k] * (e.down_HI @ (t_down * inner) + (e.down_bias_H if bank.has_bias else 0))
        rows.append(y_H)
    return torch.stack(rows)


@pytest.mark.parametrize("family", SOME)
def test_it_is_the_equation_of_the_paper(family):
    layer, *inputs = seen(family)
    convert(layer.experts, half(layer))
    with torch.no_grad():
        expected = by_hand(layer, *inputs, half(layer)) if drawn(layer.experts) else None
        torch.testing.assert_close(layer.experts(*inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_one_vector_scales_the_hidden_state_alone(family):
    layer, hidden, index, weights = seen(family)
    main, H = half(layer), hidden.shape[-1]
    convert(layer.experts, main, single=True)
    theta = drawn(layer.experts).theta.detach()
    assert theta.shape == (layer.num_experts, H)
    with torch.no_grad():
        y = layer.experts(hidden, index, weights)
        layer.experts.main_experts = layer.top_k  # the same module as a plain one
        _, auxiliary = division(index, weights, main, layer.num_experts)
        t = shares(index, weights, auxiliary, layer.num_experts, torch.float32) @ theta
        expected = layer.experts(t * hidden, *strongest(index, weights, main))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


class Rows:
    """Counts what runs."""

    def __init__(self):
        self.rows = []

    def routed(self, *given):
        return True

    def expert(self, expert, row_R, x_RH, y_RH):
        self.rows += row_R.tolist()

    def combined(self, sum_TH):
        pass


@pytest.mark.parametrize("family", SOME)
def test_just_the_main_experts_run_and_their_arithmetic_is_their_share(family):
    layer, hidden, index, weights = seen(family)
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        layer.experts(hidden, index, weights)
    convert(layer.experts, half(layer))
    tap = Rows()
    with torch.no_grad(), FlopCounterMode(display=False) as some, observe(layer.experts, tap):
        drawn(layer.experts)(hidden, index, weights)
    K = index.shape[-1]
    per_token = torch.bincount(torch.tensor(tap.rows) // K, minlength=len(hidden))
    assert per_token.tolist() == [half(layer)] * len(hidden)
    vectors = 2 * len(hidden) * layer.experts.theta.numel()
    assert (some.get_total_flops() - vectors) * layer.top_k == full.get_total_flops() * half(layer)


@pytest.mark.parametrize("family", SOME)
def test_the_order_of_a_tokens_slots_does_not_matter(family):
    layer, hidden, index, weights = seen(family)
    weights = weights * torch.linspace(1, 0.9, index.shape[-1])  # Phi-MoE's are often equal: those go by slot
    convert(layer.experts, half(layer))
    with torch.no_grad():
        expected = drawn(layer.experts)(hidden, index, weights)
        for order in itertools.islice(itertools.permutations(range(index.shape[-1])), 6):
            found = layer.experts(hidden, index[:, order], weights[:, order])
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_shares_of_the_auxiliaries_sum_to_one_and_equal_weights_go_by_slot():
    index = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    weights = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    main, auxiliary = division(index, weights, 2, 4)
    assert main.tolist() == [[False, True, True, False], [True, True, False, False]]
    a = shares(index, weights, auxiliary, 4, torch.float32)
    torch.testing.assert_close(a, torch.tensor([[0, 0, 2 / 3, 1 / 3], [0, 0, 0.5, 0.5]]))


def test_the_only_auxiliary_of_phi_moe_counts_whole_whatever_its_weight():
    layer, hidden, index, weights = seen("phimoe")
    convert(layer.experts, 1)
    _, auxiliary = division(index, weights, 1, layer.num_experts)
    with torch.no_grad():
        before = drawn(layer.experts)(hidden, index, weights)
        lowered = torch.where(auxiliary, 0.1 * weights, weights)
        torch.testing.assert_close(layer.experts(hidden, index, lowered), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_token_whose_auxiliaries_are_gone_or_weigh_nothing_is_left_as_it_is(weight):
    layer, hidden, index, weights = seen("mixtral")
    index, weights = index[:, :3].clone(), weights[:, :3].clone()
    _, order = weights.sort(-1, descending=True)
    if weight:  # "no expert", as a skipped one
        index.scatter_(-1, order[:, 2:], layer.num_experts)
    weights.scatter_(-1, order[:, 2:], weight if weight else 0.0)
    with torch.no_grad():
        expected = layer.experts(hidden, *strongest(index, weights.masked_fill(index == layer.num_experts, -1), 2))
        convert(layer.experts, 2)
        torch.testing.assert_close(drawn(layer.experts)(hidden, index, weights), expected, atol=1e-6, rtol=0)


def test_a_skipped_expert_neither_runs_nor_stands_in():
    layer, hidden, index, weights = seen("mixtral")
    E = layer.num_experts
    convert(layer.experts, 2)
    lowest = weights.argmin(-1, keepdim=True)

    def skip(i, w):
        return i.scatter(-1, lowest, E), w

    with torch.no_grad():
        drawn(layer.experts)
        others = torch.ones_like(index, dtype=torch.bool).scatter(-1, lowest, False)
        rest = (index[others].view(len(index), -1), weights[others].view(len(index), -1))
        with rerouted(layer.experts, skip):
            found = layer.experts(hidden, index, weights)
        torch.testing.assert_close(found, layer.experts(hidden, *rest), atol=1e-6, rtol=1e-5)


def test_main_experts_may_take_over_the_weight_of_the_others():
    layer, hidden, index, weights = seen("qwen3-moe")
    main = strongest(index, weights, 2)
    with torch.no_grad():
        expected = layer.experts(hidden, main[0], main[1] / main[1].sum(-1, keepdim=True))  # all four sum to 1
        convert(layer.experts, 2, renormalize_main=True)
        torch.testing.assert_close(layer.experts(hidden, index, weights), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [f for f in SOME if f != "gpt-oss"])  # its down projection has a bias
def test_a_constant_on_the_down_projection_scales_the_output(family):
    layer, *inputs = seen(family)
    convert(layer.experts, half(layer))
    H = inputs[0].shape[-1]
    with torch.no_grad():
        before = layer.experts(*inputs)
        layer.experts.theta[:, 2 * H :] = 1.7
        torch.testing.assert_close(layer.experts(*inputs), 1.7 * before, atol=1e-6, rtol=1e-5)


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_vectors_of_experts_that_never_stand_in_learn_nothing_and_all_parts_of_the_others_do(family):
    layer, hidden, index, weights = seen(family)
    convert(layer.experts, half(layer))
    layer.experts(hidden[:3], index[:3], weights[:3]).square().sum().backward()
    _, auxiliary = division(index[:3], weights[:3], half(layer), layer.num_experts)
    stood_in = set(index[:3][auxiliary].tolist())
    H, theta = hidden.shape[-1], layer.experts.theta
    assert 0 < len(stood_in) < layer.num_experts
    for e in range(layer.num_experts):
        parts = [theta.grad[e, :H], theta.grad[e, H : 2 * H], theta.grad[e, 2 * H :]]
        assert [bool(p.any()) for p in parts] == [e in stood_in] * 3


@pytest.mark.parametrize("family", SOME)
def test_an_experts_weights_learn_nothing_from_tokens_it_only_stands_in_for(family):
    layer, hidden, index, weights = seen(family)
    convert(layer.experts, half(layer))
    drawn(layer.experts)(hidden[:2], index[:2], weights[:2]).square().sum().backward()
    main, _ = division(index[:2], weights[:2], half(layer), layer.num_experts)
    ran = set(index[:2][main].tolist())
    for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert {e for e in range(layer.num_experts) if bool(parameter.grad[e].any())} == ran


def test_the_router_learns_through_the_auxiliaries_once_vectors_differ():
    layer, hidden, index, weights = seen("mixtral")
    convert(layer.experts, 2)
    _, auxiliary = division(index, weights, 2, layer.num_experts)
    found = []
    for spread in (0, 0.3):
        applied = weights.clone().requires_grad_()
        drawn(layer.experts, spread=spread)(hidden, index, applied).square().sum().backward()
        found.append(applied.grad[auxiliary])
    assert not found[0].any()
    assert (found[1] != 0).all()


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_are_those_of_the_function(family, renormalize):
    layer, hidden, index, weights = seen(family)
    module = layer.experts.double()
    convert(module, 2, renormalize_main=renormalize)
    drawn(module.double())
    assert module.theta.dtype == torch.float64
    inputs = [hidden[:2].double().requires_grad_(), weights[:2].double().requires_grad_()]

    def run(x, w, theta):
        return torch.func.functional_call(module, {"theta": theta}, (x, index[:2], w))

    theta = module.theta.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (*inputs, theta), fast_mode=True)


# -- precision ---------------------------------------------------------------------------------------------------


def test_vectors_stay_as_wide_as_they_are_when_a_model_is_cast():
    model = built("mixtral")
    for layer in moe_layers(model):
        convert(layer.experts, 2)
        drawn(layer.experts, spread=1e-4)
    theta = moe_layers(model)[0].experts.theta
    before = theta.detach().clone()
    model(tokens()).logits.sum().backward()
    model.to(torch.bfloat16)
    assert moe_layers(model)[0].experts.theta is theta
    assert torch.equal(theta, before)
    assert theta.grad.dtype == torch.float32
    assert moe_layers(model)[0].experts.down_proj.dtype == torch.bfloat16
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_small_steps_away_from_one_are_not_rounded_off(autocast):
    layer, _, index, weights = seen("mixtral")
    convert(layer.experts, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer.experts.theta.add_(1e-4)
        *_, scale = layer.experts.stand_in(index, weights.to(torch.bfloat16))
    torch.testing.assert_close(scale.up_TH, torch.full(scale.up_TH.shape, 1.0001), atol=1e-6, rtol=0)


# -- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors")


def made(family, folder, *, vectors=True, dtype=torch.bfloat16, **parameters):
    """(source, compressed checkpoint), with vectors that are not ones."""
    source = saved(family, folder, dtype, **changes(family))
    coterie.compress(str(source), str(folder / "out"), method="compressed-experts", parameters=parameters)
    if vectors:
        for file in (folder / "out").glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                if name.endswith(".theta"):
                    drawn(torch.nn.ParameterDict({"theta": tensors[name]}))
            save_file(tensors, file, {"format": "pt"})
    return source, folder / "out"


@pytest.mark.parametrize("family", SOME)
def test_the_checkpoint_is_the_source_byte_for_byte_and_the_vectors(family, tmp_path):
    source, out = made(family, tmp_path, vectors=False)
    before, after = each_tensor(source), each_tensor(out)
    own = {name: after.pop(name) for name in after.keys() - before.keys()}
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert len(own) == len(moe_layers(model))
    shape = theta_shape(moe_layers(model)[0].experts)
    for name, theta in own.items():
        assert name.endswith(".experts.theta")
        assert theta.dtype == torch.float32
        assert theta.shape == shape
        assert (theta == 1).all()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("parameters", [{}, {"mode": "single", "renormalize_main": True}])
def test_plain_from_pretrained_and_the_streaming_engine_rebuild_it_and_agree(family, parameters, tmp_path):
    _, out = made(family, tmp_path, **parameters)
    model, stored = resident(out), each_tensor(out)
    for layer in moe_layers(model):
        expected = {"main": half(layer)}
        expected |= {"single": True, "renormalize_main": True} if parameters else {}
        assert form_of(layer).describe() == expected
        assert layer.active_experts == half(layer)
        assert any(torch.equal(layer.experts.theta, t) for n, t in stored.items() if n.endswith(".theta"))
    found = []
    steps = sweep(
        StreamedModel(Checkpoint.open(str(out))), [Batch(tokens())], finish=lambda n, b, hidden: found.append(hidden)
    )
    for step in steps:
        step.run()
    with torch.no_grad():
        assert torch.equal(found[0], model.base_model(tokens()).last_hidden_state)


@pytest.mark.parametrize("family", SOME)
def test_saving_it_again_keeps_form_and_vectors_in_float32(family, tmp_path):
    _, out = made(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    one, two = each_tensor(out), each_tensor(tmp_path / "again")
    thetas = {n for n in one if n.endswith(".theta")}
    assert thetas == {n for n in two if n.endswith(".theta")}
    assert all(two[n].dtype == torch.float32 and torch.equal(one[n], two[n]) for n in thetas)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert [form_of(layer) for layer in moe_layers(again)] == [form_of(layer) for layer in moe_layers(model)]
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_plain_checkpoint_under_a_compressed_config_starts_with_ones(tmp_path):
    source, out = made("mixtral", tmp_path, vectors=False)
    header = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", lambda c: c.update(quantization_config=header))
    model, expected = AutoModelForCausalLM.from_pretrained(source), each_tensor(source)
    for layer in moe_layers(model):
        assert isinstance(layer.experts, Compressed)
        assert layer.experts.theta.dtype == torch.float32
        assert (layer.experts.theta == 1).all()
    with torch.no_grad():
        assert torch.equal(
            model(tokens()).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits
        )
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"main": 5}, "5 experts per token run in layer 0, whose router picks 4"),
        ({"main": 0}, "layers.0.main"),
        ({"main": 2.0}, "layers.0.main"),
        ({"single": True}, "has no main"),
        ({"main": 2, "map": [0, 0, 1, 1, 2, 2, 3, 3]}, "expert map"),
        ({"main": 2, "ranks": {"gate": 4, "up": 4, "down": 4}}, "factors"),
        ({"main": 2, "theta": 1}, "layers.0.theta"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(entry, told, tmp_path):
    _, out = made("mixtral", tmp_path, vectors=False)
    edit_json(out / "config.json", lambda c: c["quantization_config"]["layers"].update({"0": entry}))
    with pytest.raises(CheckpointError, match=told):
        StreamedModel(Checkpoint.open(str(out)))


@pytest.mark.parametrize("family", SOME)
def test_sizes_count_the_main_experts_alone(family, tmp_path):
    source = saved(family, tmp_path, **changes(family))
    result = coterie.compress(str(source), str(tmp_path / "out"), method="compressed-experts")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = moe_layers(model)
    idle = sum((m.num_experts - half(m)) * m.bank.parameters_per_expert for m in layers)
    assert result.after.active_parameters == result.after.parameters - idle
    assert result.after.active_parameters < result.before.active_parameters
    assert result.after.bytes == sum(t.nbytes for t in each_tensor(tmp_path / "out").values())
    told = cli("inspect", tmp_path / "out", "--json").json()
    assert told["active_parameters"] == result.after.active_parameters
    assert {(m["top_k"], m["active"]) for m in told["moe_layers"]} == {(layers[0].top_k, half(layers[0]))}


def test_the_command_line_writes_it_and_says_what_it_is_not_yet(tmp_path):
    source = saved("olmoe", tmp_path, **TOP_4)
    done = cli("compress", source, tmp_path / "out", "--method", "compressed-experts", "--set", "auxiliary=1")
    assert done.code == 0, done.err
    assert "plain reduction" in done.err
    assert "3 run" in cli("inspect", tmp_path / "out").out
    assert {
        m["main"]
        for m in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["layers"].values()
    } == {3}
    card = (tmp_path / "out/README.md").read_text()
    assert "import coterie" in card
    assert json.loads((tmp_path / "out/coterie.json").read_text())["forms"] is True


def test_its_plan_can_be_carried_out(tmp_path):
    source, out = made("mixtral", tmp_path, vectors=False)
    coterie.compress(str(source), str(tmp_path / "again"), plan=str(out / "plan.json"))
    one, two = each_tensor(out), each_tensor(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_recipe_may_prune_first_and_then_let_vectors_stand_in(tmp_path, ids):
    source = saved("olmoe", tmp_path, **TOP_4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps:\n"
        "- {method: frequency, budget: {keep_experts: 6}}\n"
        "- {method: compressed-experts, parameters: {auxiliary: 1}}\n"
    )
    done = cli("compress", source, tmp_path / "out", "--recipe", recipe, "--tokens", ids)
    assert done.code == 0, done.err
    layers = moe_layers(resident(tmp_path / "out"))
    assert {(m.num_experts, m.top_k, m.active_experts, len(m.experts.theta)) for m in layers} == {(6, 4, 3, 6)}
    steps = json.loads((tmp_path / "out/coterie.json").read_text())
    assert [s["recipe"]["method"] for s in (*steps["earlier_steps"], steps)] == ["frequency", "compressed-experts"]


# -- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parameters": {"auxiliary": 4}}, "auxiliary=4.*picks 4 experts per token"),
        ({"parameters": {"auxiliary": 0}}, "auxiliary = 0"),
        ({"keep": 0.5}, "--keep would be ignored"),
        ({"keep_experts": 4}, "--keep-experts would be ignored"),
        ({"scope": "global"}, "--scope would be ignored"),
        ({"propagate": True}, "--propagate would be ignored"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(options, told, tmp_path):
    source = saved("mixtral", tmp_path, **TOP_4)
    with pytest.raises(UsageError, match=told):
        coterie.compress(str(source), str(tmp_path / "out"), method="compressed-experts", **options)
    assert not (tmp_path / "out").exists()


def test_a_router_that_picks_one_expert_has_none_to_stand_in_for(tmp_path):
    source = saved("mixtral", tmp_path, num_experts_per_tok=1)
    with pytest.raises(ModelError, match="picks one expert per token"):
        coterie.compress(str(source), str(tmp_path / "out"), method="compressed-experts")


def test_a_plan_for_fewer_experts_is_refused(tmp_path, ids):
    source = saved("mixtral", tmp_path, **TOP_4)
    profile = coterie.profile(str(source), tokens=str(ids), methods=["frequency"])
    for scope in ("uniform", "global"):
        with pytest.raises(UsageError, match="removes no expert"):
            coterie.plan(str(source), profile, method="compressed-experts", keep=0.5, scope=scope)


def test_mapped_factored_and_compressed_experts_are_refused():
    layer = moe_layers(tiny("mixtral"))[0]
    convert(layer.experts, 1)
    with pytest.raises(ModelError, match="already"):
        convert(layer.experts, 1)
    layer = moe_layers(tiny("mixtral"))[0]
    redirect(layer.experts, [0, 1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ModelError, match="belongs to one output"):
        convert(layer.experts, 1)
    layer = moe_layers(tiny("mixtral"))[0]
    factored.convert(
        layer.experts, {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}, dict.fromkeys(("gate", "up", "down"), 4)
    )
    with pytest.raises(ModelError, match="factors"):
        convert(layer.experts, 1)


@pytest.mark.parametrize("method", ["compressed-experts", "frequency", "dern", "magnitude"])
def test_nothing_more_is_done_to_experts_that_vectors_stand_in_for(method, tmp_path, ids):
    _, out = made("mixtral", tmp_path, vectors=False)
    options = {"frequency": {"keep": 0.5}, "dern": {"keep": 0.5}, "magnitude": {"parameters": {"sparsity": 0.5}}}
    with pytest.raises(CoterieError, match="compressed experts"):
        coterie.compress(
            str(out),
            str(tmp_path / "more"),
            method=method,
            tokens=str(ids) if method in ("frequency", "dern") else None,
            **options.get(method, {}),
        )


# -- comparing and evaluating ------------------------------------------------------------------------------------


def test_a_comparison_sees_what_evaluating_the_written_checkpoint_sees(tmp_path, ids):
    source, out = made("olmoe", tmp_path, vectors=False, dtype=torch.float32)
    held = token_file(tmp_path / "held.safetensors", seed=1)
    found = coterie.compare(
        str(source), tokens=str(ids), eval_tokens=str(held), methods=["compressed-experts", "frequency"], keep=[1, 0.5]
    )
    by_label = {c.label: c for c in found.contenders}
    assert set(by_label) == {"frequency 1", "frequency 0.5", "compressed-experts all kept"}  # a budget says nothing
    contender = by_label["compressed-experts all kept"]
    quality = coterie.evaluate([str(source), str(out)], tokens=str(held))[1]
    assert contender.quality.mean_loss == pytest.approx(quality.mean_loss, abs=1e-6)
    assert abs(contender.delta.mean) > 1e-4
    assert contender.size.bytes == sum(t.nbytes for t in each_tensor(out).values())
    assert contender.size.active_parameters < found.size.active_parameters


# -- training ----------------------------------------------------------------------------------------------------

SHORT = {"batch_size": 4, "rate": 1e-3, "router_steps": 0}


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": (torch.arange(24)[None] + 7 * torch.arange(16)[:, None]) % 40}, file)
    return file


@pytest.mark.parametrize("family", ["olmoe", "gpt-oss", "phimoe"])
def test_fine_tuning_trains_weights_and_vectors_and_stores_vectors_in_float32(family, counting, tmp_path):
    _, out = made(family, tmp_path, vectors=False)
    done = coterie.finetune(str(out), str(tmp_path / "tuned"), tokens=str(counting), steps=6, **SHORT)
    assert done.losses["all"] < done.losses["before"]
    before, after = each_tensor(out), each_tensor(tmp_path / "tuned")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(not torch.equal(after[n], before[n]) for n in before if n.endswith((".theta", "down_proj.weight")))
    fine = torch.cat([after[n].flatten() for n in after if n.endswith(".theta")])
    assert not torch.equal(fine, fine.to(torch.bfloat16).float())


def test_vectors_have_their_own_rate_and_no_weight_decay(counting, tmp_path):
    model = built("mixtral")
    for layer in moe_layers(model):
        convert(layer.experts, 2)
    thetas = [layer.experts.theta for layer in moe_layers(model)]
    arguments = training_arguments(
        tmp_path, steps=1, rate=1e-3, batch_size=1, warmup=0.0, weight_decay=0.1, device="cpu", seed=0
    )
    rows = trainers.Rows(load_tokens(counting))
    optimizer = PlainTrainer(model, arguments, rows, None, (), [stand_ins(50.0)]).create_optimizer()
    own = [g for g in optimizer.param_groups if any(p is t for p in g["params"] for t in thetas)]
    assert len(own) == 1
    assert [id(p) for p in own[0]["params"]] == [id(t) for t in thetas]
    assert (own[0]["lr"], own[0]["weight_decay"]) == (pytest.approx(0.05), 0.0)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_the_trainers_steps_on_vectors_are_the_given_multiple_of_the_rate(counting, tmp_path):
    _, out = made("mixtral", tmp_path, vectors=False)
    moved = {}
    for factor in (0.0, 10.0):
        folder = tmp_path / f"{factor}"
        coterie.finetune(str(out), str(folder), tokens=str(counting), steps=1, stand_in=factor, **SHORT)
        thetas = [t for n, t in each_tensor(folder).items() if n.endswith(".theta")]
        moved[factor] = max(float((t - 1).abs().max()) for t in thetas)
    assert moved[0.0] == 0
    assert moved[10.0] == pytest.approx(10 * SHORT["rate"], rel=1e-3)  # Adam's first step


def test_a_killed_training_goes_on_with_its_vectors(counting, tmp_path, monkeypatch):
    _, out = made("qwen3-moe", tmp_path, vectors=False)
    options = {"tokens": str(counting), **SHORT, "steps": 20, "router_steps": 2}
    whole = coterie.finetune(str(out), str(tmp_path / "whole"), **options)
    original, seen_steps, alive = training.finetune, [], []

    class Killed(Exception):
        pass

    def dying(*arguments, **given):
        def log(phase, step, total, loss):
            seen_steps.append(step)
            if step == 15 and not alive:
                raise Killed

        return original(*arguments, **{**given, "on_log": log})

    monkeypatch.setattr(training, "finetune", dying)
    with pytest.raises(Killed):
        coterie.finetune(str(out), str(tmp_path / "again"), **options)
    first = len(seen_steps)
    alive.append(True)
    resumed = coterie.finetune(str(out), str(tmp_path / "again"), **options)
    assert seen_steps[first] > 1
    assert resumed.losses["all"] == pytest.approx(whole.losses["all"], abs=1e-3)
    one, two = each_tensor(tmp_path / "whole"), each_tensor(tmp_path / "again")
    for name in (n for n in one if n.endswith(".theta")):
        torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=0)
        assert (one[name] - 1).abs().max() > 0.05
