"""Two widths and a list of what deserves the wider one first: the common core of QuantMoE-Bench's policies.

A policy names items in the order they deserve bits: a set of matrices, of experts or linear layers, and the reason.
Without a mean all items get the wide width; with one, item after item does as long as the mean is not exceeded. Mean
bits are over the weights of everything that can be quantized: experts and the linear layers of decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.compression.bits import Allocation, Linear, all_linears, shapes_of
from coterie.errors import UsageError
from coterie.experts.packed import PLAIN
from coterie.streaming.model import StreamedModel

Matrix = tuple[int, int, str]  # layer, expert, projection


@dataclass
class Item:
    """Matrices that get the wide width together. bits : the width they get. why : the reason a reader is told."""

    why: str
    bits: int
    matrices: list[Matrix] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)


@dataclass(frozen=True)
class Weights:
    """Everything that can be quantized.

    shapes : {layer: {projection: (O, I)}}. experts : {layer: how many}. linears : the linear layers beside them.
    """

    shapes: dict[int, dict[str, tuple[int, int]]]
    experts: dict[int, int]
    linears: list[Linear]

    @classmethod
    def of(cls, streamed: StreamedModel) -> Weights:
        """Of a checkpoint."""
        return cls(
            {index: shapes_of(moe) for index, moe in streamed.moe.items()},
            {index: moe.bank.num_experts for index, moe in streamed.moe.items()},
            all_linears(streamed),
        )

    def count(self, matrix: Matrix) -> int:
        """Weights of one matrix."""
        layer, _, p = matrix
        return math.prod(self.shapes[layer][p])

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix of every expert."""
        return [(i, e, p) for i, shapes in self.shapes.items() for e in range(self.experts[i]) for p in shapes]

    @property
    def total(self) -> int:
        return sum(map(self.count, self.matrices)) + sum(math.prod(n.shape) for n in self.linears)


def mean_of(weights: Weights, made: Allocation) -> float:
    """Bits per weight of everything that can be quantized; scales are not counted."""
    bits = sum(made.experts[i][p][e] * weights.count((i, e, p)) for i, e, p in weights.matrices)
    bits += sum(made.linears.get(n.name, PLAIN) * math.prod(n.shape) for n in weights.linears)
    return bits / weights.total


def allocate(
    weights: Weights, low: int, linears: Mapping[str, int], items: Sequence[Item], mean: float | None
) -> Allocation:
    """Everything at `low` but the items.

    linears : widths of the linear layers that no item raises. mean : see above. An item never narrows what an earlier
    one made wide. Raises UsageError where the mean is below what it takes without any item.
    """
    made = Allocation(
        {i: {p: [low] * weights.experts[i] for p in shapes} for i, shapes in weights.shapes.items()}, dict(linears)
    )
    made.why = {i: [f"base: {low} bits"] * weights.experts[i] for i in weights.shapes}
    budget = None if mean is None else mean * weights.total
    spent = mean_of(weights, made) * weights.total
    if budget is not None and spent > budget + 0.5:
        raise UsageError(
            f"a mean of {mean:g} bits cannot be met: with nothing raised it is {spent / weights.total:.3f}",
            "Raise the mean, or lower --set low=, attention_bits= or shared_bits=.",
        )
    for item in items:
        grown = sum(
            max(item.bits - made.experts[i][p][e], 0) * weights.count((i, e, p)) for i, e, p in item.matrices
        ) + sum(max(item.bits - made.linears.get(n.name, PLAIN), 0) * math.prod(n.shape) for n in item.linears)
        if budget is not None and spent + grown > budget + 0.5:
            continue
        spent += grown
        for i, e, p in item.matrices:
            if made.experts[i][p][e] < item.bits:
                made.experts[i][p][e] = item.bits
                told = made.why[i][e]
                made.why[i][e] = item.why if told.startswith("base") else _joined(told, item.why)
        for n in item.linears:
            made.linears[n.name] = max(made.linears.get(n.name, PLAIN), item.bits)
    made.linears = {name: bits for name, bits in made.linears.items() if bits != PLAIN}
    made.facts = {i: {"mean_bits_of_the_model": round(spent / weights.total, 6)} for i in weights.shapes}
    return made


def _joined(one: str, two: str) -> str:
    return one if two in one else f"{one}; {two}"
