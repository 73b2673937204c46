"""COMET: soft trees that become hard, so that a token ends with at most k experts, by back-propagation alone.

"COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search" (arXiv:2306.02824). For small
mixtures that have to be trained well: there is no top-k that cuts gradients off. Training starts dense, every expert
running, and becomes sparse when nodes leave the band of the smooth step S; k trees of one shape, an expert per leaf:

    h_iq = S(w_iq x + c_iq)              probability of going left at node q of tree i
    p_il                                 that of leaf l: the product along its path, exactly 0 behind a closed edge
    G_il = p_il exp(a_il x + e_il) / sum over all i', l' of the same              one softmax over all k n leaves
    g_l  = sum_i G_il                                                             weights, >= 0, of sum 1

The regulariser drives nodes out of the band; it is the term "entropy" (balancing term "router", key "entropy"):

    mean over tokens of sum_i sum_l -p_il log(p_il + 1e-6)

with p before weighting. No balance loss is meant to be used: it would pull against this one. If gamma is small against
w x, nodes are closed when training begins and never move again; `open_nodes` tells how many still can. Both gamma and
the weight of the term decide: watch the experts per token in training.

Leaf l is expert l, from left to right. The permutation that the paper learns is not this router's business: it stands
around any router (`permuted`).
"""

# T tokens, H hidden, K trees, Q inner nodes of a tree (E - 1), E experts, one for each leaf

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.errors import UsageError
from coterie.routing.base import Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.sets import at, slots
from coterie.routing.trees import leaves, saturation

SPREAD = 0.05  # of fresh weights of leaves, evenly between minus and plus this
CENTRE = 0.01  # the same for nodes, in units of gamma


class Gated(Router):
    """What gates whose weights become sparse share: from dense weights to slots."""

    def sparse(self, weight_TE: Tensor, terms: dict[str, Tensor]) -> Routing:
        """Every expert with a weight gets a slot: as many slots as the token with the most of them needs."""
        index_TK = slots(weight_TE > 0, weight_TE)
        total_T1 = weight_TE.sum(-1, keepdim=True)
        probability_TE = weight_TE / torch.where(total_T1 > 0, total_T1, 1.0)
        logits_TE = probability_TE.clamp(min=torch.finfo(torch.float32).tiny).log()
        weight_TK = combined(at(weight_TE, index_TK), self.settings.combine, index_TK < self.num_experts)
        return Routing(
            logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine, terms=terms
        )

    def mean(self, value_T: Tensor, here: Here) -> Tensor:
        """Mean over the tokens that are no padding."""
        mask_T = here.mask_T
        if mask_T is None:
            return value_T.mean()
        return (value_T * mask_T).sum() / mask_T.sum().clamp(min=1)


@router("comet", paper="arXiv:2306.02824")
class Comet(Gated):
    """Differentiable trees, dense at first and at most k experts in the end."""

    class Settings(RouterSettings):
        """Parameters of the tree router.

        Parameters
        ----------
        top_k : int, >= 1
            Trees, and so the most experts of a token once its nodes are closed; until then it may run all.
        gamma : float, > 0
            Width of the band in which a node is open, about the spread of w x. The paper's go from 0.001 to 10.
        """

        gamma: float = Field(default=1.0, gt=0)

    unsliceable = "decides along the branches of trees that have all experts as leaves"
    not_per_expert = ("node_weight", "node_bias", "leaf_weight", "leaf_bias")

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        K, E = self.top_k, experts
        if E < 2:
            raise UsageError(f"a tree needs two experts to decide between, layer {self.layer} has {E}")
        self.node_weight = nn.Parameter(torch.empty(K * (E - 1), hidden, **self.how))
        self.node_bias = nn.Parameter(torch.empty(K * (E - 1), **self.how))
        self.leaf_weight = nn.Parameter(torch.empty(K * E, hidden, **self.how))
        self.leaf_bias = nn.Parameter(torch.empty(K * E, **self.how))

    def nodes(self, x_TH: Tensor) -> Tensor:
        """Scores of all nodes, [T, K, Q]."""
        return linear(x_TH, self.node_weight, self.node_bias).view(len(x_TH), self.top_k, -1)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        p_TKE = leaves(self.nodes(x_TH), self.settings.gamma)
        score_TKE = linear(x_TH, self.leaf_weight, self.leaf_bias).view(p_TKE.shape)
        terms = {"entropy": self.mean(saturation(p_TKE), here)}
        return self.sparse(mixed(p_TKE, score_TKE), terms)

    @torch.no_grad()
    def open_nodes(self, x_TH: Tensor) -> float:
        """Share of decisions that are not made yet: nodes within their band, over all tokens, trees and nodes."""
        return float((self.nodes(x_TH).abs() < self.settings.gamma / 2).float().mean())

    def dial(self, **values: Any) -> None:
        if values.get("top_k", self.top_k) != self.top_k:
            raise UsageError("the number of trees is fixed once a router is made")
        super().dial(**values)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        """The paper's: nodes near the middle of their band, small leaves. `std` does not matter."""
        for parameter in (self.node_weight, self.node_bias):
            parameter.uniform_(-CENTRE * self.settings.gamma, CENTRE * self.settings.gamma)
        for parameter in (self.leaf_weight, self.leaf_bias):
            parameter.uniform_(-SPREAD, SPREAD)


def mixed(p_TKE: Tensor, score_TKE: Tensor) -> Tensor:
    """g, [T, E]: one softmax over the leaves of all trees, each counted p times, summed over trees."""
    open_TKE = p_TKE > 0
    log_TKE = torch.where(open_TKE, p_TKE, 1.0).log()  # the inner choice keeps 1 / 0 out of the gradient
    logits_TKE = (score_TKE + log_TKE).masked_fill(~open_TKE, -torch.inf)
    return logits_TKE.flatten(-2).softmax(-1).view(p_TKE.shape).sum(-2)
