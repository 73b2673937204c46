"""Floating-point operations of a model per token, from its modules and from what its routers really did.

    forward  = 2 (weights of linear layers, routers and shared routing modules)
             + 2 (weights of one expert) * experts that a token of the layer ran
             + 4 heads * head size * tokens attended to                    (scores and weighted values)
    training = 3 * forward                                                 (a backward pass costs two forwards)

Norms, activations, rotary positions and the embedding's look-up are left out: they are no matrix products. Recomputed
forwards (gradient checkpointing) count as they are: training is then 4 forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from coterie.anatomy import any_moe_layers
from coterie.routing.base import Router
from coterie.routing.record import SHARED


def forward_flops(model: nn.Module, length: int, slots: Mapping[int, float] | None = None) -> float:
    """Of one token in a sequence of `length`, causal.

    slots : experts per token of each MoE layer, measured; else as many as its router has slots.
    """
    layers = any_moe_layers(model)
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    routed = 0.0
    for layer in layers:
        ran = layer.active_experts if slots is None or layer.index not in slots else slots[layer.index]
        routed += 2 * layer.bank.parameters_per_expert * ran
        inside = sum(m.weight.numel() for m in layer.router.modules() if isinstance(m, nn.Linear))
        weights += sum(p.numel() for p in layer.router.parameters()) - inside
        if isinstance(layer.router, Router):
            weights += sum(b.numel() for b in layer.router.buffers() if b.dim() > 1 and b.is_floating_point())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == SHARED:  # each layer with such a router runs them once
            for kind, shared in module.named_children():
                users = sum(isinstance(layer.router, Router) and layer.router.kind == kind for layer in layers)
                weights += users * sum(p.numel() for p in shared.parameters())
    attended = (length + 1) / 2
    window = getattr(config, "sliding_window", None)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    spans = [min(attended, window) if window and kind == "sliding_attention" else attended for kind in kinds]
    return 2 * weights + routed + 4 * heads * size * sum(spans)


def training_flops(
    model: nn.Module, length: int, slots: Mapping[int, float] | None = None, *, checkpointed: bool = False
) -> float:
    """Of one token in training."""
    return (4 if checkpointed else 3) * forward_flops(model, length, slots)
