"""AdaMoE: null experts let each token choose how many true ones it runs (arXiv:2406.13233).

M null experts, which put out zero and cost nothing, stand behind the E true ones in a softmax top-k router with a
larger k; a token that picks some of them runs fewer experts, perhaps none at all:

    z = [W x ; W_null x]      p = softmax(z) over all E + M      picked: the k largest
    g_i = p_i / sum of the picked true p                         ("renormalised", of true experts only)

A token that picked nulls alone has no weight: the layer adds nothing, and shared experts still run. In perfect balance
k E / (E + M) true experts run per token. What drives the load there is a loss: `null` of `balancing.losses`, strong at
first and weak later. Without it the null rows learn nothing, for renormalising cancels their mass.

With the "coterie" experts implementation time falls with the load. transformers' grouped one still moves a row for each
null slot, which eats the gain.

Starting from a trained router, null rows are copies of its rows in turn, plus noise, so that ties have no fixed winner.
A model that applies probabilities as they are (OLMoE) keeps "raw" unless told otherwise: the nulls' mass then lowers
all its weights, and null rows learn from the task too.

Nulls are zero maps, the variant the paper evaluates. Identity maps are not offered: a router cannot add to the output.
"""

# T tokens, H hidden, E experts, M null experts, N = E + M, K slots per token

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.errors import UsageError
from coterie.routing.base import Combine, Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here

NOISE = 0.01  # of the spread of the copied rows: still there after rounding to bfloat16


@router("adamoe", paper="arXiv:2406.13233")
class AdaMoE(Router):
    """Softmax top-k over true and null experts."""

    class Settings(RouterSettings):
        """Parameters of the router with null experts.

        Parameters
        ----------
        top_k : int
            Slots per token, nulls among them; above that of the model without nulls (paper: 3 with 8 nulls for 2).
        nulls : int
            Null experts, M; 0: a plain top-k router.
        scale : float
            Times all weights.
        """

        combine: Combine = "renormalised"
        nulls: int = Field(default=8, ge=0)
        scale: float = Field(default=1.0, gt=0)

    rowless = ("null_weight",)

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))
        if self.settings.nulls:
            self.null_weight = nn.Parameter(torch.empty(self.settings.nulls, hidden, **self.how))

    @property
    def num_outputs(self) -> int:
        return self.num_experts + int(self.settings.nulls)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        weight_NH = torch.cat([self.weight, self.null_weight]) if self.settings.nulls else self.weight
        logits_TN = linear(x_TH, weight_NH)
        probability_TN = logits_TN.softmax(-1)
        index_TK = probability_TN.detach().topk(self.top_k, dim=-1).indices
        true_TK = index_TK < self.num_experts
        picked_TK = probability_TN.gather(-1, index_TK)
        if self.settings.combine == "renormalised":
            # The softmax's denominator cancels. Without it in the graph it does so exactly, and nulls get no gradient.
            logits_TK = logits_TN.gather(-1, index_TK)
            picked_TK = picked_TK.detach() * (logits_TK - logits_TK.detach()).exp()
        weight_TK = combined(picked_TK, self.settings.combine, true_TK) * self.settings.scale
        return Routing(logits_TN, probability_TN, index_TK, weight_TK, self.num_experts, self.settings.combine)

    def dial(self, **values: Any) -> None:
        if values.get("nulls", self.settings.nulls) != self.settings.nulls:
            raise UsageError("the number of null experts is fixed once a router is made")
        super().dial(**values)

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        self.weight.copy_(weight_EH)
        if self.settings.nulls:
            turn_M = torch.arange(self.settings.nulls, device=weight_EH.device) % self.num_experts
            copy_MH = weight_EH[turn_M].float()
            spread = NOISE * weight_EH.float().std()
            self.null_weight.copy_(copy_MH + spread * torch.randn_like(copy_MH))
        return True
