"""A user's mistakes and disasters end in one clear message, with the input untouched and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import edit_json, saved, tiny, token_file
from inprocess import cli, copy_of, fingerprint, limited, start, until

VOCABULARY = 4096  # the pocket tokenizer's
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints to copy: whole, in shards, grouped."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "qwen": saved("qwen3-moe", folder, vocab_size=VOCABULARY),
        "sharded": saved("qwen3-moe", folder / "sharded", shard="400KB", vocab_size=VOCABULARY),
        "deepseek": saved("deepseek-v3", folder),
        "gpt-oss": saved("gpt-oss", folder),
        "other": saved("qwen3-moe", folder / "other", seed=7, vocab_size=VOCABULARY),
    }


pytestmark = pytest.mark.usefixtures("one_thread_each")


@pytest.fixture
def qwen(bases, tmp_path):
    return copy_of(bases["qwen"], tmp_path / "model")


@pytest.fixture
def sharded(bases, tmp_path):
    return copy_of(bases["sharded"], tmp_path / "model")


@pytest.fixture
def deepseek(bases, tmp_path):
    return copy_of(bases["deepseek"], tmp_path / "model")


@pytest.fixture
def tokens(tmp_path):
    return token_file(tmp_path / "tokens.safetensors")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": f"The river runs to the sea, {i} times, and nobody asks it why. " * 4}) for i in range(6)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def partial(out):
    return out.with_name(out.name + ".partial")


def refused(*arguments, says=(), unchanged=(), absent=(), code=2, run=cli):
    """The call ends with `code` and one message that holds all of `says`."""
    before = [fingerprint(folder) for folder in unchanged]
    result = run(*arguments)
    assert "Traceback" not in result.err, result.err
    assert result.code == code, (result.code, result.err)
    assert result.out == ""
    verb = next(str(a) for a in arguments if not str(a).startswith("-"))
    messages = [line for line in result.err.splitlines() if line.startswith(f"coterie {verb}: ")]
    assert len(messages) == 1, result.err
    missing = [str(part) for part in says if str(part) not in result.err]
    assert not missing, (missing, result.err)
    assert [fingerprint(folder) for folder in unchanged] == before
    for path in absent:
        assert not path.exists()
        assert not partial(path).exists()
    return result


def compress_refused(model, *options, says=(), out=None, absent=None, **settings):
    """Nothing was done: neither the output nor a partial folder is there."""
    out = out or model.parent / "out"
    absent = [out] if absent is None else absent
    return refused("compress", model, out, *options, says=says, unchanged=[model], absent=absent, **settings)


def compressed(model, out, *options):
    result = cli("compress", model, out, "--no-report", *options)
    assert result.code == 0, result.err
    return out


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_header(file, change):
    """Change a safetensors header and leave the data as it is."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header = change(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def edited(folder, name="config.json", **changes):
    edit_json(folder / name, lambda value: value.update(changes))
    return folder


# -- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_a_dense_model_is_refused(name, tmp_path, tokens):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = tmp_path / "dense"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    compress_refused(model, "--keep", 0.5, "--tokens", tokens, says=[f"{name}ForCausalLM has no MoE layers"])
    refused("inspect", model, says=["no MoE layers", "coterie inspect --architectures"], unchanged=[model])


def test_a_folder_that_is_none_is_refused(tmp_path, qwen, tokens):
    refused("inspect", tmp_path / "nowhere", says=["no folder", "nowhere"])
    refused("inspect", "nowhere", says=["no folder nowhere", "owner/name"])
    refused("inspect", qwen / "config.json", says=["is a file", "folder that holds config.json"])
    (tmp_path / "empty").mkdir()
    refused("inspect", tmp_path / "empty", says=["has no config.json"])


def test_an_unknown_hub_model_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("inspect", "nobody/nothing", "--offline", says=["no model 'nobody/nothing'", "--offline"])


def test_keeping_fewer_than_top_k_is_refused(qwen, tokens):
    says = ["cannot keep 1 of 8 experts in layer 0", "picks 2 per token", "--keep-experts 2"]
    compress_refused(qwen, "--keep-experts", 1, "--tokens", tokens, says=says)
    compress_refused(qwen, "--keep", 0.1, "--tokens", tokens, says=says)


def test_a_count_that_routing_groups_do_not_divide_is_refused(deepseek, tokens):
    says = ["cannot keep 10 of 16 experts in layer 1", "4 groups", "Keep 8 or 12"]
    compress_refused(deepseek, "--keep-experts", 10, "--tokens", tokens, says=says)


def test_an_edited_plan_with_unequal_groups_is_refused(deepseek, tmp_path):
    out = compressed(deepseek, tmp_path / "first", "--keep", 0.5, "--method", "random")
    plan = tmp_path / "plan.json"
    shutil.copy(out / "plan.json", plan)

    def unbalance(value):
        value["layers"][1]["keep"] = [0, 1, 2, 3, 4, 8, 9, 12]

    edit_json(plan, unbalance)
    says = ["unequal survivors", "layer 2", "[4, 1, 2, 1]"]
    compress_refused(deepseek, "--plan", plan, says=says)


@pytest.mark.parametrize("lost", [1, 1000, 300_000])
def test_a_truncated_single_file_is_refused(lost, qwen, tokens):
    file = qwen / "model.safetensors"
    os.truncate(file, file.stat().st_size - lost)
    says = ["model.safetensors is truncated", file.stat().st_size, "fetch this shard again"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says)


@pytest.mark.parametrize("left", [0, 5, 100, 50_000])
def test_a_truncated_shard_is_refused(left, sharded, tokens):
    file = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(file, left)
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=[f"{file.name} is truncated", left])


def test_a_missing_shard_is_refused(sharded, tokens):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=[f"shard {file.name} is missing"])


def test_shards_without_an_index_are_refused(sharded, tokens):
    (sharded / INDEX).unlink()
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=["safetensors files but no", INDEX])


@pytest.mark.parametrize("key", [ATTENTION, EXPERT, "model.norm.weight", "model.layers.0.mlp.gate.weight"])
def test_a_missing_tensor_is_refused(key, qwen, tokens):
    rewrite(qwen / "model.safetensors", lambda tensors: tensors.pop(key))
    name = key if "experts" not in key else "model.layers.2.mlp.experts"
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=[name])


def test_one_half_of_a_missing_gate_and_up_pair_is_refused(qwen, tokens):
    rewrite(qwen / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=["model.layers.2.mlp.experts"])


@pytest.mark.parametrize("key", [ATTENTION, EXPERT])
def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_refused(key, sharded, tokens):
    name = json.loads((sharded / INDEX).read_text())["weight_map"][key]
    rewrite(sharded / name, lambda tensors: tensors.pop(key))
    says = [f"{name}: 1 tensors that the index promises are missing", key, "fetch this shard again"]
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=says)


def test_an_extra_tensor_is_refused(qwen, tokens):
    rewrite(qwen / "model.safetensors", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    says = ["1 tensors belong to no part", "model.extra.weight", "Qwen3MoeForCausalLM"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says)


def test_an_extra_tensor_beside_an_index_is_refused(sharded, tokens):
    name = sorted(sharded.glob("*.safetensors"))[0].name
    rewrite(sharded / name, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    says = [f"{name}: 1 tensors are not in the index", "model.extra.weight"]
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=says)


def test_an_extra_tensor_that_the_index_knows_is_refused(sharded, tokens):
    name = sorted(sharded.glob("*.safetensors"))[0].name
    rewrite(sharded / name, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    edit_json(sharded / INDEX, lambda value: value["weight_map"].update({"model.extra.weight": name}))
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=["belong to no part", "model.extra.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key", ["model.layers.0.mlp.experts.3.down_proj.weight", ATTENTION, "model.embed_tokens.weight"]
)
def test_weights_that_are_no_numbers_are_refused_by_name(key, value, qwen, tokens):
    rewrite(qwen / "model.safetensors", lambda tensors: tensors[key].view(-1)[5:7].fill_(value))
    says = [f"{key} holds 2 NaN or Inf weights of ", "--allow-nonfinite"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says)


def test_allow_nonfinite_goes_on_and_keeps_the_weights_as_they_are(qwen, tmp_path):
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    rewrite(qwen / "model.safetensors", lambda tensors: tensors[key].view(-1)[5:7].fill_(float("nan")))
    options = ("--keep-experts", 7, "--method", "random", "--protect", "0:3")
    compress_refused(qwen, *options, says=[key, "NaN"])
    out = compressed(qwen, tmp_path / "out", *options, "--allow-nonfinite")
    plan = json.loads((out / "plan.json").read_text())
    name = f"model.layers.0.mlp.experts.{plan['layers'][0]['keep'].index(3)}.down_proj.weight"
    assert int(torch.isnan(load_file(out / "model.safetensors")[name]).sum()) == 2


def test_a_calibration_that_nonfinite_weights_made_useless_says_so(qwen, tokens):
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    rewrite(qwen / "model.safetensors", lambda tensors: tensors[key].fill_(float("nan")))
    says = ["layer 0", "experts", "not a number"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, "--allow-nonfinite", says=says)


def test_an_infinite_weight_may_pass_a_calibration(qwen, tokens, tmp_path):
    key = "model.layers.2.mlp.experts.3.down_proj.weight"
    rewrite(qwen / "model.safetensors", lambda tensors: tensors[key].view(-1)[:1].fill_(float("inf")))
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, "--method", "frequency", says=[key], absent=[])
    compressed(qwen, tmp_path / "out", "--keep", 0.5, "--tokens", tokens, "--allow-nonfinite", "--method", "frequency")


# -- text and tokenizers ------------------------------------------------------------------------------------------


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_a_missing_tokenizer_is_refused_and_another_one_helps(qwen, bases, text, tmp_path):
    without_tokenizer(qwen)
    options = ("--keep", 0.5, "--data", text, "--length", 16, "--samples", 2)
    compress_refused(qwen, *options, says=["has no tokenizer", "--tokenizer"])
    compressed(qwen, tmp_path / "out", *options, "--tokenizer", bases["other"])


def test_a_damaged_tokenizer_is_refused(qwen, text):
    (qwen / "tokenizer.json").write_text('{"model": ')
    says = ["tokenizer of", "cannot be loaded", "--tokenizer"]
    compress_refused(qwen, "--keep", 0.5, "--data", text, says=says)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(bases, text, tmp_path):
    model = copy_of(bases["deepseek"], tmp_path / "model")  # knows 512 tokens
    options = ("--data", text, "--length", 16, "--samples", 2)
    says = ["token id", "the model knows 512", "tokenizer"]
    compress_refused(model, "--keep", 0.5, *options, says=says)
    refused("profile", model, "--out", tmp_path / "p", *options, says=says, absent=[tmp_path / "p"])
    refused("evaluate", model, *options, says=says)


@pytest.mark.parametrize("value", [-1, 512, 2**40])
def test_token_ids_that_the_model_does_not_know_are_refused(value, deepseek, tmp_path):
    file = token_file(tmp_path / "ids.safetensors")
    rewrite(file, lambda tensors: tensors["input_ids"][1, 3].fill_(value))
    compress_refused(deepseek, "--keep", 0.5, "--tokens", file, says=[f"token id {value}", "the model knows 512"])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"ids": torch.zeros(2, 4).long()}, ["input_ids"]),
        ({"input_ids": torch.zeros(8).long()}, ["must be [B, L]", "[8]"]),
        ({"input_ids": torch.zeros(0, 8).long()}, ["must be [B, L]", "[0, 8]"]),
        ({"input_ids": torch.zeros(2, 8)}, ["int64", "float32"]),
        (
            {"input_ids": torch.zeros(2, 8).long(), "attention_mask": torch.ones(2, 7).long()},
            ["mask of the same shape"],
        ),
        ({"input_ids": torch.zeros(2, 8).long(), "attention_mask": torch.zeros(2, 8).long()}, ["masked"]),
    ],
)
def test_a_file_that_holds_no_token_ids_is_refused(tensors, says, qwen, tmp_path):
    file = tmp_path / "ids.safetensors"
    save_file(tensors, file)
    compress_refused(qwen, "--keep", 0.5, "--tokens", file, says=[file.name, *says])


def test_a_missing_or_damaged_token_file_is_refused(qwen, tmp_path):
    compress_refused(qwen, "--keep", 0.5, "--tokens", tmp_path / "none.safetensors", says=["none.safetensors"])
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    compress_refused(qwen, "--keep", 0.5, "--tokens", tmp_path / "junk.safetensors", says=["junk.safetensors"])


def as_gzip(text):
    return gzip.compress(text.encode())


def damaged_gzip():
    raw = bytearray(gzip.compress(os.urandom(3000)))
    raw[500:600] = bytes(100)
    return bytes(raw)


BAD_TEXT: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("a.txt", b"", ["no text", "a.txt"]),
    "blank": ("a.txt", b" \n\n ", ["no text", "a.txt"]),
    "empty jsonl": ("a.jsonl", b"\n\n", ["no text", "a.jsonl", "`text`"]),
    "too short": ("a.txt", b"Too short.", ["'a' is too short", "64 tokens", "--length"]),
    "latin-1": ("a.txt", "na\u00efvet\u00e9 ".encode("latin-1") * 50, ["a.txt is not UTF-8", "byte 2", "iconv"]),
    "latin-1 jsonl": (
        "a.jsonl",
        b'{"text": "good"}\n' + '{"text": "caf\u00e9"}\n'.encode("latin-1"),
        ["a.jsonl", "line 2", "not UTF-8", "iconv"],
    ),
    "broken json": ("a.jsonl", b'{"text": "good"}\n{"text": "bad\n', ["a.jsonl, line 2 is not JSON"]),
    "deep json": ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1 is not JSON"]),
    "long number": ("a.jsonl", b'{"text": ' + b"1" * 6000 + b"}", ["a.jsonl, line 1"]),
    "no text": ("a.jsonl", b'{"text": "good"}\n{"body": "x"}\n', ["a.jsonl, line 2 has no `text`"]),
    "text is a number": ("a.jsonl", b'{"text": 5}\n', ["a.jsonl, line 1 has no `text`"]),
    "a list": ("a.jsonl", b'["text"]\n', ["a.jsonl, line 1 has no `text`"]),
    "cut gzip": ("a.jsonl.gz", as_gzip('{"text": "good"}\n' * 50)[:-20], ["a.jsonl.gz"]),
    "damaged gzip": ("a.jsonl.gz", damaged_gzip(), ["a.jsonl.gz"]),
    "no gzip": ("a.jsonl.gz", b'{"text": "good"}\n', ["a.jsonl.gz"]),
    "damaged parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", ["a.parquet"]),
    "no parquet": ("a.parquet", b"hello", ["a.parquet"]),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_unusable_text_is_refused(case, qwen, tmp_path):
    name, raw, says = BAD_TEXT[case]
    file = tmp_path / name
    file.write_bytes(raw)
    compress_refused(qwen, "--keep", 0.5, "--data", file, "--length", 64, says=says)


def test_parquet_without_text_is_refused(qwen, tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y"]}), file)
    compress_refused(qwen, "--keep", 0.5, "--data", file, says=["a.parquet, row 0 has no `text`"])


def test_missing_text_is_refused(qwen, tmp_path, monkeypatch):
    compress_refused(qwen, "--keep", 0.5, "--data", tmp_path / "none.txt", says=["no file or folder", "none.txt"])
    compress_refused(qwen, "--keep", 0.5, "--data", "none.jsonl", says=["no file or folder none.jsonl"])
    (tmp_path / "folder").mkdir()
    compress_refused(qwen, "--keep", 0.5, "--data", tmp_path / "folder", says=["holds no text files", ".jsonl"])
    compress_refused(qwen, "--keep", 0.5, says=["no text was given", "--data", "--profile"])
    import datasets

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    compress_refused(
        qwen, "--keep", 0.5, "--data", "nobody/nothing", says=["no file, folder or dataset 'nobody/nothing'"]
    )


def test_missing_evaluation_text_is_found_before_anything_is_done(qwen, tokens, tmp_path):
    options = ("--keep", 0.5, "--tokens", tokens, "--evaluate", tmp_path / "none.txt")
    compress_refused(qwen, *options, says=["no file or folder", "none.txt"])


# -- hostile and inconsistent configs and headers -----------------------------------------------------------------

ABSURD: list[tuple[str, str, Any]] = [
    ("qwen", "num_hidden_layers", 10**9),
    ("qwen", "num_hidden_layers", -3),
    ("qwen", "num_hidden_layers", 0),
    ("qwen", "num_hidden_layers", "3"),
    ("qwen", "num_hidden_layers", "many"),
    ("qwen", "num_hidden_layers", 2.5),
    ("qwen", "num_hidden_layers", None),
    ("qwen", "num_hidden_layers", 2),
    ("qwen", "num_hidden_layers", 4),
    ("qwen", "hidden_size", 10**12),
    ("qwen", "hidden_size", 10**30),
    ("qwen", "hidden_size", -64),
    ("qwen", "hidden_size", 0),
    ("qwen", "hidden_size", "wide"),
    ("qwen", "vocab_size", 10**15),
    ("qwen", "vocab_size", -1),
    ("qwen", "num_local_experts", 10**9),
    ("qwen", "num_local_experts", -8),
    ("qwen", "num_local_experts", 0),
    ("qwen", "num_local_experts", 9),
    ("qwen", "num_local_experts", [8, 8]),
    ("qwen", "num_experts_per_tok", 10**9),
    ("qwen", "num_experts_per_tok", 9),
    ("qwen", "num_experts_per_tok", 0),
    ("qwen", "num_experts_per_tok", -1),
    ("qwen", "num_experts_per_tok", "two"),
    ("qwen", "moe_intermediate_size", 10**15),
    ("qwen", "num_attention_heads", 10**9),
    ("qwen", "num_attention_heads", 0),
    ("qwen", "num_key_value_heads", 0),
    ("qwen", "num_key_value_heads", 3),
    ("qwen", "head_dim", 10**14),
    ("qwen", "head_dim", -16),
    ("qwen", "decoder_sparse_step", 0),
    ("qwen", "mlp_only_layers", "none"),
    ("qwen", "mlp_only_layers", [0, 1, 2]),
    ("qwen", "hidden_act", "no_such_function"),
    ("qwen", "rms_norm_eps", "small"),
    ("qwen", "rope_parameters", {"rope_type": "no_such_type", "rope_theta": 10000.0}),
    ("qwen", "rope_parameters", 5),
    ("qwen", "architectures", ["Trainer"]),
    ("qwen", "architectures", 5),
    ("qwen", "model_type", "no_such_type"),
    ("qwen", "model_type", None),
    ("qwen", "model_type", ["qwen3_moe"]),
    ("qwen", "model_type", "llama"),
    ("qwen", "dtype", "float7"),
    ("gpt-oss", "num_hidden_layers", 10**9),
    ("gpt-oss", "layer_types", ["full_attention"]),
    ("gpt-oss", "num_local_experts", 10**9),
    ("deepseek", "n_group", 3),
    ("deepseek", "n_group", 0),
    ("deepseek", "n_group", 10**9),
    ("deepseek", "topk_group", 9),
    ("deepseek", "topk_group", 0),
    ("deepseek", "first_k_dense_replace", 10**9),
    ("deepseek", "kv_lora_rank", -1),
    ("deepseek", "n_routed_experts", 10**12),
]


@pytest.mark.parametrize(("base", "field", "value"), ABSURD, ids=[f"{b}-{f}-{v}" for b, f, v in ABSURD])
def test_a_config_that_claims_nonsense_is_refused_in_seconds_and_in_little_memory(
    base, field, value, bases, tmp_path, tokens
):
    model = edited(copy_of(bases[base], tmp_path / "model"), **{field: value})
    compress_refused(model, "--keep", 0.5, "--tokens", tokens, run=limited)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"\xff\xfe{}", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "JSON"),
        (b"{}", "config.json"),
    ],
)
def test_a_config_that_is_no_json_is_refused(raw, says, qwen, tokens):
    (qwen / "config.json").write_bytes(raw)
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=["config.json", says], run=limited)


@pytest.mark.parametrize(
    "place", ["../model/x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", 5, None]
)
def test_an_index_that_points_elsewhere_is_refused(place, sharded, tokens):
    edit_json(sharded / INDEX, lambda value: value["weight_map"].update({ATTENTION: place}))
    says = ["points outside its folder", repr(place)] if isinstance(place, str) else ["no weight_map"]
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens, says=[INDEX, *says])


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000])
def test_a_damaged_index_is_refused(raw, sharded, tokens):
    (sharded / INDEX).write_bytes(raw)
    compress_refused(sharded, "--keep", 0.5, "--tokens", tokens)


def _set(field, value):
    def change(header):
        header[ATTENTION][field] = value

    return change


def _overlap(header):
    other = header["model.layers.0.self_attn.o_proj.weight"]
    header[ATTENTION]["data_offsets"] = other["data_offsets"]


def _empty(shape):
    def change(header):
        header["x"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}

    return change


HEADERS: dict[str, Any] = {
    "overlap": (_overlap, "overlap"),
    "negative": (_set("data_offsets", [-8192, 0]), ATTENTION),
    "backwards": (_set("data_offsets", [8192, 0]), "does not fit its shape"),
    "far": (_set("data_offsets", [2**40, 2**40 + 8192]), "truncated"),
    "dtype": (_set("dtype", "Q4"), "unknown dtype 'Q4'"),
    "dtype list": (_set("dtype", ["F32"]), ATTENTION),
    "shape": (_set("shape", [64, 63]), "does not fit its shape [64, 63]"),
    "huge shape": (_set("shape", [2**62, 2**62]), "does not fit its shape"),
    "empty huge shape": (_empty([0, 2**70]), "'x'"),
    "empty large shape": (_empty([0, 2**40, 2**40]), "'x'"),
    "text shape": (_set("shape", "64"), "does not fit its shape"),
    "float shape": (_set("shape", [64.0, 64]), "does not fit its shape"),
    "no shape": (lambda h: h[ATTENTION].pop("shape") and None, "damaged entry"),
    "one offset": (_set("data_offsets", [0]), "damaged entry"),
    "number": (lambda h: h.update({ATTENTION: 5}), "damaged entry"),
    "list": (lambda h: [1, 2], "damaged header"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HEADERS)
def test_a_hostile_safetensors_header_is_refused(attack, qwen, tokens):
    change, says = HEADERS[attack]
    edit_header(qwen / "model.safetensors", change)
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=["model.safetensors", says], run=limited)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 300 * 2**20])
def test_an_absurd_header_length_is_refused(length, qwen, tokens):
    file = qwen / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    compress_refused(
        qwen, "--keep", 0.5, "--tokens", tokens, says=["model.safetensors is truncated or not"], run=limited
    )


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff" * 64, b"", b"null"])
def test_a_header_that_is_no_json_is_refused(header, qwen, tokens):
    (qwen / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    says = ["model.safetensors has a damaged header"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says, run=limited)


def test_pickled_weights_are_refused(qwen, tokens):
    tensors = load_file(qwen / "model.safetensors")
    (qwen / "model.safetensors").unlink()
    torch.save(tensors, qwen / "pytorch_model.bin")
    says = ["only pickled weights (pytorch_model.bin)", "run code", "from_pretrained(SRC).save_pretrained(DST)"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says)


def test_no_weights_at_all_are_refused(qwen, tokens):
    (qwen / "model.safetensors").unlink()
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=["holds no safetensors weights"])


def test_code_of_a_checkpoint_is_not_run_unasked(qwen, tokens, tmp_path):
    touched = tmp_path / "touched"
    (qwen / "configuration_evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass EvilConfig: pass\n")
    edited(qwen, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    says = ["needs code that comes with the checkpoint", "--trust-remote-code"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=says)
    assert not touched.exists()


def test_code_of_a_checkpoint_for_a_known_architecture_is_not_needed(qwen, tokens, tmp_path):
    touched = tmp_path / "touched"
    (qwen / "configuration_evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass EvilConfig: pass\n")
    edited(qwen, auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    compressed(qwen, tmp_path / "out", "--keep", 0.5, "--tokens", tokens)
    assert not touched.exists()


def test_code_of_a_tokenizer_is_not_run_unasked(qwen, text, tmp_path):
    touched = tmp_path / "touched"
    (qwen / "tokenization_evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass EvilTokenizer: pass\n")
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    edited(qwen, "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    (qwen / "tokenizer.json").unlink()
    compress_refused(qwen, "--keep", 0.5, "--data", text, says=["tokenizer"])
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("int4", "quantized"),
    ],
)
def test_a_quantized_checkpoint_is_refused(value, name, qwen, tokens):
    edited(qwen, quantization_config=value)
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, says=["is quantized", name, "unquantized"])


def test_an_empty_quantization_config_is_no_quantization(qwen, tokens, tmp_path):
    edited(qwen, quantization_config=None)
    compressed(qwen, tmp_path / "out", "--keep", 0.5, "--tokens", tokens)


# -- the output ---------------------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_refused(qwen, tokens, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    options = ("--keep", 0.5, "--tokens", tokens)
    for out in (file / "out", Path("/proc/coterie-out")):
        refused("compress", qwen, out, *options, code=1, says=["cannot write", out.parent], unchanged=[qwen])
    for extra in ((), ("--overwrite",)):
        refused("compress", qwen, file, *options, *extra, code=1, says=[file, "is a file"], unchanged=[qwen])
    refused("profile", qwen, "--out", file, "--tokens", tokens, code=1, says=[file])
    refused("profile", qwen, "--out", file / "p", "--tokens", tokens, code=1, says=["cannot write"])
    assert file.read_text() == "mine"


def test_a_plan_that_cannot_be_written_is_refused(qwen, tokens, tmp_path):
    assert cli("profile", qwen, "--out", tmp_path / "p", "--tokens", tokens, "--method", "reap").code == 0
    for out in (tmp_path / "none" / "plan.json", tmp_path):
        arguments = ("plan", qwen, "--profile", tmp_path / "p", "--keep", 0.5, "--out", out)
        refused(*arguments, code=1, says=["cannot write"])
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_the_model_itself_is_no_output(qwen, tokens, tmp_path):
    options = ("--keep", 0.5, "--tokens", tokens, "--overwrite")
    link = tmp_path / "link"
    link.symlink_to(qwen)
    for out in (qwen, qwen / "smaller", qwen.parent, link):
        before = fingerprint(qwen)
        result = cli("compress", qwen, out, *options)
        assert (result.code, result.out) == (2, ""), result
        assert "would overwrite the model" in result.err
        assert fingerprint(qwen) == before
        assert not partial(qwen).exists()


def test_an_output_that_exists_is_refused_and_replaced_when_asked(qwen, tokens, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    options = ("--keep", 0.5, "--tokens", tokens)
    says = [out, "exists and is not empty", "--overwrite"]
    refused("compress", qwen, out, *options, code=1, says=says, unchanged=[qwen, out], absent=[partial(out)])
    compressed(qwen, out, *options, "--overwrite")
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()


def test_an_empty_output_folder_is_fine(qwen, tokens, tmp_path):
    (tmp_path / "out").mkdir()
    compressed(qwen, tmp_path / "out", "--keep", 0.5, "--tokens", tokens)


def test_the_old_output_survives_a_failed_new_run(qwen, tokens, tmp_path):
    out = compressed(qwen, tmp_path / "out", "--keep", 0.5, "--tokens", tokens)
    bad = copy_of(qwen, tmp_path / "bad")
    rewrite(bad / "model.safetensors", lambda tensors: tensors[EXPERT].fill_(float("nan")))
    arguments = ("compress", bad, out, "--keep", 0.5, "--tokens", tokens, "--overwrite")
    refused(*arguments, says=[EXPERT], unchanged=[bad, out])


def test_unfinished_work_of_another_job_is_refused(qwen, bases, tokens, tmp_path):
    bad = copy_of(bases["other"], tmp_path / "bad")
    rewrite(bad / "model.safetensors", lambda tensors: tensors[EXPERT].fill_(float("nan")))
    out = tmp_path / "out"
    refused("compress", bad, out, "--keep", 0.5, "--tokens", tokens, says=[EXPERT])
    assert partial(out).exists()
    kept = fingerprint(partial(out))
    says = ["unfinished work of another run", "checkpoint", "--overwrite"]
    refused("compress", qwen, out, "--keep", 0.5, "--tokens", tokens, code=1, says=says, unchanged=[qwen])
    says = ["differs in: ", "budget", "method"]
    options = ("--keep", 0.25, "--tokens", tokens, "--method", "frequency")
    refused("compress", bad, out, *options, code=1, says=says, unchanged=[bad])
    assert fingerprint(partial(out)) == kept
    plain = compressed(qwen, tmp_path / "plain", "--keep", 0.5, "--tokens", tokens)
    compressed(qwen, out, "--keep", 0.5, "--tokens", tokens, "--overwrite")
    assert fingerprint(out) == fingerprint(plain)


def test_a_full_disk_is_foreseen(qwen, tokens, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    says = ["not enough room", "GB needed", "GB free"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, code=1, says=says)


class Disk:
    """A place that can be made full: a small file system of its own where one can be mounted, else a pretended one."""

    def __init__(self, folder: Path, mounted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.mounted, self.patch = folder, mounted, monkeypatch

    def fill(self) -> None:
        if self.mounted:
            with (self.folder / "filler").open("wb", buffering=0) as stream:
                for size in (65536, 512):
                    try:
                        while True:
                            stream.write(bytes(size))
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
            return

        def full(*arguments: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch.setattr(os, "pwrite", full)
        self.patch.setattr(os, "copy_file_range", full)

    def free(self) -> None:
        if self.mounted:
            (self.folder / "filler").unlink()
        else:
            self.patch.undo()


def _mountable() -> bool:
    folder = Path("/tmp") / f"coterie-mount-{os.getpid()}"
    folder.mkdir()
    done = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode == 0
    )
    if done:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return done


@pytest.fixture(params=["pretended", "mounted"] if shutil.which("mount") and _mountable() else ["pretended"])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = request.param == "mounted"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        yield Disk(folder, mounted, patch)
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("method", ["random", "reap"])
def test_a_disk_that_fills_up_midway_leaves_work_to_go_on_with(method, disk, qwen, tokens, tmp_path, monkeypatch):
    from coterie.streaming.writer import Workspace

    options = ("--keep", 0.5, "--method", method, "--tokens", tokens)
    plain = compressed(qwen, tmp_path / "plain", *options)
    out, record = disk.folder / "out", Workspace.record

    def record_and_fill(self: Workspace, step: dict[str, Any]) -> None:
        record(self, step)
        disk.fill()

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", record_and_fill)
        refused(
            "compress", qwen, out, *options, code=1, says=["disk", "full", "goes on where it was"], unchanged=[qwen]
        )
    assert not out.exists()
    assert len((partial(out) / "journal.jsonl").read_text().splitlines()) == 1
    disk.free()
    compressed(qwen, out, *options)
    assert fingerprint(out) == fingerprint(plain)


def test_a_disk_without_room_is_refused_at_once(qwen, tokens, disk, monkeypatch):
    if disk.mounted:
        disk.fill()
        disk.folder.joinpath("filler").open("r+b").truncate(7_500_000)
    else:
        usage = shutil.disk_usage(disk.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=900_000))
    out = disk.folder / "out"
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, out=out, code=1, says=["not enough room", "0.00 GB free"])


def pausing(arguments: tuple[str, ...], at: str, outcome: str) -> None:
    """In a child: run the command, but wait forever after the first journal line."""
    import time

    from coterie.streaming.writer import Workspace

    record = Workspace.record

    def record_and_wait(self: Workspace, step: dict[str, Any]) -> None:
        record(self, step)
        Path(at).touch()
        time.sleep(600)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
    Workspace.record = record_and_wait  # type: ignore[method-assign]
    result = cli(*arguments)
    Path(outcome).write_text(result.err)
    sys.stdout.flush()
    os._exit(result.code)


def test_a_second_run_is_kept_out_and_an_interrupted_one_can_go_on(qwen, tokens, tmp_path):
    out, reached, outcome = tmp_path / "out", tmp_path / "reached", tmp_path / "outcome"
    arguments = ("compress", qwen, out, "--keep", 0.5, "--tokens", tokens, "--no-report")
    process = start(pausing, tuple(map(str, arguments)), str(reached), str(outcome))
    until(reached.exists)
    refused(*arguments, code=1, says=["another run is writing", out], unchanged=[qwen])
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    said = outcome.read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert len((partial(out) / "journal.jsonl").read_text().splitlines()) == 1
    result = cli(*arguments)
    assert result.code == 0
    assert "resumed" in result.err
    assert fingerprint(out) == fingerprint(compressed(qwen, tmp_path / "plain", "--keep", 0.5, "--tokens", tokens))


def test_an_interrupt_before_anything_is_done_leaves_nothing(qwen, tokens, tmp_path, monkeypatch):
    from coterie.streaming.checkpoint import Checkpoint

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "read", interrupt)
    out = tmp_path / "out"
    result = cli("compress", qwen, out, "--keep", 0.5, "--tokens", tokens)
    assert result.code == 130
    assert "Traceback" not in result.err
    assert not out.exists()
    assert not partial(out).exists()


# -- methods, budgets, options ------------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "method": (("--keep", 0.5, "--method", "repa"), ["no method 'repa'", "Did you mean 'reap'?"]),
    "nothing near": (("--keep", 0.5, "--method", "zzzz"), ["no method 'zzzz'", "reap"]),
    "parameter": (("--keep", 0.5, "--set", "renormalize=true"), ["'renormalize'", "Did you mean 'renormalise'?"]),
    "range": (("--keep", 0.5, "--method", "dern", "--set", "alpha=5"), ["dern: alpha = 5", "less than or equal to 2"]),
    "type": (("--keep", 0.5, "--method", "dern", "--set", "alpha=much"), ["alpha = 'much'", "coterie methods dern"]),
    "choice": (("--keep", 0.5, "--method", "dern", "--set", "router=magic"), ["dern: router = 'magic'", "'slice'"]),
    "selector": (("--keep", 0.5, "--method", "dern", "--set", "selector=repa"), ["selector 'repa'", "reap"]),
    "no value": (("--keep", 0.5, "--set", "renormalise"), ["--set 'renormalise'", "--set name=value"]),
    "unplain": (("--keep", 0.5, "--method", "dern", "--set", "router=prob_map"), ["router=prob_map", "slice"]),
    "no budget": ((), ["exactly one of --keep, --keep-experts and --target-size"]),
    "two budgets": (("--keep", 0.5, "--keep-experts", 4), ["exactly one of --keep, --keep-experts and --target-size"]),
    "keep 0": (("--keep", 0), ["--keep 0.0 is not a share"]),
    "keep 1.5": (("--keep", 1.5), ["--keep 1.5 is not a share"]),
    "keep nan": (("--keep", "nan"), ["--keep nan is not a share"]),
    "keep 99": (("--keep-experts", 99), ["--keep-experts 99 is more than the 8 experts"]),
    "target size": (("--target-size", "1kB"), ["cannot be reached", "2 per layer", "Ask for at least"]),
    "size text": (("--target-size", "small"), ["cannot read the size 'small'", "12GB"]),
    "size nan": (("--target-size", "nan"), ["cannot read the size 'nan'", "12GB"]),
    "size inf": (("--target-size", "1e999GB"), ["cannot read the size '1e999GB'", "12GB"]),
    "size negative": (("--target-size", "-5GB"), ["cannot read the size '-5GB'", "12GB"]),
    "shard size": (("--keep", 0.5, "--shard-size", "0"), ["cannot read the size '0'"]),
    "memory": (("--keep", 0.5, "--memory", "lots"), ["cannot read the size 'lots'"]),
    "scope": (("--keep", 0.5, "--scope", "all"), ["unknown scope 'all'", "uniform or global"]),
    "global size": (("--target-size", "1MB", "--scope", "global"), ["a global budget", "--keep-experts"]),
    "layers": (("--keep", 0.5, "--layers", "50-60"), ["--layers 50-60", "no MoE layer", "[0, 2]"]),
    "dense layer": (("--keep", 0.5, "--layers", "1"), ["--layers 1", "no MoE layer"]),
    "no layers": (("--keep", 0.5, "--exclude-layers", "0-2"), ["no MoE layer is left"]),
    "layers text": (("--keep", 0.5, "--layers", "first"), ["cannot read the layers 'first'", "4-30"]),
    "layers huge": (("--keep", 0.5, "--exclude-layers", "0-999999999999999"), ["no MoE layer is left"]),
    "protect layer": (("--keep", 0.5, "--protect", "1:3"), ["--protect 1:3", "layer 1 is no MoE layer"]),
    "protect expert": (("--keep", 0.5, "--protect", "2:8"), ["--protect 2:8", "experts 0..7"]),
    "protect expert, all kept": (("--keep", 1.0, "--protect", "2:8"), ["--protect 2:8", "experts 0..7"]),
    "protect text": (("--keep", 0.5, "--protect", "all"), ["cannot read --protect 'all'", "layer:expert"]),
    "protect many": (("--keep", 0.5, "--protect", "2:0,2:1,2:2,2:3,2:4"), ["layer 2: 5 experts", "only 4"]),
    "global": (("--keep", 0.2, "--scope", "global"), ["keeps 3 of 16", "need 4"]),
    "global protect": (
        ("--keep", 0.3, "--scope", "global", "--protect", "0:0,0:1,0:2,0:3"),
        ["4 experts are protected", "only 5 of 16"],
    ),
    "device": (("--keep", 0.5, "--device", "gpu"), ["--device gpu", "cpu"]),
    "meta device": (("--keep", 0.5, "--device", "meta"), ["--device meta", "cpu"]),
    "dtype": (("--keep", 0.5, "--compute-dtype", "int8"), ["unknown compute dtype 'int8'", "bfloat16"]),
    "propagate": (("--keep", 0.5, "--method", "random", "--propagate"), ["--propagate"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_cannot_be_right_is_refused(case, qwen, tokens):
    options, says = WRONG[case]
    compress_refused(qwen, *options, "--tokens", tokens, says=says)


def test_protection_counts_in_each_routing_group(deepseek, tokens):
    says = ["layer 1", "3 experts of a routing group are protected", "only 2"]
    compress_refused(deepseek, "--keep", 0.5, "--protect", "1:0,1:1,1:2", "--tokens", tokens, says=says)


def test_cuda_where_there_is_none_is_refused(qwen, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        options = ("--keep", 0.5, "--tokens", tokens, "--device", device)
        compress_refused(qwen, *options, says=[f"--device {device}", "no CUDA device", "--device cpu"])


def test_a_cuda_device_that_is_not_there_is_refused(qwen, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    says = ["--device cuda:7", "1 CUDA device(s)"]
    compress_refused(qwen, "--keep", 0.5, "--tokens", tokens, "--device", "cuda:7", says=says)


@pytest.mark.parametrize("verb", ["inspect", "profile", "plan", "compress", "evaluate", "demo", "methods"])
def test_options_that_do_not_exist_are_refused(verb):
    result = cli(verb, "--no-such-option")
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "options", [("--samples", 0), ("--length", 1), ("--threads", -1), ("--keep", "half"), ("--seed", -1)]
)
def test_numbers_out_of_range_are_refused(options, qwen, tokens, tmp_path):
    out = tmp_path / "out"
    result = cli("compress", qwen, out, "--tokens", tokens, *options)
    assert result.code == 2
    assert options[0] in result.err
    assert not out.exists()


def test_an_unknown_statistic_is_refused(qwen, tokens, tmp_path):
    arguments = ("profile", qwen, "--out", tmp_path / "p", "--tokens", tokens, "--observe", "SelectionCounts")
    says = ["no statistic 'SelectionCounts'", "Did you mean 'SelectionCount'?", "WeightedOutputNorm"]
    refused(*arguments, says=says, unchanged=[qwen], absent=[tmp_path / "p"])


def test_an_unknown_method_is_refused_everywhere(qwen, tokens, tmp_path):
    refused("methods", "dren", says=["no method 'dren'", "Did you mean 'dern'?"])
    arguments = ("profile", qwen, "--out", tmp_path / "p", "--tokens", tokens, "--method", "dren")
    refused(*arguments, says=["Did you mean 'dern'?"], absent=[tmp_path / "p"])


@pytest.fixture
def profiled(qwen, tokens, tmp_path):
    folder = tmp_path / "profile"
    assert cli("profile", qwen, "--out", folder, "--tokens", tokens).code == 0
    return folder


@pytest.fixture
def planned(qwen, profiled, tmp_path):
    file = tmp_path / "plan.json"
    assert cli("plan", qwen, "--profile", profiled, "--keep", 0.5, "--out", file).code == 0
    return file


def test_options_that_contradict_a_plan_are_refused(qwen, planned, profiled, text, tokens, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: reap, budget: {keep: 0.5}}]")
    given = [
        ("--keep", 0.5), ("--keep-experts", 4), ("--target-size", "1MB"), ("--scope", "uniform"), ("--layers", "0"),
        ("--protect", "0:1"), ("--profile", profiled), ("--recipe", recipe), ("--data", text), ("--tokens", tokens),
        ("--method", "reap"), ("--set", "renormalise=false"), ("--propagate",),
    ]  # fmt: skip
    for options in given:
        says = ["--plan", options[0]]
        compress_refused(qwen, "--plan", planned, *options, says=says)


def test_options_that_contradict_a_recipe_are_refused(qwen, profiled, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: reap, budget: {keep: 0.5}}]")
    given = [
        ("--keep", 0.5), ("--method", "dern"), ("--profile", profiled), ("--samples", 5),
        ("--set", "renormalise=false"), ("--protect", "0:1"), ("--propagate",),
    ]  # fmt: skip
    for options in given:
        compress_refused(qwen, "--recipe", recipe, *options, says=["--recipe", options[0]])
    recipe.write_text(f"data: [{text}]\nsteps: [{{method: reap, budget: {{keep: 0.5}}}}]")
    compress_refused(qwen, "--recipe", recipe, "--data", text, says=["names its text already", "--data"])


def test_two_sources_of_calibration_are_refused(qwen, profiled, text, tokens):
    compress_refused(qwen, "--keep", 0.5, "--data", text, "--tokens", tokens, says=["--data", "--tokens"])
    for options in (("--data", text), ("--tokens", tokens)):
        compress_refused(qwen, "--keep", 0.5, "--profile", profiled, *options, says=["--profile", options[0]])


RECIPES: dict[str, tuple[str, list[str]]] = {
    "no yaml": ("steps: [", ["recipe.yaml is not YAML"]),
    "a list": ("[1, 2]", ["recipe.yaml"]),
    "empty": ("", ["recipe.yaml"]),
    "no steps": ("steps: []", ["recipe.yaml: steps"]),
    "second step": ("steps: [{method: reap, budget: {keep: 0.5}}, {method: darn}]", ["Did you mean 'dern'?"]),
    "entry": ("model: x\nstep: 5\nsteps: [{method: reap}]", ["recipe.yaml: step"]),
    "budget entry": ("steps: [{method: reap, budget: {kep: 0.5}}]", ["recipe.yaml: steps.0.budget.kep"]),
    "budget value": ("steps: [{method: reap, budget: {keep: half}}]", ["recipe.yaml: steps.0.budget.keep"]),
    "no budget": ("steps: [{method: reap}]", ["exactly one of"]),
    "method": ("steps: [{method: repa, budget: {keep: 0.5}}]", ["Did you mean 'reap'?"]),
    "parameter": ("steps: [{method: reap, parameters: {x: 1}, budget: {keep: 0.5}}]", ["no parameter 'x'"]),
    "tag": ("!!python/object/apply:os.system ['touch /tmp/coterie-yaml']", ["recipe.yaml is not YAML"]),
    "samples": ("samples: 0\nsteps: [{method: reap, budget: {keep: 0.5}}]", ["recipe.yaml: samples"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_mistake_is_refused(case, qwen, tokens, tmp_path):
    content, says = RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    compress_refused(qwen, "--recipe", recipe, "--tokens", tokens, says=says)
    assert not Path("/tmp/coterie-yaml").exists()


def test_a_missing_recipe_plan_or_profile_is_refused(qwen, tmp_path):
    compress_refused(qwen, "--recipe", tmp_path / "r.yaml", says=["cannot read the recipe", "r.yaml"])
    compress_refused(qwen, "--plan", tmp_path / "p.json", says=["cannot read the plan", "p.json"])
    compress_refused(qwen, "--profile", tmp_path / "q", "--keep", 0.5, says=["q is not a profile"])
    arguments = ("plan", qwen, "--profile", tmp_path / "q", "--keep", 0.5, "--out", tmp_path / "x.json")
    refused(*arguments, says=["q is not a profile"], absent=[tmp_path / "x.json"])


# -- plans and profiles -------------------------------------------------------------------------------------------


def test_the_plan_of_another_model_is_refused(bases, planned, tmp_path):
    other = copy_of(bases["other"], tmp_path / "other")
    compress_refused(other, "--plan", planned, says=["the plan was made for another model", "coterie plan"])


def test_the_profile_of_another_model_is_refused(bases, profiled, tmp_path):
    other = copy_of(bases["other"], tmp_path / "other")
    says = ["the profile was made of another model", "coterie profile"]
    compress_refused(other, "--keep", 0.5, "--profile", profiled, says=says)
    out = tmp_path / "x.json"
    refused("plan", other, "--profile", profiled, "--keep", 0.5, "--out", out, says=says, absent=[out])


PLANS: dict[str, tuple[Any, list[str]]] = {
    "cut": (lambda raw: raw[: len(raw) // 2], ["plan.json is not a plan"]),
    "empty": (lambda raw: b"", ["plan.json is not a plan"]),
    "latin-1": (lambda raw: raw.replace(b"reap", b"\xe9\xe9\xe9\xe9"), ["plan.json is not a plan"]),
    "keep text": (lambda raw: raw.replace(b'"keep": [', b'"keep": ["all", ', 1), ["layers.0.keep.0"]),
    "extra field": (lambda raw: raw.replace(b'"name"', b'"nom"', 1), ["plan.json is not a plan", "layers.0."]),
    "method": (lambda raw: raw.replace(b'"reap"', b'"repa"'), ["no method 'repa'", "Did you mean 'reap'?"]),
    "parameter": (lambda raw: raw.replace(b'"renormalise"', b'"normal"'), ["no parameter 'normal'"]),
    "format": (lambda raw: raw.replace(b'"format": 1', b'"format": 2'), ["plan.json is not a plan", "format"]),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_damaged_plan_is_refused(case, qwen, planned):
    change, says = PLANS[case]
    raw = planned.read_bytes()
    assert change(raw) != raw
    planned.write_bytes(change(raw))
    compress_refused(qwen, "--plan", planned, says=says)


def _edit(path, value):
    def change(plan):
        place = plan
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    return change


EDITS: dict[str, tuple[Any, list[str]]] = {
    "too few": (_edit(("layers", 1, "keep"), [3]), ["cannot keep 1 of 8 experts in layer 2", "picks 2 per token"]),
    "none": (_edit(("layers", 1, "keep"), []), ["cannot keep 0 of 8 experts in layer 2"]),
    "twice": (_edit(("layers", 0, "keep"), [1, 1, 2, 3]), ["layer 0", "distinct"]),
    "descending": (_edit(("layers", 0, "keep"), [4, 3, 2, 1]), ["layer 0", "ascending"]),
    "outside": (_edit(("layers", 0, "keep"), [1, 2, 3, 8]), ["layer 0", "0..7"]),
    "negative": (_edit(("layers", 0, "keep"), [-1, 2, 3, 4]), ["layer 0", "0..7"]),
    "one layer": (_edit(("layers",), lambda layers: layers[:1]), ["every MoE layer", "exactly once"]),
    "a layer twice": (_edit(("layers",), lambda layers: [*layers, layers[0]]), ["every MoE layer", "exactly once"]),
    "dense layer": (_edit(("layers", 0, "index"), 1), ["every MoE layer", "exactly once"]),
    "experts": (_edit(("layers", 0, "experts"), 99), ["layer 0", "99 experts", "8"]),
    "scores": (_edit(("layers", 0, "scores"), [0.5]), ["layer 0", "1 scores", "8 experts"]),
    "infinite scores": (_edit(("layers", 0, "scores"), [float("inf")] * 8), ["plan.json is not a plan", "scores"]),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_plan_edited_into_something_impossible_is_refused(case, qwen, planned):
    change, says = EDITS[case]
    edit_json(planned, change)
    compress_refused(qwen, "--plan", planned, says=says)


@pytest.mark.parametrize("value", [None, [0.5], "much", ["a"] * 8, [None] * 8])
def test_a_plan_of_dern_without_its_importances_is_refused(value, qwen, profiled, tmp_path):
    plan = tmp_path / "plan.json"
    assert cli("plan", qwen, "--profile", profiled, "--keep", 0.5, "--method", "dern", "--out", plan).code == 0
    edit_json(plan, lambda p: p["layers"][0]["extra"].update(importance=value))
    compress_refused(qwen, "--plan", plan, says=["layers.0", "importance"])


PROFILES: dict[str, tuple[str, Any]] = {
    "cut json": ("profile.json", lambda raw: raw[: len(raw) // 2]),
    "empty json": ("profile.json", lambda raw: b""),
    "a list": ("profile.json", lambda raw: b"[]"),
    "no format": ("profile.json", lambda raw: raw.replace(b'"format"', b'"fmt"')),
    "other format": ("profile.json", lambda raw: raw.replace(b'"format": 1', b'"format": 7')),
    "no layers": ("profile.json", lambda raw: raw.replace(b'"layers"', b'"strata"')),
    "layer field": ("profile.json", lambda raw: raw.replace(b'"top_k"', b'"k"', 1)),
    "deep": ("profile.json", lambda raw: b"[" * 100_000),
    "cut tensors": ("profile.safetensors", lambda raw: raw[:-100]),
    "no tensors": ("profile.safetensors", lambda raw: b""),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_damaged_profile_is_refused(case, qwen, profiled):
    name, change = PROFILES[case]
    file = profiled / name
    raw = file.read_bytes()
    assert change(raw) != raw
    file.write_bytes(change(raw))
    compress_refused(qwen, "--keep", 0.5, "--profile", profiled, says=["profile"])


def test_a_profile_without_its_tensors_is_refused(qwen, profiled):
    (profiled / "profile.safetensors").unlink()
    says = ["is not a profile", "profile.safetensors"]
    compress_refused(qwen, "--keep", 0.5, "--profile", profiled, says=says)


def test_a_profile_with_tensors_of_other_sizes_is_refused(qwen, profiled):
    rewrite(profiled / "profile.safetensors", lambda t: t.update({"0.weighted_norm_E": torch.zeros(3).double()}))
    compress_refused(
        qwen, "--keep", 0.5, "--profile", profiled, says=["damaged profile", "weighted_norm_E of layer 0", "[3]"]
    )


def test_a_profile_that_lacks_a_statistic_is_refused(qwen, tokens, tmp_path):
    folder = tmp_path / "p"
    assert cli("profile", qwen, "--out", folder, "--tokens", tokens, "--observe", "SelectionCount").code == 0
    says = ["the profile lacks WeightedOutputNorm", "--observe WeightedOutputNorm"]
    compress_refused(qwen, "--keep", 0.5, "--profile", folder, says=says)


def test_a_profile_is_not_written_over(qwen, tokens, profiled):
    arguments = ("profile", qwen, "--out", profiled, "--tokens", tokens)
    refused(*arguments, code=1, says=["exists and is not empty", "--overwrite"], unchanged=[profiled, qwen])
    assert cli(*arguments, "--overwrite").code == 0


def test_profiling_without_text_is_refused(qwen, tmp_path):
    refused("profile", qwen, "--out", tmp_path / "p", says=["needs text", "--data"], absent=[tmp_path / "p"])


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_models_of_different_vocabularies_are_not_compared(qwen, tokens, tmp_path):
    other = saved("qwen3-moe", tmp_path / "small")
    says = ["different vocabularies", "[512, 4096]"]
    refused("evaluate", qwen, other, "--tokens", tokens, says=says, unchanged=[qwen, other])


def test_evaluation_without_text_is_refused(qwen):
    refused("evaluate", qwen, says=["evaluation needs text", "--data"])


def test_tiny_models_do_what_the_other_tests_need(qwen):
    """The base checkpoint itself is fine: what the tests above see is what they did to it."""
    assert cli("inspect", qwen).code == 0
    assert tiny("qwen3-moe").config.num_experts == 8
