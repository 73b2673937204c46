"""OTP: mask routers change nothing at first, learn alone, and what they leave out is not run."""

# T tokens, K slots per token, E experts

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.anatomy.forms import form_of
from coterie.anatomy.slicing import cut_experts
from coterie.compression.skipping.otp import Otp
from coterie.errors import CheckpointError, ModelError
from coterie.experts.forward import observe
from coterie.experts.mapped import redirect
from coterie.experts.masks import MaskRouter, Sampling, attach, drawn, mask_router, masks
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, sweep
from coterie.streaming.model import StreamedModel
from coterie.training.skipping import Cooling, Penalty, experts_run, renormalises, with_mask_routers
from families import FAMILIES, FEW, each_tensor, edit_json, resident, saved, tiny, token_file, tokens
from inprocess import cli, copy_of

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "olmoe", "qwen2-moe")
RENORMALISE = {"qwen3-moe": True, "mixtral": True, "deepseek-v3": True, "gpt-oss": True, "olmoe": False}
SHORT = {"steps": 6, "batch_size": 2, "rate": 0.05, "inner": 8, "lam": 1.0}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return str(token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", rows=8, padded=True))


def padded(seed=2):
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 9:] = mask[3, 2:] = False
    return Batch(tokens(4, 16, seed=seed).clone(), mask, torch.zeros(4).long())


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids, use_cache=False).logits


def masked(family, spread=0.0, seed=0, **parameters):
    """A model with mask routers; with `spread` they have opinions."""
    model = tiny(family)
    parameters = {"renormalise": RENORMALISE.get(family, True), "inner": 8, **parameters}
    routers = with_mask_routers(model, Otp(**parameters), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers.values() if spread else ():
            for p in router.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * spread)
            router.fc1.bias.zero_()
            router.fc2.bias.zero_()
    return model, routers


def sampled(routers, *how, **named):
    for router in routers.values():
        router.sampling = Sampling(*how, **named)


class Ran:
    """What experts were handed and how many rows they computed."""

    def __init__(self):
        self.rows, self.ids, self.weights = 0, [], []

    def routed(self, x_TH, index_TK, weight_TK):
        self.ids.append(index_TK.clone())
        self.weights.append(weight_TK.clone())
        return True

    def expert(self, expert, row_R, x_RH, y_RH):
        self.rows += len(row_R)

    def combined(self, sum_TH): ...


@torch.no_grad()
def watched(model, **given):
    model.set_experts_implementation("coterie")
    taps = {layer.index: Ran() for layer in moe_layers(model)}
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(observe(layer.experts, taps[layer.index]))
        out = model(**(given or {"input_ids": tokens()}), use_cache=False).logits
    return out, taps


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["nested", "subsets"])
def test_every_mask_keeps_the_strongest_and_the_last_keeps_all(candidates):
    for k in (2, 3, 4, 8):
        c_NK = masks(candidates, k)
        assert len({tuple(c.tolist()) for c in c_NK}) == len(c_NK) == (k if candidates == "nested" else 2 ** (k - 1))
        assert c_NK[:, 0].min() == 1
        assert c_NK[-1].min() == 1
        assert set(c_NK.flatten().tolist()) <= {0.0, 1.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 5), st.booleans(), st.booleans())
def test_drawn_masks_are_nested_and_keep_at_least_one(seed, tau, noise, straight_through):
    torch.manual_seed(seed)
    m_TK = drawn(torch.randn(12, 4) * 3, Sampling(tau, noise, straight_through)) @ masks("nested", 4)
    torch.testing.assert_close(m_TK[:, 0], torch.ones(12))
    assert bool((m_TK[:, 1:] <= m_TK[:, :-1] + 1e-6).all())
    assert m_TK.min() >= -1e-6
    if straight_through:
        torch.testing.assert_close(m_TK, m_TK.round(), atol=1e-5, rtol=0)


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    z_N = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    share_N = drawn(z_N.expand(20000, 4), Sampling(0.05, straight_through=True)).mean(0)
    torch.testing.assert_close(share_N, z_N.exp(), atol=0.015, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["nested", "subsets"]))
def test_the_choice_is_the_equation_token_by_token(seed, renormalise, candidates):
    g = torch.Generator().manual_seed(seed)
    T, H, E, K = 10, 6, 9, 4
    router = MaskRouter(H, K, 3, candidates=candidates, renormalise=renormalise)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    x_TH = torch.randn(T, H, generator=g)
    index_TK = torch.rand(T, E, generator=g).topk(K).indices
    weight_TK = torch.rand(T, K, generator=g) + 0.01
    index_TK[0, 1], weight_TK[0, 1] = E, 0.0  # a slot without an expert
    with torch.no_grad():
        new_index, new_weight = router.choose(x_TH, index_TK, weight_TK, E)
    for t in range(T):
        order = sorted(range(K), key=lambda k: (index_TK[t, k] >= E, -float(weight_TK[t, k])))
        inner = router.fc1.weight @ x_TH[t] + router.fc1.bias
        z_N = router.fc2.weight @ torch.nn.functional.silu(torch.cat([inner, weight_TK[t, order]])) + router.fc2.bias
        mask = masks(candidates, K)[int(z_N.argmax())].tolist()
        kept = [k for k, m in zip(order, mask, strict=True) if m and index_TK[t, k] < E]
        assert order[0] in kept
        scale = float(weight_TK[t].sum() / weight_TK[t, kept].sum()) if renormalise else 1.0
        for k in range(K):
            assert int(new_index[t, k]) == (int(index_TK[t, k]) if k in kept else E)
            assert float(new_weight[t, k]) == pytest.approx(float(weight_TK[t, k]) * scale * (k in kept), rel=1e-5)


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_mask_routers_change_no_bit(family):
    model, routers = masked(family)
    assert len(routers) == len(moe_layers(model)) > 0
    assert torch.equal(logits(model), logits(tiny(family)))


@pytest.mark.parametrize("family", SOME)
def test_only_mask_routers_have_gradients_and_all_of_them_do(family):
    model, routers = masked(family)
    sampled(routers, 1.0)
    logits_BLV = model(tokens(), use_cache=False).logits
    logits_BLV.log_softmax(-1)[..., 0].sum().backward()  # the distillation's part alone reaches every layer
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".mask_router." in name), name
        if parameter.grad is not None:
            assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("family", SOME)
def test_soft_masks_become_the_hard_ones_as_the_temperature_falls(family):
    model, routers = masked(family, spread=0.5)
    hard = logits(model)
    assert not torch.allclose(hard, logits(tiny(family)), atol=1e-3)
    sampled(routers, 1e-4, noise=False)
    torch.testing.assert_close(logits(model), hard, atol=1e-4, rtol=1e-3)
    sampled(routers, 3.0, noise=False)
    assert not torch.allclose(logits(model), hard, atol=1e-4)
    sampled(routers, 3.0, noise=False, straight_through=True)
    torch.testing.assert_close(logits(model), hard, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", SOME)
def test_skipped_experts_do_not_run(family):
    model, routers = masked(family, spread=0.5)
    stock = logits(model)
    told = experts_run(model, [Batch(tokens())])
    found, taps = watched(model)
    torch.testing.assert_close(found, stock, atol=1e-5, rtol=1e-4)
    rows = sum(tap.rows for tap in taps.values())
    slots = tokens().numel() * sum(router.slots for router in routers.values())
    assert rows == round(told["share"] * slots) < slots
    for layer, entry in zip(moe_layers(model), told["layers"], strict=True):
        [ids_TK] = taps[layer.index].ids
        ran_T = (ids_TK < layer.router_size).sum(-1)
        assert ran_T.min() >= 1
        assert float(ran_T.double().mean()) == pytest.approx(entry["experts_per_token"])
        shares = [float((ran_T == r).double().mean()) for r in range(layer.top_k + 1)]
        assert entry["tokens_by_experts"] == pytest.approx(shares)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek-v3"])
def test_weights_of_what_runs_are_scaled_or_left_alike_in_training_and_use(family, renormalise):
    model, routers = masked(family, spread=0.5, seed=1, renormalise=renormalise)
    _, plain = watched(tiny(family))
    _, hard = watched(model)
    sampled(routers, 1e-4, noise=False)
    _, soft = watched(model)
    first = moe_layers(model)[0].index
    before, after, trained = (taps[first].weights[0] for taps in (plain, hard, soft))
    torch.testing.assert_close(trained, after, atol=1e-5, rtol=1e-4)
    gone_TK = after == 0
    assert gone_TK.any()
    if renormalise:
        torch.testing.assert_close(after.sum(-1), before.sum(-1))
    else:
        torch.testing.assert_close(after, before.masked_fill(gone_TK, 0.0))


@pytest.mark.parametrize(("family", "expected"), [*RENORMALISE.items(), ("qwen2-moe", False), ("phimoe", False)])
def test_whether_a_router_renormalises_is_read_off_its_weights(family, expected):
    assert renormalises(tiny(family), padded()) is expected


@pytest.mark.parametrize("family", SOME)
def test_padding_counts_in_no_share(family):
    found = []
    for seed in (3, 4):  # other tokens where there is padding
        batch = padded()
        batch.ids_BL[~batch.mask_BL] = tokens(4, 16, seed=seed)[~batch.mask_BL]
        model, routers = masked(family, spread=0.5)
        told = experts_run(model, [batch])
        sampled(routers, 1.0, noise=False)
        mask = batch.mask_BL.long()
        model(batch.ids_BL, attention_mask=mask, use_cache=False)
        found.append((told, Penalty(routers, Otp(lam=1.0))({"attention_mask": mask}).item()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_the_penalty_is_the_mean_share_or_its_squared_distance_to_the_ratio():
    model, routers = masked("deepseek-v3", spread=0.5)
    sampled(routers, 1.0, noise=False)
    model(tokens(), use_cache=False)
    share = torch.stack([r.mass_T.mean() for r in routers.values()]).mean().item()
    inputs = {"attention_mask": torch.ones_like(tokens())}
    assert 0.25 < share < 1
    assert Penalty(routers, Otp(lam=0.3))(inputs).item() == pytest.approx(0.3 * share)
    asked = Otp(ratio=0.5, hold=7)
    assert Penalty(routers, asked)(inputs).item() == pytest.approx(7 * (share - 0.5) ** 2)


def test_the_temperature_falls_from_the_first_step_to_the_last():
    method = Otp(steps=5, tau_start=4.0, tau_end=0.25)
    assert [method.tau(step) for step in range(5)] == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])
    _, routers = masked("mixtral")
    state = type("State", (), {"global_step": 3})
    Cooling(routers, method).on_step_begin(None, state, None)
    assert {router.sampling.tau for router in routers.values()} == {0.5}


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def made(family, tmp_path, ids, dtype=torch.bfloat16, changes=None, **parameters):
    folder = saved(family, tmp_path, dtype, **(changes or {}))
    out = tmp_path / "out"
    result = coterie.compress(str(folder), str(out), tokens=ids, method="otp", parameters={**SHORT, **parameters})
    return folder, out, result


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ids):
    """(source, result) of Mixtral."""
    return made("mixtral", tmp_path_factory.mktemp("finished"), ids)[:2]


def opinionated(folder, spread=0.5):
    """Overwrite the mask routers of a checkpoint with random ones."""
    generator = torch.Generator().manual_seed(5)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".mask_router." in name:
                tensors[name] = torch.randn(tensor.shape, generator=generator) * spread
        save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def streamed_hidden(folder):
    streamed, found = StreamedModel(Checkpoint.open(folder), compute_dtype="float32"), {}

    def finish(number, batch, hidden_BLH):
        found[number] = hidden_BLH

    for step in sweep(streamed, [Batch(tokens())], finish=finish):
        step.run()
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_the_source_and_mask_routers_and_loads_everywhere(family, tmp_path, ids):
    folder, out, result = made(family, tmp_path, ids, steps=1)
    before, after = each_tensor(folder), each_tensor(out)
    new = {name for name in after if name not in before}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert new
    assert all(".experts.mask_router.fc" in name and after[name].dtype == torch.float32 for name in new)
    assert result.after.bytes == sum(t.nbytes for t in after.values())
    assert result.after.parameters - result.before.parameters == sum(after[name].numel() for name in new)
    assert result.after.bytes_of_expert == result.before.bytes_of_expert
    opinionated(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert all(mask_router(layer.experts) is not None for layer in moe_layers(model))
    assert not torch.allclose(logits(model), logits(resident(folder)), atol=1e-4)
    with torch.no_grad():
        hidden = model.base_model(tokens(), use_cache=False)[0]
    torch.testing.assert_close(streamed_hidden(out), hidden, atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)


def test_in_bfloat16_mask_routers_stay_float32_and_choose_from_what_they_see(tmp_path, finished):
    out = copy_of(finished[1], tmp_path / "out")
    opinionated(out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    cast = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(torch.bfloat16).eval()
    for model in (loaded, cast):
        router = mask_router(moe_layers(model)[0].experts)
        assert {p.dtype for p in router.parameters()} == {torch.float32}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert torch.isfinite(logits(model)).all()
        x_TH = torch.randn(32, router.fc1.in_features).bfloat16()
        index_TK, weight_TK = torch.arange(8).view(4, 2).repeat(8, 1), torch.rand(32, 2).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            narrow, _ = router.choose(x_TH, index_TK, weight_TK, 8)
        assert torch.equal(narrow, router.choose(x_TH.float(), index_TK, weight_TK.float(), 8)[0])
    streamed = StreamedModel(Checkpoint.open(out), compute_dtype="bfloat16")
    streamed.load_layer(0)
    assert mask_router(streamed.moe[0].experts).fc1.weight.dtype == torch.float32


def test_mask_routers_that_a_checkpoint_lacks_keep_every_expert(tmp_path, finished):
    folder, out = finished[0], copy_of(finished[1], tmp_path / "out")
    for file in out.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if ".mask_router." not in name}
        save_file(kept, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))


@pytest.mark.parametrize("before", ["m-smoe", "low-rank", "compressed-experts", "reap"])
def test_it_works_on_what_other_methods_made(before, tmp_path, ids):
    folder = saved("deepseek-v3", tmp_path, torch.float32)
    options = {
        "m-smoe": {"keep": 0.5, "tokens": ids},
        "low-rank": {"parameters": {"rank": 8}},
        "compressed-experts": {},
        "reap": {"keep": 0.75, "tokens": ids},
    }[before]
    coterie.compress(str(folder), str(tmp_path / "first"), method=before, **options)
    coterie.compress(str(tmp_path / "first"), str(tmp_path / "out"), tokens=ids, method="otp", parameters=SHORT)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32).eval()
    opinionated(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    one, two = form_of(moe_layers(first)[0]).describe(), form_of(moe_layers(model)[0]).describe()
    assert {k: v for k, v in two.items() if k != "skip"} == one
    assert not torch.allclose(logits(model), logits(first), atol=1e-4)
    with torch.no_grad():
        hidden = model.base_model(tokens(), use_cache=False)[0]
    torch.testing.assert_close(streamed_hidden(tmp_path / "out"), hidden, atol=1e-4, rtol=1e-3)
    for layer in moe_layers(model):
        mask_router(layer.experts).reset()  # all experts run: the model it was made from
    torch.testing.assert_close(logits(model), logits(first), atol=1e-5, rtol=1e-4)


def test_a_mask_router_stands_before_an_expert_map_and_sees_which_slots_are_empty():
    layer = moe_layers(tiny("mixtral"))[0]
    cut_experts(layer, range(4))
    redirect(layer.experts, [0, 1, 2, 3, 0, 1, 2, 3])
    router = MaskRouter(64, 2, 4)
    router.reset()
    attach(layer.experts, router)
    seen = []
    router.watch = lambda slots_TK, kept_TK: seen.append(slots_TK)
    index_TK = torch.tensor([[0, 5], [7, 8], [4, 3]])  # 8: the router's "no expert"
    with torch.no_grad():
        layer.experts(torch.randn(3, 64), index_TK, torch.rand(3, 2))
    assert seen[0].tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize("after", ["m-smoe", "reap"])
def test_mask_routers_survive_what_other_methods_do_next(after, tmp_path, ids):
    _, out, _ = made("mixtral", tmp_path, ids, torch.float32)
    opinionated(out)
    coterie.compress(str(out), str(tmp_path / "next"), method=after, keep=0.5, tokens=ids)
    one, two = (each_tensor(f) for f in (out, tmp_path / "next"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items() if ".mask_router." in name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "next", dtype=torch.float32).eval()
    told = experts_run(model, [Batch(tokens())])
    assert 0.5 < told["share"] < 1
    _, taps = watched(model)
    assert sum(tap.rows for tap in taps.values()) == round(told["share"] * tokens().numel() * 2 * len(taps))


# -- the job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_training_comes_to_the_share_asked_for_and_tells_it(family, tmp_path, ids):
    changes = {"num_experts_per_tok": 4}
    _, out, result = made(family, tmp_path, ids, changes=changes, ratio=0.6, steps=60, batch_size=4, hold=50.0)
    told = json.loads((out / "coterie.json").read_text())["skipping"]
    assert told["share"] == pytest.approx(0.6, abs=0.12)
    assert told["picked_per_token"] == 4
    assert told["experts_per_token"] == pytest.approx(4 * told["share"])
    assert result.after.active_parameters < result.before.active_parameters
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    stored = load_file(ids)
    batch = Batch(stored["input_ids"], stored["attention_mask"].bool())
    assert experts_run(model, [batch])["share"] == pytest.approx(told["share"], abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, ids):
    folder, found = saved("mixtral", tmp_path), []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        coterie.compress(str(folder), str(tmp_path / name), tokens=ids, method="otp", parameters=SHORT, seed=seed)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_run_that_was_broken_off_goes_on_and_ends_with_the_same_bytes(tmp_path, ids, monkeypatch):
    folder = saved("qwen3-moe", tmp_path)
    settings = [x for k, v in {**SHORT, "steps": 22}.items() for x in ("--set", f"{k}={v}")]

    def command(out):
        return ("compress", folder, tmp_path / out, "--method", "otp", "--tokens", ids, *settings, "--json")

    assert cli(*command("whole")).code == 0
    begin, steps = Cooling.on_step_begin, []

    def die(self, args, state, control, **kwargs):
        if state.global_step == 15:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    def count(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(Cooling, "on_step_begin", die)
    assert cli(*command("broken")).code != 0
    assert list((tmp_path / "broken.partial" / "training").glob("checkpoint-*"))
    monkeypatch.setattr(Cooling, "on_step_begin", count)
    done = cli(*command("broken"))
    assert done.code == 0, done.err
    assert steps[0] > 0
    assert done.json()["skipping"]["picked_per_token"] == 2
    whole, broken = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "broken"))
    assert whole == broken


def test_evaluate_and_compare_take_the_result_and_tell_what_ran(finished, ids, tmp_path):
    folder, out = finished[0], copy_of(finished[1], tmp_path / "out")
    opinionated(out)
    done = cli("evaluate", folder, out, "--tokens", ids, "--json")
    assert done.code == 0, done.err
    assert done.json()[1]["mean"]["kl"] > 0
    stored = load_file(ids)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    told = experts_run(model, [Batch(stored["input_ids"], stored["attention_mask"].bool())])
    assert 1 < told["experts_per_token"] < 2
    assert done.json()[1]["model"] == f"{out} ({told['experts_per_token']:.2f} experts per token)"
    assert done.json()[0]["model"] == str(folder)
    done = cli("compare", folder, "--tokens", ids, "--checkpoint", out, "--methods", "reap", "--keep", "0.5", "--json")
    assert done.code == 0, done.err
    assert any(str(out) in entry["label"] for entry in done.json()["contenders"])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "ratio=1.5"], "ratio"),
        (["--set", "candidates=free"], "candidates"),
        (["--set", "tau_end=5"], "above tau_start"),
        (["--keep", "0.5"], "would be ignored"),
        (["--set", "steps=0"], "steps"),
    ],
)
def test_what_cannot_be_is_refused(options, said, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    done = cli("compress", folder, tmp_path / "out", "--tokens", ids, "--method", "otp", *options)
    assert done.code == 2, done.out + done.err
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_models_with_nothing_to_skip_are_refused(tmp_path, finished, ids):
    one = saved("mixtral", tmp_path, num_experts_per_tok=1)
    for dry in (True, False):
        options = ["--dry-run"] if dry else []
        done = cli("compress", one, tmp_path / "out", "--tokens", ids, "--method", "otp", *options)
        assert done.code == 2
        assert "there is none to skip" in done.err
    with pytest.raises(ModelError, match="has a mask router already"):
        coterie.compress(str(finished[1]), str(tmp_path / "twice"), tokens=ids, method="otp", parameters=SHORT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inner": 0}, "skip.inner"),
        ({"candidates": "free"}, "skip.candidates"),
        ({"inner": 9}, "another shape"),
        ({"more": 1}, "skip.more"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(change, said, tmp_path, finished):
    out = copy_of(finished[1], tmp_path / "out")
    edit_json(out / "config.json", lambda c: c["quantization_config"]["layers"]["0"]["skip"].update(change))
    with pytest.raises(CheckpointError, match=said):
        StreamedModel(Checkpoint.open(out))
