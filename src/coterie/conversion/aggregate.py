"""Aggregation of experts: one model with the experts of several (Z-code M3, arXiv:2109.10465).

    what is no expert      weighted mean of the models
    routers                rows one below the other, in the order of the models
    experts                all, in the same order, bit for bit
    optimizer              starts anew

Two checkpoints of one run, or of runs on other text, give a warm start for a model of twice the experts. Of a model
with itself, two twins share a token's softmax: with top-1 and raw weights its experts' output is halved
(`renormalise_twins` doubles it); with renormalised weights and 2 K experts per token it stays.
"""

# E experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import moe_layers
from coterie.conversion.rebuild import built, router_rows, state, with_experts
from coterie.errors import ModelError, UsageError


@torch.no_grad()
def aggregate(
    models: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    noise: float = 0.0,
    renormalise_twins: bool = False,
    seed: int = 0,
) -> Any:
    """A new model with all experts of `models`.

    Parameters
    ----------
    models : at least two, of the same architecture and sizes; only the number of experts may differ.
    weights : of the mean of everything else, one for each; None: equal.
    noise : standard deviation, relative to each tensor's, of what is added to the experts of all models but the first:
        a model aggregated with itself needs it, or twins stay alike.
    renormalise_twins : multiply outputs of experts with the number of models: for copies of one model.

    Raises UsageError for fewer than two models or wrong weights, ModelError for models that differ. Peak memory: all.
    """
    if len(models) < 2:
        raise UsageError("aggregation takes at least two models")
    share = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(share) != len(models) or any(w < 0 for w in share) or abs(sum(share) - 1) > 1e-6:
        raise UsageError(f"weights {share} are not {len(models)} shares that sum to one")
    first = models[0]
    states, rows, layers = [state(m) for m in models], router_rows(first), [moe_layers(m) for m in models]
    _alike(models, states, rows, layers)
    config = with_experts(first, sum(found[0].num_experts for found in layers))

    def tensor(name: str, target: Tensor) -> Tensor | None:
        if any(name.startswith(f"{layer.experts_name}.") for layer in layers[0]):
            return None
        values = [known[name] for known in states]
        if name in rows:
            return torch.cat(values, rows[name])
        if not target.is_floating_point():
            return values[0]
        mean = torch.zeros_like(values[0], dtype=torch.float32)
        for w, value in zip(share, values, strict=True):
            mean += w * value.float()
        return mean.to(target.dtype)

    made = built(first, config, tensor)
    generator = torch.Generator().manual_seed(seed)
    for position, new in enumerate(moe_layers(made)):
        names = [name for name, _ in new.experts.named_parameters(recurse=False)]
        for name in names:
            parts = []
            for number, found in enumerate(layers):
                part = getattr(found[position].experts, name).detach()
                if noise and number:
                    draw = torch.randn(part.shape, generator=generator).to(part)
                    part = part + noise * part.float().std().to(part) * draw
                parts.append(part)
            joined = torch.cat(parts)
            if renormalise_twins and name.startswith("down_proj"):
                joined = joined * len(models)
            getattr(new.experts, name).copy_(joined)
    return made


def _alike(models: Sequence[Any], states: Sequence[Any], rows: Any, layers: Any) -> None:
    for number, (model, known) in enumerate(zip(models, states, strict=True)):
        if type(model) is not type(models[0]) or known.keys() != states[0].keys():
            raise ModelError(f"model {number} is not of the architecture of the first ({type(models[0]).__name__})")
        for name, value in known.items():
            there = list(states[0][name].shape)
            own = list(value.shape)
            expert = any(name.startswith(f"{layer.experts_name}.") for layer in layers[0])
            if name in rows or expert:
                axis = rows.get(name, 0)
                own[axis] = there[axis]
            if own != there:
                raise ModelError(f"{name} is {list(value.shape)} in model {number} and {there} in the first")
