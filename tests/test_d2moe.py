"""D2MoE: experts stored once and read at several widths, and routers that choose a width for every token."""

# E experts, K widths, T tokens, S slots per token, O outputs and I inputs of a matrix

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.anatomy.forms import form_of
from coterie.api.runtime import Runtime
from coterie.compression.quantizers import Spec, mwq, nested_bytes
from coterie.compression.quantizing.d2moe_router import D2MoeRouter
from coterie.compression.sizes import measure
from coterie.errors import CheckpointError, ModelError, UsageError
from coterie.experts import nested, packing
from coterie.experts.forward import observe
from coterie.experts.levels import BitRouter, Learning, bit_router, overflow
from coterie.streaming.lockstep import Batch
from coterie.training.distillation import distillation_loss
from coterie.training.widths import BitPenalty, _note_padding, widths_run, with_bit_routers
from families import FEW, each_tensor, edit_json, saved, token_file, tokens
from inprocess import cli, fingerprint
from test_quantize import KILLED, ended

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "qwen2-moe")
QUICK = {"group_size": 16, "search": False, "quantizer": "rtn"}
SHORT = {"steps": 6, "batch_size": 4, "rate": 0.05}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return str(token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", rows=8, padded=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, its nested form: 2, 3 and 4 bits, rounded without text) of a family."""
    folder, known = tmp_path_factory.mktemp("made"), {}

    def make(family):
        if family not in known:
            source = saved(family, folder / "source", torch.float32)
            coterie.compress(str(source), str(folder / family), method="d2moe", parameters=QUICK)
            known[family] = (source, folder / family)
        return known[family]

    return make


def loaded(folder, planes=None):
    return coterie.load(str(folder), dtype="float32", planes=planes)[0]


@torch.no_grad()
def logits(model, ids_BL=None):
    return model(tokens() if ids_BL is None else ids_BL, use_cache=False).logits


def routed(folder, spread=0.0, seed=0, **parameters):
    """A nested model with bit routers, as they are trained; with `spread` they have opinions."""
    model = loaded(folder)
    routers = with_bit_routers(model, D2MoeRouter(**parameters))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers.values() if spread else ():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * spread)
            router.bias.zero_()
    return model, routers


def in_use(routers):
    for router in routers.values():
        router.learning = None


# -- what is stored ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.integers(0, 999))
def test_stored_tensors_stand_for_the_same_matrices_at_every_level(rows, columns, base, planes, symmetric, seed):
    g = torch.Generator().manual_seed(seed)
    spec = Spec(base, 16, symmetric, torch.float16)
    weights = [torch.randn(rows, columns, generator=g) for _ in range(3)]
    weights[0][0] = 0  # a residual of 0 counts as +1
    codes = [mwq(w, None, base_bits=base, planes=planes, spec=spec) for w in weights]
    parts = nested.assembled(codes, torch.float16)
    shapes = nested.expert_tensors(3, (rows, columns), base, planes, 16, symmetric=symmetric, dtype=torch.float16)
    assert {k: (tuple(t.shape), t.dtype) for k, t in parts.items()} == shapes
    formula = 3 * nested_bytes(rows, columns, base, planes, 16, symmetric=symmetric)
    assert sum(t.nbytes for t in parts.values()) == formula
    for e, code in enumerate(codes):
        w_OI = packing.dense(
            packing.unpack(parts["packed"][e], base, columns),
            base,
            16,
            parts["scale"][e],
            parts["zero"][e] if "zero" in parts else None,
        )
        assert torch.equal(w_OI, code.dense(0))
        for k in range(1, planes + 1):
            sign_OI = packing.unpack(parts[f"plane{k}"][e], 1, columns)
            assert set(sign_OI.flatten().tolist()) <= {0, 1}
            assert torch.equal(sign_OI.bool(), weights[e] - w_OI >= 0)
            scale_OI = parts[f"plane{k}_scale"][e].float().repeat_interleave(16, 1)[:, :columns]
            w_OI = w_OI + torch.where(sign_OI.bool(), scale_OI, -scale_OI)
            assert torch.equal(w_OI, code.dense(k))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_wider_view_has_the_tensors_of_the_narrower_one_and_one_plane_more(family, made):
    _, out = made(family)
    before: dict[str, torch.Tensor] = {}
    for planes in range(3):
        now = {k: t for k, t in loaded(out, planes).state_dict().items() if ".experts." in k}
        fresh = {key.rpartition(".")[2] for key in now.keys() - before.keys()}
        if planes:
            assert fresh == {f"plane{planes}_{part}{p}" for part in ("", "scale_") for p in ("gate", "up", "down")}
        assert all(torch.equal(before[key], now[key]) for key in before)
        before = now


@pytest.mark.parametrize("family", SOME)
def test_fewer_planes_compute_what_the_whole_does_at_that_level(family, made, ids):
    _, out = made(family)
    whole = loaded(out)
    losses = []
    for planes in range(3):
        for layer in moe_layers(whole):
            layer.experts.level = planes
        assert torch.equal(logits(loaded(out, planes)), logits(whole))
        [result] = coterie.evaluate([str(out)], tokens=ids, planes=planes)
        losses.append(result.mean_loss)
        assert result.model.endswith(f"{planes} planes")
    assert len(set(losses)) == 3
    assert coterie.evaluate([str(out)], tokens=ids)[0].mean_loss == losses[2]


@pytest.mark.parametrize("family", FEW)
def test_streaming_computes_what_transformers_does(family, made, ids):
    from safetensors.torch import load_file

    _, out = made(family)
    [result] = coterie.evaluate([str(out)], tokens=ids, planes=1)
    model, text, total, count = loaded(out, 1), load_file(ids), 0.0, 0
    for row, mask in zip(text["input_ids"], text["attention_mask"]):
        row = row[mask.bool()][None]
        total += float(torch.nn.functional.cross_entropy(logits(model, row)[0, :-1], row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    assert result.domains[0].loss == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_planes_that_are_not_asked_for_are_neither_read_nor_held(family, made):
    _, out = made(family)
    sizes = dict.fromkeys(range(3), 0)
    for key, tensor in each_tensor(out).items():
        for planes in range(nested.plane_of(key), 3):
            sizes[planes] += tensor.nbytes
    assert sizes[0] < sizes[1] < sizes[2]
    read = []
    for planes in range(3):
        streamed = Runtime().open(str(out), planes=planes)
        for index in range(len(streamed.layers)):
            streamed.load_layer(index)
        read.append(streamed.checkpoint.bytes_read)
    assert [read[2] - read[planes] for planes in range(3)] == [sizes[2] - sizes[planes] for planes in range(3)]
    assert [measure(Runtime().open(str(out), planes=p)).bytes for p in range(3)] == list(sizes.values())
    held = [sum(t.numel() for k, t in loaded(out, p).state_dict().items() if ".experts." in k) for p in range(3)]
    planes_of = {key: nested.plane_of(key) for key in each_tensor(out)}
    more = [sum(t.numel() for k, t in each_tensor(out).items() if planes_of[k] > p) for p in range(3)]
    assert [held[2] - held[planes] for planes in range(3)] == more


def test_a_lower_view_does_not_notice_what_is_wrong_with_higher_planes(made, ids, tmp_path):
    import shutil

    _, out = made("mixtral")
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if nested.plane_of(key) == 2 and "scale" not in key:
            data[8 + length + entry["data_offsets"][0] + 5] ^= 4
    file.write_bytes(data)
    for load in (loaded, lambda folder: coterie.evaluate([str(folder)], tokens=ids)):
        with pytest.raises(CheckpointError, match=r"plane2_\w+ is damaged"):
            load(broken)
    assert torch.equal(logits(loaded(broken, 1)), logits(loaded(out, 1)))
    results = [coterie.evaluate([str(folder)], tokens=ids, planes=1)[0].mean_loss for folder in (broken, out)]
    assert results[0] == results[1]


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_file_are_those_of_the_plan_and_the_formula(family, dtype, tmp_path):
    source = saved(family, tmp_path, dtype)
    parameters = {**QUICK, "base_bits": 3, "planes": 1, "attention_bits": 4}
    result = coterie.compress(str(source), str(tmp_path / "out"), method="d2moe", parameters=parameters)
    tensors = each_tensor(tmp_path / "out")
    assert sum(t.nbytes for t in tensors.values()) == result.plan.bytes == result.after.bytes
    assert result.plan.expert_bits == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in moe_layers(model):
        shapes = layer.experts.packed_shapes.values()
        wanted = sum(layer.num_experts * nested_bytes(*shape, 3, 1, 16, symmetric=False) for shape in shapes)
        mine = [t for k, t in tensors.items() if f".{layer.index}." in k and ".experts." in k and "bias" not in k]
        assert sum(t.nbytes for t in mine) == wanted
    one, two = (measure(Runtime().open(str(folder))) for folder in (source, tmp_path / "out"))
    assert (one.parameters, one.active_parameters) == (two.parameters, two.active_parameters)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_one_width_is_plain_rounding_in_groups(family, made, tmp_path):
    source, _ = made(family)
    coterie.compress(str(source), str(tmp_path / "one"), method="d2moe", parameters={**QUICK, "planes": 0})
    others = {"attention_bits": 16, "shared_bits": 16, "dense_bits": 16}
    coterie.compress(str(source), str(tmp_path / "two"), method="quantize", parameters={**QUICK, "bits": 2, **others})
    one, two = each_tensor(tmp_path / "one"), each_tensor(tmp_path / "two")
    assert not any(nested.plane_of(key) for key in one)
    for key in one:
        assert torch.equal(one[key].flatten(), two[key].flatten()), key
    torch.testing.assert_close(logits(loaded(tmp_path / "one")), logits(loaded(tmp_path / "two")), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def by_inputs(tmp_path_factory, ids):
    """A result of d2moe on text."""
    folder = tmp_path_factory.mktemp("by_inputs")
    source = saved("qwen3-moe", folder, torch.float32)
    parameters = {"group_size": 16, "search": False, "least_tokens": 4}
    return coterie.compress(str(source), str(folder / "out"), method="d2moe", parameters=parameters, tokens=ids)


def test_every_plane_lowers_the_error_of_outputs_and_of_weights(by_inputs):
    assert len(by_inputs.figures) == 2
    for figures in by_inputs.figures.values():
        for kind in ("output_error", "weight_error"):
            errors = [figures[f"experts_{bits}_bits_{kind}"] for bits in (2, 3, 4)]
            assert errors[0] > errors[1] > errors[2] == figures[f"experts_{kind}"] > 0
    assert by_inputs.record["quantization"]["planes"] == 2


def test_a_loaded_model_saved_again_is_the_same_also_with_fewer_planes(made, tmp_path):
    _, out = made("deepseek-v3")
    loaded(out).save_pretrained(tmp_path / "again")
    one, two = each_tensor(out), each_tensor(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key].to(two[key].dtype), two[key]) for key in one)
    narrow = loaded(out, 1)
    narrow.save_pretrained(tmp_path / "narrow")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)), logits(narrow)
    )
    assert max(map(nested.plane_of, each_tensor(tmp_path / "narrow"))) == 1


def test_nested_experts_are_described_as_they_are(made):
    model = loaded(made("gpt-oss")[1], 1)
    forms = [form_of(layer).describe() for layer in moe_layers(model)]
    assert forms == [{"nested": {"group": 16, "symmetric": False, "base": 2, "planes": 1}}] * len(forms)


def test_a_killed_run_ends_with_the_same_bytes(made, ids, tmp_path):
    source, _ = made("qwen3-moe")
    given = ("--method", "d2moe", "--tokens", ids, "--set", "group_size=16", "--set", "search=false")
    given = (*given, "--set", "planes=1", "--set", "compensate=paper", "--no-report")
    assert ended(("compress", source, tmp_path / "whole", *given), -1) == 0
    whole = fingerprint(tmp_path / "whole")
    assert ended(("compress", source, tmp_path / "out", *given), 2) == KILLED
    assert ended(("compress", source, tmp_path / "out", *given), -1) == 0
    assert fingerprint(tmp_path / "out") == whole


# -- bit routers in the forward pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_fresh_bit_routers_change_no_bit(family, made):
    model, routers = routed(made(family)[1])
    in_use(routers)
    assert len(routers) == len(moe_layers(model)) > 0
    assert torch.equal(logits(model), logits(loaded(made(family)[1])))
    assert all(not router.weight.any() for router in routers.values())


@pytest.mark.parametrize("family", SOME)
def test_bit_routers_forced_to_a_width_give_the_logits_of_that_view(family, made):
    model, routers = routed(made(family)[1], spread=0.3)
    in_use(routers)
    for planes in range(3):
        for router in routers.values():
            router.bias.data.view(-1, 3).copy_(torch.eye(3)[planes] * 1e6)
        assert torch.equal(logits(model), logits(loaded(made(family)[1], planes)))


class Ran:
    """What experts received, at which level, and put out; and how many tokens ran."""

    def __init__(self):
        self.rows = []

    def routed(self, x_TH, index_TK, weight_TK):
        self.index_TS = index_TK.clone()
        return True

    def expert(self, expert, row_R, x_RH, y_RH):
        self.rows.append((expert, row_R, x_RH, y_RH))

    def combined(self, sum_TH): ...


@pytest.mark.parametrize("family", SOME)
def test_every_row_is_computed_at_the_width_its_expert_router_prefers(family, made):
    from coterie.experts.forward import expert_output

    model, routers = routed(made(family)[1], spread=0.3)
    in_use(routers)
    layer = moe_layers(model)[0]
    tap, router = Ran(), routers[layer.index]
    with observe(layer.experts, tap):
        logits(model)
    seen = set()
    for expert, _, x_RH, y_RH in tap.rows:
        mine = slice(expert * 3, expert * 3 + 3)
        level_R = (x_RH.float() @ router.weight[mine].T + router.bias[mine]).argmax(-1)
        for level in set(level_R.tolist()):
            seen.add(level)
            layer.experts.level = level
            rows = level_R == level
            with torch.no_grad():
                torch.testing.assert_close(
                    y_RH[rows], expert_output(layer.experts, expert, x_RH[rows]), atol=1e-5, rtol=1e-5
                )
        layer.experts.level = None
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("gradient", ["mixture", "chosen"])
@pytest.mark.parametrize("family", SOME)
def test_training_has_the_values_of_use_and_gradients_of_bit_routers_alone(family, gradient, made):
    model, routers = routed(made(family)[1], spread=0.3)
    in_use(routers)
    used = logits(model)
    for router in routers.values():
        router.learning = Learning(gradient)
    trained = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(trained, used, atol=1e-5, rtol=1e-5)
    trained.log_softmax(-1)[..., 0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".bit_router." in name), name
        if parameter.grad is not None:
            assert float(parameter.grad.abs().sum()) > 0, name


def test_a_wider_probability_of_what_runs_is_the_only_way_a_gradient_takes(made):
    """d(y)/d(logits) is y d(log p_k*)."""
    router = BitRouter(4, 2, (2, 3, 4))
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)))
        router.bias.zero_()
    router.learning = Learning("chosen")
    x_TH, index_TS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([[0], [1]] * 2 + [[2]])
    _, levels = router.choose(x_TH, index_TS, 2)
    assert torch.equal(levels.factor_TK.detach(), torch.ones(5, 1))
    (levels.factor_TK[:4, 0] * torch.tensor([3.0, -1.0, 0.5, 2.0])).sum().backward()
    found = router.weight.grad.clone()
    router.weight.grad = None
    z_TEK = (x_TH @ router.weight.T).view(5, 2, 3)
    log_p = torch.stack([z_TEK[t, index_TS[t, 0]].log_softmax(-1).max() for t in range(4)])
    (log_p * torch.tensor([3.0, -1.0, 0.5, 2.0])).sum().backward()
    torch.testing.assert_close(found, router.weight.grad)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_mixture_learns_what_every_width_would_have_put_out(family, made):
    """Its gradient is that of sum_k p_k E^(k)(x)."""
    from coterie.experts.forward import expert_output

    model, routers = routed(made(family)[1], spread=0.3)
    layer = moe_layers(model)[0]
    module, router = layer.experts, routers[layer.index]
    router.learning = Learning("mixture")
    g = torch.Generator().manual_seed(0)
    x_TH = torch.randn(6, router.in_features, generator=g)
    index_TS = torch.rand(6, router.experts, generator=g).topk(2).indices
    weight_TS, c_TH = torch.rand(6, 2, generator=g), torch.randn(6, router.in_features, generator=g)
    (module(x_TH, index_TS, weight_TS) * c_TH).sum().backward()
    found, router.bias.grad = router.bias.grad.clone(), None
    total = torch.zeros(())
    p_TEK = router(x_TH).view(6, -1, 3).softmax(-1)
    for level in range(3):
        module.level = level
        for t in range(6):
            for e, w in zip(index_TS[t].tolist(), weight_TS[t]):
                with torch.no_grad():
                    y_H = expert_output(module, e, x_TH[t, None])[0]
                total = total + p_TEK[t, e, level] * w * (y_H * c_TH[t]).sum()
    total.backward()
    torch.testing.assert_close(found, router.bias.grad, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans(), st.booleans())
def test_no_width_of_an_expert_takes_more_tokens_than_its_capacity(seed, T, of_expert, padded):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    E, c_K = 4, (0.3, 0.4, 0.3)
    index_TS = torch.rand(T, E + 1, generator=g).topk(2).indices  # id E is no expert
    level_TS = torch.randint(0, 3, (T, 2), generator=g)
    real_T = torch.rand(T, generator=g) < 0.7 if padded else None
    over_TS = overflow(index_TS, level_TS, E, Learning("mixture", c_K, of_expert, real_T))
    counts_T = torch.ones(T, dtype=torch.bool) if real_T is None else real_T
    assert not over_TS[index_TS == E].any()
    assert not over_TS[~counts_T].any()
    for e in range(E):
        mine_TS = (index_TS == e) & counts_T[:, None]
        whole = int(mine_TS.sum()) if of_expert else int(counts_T.sum())
        for k in range(3):
            here_TS = mine_TS & (level_TS == k)
            limit = math.floor(round(c_K[k] * whole, 6))
            assert int((here_TS & ~over_TS).sum()) == min(int(here_TS.sum()), limit)


@pytest.mark.parametrize("family", FEW)
def test_tokens_beyond_capacity_do_without_that_expert_in_training_only(family, made):
    model, routers = routed(made(family)[1], of_expert=True)
    layer, T = moe_layers(model)[0], tokens().numel()
    taps = []
    for learning in (True, False):
        if not learning:
            in_use(routers)
        torch.manual_seed(0)
        taps.append(Ran())
        with observe(layer.experts, taps[-1]):
            logits(model)
    routed_E = torch.bincount(taps[1].index_TS.flatten(), minlength=layer.num_experts + 1)
    ran_E = torch.bincount(taps[0].index_TS.flatten(), minlength=layer.num_experts + 1)
    assert int(routed_E[-1]) == 0
    assert int(routed_E.sum()) == T * layer.top_k
    for e in range(layer.num_experts):  # all prefer the highest width, which three tenths may take
        assert int(ran_E[e]) == math.floor(0.3 * int(routed_E[e]) + 1e-6)
    computed = {expert: len(row_R) for expert, row_R, _, _ in taps[0].rows}
    assert computed == {e: int(n) for e, n in enumerate(ran_E[:-1]) if n}


@pytest.mark.parametrize("family", FEW)
def test_without_a_price_and_at_full_width_the_loss_is_the_cross_entropy_of_the_quantized_model(family, made):
    source, out = made(family)
    model, routers = routed(out, alpha=0.0)
    for router in routers.values():
        router.learning = Learning()
    teacher, plain = logits(loaded(source)), logits(loaded(out))
    student = model(tokens(), use_cache=False).logits
    penalty = BitPenalty(routers, D2MoeRouter(alpha=0.0))({"attention_mask": torch.ones_like(tokens())})
    loss = distillation_loss(student, tokens(), teacher, k=teacher.shape[-1]) + penalty
    p, log_q = teacher[:, :-1].softmax(-1), plain[:, :-1].log_softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert (loss + entropy).item() == pytest.approx(float(-(p * log_q).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_the_price_is_the_mean_expected_bits_or_the_squared_distance_of_those_that_run(family, made):
    model, routers = routed(made(family)[1], spread=0.3)
    mask = torch.ones_like(tokens())
    mask[1, 15:] = 0
    found = []
    for seed in (3, 4):  # other tokens where there is padding
        ids_BL = torch.where(mask.bool(), tokens(), tokens(seed=seed))
        for router in routers.values():
            router.learning = Learning()
        model(ids_BL, attention_mask=mask, use_cache=False)
        inputs = {"attention_mask": mask}
        real_T = mask.bool().flatten()
        expected = torch.stack([router.bits_T[real_T].mean() for router in routers.values()]).mean()
        run = torch.stack([(router.level_TS[real_T] + 2).float().mean() for router in routers.values()]).mean()
        assert float(BitPenalty(routers, D2MoeRouter(alpha=0.3))(inputs)) == pytest.approx(0.3 * float(expected))
        held = BitPenalty(routers, D2MoeRouter(mean_bits=3.5, hold=7))(inputs)
        assert float(held) == pytest.approx(7 * (float(run) - 3.5) ** 2)
        slope = torch.autograd.grad(held, routers[min(routers)].bias, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected, routers[min(routers)].bias)[0] * 14 * (float(run) - 3.5)
        torch.testing.assert_close(slope, wanted)
        found.append((float(expected), float(run)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_expected_bits_of_a_token_are_a_mean_over_its_experts():
    router = BitRouter(4, 3, (2, 3, 4))
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    router.learning = Learning()
    router.choose(torch.randn(3, 4), torch.tensor([[0, 1], [1, 3], [2, 2]]), 2)
    assert router.bits_T.tolist() == pytest.approx([3.0, 2.0, 3.0])
    assert router.level_TS.tolist() == [[2, 0], [0, -1], [0, 0]]


# -- trained and written ----------------------------------------------------------------------------------------------


def trained(made, ids, out, family, **parameters):
    source, folder = made(family)
    given = {"teacher": str(source), **SHORT, **parameters}
    return coterie.compress(str(folder), str(out), tokens=ids, method="d2moe-router", parameters=given)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_the_checkpoint_is_the_nested_one_and_bit_routers_and_loads_everywhere(family, made, ids, tmp_path):
    _, folder = made(family)
    result = trained(made, ids, tmp_path / "out", family, mean_bits=3.0, steps=4)
    before, after = each_tensor(folder), each_tensor(tmp_path / "out")
    new = after.keys() - before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key.rpartition(".experts.")[2] for key in new} == {"bit_router.weight", "bit_router.bias"}
    assert all(after[key].dtype == torch.float32 for key in new)
    assert result.after.bytes == sum(t.nbytes for t in after.values())
    assert result.after.parameters - result.before.parameters == sum(after[key].numel() for key in new)
    assert result.after.bytes_of_expert == result.before.bytes_of_expert
    model = loaded(tmp_path / "out")
    told = result.record["widths"]
    from coterie.text import load_tokens

    ran = widths_run(model, load_tokens(Path(ids), None).batches)
    assert ran["mean_bits"] == pytest.approx(told["mean_bits"])
    assert sum(told["shares"].values()) == pytest.approx(1)
    assert [entry["layer"] for entry in told["layers"]] == [layer.index for layer in moe_layers(model)]
    [streamed] = coterie.evaluate([str(tmp_path / "out")], tokens=ids)
    assert math.isfinite(streamed.mean_loss)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    narrow = loaded(tmp_path / "out", 0)
    assert torch.equal(logits(narrow), logits(loaded(folder, 0)))


def test_a_router_that_wants_more_planes_than_there_are_gets_all_there_are(made):
    model, routers = routed(made("mixtral")[1], spread=0.3)
    in_use(routers)
    narrow = loaded(made("mixtral")[1], 1)
    for layer, other in zip(moe_layers(narrow), moe_layers(model), strict=True):
        layer.experts.add_module("bit_router", other.experts.bit_router)
    told = widths_run(narrow, [Batch(tokens())])
    assert told["shares"]["4"] == 0
    assert told["shares"]["2"] > 0
    assert widths_run(model, [Batch(tokens())])["shares"]["4"] > 0


def test_a_higher_price_means_fewer_bits(made, ids, tmp_path):
    means = [
        trained(made, ids, tmp_path / str(alpha), "qwen3-moe", alpha=alpha, top_start=0.6).record["widths"]["mean_bits"]
        for alpha in (0.0, 0.5, 4.0)
    ]
    assert means[0] > means[1] > means[2]
    assert means[2] < 2.5


def test_a_mean_that_is_asked_for_is_met(made, ids, tmp_path):
    told = trained(made, ids, tmp_path / "out", "qwen3-moe", mean_bits=3.5, steps=30, hold=3.0).record["widths"]
    assert told["mean_bits"] == pytest.approx(3.5, abs=0.25)
    assert all(entry["spread"] > 0 for entry in told["layers"])  # it differs from token to token


def test_a_killed_training_ends_with_the_same_bytes(made, ids, tmp_path):
    source, folder = made("qwen3-moe")
    given = ("--method", "d2moe-router", "--tokens", ids, "--set", f"teacher={source}", "--set", "steps=12")
    given = (*given, "--set", "batch_size=2", "--no-report")
    assert ended(("compress", folder, tmp_path / "whole", *given), -1) == 0
    assert ended(("compress", folder, tmp_path / "out", *given), 5) == KILLED  # behind its checkpoint
    assert (tmp_path / "out.partial/training").exists()
    assert ended(("compress", folder, tmp_path / "out", *given), -1) == 0
    one, two = (each_tensor(tmp_path / name) for name in ("whole", "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_experts_that_share_a_router_output_have_one_bit_router_each(ids, tmp_path):
    source = saved("mixtral", tmp_path, torch.float32)
    coterie.compress(str(source), str(tmp_path / "merged"), method="m-smoe", keep=0.5, tokens=ids)
    coterie.compress(str(tmp_path / "merged"), str(tmp_path / "nested"), method="d2moe", parameters=QUICK)
    given = {"teacher": str(source), **SHORT, "steps": 2}
    coterie.compress(
        str(tmp_path / "nested"), str(tmp_path / "out"), tokens=ids, method="d2moe-router", parameters=given
    )
    model = loaded(tmp_path / "out")
    for layer in moe_layers(model):
        assert bit_router(layer.experts).experts == layer.experts.stored_experts < 8
    assert torch.isfinite(logits(model)).all()


def test_padding_is_told_to_routers_that_learn(made):
    model, routers = routed(made("mixtral")[1])
    mask = torch.ones_like(tokens())
    mask[0, 20:] = 0
    watching = model.register_forward_pre_hook(partial(_note_padding, routers), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens(), attention_mask=mask, use_cache=False)
    watching.remove()
    for router in routers.values():
        assert torch.equal(router.learning.real_T, mask.bool().flatten())


# -- the command line and bad input -----------------------------------------------------------------------------------


def test_the_command_line_plans_writes_and_reads_planes(made, ids, tmp_path):
    source, _ = made("mixtral")
    given = ("--method", "d2moe", "--set", "quantizer=rtn", "--set", "search=false", "--set", "group_size=16")
    assert cli("plan", source, "--out", tmp_path / "plan.json", *given).code == 0
    done = cli("compress", source, tmp_path / "out", "--plan", tmp_path / "plan.json", "--no-report")
    assert done.code == 0, done.err
    assert "4.000 bits per weight" in done.err
    assert "experts nested, 2 to 4 bits" in cli("inspect", tmp_path / "out").out
    done = cli("evaluate", source, tmp_path / "out", "--tokens", ids, "--planes", "1", "--json")
    assert [entry["model"].endswith("1 planes") for entry in done.json()] == [False, True]
    router = ("--method", "d2moe-router", "--set", f"teacher={source}", "--set", "steps=1")
    done = cli("compress", tmp_path / "out", tmp_path / "routed", *router, "--tokens", ids, "--no-report")
    assert done.code == 0, done.err
    assert "experts run at" in done.err
    assert "2 to 4 bits, chosen by bit routers" in cli("inspect", tmp_path / "routed").out


def test_what_cannot_be_is_refused_before_anything_is_written(made, ids, tmp_path):
    source, folder = made("mixtral")
    for planes in (3, -1):
        with pytest.raises(UsageError, match="the experts have 2"):
            loaded(folder, planes)
        with pytest.raises(UsageError, match="the experts have 2"):
            coterie.evaluate([str(folder)], tokens=ids, planes=planes)
    with pytest.raises(UsageError, match="not stored in planes"):
        loaded(source, 1)
    with pytest.raises(UsageError, match="stored in planes"):
        coterie.evaluate([str(source)], tokens=ids, planes=1)
    out = str(tmp_path / "out")
    for method, model, parameters, told in (
        ("d2moe", source, {"base_bits": 6, "planes": 3}, "more than 8 bits"),
        ("d2moe-router", folder, {}, "none is named"),
        ("d2moe-router", folder, {"teacher": str(folder)}, "cannot teach itself"),
        ("d2moe-router", folder, {"teacher": str(source), "capacity": [0.5, 0.6, 0.3]}, "sum to 1.4"),
        ("d2moe-router", folder, {"teacher": str(source), "capacity": [0.5, 0.5]}, "has 2 shares"),
        ("d2moe-router", folder, {"teacher": str(source), "mean_bits": 4.5}, "not within 2 to 4"),
    ):
        with pytest.raises(UsageError, match=told):
            coterie.compress(str(model), out, method=method, parameters=parameters, tokens=ids)
    with pytest.raises(ModelError, match="one width only"):
        coterie.compress(str(source), out, method="d2moe-router", parameters={"teacher": str(folder)}, tokens=ids)
    with pytest.raises(UsageError, match="--protect would be ignored"):
        coterie.compress(str(source), out, method="d2moe", parameters=QUICK, protect=["0:1"])
    with pytest.raises(UsageError, match="is quantized"):
        coterie.compress(str(folder), out, method="d2moe", parameters=QUICK)
    assert cli("export", folder, out, "--form", "dense").code == 2
    assert not list(tmp_path.iterdir())


def test_a_header_that_does_not_fit_is_refused(made, tmp_path):
    import shutil

    folder = Path(shutil.copytree(made("mixtral")[1], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["0"]

    def change(value):
        edit_json(folder / "config.json", lambda c: c["quantization_config"]["layers"].update({"0": value}))

    change({**entry, "main": 1})
    with pytest.raises(CheckpointError, match="not both can be"):
        Runtime().open(str(folder))
    for wrong in ({"base": 0}, {"planes": -1}, {"planes": "2"}, {"options": 0}, {"colour": 1}):
        change({"nested": {**entry["nested"], **wrong}})
        with pytest.raises(CheckpointError, match=r"layers\.0\.nested"):
            Runtime().open(str(folder))
    change({"nested": {**entry["nested"], "base": 3}})  # other words than the file has
    with pytest.raises(CheckpointError):
        Runtime().open(str(folder))
