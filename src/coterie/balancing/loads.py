"""Loads: how many assignments each expert of a layer received, and figures that say how even they are.

For whoever balances, logs or judges routing. It knows indices and counts, no model: padding is left out by a mask, and
the index E ("no expert") is never counted. MaxVio is the figure of arXiv:2408.15664:

    MaxVio = max_i (load_i - mean load) / mean load        0 = perfectly balanced
"""

# Shapes: T tokens, E experts, K experts per token

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import UsageError


@dataclass(frozen=True)
class LoadFigures:
    """How even the loads of one layer are; every load is relative to what the expert should get.

    max_vio : largest relative load minus 1; 0 is perfect.
    min_load : smallest relative load; 1 is perfect, 0 a dead expert.
    cv : standard deviation of the relative loads (population).
    entropy : of the shares of the assignments, in nats; log(E) where all are equal.
    dead : share of the experts without any assignment.
    """

    max_vio: float
    min_load: float
    cv: float
    entropy: float
    dead: float


def count(index_TK: Tensor, experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Assignments to each expert. Shape [E] (leading dimensions of the index are kept: [..., T, K] -> [..., E]), int64.

    Parameters
    ----------
    index_TK : selected experts; the value `experts` stands for "none".
    mask_T : bool, [..., T], False where a token is padding.
    """
    index_TK = index_TK if mask_T is None else index_TK.masked_fill(~mask_T.bool().unsqueeze(-1), experts)
    slots = index_TK.flatten(-2).long()
    load = torch.zeros((*slots.shape[:-1], experts + 1), dtype=torch.int64, device=slots.device)
    return load.scatter_add_(-1, slots, torch.ones_like(slots))[..., :experts]


def target_loads(load_E: Tensor, target_E: Tensor | None = None) -> Tensor:
    """What each expert should have got of these assignments. Shape as `load_E`, float64.

    target_E : wanted loads at any scale (shares, weights, tokens); all equal where None.

    float64 because counts of a large global batch are no longer exact in float32.
    """
    load_E = load_E.double()
    if target_E is None:
        return load_E.mean(-1, keepdim=True).expand_as(load_E)
    target_E = target_E.double()
    if target_E.shape[-1] != load_E.shape[-1]:
        raise UsageError(
            f"{target_E.shape[-1]} target loads for {load_E.shape[-1]} experts", "Give one for each expert."
        )
    if not bool((target_E >= 0).all() and (target_E.sum(-1) > 0).all()):
        raise UsageError(f"target loads {target_E.tolist()} are negative or all zero", "Give the wanted share of each.")
    return load_E.sum(-1, keepdim=True) * target_E / target_E.sum(-1, keepdim=True)


def load_figures(load_E: Tensor, target_E: Tensor | None = None) -> LoadFigures:
    """MaxVio and its companions for one layer.

    Parameters
    ----------
    load_E : assignments of each expert, [E].
    target_E : wanted loads at any scale, all positive; all equal where None.

    Raises UsageError where nothing was assigned at all, or an expert is wanted to get nothing.
    """
    total = float(load_E.sum())
    if load_E.ndim != 1 or total <= 0:
        raise UsageError(f"no loads to judge: shape {list(load_E.shape)}, {total:g} assignments in all")
    wanted_E = target_loads(load_E, target_E)
    if not bool((wanted_E > 0).all()):
        raise UsageError("an expert with target load 0 has no relative load", "Leave it out of the figures.")
    relative_E, share_E = load_E.double() / wanted_E, load_E.double() / total
    return LoadFigures(
        max_vio=float(relative_E.max()) - 1,
        min_load=float(relative_E.min()),
        cv=float(relative_E.std(correction=0)),
        entropy=float(-torch.special.xlogy(share_E, share_E).sum()),
        dead=float((load_E == 0).double().mean()),
    )
