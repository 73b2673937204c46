"""Statistics of the weights alone: router rows, how alike experts' weights are, and how heavy their tails are.

No token has to pass for these, so `survey` collects them without text and without a forward pass.
"""

# E experts, H hidden, C columns (H, and one more where the router adds a bias to the logit)

from __future__ import annotations

import torch
from torch import Tensor

from coterie.anatomy import MoELayer, slice_names
from coterie.errors import ModelError
from coterie.profiling.observers import LayerShape, Observer

CHUNK = 2**22  # numbers widened to float64 at a time


class RouterRows(Observer):
    """router_rows_EC: what each expert's logit is made of: its row of router weights, then its logit bias if any.

    A bias that only takes part in the selection (`e_score_correction_bias`) is no part of the logit and is left out.
    """

    fields = {"router_rows_EC": "same"}
    needs_text = False
    needs_experts = False

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.router_rows_EC = torch.zeros(shape.experts, 0)

    def see_layer(self, layer: MoELayer) -> None:
        self.router_rows_EC = router_rows(layer)


def router_rows(layer: MoELayer) -> Tensor:
    """The rows of a router in memory, with the logit bias as last column. Shape [E, C], float32."""
    columns: list[Tensor] = []
    for path, dim in slice_names(layer).items():
        inside = path[len(layer.router_name) + 1 :] if path.startswith(f"{layer.router_name}.") else ""
        if not inside:
            continue
        owner, name = layer.router, inside
        while "." in name:
            child, _, name = name.partition(".")
            owner = owner.get_submodule(child)
        tensor = getattr(owner, name).detach().float().movedim(dim, 0).cpu()
        if tensor.dim() == 2 and tensor.numel() > layer.num_experts:
            columns.insert(0, tensor)
        elif name == "bias":
            columns.append(tensor.reshape(-1, 1))
    if not columns or columns[0].shape[1] == 1:
        raise ModelError(f"layer {layer.index}: its router keeps no row of weights per expert")
    return torch.cat(columns, 1)


class ExpertGram(Observer):
    """expert_gram_EE: scalar products of the experts' weights, each flattened to one vector, in float64.

    The distance of any expert to the mean of any set of experts follows from it (`distances_to_mean`).
    """

    fields = {"expert_gram_EE": "same"}
    needs_text = False

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.expert_gram_EE = torch.zeros(shape.experts, shape.experts, dtype=torch.float64)

    def see_layer(self, layer: MoELayer) -> None:
        E = layer.num_experts
        for tensor in layer.experts.parameters(recurse=False):
            if not tensor.dim() or tensor.shape[0] != E:
                continue
            for part in torch.split(tensor.detach().reshape(E, -1), max(CHUNK // E, 1), dim=1):
                wide = part.double()
                self.expert_gram_EE += (wide @ wide.T).cpu()


def distances_to_mean(gram_EE: Tensor, members: list[int]) -> Tensor:
    """Squared L2 distance of each member to the mean of all members. Shape [len(members)], float64."""
    inside = gram_EE.double()[members][:, members]
    return (inside.diagonal() - 2 * inside.mean(1) + inside.mean()).clamp(min=0)


class Moments:
    """Power sums of the weights that are not zero, for their kurtosis E[((w - mean) / std)^4] (3 for a normal).

    Weights that pruning has zeroed are gone, not values: what pruning does to the shape of the rest is the question.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)  # of w^0 .. w^4

    def add(self, weight: Tensor) -> None:
        for part in torch.split(weight.detach().reshape(-1), CHUNK):
            wide = part[part != 0].double()
            square = wide * wide
            powers = (wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum())
            self.sums += torch.stack([square.new_tensor(float(wide.numel())), *powers]).cpu()

    @property
    def kurtosis(self) -> float:
        """0 where there is nothing to speak of: no weight, or all alike."""
        count, *sums = self.sums.tolist()
        if not count:
            return 0.0
        m1, m2, m3, m4 = (s / count for s in sums)
        variance = m2 - m1 * m1
        if variance <= 1e-30:
            return 0.0
        return float((m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2)


def expert_kurtosis(layer: MoELayer, expert: int) -> float:
    """Kurtosis of one expert's weights, all projections together, biases left out."""
    moments = Moments()
    for tensor in layer.experts.parameters(recurse=False):
        if tensor.dim() == 3:
            moments.add(tensor[expert])
    return moments.kurtosis
