"""Ways to call a model that must all give the same: whole, token by token, padded, checkpointed. Shared by tests of
routers and residual rules that look beyond one token or one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import moe_layers
from coterie.routing.base import Routing
from coterie.routing.record import Record, listening


class Rows:
    """Counts what enters the experts."""

    def __init__(self) -> None:
        self.rows = 0

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        return True

    def expert(self, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> None:
        self.rows += len(x_RH)

    def combined(self, sum_TH: Tensor) -> None:
        pass


def whole(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, position_ids=positions(mask)).logits


def positions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)


def stepwise(model: Any, ids: Tensor, mask: Tensor | None = None, chunks: Sequence[int] = (5, 1, 2)) -> Tensor:
    """Logits of a prefill and further calls with its cache: chunks tokens each, then one each."""
    found, cache, done = [], None, 0
    sizes = [*chunks, *[1] * (ids.shape[1] - sum(chunks))]
    for size in sizes:
        end = done + size
        place = None if mask is None else positions(mask)[:, done:end]
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad():
            out = model(ids[:, done:end], attention_mask=seen, position_ids=place, past_key_values=cache)
        found.append(out.logits)
        cache, done = out.past_key_values, end
    return torch.cat(found, 1)


def left_padded(ids: Tensor, pads: Sequence[int]) -> Tensor:
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return mask


def right_padded(ids: Tensor, pads: Sequence[int]) -> Tensor:
    return left_padded(ids, pads).flip(1)


def recorded(model: Any, ids: Tensor, **more: Any) -> Record:
    """The record of one call."""
    seen: list[Record] = []
    with listening(model, seen.append):
        model(ids, **{"use_cache": False, **more})
    return seen[0]


def routings(model: Any, ids: Tensor, **more: Any) -> dict[int, Routing]:
    return recorded(model, ids, **more).routings


def without_experts(model: Any) -> None:
    """From now on experts add nothing and give no gradient: hidden states do not depend on routers any more."""
    for layer in moe_layers(model):
        layer.experts.register_forward_hook(lambda m, a, out: torch.zeros_like(out))


def gradients(
    model: Any, ids: Tensor, mask: Tensor | None = None, *, checkpointed: bool = False, use_cache: bool | None = False
) -> dict[str, Tensor]:
    """Of the language loss in training, by parameter."""
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    try:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=use_cache).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def assert_same_gradients(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
