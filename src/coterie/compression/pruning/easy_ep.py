"""EASY-EP: keep the experts that a domain really uses, judged on a few demonstrations (arXiv:2504.06792).

For token t with hidden state h_t before the block's norm, applied gates g_te and raw expert outputs f_e(x_t):

    c_te = g_te * ||f_e(x_t)||_2
    s_t  = max(1 - cos(h_t, h_t + sum_e g_te f_e(x_t)), 0)
    I_e  = sum_t s_t * c_te

A sum, not a mean: how often a domain needs an expert counts, and tokens that the experts hardly move count little. Good
for one domain or a few named ones, not for general use: what the text does not show is not protected (REAP is the
neighbour for that). The paper's text is 5 to 25 dialogues of the domain with the model's own answers.

Several domains have equal say: sum_d I_de / sum_j I_dj, whatever their number of tokens.

Differs from the paper: routers with expert groups keep the same number in each group and are sliced, so that plain
readers can load the result; the paper chooses groups by all experts' scores, also those that are gone.
"""

# E experts, D domains

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.contribution import TokenContribution
from coterie.profiling.observers import GateMass, Observer, WeightedOutputNorm
from coterie.profiling.profile import LayerProfile


@method("easy-ep", kind="pruning", paper="arXiv:2504.06792")
class EasyEp(Method):
    """Keep the experts a domain really uses (few-shot, domain-specific)."""

    mix: Literal["equal", "sum"] = Field(
        "equal", description="Several domains: equal say for each, or the plain sum over all tokens."
    )
    variant: Literal["full", "gate-norm", "gate"] = Field(
        "full",
        description="The paper's ablation: without the token weight s_t, or the gate alone. These two are plain sums"
        " over all tokens, whatever `mix` says.",
    )

    def observes(self) -> tuple[type[Observer], ...]:
        return ({"full": TokenContribution, "gate-norm": WeightedOutputNorm, "gate": GateMass}[self.variant],)

    def score(self, layer: LayerProfile) -> Tensor:
        if self.variant == "gate-norm":
            return layer.weighted_norm_E
        if self.variant == "gate":
            return layer.gate_mass_E
        return mixed(layer.contribution_DE) if self.mix == "equal" else layer.contribution_DE.sum(0)


def mixed(score_DE: Tensor) -> Tensor:
    """Scores per domain added up with equal say: each domain is divided by the sum of its scores' sizes."""
    size_D1 = score_DE.abs().sum(1, keepdim=True)
    return (score_DE / size_D1.clamp(min=torch.finfo(score_DE.dtype).tiny)).sum(0)
