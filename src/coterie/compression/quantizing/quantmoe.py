"""QuantMoE-Bench (arXiv:2406.08155): where two widths go in an MoE model, by simple rules on an equal footing.

- heuristics: attention first, then shared experts, the experts tokens select most (r of every layer, or M of the whole
  model), the first k MoE blocks; any kind of matrix (gate, up, down) on request.
- outlier: single matrices of experts by max_j ( max_i |W_ij| / mean_i |W_ij| ), largest first.
- blocks: whole MoE blocks by how far they turn their tokens (`profiling.turning`), measured or foretold.
- random: the control at equal bits.

With `mean` an item that no longer fits is passed over, in that order. Base quantizer: GPTQ, as in the paper, whose grid
is symmetric; here that is --set symmetric=true. In the paper's 2-bit runs dead inputs zero weights of experts that no
token reaches; here they are rounded to nearest.
"""

# E experts, J matrices of an expert

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from coterie.compression.bits import ROLES, Allocation, Linear, Role, linears_of, total_bytes
from coterie.compression.methods import method
from coterie.compression.quantizing.base import Bits, Quantizer, too_small
from coterie.compression.two_levels import Item, Matrix, Weights, allocate, mean_of
from coterie.profiling.observers import Observer, SelectionCount
from coterie.profiling.outliers import MATRICES, OutlierScore
from coterie.profiling.profile import LayerProfile
from coterie.profiling.turning import turning, turning_name
from coterie.streaming.model import StreamedModel

PAPER = "arXiv:2406.08155"


class TwoLevels(Quantizer):
    """Base of the policies: two widths, and what gets the wider one."""

    low: Bits = Field(2, description="Bits of what nothing raises.")
    high: Bits = Field(4, description="Bits of what a rule raises.")
    mean: float | None = Field(
        None, gt=0, le=16, description="Mean bits of all linear layers and experts, at most; without it rules say all."
    )

    @model_validator(mode="after")
    def _ordered(self) -> TwoLevels:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        return self

    def role_bits(self, role: Role) -> int:
        said: int | None = getattr(self, f"{role}_bits")
        return self.low if said is None else said

    def fitted(self, streamed: StreamedModel, target: int) -> Self:
        weights = Weights.of(streamed)
        made = allocate(weights, self.low, {n.name: self.role_bits(n.role) for n in weights.linears}, [], None)
        least = total_bytes(streamed, made.experts, made.linears, self.grids)
        if least > target:
            raise too_small(target, least, f"{self.low} bits for every expert")
        mean = mean_of(weights, made) + 8 * (target - least) / weights.total
        return self.model_copy(update={"mean": math.floor(mean * 1000) / 1000})

    def items(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile], weights: Weights) -> list[Item]:
        """What deserves bits, first what deserves them most."""
        raise NotImplementedError

    def allocate(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile]) -> Allocation:
        weights = Weights.of(streamed)
        given = {n.name: self.role_bits(n.role) for n in weights.linears}
        return allocate(weights, self.low, given, self.items(streamed, layers, weights), self.mean)

    def whole(self, weights: Weights, layer: int) -> list[Matrix]:
        """All matrices of all experts of a layer."""
        return [matrix for matrix in weights.matrices if matrix[0] == layer]


@method("quantmoe-heuristics", kind="quantizing", paper=PAPER)
class Heuristics(TwoLevels):
    """More bits for attention, shared experts, experts used most and the first blocks."""

    attention_bits: Bits | None = Field(4, description="Bits of attention, raised first; dense blocks follow it.")
    shared_bits: Bits | None = Field(4, description="Bits of shared experts, raised second.")
    frequent: int = Field(2, ge=0, description="Of every layer, this many experts that most tokens select are raised.")
    frequent_total: int = Field(0, ge=0, description="Instead: this many of the whole model.")
    first_blocks: int = Field(4, ge=0, description="Experts of this many MoE blocks from the first are raised.")
    last_blocks: int = Field(0, ge=0, description="And from the last: the paper's control.")
    matrices: tuple[Literal["gate", "up", "down"], ...] = Field(
        (), description="Kinds of matrices raised in all experts."
    )

    @property
    def ranks_by_use(self) -> bool:
        return bool(self.frequent or self.frequent_total)

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount,) if self.ranks_by_use else ()

    def role_bits(self, role: Role) -> int:
        return self.low  # raised as items, so that a mean can leave them out

    def items(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile], weights: Weights) -> list[Item]:
        dense = self.dense_bits if self.dense_bits is not None else self.attention_bits
        wanted = {"attention": self.attention_bits, "dense": dense, "shared": self.shared_bits}
        found: list[Item] = []
        for role in sorted(ROLES, key=lambda role: role == "shared"):
            for index in range(len(streamed.layers)):
                linears: list[Linear] = [n for n in linears_of(streamed, index) if n.role == role]
                bits = wanted[role]
                if linears and bits is not None and bits > self.low:
                    found.append(Item(f"{role} of layer {index}", bits, linears=linears))
        for index, e, share in self._most_used(layers):
            matrices = [(index, e, p) for p in weights.shapes[index]]
            found.append(Item(f"selected most: {share:.1%} of its layer's selections", self.high, matrices))
        order = sorted(streamed.moe)
        for name, chosen in (("first", order[: self.first_blocks]), ("last", order[::-1][: self.last_blocks])):
            found += [Item(f"{name} blocks", self.high, self.whole(weights, index)) for index in chosen]
        for kind in self.matrices:
            found += [Item(f"all {kind} matrices", self.high, [m]) for m in weights.matrices if m[2] == kind]
        return found

    def _most_used(self, layers: Mapping[int, LayerProfile]) -> list[tuple[int, int, float]]:
        """(layer, expert, share of its layer's selections), most used first; ties to the lower layer and expert."""
        if not self.ranks_by_use:
            return []
        found = []
        for index, layer in layers.items():
            share_E = (layer.count_E.double() / layer.count_E.sum().clamp(min=1)).tolist()
            ranked = sorted(((index, e, share) for e, share in enumerate(share_E)), key=lambda entry: -entry[2])
            found += ranked if self.frequent_total else ranked[: self.frequent]
        found.sort(key=lambda entry: -entry[2])
        return found[: self.frequent_total] if self.frequent_total else found


@method("quantmoe-outlier", kind="quantizing", paper=PAPER)
class Outlier(TwoLevels):
    """More bits for single matrices of experts whose columns hold outliers; no text is looked at to choose."""

    attention_bits: Bits | None = Field(4, description="Bits of attention's linear layers; 16 leaves them.")
    shared_bits: Bits | None = Field(4, description="Bits of shared experts.")
    share: float = Field(0.25, ge=0, le=1, description="Share of the experts' matrices that is raised, without a mean.")

    def observes(self) -> tuple[type[Observer], ...]:
        return (OutlierScore,)

    def items(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile], weights: Weights) -> list[Item]:
        score = {m: float(layers[m[0]].outlier_EJ[m[1], MATRICES.index(m[2])]) for m in weights.matrices}
        ranked = sorted(weights.matrices, key=lambda m: -score[m])
        chosen = ranked if self.mean is not None else ranked[: math.floor(self.share * len(ranked) + 1e-9)]
        return [
            Item(f"{m[2]} has an outlier of {score[m]:.1f} times its column's mean", self.high, [m]) for m in chosen
        ]


@method("quantmoe-blocks", kind="quantizing", paper=PAPER)
class Blocks(TwoLevels):
    """More bits for the MoE blocks that turn their tokens most, as measured or as a small network foretells."""

    attention_bits: Bits | None = Field(4, description="Bits of attention's linear layers; 16 leaves them.")
    shared_bits: Bits | None = Field(4, description="Bits of shared experts.")
    blocks: int = Field(4, ge=0, description="How many blocks are raised, without a mean.")
    mode: Literal["predictor", "measured"] = Field("predictor", description="Whose cosines rank the blocks.")
    side: Literal["ffn", "residual"] = Field(
        "ffn", description="Cosine of the block's own input and output, or with x."
    )
    predictor_tokens: int = Field(20000, ge=20, description="Tokens of a layer that its predictor learns from.")

    def observes(self) -> tuple[type[Observer], ...]:
        return (turning(self.side, self.predictor_tokens),)

    def items(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile], weights: Weights) -> list[Item]:
        at = 1 if self.mode == "predictor" else 0
        cosine = {i: float(layers[i].stats[turning_name(self.side, self.predictor_tokens)][at]) for i in streamed.moe}
        ranked = sorted(streamed.moe, key=lambda index: cosine[index])
        chosen = ranked if self.mean is not None else ranked[: self.blocks]
        return [
            Item(f"its block's cosine is {cosine[i]:.3f}, rank {n + 1} from below", self.high, self.whole(weights, i))
            for n, i in enumerate(chosen)
        ]


@method("quantmoe-random", kind="quantizing", paper=PAPER)
class Random(TwoLevels):
    """The control of the other policies: more bits for random experts, matrices or blocks, at an equal mean."""

    attention_bits: Bits | None = Field(4, description="Bits of attention's linear layers; 16 leaves them.")
    shared_bits: Bits | None = Field(4, description="Bits of shared experts.")
    unit: Literal["expert", "matrix", "block"] = Field("expert", description="What is raised together.")
    share: float = Field(0.25, ge=0, le=1, description="Share of them that is raised, without a mean.")
    draw: int = Field(0, ge=0, description="Seed of the choice.")

    def items(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile], weights: Weights) -> list[Item]:
        sets: dict[tuple[int | str, ...], list[Matrix]] = {}
        for m in weights.matrices:
            key = m[: ("block", "expert", "matrix").index(self.unit) + 1]
            sets.setdefault(key, []).append(m)
        keys = list(sets)
        random.Random(self.draw).shuffle(keys)
        chosen = keys if self.mean is not None else keys[: math.floor(self.share * len(keys) + 1e-9)]
        return [Item("drawn at random", self.high, sets[key]) for key in chosen]
