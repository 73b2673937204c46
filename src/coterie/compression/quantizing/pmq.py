"""PMQ of MC# (arXiv:2510.10962) and MC (arXiv:2410.06270): widths for experts by an integer program, layer by layer.

    phi_i   share of tokens that selected expert i          w_i   its routing weight, summed over them
    eps_ij  || Z - Z_q ||_F of the layer's output with expert i alone rounded to j bits
    minimise  sum_ij phi_i^alpha w_i^beta (eps_ij)^gamma x_ij   with  sum_ij j x_ij <= n * mean,  sum_j x_ij = 1,
    and at least one expert of every width above the smallest. phi and w sum to 1 over a layer.

The paper sets gamma = 2; the released allocations come from gamma = 1, which is the default here. The released code
sums softmax scores before the router renormalises them; we take the weights that the model applied, which every router
tells. Its eps is a sum of norms over batches of 8 samples, ours the norm over all tokens.
"""

# E experts, N widths

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.allocation import check_budget, integer_program
from coterie.compression.bits import Allocation, expert_bytes, shapes_of, total_bytes
from coterie.compression.methods import method
from coterie.compression.quantizing.base import Quantizer, too_small
from coterie.compression.rounding import error_name, rounding_error
from coterie.errors import UsageError
from coterie.profiling.observers import GateMass, Observer, SelectionCount
from coterie.profiling.profile import LayerProfile
from coterie.streaming.model import StreamedModel


def significance(count_E: Tensor, mass_E: Tensor, alpha: float, beta: float) -> Tensor:
    """phi^alpha * w^beta of each expert, [E] float64; 0 for one that no token selected."""
    phi_E = count_E.double() / count_E.double().sum().clamp(min=1e-300)
    w_E = mass_E.double() / mass_E.double().sum().clamp(min=1e-300)
    return torch.where(count_E > 0, phi_E**alpha * w_E**beta, 0.0)


@method("pmq", kind="quantizing", paper="arXiv:2510.10962")
class Pmq(Quantizer):
    """Bits of experts by how often and how strongly they are used, and how much rounding them hurts."""

    others = 4

    mean: float = Field(2.5, gt=0, le=8, description="Mean bits of the routed experts of every layer, at most.")
    widths: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field((1, 2, 3), description="Widths an expert can have.")
    each_occurs: bool = Field(True, description="In every layer some expert has each width above the smallest.")
    alpha: float = Field(1.0, ge=0, description="Exponent of the selection frequency.")
    beta: float = Field(1.5, ge=0, description="Exponent of the routing weight.")
    gamma: float = Field(
        1.0, gt=0, description="Exponent of the rounding error; 2 in the paper, 1 in what it released."
    )

    @field_validator("widths")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give each width once, as [1, 2, 3]")
        return tuple(sorted(value))

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount, GateMass, rounding_error(self.widths, self.group_size))

    def budget(self, experts: int) -> int:
        """Bits of all experts of a layer together."""
        return int(self.mean * experts + 1e-9)

    def check_model(self, moe: Mapping[int, MoELayer]) -> None:
        for layer in moe.values():
            E = layer.bank.num_experts
            check_budget(E, self.widths, self.budget(E), each_occurs=self.each_occurs)

    def fitted(self, streamed: StreamedModel, target: int) -> Self:
        linears, (low, high) = self.linears(streamed), (min(self.widths), max(self.widths))
        small = {
            index: {p: [low] * moe.bank.num_experts for p in shapes_of(moe)} for index, moe in streamed.moe.items()
        }
        least = total_bytes(streamed, small, linears, self.grids)
        step = sum(  # bytes that one bit more for every expert takes
            (expert_bytes(moe, high, self.grids) - expert_bytes(moe, low, self.grids)) * moe.bank.num_experts
            for moe in streamed.moe.values()
        ) / max(high - low, 1)
        mean = min(low + (target - least) / step, high) if high > low else low
        chosen = self.model_copy(update={"mean": math.floor(mean * 1000) / 1000})
        try:
            chosen.check_model(streamed.moe)
        except UsageError:
            raise too_small(target, least, f"{low} bits for every expert and some with more") from None
        return chosen

    def allocate(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile]) -> Allocation:
        made = Allocation({}, self.linears(streamed))
        for index, moe in streamed.moe.items():
            layer, E = layers[index], moe.bank.num_experts
            matter_E = significance(layer.count_E, layer.gate_mass_E, self.alpha, self.beta)
            eps_EN = layer.stats[error_name(self.widths, self.group_size)].sqrt()
            cost_EN = matter_E[:, None] * eps_EN**self.gamma
            bits = integer_program(cost_EN, self.widths, self.budget(E), each_occurs=self.each_occurs)
            made.experts[index] = {p: list(bits) for p in shapes_of(moe)}
            made.scores[index] = [float(s) for s in matter_E]
            phi_E = layer.count_E.double() / layer.count_E.sum().clamp(min=1)
            made.why[index] = [
                f"{phi_E[e]:.1%} of selections, rounding error {', '.join(f'{eps:.3g}' for eps in eps_EN[e].tolist())}"
                f" at {', '.join(map(str, self.widths))} bits"
                for e in range(E)
            ]
        return made
