"""GGUF files for llama.cpp: what is in them equals the checkpoint, and computes what transformers does."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie.anatomy.gguf_families import GGUF_FAMILIES
from coterie.api.runtime import Runtime
from coterie.assets import pocket
from coterie.compression import gguf_export
from coterie.compression.gguf_export import TYPES, neighbours
from coterie.compression.gguf_vocab import read_vocabulary
from coterie.errors import CheckpointError, UsageError
from families import config, each_tensor, edit_json, saved, tiny, token_file, tokens
from inprocess import cli
from packed import fp8

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 4096  # of the tokenizer that tests use
KNOWN = {
    "mixtral": {"intermediate_size": 64},
    "qwen2-moe": {},
    "qwen3-moe": {"mlp_only_layers": [], "head_dim": 32},
    "olmoe": {"num_key_value_heads": 4},
}
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

ROPE_LLAMA3 = {**ROPE_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def known(family, folder, dtype=torch.float32, **changes):
    return saved(family, folder, dtype, **{"vocab_size": VOCABULARY, **KNOWN[family], **changes})


def contents(result):
    """(metadata, tensors as float32 in the order torch has them, types) of a file."""
    reader = gguf.GGUFReader(result.out)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    found = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    for t in reader.tensors:
        assert tuple(found[t.name].shape) == tuple(int(n) for n in reversed(t.shape))
    return fields, found, {t.name: t.tensor_type.name for t in reader.tensors}


def written(folder, out, kind="F32"):
    return contents(coterie.export_gguf(str(folder), str(out), kind))


def source_tensors(family, folder):
    """{name in GGUF: tensor} of a checkpoint, from the names and shapes llama.cpp documents."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    plain = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for key, value in state.items():
        path, _, own = key.rpartition(".")
        if path in outer:
            found[f"{outer[path]}.{own}"] = value
            continue
        _, _, layer, rest = key.split(".", 3)
        if "experts." in rest and "shared" not in rest:
            if rest.endswith("down_proj"):
                found[f"blk.{layer}.ffn_down_exps.weight"] = value
            else:
                gate, up = value.chunk(2, dim=1)
                found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        found[f"blk.{layer}.{plain[rest.rpartition('.')[0]]}.{own}"] = value
    if family == "mixtral":
        for name in [n for n in found if n.endswith(("attn_q.weight", "attn_k.weight"))]:
            heads = found[name].shape[0] // 16
            rows = [h * 16 + 8 * half + i for h in range(heads) for i in range(8) for half in range(2)]
            found[name] = found[name][rows]
    return found


def graph_logits(fields, w, ids_L):
    """What llama.cpp's graphs of these families compute, from the file alone. No line of it is theirs.

    Positions turn neighbouring numbers of a head in "llama", both halves elsewhere; "qwen3moe" and "llama" divide the
    chosen weights by their sum.
    """
    arch = fields["general.architecture"]

    def key(name):
        return fields[f"{arch}.{name}"]

    heads, key_heads, D = key("attention.head_count"), key("attention.head_count_kv"), key("attention.key_length")
    L = len(ids_L)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + key("attention.layer_norm_rms_epsilon")) * w[name]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    angle = torch.arange(L)[:, None] * key("rope.freq_base") ** (
        -torch.arange(0, key("rope.dimension_count"), 2) / key("rope.dimension_count")
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x_LND):
        if arch == "llama":
            first, second = x_LND[..., 0::2], x_LND[..., 1::2]
            return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
        first, second = x_LND.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def feed(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    x_LH = w["token_embd.weight"][ids_L]
    for i in range(key("block_count")):
        h = norm(x_LH, f"blk.{i}.attn_norm.weight")
        q, k, v = (linear(h, f"blk.{i}.attn_{p}") for p in "qkv")
        if arch == "olmoe":
            q, k = norm(q, f"blk.{i}.attn_q_norm.weight"), norm(k, f"blk.{i}.attn_k_norm.weight")
        q, k, v = q.view(L, heads, D), k.view(L, key_heads, D), v.view(L, key_heads, D)
        if arch == "qwen3moe":
            q, k = norm(q, f"blk.{i}.attn_q_norm.weight"), norm(k, f"blk.{i}.attn_k_norm.weight")
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        x_LH = x_LH + linear(out.transpose(0, 1).reshape(L, -1), f"blk.{i}.attn_output")
        h = norm(x_LH, f"blk.{i}.ffn_norm.weight")
        share, chosen = linear(h, f"blk.{i}.ffn_gate_inp").softmax(-1).topk(key("expert_used_count"))
        if arch in ("llama", "qwen3moe"):
            share = share / share.sum(-1, keepdim=True)
        gate, up, down = (w[f"blk.{i}.ffn_{p}_exps.weight"] for p in ("gate", "up", "down"))
        moe = torch.stack(
            [
                sum(s * feed(h[t], gate[e], up[e], down[e]) for s, e in zip(share[t], chosen[t], strict=True))
                for t in range(L)
            ]
        )
        if arch == "qwen2moe":
            shared = (w[f"blk.{i}.ffn_{p}_shexp.weight"] for p in ("gate", "up", "down"))
            moe = moe + torch.sigmoid(linear(h, f"blk.{i}.ffn_gate_inp_shexp")) * feed(h, *shared)
        x_LH = x_LH + moe
    head = w.get("output.weight", w["token_embd.weight"])
    return F.linear(norm(x_LH, "output_norm.weight"), head)


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_every_family_of_the_table_is_tested_here():
    assert {config(family).model_type for family in KNOWN} == set(GGUF_FAMILIES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", KNOWN)
def test_the_tensors_of_a_file_alone_compute_what_transformers_does(family, tied, tmp_path):
    folder = known(family, tmp_path, tie_word_embeddings=tied)
    fields, tensors, _ = written(folder, tmp_path / "out")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens(1, 12)).logits[0]
    torch.testing.assert_close(graph_logits(fields, tensors, tokens(1, 12)[0]), expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("family", "written_twice"), [("mixtral", 0), ("qwen3-moe", 0), ("olmoe", 1), ("qwen2-moe", 1)]
)
def test_tied_embeddings_are_written_twice_where_the_loader_asks_for_it(family, written_twice, tmp_path):
    _, tensors, _ = written(known(family, tmp_path, tie_word_embeddings=True), tmp_path / "out")
    copies = [value for name, value in tensors.items() if name == "output.weight"]
    assert len(copies) == written_twice
    assert all(torch.equal(value, tensors["token_embd.weight"]) for value in copies)


def test_transformers_reads_the_file_back_as_the_model_it_was(tmp_path):
    """Its reader takes the experts' width from its defaults: 768."""
    folder = known("qwen3-moe", tmp_path, moe_intermediate_size=768, num_hidden_layers=2)
    out = coterie.export_gguf(str(folder), str(tmp_path / "out"), "F32").out
    theirs = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, atol=1e-5, rtol=1e-5)
    text = "Once upon a time, 1234 dogs didn't bark."
    read = AutoTokenizer.from_pretrained(out.parent, gguf_file=out.name)
    assert read(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("family", KNOWN)
def test_a_32_bit_file_holds_every_tensor_exactly(family, tmp_path):
    folder = known(family, tmp_path)
    _, tensors, _ = written(folder, tmp_path / "out")
    expected = source_tensors(family, folder)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, atol=0, rtol=0, msg=name)


# largest error of a number, as a share of the largest magnitude in its block, if scales were exact
STEP = {
    "Q8_0": 0.5 / 127,
    "Q5_1": 1 / 31,
    "Q5_0": 1 / 16,
    "Q4_1": 1 / 15,
    "Q4_0": 1 / 8,
    "MXFP4": 1 / 2,
    "TQ2_0": 1 / 2,
    "TQ1_0": 1 / 2,
}
SCALE = 2**-9  # what rounding scale and minimum to half precision can add, on the same measure


@pytest.mark.parametrize("kind", STEP)
def test_codes_are_within_a_step_of_their_type(kind, tmp_path):
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    folder = known("qwen3-moe", tmp_path, **wide)
    _, tensors, types = written(folder, tmp_path / "out", kind)
    for name, value in source_tensors("qwen3-moe", folder).items():
        if types[name] != kind:
            continue
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        error = (tensors[name] - value).abs().unflatten(-1, (-1, block)).amax(-1)
        largest = value.abs().unflatten(-1, (-1, block)).amax(-1)
        assert (error <= largest * (STEP[kind] + SCALE)).all(), name
        assert error.max() > 0
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.0.ffn_down_exps.weight"] == kind
    assert types["blk.0.attn_q.weight"] == ("Q8_0" if kind == "MXFP4" else kind)
    assert types["token_embd.weight"] == ("F16" if kind.startswith("TQ") else "Q8_0")
    assert {types[f"blk.0.{n}.weight"] for n in ("attn_norm", "ffn_gate_inp", "attn_q_norm")} == {"F32"}


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_16_bit_files_round_as_torch_does(kind, dtype, tmp_path):
    folder = known("qwen2-moe", tmp_path)
    _, tensors, types = written(folder, tmp_path / "out", kind)
    for name, value in source_tensors("qwen2-moe", folder).items():
        rounded = value.to(dtype).float() if types[name] == kind else value
        torch.testing.assert_close(tensors[name], rounded, atol=0, rtol=0, msg=name)
    assert types["blk.0.ffn_down_exps.weight"] == kind


def test_file_types_have_the_numbers_of_the_package():
    numbers = {kind.name.split("_", 1)[1].removesuffix("_MOE"): kind for kind in gguf.LlamaFileType if "_" in kind.name}
    assert {name: kind.number for name, kind in TYPES.items()} == {
        name: numbers.get(name, kind.number)  # 0.18 has codes of MXFP4, but no file type
        for name, kind in TYPES.items()
    }


def test_every_type_of_the_package_that_can_be_computed_is_offered():
    def works(kind):
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in gguf.GGMLQuantizationType if works(kind)} == set(TYPES)


def test_rows_that_no_block_divides_stay_16_bit_and_that_is_told(tmp_path):
    folder = known("mixtral", tmp_path, intermediate_size=48)
    result = coterie.export_gguf(str(folder), str(tmp_path / "out"), "Q4_0")
    _, _, types = contents(result)
    assert types["blk.0.ffn_down_exps.weight"] == "F16"
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_0"
    assert any("3 matrices are F16: their rows of 48" in note for note in result.notes)


@pytest.mark.parametrize("family", KNOWN)
def test_a_quantized_checkpoint_is_written_as_the_numbers_its_codes_stand_for(family, tmp_path):
    source = known(family, tmp_path)
    parameters = {"quantizer": "rtn", "group_size": 16, "bits": 3, "attention_bits": 4, "shared_bits": 8}
    coterie.compress(str(source), str(tmp_path / "packed"), method="quantize", parameters=parameters)
    coterie.unpack(str(tmp_path / "packed"), str(tmp_path / "dense"), "dense")
    _, tensors, _ = written(tmp_path / "packed", tmp_path / "out")
    expected = source_tensors(family, tmp_path / "dense")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, atol=0, rtol=0, msg=name)


def test_an_fp8_checkpoint_is_written_dequantized(tmp_path):
    changes = {"vocab_size": VOCABULARY, **KNOWN["qwen3-moe"]}
    packed, dense = fp8("qwen3-moe", tmp_path, (16, 8), torch.bfloat16, **changes)
    _, tensors, _ = written(packed, tmp_path / "out")
    for name, value in source_tensors("qwen3-moe", dense).items():
        torch.testing.assert_close(tensors[name], value, atol=0, rtol=0, msg=name)


def test_reordered_rows_turn_as_neighbours():
    w = torch.arange(12.0)[:, None]
    assert neighbours(w, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder, seen = known("mixtral", tmp_path), []
    streamed = Runtime().open(str(folder))
    stock = gguf_export.encoded

    def watched(entry):
        seen.append([i for i, layer in enumerate(streamed.layers) if any(not p.is_meta for p in layer.parameters())])
        return stock(entry)

    monkeypatch.setattr(gguf_export, "encoded", watched)
    gguf_export.export_gguf(streamed, tmp_path / "out", "F16", model=str(folder))
    assert max(map(len, seen)) == 1
    assert {i for layers in seen for i in layers} == {0, 1, 2}


def test_a_pruned_checkpoint_says_how_many_experts_are_left(tmp_path):
    source = known("qwen3-moe", tmp_path)
    coterie.compress(str(source), str(tmp_path / "small"), method="random", keep=0.5)
    fields, tensors, _ = written(tmp_path / "small", tmp_path / "out")
    assert fields["qwen3moe.expert_count"] == 4
    assert tensors["blk.2.ffn_up_exps.weight"].shape == (4, 32, 64)


# -- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
def test_metadata_are_those_of_the_config(family, tmp_path):
    folder = known(family, tmp_path)
    fields, _, _ = written(folder, tmp_path / "out", "Q8_0")
    text, arch = config(family, **KNOWN[family]), fields["general.architecture"]
    experts = getattr(text, "num_local_experts", None) or text.num_experts
    head = getattr(text, "head_dim", None) or 16
    expected = {
        "block_count": 3,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": 4,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": pytest.approx(text.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": text.rope_parameters["rope_theta"],
        "vocab_size": VOCABULARY,
        "expert_count": experts,
        "expert_used_count": text.num_experts_per_tok,
    }
    if family.startswith("qwen"):
        expected["expert_feed_forward_length"] = text.moe_intermediate_size
    if family == "qwen2-moe":
        expected["expert_shared_feed_forward_length"] = text.shared_expert_intermediate_size
    found = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    assert found == expected
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert {"mixtral": "llama"}.get(family, family.replace("-", "")) == arch


def test_stretched_positions_are_written(tmp_path):
    fields, _, _ = written(known("qwen3-moe", tmp_path, rope_parameters=ROPE_YARN), tmp_path / "out")
    found = {k.removeprefix("qwen3moe.rope.scaling."): v for k, v in fields.items() if ".rope.scaling." in k}
    assert found == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 64,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }


def test_the_byte_level_tokenizer_is_in_the_file(tmp_path):
    folder = known("qwen3-moe", tmp_path, vocab_size=VOCABULARY + 2)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    fields, _, _ = written(folder, tmp_path / "out")
    described = json.loads((folder / "tokenizer.json").read_text())
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert {token: ids[token] for token in described["model"]["vocab"]} == described["model"]["vocab"]
    assert fields["tokenizer.ggml.tokens"][VOCABULARY:] == [f"[PAD{VOCABULARY}]", f"[PAD{VOCABULARY + 1}]"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in described["model"]["merges"]]
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[VOCABULARY]) == tuple(gguf.TokenType[n] for n in ("CONTROL", "NORMAL", "UNUSED"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def with_cut(folder, cut, normalizer=None):
    """Another way of cutting text in the tokenizer that tests use."""
    folder.mkdir()
    shutil.copy(pocket() / "tokenizer.json", folder)

    def change(value):
        value["pre_tokenizer"], value["normalizer"] = cut, normalizer

    edit_json(folder / "tokenizer.json", change)
    return read_vocabulary(folder, VOCABULARY)


def byte_level(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


def test_the_way_qwen_cuts_text_has_its_name(tmp_path):
    from transformers import Qwen2Tokenizer

    rule = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    found = with_cut(tmp_path / "t", rule, {"type": "NFC"})
    assert found.pre == "qwen2"
    assert any("normalizes text first (NFC)" in note for note in found.notes)


@pytest.mark.parametrize(
    "cut",
    [
        byte_level(add_prefix_space=True),
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()]},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
                byte_level(use_regex=False),
            ],
        },
    ],
)
def test_a_way_of_cutting_text_without_a_name_is_told(cut, tmp_path):
    found = with_cut(tmp_path / "t", cut)
    assert found.pre == "default"
    assert any("tokens can differ" in note for note in found.notes)


def sentencepiece_like(folder, prefix=True, every_way=True):
    """A tokenizer as Mixtral's: BPE over characters, bytes for what is unknown, spaces marked.

    every_way : a token is merged from any two tokens that make it, as in what is converted from sentencepiece; else
    one token is never made.
    """
    text = ["the quick brown fox jumps over the lazy dog and then the other thing there", "banana bandana ananas"] * 3
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    mark = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*mark, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))

    def change(value):
        value["added_tokens"] = value["added_tokens"][:3]
        if every_way:
            vocab, made = value["model"]["vocab"], ["".join(pair) for pair in value["model"]["merges"]]
            splits = [(token[:at], token[at:]) for token in made for at in range(1, len(token))]
            value["model"]["merges"] = [[a, b] for a, b in splits if a in vocab and b in vocab]
        else:
            value["model"]["merges"].pop()

    edit_json(file, change)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.from_file(str(file))


def best_pairs_first(vocabulary, text):
    """sentencepiece's merging: the adjacent pair with the best score, leftmost first, until no pair is a token."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    pieces = list(text.replace(" ", "\u2581"))
    while True:
        scored = [
            (vocabulary.scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids
        ]
        if not scored:
            return [ids[p] for p in pieces]
        at = -max(scored)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


def test_scores_merge_text_as_the_merges_do(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    found = read_vocabulary(tmp_path, 400)
    assert found.model == "llama"
    for text in ("the brown bandana", "there then other ananas", "quick lazy thing over banana dog"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert best_pairs_first(found, f" {text}") == ids
        assert len(ids) <= len(text) // 2
    assert found.notes == []


def test_merges_that_sentencepiece_would_not_have_are_told(tmp_path):
    sentencepiece_like(tmp_path, every_way=False)
    assert any("tokens can differ" in note for note in read_vocabulary(tmp_path, 400).notes)


def test_a_sentencepiece_tokenizer_is_in_the_file(tmp_path):
    folder = known("mixtral", tmp_path, vocab_size=400)
    sentencepiece_like(folder)
    fields, _, _ = written(folder, tmp_path / "out")
    kinds = [gguf.TokenType(k).name for k in fields["tokenizer.ggml.token_type"]]
    assert kinds[:5] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE", "BYTE"]
    assert kinds[-1] == "UNUSED"
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert len(fields["tokenizer.ggml.scores"]) == 400


def test_without_a_leading_space_the_file_says_so(tmp_path):
    sentencepiece_like(tmp_path, prefix=False)
    assert read_vocabulary(tmp_path, 400).space_prefix is False


def test_added_tokens_that_are_not_special_are_kept_in_text(tmp_path):
    tokenizer = Tokenizer.from_file(str(pocket() / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path, VOCABULARY + 1)
    assert (found.tokens[-1], found.kinds[-1]) == ("<think>", gguf.TokenType.USER_DEFINED)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("deepseek-v3", {}, "GGUF is written here for mixtral, olmoe, qwen2_moe, qwen3_moe"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "layer 1 .* has no experts"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("qwen3-moe", {"attention_bias": True}, "attention biases"),
        ("qwen3-moe", {"hidden_act": "gelu"}, "gelu experts"),
        ("mixtral", {"sliding_window": 32}, "sliding window"),
        ("olmoe", {"clip_qkv": 1.0}, "clips"),
        ("olmoe", {"num_key_value_heads": 2}, "2 key heads and 4 query heads"),
        ("qwen2-moe", {"head_dim": 32}, "4 heads of 32"),
        ("qwen3-moe", {"rope_parameters": {**ROPE_YARN, "attention_factor": 1.2}}, "attention factor"),
        ("qwen3-moe", {"rope_parameters": ROPE_LLAMA3}, "llama3 positions"),
        ("mixtral", {"vocab_size": 512}, "has a token 4095, and the model's embeddings 512 rows"),
    ],
)
def test_what_the_graph_would_compute_otherwise_is_refused(family, changes, told, tmp_path):
    folder = saved(family, tmp_path, **{"vocab_size": VOCABULARY, **KNOWN.get(family, {}), **changes})
    with pytest.raises(UsageError, match=told):
        coterie.export_gguf(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("random", {"keep": 0.5, "layers": "0"}, "4 to 8 experts, and GGUF knows one number"),
        ("hc-smoe", {"keep": 0.5, "parameters": {"router": "map"}}, "has map"),
    ],
)
def test_layers_that_only_coterie_can_run_are_refused(method, options, told, tmp_path):
    source = known("qwen3-moe", tmp_path)
    coterie.compress(
        str(source), str(tmp_path / "small"), method=method, tokens=str(token_file(tmp_path / "t")), **options
    )
    with pytest.raises(UsageError, match=told):
        coterie.export_gguf(str(tmp_path / "small"), str(tmp_path / "out"))


def test_a_file_needs_a_tokenizer(tmp_path):
    folder = known("mixtral", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        coterie.export_gguf(str(folder), str(tmp_path / "out"))


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = known("mixtral", tmp_path)
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        coterie.export_gguf(str(folder), str(tmp_path / "out"))


def test_numbers_beyond_half_precision_leave_no_file(tmp_path):
    model = tiny("mixtral", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    shutil.copy(pocket() / "tokenizer.json", tmp_path / "large")
    with pytest.raises(CheckpointError, match="half precision ends at 65504"):
        coterie.export_gguf(str(tmp_path / "large"), str(tmp_path / "out"), "F16")
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_the_source_is_not_touched(tmp_path):
    folder = known("mixtral", tmp_path)
    before = each_tensor(folder)
    written(folder, tmp_path / "out", "Q8_0")
    assert all(torch.equal(value, before[name]) for name, value in each_tensor(folder).items())


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    folder = known("qwen3-moe", tmp_path, torch.bfloat16)
    told = cli("export", folder, tmp_path / "out", "--gguf", "q8_0", "--json").json()
    file = tmp_path / "out/qwen3-moe-Q8_0.gguf"
    assert told["out"] == str(file)
    assert told["bytes_after"] == file.stat().st_size
    assert told["bytes_after"] < 0.7 * told["bytes_before"]
    done = cli("export", folder, tmp_path / "out", "--gguf", "F16", "--overwrite")
    assert done.code == 0, done.err
    assert "not tried with llama.cpp itself" in done.out + done.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["qwen3-moe-F16.gguf"]
    assert "no GGUF type 'Q4_K'" in cli("export", folder, tmp_path / "no", "--gguf", "Q4_K").err
    assert "one thing at a time" in cli("export", folder, tmp_path / "no", "--gguf", "F16", "--pad").err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = cli("export", pocket(), tmp_path / "out", "--gguf", "F16")
    assert done.code != 0
    assert "pip install 'coterie[gguf]'" in " ".join(done.err.split())
