"""The router of SMoE-Dropout: random, linear, never trained, while k grows with training (arXiv:2303.01610).

    r = R x + c           picked: the k largest r           weights: softmax over the picked r ("renormalised")

R and c are drawn once, as torch draws a linear layer, and frozen. Which experts a token runs still changes in training,
because x is learned. A model trained with k rising from E / 2 to E can afterwards run at any k: `dial(top_k=...)`, in
all layers. There is no balance loss: nothing here could learn from it.

R and c are buffers: saved with the model, never in an optimizer, so that weight decay cannot shrink them.

Freezing a trained router instead is another method and not offered here.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from coterie.routing.base import Combine, Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here


@router("random", paper="arXiv:2303.01610")
class RandomFrozen(Router):
    """A frozen random linear router."""

    class Settings(RouterSettings):
        """Parameters of the frozen random router.

        Parameters
        ----------
        top_k : int
            Experts per token now; schedules raise it.
        """

        combine: Combine = "renormalised"

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Buffer(torch.empty(experts, hidden, **self.how))
        self.bias = nn.Buffer(torch.empty(experts, **self.how))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        logits_TE = linear(x_TH, self.weight, self.bias)
        probability_TE = logits_TE.softmax(-1)
        index_TK = logits_TE.detach().topk(self.top_k, dim=-1).indices
        weight_TK = combined(probability_TE.gather(-1, index_TK), self.settings.combine)
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        """Fresh numbers, as torch draws a linear layer; std is not used."""
        bound = 1 / math.sqrt(self.hidden_dim)
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)
