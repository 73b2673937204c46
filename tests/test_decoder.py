"""The configurable decoder: built, saved, generated, shrunk, and exported to stock architectures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coterie import api
from coterie.anatomy import moe_layers
from coterie.anatomy.routers import placed_routers, remember
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.architectures.stock import as_stock
from coterie.errors import ModelError, UsageError
from coterie.streaming.lockstep import Batch
from coterie.text import TokenData

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "pad_token_id": 0,
}
MIXED: dict[str, Any] = {
    "num_shared_experts": 1,
    "residual": {"mu": 0.5},
    "sliding_window": 5,
    "layers": {"0": {"dense": True}, "2": {"attention": "sliding", "router": {"kind": "sigmoid", "top_k": 3}}},
}
IDS = torch.arange(34).reshape(2, 17) * 7 % 512


def decoder(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return CoterieForCausalLM(CoterieConfig(**{**SIZES, "initializer_range": 0.1, **changes})).eval()


def test_every_layer_is_made_of_what_the_config_names() -> None:
    model = decoder(**MIXED)
    assert [layer.index for layer in moe_layers(model)] == [1, 2]
    assert {i: (r.kind, r.top_k) for i, r in placed_routers(model).items()} == {1: ("top-k", 2), 2: ("sigmoid", 3)}


def test_it_is_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model = decoder(**MIXED)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is CoterieForCausalLM
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
    assert "quantization_config" not in AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize(
    "first",
    [
        "import coterie; from transformers import AutoConfig",
        "import transformers; transformers.AutoModelForCausalLM; import coterie; from transformers import AutoConfig",
    ],
)
def test_the_auto_classes_know_it_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    code = f"{first}; from transformers import AutoModelForCausalLM as A; import sys; A.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, capture_output=True)


def test_decoding_with_a_cache_equals_a_full_forward() -> None:
    model = decoder(**MIXED)
    full = model(IDS).logits
    first = model(IDS[:, :9], use_cache=True)
    steps = [first.logits]
    for position in range(9, 17):
        first = model(IDS[:, position : position + 1], past_key_values=first.past_key_values)
        steps.append(first.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left_changes_nothing(attention: str) -> None:
    model = decoder(**MIXED)
    model.set_attn_implementation(attention)
    alone = model(IDS[:1]).logits
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1]], 1)
    mask = (torch.arange(21) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(*, checkpointed: bool) -> dict[str, torch.Tensor]:
        model = decoder(**MIXED).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, again = gradients(checkpointed=False), gradients(checkpointed=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_the_loss_in_training_is_that_of_the_logits() -> None:
    model, labels = decoder(**MIXED), IDS.clone()
    labels[0, :5] = -100
    logits = model(IDS, labels=labels)
    trained = model.train()(IDS, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, logits.loss, atol=1e-5, rtol=1e-5)
    assert model(IDS, labels=labels, logits_to_keep=0).logits.shape == (2, 17, 512)


def test_the_other_kind_of_checkpointing_is_refused() -> None:
    model = decoder(**MIXED).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="use_reentrant"):
        model(inputs_embeds=model.model.embed_tokens(IDS), labels=IDS)


def test_settings_that_changed_in_use_are_saved(tmp_path: Path) -> None:
    model = decoder(num_experts=4)
    for router in placed_routers(model).values():
        router.dial(top_k=3)
    remember(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {router.top_k for router in placed_routers(again).values()} == {3}
    assert again.config.router == {"kind": "top-k", "top_k": 3}
    assert again.config.layers == {}


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"router": {"kind": "top-k", "combine": "renormalised"}}),
    "mixtral, sliding": (
        "MixtralForCausalLM",
        {
            "router": {"kind": "top-k", "combine": "renormalised"},
            "attention": "sliding",
            "sliding_window": 6,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": (
        "Qwen3MoeForCausalLM",
        {"router": {"kind": "top-k", "top_k": 3}, "qk_norm": True, "layers": {"1": {"dense": True}}},
    ),
    "granite": (
        "GraniteMoeSharedForCausalLM",
        {"router": {"kind": "top-k", "combine": "renormalised"}, "num_shared_experts": 2},
    ),
    "glm4": (
        "Glm4MoeForCausalLM",
        {
            "router": {"kind": "sigmoid", "scale": 1.5, "groups": 4, "groups_used": 2, "top_k": 3},
            "num_shared_experts": 1,
            "first_dense": 1,
            "qk_norm": True,
        },
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_parts_make_a_stock_model_of_the_same_function(name: str) -> None:
    kind, changes = STOCK[name]
    model = decoder(**changes)
    for layer in moe_layers(model):
        for buffer in layer.router.buffers():
            buffer.normal_(0, 0.1)
    stock = as_stock(model)
    assert type(stock).__name__ == kind
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"residual": {"mu": 0.5}}, "momentum"),
        ({"router": {"kind": "top-k", "combine": "unit"}}, "weights"),
        ({"layers": {"1": {"num_experts": 4}}}, "experts"),
    ],
)
def test_a_part_that_no_stock_architecture_has_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        as_stock(decoder(**changes))


def test_export_writes_a_folder_that_needs_no_coterie(tmp_path: Path) -> None:
    model = decoder(router={"kind": "top-k", "combine": "renormalised"})
    model.save_pretrained(tmp_path / "ours")
    told = api.unpack(str(tmp_path / "ours"), str(tmp_path / "stock"), "stock")
    assert told.form == "mixtral"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=5e-6, rtol=1e-5)


def test_a_decoder_is_pruned_like_any_other_model(tmp_path: Path) -> None:
    decoder(router={"kind": "top-k", "combine": "renormalised"}).save_pretrained(tmp_path / "model")
    data = TokenData([Batch(IDS, None, torch.zeros(2, dtype=torch.int64))], ["some"], "digest", {"some": IDS.numel()})
    api.compress(str(tmp_path / "model"), str(tmp_path / "half"), method="frequency", keep=0.5, tokens=data)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert {layer.num_experts for layer in moe_layers(half)} == {4}
    assert torch.isfinite(half(IDS).logits).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_key_value_heads": 3}, "share"),
        ({"head_dim": 7}, "odd"),
        ({"attention": "linear"}, "linear"),
        ({"attention": "sliding"}, "sliding_window"),
        ({"layers": {"9": {}}}, "no layer '9'"),
        ({"layers": {"1": {"width": 3}}}, "width"),
        ({"router": {"kind": "best"}}, "no router 'best'"),
        ({"router": {"kind": "top-k", "topk": 2}}, "topk"),
        ({"residual": {"mu": 2.0}}, "mu"),
    ],
)
def test_a_config_that_cannot_be_built_says_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        CoterieConfig(**{**SIZES, **changes})


def test_more_experts_per_token_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="pick 9 of 8 experts"):
        decoder(router={"kind": "top-k", "top_k": 9})
