"""The sigmoid router of DeepSeek-V3 (arXiv:2412.19437): independent scores, a selection bias, groups.

    s = sigmoid(W x)              picked: the k largest of s + b, within the best groups
    weights                       s of the picked ones, times scale; divided by their sum ("renormalised") or not

A group is as good as the sum of its two best s + b. b never enters a weight.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

from torch import Tensor

from coterie.routing.base import Combine, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.top_k import Grouped, Linear


@router("sigmoid", paper="arXiv:2412.19437")
class Sigmoid(Linear):
    """Independent sigmoid scores with a balancing bias."""

    class Settings(Grouped):
        """Parameters of the sigmoid router; the defaults are DeepSeek-V3's, but for the scale."""

        combine: Combine = "renormalised"
        bias: bool = True

    group_best = 2

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        logits_TE = linear(x_TH, self.weight)
        score_TE = logits_TE.sigmoid()
        index_TK = self.picked(score_TE)
        weight_TK = combined(score_TE.gather(-1, index_TK), self.settings.combine) * self.settings.scale
        probability_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)
