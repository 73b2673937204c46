"""What neurons do and weigh: statistics per neuron of every expert, without gradients.

They are not among the named observers of `coterie profile`: a table of experts by neurons is as large as a few layers'
norms are small, and only slimming reads it.
"""

# E experts, I neurons of an expert, R rows routed to one expert

from __future__ import annotations

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.profiling.observers import LayerShape, Observer


class NeuronActivation(Observer):
    """activation_sum_EI: sum over routed tokens of |h_j|, what the down projection receives. count_E: those tokens."""

    fields = {"activation_sum_EI": "sum", "count_E": "sum"}
    watches_inner = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.activation_sum_EI = torch.zeros(shape.experts, shape.intermediate, dtype=torch.float64)
        self.count_E = torch.zeros(shape.experts, dtype=torch.int64)

    def see_inner(self, expert: int, inner_RI: Tensor) -> None:
        self.activation_sum_EI[expert] += inner_RI.float().abs().sum(0, dtype=torch.float64).cpu()
        self.count_E[expert] += len(inner_RI)


def magnitudes(layer: MoELayer) -> Tensor:
    """|gate row| * |up row| * |down column| of every neuron of a layer in memory. Shape [E, I], float64.

    Biases are part of their rows. The product does not change when a neuron is rescaled between its projections, as its
    function does not.
    """
    rows = []
    for expert in range(layer.num_experts):
        weights = layer.bank.read(expert)
        size_I = weights.down_HI.double().norm(dim=0)
        for row_IH, bias_I in ((weights.gate_IH, weights.gate_bias_I), (weights.up_IH, weights.up_bias_I)):
            if row_IH is not None:
                square_I = row_IH.double().square().sum(1)
                size_I *= (square_I if bias_I is None else square_I + bias_I.double().square()).sqrt()
        rows.append(size_I.cpu())
    return torch.stack(rows)
