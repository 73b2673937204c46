"""What every router has to do, whatever it is: stand in any model, be saved, decode, train, ignore padding."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from coterie.anatomy.routers import put_routers
from coterie.routing.base import router_class, routers
from families import tiny

KINDS = list(routers())
MODELS = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3")
# where the defaults would leave something out, by kind, or cannot be, by kind and model; all others are as they come
SETTINGS: dict[str, dict[str, Any]] = {
    "adamoe": {"top_k": 3, "nulls": 6},
    "activation": {"activation": "gelu", "learn_tau": True, "sparsify": "threshold", "threshold": 0.1},
    "dts": {"use": "soft", "tau": 0.5},
    "top-k": {"noise": True, "jitter": 0.1},
    "attention deepseek-v3": {"weights": "raw", "head": "mean"},  # latent attention has no values for a posterior
}
IDS = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
every_router = pytest.mark.parametrize("kind", KINDS)
every_model = pytest.mark.parametrize("family", MODELS)


def attention(kind: str) -> dict[str, Any]:
    return {"attn_implementation": "eager"} if router_class(kind).needs_attention else {}


def made(family: str, kind: str) -> Any:
    model = tiny(family, **attention(kind))
    put_routers(model, kind, SETTINGS.get(f"{kind} {family}", SETTINGS.get(kind)))
    return model


@functools.cache
def in_use(family: str, kind: str) -> Any:
    """A model that no test changes. It has seen a batch in training, for routers that keep statistics of it."""
    model = made(family, kind).train()
    gradients(model)
    model.zero_grad()
    return model.eval()


def gradients(model: Any, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_router
@every_model
def test_a_saved_model_is_rebuilt_with_equal_logits_and_generates(family: str, kind: str, tmp_path: Path) -> None:
    model = in_use(family, kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **attention(kind)).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


@every_router
@every_model
def test_two_calls_in_use_are_equal(family: str, kind: str) -> None:
    model = in_use(family, kind)
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@every_router
@every_model
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_whole_forward(family: str, kind: str) -> None:
    if router_class(kind).looks_ahead:
        pytest.skip("its routes depend on later tokens and other rows")
    model = in_use(family, kind)
    whole = model(IDS, use_cache=False).logits
    out = model(IDS[:, :7], use_cache=True)
    parts = [out.logits]
    for position in range(7, 12):
        out = model(IDS[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@every_router
@every_model
@torch.no_grad()
def test_left_padding_does_not_change_a_row(family: str, kind: str) -> None:
    model, row = in_use(family, kind), IDS[:1, :8]
    padded, mask = torch.cat([torch.zeros_like(IDS[:1, :4]), row], 1), torch.ones(1, 12, dtype=torch.long)
    mask[:, :4] = 0
    if not router_class(kind).looks_ahead:  # then a second row does not matter either
        padded, mask = torch.cat([padded, IDS[1:]]), torch.cat([mask, torch.ones_like(mask)])
    alone = model(row).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:1, 4:], alone, atol=1e-5, rtol=1e-4)


@every_router
@every_model
def test_training_has_finite_gradients_which_checkpointing_does_not_change(family: str, kind: str) -> None:
    loss, plain = gradients(made(family, kind).train())
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in plain.values())
    assert any("experts" in name and gradient.any() for name, gradient in plain.items())
    model = made(family, kind).train()
    model.gradient_checkpointing_enable()
    again, checkpointed = gradients(model)
    torch.testing.assert_close(again, loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
