"""Quantized checkpoints for other software: dense for all, packed as compressed-tensors for transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import coterie
from coterie.api.runtime import Runtime
from coterie.compression.exporting import expert_names
from coterie.errors import UsageError
from families import FAMILIES, each_tensor, saved, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")

NAMED = ("qwen3-moe", "mixtral", "deepseek-v3", "olmoe")  # experts are stored one by one


def quantized(family, folder, dtype=torch.bfloat16, **parameters):
    source = saved(family, folder, dtype)
    parameters = {"quantizer": "rtn", "group_size": 8, "symmetric": True, **parameters}
    coterie.compress(str(source), str(folder / "packed"), method="quantize", parameters=parameters)
    return source, folder / "packed"


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits.float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_export_has_the_names_of_the_original_and_computes_what_the_codes_do(family, symmetric, tmp_path):
    source, folder = quantized(family, tmp_path, torch.float32, bits=3, symmetric=symmetric)
    coterie.unpack(str(folder), str(tmp_path / "dense"), "dense")
    before, after = each_tensor(source), each_tensor(tmp_path / "dense")
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    packed_model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(packed_model), atol=2e-4, rtol=2e-4
    )
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", NAMED)
def test_stock_transformers_unpacks_an_export_to_the_same_weights(family, bits, tmp_path):
    more = {"attention_bits": 8, "shared_bits": 8, "dense_bits": 8}
    _, folder = quantized(family, tmp_path, bits=bits, **more)
    result = coterie.unpack(str(folder), str(tmp_path / "ct"), "compressed-tensors")
    coterie.unpack(str(folder), str(tmp_path / "dense"), "dense")
    options = {"dtype": torch.bfloat16, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", **options).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=0, rtol=2**-7, msg=name)  # one step of bfloat16
    assert result.bytes_after < 0.8 * sum(t.nbytes for t in each_tensor(tmp_path / "dense").values())


@pytest.mark.parametrize("family", NAMED)
def test_the_librarys_own_unpacker_reads_every_packed_matrix(family, tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    _, folder = quantized(family, tmp_path, bits=3)
    coterie.unpack(str(folder), str(tmp_path / "ct"), "compressed-tensors")
    coterie.unpack(str(folder), str(tmp_path / "dense"), "dense")
    tensors, dense = each_tensor(tmp_path / "ct"), each_tensor(tmp_path / "dense")
    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    assert names
    for name in names:
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 3, shape).float()
        scale = tensors[f"{name}.weight_scale"].float().repeat_interleave(8, 1)
        torch.testing.assert_close((codes * scale).to(torch.bfloat16), dense[f"{name}.weight"], atol=0, rtol=0)


def test_the_layout_is_the_documented_one(tmp_path):
    _, folder = quantized("qwen3-moe", tmp_path, bits=4, attention_bits=16, dense_bits=16, group_size=16)
    coterie.unpack(str(folder), str(tmp_path / "ct"), "compressed-tensors")
    tensors = each_tensor(tmp_path / "ct")
    name = "model.layers.0.mlp.experts.3.gate_proj"
    assert tensors[f"{name}.weight_packed"].dtype == torch.int32
    assert tensors[f"{name}.weight_packed"].shape == (32, 64 * 4 // 32)
    assert tensors[f"{name}.weight_scale"].shape == (32, 4)
    assert tensors[f"{name}.weight_shape"].tolist() == [32, 64]
    config = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = config["config_groups"].values()
    assert group["weights"] == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    assert "lm_head" in config["ignore"]
    assert "model.layers.0.mlp.gate" in config["ignore"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]


@pytest.mark.parametrize(
    ("family", "parameters", "told"),
    [
        ("mixtral", {"symmetric": False}, "zero points"),
        ("mixtral", {"group_size": 24}, "no multiple of the group size"),
        ("mixtral", {"bits": 1}, "2 to 8"),
        ("gpt-oss", {}, "in one tensor"),
        ("mixtral", {"attention_bits": 4, "dense_bits": 4, "bits": 16}, None),
    ],
)
def test_what_the_form_cannot_hold_is_said(family, parameters, told, tmp_path):
    _, folder = quantized(family, tmp_path, **parameters)
    if told is None:
        coterie.unpack(str(folder), str(tmp_path / "ct"), "compressed-tensors")
        return
    with pytest.raises(UsageError, match=told):
        coterie.unpack(str(folder), str(tmp_path / "ct"), "compressed-tensors")
    assert not (tmp_path / "ct").exists()


def test_mixed_widths_stay_in_our_own_form(tmp_path):
    source = saved("mixtral", tmp_path)
    parameters = {"quantizer": "rtn", "group_size": 16, "symmetric": True, "draw": 1}
    coterie.compress(str(source), str(tmp_path / "packed"), method="quantmoe-random", parameters=parameters)
    with pytest.raises(UsageError, match="one width for all"):
        coterie.unpack(str(tmp_path / "packed"), str(tmp_path / "ct"), "compressed-tensors")
    coterie.unpack(str(tmp_path / "packed"), str(tmp_path / "dense"), "dense")


def test_names_of_experts_are_those_of_the_checkpoint(tmp_path):
    streamed = Runtime().open(str(saved("mixtral", tmp_path)))
    names = expert_names(streamed, streamed.moe[0])
    assert names[5, "gate"].endswith("experts.5.w1")
    assert names[5, "up"].endswith("experts.5.w3")
    assert names[5, "down"].endswith("experts.5.w2")
    keys = set(streamed.checkpoint.tensors)
    assert {f"{name}.weight" for name in names.values()} <= keys


def test_the_command_line(tmp_path):
    source, folder = quantized("qwen3-moe", tmp_path)
    done = cli("export", folder, tmp_path / "dense", "--form", "dense")
    assert done.code == 0, done.err
    told = cli("export", folder, tmp_path / "ct", "--form", "compressed-tensors", "--json").json()
    assert told["bytes_after"] > 0
    assert any("dequantize=True" in note for note in told["notes"])
    assert cli("export", source, tmp_path / "no", "--form", "dense").code != 0
    assert "no packed weights" in cli("export", source, tmp_path / "no", "--form", "dense").err
    assert "one thing at a time" in cli("export", folder, tmp_path / "no").err
    assert "no form" in cli("export", folder, tmp_path / "no", "--form", "onnx").err
