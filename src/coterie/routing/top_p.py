"""Top-p routing: each token runs the smallest set of experts whose probabilities reach p (arXiv:2403.07652).

    P = softmax(W x)         t = the least number of largest P whose sum is >= p         picked: the t largest

The expert that crosses p is among them, so that there is always one. Weights are the probabilities as they are, between
p and 1 in sum; a model that was trained with weights that sum to one needs combine="renormalised" to keep its scale.
p is the same in training and in use. p = 1 runs all experts, p near 0 the likeliest alone.

A model can run fewer experts only if its router is sure, so training adds the entropy of P, `terms["entropy"]`, times
1e-4, to a balance loss times 1e-2. The number of experts is found in float32, with >= as in the paper's formula, where
its code has >.
"""

# T tokens, H hidden, E experts, K experts per token: as many as the token with the largest set runs

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.routing.base import Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.sets import at


@router("top-p", paper="arXiv:2403.07652")
class TopP(Router):
    """The smallest set of likely experts that reaches p."""

    class Settings(RouterSettings):
        """Parameters of the top-p router.

        Parameters
        ----------
        p : float, above 0, to 1
            Probability that a token's experts reach together.
        most : int, optional
            A token runs no more experts than this; None: all it takes.
        """

        # the number of experts floats: this one is not for users, who say p and most
        top_k: int = Field(default=1, ge=1, exclude=True, repr=False)
        p: float = Field(default=0.4, gt=0, le=1)
        most: int | None = Field(default=None, ge=1)

        @model_validator(mode="after")
        def _floats(self) -> Any:
            if "top_k" in self.model_fields_set:
                raise ValueError("top-p has no top_k, say p, and most for an upper limit")
            return self

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))

    @property
    def top_k(self) -> int:
        return min(self.settings.most or self.num_experts, self.num_experts)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        logits_TE = linear(x_TH, self.weight)
        log_TE = logits_TE.log_softmax(-1)
        probability_TE = log_TE.exp()
        index_TK = smallest(probability_TE.detach(), self.settings.p, self.top_k)
        real_TK = index_TK < self.num_experts
        weight_TK = combined(at(probability_TE, index_TK), self.settings.combine, real_TK)
        found = Routing(logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)
        found.mask_T = here.mask_T
        found.terms["entropy"] = found.mean(-(probability_TE * log_TE).sum(-1))
        return found

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        self.weight.copy_(weight_EH)
        return True


def smallest(probability_TE: Tensor, p: float, most: int) -> Tensor:
    """The fewest outputs that reach p, at most so many, likeliest first: [T, K], empty slots E."""
    E = probability_TE.shape[-1]
    sorted_TE, index_TE = probability_TE.sort(dim=-1, descending=True, stable=True)
    before_TE = sorted_TE.cumsum(-1).roll(1, dims=-1)  # what the likelier ones reach
    take_TE = before_TE < p if p < 1 else torch.ones_like(before_TE, dtype=torch.bool)
    take_TE[:, 0] = True
    take_TE[:, most:] = False
    return index_TE.masked_fill(~take_TE, E)[:, : int(take_TE.sum(-1).max())]
