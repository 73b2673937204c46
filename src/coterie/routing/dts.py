"""The dense-to-sparse gate of EvoMoE: Gumbel-softmax over a threshold, with a falling temperature (arXiv:2112.14397).

    l = W x                                    z_i = -log(-log u_i), u_i uniform, in training
    q = softmax((l + z) / tau)                 picked: q_i > c, and the largest always
    weights                                    softmax(l)_i ("softmax") or q_i ("gumbel"), as they are

At a high tau all q are nearly equal and every expert runs; as tau falls, more of them sink below c, token by token.
From the hard switch on the largest q alone are picked, 1 as in the paper or `top_k` of them: an ordinary router. A
schedule dials `tau` (paper: from 2.0 to 0.3) and `hard`. "softmax" weights are the default, as in the authors' code:
they are those of a model in use, where q would be sharper.

A model in use has no noise. It picks the `top_k` largest softmax(l) with these as weights; use="soft" has the threshold
on softmax(l / tau) instead, until the hard switch.

terms["balance"] is the paper's balance loss, on what is left after the threshold,
E sum_i mean_t(w_ti) mean_t(picked_ti): 1 in balance with one expert of weight 1 per token, more the more experts run.

The authors' code draws noise in use with gumbel weights, and drops tokens; this does neither.
"""

# T tokens, H hidden, E experts, K experts per token: as many as the token with the largest set runs

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.routing.base import Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.sets import at, slots


@router("dts", paper="arXiv:2112.14397")
class DenseToSparseGate(Router):
    """Gumbel-softmax above a threshold."""

    class Settings(RouterSettings):
        """Parameters of the dense-to-sparse gate.

        Parameters
        ----------
        top_k : int
            Experts per token after the hard switch, and in use.
        tau : float, > 0
            Temperature; schedules lower it.
        threshold : float, 0 to 1
            c, what q has to exceed.
        weights : str
            "softmax" or "gumbel".
        hard : bool
            The hard switch.
        use : str
            What a model in use picks before the switch: "hard", as after it, or "soft", by the threshold.
        """

        tau: float = Field(default=2.0, gt=0)
        threshold: float = Field(default=0.001, ge=0, lt=1)
        weights: Literal["softmax", "gumbel"] = "softmax"
        hard: bool = False
        use: Literal["hard", "soft"] = "hard"

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        told, E = self.settings, self.num_experts
        logits_TE = linear(x_TH, self.weight)
        probability_TE = logits_TE.softmax(-1)
        noisy_TE = logits_TE + gumbel(logits_TE) if self.training else logits_TE
        q_TE = (noisy_TE / told.tau).softmax(-1)
        if told.hard or (told.use == "hard" and not self.training):
            index_TK = noisy_TE.detach().topk(self.top_k, dim=-1).indices
        else:
            chosen_TE = q_TE > told.threshold
            chosen_TE.scatter_(-1, noisy_TE.argmax(-1, keepdim=True), True)
            index_TK = slots(chosen_TE, noisy_TE)
        gumbel_weights = told.weights == "gumbel" and self.training
        weight_TK = combined(at(q_TE if gumbel_weights else probability_TE, index_TK), told.combine, index_TK < E)
        found = Routing(logits_TE, probability_TE, index_TK, weight_TK, E, told.combine, here.mask_T)
        share_TE = weight_TK.new_zeros(len(x_TH), E + 1).scatter_add(-1, index_TK, weight_TK)[:, :E]
        found.terms["balance"] = E * (found.mean(share_TE) * found.mean(found.chosen_TN())).sum()
        return found

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        self.weight.copy_(weight_EH)
        return True


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise, from torch's generator; finite."""
    uniform = torch.rand_like(like).clamp(min=torch.finfo(like.dtype).tiny)
    return -torch.log(-torch.log(uniform))
