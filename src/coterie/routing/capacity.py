"""Capacity: an expert takes so many tokens and no more; who stays out is drawn, or decided by order or probability.

    C = max(ceil(n / E * factor), minimum)      n slots that hold an expert, padding apart: T K with a top-k router,
                                                fewer with null experts or sets of any size
    random       every token of an overfull expert is kept with probability C / n_e, wherever it stands (Random Token
                 Selection, arXiv:2109.10465): the first C of a fresh random order of its tokens
    position     the first C in the order of the batch (GShard, Switch): late tokens lose
    probability  the C with the highest weights

A dropped slot is "no expert": it costs nothing and adds nothing. The choice of experts is never changed, only who gets
in. Second choices queue behind all first choices, except by probability. What is dropped does not change the losses
that balance, for these count what was chosen. With "random", a model in use (not in training) drops by position, so
that it gives the same answer twice. A capacity ties tokens to each other: what a token gets depends on its batch, and
on how much of a text comes in one call. Without one nothing is dropped; that is the default everywhere.

Of the weights that are left, nothing is renormalised, as in Switch.
"""

# T tokens, K slots per token, E experts, S = T*K slots

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from coterie.routing.base import Routing


class Capacity(BaseModel):
    """How many tokens an expert takes.

    Parameters
    ----------
    factor : float, > 0
        Tokens per expert in training, in units of its fair share.
    eval_factor : float, > 0
        The same for a model in use.
    policy : str
        Who stays out of an overfull expert: "random" (in training only), "position" or "probability".
    minimum : int, >= 1
        Least capacity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(default=1.0, gt=0)
    eval_factor: float = Field(default=2.0, gt=0)
    policy: Literal["random", "position", "probability"] = "random"
    minimum: int = Field(default=4, ge=1)

    def size(self, slots: int, experts: int, *, training: bool) -> int:
        """C. slots : how many hold an expert."""
        factor = self.factor if training else self.eval_factor
        return max(math.ceil(slots / experts * factor), self.minimum)

    def kept(self, routing: Routing, *, training: bool) -> Tensor:
        """Which slots [T, K] have a place. Slots of padding and slots without an expert take none."""
        index_TK = routing.index_TK
        T, K = index_TK.shape
        real_TK = index_TK < routing.experts
        if routing.mask_T is not None:
            real_TK = real_TK & routing.mask_T[:, None]
        C = self.size(int(real_TK.sum()), routing.experts, training=training)
        # a slot's place in its expert's queue: all first choices before all second ones
        expert_S = index_TK.masked_fill(~real_TK, routing.experts).T.reshape(-1)
        if self.policy == "probability":
            before_S = torch.argsort(routing.weight_TK.detach().T.reshape(-1), descending=True, stable=True)
        elif self.policy == "random" and training:
            rank_KT = torch.rand(K, T, device=index_TK.device).argsort(-1)
            before_S = (rank_KT + torch.arange(K, device=index_TK.device)[:, None] * T).reshape(-1)
        else:
            before_S = torch.arange(T * K, device=index_TK.device)
        queue_S = before_S[torch.argsort(expert_S[before_S], stable=True)]
        sorted_S = expert_S[queue_S]
        place_S = torch.arange(T * K, device=index_TK.device) - torch.searchsorted(sorted_S, sorted_S)
        kept_S = torch.zeros(T * K, dtype=torch.bool, device=index_TK.device)
        kept_S[queue_S] = (place_S < C) & (sorted_S < routing.experts)
        return kept_S.view(K, T).T
