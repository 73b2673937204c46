"""Slimming: which neurons and heads go, that nothing else changes, configs, scores, kills, the command line."""

# E experts, I neurons, F kept neurons, H hidden, L sequence, V vocabulary, C teacher's tokens

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.anatomy.heads import head_groups
from coterie.anatomy.resizing import resized, shapes_of
from coterie.anatomy.widths import Axis, neurons
from coterie.api import Runtime
from coterie.compression.methods import get_method, methods
from coterie.compression.slim import HeadOutputs, choose, packed, unpacked
from coterie.compression.slimming.slimmoe import stage_widths
from coterie.errors import ModelError, UsageError
from coterie.experts.forward import inner_activation
from coterie.profiling.gradients import UnitGradients, sensitivity, top_cross_entropy, top_logits
from coterie.profiling.neurons import magnitudes
from coterie.text import load_tokens
from families import FAMILIES, FEW, config, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli, fingerprint, start
from test_wrappers import wrapped  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

GQA = ("qwen3-moe", "mixtral", "gpt-oss", "phimoe", "lfm2-moe")
GRADIENTS = ("kd_top8", "lm", "fisher")
CRITERIA = (*GRADIENTS, "activation", "magnitude")
COUPLED = ("hunyuan-v1-moe", "jamba")  # one field for experts and for dense or shared parts
OTHER_ATTENTION = {"qwen3-next": "q_proj has shape", "olmoe": "all heads together", "minimax-m2": "all heads together"}
OTHER_ATTENTION |= {"deepseek-v2": "MLA", "deepseek-v3": "MLA"}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def model(family):
        if family not in made:
            made[family] = saved(family, folder)
        return made[family]

    return model


def slimmed(source, out, ids, **parameters):
    given = {} if parameters.get("criterion") in ("magnitude", "random") else {"tokens": str(ids)}
    return coterie.compress(str(source), str(out), method="slimmoe", parameters=parameters, **given)


def kept_neurons(folder):
    """{layer: [E][F]} from a plan."""
    plan = json.loads((folder / "plan.json").read_text())
    return {p["index"]: [unpacked(text, p["extra"]["of"]) for text in p["extra"]["kept"]] for p in plan["layers"]}


def kept_heads(folder):
    plan = json.loads((folder / "plan.json").read_text())
    return {int(index): groups for index, groups in plan["budget"]["kept_kv_heads"].items()}


@torch.no_grad()
def logits(model, mask=None):
    return model(tokens(), attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def mask_neurons(model, kept):
    """Zero what dropped neurons pass on, in place: their columns of the down projections."""
    for layer in moe_layers(model):
        for expert in range(layer.num_experts):
            down_HI = layer.bank.read(expert).down_HI
            gone = sorted(set(range(down_HI.shape[1])) - set(kept[layer.index][expert]))
            down_HI[:, gone] = 0
    return model


@torch.no_grad()
def mask_heads(model, kept):
    """Zero what dropped groups of heads pass on, in place."""
    text = model.config.get_text_config(decoder=True)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer, "self_attn"):
            out = getattr(layer.self_attn, "o_proj", None) or layer.self_attn.out_proj
            grouped = out.weight.view(out.weight.shape[0], text.num_key_value_heads, -1)
            grouped[:, sorted(set(range(text.num_key_value_heads)) - set(kept[index]))] = 0
    return model


# -- what is cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["kd_top8", "magnitude"])
@pytest.mark.parametrize("family", FEW)
def test_keeping_everything_reproduces_every_tensor_byte_for_byte(family, criterion, models, ids, tmp_path):
    source = models(family)
    heads = {"kv_heads": 2} if family in GQA else {}
    result = slimmed(source, tmp_path / "out", ids, width=1.0, criterion=criterion, **heads)
    before, after = each_tensor(source), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
    assert (tmp_path / "out" / "config.json").read_text() == (source / "config.json").read_text()
    assert result.before == result.after


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FEW)
def test_the_slim_model_is_the_full_one_with_its_neurons_masked(family, criterion, models, ids, tmp_path):
    source, out = models(family), tmp_path / "out"
    slimmed(source, out, ids, width=0.5, criterion=criterion)
    masked = mask_neurons(resident(source), kept_neurons(out))
    torch.testing.assert_close(logits(resident(out)), logits(masked), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(masked), logits(resident(source)), atol=1e-3)


@pytest.mark.parametrize("criterion", ["kd_top8", "activation", "magnitude"])
@pytest.mark.parametrize("family", GQA)
def test_the_slim_model_is_the_full_one_with_its_heads_masked(family, criterion, models, ids, tmp_path):
    source, out = models(family), tmp_path / "out"
    slimmed(source, out, ids, width=0.5, kv_heads=1, criterion=criterion)
    masked = mask_heads(mask_neurons(resident(source), kept_neurons(out)), kept_heads(out))
    torch.testing.assert_close(logits(resident(out)), logits(masked), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(masked), logits(resident(source)), atol=1e-3)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "activation"])
@pytest.mark.parametrize("family", FEW)
def test_neurons_that_pass_nothing_on_go_first_and_nothing_is_lost(family, criterion, ids, tmp_path):
    model, draw = tiny(family), torch.Generator().manual_seed(3)
    useful = {}
    with torch.no_grad():
        for layer in moe_layers(model):
            useful[layer.index] = []
            for expert in range(layer.num_experts):
                order = torch.randperm(layer.bank.intermediate_size, generator=draw).tolist()
                half = len(order) // 2
                layer.bank.read(expert).down_HI[:, order[half:]] = 0
                useful[layer.index].append(sorted(order[:half]))
    model.save_pretrained(tmp_path / "model")
    slimmed(tmp_path / "model", tmp_path / "out", ids, width=0.5, criterion=criterion)
    assert kept_neurons(tmp_path / "out") == useful
    torch.testing.assert_close(logits(resident(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FEW)
def test_an_expert_in_another_order_keeps_the_same_neurons(family, criterion, ids, tmp_path):
    model, orders = tiny(family), {}
    model.save_pretrained(tmp_path / "a")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in moe_layers(model):
            for expert in range(layer.num_experts):
                order = torch.randperm(layer.bank.intermediate_size, generator=draw)
                orders[layer.index, expert] = order.tolist()
                weights = layer.bank.read(expert)
                for name, dim in (("up_IH", 0), ("gate_IH", 0), ("up_bias_I", 0), ("gate_bias_I", 0), ("down_HI", 1)):
                    if getattr(weights, name) is not None:
                        getattr(weights, name).copy_(getattr(weights, name).index_select(dim, order))
    model.save_pretrained(tmp_path / "b")
    for name in "ab":
        slimmed(tmp_path / name, tmp_path / f"{name}-out", ids, width=0.5, criterion=criterion)
    one, two = kept_neurons(tmp_path / "a-out"), kept_neurons(tmp_path / "b-out")
    for (layer, expert), order in orders.items():
        assert sorted(order[j] for j in two[layer][expert]) == one[layer][expert]


@pytest.mark.parametrize("family", FEW)
def test_all_experts_have_the_new_width_and_nothing_else_changes(family, models, ids, tmp_path):
    source, out = models(family), tmp_path / "out"
    result = slimmed(source, out, ids, width=0.5)
    model, before = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(source)
    layers = {layer.index: layer.bank for layer in moe_layers(model)}
    assert {bank.intermediate_size for bank in layers.values()} == {result.plan.budget["neurons"]}
    kept = kept_neurons(out)
    assert all(sorted(set(row)) == row for rows in kept.values() for row in rows)
    assert len({tuple(row) for row in kept[max(kept)]}) > 1  # not one set for all experts
    touched = {name for layer in moe_layers(before) for name in neurons(layer).names}
    old, new = before.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) == (name not in touched), name
    for layer in moe_layers(before):  # kept neurons are bit for bit what they were
        for expert, row in enumerate(kept[layer.index]):
            one, two = layer.bank.read(expert), layers[layer.index].read(expert)
            assert torch.equal(one.up_IH[row], two.up_IH)
            assert torch.equal(one.gate_IH[row], two.gate_IH)
            assert torch.equal(one.down_HI[:, row], two.down_HI)
            if one.up_bias_I is not None:
                assert torch.equal(one.up_bias_I[row], two.up_bias_I)
                assert torch.equal(one.gate_bias_I[row], two.gate_bias_I)
                assert torch.equal(one.down_bias_H, two.down_bias_H)


@pytest.mark.parametrize("family", GQA)
def test_plain_transformers_loads_the_result_and_generates(family, models, ids, tmp_path):
    slimmed(models(family), tmp_path / "out", ids, width=0.5, kv_heads=1, criterion="magnitude")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]) == (2, 1, 16)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    ids_BL = model.generate(tokens(1, 8), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids_BL.shape == (1, 12)


@pytest.mark.parametrize("family", GQA)
def test_sizes_are_counted_from_what_was_written(family, models, ids, tmp_path):
    result = slimmed(models(family), tmp_path / "out", ids, width=0.5, kv_heads=1, criterion="magnitude")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = moe_layers(model)
    tensors = each_tensor(tmp_path / "out")
    idle = sum((layer.num_experts - layer.top_k) * layer.bank.parameters_per_expert for layer in layers)
    assert result.after.bytes == sum(t.nbytes for t in tensors.values())
    assert result.after.parameters == sum(t.numel() for t in tensors.values())
    assert result.after.active_parameters == result.after.parameters - idle
    assert result.after.parameters_of_expert == layers[0].bank.parameters_per_expert


# -- axes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@drawn(
    parts=st.integers(1, 3),
    block=st.integers(1, 3),
    units=st.integers(1, 6),
    interleaved=st.booleans(),
    stacked=st.booleans(),
    last=st.booleans(),
    data=st.data(),
)
def test_an_axis_selects_sums_and_joins_what_belongs_to_a_unit(parts, block, units, interleaved, stacked, last, data):
    """Against a tensor whose entries say to which unit they belong."""
    grid = torch.arange(units)[:, None, None].expand(units, parts, block)
    line = (grid if interleaved else grid.transpose(0, 1)).reshape(-1)
    E, first = (3 if stacked else 1), 1 if stacked else 0
    dim = first + int(last)
    tensor = (line[:, None] if not last else line[None]).expand(*((-1, 2) if not last else (2, -1)))
    tensor = (tensor.expand(E, *tensor.shape) if stacked else tensor).double().contiguous()
    axis = Axis("w", dim, units, parts, interleaved, block, stacked)
    totals_EU = axis.totals(tensor)
    assert totals_EU.tolist() == [[2.0 * parts * block * u for u in range(units)]] * E
    rows = [sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1, max_size=1))) for _ in range(E)]
    cut = axis.select(tensor, torch.tensor(rows))
    assert cut.shape == axis.shape(tensor.shape, 1)
    for e in range(E):
        assert bool(((cut[e] if stacked else cut) == rows[e][0]).all())
    low = torch.arange(units // 2).expand(E, -1)
    high = torch.arange(units // 2, units).expand(E, -1)
    assert torch.equal(axis.join([axis.select(tensor, low), axis.select(tensor, high)]), tensor)


@settings(max_examples=60, deadline=None, derandomize=True)
@drawn(units=st.integers(1, 70), data=st.data())
def test_a_plan_holds_the_kept_units(units, data):
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1))))
    assert unpacked(packed(torch.tensor(kept, dtype=torch.int64), units), units) == kept


def test_of_equal_scores_the_first_units_stay():
    assert choose(torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]), 2).tolist() == [[0, 1], [0, 3]]


# -- configs ----------------------------------------------------------------------------------------------------------


def on_meta(family, **changes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(family, **changes))
    model.config.architectures = [type(model).__name__]
    return model, json.loads(model.config.to_json_string())


def wanted_widths(model, neurons_kept):
    named = dict(model.named_parameters())
    axes = [axis for layer in moe_layers(model) for axis in neurons(layer).axes]
    return {axis.name: axis.shape(named[axis.name].shape, neurons_kept) for axis in axes}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_field_of_the_width_is_found_or_the_model_is_refused(family):
    model, raw = on_meta(family)
    width = moe_layers(model)[0].bank.intermediate_size
    wanted = wanted_widths(model, width // 2)
    if family in COUPLED:
        with pytest.raises(ModelError, match="sets the expert width and that of"):
            resized(raw, model.config, wanted, width=(width, width // 2))
        return
    result = resized(raw, model.config, wanted, width=(width, width // 2))
    again = type(model.config).from_dict(result.raw)
    again.architectures = model.config.architectures
    before = shapes_of(model.config)
    assert shapes_of(again) == {**before, **wanted}
    same = {k: v for k, v in result.raw.items() if k not in result.fields}
    assert same == {k: v for k, v in raw.items() if k not in result.fields}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_heads_are_found_or_the_model_is_refused(family):
    model, raw = on_meta(family)
    if family in OTHER_ATTENTION:
        with pytest.raises(ModelError, match=OTHER_ATTENTION[family]):
            head_groups(model)
        return
    named = dict(model.named_parameters())
    axes = [axis for unit in head_groups(model).values() for axis in unit.axes]
    wanted = {axis.name: axis.shape(named[axis.name].shape, 1) for axis in axes}
    result = resized(raw, model.config, wanted, heads=(2, 1, 16))
    assert result.fields == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def test_shared_experts_keep_their_width_or_the_width_is_refused():
    model, raw = on_meta("deepseek-v3", n_shared_experts=2)
    result = resized(raw, model.config, wanted_widths(model, 16), width=(32, 16))
    assert result.fields == {"moe_intermediate_size": 16, "n_shared_experts": 4}
    assert "n_shared_experts 2 -> 4" in result.notes[0]
    with pytest.raises(ModelError, match=r"n_shared_experts|shared_experts") as caught:
        resized(raw, model.config, wanted_widths(model, 24), width=(32, 24))
    assert "neurons=" in caught.value.hint


def test_a_field_that_only_holds_the_same_number_is_not_touched():
    model, raw = on_meta("qwen2-moe", shared_expert_intermediate_size=32, moe_intermediate_size=32)
    result = resized(raw, model.config, wanted_widths(model, 8), width=(32, 8))
    assert result.fields == {"moe_intermediate_size": 8}


def test_phi_sizes_are_the_published_ones():
    """Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE, from one config: 41.9, 7.6 and 3.75 billion parameters."""
    made = transformers.PhimoeConfig()
    with torch.device("meta"):
        model = transformers.PhimoeForCausalLM(made)
    made.architectures = ["PhimoeForCausalLM"]
    d, L, E, V, D = 4096, 32, 16, 32064, 128
    named = dict(model.named_parameters())
    groups = [axis for unit in head_groups(model).values() for axis in unit.axes]
    raw = json.loads(made.to_json_string())
    for f, q, kv, billions in ((6400, 32, 8, 41.9), (960, 32, 8, 7.6), (448, 16, 4, 3.75)):
        heads = (q, kv, D) if kv < 8 else None
        wanted = wanted_widths(model, f)
        if heads:
            wanted |= {axis.name: axis.shape(named[axis.name].shape, kv) for axis in groups}
        result = resized(raw, made, wanted, width=(6400, f), heads=heads)
        again = transformers.PhimoeConfig.from_dict(result.raw)
        shapes = shapes_of(again)
        count = {name: shape.numel() for name, shape in shapes.items() if "rotary" not in name}
        assert sum(n for name, n in count.items() if ".experts." in name) == 3 * d * f * E * L
        attention = sum(n for name, n in count.items() if "self_attn" in name)
        assert attention == L * (2 * d * q * D + 2 * d * kv * D)
        assert sum(n for name, n in count.items() if "embed" in name or "lm_head" in name) == 2 * V * d
        assert sum(count.values()) / 1e9 == pytest.approx(billions, abs=0.06)


# -- scores -----------------------------------------------------------------------------------------------------------


def scored(model, data, criterion, **options):
    units = [neurons(layer) for layer in moe_layers(model)]
    return sensitivity(model, units, data, criterion, **options)


def full_gradients(model, loss):
    named = {n: p for layer in moe_layers(model) for n, p in model.named_parameters() if n in neurons(layer).names}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def by_hand(model, row, criterion):
    """Neuron scores {layer: [E, I]} and full gradients of one sequence, in plain words."""
    logits_LV = model(row[None], use_cache=False).logits[0]
    if criterion == "kd_top8":
        top = logits_LV.detach().softmax(-1).topk(8, -1)
        q_LC = top.values / top.values.sum(-1, keepdim=True)
        loss = -(q_LC * logits_LV.softmax(-1).gather(-1, top.indices).log()).sum()
    else:
        loss = sum(-logits_LV[t].softmax(-1)[row[t + 1]].log() for t in range(len(row) - 1))
    found = full_gradients(model, loss)
    scores = {}
    for layer in moe_layers(model):
        bank, path, rows = layer.bank, layer.experts_name, []
        gradients = {n.rpartition(".")[2]: g for n, g in found.items() if n.startswith(f"{path}.")}
        for expert in range(layer.num_experts):
            w = bank.read(expert)
            kept = {name: getattr(layer.experts, name).data for name in gradients}
            for name, g in gradients.items():
                getattr(layer.experts, name).data = g
            g = bank.read(expert)
            for name, value in kept.items():
                getattr(layer.experts, name).data = value
            parts = [(w.up_IH, g.up_IH), (w.gate_IH, g.gate_IH), (w.down_HI.T, g.down_HI.T)]
            if w.up_bias_I is not None:
                parts += [
                    (w.up_bias_I[:, None], g.up_bias_I[:, None]),
                    (w.gate_bias_I[:, None], g.gate_bias_I[:, None]),
                ]
            power = 2 if criterion == "fisher" else 1
            rows.append(sum(((a * b).abs() ** power).double().sum(1) for a, b in parts))
        scores[path] = torch.stack(rows)
    return scores, found


@pytest.mark.parametrize("criterion", GRADIENTS)
@pytest.mark.parametrize("family", FEW)
def test_scores_are_those_of_stored_gradients(family, criterion, tmp_path):
    model = tiny(family)
    data = load_tokens(token_file(tmp_path / "ids.safetensors", rows=3, length=16), None)
    expected: dict[str, Any] = {}
    for row in data.batches[0].ids_BL:
        for name, score_EI in by_hand(model, row, criterion)[0].items():
            expected[name] = expected.get(name, 0) + score_EI
    found = scored(model, data, criterion)
    assert found.scores.keys() == expected.keys()
    for name, score_EI in expected.items():
        torch.testing.assert_close(found.scores[name], score_EI, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_no_gradient_outlives_its_tensor(monkeypatch, tmp_path):
    model, alive = tiny("mixtral"), []
    reduce = UnitGradients._reduce

    def watched(self, parameter, unit, axis):
        reduce(self, parameter, unit, axis)
        alive.append(sum(p.grad is not None for p in model.parameters()))

    monkeypatch.setattr(UnitGradients, "_reduce", watched)
    scored(model, load_tokens(token_file(tmp_path / "ids.safetensors", rows=1), None), "lm")
    assert len(alive) == 6
    assert not any(alive)


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_scores_add_up_over_text(criterion, tmp_path):
    model = tiny("qwen3-moe")
    one = load_tokens(token_file(tmp_path / "a.safetensors", rows=2, seed=1), None)
    two = load_tokens(token_file(tmp_path / "b.safetensors", rows=3, seed=2), 1)
    both_ids = torch.cat([b.ids_BL for data in (one, two) for b in data.batches])
    save_file({"input_ids": both_ids}, tmp_path / "both.safetensors")
    both = load_tokens(tmp_path / "both.safetensors", 2)
    a, b, c = (scored(model, data, criterion) for data in (one, two, both))
    for name in c.scores:
        torch.testing.assert_close(a.scores[name] + b.scores[name], c.scores[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", GRADIENTS)
@pytest.mark.parametrize("family", FEW)
def test_padding_changes_no_score(family, criterion, tmp_path):
    model = tiny(family)
    ids_BL = tokens(2, 20).clone()
    save_file({"input_ids": ids_BL[:, 8:].contiguous()}, tmp_path / "short.safetensors")
    left, right = torch.ones_like(ids_BL), torch.ones_like(ids_BL)
    left[:, :8], right[:, 12:] = 0, 0
    save_file({"input_ids": ids_BL, "attention_mask": left}, tmp_path / "left.safetensors")
    save_file({"input_ids": ids_BL.roll(-8, 1), "attention_mask": right}, tmp_path / "right.safetensors")
    found = [
        scored(model, load_tokens(tmp_path / f"{name}.safetensors", None), criterion)
        for name in ("short", "left", "right")
    ]
    assert len({one.tokens for one in found}) == 1
    for name in found[0].scores:
        torch.testing.assert_close(found[0].scores[name], found[1].scores[name], rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(found[0].scores[name], found[2].scores[name])


@pytest.mark.parametrize("family", FEW)
def test_signed_sums_obey_the_gated_identity_and_cancel_where_scores_do_not(family):
    """Down's and up's signed sums over a neuron are equal: both are sum_t h_j dL/dh_j. Scores take |.| first."""
    model = tiny(family)
    score, found = by_hand(model, tokens(1, 24)[0], "lm")
    for layer in moe_layers(model):
        unit = neurons(layer)
        product = {name: found[name] * dict(model.named_parameters())[name].detach() for name in unit.names}
        up_axis, down_axis = unit.axes[0], unit.axes[-1]
        both = product[up_axis.name]
        # gate and up apart: the axis with two parts seen as two axes with one
        width = both.shape[up_axis.dim] // 2
        pick = torch.arange(width) * 2 + 1 if up_axis.interleaved else torch.arange(width, 2 * width)
        up_EI = both.index_select(up_axis.dim, pick).sum(3 - up_axis.dim)
        down_EI = down_axis.totals(product[down_axis.name])
        if family != "gpt-oss":  # its up half is clamped and shifted by one, so h_j is not linear in it
            torch.testing.assert_close(up_EI.double(), down_EI, atol=1e-6, rtol=1e-3)
        signed_EI = sum(axis.totals(product[axis.name]) for axis in unit.axes).abs()
        reached_E = score[layer.experts_name].sum(1) > 0
        ratio = signed_EI[reached_E].sum() / score[layer.experts_name][reached_E].sum()
        assert float(ratio) < 0.6


def test_the_truncated_loss_has_a_gradient_where_model_and_teacher_are_equal_and_a_full_kl_has_none(tmp_path):
    model = tiny("mixtral")
    row = tokens(1, 24)[0]
    logits_LV = model(row[None], use_cache=False).logits[0]
    kl = torch.nn.functional.kl_div(
        logits_LV.log_softmax(-1), logits_LV.detach().log_softmax(-1), log_target=True, reduction="sum"
    )
    flat = sum(float(g.norm()) for g in full_gradients(model, kl).values())
    cut = sum(float(g.norm()) for g in by_hand(model, row, "kd_top8")[1].values())
    assert flat < 1e-4
    assert cut > 1e3 * flat
    data = load_tokens(token_file(tmp_path / "ids.safetensors", rows=1, length=24), None)
    assert not scored(model, data, "kd_top8").warnings


def test_the_loss_over_all_tokens_is_the_kl_up_to_the_teachers_entropy():
    draw = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = torch.randn(5, 30, generator=draw), torch.randn(5, 30, generator=draw)
    top = teacher_TV.topk(30, -1)
    log_p, log_q = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    kl_T = (log_q.exp() * (log_q - log_p)).sum(-1)
    entropy_T = -(log_q.exp() * log_q).sum(-1)
    torch.testing.assert_close(top_cross_entropy(student_TV, top.indices, top.values), kl_T + entropy_T)


def test_a_flat_loss_is_told(tmp_path):
    model = tiny("mixtral")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    data = load_tokens(token_file(tmp_path / "ids.safetensors", rows=1), None)
    (warning,) = scored(model, data, "kd_top8").warnings
    assert "close to zero" in warning


def test_streamed_activations_are_those_of_plain_loops(models, ids, tmp_path):
    source = models("qwen3-moe")
    slimmed(source, tmp_path / "out", ids, width=0.5, criterion="activation")
    model, kept = resident(source), kept_neurons(tmp_path / "out")
    given = load_file(ids)
    routed: dict[int, Any] = {}
    hooks = [
        layer.experts.register_forward_pre_hook(lambda m, args, i=layer.index: routed.update({i: args}))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(given["input_ids"], attention_mask=given["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
    real_T = given["attention_mask"].bool().reshape(-1)
    differ = 0
    for layer in moe_layers(model):
        x_TH, index_TK, _ = routed[layer.index]
        for expert in range(layer.num_experts):
            x_RH = x_TH[real_T & (index_TK == expert).any(1)]
            mean_I = inner_activation(layer.experts, expert, x_RH).abs().double().mean(0)
            best = sorted(mean_I.topk(len(kept[layer.index][expert])).indices.tolist())
            differ += best != kept[layer.index][expert]
    assert differ == 0


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_neurons_magnitude_is_the_product_of_its_rows_and_column_biases_included(family):
    (layer, *_) = moe_layers(tiny(family))
    w, found = layer.bank.read(3), magnitudes(layer)[3]
    for j in (0, 7):
        rows = [[*w.gate_IH[j].tolist()], [*w.up_IH[j].tolist()]]
        if w.up_bias_I is not None:
            rows[0].append(float(w.gate_bias_I[j]))
            rows[1].append(float(w.up_bias_I[j]))
        expected = math.prod(math.hypot(*numbers) for numbers in (*rows, w.down_HI[:, j].tolist()))
        assert float(found[j]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["qwen3-moe", "lfm2-moe"])
def test_what_heads_pass_on_is_counted_without_padding(family, models, ids):
    model, (batch,) = resident(models(family)), load_tokens(ids, None).batches
    index, unit = next(iter(head_groups(model).items()))
    attention = model.model.layers[index].self_attn
    out, seen = getattr(attention, "o_proj", None) or attention.out_proj, []
    hook = out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    watch = HeadOutputs(model, unit)
    watch.batch(batch)
    with watch, torch.no_grad():
        model(batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
    hook.remove()
    expected = [0.0] * unit.count
    for x_LD, mask_L in zip(seen[0], batch.mask_BL, strict=True):
        for x_D, real in zip(x_LD, mask_L, strict=True):
            for group, part in enumerate(x_D.chunk(unit.count)):
                expected[group] += float(part.abs().sum()) if real else 0.0
    assert watch.sum_U.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3-moe", "granite-moe"])
def test_a_streamed_teachers_top_logits_are_those_of_the_whole_model(family, models, ids):
    source = models(family)
    data = load_tokens(ids, 2)
    found = top_logits(Runtime().open(str(source)), data)
    given, model = load_file(ids), resident(source)
    with torch.no_grad():
        all_BLV = model(given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
    for row, mask_L in enumerate(given["attention_mask"].bool()):
        top = all_BLV[row].topk(8, -1)
        torch.testing.assert_close(found.values[row][mask_L], top.values[mask_L], atol=1e-4, rtol=1e-4)
        same = (found.ids[row].long() == top.indices)[mask_L].double().mean()
        assert float(same) > 0.98


def test_a_model_named_as_its_own_teacher_gives_the_same_scores(models, ids, tmp_path):
    data, model = load_tokens(ids, None), resident(models("mixtral"))
    model.requires_grad_(True)
    teacher = top_logits(Runtime().open(str(models("mixtral"))), data)
    one, two = scored(model, data, "kd_top8"), scored(model, data, "kd_top8", teacher=teacher)
    for name in one.scores:
        torch.testing.assert_close(one.scores[name], two.scores[name], rtol=1e-3, atol=1e-9)


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "nothing says how much"),
        ({"width": 0.5, "neurons": 16}, "both say how many"),
        ({"neurons": 0}, "cannot keep 0"),
        ({"neurons": 64}, "cannot keep 64"),
        ({"neurons": 20}, "no multiple of 8"),
        ({"neurons": 24, "multiple_of": 16}, "no multiple of 16"),
        ({"width": 0.01}, "less than one"),
        ({"width": 0.06}, "less than half of a step of 8"),
        ({"kv_heads": 0}, "cannot keep 0"),
        ({"kv_heads": 3}, "cannot keep 3"),
        ({"width": 0.5, "criterion": "lm", "teacher": "x"}, "asks no teacher"),
    ],
)
def test_what_cannot_be_kept_is_refused(parameters, message, models, ids, tmp_path):
    with pytest.raises(UsageError, match=message):
        slimmed(models("mixtral" if "neurons" not in parameters else "qwen3-moe"), tmp_path / "out", ids, **parameters)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("width", "step"), [(32, 8), (48, 8), (128, 32), (255, 32), (256, 64), (6400, 64), (3, 1)])
def test_the_step_is_64_or_what_leaves_four_of_them(width, step):
    assert get_method("slimmoe", {"width": 0.5}).step(width) == step
    assert get_method("slimmoe", {"width": 0.5, "multiple_of": 16}).step(width) == 16


@settings(max_examples=80, deadline=None, derandomize=True)
@drawn(width=st.integers(5, 20000), share=st.floats(0.2, 1.0))
def test_the_new_width_is_the_nearest_multiple(width, share):
    method = get_method("slimmoe", {"width": share})
    kept, step = method.neurons_of(width), method.step(width)
    assert kept == width or kept % step == 0
    assert abs(kept - share * width) <= step / 2 + 1e-6 or kept == width


def test_a_random_choice_depends_on_the_seed_alone(models, ids, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        coterie.compress(
            str(models("mixtral")),
            str(out),
            method="slimmoe",
            parameters={"width": 0.5, "criterion": "random"},
            seed=seed,
        )
        found.append(kept_neurons(out))
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_stages_fall_in_equal_ratios():
    assert stage_widths(6400, 960, 2, multiple_of=16) == [2480, 960]
    assert stage_widths(6400, 960, 2) == [2496, 960]
    assert stage_widths(6400, 448, 3) == [2624, 1088, 448]
    assert stage_widths(6400, 960, 1) == [960]
    with pytest.raises(UsageError, match="one does nothing"):
        stage_widths(256, 192, 3)
    with pytest.raises(UsageError, match="no 2 stages"):
        stage_widths(256, 256, 2)


def test_a_teacher_with_other_tokens_is_refused(models, ids, tmp_path):
    other = saved("mixtral", tmp_path / "other", vocab_size=600)
    with pytest.raises(UsageError, match="knows 600 tokens, the model 512"):
        slimmed(models("mixtral"), tmp_path / "out", ids, width=0.5, teacher=str(other))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep", 0.5), "--keep"),
        (("--propagate",), "--propagate"),
        (("--scope", "global"), "--scope"),
        (("--protect", "0:1"), "--protect"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, models, ids, tmp_path):
    done = cli(
        "compress", models("mixtral"), tmp_path / "out", "--method", "slimmoe", "--set", "width=0.5", "--tokens", ids,
        *options,
    )  # fmt: skip
    assert done.code == 2
    assert said in done.err
    assert "width=0.5" in done.err


def test_without_text_it_says_what_would_do(models, tmp_path):
    done = cli("compress", models("mixtral"), tmp_path / "out", "--method", "slimmoe", "--set", "width=0.5")
    assert done.code == 2
    assert "criterion=magnitude" in done.err


def test_the_command_line_and_its_report(models, ids, tmp_path):
    arguments = ("compress", models("mixtral"), tmp_path / "out", "--method", "slimmoe", "--set", "width=0.5")
    dry = cli(*arguments, "--tokens", ids, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    done = cli(*arguments, "--tokens", ids, "--json")
    assert done.code == 0, done.err
    told = done.json()
    assert told["slimming"]["neurons"] == 24
    assert told["after"]["bytes"] == dry.json()["disk_bytes"]
    assert told["after"]["parameters"] < told["before"]["parameters"]
    assert (tmp_path / "out" / "report.html").exists()
    assert "48 -> 24" in (tmp_path / "out" / "README.md").read_text()
    entry = methods()["slimmoe"]
    assert (entry.kind, entry.paper) == ("slimming", "arXiv:2506.18349")
    shown = cli(*arguments, "--tokens", ids, "--overwrite", "--no-report")
    assert shown.code == 0, shown.err
    assert "48" in shown.out
    assert "24" in shown.out


RECIPE = """
steps:
  - method: slimmoe
    parameters: {neurons: 32, teacher: original}
  - method: slimmoe
    parameters: {neurons: 16, teacher: original}
"""


def test_in_a_recipe_the_teacher_is_the_original_in_every_stage(models, ids, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    source, out = models("mixtral"), tmp_path / "out"
    done = cli("compress", source, out, "--recipe", tmp_path / "recipe.yaml", "--tokens", ids, "--json")
    assert done.code == 0, done.err
    told = done.json()
    digest = Runtime().open(str(source)).checkpoint.digest()
    assert told["slimming"]["teacher"] == digest
    assert told["earlier_steps"][0]["slimming"]["teacher"] == digest
    assert told["model_digest"] != digest
    assert told["slimming"]["neurons"] == 16
    slimmed(source, tmp_path / "one", ids, neurons=32)
    slimmed(tmp_path / "one", tmp_path / "own", ids, neurons=16)  # a stage that asks itself decides otherwise
    slimmed(tmp_path / "one", tmp_path / "asked", ids, neurons=16, teacher=str(source))
    assert kept_neurons(tmp_path / "asked") == kept_neurons(out) != kept_neurons(tmp_path / "own")


def test_an_expert_no_token_reaches_is_judged_by_its_weights_and_told(ids, tmp_path):
    model = tiny("gpt-oss")
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.bias[5] = -1e4
    model.save_pretrained(tmp_path / "model")
    result = slimmed(tmp_path / "model", tmp_path / "kd", ids, width=0.5)
    slimmed(tmp_path / "model", tmp_path / "weights", ids, width=0.5, criterion="magnitude")
    assert any("received no calibration token" in warning for warning in result.warnings)
    one, two = kept_neurons(tmp_path / "kd"), kept_neurons(tmp_path / "weights")
    assert all(one[i][5] == two[i][5] for i in one)
    assert one != two


def test_the_result_can_be_pruned_and_the_pruned_can_be_slimmed(models, ids, tmp_path):
    source = models("qwen3-moe")
    slimmed(source, tmp_path / "slim", ids, width=0.5)
    coterie.compress(str(tmp_path / "slim"), str(tmp_path / "both"), method="frequency", keep=0.5, tokens=str(ids))
    coterie.compress(
        str(source), str(tmp_path / "uneven"), method="frequency", keep=0.7, scope="global", tokens=str(ids)
    )
    for criterion in ("activation", "kd_top8"):
        result = slimmed(tmp_path / "uneven", tmp_path / criterion, ids, width=0.5, criterion=criterion)
        assert result.plan.budget["neurons"] == 16
    for name in ("both", "activation", "kd_top8"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {layer.bank.intermediate_size for layer in moe_layers(model)} == {16}
        assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_slimmed_or_refused_with_a_reason(family, models, ids, tmp_path):
    if family in COUPLED:
        with pytest.raises(ModelError) as caught:
            slimmed(models(family), tmp_path / "out", ids, width=0.5, criterion="magnitude")
        assert caught.value.hint
        return
    slimmed(models(family), tmp_path / "out", ids, width=0.5, criterion="magnitude")
    masked = mask_neurons(resident(models(family)), kept_neurons(tmp_path / "out"))
    torch.testing.assert_close(logits(resident(tmp_path / "out")), logits(masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["kd_top8", "activation"])
def test_a_decoder_inside_a_multimodal_wrapper_is_slimmed(wrapped, criterion, ids, tmp_path):  # noqa: F811
    model_class, source = wrapped
    slimmed(source, tmp_path / "out", ids, width=0.5, criterion=criterion)
    full, slim = (model_class.from_pretrained(f, dtype=torch.float32).eval() for f in (source, tmp_path / "out"))
    masked = mask_neurons(full, kept_neurons(tmp_path / "out"))
    torch.testing.assert_close(logits(slim), logits(masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_extra_prediction_layers_go_with_a_note_when_neurons_go(width, ids, tmp_path):
    from test_compress import with_prediction_layer

    source = with_prediction_layer(saved("deepseek-v3", tmp_path))
    result = slimmed(source, tmp_path / "out", ids, width=width, criterion="magnitude")
    slim = width < 1
    assert any("multi-token prediction" in warning for warning in result.warnings) == slim
    assert ("model.layers.61.mlp.gate.weight" in each_tensor(tmp_path / "out")) == (not slim)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == (0 if slim else 1)
    assert result.after.bytes == sum(t.nbytes for t in each_tensor(tmp_path / "out").values())


# -- kills ------------------------------------------------------------------------------------------------------------


def run_and_die_behind_line(arguments: tuple[str, ...], lines: int) -> None:
    from coterie.streaming.writer import Workspace

    record, written = Workspace.record, 0

    def record_and_die(self: Workspace, step: dict[str, Any]) -> None:
        nonlocal written
        record(self, step)
        written += 1
        if written == lines:
            os._exit(9)

    Workspace.record = record_and_die  # type: ignore[method-assign]
    os._exit(cli(*arguments).code)


@pytest.mark.parametrize(("criterion", "moments"), [("kd_top8", (1, 2, 4)), ("activation", (1,)), ("magnitude", (2,))])
def test_a_kill_behind_any_line_of_the_journal_changes_no_byte(criterion, moments, models, ids, tmp_path, monkeypatch):
    def arguments(out):
        given = ("compress", models("qwen3-moe"), out, "--method", "slimmoe", "--no-report", "--shard-size", "100kB")
        given += ("--set", "width=0.5", "--set", "kv_heads=1", "--set", f"criterion={criterion}")
        return tuple(map(str, given if criterion == "magnitude" else (*given, "--tokens", ids)))

    plain = cli(*arguments(tmp_path / "plain"))
    assert plain.code == 0, plain.err
    expected = fingerprint(tmp_path / "plain")
    for lines in moments:
        out = tmp_path / f"out-{lines}"
        process = start(run_and_die_behind_line, arguments(out), lines)
        process.join(60)
        assert process.exitcode == 9
        assert not out.exists()
        with monkeypatch.context() as patch:
            if criterion != "magnitude":  # finished scores are not computed again
                patch.setattr("coterie.compression.slim.sensitivity", lambda *given, **options: pytest.fail("again"))
                patch.setattr("coterie.compression.slim.sweep", lambda *given, **options: pytest.fail("again"))
            again = cli(*arguments(out))
        assert again.code == 0, again.err
        assert fingerprint(out) == expected
