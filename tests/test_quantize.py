"""Quantized checkpoints: bytes as planned, loaded by transformers as they were rounded; kills; bad input; the CLI."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.api.runtime import Runtime
from coterie.compression.bits import BitPlan, load_plan
from coterie.compression.methods import get_method
from coterie.compression.sizes import measure
from coterie.errors import CheckpointError, UsageError
from coterie.experts import packed
from families import FAMILIES, FEW, each_tensor, edit_json, resident, saved, token_file, tokens
from inprocess import cli, fingerprint, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[tuple[str, torch.dtype], Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def model(family, dtype=torch.bfloat16):
        if (family, dtype) not in made:
            made[family, dtype] = saved(family, folder / str(dtype), dtype)
        return made[family, dtype]

    return model


def quantized(source, out, ids=None, method="quantize", protect=(), **parameters):
    given = {"tokens": str(ids)} if ids is not None else {}
    parameters = {"group_size": 16, **({} if ids is not None else {"quantizer": "rtn"}), **parameters}
    return coterie.compress(str(source), str(out), method=method, parameters=parameters, protect=protect, **given)


def dense_twin(source: Path, folder: Path) -> Any:
    """The original model with every matrix replaced by what its codes stand for."""
    twin = resident(source)
    packed_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in packed.packed_modules(packed_model):
        other = twin.get_submodule(path)
        if isinstance(module, packed.PackedLinear):
            other.weight.data.copy_(module.dense())
            continue
        layer = next(m for m in moe_layers(twin) if m.experts is other)
        mine = next(m for m in moe_layers(packed_model) if m.experts is module)
        for e in range(layer.num_experts):
            layer.bank.write(e, mine.bank.read(e))
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_checkpoint_loads_in_transformers_and_computes_with_its_codes(family, models, tmp_path):
    source = models(family, torch.float32)
    quantized(source, tmp_path / "out", bits=3, attention_bits=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(1 for _ in packed.packed_modules(model)) > 3
    with torch.no_grad():
        mine, twin = model(tokens()).logits, dense_twin(source, tmp_path / "out")(tokens()).logits
    torch.testing.assert_close(mine, twin, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FEW)
def test_bytes_of_the_file_are_those_of_the_plan_and_memory_follows(family, dtype, models, tmp_path):
    result = quantized(models(family, dtype), tmp_path / "out", bits=2, attention_bits=4, shared_bits=8)
    assert sum(t.nbytes for t in each_tensor(tmp_path / "out").values()) == result.plan.bytes == result.after.bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held = sum(t.nbytes for t in model.state_dict().values())
    tied = model.get_output_embeddings().weight.nbytes if model.config.get_text_config().tie_word_embeddings else 0
    assert held - tied == pytest.approx(result.plan.bytes, rel=0.02)


@pytest.mark.parametrize("family", FEW)
def test_streaming_computes_what_transformers_does(family, models, ids, tmp_path):
    quantized(models(family, torch.float32), tmp_path / "out", bits=4)
    (result,) = coterie.evaluate([str(tmp_path / "out")], tokens=str(ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    from safetensors.torch import load_file

    text = load_file(ids)
    losses, count = 0.0, 0
    for row, mask in zip(text["input_ids"], text["attention_mask"]):
        row = row[mask.bool()][None]
        with torch.no_grad():
            logits = model(row).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    assert result.domains[0].loss == pytest.approx(losses / count, abs=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_sixteen_bits_everywhere_change_nothing(family, models, tmp_path):
    source = models(family)
    quantized(source, tmp_path / "out", bits=16)
    before, after = each_tensor(source), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", FEW)
def test_protected_experts_keep_every_bit(family, models, tmp_path):
    source = models(family)
    layers = list(moe_layers(resident(source, torch.bfloat16)))
    index = layers[0].index
    result = quantized(source, tmp_path / "out", bits=2, protect=[f"{index}:1,{index}:3"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    bank = next(iter(moe_layers(model))).bank
    for e in (1, 3):
        mine, original = bank.read(e, torch.float32), layers[0].bank.read(e, torch.float32)
        assert torch.equal(mine.down_HI, original.down_HI)
        assert torch.equal(mine.up_IH, original.up_IH)
    assert not torch.equal(bank.read(0, torch.float32).down_HI, layers[0].bank.read(0, torch.float32).down_HI)
    assert result.plan.expert_bits > 2


@pytest.mark.parametrize("family", FEW)
def test_rounding_by_inputs_leaves_less_error_in_outputs_than_rounding_to_the_nearest(family, models, ids, tmp_path):
    def errors(result):
        found = [f["experts_output_error"] for f in result.figures.values() if "experts_output_error" in f]
        return sum(found) / len(found)

    source = models(family, torch.float32)
    more = {"least_tokens": 8, "bits": 3, "attention_bits": 16, "shared_bits": 16, "dense_bits": 16}
    by_inputs = quantized(source, tmp_path / "gptq", ids, **more)
    nearest = quantized(source, tmp_path / "rtn", ids, least_share=1.0, **more)  # every expert sees too few
    assert errors(by_inputs) < errors(nearest)
    assert nearest.record["quantization"]["matrices_rounded_to_nearest"] > 0
    assert any("rounded to nearest" in note for note in nearest.record["notes"])


def test_a_pruned_checkpoint_is_quantized_with_the_experts_it_has_left(models, tmp_path):
    source = models("qwen3-moe")
    coterie.compress(str(source), str(tmp_path / "fewer"), method="random", keep=0.5)
    quantized(tmp_path / "fewer", tmp_path / "out", bits=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {m.num_experts for m in moe_layers(model)} == {4}
    record = json.loads((tmp_path / "out/coterie.json").read_text())
    assert [step["recipe"]["method"] for step in record["earlier_steps"]] == ["random"]


def test_shared_experts_of_a_router_stay_shared_when_they_are_quantized(models, ids, tmp_path):
    source = models("mixtral")
    coterie.compress(str(source), str(tmp_path / "merged"), method="m-smoe", keep=0.5, tokens=str(ids))
    quantized(tmp_path / "merged", tmp_path / "out", bits=8)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("merged", "out"))
    with torch.no_grad():
        a, b = one(tokens()).logits, two(tokens()).logits
    assert float((a - b).norm() / a.norm()) < 0.05


def test_a_loaded_model_saved_again_is_the_same(models, tmp_path):
    quantized(models("deepseek-v3"), tmp_path / "out", bits=3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    one, two = each_tensor(tmp_path / "out"), each_tensor(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": 0}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"quantizer": "hqq", "symmetric": True}, "hqq"),
    ],
)
def test_impossible_parameters_are_refused(parameters, told, models, tmp_path):
    with pytest.raises(UsageError, match=told):
        quantized(models("mixtral"), tmp_path / "out", **parameters)
    assert not (tmp_path / "out").exists()


def test_gptq_without_text_says_so(models, tmp_path):
    with pytest.raises(UsageError, match="no text was given"):
        coterie.compress(str(models("mixtral")), str(tmp_path / "out"), method="quantize")


def test_weights_that_are_no_numbers_are_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    source = saved("mixtral", tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = next(k for k in tensors if k.endswith("experts.3.w2.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        quantized(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_no_numbers_are_found_when_the_model_is_read(models, ids, tmp_path):
    from safetensors.torch import load_file, save_file

    quantized(models("mixtral"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors[next(k for k in tensors if k.endswith("scale_up"))][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="scale_up"):
        coterie.evaluate([str(tmp_path / "out")], tokens=str(ids))


@pytest.mark.parametrize("part", ["packed_down", "q_proj.packed"])
def test_a_flipped_bit_in_the_codes_is_found(part, models, ids, tmp_path):
    quantized(models("mixtral"), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = next(e for key, e in json.loads(data[8 : 8 + length]).items() if key.endswith(part))
    data[8 + length + entry["data_offsets"][0] + 5] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        coterie.evaluate([str(tmp_path / "out")], tokens=str(ids))
    with pytest.raises(CheckpointError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_plan_for_another_model_is_refused(models, tmp_path):
    plan = coterie.plan(str(models("mixtral")), method="quantize", parameters={"quantizer": "rtn"})
    with pytest.raises(UsageError, match="another model"):
        coterie.compress(str(models("qwen3-moe")), str(tmp_path / "out"), plan=plan)


def test_an_edited_plan_is_carried_out_and_checked(models, tmp_path):
    source = str(models("mixtral"))
    coterie.plan(source, method="quantize", parameters={"quantizer": "rtn"}, out=str(tmp_path / "plan.json"))

    def change(value, bits):
        value["layers"][0]["extra"]["bits"]["down"][2] = bits

    edit_json(tmp_path / "plan.json", lambda plan: change(plan, 7))
    coterie.compress(source, str(tmp_path / "out"), plan=str(tmp_path / "plan.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(iter(moe_layers(model))).experts.packed_bits["down"][2] == 7
    edit_json(tmp_path / "plan.json", lambda plan: change(plan, 11))
    with pytest.raises(UsageError, match="11 bits"):
        coterie.compress(source, str(tmp_path / "other"), plan=str(tmp_path / "plan.json"))


def test_a_plan_to_round_by_inputs_takes_the_text_on_the_command_line(models, ids, tmp_path):
    source = models("mixtral")
    given = ("--method", "quantize", "--set", "group_size=16")
    assert cli("plan", source, "--out", tmp_path / "plan.json", *given).code == 0
    done = cli("compress", source, tmp_path / "out", "--plan", tmp_path / "plan.json", "--tokens", ids)
    assert done.code == 0, done.err
    done = cli("compress", source, tmp_path / "other", "--plan", tmp_path / "plan.json")
    assert "no text was given" in done.err
    done = cli("compress", source, tmp_path / "other", "--plan", tmp_path / "plan.json", "--set", "bits=3")
    assert "would be ignored" in done.err


def test_a_quantized_checkpoint_is_not_edited(models, tmp_path):
    quantized(models("mixtral"), tmp_path / "out")
    with pytest.raises(UsageError, match="is quantized"):
        coterie.compress(str(tmp_path / "out"), str(tmp_path / "again"), method="random", keep=0.5)
    with pytest.raises(UsageError, match="is quantized"):
        quantized(tmp_path / "out", tmp_path / "again")


def test_parameters_of_a_quantized_model_are_those_of_the_original(models, tmp_path):
    quantized(models("deepseek-v3"), tmp_path / "out", bits=3)
    one, two = (measure(Runtime().open(str(f))) for f in (models("deepseek-v3"), tmp_path / "out"))
    assert (one.parameters, one.active_parameters) == (two.parameters, two.active_parameters)
    assert two.bytes < one.bytes


def test_mask_routers_are_learned_on_packed_experts_which_keep_their_codes(models, ids, tmp_path):
    quantized(models("qwen3-moe"), tmp_path / "packed")
    parameters = {"steps": 2, "batch_size": 2, "ratio": 0.75}
    result = coterie.compress(
        str(tmp_path / "packed"), str(tmp_path / "out"), method="otp", parameters=parameters, tokens=str(ids)
    )
    one, two = each_tensor(tmp_path / "packed"), each_tensor(tmp_path / "out")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert result.after.parameters > result.before.parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(iter(moe_layers(model))).experts.packed_bits
    assert torch.isfinite(model(tokens()).logits).all()


# -- kills ------------------------------------------------------------------------------------------------------------

KILLED = 9


def run_and_die_behind_line(arguments: tuple[str, ...], lines: int) -> None:
    """Dies behind that many new lines of the journal; with -1 it ends."""
    from coterie.streaming.writer import Workspace

    record, written = Workspace.record, 0

    def record_and_die(self: Workspace, step: dict[str, Any]) -> None:
        nonlocal written
        record(self, step)
        written += 1
        if written == lines:
            os._exit(KILLED)

    Workspace.record = record_and_die  # type: ignore[method-assign]
    os._exit(cli(*arguments).code)


def ended(*given: Any) -> int:
    process = start(run_and_die_behind_line, *given)
    process.join(120)
    assert process.exitcode is not None
    return int(process.exitcode)


@pytest.mark.parametrize(("family", "quantizer"), [("qwen3-moe", "gptq"), ("gpt-oss", "rtn")])
def test_a_killed_run_ends_with_the_same_bytes(family, quantizer, models, ids, tmp_path):
    options = ("--method", "quantize", "--set", f"quantizer={quantizer}", "--set", "group_size=16", "--no-report")
    options = (*options, *(("--tokens", ids) if quantizer == "gptq" else ()), "--shard-size", "100kB")

    def arguments(out: Path) -> tuple[str, ...]:
        return tuple(map(str, ("compress", models(family), out, *options)))

    assert ended(arguments(tmp_path / "plain"), -1) == 0
    for lines in (1, 3):
        out = tmp_path / f"out-{lines}"
        assert ended(arguments(out), lines) == KILLED
        assert not out.exists()
        assert ended(arguments(out), -1) == 0
        assert fingerprint(out) == fingerprint(tmp_path / "plain")


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(models, ids, tmp_path):
    source = models("qwen3-moe")
    given = ("--method", "quantize", "--set", "bits=3", "--set", "group_size=16")
    done = cli("plan", source, "--out", tmp_path / "plan.json", *given, "--set", "quantizer=rtn")
    assert done.code == 0, done.err
    assert "3.000 bits per weight" in done.out + done.err
    assert isinstance(load_plan(tmp_path / "plan.json"), BitPlan)
    done = cli("compress", source, tmp_path / "out", *given, "--tokens", ids)
    assert done.code == 0, done.err
    assert "3.000 bits per weight" in done.out + done.err
    assert (tmp_path / "out/report.html").is_file()
    told = cli("compress", source, tmp_path / "json", *given, "--tokens", ids, "--json").json()
    assert told["quantization"]["bytes"] == told["quantization"]["bytes_planned"]
    assert cli("compress", source, tmp_path / "no", *given, "--tokens", ids, "--keep", "0.5").code != 0
    assert "how many bits" in cli("compress", source, tmp_path / "no", *given, "--keep", "0.5", "--tokens", ids).err
    told = cli("inspect", tmp_path / "out", "--json").json()["stored_as"]
    assert told.startswith("experts 3 bits, 3.00 on average; ")
    assert "quantizer" in cli("methods", "quantize").out
    assert get_method("quantize").needs_text
