"""Why merging two experts costs something: how far apart their outputs are, and how much their shares of a token vary.

Two experts with weights g_i, g_j put out g_i E_i + g_j E_j. Merged to a E_i + (1 - a) E_j they put out the same but for
(g_i + g_j) (r - a) (E_i - E_j), with r = g_i / (g_i + g_j). No constant a is right for all tokens unless r is the same
for all: what remains at best is the product of |E_i - E_j|^2 and the variance of r. A token that selects one of the two
has r = 1 or 0. `conflict` gives both for a cluster.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.profiling.observers import CoActivation, LayerShape, Observer, Routing
from coterie.profiling.profile import LayerProfile


class OutputGram(Observer):
    """output_gram_EE: sum of f_i(x) . f_j(x) over all tokens that enter the layer, routed to i and j or not."""

    fields = {"output_gram_EE": "sum"}
    watches_all = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_gram_EE = torch.zeros(shape.experts, shape.experts, dtype=torch.float64)

    def see_dense(self, y_ETH: Tensor) -> None:
        for part in torch.split(y_ETH, 16, dim=1):  # few at a time: they are widened to float64
            wide_EX = part.double().flatten(1)
            self.output_gram_EE += (wide_EX @ wide_EX.T).cpu()


class PairShare(Observer):
    """pair_share_EE: sum of r = g_i / (g_i + g_j) over the tokens that selected both i and j, g the applied weights.

    pair_share_square_EE: sum of r^2. Of how many tokens is CoActivation's to say.
    """

    fields = {"pair_share_EE": "sum", "pair_share_square_EE": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        E = shape.experts
        self.pair_share_EE, self.pair_share_square_EE = (torch.zeros(E, E, dtype=torch.float64) for _ in range(2))

    def see_routing(self, routing: Routing) -> None:
        E = self.shape.experts
        index_TK, weight_TK = routing.index_TK.clamp(max=E), routing.weight_TK.double()
        pair_TKK = index_TK[:, :, None] * (E + 1) + index_TK[:, None, :]
        sum_TKK = weight_TK[:, :, None] + weight_TK[:, None, :]
        share_TKK = torch.where(sum_TKK != 0, weight_TK[:, :, None] / sum_TKK, 0.5)
        for total_EE, power in ((self.pair_share_EE, 1), (self.pair_share_square_EE, 2)):
            added = torch.bincount(pair_TKK.flatten(), share_TKK.pow(power).flatten(), minlength=(E + 1) ** 2)
            total_EE += added.view(E + 1, E + 1)[:E, :E].cpu()


class Conflict(NamedTuple):
    """Means over the pairs of a cluster's experts; 0 for a cluster of one.

    distance : E |E_i - E_j|^2 over all tokens. variance : of r over the tokens that select i, j or both; 0 for a pair
        that no token selects.
    """

    distance: float
    variance: float


CONFLICT: tuple[type[Observer], ...] = (OutputGram, PairShare, CoActivation)  # what `conflict` reads


def conflict(layer: LayerProfile, members: Sequence[int]) -> Conflict:
    """What stands against merging `members`."""
    gram_EE, both_EE = layer.output_gram_EE, layer.coactivation_EE.double()
    distances, variances = [], []
    for i, j in itertools.combinations(members, 2):
        distances.append(max(float(gram_EE[i, i] + gram_EE[j, j] - 2 * gram_EE[i, j]), 0.0) / max(layer.tokens, 1))
        only_i = float(both_EE[i, i] - both_EE[i, j])
        tokens = max(only_i + float(both_EE[j, j]), 1.0)
        mean = (only_i + float(layer.pair_share_EE[i, j])) / tokens
        variances.append(max((only_i + float(layer.pair_share_square_EE[i, j])) / tokens - mean**2, 0.0))
    pairs = max(len(distances), 1)
    return Conflict(sum(distances) / pairs, sum(variances) / pairs)
