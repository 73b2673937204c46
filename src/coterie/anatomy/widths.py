"""What can be taken out of a layer in equal pieces: the neurons of its experts, wherever their numbers lie.

A unit owns a few rows and columns in several tensors: a neuron one row of gate and up and one column of down, a group
of attention heads a block of rows in the query, key and value projections and a block of columns in the output. An
`Axis` says where the units of one kind lie in one tensor; the sums over a unit, the selection of units and the joining
of two sets of units are then the same for all of them.

It does not know which units matter, nor how a config names their number.
"""

# E owners (experts, or 1), U units, F kept units, P gate and up together (2U), H hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.anatomy.layers import MoELayer
from coterie.errors import ModelError


@dataclass(frozen=True)
class Axis:
    """Where the units of one kind lie in one tensor.

    name : of the tensor inside the model. dim : the dimension along which they lie. units : U.
    parts : how many rows of units lie along it (gate and up: 2). interleaved : the parts of one unit are neighbours.
    block : entries of one unit in one part. stacked : dimension 0 is the owner (the expert), each with its own choice.
    """

    name: str
    dim: int
    units: int
    parts: int = 1
    interleaved: bool = False
    block: int = 1
    stacked: bool = False

    def totals(self, tensor: Tensor) -> Tensor:
        """Sum over everything that belongs to a unit. Shape [E, U], float64."""
        split = (self.units, self.parts, self.block) if self.interleaved else (self.parts, self.units, self.block)
        view = tensor.reshape(*tensor.shape[: self.dim], *split, *tensor.shape[self.dim + 1 :])
        kept = {0} if self.stacked else set[int]()
        kept.add(self.dim + (0 if self.interleaved else 1))
        summed = view.sum([d for d in range(view.dim()) if d not in kept], dtype=torch.float64)
        return summed if self.stacked else summed[None]

    def shape(self, shape: Sequence[int], units: int) -> torch.Size:
        """The tensor's shape with that many units."""
        return torch.Size([*shape[: self.dim], self.parts * units * self.block, *shape[self.dim + 1 :]])

    def select(self, tensor: Tensor, kept_EF: Tensor) -> Tensor:
        """The tensor with the units `kept_EF` of every owner alone, in that order; a copy."""
        if not self.stacked:
            return tensor.index_select(self.dim, self._positions(kept_EF[0]).to(tensor.device))
        out = tensor.new_empty(self.shape(tensor.shape, kept_EF.shape[1]))
        for e, kept_F in enumerate(kept_EF):
            out[e] = tensor[e].index_select(self.dim - 1, self._positions(kept_F).to(tensor.device))
        return out

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor with the units of all given ones, which lie in each as this axis says but may differ in number."""
        if self.interleaved or self.parts == 1:
            return torch.cat(list(tensors), self.dim)
        pieces = [tensor.chunk(self.parts, self.dim) for tensor in tensors]
        return torch.cat([part[p] for p in range(self.parts) for part in pieces], self.dim)

    def _positions(self, kept_F: Tensor) -> Tensor:
        """Entries along `dim` of the given units, in the tensor's own arrangement."""
        part, entry = torch.arange(self.parts), torch.arange(self.block)
        kept_F = kept_F.cpu()
        if self.interleaved:
            first = kept_F[:, None] * self.parts + part[None]
        else:
            first = part[:, None] * self.units + kept_F[None]
        return (first[..., None] * self.block + entry).reshape(-1)


@dataclass(frozen=True)
class Units:
    """All units of one kind in one decoder layer.

    kind : "neurons" or "heads". layer : index of the decoder layer. name : path of the module that owns them.
    owners : E, each with a choice of its own. count : U, of every owner. axes : where they lie.
    """

    kind: str
    layer: int
    name: str
    owners: int
    count: int
    axes: tuple[Axis, ...]

    @property
    def names(self) -> list[str]:
        """Tensors that change shape when units go."""
        return [axis.name for axis in self.axes]


def neurons(moe: MoELayer) -> Units:
    """The neurons of all routed experts of a layer, by the contract's flags.

    The bias of the down projection belongs to the expert, not to a neuron, and is no part of them. Raises ModelError
    for experts that are stored as low-rank factors, which have no neurons.
    """
    if moe.bank.factored:
        raise ModelError(
            f"the experts of layer {moe.index} are stored as low-rank factors, and cannot be made narrower",
            "Slim them before they are factored.",
        )
    bank, experts, path = moe.bank, moe.experts, moe.experts_name
    I, flipped = bank.intermediate_size, bool(experts.is_transposed)  # noqa: E741
    parts = 2 if bank.has_gate else 1
    mixed = bank.has_gate and not experts.is_concatenated
    up = f"{path}.{'gate_up_proj' if bank.has_gate else 'up_proj'}"
    axes = [Axis(up, 2 if flipped else 1, I, parts, mixed, stacked=True)]
    if bank.has_bias:
        axes.append(Axis(f"{up}_bias", 1, I, parts, mixed, stacked=True))
    axes.append(Axis(f"{path}.down_proj", 1 if flipped else 2, I, stacked=True))
    return Units("neurons", moe.index, path, bank.num_experts, I, tuple(axes))
