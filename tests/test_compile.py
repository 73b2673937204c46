"""The decoder under torch.compile: what cannot be traced runs as it is, and losses and gradients stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "initializer_range": 0.1,
    "balancing": [{"name": "switch"}],
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 64
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def step(model: Any, call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = call(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "router",
    [{"kind": "adamoe", "top_k": 3, "nulls": 4}, {"kind": "rmoe", "size": 16}],
    ids=lambda router: router["kind"],
)
def test_a_compiled_decoder_has_the_same_loss_and_gradients(router: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CoterieForCausalLM(CoterieConfig(**SIZES, router=router)).train()
    loss, gradients = step(model, model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):  # traced, and then called again
        again, found = step(model, compiled)
        torch.testing.assert_close(again, loss, atol=1e-6, rtol=0)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
