"""Expert choice: experts pick their tokens instead of tokens their experts (arXiv:2202.09368).

    P = softmax(W x) over experts          each expert picks the C tokens with its highest P          weights P
    C = round(T k / E)                     T tokens without padding, k experts per token on average

Loads are equal by construction, and a token runs as many experts as picked it, none perhaps.

Not causal: whether an expert picks a token depends on the others in the batch, later ones among them. A model trained
so has seen its future, its training loss is too good, and it cannot generate as it was trained: token by token, C is
another and the competition is gone. It is here as the baseline it is in the literature, for encoders and for measuring
balance.
`pool="sequence"` lets tokens compete within their row alone, so that rows do not depend on each other.

The paper's variant with an upper bound on experts per token is not offered.
"""

# T = B * L tokens, H hidden, E experts, C tokens per expert, K experts per token: as many as the token with most has

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.routing.base import Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.sets import at, slots


@router("expert-choice", paper="arXiv:2202.09368")
class ExpertChoice(Router):
    """Experts pick the tokens they like best."""

    class Settings(RouterSettings):
        """Parameters of expert choice.

        Parameters
        ----------
        top_k : int
            Experts per token on average.
        pool : str
            What an expert picks from: all tokens of the "batch", or those of each "sequence" apart.
        """

        pool: Literal["batch", "sequence"] = "batch"

    looks_ahead = True

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        T, E = len(x_TH), self.num_experts
        logits_TE = linear(x_TH, self.weight)
        probability_TE = logits_TE.softmax(-1)
        B, L = here.rows(T) if self.settings.pool == "sequence" else (1, T)
        real_BL1 = torch.ones_like(probability_TE[:, :1], dtype=torch.bool) if here.mask_T is None else here.mask_T
        real_BL1 = real_BL1.view(B, L, 1)
        score_BLE = probability_TE.detach().view(B, L, E).masked_fill(~real_BL1, -1.0)
        C_B11 = (real_BL1.sum(1, keepdim=True) * self.top_k / E).round().clamp(min=1).long()
        token_BCE = score_BLE.topk(int(C_B11.max()), dim=1).indices
        take_BCE = torch.arange(token_BCE.shape[1], device=x_TH.device)[:, None].expand_as(token_BCE) < C_B11
        chosen_BLE = torch.zeros_like(score_BLE, dtype=torch.bool).scatter(1, token_BCE, take_BCE)
        chosen_TE = (chosen_BLE & real_BL1).view(T, E)
        index_TK = slots(chosen_TE, probability_TE)
        weight_TK = combined(at(probability_TE, index_TK), self.settings.combine, index_TK < E)
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, E, self.settings.combine)

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        self.weight.copy_(weight_EH)
        return True
