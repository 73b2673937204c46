"""Finding, reading and slicing MoE layers on every family; the architecture table."""

import copy

import pytest
import torch
from torch.nn import functional as F

from coterie.anatomy import check_keep, decoder_layers, moe_layers, select, slice_names
from coterie.anatomy.architectures import QUIRKS, discover, examine
from coterie.anatomy.counts import with_expert_counts
from coterie.errors import CoterieError, ModelError
from families import CONFIGS, FAMILIES, tiny, tokens

DENSE = {"qwen3-moe": [1], "deepseek-v2": [0], "deepseek-v3": [0], "glm4-moe": [0], "ernie4.5-moe": [0]}
DENSE |= {"lfm2-moe": [0], "jamba": [0, 2]}
RAW = ("qwen2-moe", "olmoe", "deepseek-v2", "jamba")  # apply softmax probabilities without renormalising them
SHARED = {"qwen2-moe", "qwen3-next", "deepseek-v2", "deepseek-v3", "glm4-moe", "ernie4.5-moe", "hunyuan-v1-moe"}


def keep_half(layer):
    """Every second expert: equal in every routing group."""
    return list(range(0, layer.num_experts, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_moe_layers_are_found_and_dense_ones_are_not(family):
    model = tiny(family)
    layers = moe_layers(model)
    depth = model.config.num_hidden_layers
    assert [m.index for m in layers] == [i for i in range(depth) if i not in DENSE.get(family, [])]
    fields = CONFIGS[family][1]
    top_k = next(fields[n] for n in ("num_experts_per_tok", "moe_topk", "moe_k") if n in fields)
    assert {(m.num_experts, m.top_k) for m in layers} == {(16 if family == "deepseek-v3" else 8, top_k)}
    assert all(bool(m.shared) == (family in SHARED) for m in layers)
    assert {m.groups for m in layers} == {4 if family == "deepseek-v3" else 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_expert_computes_what_the_experts_module_computes(family):
    layer = moe_layers(tiny(family))[0]
    x_TH = torch.randn(5, layer.bank.hidden_size)
    index, ones = torch.full((5, 1), 3), torch.ones(5, 1)
    expert = layer.bank.read(3)
    up = F.linear(x_TH, expert.up_IH, expert.up_bias_I)
    gate = F.linear(x_TH, expert.gate_IH, expert.gate_bias_I)
    parts = (gate, up) if layer.experts.is_concatenated else None
    fused = torch.cat(parts, -1) if parts else torch.stack((gate, up), -1).flatten(-2)
    expected = F.linear(layer.experts._apply_gate(fused), expert.down_HI, expert.down_bias_H)
    with torch.no_grad():
        found = layer.experts(x_TH, index, ones)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_is_read(family):
    bank = moe_layers(tiny(family))[0].bank
    before, other = copy.deepcopy(bank.read(1)), copy.deepcopy(bank.read(2))
    bank.write(2, before)
    for name, value in vars(before).items():
        if value is not None:
            assert torch.equal(getattr(bank.read(2), name), value)
            assert not torch.equal(getattr(other, name), value)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RAW])
def test_slicing_equals_masking_the_dropped_experts(family):
    model = tiny(family)
    sliced = copy.deepcopy(model)
    for layer in moe_layers(sliced):
        select(layer, keep_half(layer))
    for layer in moe_layers(model):
        mask_router(layer, [e for e in range(layer.num_experts) if e not in keep_half(layer)])
    with torch.no_grad():
        torch.testing.assert_close(sliced(tokens()).logits, model(tokens()).logits, atol=2e-5, rtol=1e-4)


def mask_router(layer, drop):
    """Make the dropped experts unselectable in the original's own router: by its bias, or by logits of -inf.

    Ernie adds its bias to softmax probabilities, which slicing renormalises: there only the logits can be masked.
    """
    softmax_and_bias = "Ernie" in type(layer.router).__name__
    for name in slice_names(layer):
        path, _, leaf = name[len(layer.name) + 1 :].rpartition(".")
        tensor = getattr(layer.block.get_submodule(path), leaf)
        if softmax_and_bias:
            break
        if "correction_bias" in leaf or leaf == "expert_bias" or name.endswith("router.bias"):
            tensor.data.view(-1)[drop] = -1e9
            return

    original = F.linear

    def hook(module, arguments, keywords):
        def linear(x, weight, bias=None):
            logits = original(x, weight, bias)
            if weight.shape[0] == layer.num_experts:
                logits[:, drop] = float("-inf")
            return logits

        torch.nn.functional.linear = linear

    def restore(module, arguments, output):
        torch.nn.functional.linear = original

    layer.router.register_forward_pre_hook(hook, with_kwargs=True)
    layer.router.register_forward_hook(restore)


@pytest.mark.parametrize("family", RAW)
def test_where_gates_are_raw_probabilities_survivors_gain_what_the_dropped_had(family):
    layer = moe_layers(tiny(family))[0]
    x_TH = torch.randn(7, layer.bank.hidden_size)
    with torch.no_grad():
        logits_TE = layer.router(x_TH)[0].float()
        keep = keep_half(layer)
        select(layer, keep)
        _, weight_TK, index_TK = layer.router(x_TH)
    expected = logits_TE[:, keep].softmax(-1).gather(1, index_TK)
    torch.testing.assert_close(weight_TK.float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_with_one_entry_per_expert_is_sliced_and_nothing_else(family):
    model = tiny(family)
    layer = moe_layers(model)[0]
    E, before = layer.num_experts, {n: t.shape for n, t in layer.block.state_dict().items()}
    select(layer, keep_half(layer))
    changed = {n for n, t in layer.block.state_dict().items() if t.shape != before[n]}
    per_expert = {n for n, s in before.items() if E in s and "shared" not in n}
    assert changed == per_expert
    assert layer.num_experts == E // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_takes_the_new_count_under_every_name(family):
    config = tiny(family).config
    before = 16 if family == "deepseek-v3" else 8
    counts = dict.fromkeys((layer.index for layer in moe_layers(tiny(family))), 4)
    changed = with_expert_counts(config.to_dict(), config, before, counts, "0")
    again = type(config).from_dict(changed)
    model = type(tiny(family))(again)
    assert {m.num_experts for m in moe_layers(model)} == {4}


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "olmoe", "gpt-oss"])
def test_both_names_of_a_renamed_count_are_written(family):
    config = tiny(family).config
    changed = with_expert_counts(config.to_dict(), config, 8, {0: 4, 1: 4, 2: 4}, "0")
    assert changed["num_experts"] == changed["num_local_experts"] == 4


def test_fewer_experts_than_top_k_are_refused():
    layer = moe_layers(tiny("mixtral"))[0]
    with pytest.raises(ModelError, match="cannot keep 1 of 8 experts in layer 0: the router picks 2 per token"):
        select(layer, [3])


def test_unequal_survivors_per_group_are_refused_with_the_counts():
    layer = moe_layers(tiny("deepseek-v3"))[0]
    with pytest.raises(ModelError, match=r"unequal survivors per routing group in layer 1: \[3, 1, 2, 2\]"):
        check_keep(layer, [0, 1, 2, 4, 8, 9, 12, 13])


@pytest.mark.parametrize("keep", [[3, 1], [1, 1, 2], [-1, 2], [5, 8]])
def test_keeps_that_are_no_set_of_experts_are_refused(keep):
    with pytest.raises(ModelError, match=r"ascending, distinct and within 0\.\.7"):
        check_keep(moe_layers(tiny("mixtral"))[0], keep)


def test_a_dense_model_is_refused():
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    dense = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=64, head_dim=16, intermediate_size=32, **sizes))
    with pytest.raises(ModelError, match="has no MoE layers"):
        decoder_layers(dense)


def test_every_quirk_has_a_reason_or_a_meaning_and_its_family_exists():
    import transformers

    for model_type, quirks in QUIRKS.items():
        assert model_type in transformers.CONFIG_MAPPING
        assert quirks.unsliceable or quirks.example


def test_unsliceable_families_are_found_but_marked_read_only():
    found = examine("deepseek_v4", "DeepseekV4ForCausalLM")
    assert found.verdict == "read-only"
    assert "token ids" in found.reason


def test_the_installed_transformers_has_many_working_architectures():
    found = list(discover())
    works = {a.model_type for a in found if a.verdict == "works"}
    expected = {"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3"}
    expected |= {
        "gpt_oss",
        "glm4_moe",
        "granitemoe",
        "ernie4_5_moe",
        "minimax_m2",
        "hunyuan_v1_moe",
        "lfm2_moe",
        "jamba",
    }
    assert expected <= works
    assert all(a.reason for a in found if a.verdict != "works")


def test_errors_are_all_of_one_kind():
    assert issubclass(ModelError, CoterieError)
    assert ModelError("x").exit_code == 2
