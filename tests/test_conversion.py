"""Models made of other models: cut experts, spawned experts, aggregated experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.anatomy import moe_layers
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.conversion.aggregate import aggregate
from coterie.conversion.segment import segment
from coterie.conversion.spawn import spawn
from coterie.errors import ModelError, UsageError
from families import tiny
from inprocess import cli

IDS = torch.arange(24).reshape(2, 12) * 7 % 512
CUT = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "gpt-oss", "glm4-moe", "granite-moe")
DENSE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "intermediate_size": 24,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("family", CUT)
def test_experts_cut_into_pieces_compute_the_same(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    cut = segment(model, 4)
    before, after = moe_layers(model)[0], moe_layers(cut)[0]
    assert after.num_experts == 4 * before.num_experts
    assert after.top_k == 4 * before.top_k
    assert after.bank.intermediate_size * 4 == before.bank.intermediate_size
    torch.testing.assert_close(cut(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-4)
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_cutting_keeps_the_number_of_parameters_but_for_the_router() -> None:
    model = tiny("mixtral")
    extra = sum(3 * layer.router.weight.numel() for layer in moe_layers(model))
    count = [sum(p.numel() for p in m.parameters()) for m in (model, segment(model, 4))]
    assert count[1] - count[0] == extra


def test_our_decoder_is_cut_with_its_shared_experts_as_they_are() -> None:
    torch.manual_seed(0)
    config = CoterieConfig(**{**DENSE, "num_shared_experts": 1, "router": {"kind": "top-k", "top_k": 1}})
    model = CoterieForCausalLM(config).eval()
    cut = segment(model, 2)
    assert moe_layers(cut)[0].top_k == 2
    torch.testing.assert_close(cut(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_pieces_must_be_equal() -> None:
    with pytest.raises(UsageError, match="equal pieces"):
        segment(tiny("mixtral"), 5)


@pytest.mark.parametrize(("family", "named"), [("phimoe", "proportion"), ("deepseek-v3", "groups of experts")])
def test_a_router_that_copies_would_confuse_is_refused(family: str, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        segment(tiny(family), 2)


# -- aggregation -------------------------------------------------------------------------------------------------------


def test_experts_of_both_models_are_there_bit_for_bit_in_the_order_of_router_rows() -> None:
    a, b = tiny("mixtral"), tiny("mixtral", seed=1)
    both = aggregate([a, b])
    for one, two, joined in zip(moe_layers(a), moe_layers(b), moe_layers(both)):
        assert joined.num_experts == 16
        assert torch.equal(joined.experts.down_proj, torch.cat([one.experts.down_proj, two.experts.down_proj]))
        assert torch.equal(joined.router.weight, torch.cat([one.router.weight, two.router.weight]))
    mean = (a.model.embed_tokens.weight + b.model.embed_tokens.weight) / 2
    torch.testing.assert_close(both.model.embed_tokens.weight, mean)


def test_a_model_aggregated_with_itself_halves_raw_top_1_and_twins_can_be_renormalised() -> None:
    model = tiny("olmoe", num_experts_per_tok=1, num_hidden_layers=1)
    x = torch.randn(1, 5, 64)
    block = moe_layers(model)[0].block
    for twins, factor in ((False, 0.5), (True, 1.0)):
        joined = moe_layers(aggregate([model, model], renormalise_twins=twins))[0].block
        torch.testing.assert_close(joined(x), factor * block(x), atol=1e-6, rtol=1e-4)


def test_models_of_different_expert_counts_aggregate(tmp_path: Path) -> None:
    both = aggregate([tiny("qwen3-moe"), tiny("qwen3-moe", seed=1, num_experts=4)], weights=[0.9, 0.1])
    assert moe_layers(both)[0].num_experts == 12
    both.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, both(IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights", [[0.5], [0.7, 0.7], [1.5, -0.5]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="weights"):
        aggregate([tiny("mixtral"), tiny("mixtral")], weights=weights)


def test_other_architectures_do_not_aggregate() -> None:
    with pytest.raises(ModelError, match="architecture"):
        aggregate([tiny("mixtral"), tiny("olmoe")])


# -- spawning ----------------------------------------------------------------------------------------------------------


def dense() -> Any:
    torch.manual_seed(0)
    return CoterieForCausalLM(CoterieConfig(**{**DENSE, "first_dense": 2})).eval()


def sparse_config(**router: Any) -> CoterieConfig:
    return CoterieConfig(**{**DENSE, "router": {"kind": "top-k", "combine": "renormalised", **router}})


def test_without_a_mask_growth_is_lossless() -> None:
    model = dense()
    grown = spawn(model, sparse_config(), ratio=0.0).eval()
    torch.testing.assert_close(grown(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_masks_differ_between_experts_and_are_reproducible(granularity: Any) -> None:
    grown, again = (spawn(dense(), sparse_config(), ratio=0.5, granularity=granularity, seed=3) for _ in range(2))
    layer = moe_layers(grown)[0]
    assert torch.equal(layer.experts.down_proj, moe_layers(again)[0].experts.down_proj)
    zero = [layer.bank.read(expert).down_HI == 0 for expert in range(4)]
    assert 0.3 < float(zero[0].float().mean()) < 0.7
    agree = float((zero[0] == zero[1]).float().mean())
    assert 0.25 < agree < 0.75  # (1 - r)^2 + r^2 of the entries
    layer.experts.down_proj.requires_grad_(True)
    grown(IDS, labels=IDS).loss.backward()
    assert bool((layer.experts.down_proj.grad[layer.experts.down_proj == 0] != 0).any())  # masked entries may learn


def test_experts_of_another_width_cannot_be_spawned() -> None:
    with pytest.raises(ModelError, match="24 neurons"):
        spawn(dense(), CoterieConfig(**{**DENSE, "moe_intermediate_size": 16}))


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_cut_and_gathered_on_the_command_line(tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny("olmoe").save_pretrained(source)
    told = cli("grow", "segment", source, tmp_path / "finer", "--pieces", 2, "--json")
    assert told.code == 0, told.err
    assert told.json()["experts"] == [8, 16]
    assert cli("grow", "aggregate", source, source, tmp_path / "both", "--noise", "0.01").code == 0
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert moe_layers(both)[0].num_experts == 16
    refused = cli("grow", "aggregate", source, tmp_path / "alone")
    assert refused.code == 2
    assert "at least two" in refused.err
