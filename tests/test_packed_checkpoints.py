"""Checkpoints that others published in FP8 or MXFP4: what they compute, what becomes of them, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import coterie
import coterie.experts.forward
from coterie.compression import forecast
from coterie.compression.sizes import measure
from coterie.profiling.profile import Profile
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.streaming.stored import form_of
from coterie.streaming.writer import ShardWriter, Spec
from families import FAMILIES, each_tensor, edit_json, token_file, tokens
from inprocess import cli, copy_of, fingerprint
from packed import dequantized, fp8, mxfp4, quantized
from test_resume import KILLED, ended, run, run_and_die_behind_line
from test_streaming import streamed_logits

# name -> (packed, the same weights as ordinary numbers); `ragged` blocks divide no attention matrix of the model
MAKE = {
    "deepseek-v3": lambda folder: fp8("deepseek-v3", folder),
    "ragged": lambda folder: fp8("deepseek-v3", folder, (16, 48)),
    "qwen3-moe": lambda folder: fp8("qwen3-moe", folder, (16, 8), torch.bfloat16),  # scales as Qwen publishes them
    "granite-moe": lambda folder: fp8("granite-moe", folder),  # all experts of a layer in one 3-D tensor
    "gpt-oss": mxfp4,
}
FORMS = tuple(MAKE)
STOCK = ("deepseek-v3", "qwen3-moe", "gpt-oss")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    made: dict[str, tuple[Path, Path]] = {}

    def make(form: str) -> tuple[Path, Path]:
        if form not in made:
            made[form] = MAKE[form](tmp_path_factory.mktemp(form))
        return made[form]

    return make


@pytest.fixture(scope="session")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", padded=True)


def compressed(model, out, *arguments):
    result = cli("compress", model, out, "--no-report", *arguments)
    assert result.code == 0, result.err
    return out


def stock(folder, dtype=torch.float32):
    """By transformers' own loader, which dequantizes where there is no GPU for the form."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation(coterie.experts.forward.NAME)
    if dtype == torch.float32:
        model = model.float()  # transformers leaves what is not packed in the dtype it is stored in
    return model


def assert_same_as_stock(folder):
    with torch.no_grad():
        expected = stock(folder)(tokens(), use_cache=False).logits
    (found,) = streamed_logits(folder, [Batch(tokens())])
    assert torch.equal(found, expected)


def raw_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bytes(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(raw_bytes(one), raw_bytes(two))


def source_of(key, tensor, before, plan):
    """What tensor `key` of a pruned checkpoint was in the one before, by name and plan alone."""
    found = re.search(r"\.layers\.(\d+)\.", key)
    keep = {layer["index"]: layer["keep"] for layer in plan["layers"]}.get(int(found[1])) if found else None
    renumbered = re.sub(r"(\.experts\.)(\d+)\.", lambda m: f"{m[1]}{keep[int(m[2])]}.", key)
    source = before[renumbered]
    if source.shape != tensor.shape:  # one entry per expert in one tensor: routers, and experts stored together
        source = source[keep]
    return source


# -- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_streamed_logits_equal_those_of_the_dequantized_weights(form, pair):
    packed, unpacked = pair(form)
    (found,), (expected,) = (streamed_logits(folder, [Batch(tokens())]) for folder in (packed, unpacked))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", STOCK)
def test_streamed_logits_equal_those_of_transformers_own_loader(form, pair):
    assert_same_as_stock(pair(form)[0])


def test_in_bfloat16_weights_are_those_transformers_dequantizes_to(pair):
    packed, _ = pair("deepseek-v3")
    with torch.no_grad():
        expected = stock(packed, torch.bfloat16)(tokens(), use_cache=False).logits
    (found,) = streamed_logits(packed, [Batch(tokens())], compute_dtype="bfloat16")
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("form", FORMS)
def test_each_packed_byte_of_the_decoder_is_read_once_per_sweep(form, pair):
    checkpoint = Checkpoint.open(pair(form)[0])
    streamed = StreamedModel(checkpoint)
    tied = streamed.model.config.tie_word_embeddings
    assert streamed_read(streamed) == checkpoint.nbytes - (0 if tied else checkpoint.tensors["lm_head.weight"].nbytes)


def streamed_read(streamed):
    from coterie.streaming.lockstep import sweep

    for step in sweep(streamed, [Batch(tokens())]):
        loaded = [i for i, layer in enumerate(streamed.layers) if not any(p.is_meta for p in layer.parameters())]
        assert loaded == [step.index]
        step.run()
    return streamed.checkpoint.bytes_read


@pytest.mark.parametrize("form", ["deepseek-v3", "gpt-oss"])
def test_a_profile_is_that_of_the_dequantized_weights(form, pair, ids, tmp_path):
    for folder, name in zip(pair(form), ("packed", "unpacked"), strict=True):
        assert cli("profile", folder, "--tokens", ids, "--out", tmp_path / name).code == 0
    one, two = (Profile.load(tmp_path / name) for name in ("packed", "unpacked"))
    for index, layer in one.layers.items():
        assert layer.stats.keys() == two.layers[index].stats.keys()
        assert all(torch.equal(value, two.layers[index].stats[name]) for name, value in layer.stats.items())


def test_a_pattern_loads_the_named_experts_dequantized(pair):
    order = {0: [3, 1, 6, 0], 1: [0, 1, 2, 3], 2: [7, 6, 5, 4]}
    packed, unpacked = (
        coterie.load(folder, pattern=order, dtype="float32", experts_implementation="coterie")[0]
        for folder in pair("gpt-oss")
    )
    with torch.no_grad():
        assert torch.equal(packed(tokens()).logits, unpacked(tokens()).logits)


def test_load_gives_one_dtype_where_float32_is_asked_for(pair):
    model, _ = coterie.load(pair("deepseek-v3")[0], dtype="float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# -- the forms ----------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_mxfp4_is_dequantized_as_transformers_does_bit_by_bit(seed, outputs, groups):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (2, outputs, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(8, 250, (2, outputs, groups), generator=generator, dtype=torch.uint8)
    out = torch.empty(2, groups * 32, outputs, dtype=torch.bfloat16)
    form_of({"quant_method": "mxfp4"}, "").unpack([blocks, scales], out)
    assert same_bytes(out, convert_moe_packed_tensors(blocks, scales))
    wide = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(out.float(), wide)  # bfloat16 holds them exactly


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantized_as_transformers_does_where_blocks_divide_the_weight(scales, dtype):
    q = torch.randn(3, 8, 16).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2).add(0.01).to(scales)
    out = torch.empty(q.shape, dtype=dtype)
    form_of(FP8, "").unpack([q, scale], out)
    assert same_bytes(out, Fp8Dequantize(None)._dequantize_one(q, scale, output_dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 8), (5, 9), (3, 3), (12, 16), (1, 40)])
def test_fp8_blocks_at_the_edges_are_smaller(shape):
    weight = torch.randn(shape)
    q, scale = quantized(weight, (4, 8))
    out = torch.empty(shape)
    form_of(FP8, "").unpack([q, scale], out)
    assert torch.equal(out, dequantized(q, scale, (4, 8)))
    again = form_of(FP8, "").pack(weight, [(q.dtype, tuple(q.shape)), (scale.dtype, tuple(scale.shape))])
    assert same_bytes(again[0], q)
    assert same_bytes(again[1], scale)


@pytest.mark.parametrize(
    ("entry", "scales"), [({}, torch.float32), ({}, torch.float8_e8m0fnu), ({"scale_fmt": "ue8m0"}, torch.float32)]
)
def test_fp8_quantization_is_within_half_a_step_of_every_block(entry, scales):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 24, generator=generator) * torch.rand(20, 1, generator=generator)
    out = torch.empty(20, 24)
    form = form_of({**FP8, **entry}, "")
    kinds = zip((torch.float8_e4m3fn, scales), form.layout((20, 24)), strict=True)
    q, scale = form.pack(weight, list(kinds))
    form.unpack([q, scale], out)
    wide = scale.float().repeat_interleave(4, 0).repeat_interleave(8, 1)
    step = wide * torch.maximum(2.0 ** torch.floor(torch.log2((weight / wide).abs())) / 8, torch.tensor(2.0**-9))
    assert bool(((out - weight).abs() <= step / 2 * 1.0001).all())
    if entry or scales != torch.float32:
        assert bool((torch.frexp(scale.float())[0] == 0.5).all())  # powers of two


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_numbers_of_mxfp4_stay_what_they_are_when_quantized_again(seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (1, 3, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 200, (1, 3, 2), generator=generator, dtype=torch.uint8)
    form = form_of({"quant_method": "mxfp4"}, "")
    weight, again = torch.empty(1, 64, 3, dtype=torch.bfloat16), torch.empty(1, 64, 3, dtype=torch.bfloat16)
    form.unpack([blocks, scales], weight)
    form.unpack(form.pack(weight, [(torch.uint8, (1, 3, 2, 16)), (torch.uint8, (1, 3, 2))]), again)
    assert torch.equal(weight, again)


def test_mxfp4_takes_the_better_of_two_scales_for_every_group():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 64, 5, generator=generator).bfloat16()
    weight[1].uniform_(-1, 1, generator=generator)  # many numbers beside the largest, which the lower scale would cut
    form, out = form_of({"quant_method": "mxfp4"}, ""), torch.empty(2, 64, 5, dtype=torch.bfloat16)
    blocks, scales = form.pack(weight, [(torch.uint8, (2, 5, 2, 16)), (torch.uint8, (2, 5, 2))])
    form.unpack([blocks, scales], out)

    def error(shift):
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        x = weight.float().transpose(1, 2).reshape(2, 5, 2, 32)
        exponent = torch.floor(torch.log2(x.abs().amax(-1, keepdim=True))) - 2 + shift
        nearest = grid[((x / 2.0**exponent).abs()[..., None] - grid).abs().argmin(-1)] * 2.0**exponent
        return (nearest - x.abs()).square().sum(-1)

    best = torch.minimum(error(0), error(1))
    found = (out.float() - weight.float()).square().transpose(1, 2).reshape(2, 5, 2, 32).sum(-1)
    torch.testing.assert_close(found, best)
    assert bool((error(1) < error(0)).any())
    assert bool((error(0) < error(1)).any())


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_a_change_in_one_block_leaves_the_bytes_of_all_others(form):
    weight, parts, stored = _random(form)
    weight[0, 0, 0] += 3
    again = stored.repack(weight, parts)
    assert not torch.equal(raw_bytes(again[0]), raw_bytes(parts[0]))
    other = torch.ones_like(again[1], dtype=torch.bool)
    other[0, 0, 0] = False
    assert torch.equal(again[1][other].float(), parts[1][other].float())
    values = torch.empty_like(weight)
    stored.unpack(again, values)
    apart = (values != weight).nonzero()
    rows, columns = (4, 8) if form == "fp8" else (32, 1)
    assert bool((apart[:, 0] == 0).all() & (apart[:, 1] < rows).all() & (apart[:, 2] < columns).all())


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_zeroing_weights_changes_no_other_byte(form):
    weight, parts, stored = _random(form)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    again = stored.repack(weight.masked_fill(gone, 0), parts)
    assert same_bytes(again[1], parts[1])
    values = torch.empty_like(weight)
    stored.unpack(again, values)
    assert torch.equal(values, weight.masked_fill(gone, 0))


def _random(form):
    generator = torch.Generator().manual_seed(0)
    if form == "fp8":
        stored, weight = form_of(FP8, ""), torch.empty(2, 8, 16)
        parts = [torch.randn(2, 8, 16, generator=generator).mul(99).to(torch.float8_e4m3fn), torch.rand(2, 2, 2) + 0.1]
    else:
        stored, weight = form_of({"quant_method": "mxfp4"}, ""), torch.empty(2, 64, 5, dtype=torch.bfloat16)
        parts = [
            torch.randint(0, 256, (2, 5, 2, 16), generator=generator, dtype=torch.uint8),
            torch.randint(118, 124, (2, 5, 2), generator=generator, dtype=torch.uint8),
        ]
    stored.unpack(parts, weight)
    return weight, parts, stored


# -- sizes and identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_of_packed_bytes_and_counts_of_weights(form, pair):
    packed, unpacked = (measure(StreamedModel(Checkpoint.open(folder))) for folder in pair(form))
    assert packed.bytes == sum(t.numel() * t.element_size() for t in each_tensor(pair(form)[0]).values())
    assert packed.parameters == unpacked.parameters
    assert packed.active_parameters == unpacked.active_parameters
    assert packed.bytes_of_expert < unpacked.bytes_of_expert * 0.6


def test_inspect_says_how_weights_are_stored(pair):
    assert cli("inspect", pair("qwen3-moe")[0], "--json").json()["stored_as"] == "fp8, one scale per 16 x 8 block"
    assert "mxfp4, one scale per 32 weights" in cli("inspect", pair("gpt-oss")[0]).out


def test_the_identity_of_a_checkpoint_depends_on_its_scales(pair, tmp_path):
    packed = copy_of(pair("qwen3-moe")[0], tmp_path / "copy")
    before = Checkpoint.open(packed).digest()
    assert StreamedModel(Checkpoint.open(packed)).checkpoint.digest() == before
    change(packed, lambda t: t["model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"].mul_(2))
    assert StreamedModel(Checkpoint.open(packed)).checkpoint.digest() != before


@pytest.mark.parametrize("form", ["deepseek-v3", "gpt-oss"])
def test_the_forecast_counts_unpacked_layers(form, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    needs = []
    for folder in pair(form):
        streamed = StreamedModel(Checkpoint.open(folder))
        needs.append(forecast.forecast(streamed, measure(streamed), 0.5, tmp_path, None, 0).memory_bytes)
    assert needs[0] == pytest.approx(needs[1], rel=0.15)  # norms and the like are stored narrower in one of them
    assert needs[0] > 2 * Checkpoint.open(pair(form)[0]).nbytes / 3


def test_a_packed_tensor_is_written_when_all_its_parts_are(tmp_path):
    parts = (Spec("a_blocks", torch.uint8, (4,)), Spec("a_scales", torch.uint8, (1,)))
    writer = ShardWriter(tmp_path, [Spec("a", torch.bfloat16, (8,), parts), Spec("b", torch.uint8, (2,))])
    writer.write("a_blocks", torch.zeros(4, dtype=torch.uint8))
    assert not writer.has("a")
    writer.write("a_scales", torch.zeros(1, dtype=torch.uint8))
    assert writer.has("a")
    writer.mark(["a", "b"])
    assert writer.bytes_written == writer.total_size == 7
    writer.close()
    again = ShardWriter(tmp_path, [Spec("a", torch.bfloat16, (8,), parts)])
    again.mark(["a"])
    assert again.has("a")
    again.close()


# -- pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [("--method", "reap"), ("--method", "frequency", "--propagate")])
def test_pruning_keeps_the_bytes_of_every_surviving_tensor(form, options, pair, ids, tmp_path):
    out = compressed(pair(form)[0], tmp_path / "out", "--keep", 0.5, "--tokens", ids, *options)
    before, after = each_tensor(pair(form)[0]), each_tensor(out)
    plan = json.loads((out / "plan.json").read_text())
    assert sum(t.dtype in (torch.float8_e4m3fn, torch.uint8) for t in after.values()) > 0
    for key, tensor in after.items():
        assert same_bytes(tensor, source_of(key, tensor, before, plan)), key
    assert {re.sub(r"experts\.\d+", "experts.N", key) for key in after} == {
        re.sub(r"experts\.\d+", "experts.N", key) for key in before
    }


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("deepseek-v3", "qwen3-moe", "granite-moe")])
def test_of_no_family_pruning_touches_a_packed_expert(family, ids, tmp_path):
    packed, _ = fp8(family, tmp_path)
    out = compressed(packed, tmp_path / "out", "--method", "frequency", "--keep", 0.5, "--tokens", ids)
    before, after = each_tensor(packed), each_tensor(out)
    plan = json.loads((out / "plan.json").read_text())
    experts = [key for key in after if "expert" in key and key.endswith("_scale_inv")]
    experts += [key.removesuffix("_scale_inv") for key in experts] if family != "granite-moe" else []
    assert experts
    for key in experts:
        assert same_bytes(after[key], source_of(key, after[key], before, plan)), key


@pytest.mark.parametrize("form", STOCK)
def test_a_pruned_checkpoint_is_one_of_the_same_form_that_transformers_loads(form, pair, ids, tmp_path):
    out = compressed(pair(form)[0], tmp_path / "out", "--method", "reap", "--keep", 0.5, "--tokens", ids)
    entry = "quantization_config"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (pair(form)[0], out))
    assert after[entry] == before[entry]
    assert_same_as_stock(out)


@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_checkpoint_computes_what_the_pruned_dequantized_one_does(form, pair, ids, tmp_path):
    outs = [
        compressed(folder, tmp_path / folder.name, "--method", "reap", "--keep", 0.5, "--tokens", ids)
        for folder in pair(form)
    ]
    (found,), (expected,) = (streamed_logits(out, [Batch(tokens())]) for out in outs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["qwen3-moe", "gpt-oss"])
def test_the_written_size_is_the_one_told(form, pair, ids, tmp_path):
    wanted = int(0.9 * Checkpoint.open(pair(form)[0]).nbytes)
    out = compressed(pair(form)[0], tmp_path / "out", "--method", "reap", "--target-size", wanted, "--tokens", ids)
    record = json.loads((out / "coterie.json").read_text())
    told = record["after"]["bytes"]
    assert told == sum(t.numel() * t.element_size() for t in each_tensor(out).values())
    one = (record["before"]["bytes"] - told) / (record["before"]["experts_total"] - record["after"]["experts_total"])
    assert wanted - record["after"]["layers"] * one < told <= wanted


@pytest.mark.parametrize("form", ["qwen3-moe", "gpt-oss"])
def test_layers_of_different_sizes_keep_their_form_and_load_in_transformers(form, pair, ids, tmp_path):
    keeps = {0: [0, 1, 2, 3], 1: [1, 2, 3], 2: [5, 6, 7]}
    plain = compressed(pair(form)[0], tmp_path / "even", "--method", "reap", "--keep", 0.5, "--tokens", ids)
    plan = tmp_path / "plan.json"
    shutil.copy(plain / "plan.json", plan)
    edit_json(plan, lambda p: [layer.update(keep=keeps[layer["index"]]) for layer in p["layers"]])
    out = compressed(pair(form)[0], tmp_path / "out", "--plan", plan)
    before, after = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (pair(form)[0], out))
    assert after["quant_method"] == "coterie"
    assert after["packed"] == before
    assert_same_as_stock(out)
    assert {p.dtype for p in coterie.load(out, dtype="float32")[0].parameters()} == {torch.float32}
    even = compressed(out, tmp_path / "again", "--method", "reap", "--keep-experts", 2, "--tokens", ids)
    assert json.loads((even / "config.json").read_text())["quantization_config"] == before
    assert_same_as_stock(even)


def test_a_fused_fp8_checkpoint_in_many_shards_is_complete(pair, ids, tmp_path):
    out = compressed(pair("granite-moe")[0], tmp_path / "out", "--keep", 0.5, "--tokens", ids, "--shard-size", "20kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == each_tensor(pair("granite-moe")[0]).keys()
    assert len(set(index.values())) > 3


@pytest.mark.parametrize(("form", "way"), [("deepseek-v3", "reap"), ("gpt-oss", "plan")])
def test_a_run_that_is_killed_behind_every_line_ends_with_the_same_bytes(form, way, pair, ids, tmp_path):
    options: tuple[object, ...] = ("--method", "reap", "--keep", 0.5, "--tokens", ids)
    if way == "plan":  # of a merge, which tells in the record what quantizing cost
        merged = compressed(pair(form)[0], tmp_path / "m", "--method", "hc-smoe", "--keep", 0.5, "--tokens", ids)
        options = ("--plan", merged / "plan.json")

    def arguments(out):
        return tuple(map(str, ("compress", pair(form)[0], out, "--no-report", *options)))

    plain, out = tmp_path / "plain", tmp_path / "out"
    assert ended(run, arguments(plain), str(tmp_path / "started")) == 0
    for _ in range(2):
        assert ended(run_and_die_behind_line, arguments(out), 1) == KILLED
    assert ended(run, arguments(out), str(tmp_path / "again")) == 0
    assert fingerprint(out) == fingerprint(plain)


# -- merging and editing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_merging_quantizes_what_changed_and_says_what_that_cost(form, pair, ids, tmp_path):
    options = ("--method", "hc-smoe", "--keep", 0.5, "--tokens", ids)
    out = compressed(pair(form)[0], tmp_path / "out", *options)
    record = json.loads((out / "coterie.json").read_text())
    told = [figures for figures in record["figures"].values() if "requantized_tensors" in figures]
    assert told
    limit = 0.15 if form == "gpt-oss" else 0.04  # what the formats cost numbers that are drawn from a bell
    assert all(0 < figures["requantization_error"] < limit for figures in told)
    count = int(sum(figures["requantized_tensors"] for figures in told))
    assert any(note.startswith(f"{count} matrices changed and were quantized") for note in record["notes"])
    assert fresh_tensors(pair(form)[0], out) == count


def fresh_tensors(before, after):
    """Expert matrices of `after` whose bytes no expert of the same layer and projection of `before` has."""
    known, found = expert_matrices(before), expert_matrices(after)
    return sum(not any(same_bytes(one, other) for other in known[name]) for name in found for one in found[name])


def expert_matrices(folder):
    """{layer and projection: the packed numbers of its experts}."""
    found: dict[str, list[torch.Tensor]] = {}
    for key, tensor in each_tensor(folder).items():
        numbers = tensor.dtype == torch.float8_e4m3fn or key.endswith("_blocks")
        together = tensor.dim() > 2
        if numbers and (together or ".experts." in key):
            found.setdefault(re.sub(r"\.experts\.\d+", "", key), []).extend(tensor if together else [tensor])
    return found


@pytest.mark.parametrize("form", ["deepseek-v3", "gpt-oss"])
def test_merged_experts_are_those_of_the_dequantized_weights_but_for_the_format(form, pair, ids, tmp_path):
    outs = [
        compressed(folder, tmp_path / folder.name, "--method", "hc-smoe", "--keep", 0.5, "--tokens", ids)
        for folder in pair(form)
    ]
    one, two = (json.loads((out / "plan.json").read_text())["layers"] for out in outs)
    assert one == two
    streamed = [StreamedModel(Checkpoint.open(out)) for out in outs]
    for index in streamed[0].moe:
        for model in streamed:
            model.load_moe(index)
        banks = [model.moe[index].bank for model in streamed]
        for expert in range(banks[0].num_experts):
            a, b = (bank.read(expert, torch.float32).down_HI for bank in banks)
            assert float((a - b).norm() / b.norm()) < (0.15 if form == "gpt-oss" else 0.04)


@pytest.mark.parametrize("form", ["qwen3-moe", "gpt-oss"])
def test_experts_behind_a_shared_router_load_in_transformers(form, pair, ids, tmp_path):
    assert_same_as_stock(
        compressed(pair(form)[0], tmp_path / "out", "--method", "m-smoe", "--keep", 0.5, "--tokens", ids)
    )


@pytest.mark.parametrize("form", ["ragged", "gpt-oss"])
def test_zeroed_weights_cost_no_other_weight_anything(form, pair, ids, tmp_path):
    outs = [
        compressed(folder, tmp_path / folder.name, "--method", "wanda", "--set", "sparsity=0.5", "--tokens", ids)
        for folder in pair(form)
    ]
    record = json.loads((outs[0] / "coterie.json").read_text())
    assert not any("requantized_tensors" in figures for figures in record["figures"].values())
    (found,), (expected,) = (streamed_logits(out, [Batch(tokens())]) for out in outs)
    assert torch.equal(found, expected)


def test_a_packed_router_is_cut_and_said_to_be_quantized_again(pair, ids, tmp_path):
    packed = copy_of(pair("qwen3-moe")[0], tmp_path / "model")

    def pack_router(tensors):
        for key in [k for k in tensors if k.endswith("mlp.gate.weight")]:
            tensors[key], tensors[f"{key}_scale_inv"] = quantized(tensors[key].float(), (16, 8), torch.bfloat16)

    change(packed, pack_router)
    out = compressed(packed, tmp_path / "out", "--method", "reap", "--keep", 0.5, "--tokens", ids)
    notes = json.loads((out / "coterie.json").read_text())["notes"]
    assert notes[0].startswith("2 matrices changed and were quantized to fp8 again")
    streamed_logits(out, [Batch(tokens())])


@pytest.mark.parametrize("form", ["qwen3-moe", "gpt-oss"])
def test_compare_and_evaluate_take_packed_checkpoints(form, pair, ids):
    packed, unpacked = pair(form)
    scores = cli("evaluate", unpacked, packed, "--tokens", ids, "--json").json()
    assert scores[1]["mean"] == {"loss": scores[0]["mean"]["loss"], "kl": 0, "agreement": 1}
    options = ("--methods", "reap,hc-smoe", "--keep", 0.5, "--tokens", ids, "--eval-tokens", ids, "--json")
    one, two = (cli("compare", folder, *options).json()["contenders"] for folder in (packed, unpacked))
    assert [entry["delta"] for entry in one] == [entry["delta"] for entry in two]
    assert not any(entry["refused"] for entry in one)


# -- what is refused ----------------------------------------------------------------------------------------------


def change(folder, how):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.0.mlp.experts.0.up_proj.weight"
DOWN = "model.layers.1.mlp.experts.down_proj"


def _set(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key])})


DAMAGE = {
    "scales are missing": ("qwen3-moe", lambda t: t.pop(f"{UP}_scale_inv"), ["has no weight_scale_inv beside it"]),
    "weights are missing": ("qwen3-moe", lambda t: t.pop(UP), [f"{UP}_scale_inv", "has no weight beside it"]),
    "scales have another shape": (
        "qwen3-moe",
        _set(f"{UP}_scale_inv", lambda s: s[:, :-1].contiguous()),
        ["shape [2, 7]", "[32, 64] in blocks of 16 x 8 has [2, 8]", "weight_block_size"],
    ),
    "scales are integers": ("qwen3-moe", _set(f"{UP}_scale_inv", lambda s: s.int()), ["I32 scales"]),
    "scaled weights are no fp8": ("qwen3-moe", _set(UP, lambda w: w.to(torch.int8)), [UP, "dtype is I8, not F8_E4M3"]),
    "an expert is not packed": (
        "qwen3-moe",
        lambda t: (t.pop(f"{UP}_scale_inv"), t.update({UP: t[UP].bfloat16()})),
        ["stored in different forms"],
    ),
    "activations have scales": (
        "qwen3-moe",
        lambda t: t.update({UP.replace("weight", "activation_scale"): torch.ones(())}),
        ["activation_scale", "cannot be read"],
    ),
    "nothing is packed": (
        "qwen3-moe",
        lambda t: [t.update({k: t[k].bfloat16()}) if not k.endswith("inv") else t.pop(k) for k in list(t)],
        ["stored as fp8, and none is"],
    ),
    "a weight is no number": (
        "qwen3-moe",
        lambda t: t[UP].view(torch.uint8)[0, 0].fill_(0x7F),
        [UP, "1 NaN or Inf weights of 2048", "--allow-nonfinite"],
    ),
    "a scale is no number": (
        "qwen3-moe",
        lambda t: t[f"{UP}_scale_inv"][0, 0].fill_(torch.nan),
        [UP, "128 NaN or Inf weights of 2048"],
    ),
    "a scale is infinite": ("qwen3-moe", lambda t: t[f"{UP}_scale_inv"][1, 1].fill_(torch.inf), [UP, "NaN or Inf"]),
    "blocks are missing": ("gpt-oss", lambda t: t.pop(f"{DOWN}_blocks"), ["has no down_proj_blocks beside it"]),
    "exponents are missing": ("gpt-oss", lambda t: t.pop(f"{DOWN}_scales"), ["has no down_proj_scales beside it"]),
    "exponents have another shape": (
        "gpt-oss",
        _set(f"{DOWN}_scales", lambda s: s[:, :, :0].contiguous()),
        ["shape [8, 64, 0]", "ask for [8, 64, 1] bytes"],
    ),
    "groups are of 16": (
        "gpt-oss",
        _set(f"{DOWN}_blocks", lambda b: b.reshape(8, 64, 2, 8)),
        ["shape [8, 64, 2, 8]", "not [E, O, G, 16] bytes"],
    ),
    "blocks are of another model": (
        "gpt-oss",
        lambda t: t.update({f"{DOWN}_{n}": t[f"{DOWN}_{n}"][:, :32].contiguous() for n in ("blocks", "scales")}),
        ["another shape than config.json says", "[8, 32, 32] instead of [8, 32, 64]"],
    ),
    "an exponent is no number": (
        "gpt-oss",
        lambda t: t[f"{DOWN}_scales"][3, 5].fill_(255),
        [DOWN, "32 NaN or Inf weights of 16384"],
    ),
    "no expert is packed": (
        "gpt-oss",
        lambda t: [t.pop(k) for k in list(t) if k.endswith(("_blocks", "_scales"))],
        ["stored as mxfp4, and none is"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_packed_weights_are_refused(damage, pair, ids, tmp_path):
    form, how, says = DAMAGE[damage]
    folder = copy_of(pair(form)[0], tmp_path / "model")
    change(folder, how)
    refused(folder, ids, tmp_path, says)


def refused(folder, ids, tmp_path, says):
    result = cli("compress", folder, tmp_path / "out", "--method", "reap", "--keep", 0.5, "--tokens", ids)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    told = " ".join(result.err.split())
    assert all(text in told for text in says), result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"weight_block_size": None}, ["weight_block_size", "None"]),
        ({"weight_block_size": [0, 8]}, ["[0, 8]"]),
        ({"weight_block_size": [16, -8]}, ["[16, -8]"]),
        ({"weight_block_size": [16]}, ["[16]"]),
        ({"weight_block_size": [16, 8.5]}, ["[16, 8.5]"]),
        ({"weight_block_size": [True, 8]}, ["[True, 8]"]),
        ({"weight_block_size": [2**70, 8]}, ["not two positive numbers"]),
        ({"weight_block_size": "128"}, ["'128'"]),
        ({"weight_block_size": [10**9, 10**9]}, ["in blocks of 1000000000 x 1000000000 has [1, 1]"]),
        (
            {"weight_block_size": [8, 8]},
            ["shape [4, 4]", "in blocks of 8 x 8 has [8, 4]", "weight_block_size"],
        ),
        ({"activation_scheme": "static"}, ["activation_scheme 'static'", "'dynamic'"]),
        ({"fmt": "e5m2"}, ["fmt 'e5m2'", "'e4m3'"]),
        ({"expert_dtype": "fp4"}, ["expert_dtype 'fp4'"]),
        ({"quant_method": "mxfp4"}, ["stored as mxfp4, and none is"]),
        ({"quant_method": "compressed-tensors"}, ["is quantized (compressed-tensors)", "block-scaled FP8", "unquant"]),
        ({"quant_method": ["fp8"]}, ["is quantized (['fp8'])"]),
    ],
)
def test_a_quantization_config_that_makes_no_sense_is_refused(entry, says, pair, ids, tmp_path):
    folder = copy_of(pair("qwen3-moe")[0], tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(entry))
    refused(folder, ids, tmp_path, says)


def test_nan_weights_are_let_through_where_that_is_asked_for_and_keep_their_bytes(pair, ids, tmp_path):
    folder = copy_of(pair("qwen3-moe")[0], tmp_path / "model")
    change(folder, lambda t: t[UP].view(torch.uint8)[0, 0].fill_(0x7F))
    options = ("--method", "random", "--keep", 0.5, "--protect", "0:0", "--allow-nonfinite")
    out = compressed(folder, tmp_path / "out", *options)
    assert same_bytes(each_tensor(out)[UP], each_tensor(folder)[UP])


@pytest.mark.parametrize("form", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(
    ("method", "setting"), [("low-rank", "rank=4"), ("mc-smoe", "rank=4"), ("slimmoe", "width=0.5")]
)
def test_methods_whose_result_has_no_packed_form_are_refused(form, method, setting, pair, ids, tmp_path):
    options = ("--method", method, "--set", setting, "--tokens", ids)
    result = cli("compress", pair(form)[0], tmp_path / "out", *options)
    assert result.code == 2, result.err
    assert "is stored as" in result.err
    assert "unquantized checkpoint" in result.err


@pytest.mark.parametrize("verb", ["finetune", "heal"])
def test_training_is_refused_before_it_begins(verb, pair, ids, tmp_path):
    packed, unpacked = pair("qwen3-moe")
    more = ("--teacher", unpacked) if verb == "heal" else ()
    result = cli(verb, packed, tmp_path / "out", "--tokens", ids, *more)
    assert result.code == 2, result.err
    assert "is stored as fp8: what is trained would not be" in " ".join(result.err.split())


def test_padding_is_refused(pair, ids, tmp_path):
    options = ("--method", "reap", "--keep", 0.5, "--layers", "0,1", "--tokens", ids)
    uneven = compressed(pair("gpt-oss")[0], tmp_path / "uneven", *options)
    result = cli("export", uneven, tmp_path / "out", "--pad", "--tokens", ids)
    assert result.code == 2, result.err
    assert "is stored as mxfp4: its layers cannot be padded" in " ".join(result.err.split())


def test_a_teacher_that_is_packed_can_be_asked_before_training_only(pair, ids, tmp_path):
    packed, unpacked = pair("qwen3-moe")
    options = ("--tokens", ids, "--teacher", packed, "--steps", 1)
    online = cli("heal", unpacked, tmp_path / "online", *options, "--logits", "online")
    assert online.code == 2, online.err
    assert "--logits cached" in online.err
    cached = cli("heal", unpacked, tmp_path / "cached", *options)
    assert cached.code == 0, cached.err


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_packed_prediction_layers_go_with_the_experts_or_stay_as_they_are(keep, pair, ids, tmp_path):
    folder = copy_of(pair("deepseek-v3")[0], tmp_path / "model")
    extra = {UP.replace("layers.0.", "layers.61."): UP.replace("layers.0.", "layers.1.")}
    change(folder, lambda t: t.update({new + s: t[old + s].clone() for new, old in extra.items() for s in SUFFIXES}))
    out = compressed(folder, tmp_path / "out", "--method", "reap", "--keep", keep, "--tokens", ids)
    before, after = each_tensor(folder), each_tensor(out)
    for key in (new + suffix for new in extra for suffix in SUFFIXES):
        assert (key in after) == (keep == 1.0)
        assert key not in after or same_bytes(before[key], after[key])


SUFFIXES = ("", "_scale_inv")
