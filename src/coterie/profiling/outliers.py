"""Outliers in the weights of experts: one column far above its own mean (QuantMoE-Bench, arXiv:2406.08155).

    score(W) = max over inputs j of ( max_i |W_ij| / mean_i |W_ij| ),  W [outputs i, inputs j]

At least 1; 1 where every column has one magnitude. Scaling W changes nothing, nor does the order of its rows. A look at
weights alone: no text passes.
"""

# E experts, J matrices of an expert (gate, up, down), O outputs and I inputs of a matrix

from __future__ import annotations

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.profiling.observers import LayerShape, Observer

MATRICES = ("gate", "up", "down")


def outlier_score(w_OI: Tensor) -> float:
    """The score of one matrix; a column of zeros counts as 1."""
    size_OI = w_OI.float().abs()
    mean_I, most_I = size_OI.mean(0), size_OI.amax(0)
    return float(torch.where(mean_I > 0, most_I / mean_I.clamp(min=1e-38), 1.0).amax())


class OutlierScore(Observer):
    """outlier_EJ: score of each expert's gate, up and down; 0 for a gate that is not there."""

    fields = {"outlier_EJ": "same"}
    needs_text = False

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.outlier_EJ = torch.zeros(shape.experts, len(MATRICES), dtype=torch.float64)

    def see_layer(self, layer: MoELayer) -> None:
        for e in range(self.shape.experts):
            weights = layer.bank.read(e)
            for j, w_OI in enumerate((weights.gate_IH, weights.up_IH, weights.down_HI)):
                if w_OI is not None:
                    self.outlier_EJ[e, j] = outlier_score(w_OI)
