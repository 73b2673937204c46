"""Second moments of what each expert receives and puts out: H x H numbers per expert.

They say which directions of an expert's weights its tokens use, for factorisations that lose what no token needs
(SVD-LLM's whitening). They are for a look at one layer while it is in memory and too large for a profile: E * H * H
float32 numbers each, 0.5 GiB for the 8 experts of a Mixtral layer, 2 GiB for 128 experts of hidden size 2048.
"""

# R rows routed to one expert, H hidden, E experts

from __future__ import annotations

import torch

from coterie.anatomy import MoELayer
from coterie.errors import ModelError
from coterie.profiling.observers import ExpertRows, LayerShape, Observer


class InputSecondMoment(Observer):
    """input_moment_EHH: sum of x x^T over the tokens routed to each expert, float32, not centred."""

    fields = {"input_moment_EHH": "sum"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.input_moment_EHH = torch.zeros(shape.experts, shape.hidden, shape.hidden)

    def see_outputs(self, rows: ExpertRows) -> None:
        x_RH = rows.x_RH.float()
        self.input_moment_EHH[rows.expert] += (x_RH.T @ x_RH).cpu()


class OutputSecondMoment(Observer):
    """output_moment_EHH: sum of y y^T over the tokens routed to each expert, y its output less its down bias, float32.

    y is the down projection of the inner activation alone. An expert that norms its output has no such y to see.
    """

    fields = {"output_moment_EHH": "sum"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_moment_EHH = torch.zeros(shape.experts, shape.hidden, shape.hidden)
        self._sum_EH = torch.zeros(shape.experts, shape.hidden, dtype=torch.float64)
        self._count_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_outputs(self, rows: ExpertRows) -> None:
        y_RH = rows.y_RH.float()
        self.output_moment_EHH[rows.expert] += (y_RH.T @ y_RH).cpu()
        self._sum_EH[rows.expert] += y_RH.double().sum(0).cpu()
        self._count_E[rows.expert] += len(y_RH)

    def see_layer(self, layer: MoELayer) -> None:
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise ModelError(
                f"layer {layer.index}: its experts norm what they put out, so their down projections are not seen",
                "Factor without moments.",
            )
        if not layer.bank.has_bias:
            return
        for expert in range(layer.num_experts):  # (y + b)(y + b)^T was added: s b^T + b s^T - n b b^T too much
            bias_H = layer.bank.read(expert, torch.float64).down_bias_H
            assert bias_H is not None
            bias_H, sum_H = bias_H.cpu(), self._sum_EH[expert]
            cross_HH = torch.outer(sum_H - self._count_E[expert] / 2 * bias_H, bias_H)
            self.output_moment_EHH[expert] -= (cross_HH + cross_HH.T).float()
