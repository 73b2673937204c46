"""Logits of a streamed model: its own head, scaling and caps, put onto hidden states that a sweep has left."""

# B batch, L sequence, H hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from coterie.streaming.model import StreamedModel


class _AnyOutput(MoeModelOutputWithPast):  # type: ignore[misc]
    """The base model's output with a given hidden state; whatever else a family looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits(streamed: StreamedModel, hidden_BLH: Tensor) -> Tensor:
    """What the model's own head makes of hidden states: [B, L, V] float32, with the family's scaling and caps.

    The head must be loaded (`load_head`). The whole model's forward runs with its base replaced by the given states.
    """
    base = streamed.model.base_model
    original = base.forward
    base.forward = lambda *args, **kwargs: _AnyOutput(last_hidden_state=hidden_BLH)
    try:
        dummy = torch.zeros(hidden_BLH.shape[:2], dtype=torch.int64, device=hidden_BLH.device)
        with torch.no_grad():
            result: Tensor = streamed.model(input_ids=dummy, use_cache=False).logits
    finally:
        base.forward = original
    return result.float()
