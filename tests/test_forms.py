"""Experts that router outputs share, and experts stored as factors: built, loaded, run, saved and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.anatomy.forms import Form, apply_forms, form_of
from coterie.errors import CheckpointError, ModelError, UsageError
from coterie.experts import mapped
from coterie.experts.forward import projections
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.model import StreamedModel
from families import FAMILIES, FEW, each_tensor, edit_json, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
MERGED = {"method": "hc-smoe", "keep": 0.5}


@pytest.fixture
def ids(tmp_path):
    return str(token_file(tmp_path / "ids.safetensors"))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


# -- expert maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_gives_the_logits_of_the_same_experts_duplicated(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    for router in ("map", "duplicated"):
        coterie.compress(str(folder), str(tmp_path / router), tokens=ids, parameters={"router": router}, **MERGED)
    load = AutoModelForCausalLM.from_pretrained
    shared, copied = (load(tmp_path / n, dtype=torch.float32) for n in ("map", "duplicated"))
    torch.testing.assert_close(logits(shared), logits(copied), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(moe_layers(shared), moe_layers(copied), strict=True):
        assert ours.num_experts == theirs.num_experts // 2
        assert ours.router_size == theirs.num_experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "coterie"])
def test_a_map_works_in_front_of_every_experts_implementation(implementation, tmp_path, ids):
    folder = saved("qwen3-moe", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_router_logits_of_the_first_moe_layer_stay_bit_identical(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    seen = []
    for path in (folder, tmp_path / "out"):
        model = resident(path)
        moe_layers(model)[0].router.register_forward_hook(lambda m, a, out: seen.append(out))
        logits(model)
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)


def test_ids_beyond_the_map_are_no_expert():
    index = torch.tensor([[0, 3], [4, 9], [1, 2]])
    assert mapped.mapped_ids([0, 0, 1, 1], index).tolist() == [[0, 1], [2, 2], [0, 1]]


@pytest.mark.parametrize("family", FEW)
def test_a_mapped_model_trains_saves_and_loads_again(family, tmp_path, ids):
    folder = saved(family, tmp_path, torch.float32)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
    model(tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    model.eval().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert {k: v.shape for k, v in each_tensor(tmp_path / "again").items()} == {
        k: v.shape for k, v in each_tensor(tmp_path / "out").items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_drop_by_the_experts_that_went(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    result = coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    before, after = each_tensor(folder), each_tensor(tmp_path / "out")
    size = sum(t.nbytes for t in after.values())
    assert result.after.bytes == size
    model = resident(folder, torch.bfloat16)
    gone = sum(layer.bank.parameters_per_expert * layer.num_experts // 2 for layer in moe_layers(model)) * 2
    assert sum(t.nbytes for t in before.values()) - size == gone


def test_a_mapped_checkpoint_is_not_pruned_or_merged_again(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    for method in ("reap", "hc-smoe", "m-smoe", "dern"):
        done = cli("compress", tmp_path / "out", tmp_path / "more", "--tokens", ids, "--method", method, "--keep", 0.5)
        assert done.code == 2
        assert "share" in done.err


# -- factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_factors_give_the_original_logits(family, tmp_path):
    folder = saved(family, tmp_path, torch.float32)
    bank = moe_layers(tiny(family))[0].bank
    rank = min(bank.hidden_size, bank.intermediate_size)
    coterie.compress(str(folder), str(tmp_path / "out"), method="low-rank", parameters={"rank": rank})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(layer.bank.factored for layer in moe_layers(model))
    torch.testing.assert_close(logits(model), logits(resident(folder)), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_low_rank_experts_compute_what_their_products_would(family, tmp_path):
    folder = saved(family, tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), method="low-rank", parameters={"rank": 8})
    model, dense = resident(tmp_path / "out"), resident(folder)
    for ours, theirs in zip(moe_layers(model), moe_layers(dense), strict=True):
        for expert in range(ours.num_experts):
            theirs.bank.write(expert, ours.bank.read(expert))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_factored_experts_are_streamed_as_they_are_loaded(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    coterie.compress(str(folder), str(tmp_path / "merged"), tokens=ids, **MERGED)
    coterie.compress(str(tmp_path / "merged"), str(tmp_path / "out"), method="low-rank", parameters={"rank": 8})
    done = cli("evaluate", tmp_path / "out", "--tokens", ids, "--json")
    assert done.code == 0, done.err
    from safetensors.torch import load_file

    rows = load_file(ids)["input_ids"]
    with torch.no_grad():
        out = resident(tmp_path / "out")(rows).logits
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert done.json()[0]["mean"]["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_factored_parameters_and_bytes_are_those_of_the_factors(tmp_path):
    folder = saved("qwen3-moe", tmp_path)
    result = coterie.compress(str(folder), str(tmp_path / "out"), method="low-rank", parameters={"rank": 8})
    after = each_tensor(tmp_path / "out")
    assert result.after.bytes == sum(t.nbytes for t in after.values())
    assert result.after.parameters == sum(t.numel() for t in after.values())
    model = resident(tmp_path / "out")
    layer = moe_layers(model)[0]
    H, I, Q = layer.bank.hidden_size, layer.bank.intermediate_size, 8  # noqa: E741
    assert layer.bank.parameters_per_expert == 3 * Q * (H + I)
    assert result.after.parameters_of_expert == 3 * Q * (H + I)


@pytest.mark.parametrize("family", FEW)
def test_a_factored_model_trains_saves_and_loads_again(family, tmp_path):
    folder = saved(family, tmp_path, torch.float32)
    coterie.compress(str(folder), str(tmp_path / "out"), method="low-rank", parameters={"rank": 8})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
    model(tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "factor_" in n]
    assert grads
    assert all(g is not None for g in grads)
    assert any(float(g.abs().max()) > 0 for g in grads)
    model.eval().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FEW)
def test_sparse_rows_are_added_to_the_product_and_survive_saving(family, tmp_path):
    model = tiny(family)
    layers = {layer.index: layer for layer in moe_layers(model)}
    index, layer = next(iter(layers.items()))
    E, names = layer.num_experts, projections(layer.experts)
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (layer.bank.intermediate_size, layer.bank.hidden_size)}
    shapes |= {"up": shapes["gate"], "down": shapes["gate"][::-1]}
    form = Form(ranks=dict.fromkeys(names, 4), rows=dict.fromkeys(names, 5))
    apply_forms(model, {index: form})
    for p in names:
        O = shapes[p][0]  # noqa: E741
        chosen = torch.randperm(E * O, generator=generator)[:5].sort().values.int()
        with torch.no_grad():
            for part in (f"factor_{p}_a", f"factor_{p}_b", f"sparse_{p}"):
                getattr(layer.experts, part).normal_(0, 0.1, generator=generator)
        getattr(layer.experts, f"sparse_{p}_row").copy_(chosen)
    assert form_of(layer) == form
    dense = tiny(family)
    other = next(x for x in moe_layers(dense) if x.index == index)
    for expert in range(E):
        other.bank.write(expert, layer.bank.read(expert))
        if layer.bank.has_bias:
            with torch.no_grad():
                for name in ("gate_up_proj_bias", "down_proj_bias"):
                    getattr(other.experts, name)[expert].copy_(getattr(layer.experts, name)[expert])
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)
    model.config.quantization_config = {
        "quant_method": "coterie",
        "format": 1,
        "version": "0",
        "layers": {str(index): form.describe()},
    }
    model.save_pretrained(tmp_path / "sparse")
    edit_json(
        tmp_path / "sparse" / "config.json", lambda c: c.update(quantization_config=model.config.quantization_config)
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)


# -- headers that cannot be right -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"map": [0] * 7}, "maps 7 experts"),
        ({"map": [0, 2] * 4}, "skips"),
        ({"map": [0, -1] * 4}, "greater than or equal to 0"),
        ({"map": [0, 10**9] * 4}, "skips or exceeds"),
        ({"ranks": {"gate": 8, "up": 8}}, "name gate, up"),
        ({"ranks": {"gate": 8, "up": 8, "down": 10**12}}, "above the full rank"),
        ({"ranks": {"gate": 8, "up": 8, "down": "8"}}, "valid integer"),
        ({"rows": {"gate": 1, "up": 1, "down": 1}}, "no ranks"),
        (
            {"ranks": dict.fromkeys(("gate", "up", "down"), 4), "rows": dict.fromkeys(("gate", "up", "down"), 10**12)},
            "sparse rows",
        ),
        ({"shrink": 3}, "not permitted"),
        ([1], "dictionary"),
    ],
)
def test_a_header_that_does_not_fit_the_model_is_refused(entry, said, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(layers={"1": entry}))
    with pytest.raises(CheckpointError, match=said):
        StreamedModel(Checkpoint.open(str(tmp_path / "out")))


@pytest.mark.parametrize("layers", [{"9": {"map": [0] * 8}}, {"x": {}}, [], "all"])
def test_a_header_that_names_no_layers_of_the_model_is_refused(layers, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED)
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(layers=layers))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        StreamedModel(Checkpoint.open(str(tmp_path / "out")))


@pytest.mark.parametrize("router", ["map", "reduced"])
def test_what_cannot_work_on_special_experts_says_so(router, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "merged"), tokens=ids, parameters={"router": router}, **MERGED)
    coterie.compress(str(tmp_path / "merged"), str(tmp_path / "low"), method="low-rank", parameters={"rank": 8})
    for words in (
        ("compress", tmp_path / "low", tmp_path / "no", "--method", "wanda", "--set", "sparsity=0.5", "--tokens", ids),
        ("compress", tmp_path / "low", tmp_path / "no", "--method", "slimmoe", "--set", "width=0.5", "--tokens", ids),
        ("compress", tmp_path / "low", tmp_path / "no", "--method", "compressed-experts"),
        ("export", tmp_path / "low", tmp_path / "no", "--pad"),
    ):
        done = cli(*words)
        assert done.code == 2, (words, done.out + done.err)
        assert "Traceback" not in done.err
        assert "factor" in done.err
    with pytest.raises(ModelError, match="no pattern can choose"):
        coterie.load(str(tmp_path / "low"), pattern={0: [0, 1], 1: [0, 1], 2: [0, 1]}, keep_experts=2)


def test_a_plan_that_merges_is_no_pattern(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    plan = coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, **MERGED).plan
    with pytest.raises(UsageError, match="recombines experts"):
        coterie.load(str(folder), pattern=plan)
