"""What routers that pick by a score share, wherever their logits z come from.

    gate "softmax"    s = softmax(z)      p = s
    gate "sigmoid"    s = sigmoid(z)      p = s / sum of s          (DeepSeek-V3, arXiv:2412.19437)
    picked            the k largest of s + b, within each token's best groups; b serves balancing alone
    weights           s of the picked ones, raw or divided by their sum, times `scale`

How good a group is: its best expert (softmax), or its two best together (sigmoid).
"""

# T tokens, E experts, K experts per token

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.routing.base import Combine, RouterSettings, Routing, combined
from coterie.routing.top_k import Grouped, Linear


class ScoredSettings(Grouped):
    """Of routers that pick by a score.

    Parameters
    ----------
    combine : str
        As of all routers; here by default "renormalised".
    gate : str
        "softmax": experts compete; "sigmoid": each has a score of its own.
    """

    combine: Combine = "renormalised"
    gate: Literal["softmax", "sigmoid"] = "softmax"


class Scored(Linear):
    """Base of these routers. `weight` : one row per expert, of `columns` numbers."""

    Settings = ScoredSettings

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.group_best = 2 if self.settings.gate == "sigmoid" else 1
        if self.columns != hidden:
            self.weight = nn.Parameter(torch.empty(experts, self.columns, **self.how))

    @property
    def columns(self) -> int:
        """Of what the logits are a product with: here of the hidden states."""
        return self.hidden_dim

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid() if self.settings.gate == "sigmoid" else logits_TE.softmax(-1)

    def decide(self, logits_TE: Tensor, score_TE: Tensor) -> Routing:
        """Pick by these scores."""
        index_TK = self.picked(score_TE)
        weight_TK = combined(score_TE.gather(-1, index_TK), self.settings.combine) * self.settings.scale
        probability_TE = score_TE
        if self.settings.gate == "sigmoid":
            probability_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)
