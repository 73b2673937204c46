"""The router contract: any router in any model, one record per call, saved and rebuilt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.anatomy import moe_layers
from coterie.anatomy.routers import put_residual, put_routers
from coterie.routing.record import current, listening
from families import FAMILIES, tiny

IDS = torch.arange(24).reshape(2, 12) * 7 % 512
LIKE = {  # families whose own router is one of ours: (kind, how close)
    "mixtral": "top-k",
    "qwen2-moe": "top-k",
    "qwen3-moe": "top-k",
    "qwen3-next": "top-k",
    "olmoe": "top-k",
    "deepseek-v2": "top-k",
    "deepseek-v3": "sigmoid",
    "glm4-moe": "sigmoid",
    "granite-moe": "top-k",
    "jamba": "top-k",
}


@pytest.mark.parametrize("family", LIKE)
def test_the_same_router_in_its_place_gives_the_same_logits(family: str) -> None:
    model = tiny(family)
    before = model(IDS).logits
    assert put_routers(model, LIKE[family]) == []
    torch.testing.assert_close(model(IDS).logits, before, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek-v3"])
def test_a_router_put_twice_is_put_once(family: str) -> None:
    model = tiny(family)
    put_routers(model, LIKE[family])
    before = model(IDS).logits
    put_routers(model, LIKE[family])
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_other_routers_is_saved_rebuilt_and_generates(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    put_routers(model, "top-k", {"top_k": 3, "combine": "straight-through"}, layers=[moe_layers(model)[-1].index])
    put_residual(model, {"mu": 0.5})
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, expected)
    assert again.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_two_calls_share_no_record_and_none_is_left() -> None:
    model = tiny("mixtral")
    put_routers(model, "top-k")
    seen = []
    with listening(model, seen.append):
        model(IDS)
        model(IDS[:1])
    assert current() is None
    assert [sorted(record.routings) for record in seen] == [[0, 1, 2], [0, 1, 2]]
    assert [record.shape for record in seen] == [(2, 12), (1, 12)]
