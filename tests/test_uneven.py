"""Checkpoints whose layers keep different numbers of experts: written streamed, loaded plainly, saved again."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
import coterie.errors
from coterie.anatomy import moe_layers, narrowed
from coterie.errors import CheckpointError
from coterie.experts.forward import rerouted
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, sweep
from coterie.streaming.model import StreamedModel
from families import FAMILIES, FEW, each_tensor, edit_json, resident, saved, token_file, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors")


def uneven(source, out, ids, **options):
    """A checkpoint that keeps 3/4 of all experts, ranked over all layers, at least one layer smaller than another."""
    asked = {"method": "reap", "keep": 0.75, "scope": "global", "tokens": str(ids), **options}
    return coterie.compress(str(source), str(out), **asked)


def kept(result):
    return {layer.index: layer.keep for layer in result.plan.layers}


def masked_logits(source, keeps):
    """The original with its layers narrowed to what a plan keeps."""
    model = resident(source)
    with ExitStack() as stack, torch.no_grad():
        for layer in moe_layers(model):
            stack.enter_context(narrowed(layer, keeps[layer.index]))
        return model(tokens()).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory, ids):
    """{family: (source, out, result)} made once, with one expert less in the first MoE layer where ranking is even."""
    found = {}

    def make(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            source = saved(family, folder)
            first = min(moe_layers(resident(source)), key=lambda layer: layer.index)
            protect = [f"{first.index}:{e}" for e in range(first.num_experts)]
            result = uneven(source, folder / "out", ids, protect=protect)  # the first layer stays whole
            found[family] = (source, folder / "out", result)
        return found[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_from_pretrained_rebuilds_what_was_kept(family, made):
    source, out, result = made(family)
    counts = {index: len(keep) for index, keep in kept(result).items()}
    assert len(set(counts.values())) > 1
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert {layer.index: layer.num_experts for layer in moe_layers(model)} == counts
    model.set_experts_implementation("coterie")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, masked_logits(source, kept(result)))


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_it_again_and_loading_that_is_exact(family, made, tmp_path):
    _, out, _ = made(family)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streaming_engine_runs_it_like_the_resident_model(family, made):
    _, out, _ = made(family)
    streamed, found = StreamedModel(Checkpoint.open(str(out))), []
    steps = sweep(streamed, [Batch(tokens())], finish=lambda number, batch, hidden: found.append(hidden))
    for step in steps:
        step.run()
    with torch.no_grad():
        assert torch.equal(found[0], resident(out).base_model(tokens()).last_hidden_state)


@pytest.mark.parametrize("family", FEW)
def test_a_pruned_checkpoint_can_be_pruned_again_and_made_even(family, made, ids, tmp_path):
    _, out, result = made(family)
    least = min(len(keep) for keep in kept(result).values())
    even = coterie.compress(str(out), str(tmp_path / "even"), method="frequency", keep_experts=least, tokens=str(ids))
    assert {len(keep) for keep in kept(even).values()} == {least}
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "per_layer_config" not in config
    assert "allow_global_per_layer_attribute_access" not in config
    resident(tmp_path / "even")


def test_a_global_budget_takes_two_sweeps_and_equals_profile_plan_apply(ids, tmp_path):
    source = saved("qwen3-moe", tmp_path)
    result = uneven(source, tmp_path / "direct", ids)
    assert result.sweeps == result.record["sweeps"] == 2
    profile = coterie.profile(str(source), tokens=str(ids), methods=["reap"])
    plan = coterie.plan(str(source), profile, method="reap", keep=0.75, scope="global")
    coterie.compress(str(source), str(tmp_path / "steps"), plan=plan)
    one, two = each_tensor(tmp_path / "direct"), each_tensor(tmp_path / "steps")
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


def test_excluded_layers_stay_whole(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    done = coterie.compress(
        str(source), str(tmp_path / "out"), method="reap", keep=0.5, exclude_layers="1", tokens=str(ids)
    )
    assert {index: len(keep) for index, keep in kept(done).items()} == {0: 4, 1: 8, 2: 4}
    assert done.sweeps == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.num_experts for layer in moe_layers(model)] == [4, 8, 4]
    assert done.after.bytes == sum(t.nbytes for t in each_tensor(tmp_path / "out").values())
    assert done.after.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("order", ["import coterie, transformers", "import transformers.quantizers.auto, coterie"])
def test_import_order_does_not_matter(order, made):
    _, out, _ = made("qwen3-moe")
    code = f"{order}\nimport transformers\nm = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
    code += "print([l.mlp.experts.num_experts for l in m.model.layers if hasattr(l.mlp, 'experts')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[8, 4]"


def test_importing_coterie_imports_no_transformers():
    code = "import coterie, sys; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_it_trains_and_casts_like_any_model(made):
    _, out, _ = made("qwen3-moe")
    model = AutoModelForCausalLM.from_pretrained(out).float()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "gate.weight" in n)


BROKEN = {
    "a newer format": (
        lambda c: c["quantization_config"].update(format=2, version="9.9"),
        ["format 2", "9.9", "up to 1"],
    ),
    "no format": (lambda c: c["quantization_config"].pop("format"), ["no format"]),
    "an unknown change": (lambda c: c["quantization_config"].update(folded=True), ["folded", "does not know"]),
    "more than the model has": (
        lambda c: c["per_layer_config"].update({"2": {"num_local_experts": 99}}),
        ["99", "layer 2"],
    ),
    "fewer than top-k": (lambda c: c["per_layer_config"].update({"2": {"num_local_experts": 1}}), ["1 of", "picks 2"]),
    "no number": (lambda c: c["per_layer_config"].update({"2": {"num_local_experts": "x"}}), ["layer 2", "'x'"]),
    "zero": (lambda c: c["per_layer_config"].update({"2": {"num_local_experts": 0}}), ["layer 2", "0"]),
    "a dense layer": (
        lambda c: c["per_layer_config"].update({"1": {"num_local_experts": 3}}),
        ["layer 1", "no MoE layer"],
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_config_is_refused_by_both_loaders(broken, made, tmp_path):
    import shutil

    _, out, _ = made("qwen3-moe")
    shutil.copytree(out, tmp_path / "copy")
    change, says = BROKEN[broken]
    edit_json(tmp_path / "copy" / "config.json", change)
    for load in (lambda f: StreamedModel(Checkpoint.open(str(f))), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "copy")
        assert all(text in str(caught.value) for text in says), caught.value


def test_weights_of_another_size_are_refused(made, tmp_path):
    import shutil

    _, out, _ = made("qwen3-moe")
    shutil.copytree(out, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", lambda c: c["per_layer_config"].clear())
    with pytest.raises(CheckpointError, match=r"another shape|missing|do not fit"):
        StreamedModel(Checkpoint.open(str(tmp_path / "copy")))


# -- padding ------------------------------------------------------------------------------------------------------

BIASED = ("deepseek-v3", "glm4-moe", "gpt-oss", "minimax-m2", "lfm2-moe")


@pytest.mark.parametrize("family", BIASED)
def test_padding_a_router_with_a_bias_is_exact(family, made, tmp_path):
    source, out, result = made(family)
    padded = coterie.export(str(out), str(tmp_path / "padded"))
    assert padded.exact
    assert not padded.leaks
    model = resident(tmp_path / "padded")
    counts = {layer.num_experts for layer in moe_layers(model)}
    assert counts == {max(len(keep) for keep in kept(result).values())}
    assert "quantization_config" not in json.loads((tmp_path / "padded" / "config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, masked_logits(source, kept(result)), atol=1e-5, rtol=0)
    assert padded.bytes_after == sum(t.nbytes for t in each_tensor(tmp_path / "padded").values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe", "granite-moe", "ernie4.5-moe"])
def test_padding_a_router_without_a_bias_tells_how_often_it_fails(family, made, ids, tmp_path):
    _, out, _ = made(family)
    with pytest.raises(coterie.errors.UsageError, match="no bias decides alone"):
        coterie.export(str(out), str(tmp_path / "none"))
    padded = coterie.export(str(out), str(tmp_path / "padded"), tokens=str(ids))
    assert not padded.exact
    model = resident(tmp_path / "padded")
    picked = dict.fromkeys(padded.layers, 0)

    def watch(index, before):
        def slot(ids_TK, weight_TK):
            picked[index] += int((ids_TK >= before).any(-1).sum())
            return ids_TK, weight_TK

        return slot

    from safetensors.torch import load_file

    given = load_file(ids)["input_ids"]
    total = given.numel()
    with ExitStack() as stack, torch.no_grad():
        for layer in moe_layers(model):
            if layer.index in padded.layers:
                stack.enter_context(rerouted(layer.experts, watch(layer.index, padded.layers[layer.index][0])))
        model(given)
    first = min(padded.leaks)  # what passes here changes the inputs of later layers
    for index, share in padded.leaks.items():
        assert picked[index] / total <= share + (1e-9 if index == first else 0.05)


def test_there_is_nothing_to_pad_in_a_plain_checkpoint(tmp_path):
    with pytest.raises(coterie.errors.UsageError, match="nothing to pad"):
        coterie.export(str(saved("mixtral", tmp_path)), str(tmp_path / "out"))
